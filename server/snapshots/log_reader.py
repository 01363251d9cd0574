"""Reads a stream from its log, as one snapshot. `server.snapshots.log_writer` says what that is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from concertina.v1 import snapshot_pb2 as pb
from server.errors import SnapshotRefused
from server.snapshots.codec import Snapshot
from server.snapshots.names import (
    OutputParts,
    TokensPart,
    chain,
    claim_in,
    epoch_of,
    origin_name,
    parts_of,
    state_name,
)
from server.snapshots.sealer import Sealer, refuse_expired
from server.snapshots.store import Store

_log = logging.getLogger(__name__)
_LOOKS = 5
_WHOLE_PARTS = 2
"""The format whose parts have the whole of their output, and no name."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of an output up to `end`, which are in the part of that name."""

    name: str
    end: int


class LogReader:
    """Reads logs from a `store`. May be used from several threads."""

    def __init__(self, store: Store, sealer: Sealer) -> None:
        self._store = store
        self._sealer = sealer

    def read(self, owner: str, stream_id: str) -> Snapshot | None:
        """The stream as its owner of now has stored it; None if there is none, or it is deleted.

        Raises SnapshotRefused, OSError.
        """
        looked_at: set[str] = set()
        for _ in range(_LOOKS):
            names = self._store.names(owner, stream_id)
            claim = claim_in(names)
            if claim is None or claim.deleted:
                return None
            look = _Look(self._store, self._sealer, owner, stream_id, names)
            try:
                content = look.content(claim.epoch)
            except _Missing as missing:
                if names == looked_at:
                    raise SnapshotRefused(f"what is stored of the stream lacks {missing}") from None
                looked_at = names
                continue
            # Whatever the clocks of those who wrote them, what was written last expires last.
            header = max(look.headers, key=lambda each: each.expires.ToNanoseconds())
            refuse_expired(header)
            return Snapshot(header, content, claim.epoch)
        raise OSError("the stream changes more quickly than it can be read")


class _Missing(Exception):
    """A part is not there, perhaps not any more."""


