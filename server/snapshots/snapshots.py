"""Snapshots of streams: what is in them, and how they are written and read.

Of a stream lie in the store its `origin`, written before it is accepted, with what it goes on
behind if it does, and the latest snapshot of each output. Of what is told twice, the later counts.
What is asked for while a write is under way replaces what waits: an output has never more than one
snapshot waiting.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from concertina.bundle.resources import ELEMENT_BYTES
from concertina.v1 import bundle_pb2
from concertina.v1 import snapshot_pb2 as pb
from server.api.convert import MAX_SECONDS, finish_from, finished_message, logprobs_messages
from server.bundles.bundle import Bundle
from server.config import ConfigError
from server.engine.events import Finish, Request
from server.engine.kv_cache import Parked
from server.engine.sampling.logprobs import TokenLogprobs
from server.engine.stream import Past, Terms
from server.errors import SnapshotRefused
from server.ops import metrics
from server.snapshots.sealer import KEY_VARIABLE, VERSION, Sealer, refuse_expired
from server.snapshots.store import Store

_log = logging.getLogger(__name__)
_ORIGIN = "origin"
_SWEEP_S = 60.0


@dataclass(frozen=True)
class Stored:
    """A stream as it lay in the store."""

    header: pb.SnapshotHeader
    snapshot: pb.Snapshot


def open_keeper(uri: str, ttl_s: float) -> Keeper | None:
    """The keeper of the store at `uri`; None for an empty one. Raises as `open_store` does."""
    opened = open_store(uri)
    return Keeper(*opened, ttl_s) if opened is not None else None


def open_store(uri: str) -> tuple[Store, Sealer] | None:
    """The store at `uri`, and what seals what lies there; None for an empty one.

    Raises ConfigError: for a store that others reach, the environment has to hold a key.
    """
    if not uri:
        return None
    store, sealer = Store(uri), Sealer.from_environment()
    if sealer is None:
        if store.is_shared:
            raise ConfigError(
                f"snapshots is {uri!r}, and {KEY_VARIABLE} is not set: snapshots hold what users "
                "wrote, and are sealed; make a key with: openssl rand -base64 32"
            )
        sealer = Sealer.for_this_process()
    return store, sealer


class Keeper:
    """Writes snapshots on a thread of its own."""

    def __init__(self, store: Store, sealer: Sealer, ttl_s: float) -> None:
        self._store = store
        self._sealer = sealer
        self._ttl_s = ttl_s
        self._waiting: dict[tuple[str, int], tuple[Bundle, Terms, int, Past]] = {}
        self._changed = threading.Condition()
        self._writing: str | None = None  # the stream of which a snapshot is being written
        self._closing = False
        self._swept_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def secret(self) -> bytes:
        """Known to all servers that share the store, and to nobody else."""
        return self._sealer.secret

    @property
    def is_durable(self) -> bool:
        """Whether what is kept outlives this process."""
        return self._store.is_shared

    def offer(self, bundle: Bundle, terms: Terms, output: int, past: Past) -> None:
        """Store what an output has behind it, soon."""
        with self._changed:
            self._waiting[terms.stream_id, output] = (bundle, terms, output, past)
            self._changed.notify_all()

    def begin(self, bundle: Bundle, terms: Terms, pasts: Sequence[Past] = ()) -> None:
        """Store that a stream was asked for, and the `pasts` it goes on behind. Raises OSError.

        What was stored of it before, and what still waits to be, counts no more.
        """
        if pasts:
            self._withdraw(terms.stream_id)
        outputs = [output_snapshot(output, past) for output, past in enumerate(pasts)]
        self._put(bundle, terms, _ORIGIN, outputs)

    def forget(self, terms: Terms) -> None:
        """Drop all that is stored of a stream, and what waits. Raises OSError."""
        self._withdraw(terms.stream_id)
        self._store.delete(terms.owner, terms.stream_id)

    def _withdraw(self, stream_id: str) -> None:
        """Write nothing any more of what waits of a stream; what is being written, is by now."""
        with self._changed:
            for key in [key for key in self._waiting if key[0] == stream_id]:
                del self._waiting[key]
            self._changed.wait_for(lambda: self._writing != stream_id)

    def load(self, owner: str, stream_id: str) -> Stored | None:
        """The caller's stream of that name. Raises SnapshotRefused, OSError."""
        sealed = self._store.get(owner, stream_id).values()
        opened = [self._sealer.open(part, owner) for part in sealed]
        if not opened:
            return None
        opened.sort(key=lambda part: part[0].expires.ToNanoseconds())
        header, newest = opened[-1]
        if any(part.stream_id != stream_id for part, _ in opened):
            raise SnapshotRefused(f"what is stored of stream {stream_id} is of another stream")
        refuse_expired(header)
        latest = {output.output: output for _, part in opened for output in part.outputs}
        return Stored(header, pb.Snapshot(request=newest.request, outputs=latest.values()))

    def streams(self, owner: str) -> list[str]:
        """Names of the caller's streams of which something is stored. Raises OSError."""
        return self._store.streams(owner)

    def export(self, bundle: Bundle, terms: Terms, pasts: Sequence[Past]) -> bytes:
        """A whole stream, sealed."""
        outputs = [output_snapshot(output, past) for output, past in enumerate(pasts)]
        return self._sealed(bundle, terms, outputs)

    def import_(self, sealed: bytes, owner: str) -> Stored:
        """A stream that was exported. Raises SnapshotRefused."""
        header, snapshot = self._sealer.open(sealed, owner)
        refuse_expired(header)
        return Stored(header, snapshot)

    def flush(self, limit_s: float) -> bool:
        """Wait until everything is written; whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._writing), limit_s)

    def close(self, limit_s: float) -> None:
        """Write what waits, and stop."""
        self.flush(limit_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._write_next()
                if time.monotonic() - self._swept_at > _SWEEP_S:
                    self._swept_at = time.monotonic()
                    self._store.sweep(self._ttl_s)
            except Exception:
                metrics.SNAPSHOT_FAILURES.inc()
                _log.exception("a snapshot could not be stored")

    def _write_next(self) -> None:
        """Write the snapshot that has waited longest, or wait for one for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, _SWEEP_S)
            if self._closing or not self._waiting:
                return
            key = next(iter(self._waiting))
            job = self._waiting.pop(key)
            self._writing = key[0]
        try:
            self._write(*job)
        finally:
            with self._changed:
                self._writing = None
                self._changed.notify_all()

    def _write(self, bundle: Bundle, terms: Terms, output: int, past: Past) -> None:
        began = time.perf_counter()
        size = self._put(bundle, terms, str(output), [output_snapshot(output, past)])
        metrics.SNAPSHOT_TIME.observe(time.perf_counter() - began)
        metrics.SNAPSHOT_BYTES.inc(size)

    def _put(
        self, bundle: Bundle, terms: Terms, name: str, outputs: Sequence[pb.OutputSnapshot]
    ) -> int:
        sealed = self._sealed(bundle, terms, outputs)
        self._store.put(terms.owner, terms.stream_id, name, sealed)
        return len(sealed)

    def _sealed(self, bundle: Bundle, terms: Terms, outputs: Sequence[pb.OutputSnapshot]) -> bytes:
        header = pb.SnapshotHeader(
            version=VERSION,
            stream_id=terms.stream_id,
            owner=terms.owner,
            model=bundle.name,
            fingerprint=bundle.manifest.fingerprint,
            accepted=_timestamp(terms.accepted_at),
            expires=_timestamp(time.time() + self._ttl_s),
            keep_seconds=terms.keep_s,
        )
        snapshot = pb.Snapshot(outputs=outputs)
        snapshot.request.ParseFromString(terms.origin)
        return self._sealer.seal(header, snapshot)


