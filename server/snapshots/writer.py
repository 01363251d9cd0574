"""Writes snapshots on a thread of its own, and reads them back.

Of a stream the store holds its `origin`, written before the stream is accepted, with what it goes
on behind if it does, and the latest snapshot of each output. Where two tell of one output, the
later counts. A newer snapshot replaces one that waits: an output has at most one waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from concertina.v1 import snapshot_pb2 as pb
from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.config import ConfigError
from server.errors import SnapshotRefused
from server.ops import metrics
from server.request import Lease
from server.snapshots.codec import Snapshot, content_of, header_of, output_snapshot
from server.snapshots.sealer import KEY_VARIABLE, Sealer, refuse_expired
from server.snapshots.store import Store

_log = logging.getLogger(__name__)
_ORIGIN = "origin"
_SWEEP_S = 60.0


def open_writer(uri: str, ttl_s: float) -> SnapshotWriter | None:
    """The writer to the store at `uri`; None for an empty one. Raises as `open_store` does."""
    opened = open_store(uri)
    return SnapshotWriter(*opened, ttl_s) if opened is not None else None


def open_store(uri: str) -> tuple[Store, Sealer] | None:
    """The store at `uri`, and what seals its contents; None for an empty one.

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


class SnapshotWriter:
    """Stores streams in `store`, sealed by `sealer`, for `ttl_s` seconds each."""

    def __init__(self, store: Store, sealer: Sealer, ttl_s: float) -> None:
        self._store = store
        self._sealer = sealer
        self._ttl_s = ttl_s
        self._waiting: dict[tuple[str, int], tuple[Bundle, Lease, int, Checkpoint]] = {}
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

    def offer(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        """Store how far an output is, soon."""
        with self._changed:
            self._waiting[lease.stream_id, output] = (bundle, lease, output, checkpoint)
            self._changed.notify_all()

    def begin(self, bundle: Bundle, lease: Lease, checkpoints: Sequence[Checkpoint] = ()) -> None:
        """Store that a stream was asked for, and what it goes on behind. Raises OSError.

        With `checkpoints`, what was stored of it before, or waits to be, counts no more.
        """
        if checkpoints:
            self._withdraw(lease.stream_id)
        outputs = [output_snapshot(output, each) for output, each in enumerate(checkpoints)]
        self._put(bundle, lease, _ORIGIN, outputs)

    def forget(self, owner: str, stream_id: str) -> None:
        """Drop all that is stored of a stream, and what waits. Raises OSError."""
        self._withdraw(stream_id)
        self._store.delete(owner, stream_id)

    def load(self, owner: str, stream_id: str) -> Snapshot | None:
        """The caller's stream of that name. Raises SnapshotRefused, OSError."""
        names = self._store.names(owner, stream_id)
        sealed = self._store.get(owner, stream_id, names).values()
        opened = [self._sealer.open(part, owner) for part in sealed]
        if not opened:
            return None
        opened.sort(key=lambda part: part[0].expires.ToNanoseconds())
        header, newest = opened[-1]
        if any(part.stream_id != stream_id for part, _ in opened):
            raise SnapshotRefused(f"what is stored of stream {stream_id} is of another stream")
        refuse_expired(header)
        latest = {output.output: output for _, part in opened for output in part.outputs}
        return Snapshot(header, pb.Snapshot(request=newest.request, outputs=latest.values()))

    def streams(self, owner: str) -> list[str]:
        """Names of the caller's streams of which something is stored. Raises OSError."""
        return sorted(self._store.streams(owner))

    def export(self, bundle: Bundle, lease: Lease, checkpoints: Sequence[Checkpoint]) -> bytes:
        """A whole stream, sealed."""
        outputs = [output_snapshot(output, each) for output, each in enumerate(checkpoints)]
        return self._sealed(bundle, lease, outputs)

    def import_(self, sealed: bytes, owner: str) -> Snapshot:
        """A stream that was exported. Raises SnapshotRefused."""
        header, content = self._sealer.open(sealed, owner)
        refuse_expired(header)
        return Snapshot(header, content)

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

    def _withdraw(self, stream_id: str) -> None:
        """Write nothing more of what waits of a stream; what was being written is written."""
        with self._changed:
            for key in [key for key in self._waiting if key[0] == stream_id]:
                del self._waiting[key]
            self._changed.wait_for(lambda: self._writing != stream_id)

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

    def _write(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        began = time.perf_counter()
        size = self._put(bundle, lease, str(output), [output_snapshot(output, checkpoint)])
        metrics.SNAPSHOT_TIME.observe(time.perf_counter() - began)
        metrics.SNAPSHOT_BYTES.inc(size)

    def _put(
        self, bundle: Bundle, lease: Lease, name: str, outputs: Sequence[pb.OutputSnapshot]
    ) -> int:
        sealed = self._sealed(bundle, lease, outputs)
        self._store.put(lease.owner, lease.stream_id, name, sealed)
        return len(sealed)

    def _sealed(self, bundle: Bundle, lease: Lease, outputs: Sequence[pb.OutputSnapshot]) -> bytes:
        return self._sealer.seal(header_of(bundle, lease, self._ttl_s), content_of(lease, outputs))
