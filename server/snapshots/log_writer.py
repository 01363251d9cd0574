"""Writes a stream as a log: what is written of it grows as it grows.

The origin of an epoch has what the store does not have yet, and says where the rest is: tokens and
states of earlier epochs. After it come parts. Tokens are appended; a short last part is written
anew with what is new, so that there are few. A state is a shortcut to the end of the tokens: the
last two are kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from concertina.v1 import snapshot_pb2 as pb
from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.request import Lease, Prompt
from server.snapshots.codec import (
    end_part,
    header_of,
    output_snapshot,
    state_part,
    tokens_part,
)
from server.snapshots.names import (
    Claim,
    OutputParts,
    TokensPart,
    chain,
    claim_in,
    end_name,
    epoch_of,
    is_live,
    origin_name,
    parts_of,
    replaced,
    state_name,
    tokens_name,
)
from server.snapshots.request_codec import stored_request
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.waiting import Job

_KEPT_STATES = 2
_REMEMBERED = 10_000  # streams
_TAIL = 8  # a last part of fewer than so many times the new tokens is written anew, with them


@dataclass(frozen=True)
class Appended:
    """What a snapshot has added to a log.

    claim: who owns the stream; None where nobody claims it any more. needless: what nobody needs
    now that this is added.
    """

    claim: Claim | None
    nbytes: int = 0
    needless: Sequence[str] = ()


@dataclass(frozen=True)
class _Stored:
    """What the store has of an output in its epoch.

    begin, pushed: number of tokens that the origin stands for, and pushed into its state. end: of
    the tokens that are stored. tail: where the last part of them begins. state: tokens pushed into
    the last state. ended: whether the end is stored.
    """

    begin: int
    pushed: int
    tail: int = 0
    end: int = 0
    state: int = 0
    ended: bool = False

    def now(self, names: Iterable[str], epoch: int, output: int) -> _Stored:
        """The same, when these `names` are in the store."""
        parts = parts_of(names, epoch, output)
        *_, last = [TokensPart(self.begin, self.begin, ""), *chain(parts.tokens, self.begin)]
        state = max(parts.states, default=self.pushed)
        return _Stored(self.begin, self.pushed, last.first, last.end, state, bool(parts.end))


class LogWriter:
    """Writes logs to a `store`, sealed by `sealer`. What is written expires in `ttl_s` seconds.

    One thread appends; the rest may be called from others meanwhile.
    """

    def __init__(self, store: Store, sealer: Sealer, ttl_s: float) -> None:
        self._store = store
        self._sealer = sealer
        self._ttl_s = ttl_s
        # By stream, then by epoch and output. What is not here is looked up in the store.
        self._stored: OrderedDict[tuple[str, str], dict[tuple[int, int], _Stored]] = OrderedDict()

    def origin(
        self, lease: Lease, checkpoints: Sequence[Checkpoint], names: Iterable[str]
    ) -> pb.Snapshot:
        """The origin of an epoch that begins with `checkpoints`; `names` are in the store.

        Raises OSError, FileNotFoundError if that has changed meanwhile, and SnapshotRefused.
        """
        claim, before = claim_in(names), pb.Snapshot()
        if claim is not None:
            before = self._origin(lease, claim.epoch)
        origin = pb.Snapshot(
            request=stored_request(lease.requests),
            prompt_digest=_digest(lease.requests[0].prompt),
        )
        if claim is not None and before.prompt_digest == origin.prompt_digest:
            origin.prompt_epoch = before.prompt_epoch or claim.epoch
            origin.request.ClearField("prompt")
        former = {stored.output: stored for stored in before.outputs}
        for output, checkpoint in enumerate(checkpoints):
            if claim is None:
                origin.outputs.append(output_snapshot(output, checkpoint))
            else:
                stored = former.get(output, pb.OutputSnapshot(output=output))
                parts = parts_of(names, claim.epoch, output)
                origin.outputs.append(_behind(claim.epoch, stored, parts, checkpoint))
        return origin

    def append(self, job: Job) -> Appended:
        """Store what is new in a snapshot. Raises OSError."""
        lease, output = job.lease, job.output
        owner, stream_id, epoch = lease.owner, lease.stream_id, lease.epoch
        stored = self._stored.get((owner, stream_id), {}).get((epoch, output))
        if stored is None:
            names = self._store.names(owner, stream_id)
            claim = claim_in(names)
            if claim is None or claim.is_above(epoch):
                return Appended(claim)
            origin = self._origin(lease, epoch)
            before = {each.output: each for each in origin.outputs}.get(output, pb.OutputSnapshot())
            stored = _Stored(before.first + before.tokens, before.pushed).now(names, epoch, output)
        added, nbytes = [], 0
        for name, part in _new_parts(job, stored):
            sealed = self.sealed(job.bundle, lease, pb.Snapshot(outputs=[part]), name)
            with suppress(FileExistsError):  # an earlier try, which seemed to fail
                # What lands late stays: another server may have adopted it by then.
                self._store.create(owner, stream_id, name, sealed, is_live)
            added.append(name)
            nbytes += len(sealed)
        names = self._store.names(owner, stream_id)
        claim = claim_in(names)
        if claim is None or claim.deleted:
            return Appended(claim, nbytes, added)
        if claim.epoch > epoch:  # whoever claimed it meanwhile may have adopted what is added
            origin = self._origin(lease, claim.epoch)
            return Appended(claim, nbytes, needless_before(origin, claim.epoch, added))
        self._remember(job, stored.now(names, epoch, output))
        return Appended(claim, nbytes, _needless(names, epoch, output))

    def forget(self, owner: str, stream_id: str) -> None:
        """Remember nothing of a stream; nothing of it is being written."""
        self._stored.pop((owner, stream_id), None)

    def sealed(self, bundle: Bundle, lease: Lease, content: pb.Snapshot, name: str = "") -> bytes:
        """Seals what is stored under `name`, or an export."""
        return self._sealer.seal(header_of(bundle, lease, self._ttl_s, name), content)

    def _remember(self, job: Job, stored: _Stored) -> None:
        self._stored.setdefault(job.stream, {})[job.lease.epoch, job.output] = stored
        self._stored.move_to_end(job.stream)
        if len(self._stored) > _REMEMBERED:
            self._stored.popitem(last=False)

    def _origin(self, lease: Lease, epoch: int) -> pb.Snapshot:
        """The origin of an epoch; an empty one if it has another format."""
        name = origin_name(epoch)
        found = self._store.get(lease.owner, lease.stream_id, [name])
        if name not in found:
            raise FileNotFoundError(f"{name} is gone: the stream has another owner, or is deleted")
        header, origin = self._sealer.open(found[name], lease.owner)
        return origin if header.name == name else pb.Snapshot()


def needless_before(origin: pb.Snapshot, epoch: int, names: Iterable[str]) -> list[str]:
    """Of `names`, those of epochs before `epoch` that its origin does not need."""
    kept = {origin_name(origin.prompt_epoch)}
    for stored in origin.outputs:
        kept |= {origin_name(stored.state_epoch)}
        kept |= {state_name(stored.state_epoch, stored.output, stored.pushed)}
        for adopted in stored.adopted:
            kept |= {origin_name(adopted.epoch)}
            tokens = parts_of(names, adopted.epoch, stored.output).tokens
            kept |= {part.name for part in tokens if part.first < adopted.end}
    return [name for name in names if 0 <= epoch_of(name) < epoch and name not in kept]


def _behind(
    epoch: int, before: pb.OutputSnapshot, parts: OutputParts, checkpoint: Checkpoint
) -> pb.OutputSnapshot:
    """An output as the origin has it that comes after `epoch`, which began with `before`."""
    generated, begin = len(checkpoint.generated), before.first + before.tokens
    ends = [(each.epoch, each.end) for each in before.adopted]
    ends.append((epoch, max((part.end for part in chain(parts.tokens, begin)), default=begin)))
    adopted, first = [], 0
    for each, end in ends:
        if min(end, generated) > first:
            first = min(end, generated)
            adopted.append(pb.AdoptedTokens(epoch=each, end=first))
    stored, saved = output_snapshot(before.output, checkpoint, first), checkpoint.saved
    stored.adopted.extend(adopted)
    if saved is not None and saved.pushed in (*parts.states, before.pushed):
        stored.state.clear()
        inherited = saved.pushed not in parts.states and before.state_epoch
        stored.state_epoch = inherited or epoch
    return stored


def _new_parts(job: Job, stored: _Stored) -> Iterator[tuple[str, pb.OutputSnapshot]]:
    """What is new in a snapshot, by name."""
    epoch, output, checkpoint = job.lease.epoch, job.output, job.checkpoint
    end = len(checkpoint.generated)
    if end > stored.end:
        is_short = stored.end - stored.tail < _TAIL * (end - stored.end)
        first = stored.tail if is_short else stored.end
        yield tokens_name(epoch, output, first, end), tokens_part(output, checkpoint, first)
    # The end comes before the state, which may be behind a token that only the end tells of.
    if checkpoint.finish is not None and not stored.ended:
        yield end_name(epoch, output), end_part(output, end, checkpoint.finish)
    if checkpoint.saved is not None and checkpoint.saved.pushed > stored.state:
        pushed = checkpoint.saved.pushed
        yield state_name(epoch, output, pushed), state_part(output, checkpoint.saved)


def _needless(names: Iterable[str], epoch: int, output: int) -> list[str]:
    """What nobody needs of an output: tokens that another part has, and older states."""
    parts = parts_of(names, epoch, output)
    needless = replaced(parts, _KEPT_STATES)
    if len(parts.states) >= _KEPT_STATES:
        earlier = {epoch_of(name) for name in names} - {epoch}
        for each in earlier:
            needless += parts_of(names, each, output).states.values()
    return needless


def _digest(prompt: Prompt) -> bytes:
    tokens = prompt.tokens.astype(prompt.tokens.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(b"%d:" % prompt.start + tokens.tobytes()).digest()
