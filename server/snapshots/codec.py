"""Converts leases and checkpoints to protobuf messages and back."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from concertina.v1 import snapshot_pb2 as pb
from server.bundles.bundle import Bundle
from server.bundles.state import StateKind
from server.checkpoint import Checkpoint, Finish, FinishReason, SavedState, TokenLogprobs
from server.errors import SnapshotRefused
from server.request import LONGEST_KEEP_S, Lease, Request
from server.snapshots.request_codec import requests_from, stored_request
from server.snapshots.sealer import VERSION

_LONGEST_S = 10**10  # more than any stream lasts


@dataclass(frozen=True)
class Snapshot:
    """A stream as read from the store or from an export."""

    header: pb.SnapshotHeader
    content: pb.Snapshot
    epoch: int = 1
    """That of the owner who wrote it."""

    @property
    def model(self) -> str:
        """Name of the stream's model."""
        name: str = self.header.model
        return name


def header_of(bundle: Bundle, lease: Lease, ttl_s: float, name: str = "") -> pb.SnapshotHeader:
    """The public header of what is made now and expires in `ttl_s` seconds.

    name: that under which it is stored; an export has none.
    """
    return pb.SnapshotHeader(
        version=VERSION,
        stream_id=lease.stream_id,
        owner=lease.owner,
        model=bundle.name,
        fingerprint=bundle.fingerprint,
        accepted=_timestamp(lease.accepted_at),
        expires=_timestamp(time.time() + ttl_s),
        keep_seconds=lease.keep_s,
        name=name,
    )


def content_of(lease: Lease, outputs: Sequence[pb.OutputSnapshot]) -> pb.Snapshot:
    """The encrypted part of a snapshot."""
    return pb.Snapshot(outputs=outputs, request=stored_request(lease.requests))


def output_snapshot(output: int, checkpoint: Checkpoint, first: int = 0) -> pb.OutputSnapshot:
    """The stored form of an output's checkpoint, without the tokens before `first`."""
    stored = tokens_part(output, checkpoint, first)
    stored.base_tokens = checkpoint.base_tokens
    stored.base_characters = checkpoint.base_characters
    if checkpoint.saved is not None:
        stored.MergeFrom(state_part(output, checkpoint.saved))
    if checkpoint.finish is not None:
        stored.finish.CopyFrom(_stored_finish(checkpoint.finish))
    return stored


def tokens_part(output: int, checkpoint: Checkpoint, first: int) -> pb.OutputSnapshot:
    """The generated tokens from `first` on, and what is known of the times."""
    tokens = np.array(checkpoint.generated[first:])
    return pb.OutputSnapshot(
        output=output,
        first=first,
        tokens=len(tokens),
        generated=tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(),
        logprobs=[
            pb.StoredLogprobs(logprob=p.logprob, top_ids=p.top_ids, top_logprobs=p.top_logprobs)
            for p in checkpoint.logprobs[first:]
        ],
        queue_seconds=checkpoint.queue_s,
        first_token_seconds=checkpoint.first_token_s,
    )


def state_part(output: int, saved: SavedState) -> pb.OutputSnapshot:
    """The state of an output."""
    stored = pb.OutputSnapshot(output=output, pushed=saved.pushed)
    for name, values in saved.state.items():
        stored.state[name] = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return stored


def end_part(output: int, tokens: int, finish: Finish) -> pb.OutputSnapshot:
    """How an output ended after so many generated tokens."""
    return pb.OutputSnapshot(output=output, first=tokens, finish=_stored_finish(finish))


def _stored_finish(finish: Finish) -> pb.StoredFinish:
    return pb.StoredFinish(
        reason=finish.reason.value,
        stop=finish.stop,
        generated=finish.generated,
        queue_seconds=finish.queue_s,
        first_token_seconds=finish.first_token_s,
        total_seconds=finish.total_s,
        state_bytes=finish.state_bytes,
    )


def restored(bundle: Bundle, snapshot: Snapshot) -> tuple[Lease, tuple[Checkpoint, ...]]:
    """The lease of a snapshot's stream, and a checkpoint for each output.

    Raises SnapshotRefused if the snapshot does not fit the bundle or contradicts itself.
    """
    header = snapshot.header
    if header.fingerprint != bundle.fingerprint:
        raise SnapshotRefused(
            f"the snapshot is of another bundle of {header.model!r}: its fingerprint is "
            f"{header.fingerprint[:16]}, the one served has {bundle.fingerprint[:16]}"
        )
    if not 0 < header.keep_seconds <= LONGEST_KEEP_S:
        raise SnapshotRefused(
            f"the snapshot's keep_seconds is {header.keep_seconds}; it must be above 0 and at most "
            f"{LONGEST_KEEP_S}"
        )
    requests = requests_from(bundle, snapshot.content.request)
    accepted_at = min(max(0.0, header.accepted.ToNanoseconds() / 1e9), time.time())
    lease = Lease(
        header.stream_id,
        requests,
        header.owner,
        header.keep_seconds,
        accepted_at,
        snapshot.epoch,
    )
    checkpoints = [Checkpoint(array(bundle.typecode))] * len(requests)
    for stored in snapshot.content.outputs:
        if (output := stored.output) < len(checkpoints):
            checkpoints[output] = _checkpoint(bundle, requests[output], stored)
    return lease, tuple(checkpoints)


