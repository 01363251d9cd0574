"""Writes snapshots on its own thread, and reads them back.

The origin of a stream's epoch, with the request, is written before the stream is accepted. Of the
snapshots that follow, a newer one replaces one that waits.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.errors import SnapshotRefused
from server.ops import metrics
from server.request import Lease
from server.snapshots.availability import Availability
from server.snapshots.claims import AlreadyClaimed, Claims
from server.snapshots.codec import Snapshot, content_of, output_snapshot
from server.snapshots.log_reader import LogReader
from server.snapshots.log_writer import LogWriter, needless_before
from server.snapshots.names import TOMBSTONE, Claim, claim_in, is_live, origin_name
from server.snapshots.sealer import Sealer, refuse_expired
from server.snapshots.store import Store
from server.snapshots.sweeper import Sweeper
from server.snapshots.waiting import Job, Waiting

_log = logging.getLogger(__name__)
WAITING_BYTES = 2**30
"""Memory for snapshots that wait to be written, where there is enough."""


class SnapshotWriter:
    """Stores streams in `store`, sealed by `sealer`; a snapshot expires after `ttl_s` seconds.

    waiting_bytes: most memory of snapshots that wait to be written.
    """

    def __init__(
        self, store: Store, sealer: Sealer, ttl_s: float, waiting_bytes: int = WAITING_BYTES
    ) -> None:
        self.on_lost: Callable[[Lease, bool], None] = lambda lease, deleted: None
        """Called on the writer's thread when a snapshot was written of a stream that another server
        claimed since, or that is deleted, with the lease that it was offered with. Whoever holds a
        lease of a later epoch has lost nothing."""
        self.on_stored: Callable[[Lease, bool], None] = lambda lease, stored: None
        """Called on the writer's thread when a stream of `begin_later` is in the store, and when
        one is not any more, since it expired."""
        self.store = store
        self._sealer = sealer
        self._log = LogWriter(store, sealer, ttl_s)
        self._reader = LogReader(store, sealer)
        self._claims = Claims(store)
        self._waiting = Waiting(waiting_bytes)
        self._changed = threading.Condition()
        self._writing: tuple[str, str] | None = None  # the stream whose snapshot is being written
        self._closing = False
        # Streams that began while the store was away.
        self._late: dict[tuple[str, str], tuple[Bundle, Lease]] = {}
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
        owner, stream_id = lease.owner, lease.stream_id
        with self._watched():
            names = self.store.names(owner, stream_id) if lease.epoch > 1 else set()
            claim = claim_in(names)
            if claim is not None and claim.is_above(lease.epoch - 1):
                raise AlreadyClaimed(claim)
            try:
                origin = self._log.origin(lease, checkpoints, names)
            except FileNotFoundError:
                raise AlreadyClaimed(self._claims.now(lease)) from None
            content = self._log.sealed(bundle, lease, origin, origin_name(lease.epoch))
            names = self._claims.make(lease, content)
        self._late.pop((owner, stream_id), None)
        with self._changed:
            self._waiting.withdraw(owner, stream_id, below=lease.epoch)
        self._remove(lease, needless_before(origin, lease.epoch, names))
        self._availability.worked()

    def begin_later(self, bundle: Bundle, lease: Lease) -> None:
        """Claim a new stream, for which `begin` raised OSError, when the store is back."""
        with self._changed:
            self._late[lease.owner, lease.stream_id] = bundle, lease
            self._changed.notify_all()

    def begin_never(self, lease: Lease) -> None:
        """The stream was not opened, so that it is not claimed later either."""
        self._late.pop((lease.owner, lease.stream_id), None)

    def forget(self, owner: str, stream_id: str) -> None:
        """Delete a stream for all servers, and what waits of it. Raises OSError."""
        self._late.pop((owner, stream_id), None)
        self._withdraw(owner, stream_id)
        self._log.forget(owner, stream_id)
        with self._watched():
            names = self.store.names(owner, stream_id)
            if not names:
                return
            if TOMBSTONE not in names:
                with suppress(FileExistsError):
                    self.store.create(owner, stream_id, TOMBSTONE, secrets.token_bytes(16))
            self.store.delete(owner, stream_id, keep=TOMBSTONE)

    def newest_epoch(self, owner: str, stream_id: str) -> Claim | None:
        """Who owns the stream now; None where nothing is stored of it. Raises OSError."""
        with self._watched():
            return claim_in(self.store.names(owner, stream_id))

    def load(self, owner: str, stream_id: str) -> Snapshot | None:
        """The caller's stream of that name. Raises SnapshotRefused, OSError."""
        with self._watched():
            return self._reader.read(owner, stream_id)

    def streams(self, owner: str) -> list[str]:
        """Names of the caller's streams that are stored, in order. Raises OSError."""
        with self._watched():
            return sorted(self.store.streams(owner, is_live))

    def export(self, bundle: Bundle, lease: Lease, checkpoints: Sequence[Checkpoint]) -> bytes:
        """A sealed snapshot of a whole stream."""
        outputs = [output_snapshot(output, each) for output, each in enumerate(checkpoints)]
        return self._log.sealed(bundle, lease, content_of(lease, outputs))

    def import_(self, sealed: bytes, owner: str) -> Snapshot:
        """The snapshot in an exported stream. Raises SnapshotRefused."""
        header, content = self._sealer.open(sealed, owner)
        if header.name:
            raise SnapshotRefused("this is a part of a stored stream, and no export")
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

    def _withdraw(self, owner: str, stream_id: str) -> None:
        """Write nothing more of a stream; what is being written ends first, else TimeoutError."""
        with self._changed:
            self._waiting.withdraw(owner, stream_id)
            limit_s = 2 * self.store.time_limit_s
            if not self._changed.wait_for(lambda: self._writing != (owner, stream_id), limit_s):
                raise TimeoutError("a snapshot of the stream is still being written")
            self._waiting.withdraw(owner, stream_id)  # one that could not be written waits again

    def _back(self) -> None:
        """The store works again."""
        try:
            self._claims.take_all_back()
        except OSError as error:
            self._availability.failed(error)
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while self._has_work():
            self._begin_late()
            if (job := self._next()) is None:
                continue
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

    def _has_work(self) -> bool:
        """Waits until there is something to write, and the store works; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or (self.is_up and (len(self._waiting) or self._late))
            )
            return not self._closing

    def _next(self) -> Job | None:
        """The snapshot to write next; None if there is none, or the store is away."""
        with self._changed:
            if not (len(self._waiting) and self.is_up):
                return None
            job = self._waiting.pop()
            self._writing = job.stream
            return job

    def _begin_late(self) -> None:
        """Claim the streams that began while the store was away."""
        for stream, (bundle, lease) in list(self._late.items()):
            with self._changed:
                if stream not in self._late:
                    continue
                self._writing = stream
            try:
                self._claim_late(bundle, lease)
            except OSError:
                return
            except Exception:
                self._late.pop(stream, None)
                _log.exception("a stream could not be stored")
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()

    def _claim_late(self, bundle: Bundle, lease: Lease) -> None:
        try:
            self.begin(bundle, lease)
        except AlreadyClaimed as other:
            self._late.pop((lease.owner, lease.stream_id), None)
            self._lose(lease, other.claim)
        else:
            self.on_stored(lease, True)

    def _write(self, job: Job) -> None:
        began = time.perf_counter()
        with self._watched():
            appended = self._log.append(job)
        metrics.SNAPSHOT_TIME.observe(time.perf_counter() - began)
        metrics.SNAPSHOT_BYTES.inc(appended.nbytes)
        self._availability.worked()
        self._remove(job.lease, appended.needless)
        if appended.claim is None or appended.claim.is_above(job.lease.epoch):
            self._lose(job.lease, appended.claim)

    def _lose(self, lease: Lease, claim: Claim | None) -> None:
        """Drop what waits of a stream that is not ours any more."""
        if claim is None:
            self.on_stored(lease, False)
            return
        below = claim.epoch if not claim.deleted and claim.epoch > lease.epoch else None
        with self._changed:
            self._waiting.withdraw(lease.owner, lease.stream_id, below)
        self.on_lost(lease, claim.deleted)

    def _remove(self, lease: Lease, names: Sequence[str]) -> None:
        """Drop what nobody reads any more, if that works; else it goes with the next sweep."""
        if not names:
            return
        try:
            self.store.remove(lease.owner, lease.stream_id, names)
        except OSError as error:
            self._availability.failed(error)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notices that the store is away, or works although it was."""
        try:
            yield
            if not self.is_up:
                self._availability.hurry()
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            self._availability.failed(error)
            raise