def output_snapshot(output: int, past: Past) -> pb.OutputSnapshot:
    """What an output has behind it, as it is stored."""
    tokens = np.array(past.generated)
    told = pb.OutputSnapshot(
        output=output,
        generated=tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(),
        logprobs=logprobs_messages(past.logprobs),
        base_tokens=past.base_tokens,
        base_characters=past.base_characters,
        queue_seconds=past.queue_s,
        first_token_seconds=past.first_token_s,
    )
    if past.parked is not None:
        told.pushed = past.parked.pushed
        for name, values in past.parked.state.items():
            told.state[name] = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    if past.finish is not None:
        told.finished.CopyFrom(finished_message(past.finish, 0))
    return told


def past_from(bundle: Bundle, request: Request, told: pb.OutputSnapshot) -> Past:
    """What the output of a `request` had behind it. Raises SnapshotRefused if it does not fit."""
    width = array(bundle.typecode).itemsize
    if len(told.generated) % width:
        raise SnapshotRefused("the snapshot's tokens are torn")
    generated = array(bundle.typecode)
    generated.extend(np.frombuffer(told.generated, f"<u{width}").tolist())
    if any(token >= bundle.manifest.vocabulary for token in set(generated)):
        raise SnapshotRefused("the snapshot has a token beyond the model's vocabulary")
    count, finish = len(generated), _finish(told)
    if max(count, told.base_tokens) > request.max_tokens or len(told.logprobs) not in (0, count):
        raise SnapshotRefused(
            f"the snapshot has {count} tokens, {len(told.logprobs)} log-probabilities, and "
            f"{told.base_tokens} tokens of before, of a stream of {request.max_tokens} tokens"
        )
    # The step that drew the last token, sent or not, had pushed all before it.
    known = min(len(request.prompt) - 1 + count + (finish is not None), bundle.context)
    if told.pushed > known:
        raise SnapshotRefused(f"the snapshot is at token {told.pushed}, and has only {known}")
    return Past(
        generated,
        _parked(bundle, told) if told.pushed else None,
        finish,
        [TokenLogprobs(t.logprob, tuple(t.top_ids), tuple(t.top_logprobs)) for t in told.logprobs],
        told.base_tokens,
        told.base_characters,
        _seconds(told, "queue_seconds"),
        _seconds(told, "first_token_seconds"),
    )