def _checkpoint(bundle: Bundle, request: Request, stored: pb.OutputSnapshot) -> Checkpoint:
    """The checkpoint of one output. Raises SnapshotRefused if it does not fit the `request`."""
    width = array(bundle.typecode).itemsize
    if len(stored.generated) % width:
        raise SnapshotRefused(
            f"the snapshot's tokens have {len(stored.generated)} bytes, not a multiple of {width}"
        )
    generated = array(bundle.typecode)
    generated.extend(np.frombuffer(stored.generated, f"<u{width}").tolist())
    if any(token >= bundle.vocabulary for token in set(generated)):
        raise SnapshotRefused("the snapshot has a token outside the model's vocabulary")
    count, reported = len(generated), len(stored.logprobs)
    if max(count, stored.base_tokens) > request.max_tokens or reported not in (0, count):
        raise SnapshotRefused(
            f"the snapshot has {count} tokens, {reported} log-probabilities and base_tokens "
            f"{stored.base_tokens}, which a stream of {request.max_tokens} tokens cannot have"
        )
    finish = _finish(stored)
    # Every token but the last drawn one is pushed. An unsent last token is not in `count`.
    most = min(len(request.prompt) + count + (finish is not None), bundle.context)
    if stored.pushed > most:
        raise SnapshotRefused(
            f"the snapshot's state has {stored.pushed} tokens, but its stream has only {most}"
        )
    return Checkpoint(
        generated,
        _saved_state(bundle, stored) if stored.pushed else None,
        finish,
        [
            TokenLogprobs(p.logprob, tuple(p.top_ids), tuple(p.top_logprobs))
            for p in stored.logprobs
        ],
        stored.base_tokens,
        stored.base_characters,
        _seconds("queue_seconds", stored.queue_seconds)
        if stored.HasField("queue_seconds")
        else None,
        _seconds("first_token_seconds", stored.first_token_seconds)
        if stored.HasField("first_token_seconds")
        else None,
    )


def _finish(stored: pb.OutputSnapshot) -> Finish | None:
    if not stored.HasField("finish"):
        return None
    finish = stored.finish
    try:
        reason = FinishReason(finish.reason)
    except ValueError:
        unknown = finish.reason[:40]
        raise SnapshotRefused(f"the snapshot has an unknown finish reason: {unknown!r}") from None
    return Finish(
        reason,
        finish.stop if finish.HasField("stop") else None,
        finish.generated,
        _seconds("queue_seconds", finish.queue_seconds),
        _seconds("first_token_seconds", finish.first_token_seconds),
        _seconds("total_seconds", finish.total_seconds),
        finish.state_bytes,
    )


def _seconds(field: str, value: float) -> float:
    if not 0 <= value <= _LONGEST_S:
        raise SnapshotRefused(
            f"the snapshot's {field} is {value}; it must be between 0 and {_LONGEST_S}"
        )
    return value


def _saved_state(bundle: Bundle, stored: pb.OutputSnapshot) -> SavedState:
    pushed, state = stored.pushed, {}
    for tensor in bundle.state:
        shape = list(tensor.shape)
        if tensor.kind is StateKind.STACK:
            shape[1] = int(bundle.entries(pushed, tensor.kept))
        elif tensor.kind is StateKind.HISTORY:
            shape[0] = pushed
        content, width = stored.state[tensor.name], np.dtype(tensor.element).itemsize
        if len(content) != math.prod(shape) * width:
            raise SnapshotRefused(f"the snapshot's state {tensor.name} has the wrong size")
        values = np.frombuffer(content, np.dtype(tensor.element).newbyteorder("<"))
        with np.errstate(over="ignore"):
            initial = values.dtype.type(tensor.initial)  # may become infinite in float16
        if not (np.isfinite(values) | (values == initial)).all():
            raise SnapshotRefused(f"the snapshot's state {tensor.name} is not finite")
        state[tensor.name] = values.reshape(shape)
    return SavedState(state, pushed)


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
