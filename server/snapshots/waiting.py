"""Snapshots that wait to be written: of each output the newest."""

from __future__ import annotations

from dataclasses import dataclass

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.request import Lease

_TOKEN_BYTES = 8
_REPORT_BYTES = 400  # of the log-probabilities of a token


@dataclass(frozen=True)
class Job:
    """A snapshot that is to be written."""

    bundle: Bundle
    lease: Lease
    output: int
    checkpoint: Checkpoint

    @property
    def stream(self) -> tuple[str, str]:
        """Owner and name of its stream."""
        return self.lease.owner, self.lease.stream_id

    @property
    def nbytes(self) -> int:
        """Memory that it holds, roughly."""
        saved = self.checkpoint.saved
        state = sum(values.nbytes for values in saved.state.values()) if saved else 0
        reports = _REPORT_BYTES * len(self.checkpoint.logprobs)
        return state + reports + _TOKEN_BYTES * len(self.checkpoint.generated)


class Waiting:
    """Jobs, in turn: by owner, then by stream. Not for several threads at once."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._jobs: dict[str, dict[str, dict[int, Job]]] = {}
        self._bytes: dict[str, int] = {}  # by owner
        self._count = self._total = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job) -> int:
        """Have it wait in place of an older one of its output; how many others were dropped.

        Those are dropped, if all is too large, which wait longest of the owner who has most.
        """
        outputs = self._jobs.get(job.lease.owner, {}).get(job.lease.stream_id, {})
        before = outputs.get(job.output)
        if before is not None:
            if before.lease.epoch > job.lease.epoch:
                return 0
            outputs[job.output] = job
            self._weigh(before, -1)
        else:
            streams = self._jobs.setdefault(job.lease.owner, {})
            streams.setdefault(job.lease.stream_id, {})[job.output] = job
        self._weigh(job, 1)
        dropped = 0
        while self._total > self._most_bytes and self._count > 1:
            self._pop(max(self._bytes, key=self._bytes.__getitem__))
            dropped += 1
        return dropped

    def add_again(self, job: Job) -> int:
        """Have one wait that could not be written, unless a newer one does; as `add` does."""
        outputs = self._jobs.get(job.lease.owner, {}).get(job.lease.stream_id, {})
        return 0 if job.output in outputs else self.add(job)

    def pop(self) -> Job:
        """The next one. There must be one."""
        return self._pop(next(iter(self._jobs)))

    def withdraw(self, owner: str, stream_id: str, below: int | None = None) -> None:
        """Drop what waits of a stream; of epochs before `below` only, if it is given."""
        outputs = self._jobs.get(owner, {}).get(stream_id, {})
        for job in list(outputs.values()):
            if below is None or job.lease.epoch < below:
                self._remove(job)

    def _pop(self, owner: str) -> Job:
        """The next one of an owner; then it is the turn of others, and of its other streams."""
        streams = self._jobs.pop(owner)
        self._jobs[owner] = streams
        stream_id = next(iter(streams))
        outputs = streams.pop(stream_id)
        streams[stream_id] = outputs
        job = next(iter(outputs.values()))
        self._remove(job)
        return job

    def _remove(self, job: Job) -> None:
        streams = self._jobs[job.lease.owner]
        outputs = streams[job.lease.stream_id]
        del outputs[job.output]
        self._weigh(job, -1)
        if not outputs:
            del streams[job.lease.stream_id]
        if not streams:
            del self._jobs[job.lease.owner], self._bytes[job.lease.owner]

    def _weigh(self, job: Job, sign: int) -> None:
        self._count += sign
        self._total += sign * job.nbytes
        self._bytes[job.lease.owner] = self._bytes.get(job.lease.owner, 0) + sign * job.nbytes
