"""Writes snapshots on its own thread, and reads them back.

Of a stream the store holds the `origin` of its owner's epoch, which is written before the stream
is accepted, with the request and what the stream goes on behind, if it does; and the latest
snapshot of each output since. A newer snapshot replaces one that waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from concertina.v1 import snapshot_pb2 as pb
from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.errors import SnapshotRefused
from server.ops import metrics
from server.request import Lease
from server.snapshots.availability import Availability
from server.snapshots.codec import Snapshot, content_of, header_of, output_snapshot
from server.snapshots.names import (
    TOMBSTONE,
    Claim,
    before_epoch,
    claim_in,
    of_epoch,
    origin_name,
    output_name,
)
from server.snapshots.sealer import Sealer, refuse_expired
from server.snapshots.store import Store
from server.snapshots.sweeper import Sweeper
from server.snapshots.waiting import Job, Waiting

_log = logging.getLogger(__name__)
_LOOKS = 5
_WAITING_BYTES = 2**30


class AlreadyClaimed(Exception):
    """Another server owns the stream, or it is deleted; `claim` tells."""

    def __init__(self, claim: Claim) -> None:
        super().__init__("the stream is deleted" if claim.deleted else "another server owns it")
        self.claim = claim


class SnapshotWriter:
    """Stores streams in `store`, sealed by `sealer`; a snapshot expires after `ttl_s` seconds."""

    def __init__(self, store: Store, sealer: Sealer, ttl_s: float) -> None:
        self.on_lost: Callable[[Lease, bool], None] = lambda lease, deleted: None
        """Called on the writer's thread when a snapshot was written of a stream that another server
        claimed since, or that is deleted, with the lease that it was offered with. Whoever holds a
        lease of a later epoch has lost nothing."""
        self.on_begun: Callable[[Lease], None] = lambda lease: None
        """Called on the writer's thread when a stream of `begin_later` is in the store."""
        self.store = store
        self._sealer = sealer
        self._ttl_s = ttl_s
        self._waiting = Waiting(_WAITING_BYTES)
        self._changed = threading.Condition()
        self._writing: tuple[str, str] | None = None  # the stream whose snapshot is being written
        self._closing = False
        self._late: set[tuple[str, str]] = set()  # streams that began while the store was away
        self._mistaken: set[tuple[str, str, str]] = set()  # claims that failed, but lie there
        self._taking_back = threading.Lock()
        self._availability = Availability(store.probe, self._back)
        self._sweeper = Sweeper(store, ttl_s)
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def secret(self) -> bytes:
        """A secret that all servers of the store share."""
        return self._sealer.secret

    @property
    def is_durable(self) -> bool:
        """Whether what is kept outlives this process."""
        return self.store.is_shared

    @property
    def is_up(self) -> bool:
        """Whether the store works, as far as we know."""
        return self._availability.is_up

    def look(self) -> None:
        """Find out whether the store works."""
        try:
            self.store.probe()
        except OSError as error:
            self._availability.failed(error)

    def offer(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        """Store how far an output is, soon; when the store is back, if it is away."""
        with self._changed:
            dropped = self._waiting.add(Job(bundle, lease, output, checkpoint))
            self._changed.notify_all()
        metrics.SNAPSHOT_FAILURES.inc(dropped)

    def begin(self, bundle: Bundle, lease: Lease, checkpoints: Sequence[Checkpoint] = ()) -> None:
        """Claim a stream in the epoch of its lease, and store what it goes on behind.

        What was stored of earlier epochs, or waits to be, counts no more. Raises AlreadyClaimed,
        and OSError; then nothing has changed.
        """
        if not self.is_up:
            raise OSError("the snapshot store is away")
        outputs = [output_snapshot(output, each) for output, each in enumerate(checkpoints)]
        content = self._sealed(bundle, lease, content_of(lease, outputs))
        owner, stream_id, name = lease.owner, lease.stream_id, origin_name(lease.epoch)
        with self._watched():
            self._take_back((owner, stream_id, name))
            try:
                self.store.create(owner, stream_id, name, content)
            except FileExistsError:
                claim = claim_in(self.store.names(owner, stream_id))
                raise AlreadyClaimed(claim or Claim(lease.epoch)) from None
            try:
                names = self.store.names(owner, stream_id)
            except OSError:
                self._mistaken.add((owner, stream_id, name))
                self._take_all_back()
                raise
        claim = claim_in(names)
        if claim is not None and claim.is_above(lease.epoch):
            self._remove(lease, [name])
            raise AlreadyClaimed(claim)
        self._late.discard((owner, stream_id))
        with self._changed:
            self._waiting.withdraw(owner, stream_id, below=lease.epoch)
        if older := before_epoch(names, lease.epoch):
            self._remove(lease, older)
        self._availability.worked()

    def begin_later(self, lease: Lease) -> None:
        """Claim a new stream, for which `begin` raised OSError, with the first snapshot of it."""
        self._late.add((lease.owner, lease.stream_id))

    def forget(self, owner: str, stream_id: str) -> None:
        """Delete a stream for all servers, and what waits of it. Raises OSError."""
        self._withdraw(owner, stream_id)
        self._late.discard((owner, stream_id))
        with self._watched():
            names = self.store.names(owner, stream_id)
            if not names:
                return
            if TOMBSTONE not in names:
                self.store.put(owner, stream_id, TOMBSTONE, b"deleted\n")
            self.store.delete(owner, stream_id, keep=TOMBSTONE)

    def newest_epoch(self, owner: str, stream_id: str) -> Claim | None:
        """Who owns the stream now; None where nothing is stored of it. Raises OSError."""
        with self._watched():
            return claim_in(self.store.names(owner, stream_id))

    def load(self, owner: str, stream_id: str) -> Snapshot | None:
        """The caller's stream of that name. Raises SnapshotRefused, OSError."""
        with self._watched():
            claim, parts = self._parts(owner, stream_id)
        opened = [self._sealer.open(part, owner) for part in parts]
        if claim is None or not opened:
            return None
        if any(part.stream_id != stream_id for part, _ in opened):
            raise SnapshotRefused(f"what is stored of stream {stream_id} is of another stream")
        # Whatever the clocks of those who wrote them, snapshots come after the origin.
        (_, origin), *_ = opened
        header = max((each for each, _ in opened), key=lambda each: each.expires.ToNanoseconds())
        refuse_expired(header)
        latest = {output.output: output for _, part in opened for output in part.outputs}
        content = pb.Snapshot(request=origin.request, outputs=latest.values())
        return Snapshot(header, content, claim.epoch)

    def streams(self, owner: str) -> list[str]:
        """Names of the caller's streams of which something is stored, in order. Raises OSError."""
        with self._watched():
            stored = self.store.streams(owner)
        claims = {stream_id: claim_in(names) for stream_id, names in stored.items()}
        return sorted(
            stream_id for stream_id, claim in claims.items() if claim and not claim.deleted
        )

    def export(self, bundle: Bundle, lease: Lease, checkpoints: Sequence[Checkpoint]) -> bytes:
        """A sealed snapshot of a whole stream."""
        outputs = [output_snapshot(output, each) for output, each in enumerate(checkpoints)]
        return self._sealed(bundle, lease, content_of(lease, outputs))

    def import_(self, sealed: bytes, owner: str) -> Snapshot:
        """The snapshot in an exported stream. Raises SnapshotRefused."""
        header, content = self._sealer.open(sealed, owner)
        refuse_expired(header)
        return Snapshot(header, content)

    def flush(self, limit_s: float) -> int:
        """Wait until everything is written; how many snapshots are not."""
        self._availability.hurry()
        with self._changed:
            self._changed.wait_for(lambda: not self._left, limit_s)
            return self._left

    def close(self, limit_s: float) -> None:
        """Write what waits, if the store works, and stop."""
        left = self.flush(limit_s if self.is_up else 0)
        if left:
            _log.error("%d snapshots could not be saved", left)
        self._sweeper.close()
        self._availability.close()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(limit_s if self.is_up else 0)

    @property
    def _left(self) -> int:
        return len(self._waiting) + (self._writing is not None)

    def _parts(self, owner: str, stream_id: str) -> tuple[Claim | None, list[bytes]]:
        """The newest claim of a stream, and all that is stored in its epoch, the origin first."""
        for _ in range(_LOOKS):
            names = self.store.names(owner, stream_id)
            claim = claim_in(names)
            if claim is None or claim.deleted:
                return None, []
            found = self.store.get(owner, stream_id, of_epoch(names, claim.epoch))
            if origin_name(claim.epoch) in found:
                return claim, list(found.values())
        raise OSError("the stream changes its owner more quickly than it can be read")

    def _withdraw(self, owner: str, stream_id: str) -> None:
        """Write nothing more of a stream; what is being written ends first, else TimeoutError."""
        with self._changed:
            self._waiting.withdraw(owner, stream_id)
            limit_s = 2 * self.store.time_limit_s
            if not self._changed.wait_for(lambda: self._writing != (owner, stream_id), limit_s):
                raise TimeoutError("a snapshot of the stream is still being written")
            self._waiting.withdraw(owner, stream_id)  # one that could not be written waits again

    def _take_back(self, claimed: tuple[str, str, str]) -> None:
        """Drop a claim of ours, if it lies there although we said that it failed."""
        with self._taking_back:
            if claimed in self._mistaken:
                owner, stream_id, name = claimed
                self.store.remove(owner, stream_id, [name])
                self._mistaken.discard(claimed)

    def _take_all_back(self) -> None:
        try:
            for claimed in list(self._mistaken):
                self._take_back(claimed)
        except OSError as error:
            self._availability.failed(error)

    def _back(self) -> None:
        """The store works again."""
        self._take_all_back()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            again = False
            try:
                self._write(job)
            except OSError:
                again = True
                metrics.SNAPSHOT_FAILURES.inc()
            except Exception:
                metrics.SNAPSHOT_FAILURES.inc()
                _log.exception("a snapshot could not be stored")
            with self._changed:
                if again and not self._closing:
                    metrics.SNAPSHOT_FAILURES.inc(self._waiting.add_again(job))
                self._writing = None
                self._changed.notify_all()

    def _next(self) -> Job | None:
        """The snapshot to write next, once there is one and the store works; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (len(self._waiting) and self.is_up))
            if self._closing:
                return None
            job = self._waiting.pop()
            self._writing = job.stream
            return job

    def _write(self, job: Job) -> None:
        began = time.perf_counter()
        lease, name = job.lease, output_name(job.lease.epoch, job.output)
        if job.stream in self._late and not self._begins(job):
            return
        # The request is in the origin.
        content = pb.Snapshot(outputs=[output_snapshot(job.output, job.checkpoint)])
        sealed = self._sealed(job.bundle, lease, content)
        with self._watched():
            self.store.put(lease.owner, lease.stream_id, name, sealed)
            claim = claim_in(self.store.names(lease.owner, lease.stream_id))
        metrics.SNAPSHOT_TIME.observe(time.perf_counter() - began)
        metrics.SNAPSHOT_BYTES.inc(len(sealed))
        self._availability.worked()
        if claim is not None and claim.is_above(lease.epoch):
            self._lose(lease, claim, name)

    def _begins(self, job: Job) -> bool:
        """Claim a stream late; False if another server has a stream of this name."""
        try:
            self.begin(job.bundle, job.lease)
        except AlreadyClaimed as other:
            self._late.discard(job.stream)
            continued = not other.claim.deleted and other.claim.epoch > job.lease.epoch
            with self._changed:
                self._waiting.withdraw(*job.stream, other.claim.epoch if continued else None)
            self.on_lost(job.lease, other.claim.deleted)
            return False
        self.on_begun(job.lease)
        return True

    def _lose(self, lease: Lease, claim: Claim, name: str) -> None:
        """Drop what we wrote of a stream that is not ours any more, and what waits of it."""
        below = None if claim.deleted else claim.epoch
        with self._changed:
            self._waiting.withdraw(lease.owner, lease.stream_id, below)
        self._remove(lease, [name])
        self.on_lost(lease, claim.deleted)

    def _remove(self, lease: Lease, names: Sequence[str]) -> None:
        """Drop what nobody reads any more, if that works; else it goes with the next sweep."""
        try:
            self.store.remove(lease.owner, lease.stream_id, names)
        except OSError as error:
            self._availability.failed(error)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notices that the store is away."""
        try:
            yield
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            self._availability.failed(error)
            raise

    def _sealed(self, bundle: Bundle, lease: Lease, content: pb.Snapshot) -> bytes:
        return self._sealer.seal(header_of(bundle, lease, self._ttl_s), content)