def _seconds(
    told: pb.OutputSnapshot, field: Literal["queue_seconds", "first_token_seconds"]
) -> float | None:
    if not told.HasField(field):
        return None
    value: float = getattr(told, field)
    if not 0 <= value <= MAX_SECONDS:
        raise SnapshotRefused(f"the snapshot's {field} is {value}, which no stream's is")
    return value


def _finish(told: pb.OutputSnapshot) -> Finish | None:
    if not told.HasField("finished"):
        return None
    try:
        return finish_from(told.finished)
    except ValueError as error:
        raise SnapshotRefused(f"the snapshot's output ended as none can: {error}") from None


def _parked(bundle: Bundle, told: pb.OutputSnapshot) -> Parked:
    pushed, state = told.pushed, {}
    for tensor in bundle.manifest.state:
        shape = list(tensor.shape)
        if tensor.kind == bundle_pb2.STATE_KIND_STACK:
            shape[1] = int(bundle.entries(pushed))
        elif tensor.kind == bundle_pb2.STATE_KIND_HISTORY:
            shape[0] = pushed
        content, width = told.state[tensor.name], ELEMENT_BYTES[tensor.data_type]
        if len(content) != math.prod(shape) * width:
            raise SnapshotRefused(f"the snapshot's state {tensor.name} has the wrong size")
        values = np.frombuffer(content, f"<f{width}")
        with np.errstate(over="ignore"):
            initial = values.dtype.type(tensor.initial)  # infinite, where it is beyond float16
        if not (np.isfinite(values) | (values == initial)).all():
            raise SnapshotRefused(f"the snapshot's state {tensor.name} is not finite")
        state[tensor.name] = values.reshape(shape)
    return Parked(state, pushed)


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
