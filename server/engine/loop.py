"""One turn of the engine: plan → execute → publish."""

from __future__ import annotations

import time

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.admission import Ledger
from server.engine.decoding import Decoding
from server.engine.interfaces import StreamHolder
from server.engine.kv_cache import Cache
from server.engine.lifecycle import StreamLifecycle
from server.engine.placement import Placement
from server.engine.scheduler import DECODE, Load, Plan, next_credit, plan
from server.ops.engine_metrics import EngineMetrics


class StepLoop:
    """Asks the scheduler for a plan and executes it, once a turn, on the engine's thread."""

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        cache: Cache,
        placement: Placement,
        decoding: Decoding,
        streams: StreamLifecycle,
        ledger: Ledger,
        metrics: EngineMetrics,
    ) -> None:
        self._bundle = bundle
        self._config = config
        self._cache = cache
        self._placement = placement
        self._decoding = decoding
        self._streams = streams
        self._ledger = ledger
        self._metrics = metrics
        self._credit_s = 0.0

    def turn(self, holder: StreamHolder) -> bool:
        """Plan, execute, publish. Returns whether there was nothing to do."""
        now = time.monotonic()
        self._streams.expire(now)
        holder.expire(now)
        todo = DECODE if self._placement.only_runs else plan(self._load())
        try:
            self._execute(todo)
        except Exception:
            self._streams.fail_pass()
        holder.publish()
        self._measure(todo.idle)
        if todo.idle:
            self._decoding.rest()
        return todo.idle

    def _load(self) -> Load:
        free, returning = self._cache.num_free, self._placement.returning()
        preemptible = self._placement.preemptible(returning)
        return Load(
            num_running=self._cache.num_running,
            num_free=free,
            preemptible=tuple(s.priority for s in preemptible),
            returning=tuple(s.priority for s in returning),
            waiting=self._placement.head(free + len(preemptible) + 1),
            prefilling=self._placement.in_prefill_slot(),
            prefill_room=self._decoding.prefill_room,
            prefill_credit_s=self._credit_s,
        )

    def _execute(self, todo: Plan) -> None:
        placement = self._placement
        if todo != DECODE or len(placement.running) > 1:
            self._decoding.commit()
        if todo.preempt or todo.restore:
            self._exchange(todo)
        for _ in range(todo.begin):
            with self._streams.placing(placement.waiting[0]):
                self._streams.start(placement.begin())
        if todo.join:
            assert placement.prefilling is not None
            with self._streams.placing(placement.prefilling):
                placement.join()
        prefill_s = self._prefill(todo.prefill) if todo.prefill else 0.0
        if todo.start_prefill and placement.waiting[0].to_prefill:
            with self._streams.placing(placement.waiting[0]):
                self._streams.start(placement.start_prefill())
                # What a saved state has was not found in the prefix cache.
                looked_up = self._cache.prefill_looked_up
                found = self._cache.prefill_pushed if looked_up else 0
                self._metrics.shared(looked_up, found, self._cache.prefix_bytes)
        # What was to join the batch may have ended instead.
        decode_s = self._decode() if todo.decode and placement.running else 0.0
        share = self._config.prefill_share
        self._credit_s = next_credit(self._credit_s, share, prefill_s, decode_s)

    def _exchange(self, todo: Plan) -> None:
        """Park running streams for others of higher priority, and restore paused ones."""
        returning = self._placement.returning()
        for stream in self._placement.preemptible(returning)[: todo.preempt]:
            if stream.ended:  # since another one could not be parked
                continue
            with self._streams.placing(stream):
                self._placement.preempt(stream)
                stream.preemptions += 1
                self._metrics.preempted()
        for stream in returning[: todo.restore]:
            with self._streams.placing(stream):
                self._placement.restore(stream)

    def _prefill(self, count: int) -> float:
        stream = self._placement.prefilling
        assert stream is not None
        try:
            seconds, ending = self._decoding.prefill(stream, count)
        except Exception:
            self._streams.fail_pass(stream)
            return 0.0
        if ending is not None:
            self._streams.end(stream, ending)
        elif not stream.request.predicts_prompt:
            self._streams.snapshot_if_due(stream, self._cache.prefill_pushed)
        return seconds

    def _decode(self) -> float:
        began, streams = time.perf_counter(), list(self._placement.running)
        ended = self._decoding.decode()
        if self._streams.takes_snapshots:
            for stream, pushed in zip(streams, self._cache.pushed.tolist(), strict=True):
                if stream not in ended:
                    self._streams.snapshot_if_due(stream, pushed)
        for stream, ending in ended.items():
            self._streams.end(stream, ending)
        for stream in streams:
            lags = stream.subscriber.unread >= self._config.stream_buffer
            if lags and not stream.ended:
                with self._streams.placing(stream):
                    self._streams.pause_lagging(stream)
        return time.perf_counter() - began

    def _measure(self, idle: bool) -> None:
        if idle or self._metrics.are_due(time.monotonic()):
            self._metrics.observe()
            self._metrics.holding(
                len(self._placement.running),
                len(self._placement.waiting),
                len(self._placement.paused),
                self._cache.state_bytes(),
            )
            self._metrics.admitted(self._ledger.held.state_bytes)