class _Look:
    """One look at a log, of which `names` are in the store. Methods raise _Missing."""

    def __init__(
        self, store: Store, sealer: Sealer, owner: str, stream_id: str, names: set[str]
    ) -> None:
        self.headers: list[pb.SnapshotHeader] = []
        self._store = store
        self._sealer = sealer
        self._owner = owner
        self._stream_id = stream_id
        self._names = names
        self._opened: dict[str, pb.Snapshot] = {}

    def content(self, epoch: int) -> pb.Snapshot:
        """The stream as the owner of an epoch has stored it."""
        self._open([origin_name(epoch)])
        origin = self._opened[origin_name(epoch)]
        if self.headers[0].version == _WHOLE_PARTS:
            return self._of_format_2(origin, epoch)
        request = origin.request
        if origin.prompt_epoch:
            self._open([origin_name(origin.prompt_epoch)])
            request.prompt = self._opened[origin_name(origin.prompt_epoch)].request.prompt
        self._open(origin_name(a.epoch) for stored in origin.outputs for a in stored.adopted)
        outputs = {stored.output: stored for stored in origin.outputs}
        for output in range(request.outputs):
            if parts_of(self._names, epoch, output) != OutputParts():
                outputs.setdefault(output, pb.OutputSnapshot(output=output))
        pieces = {o: list(self._pieces(stored, epoch)) for o, stored in outputs.items()}
        ends = {output: parts_of(self._names, epoch, output).end for output in outputs}
        self._open(piece.name for each in pieces.values() for piece in each)
        self._open(name for name in ends.values() if name)
        for output, stored in outputs.items():
            self._join(stored, pieces[output], epoch)
            if ends[output]:
                _cut(stored, self._part(ends[output], output))
            self._add_state(stored, epoch)
        return pb.Snapshot(request=request, outputs=outputs.values())

    def _of_format_2(self, origin: pb.Snapshot, epoch: int) -> pb.Snapshot:
        """Each part has the whole of its output."""
        latest = {stored.output: stored for stored in origin.outputs}
        for output in range(origin.request.outputs):
            if name := parts_of(self._names, epoch, output).whole:
                self._open([name])
                latest[output] = self._part(name, output)
        return pb.Snapshot(request=origin.request, outputs=latest.values())

    def _pieces(self, origin: pb.OutputSnapshot, epoch: int) -> Iterator[_Piece]:
        """Where the tokens of an output are, in order."""
        begin = 0
        places: list[tuple[int, int | None]] = [(each.epoch, each.end) for each in origin.adopted]
        for each, end in [*places, (epoch, None)]:
            name = origin_name(each)
            first = self._part(name, origin.output)
            parts = [
                TokensPart(first.first, first.first + first.tokens, name),
                *parts_of(self._names, each, origin.output).tokens,
            ]
            for part in chain(sorted(parts), begin, end):
                begin = part.end if end is None else min(part.end, end)
                yield _Piece(part.name, begin)
            if end is not None and begin < end:
                raise _Missing(f"tokens {begin} to {end} of epoch {each}")

    def _join(self, stored: pb.OutputSnapshot, pieces: Iterable[_Piece], epoch: int) -> None:
        """Give an output of an origin all of its tokens."""
        generated, logprobs, begin = [], [], 0
        for piece in pieces:
            part = self._part(piece.name, stored.output)
            here = slice(begin - part.first, piece.end - part.first)
            if not 0 <= here.start < here.stop <= part.tokens:
                raise SnapshotRefused(f"{piece.name} has other tokens than its name says")
            width = len(part.generated) // part.tokens
            generated.append(part.generated[width * here.start : width * here.stop])
            logprobs += part.logprobs[here]
            if epoch_of(piece.name) == epoch and part.HasField("first_token_seconds"):
                stored.queue_seconds = part.queue_seconds
                stored.first_token_seconds = part.first_token_seconds
            begin = piece.end
        stored.first, stored.tokens, stored.generated = 0, begin, b"".join(generated)
        del stored.logprobs[:], stored.adopted[:]
        stored.logprobs.extend(logprobs)

    def _add_state(self, stored: pb.OutputSnapshot, epoch: int) -> None:
        """Give an output its last state that can be used, if there is one."""
        states = parts_of(self._names, epoch, stored.output).states
        for pushed in sorted(states, reverse=True):
            if self._takes_state(stored, states[pushed], pushed):
                return
        if not stored.state_epoch:
            return
        inherited = state_name(stored.state_epoch, stored.output, stored.pushed)
        if inherited not in self._names:
            inherited = origin_name(stored.state_epoch)
        if not self._takes_state(stored, inherited, stored.pushed):
            stored.pushed = 0

    def _takes_state(self, stored: pb.OutputSnapshot, name: str, pushed: int) -> bool:
        try:
            self._open([name])
            part = self._part(name, stored.output)
            if part.pushed != pushed:
                raise SnapshotRefused("it is of another position")
        except (SnapshotRefused, _Missing) as error:
            _log.warning("a stored state cannot be used, so that an older one is: %s", error)
            return False
        stored.pushed, stored.state_epoch = pushed, 0
        stored.state.clear()
        stored.state.MergeFrom(part.state)
        return True

    def _part(self, name: str, output: int) -> pb.OutputSnapshot:
        """What is opened of an output under that name; empty if there is nothing."""
        for stored in self._opened[name].outputs:
            if stored.output == output:
                return stored
        return pb.OutputSnapshot(output=output)

    def _open(self, names: Iterable[str]) -> None:
        wanted = {name for name in names if name not in self._opened}
        found = self._store.get(self._owner, self._stream_id, wanted)
        for name in wanted - set(found):
            raise _Missing(name)
        for name, sealed in found.items():
            header, content = self._sealer.open(sealed, self._owner)
            if header.stream_id != self._stream_id:
                raise SnapshotRefused(f"{name} is of another stream")
            if header.version > _WHOLE_PARTS and header.name != name:
                raise SnapshotRefused(f"{name} was stored as {header.name or 'an export'}")
            self._opened[name] = content
            self.headers.append(header)


def _cut(stored: pb.OutputSnapshot, end: pb.OutputSnapshot) -> None:
    """End an output where its end says."""
    if stored.tokens:
        width = len(stored.generated) // stored.tokens
        stored.generated = stored.generated[: width * end.first]
        del stored.logprobs[end.first :]
    stored.tokens = min(stored.tokens, end.first)
    stored.finish.CopyFrom(end.finish)
