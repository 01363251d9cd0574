"""The engine of one bundle: a thread that owns its streams, and an inbox for other threads.

Other threads use the inbox (`admit`, `post`, `ask`). Subscribers get the updates of their streams
once a turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from math import inf

from concertina.machine import memory_bytes
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.admission import Ledger, Refusal, limits
from server.engine.decoding import Decoding
from server.engine.interfaces import SnapshotStore, StreamHolder
from server.engine.kv_cache import Cache, num_rows
from server.engine.lifecycle import StreamLifecycle
from server.engine.loop import StepLoop
from server.engine.placement import Placement
from server.engine.stream import Stream
from server.errors import EngineStopped, StepFailed
from server.ops.engine_metrics import EngineMetrics
from server.runtime.onnx_session import Runtime

_log = logging.getLogger(__name__)

Action = Callable[[], None]

NOT_OPENED = "the stream could not be opened; see the server's log"


class Engine:
    """Runs the streams of one bundle, on a thread that `start` starts.

    Its parts belong to this thread. Other threads may read them only while it stands still.
    idle_wait_s: longest sleep of the thread when there is nothing to do. wakeup: ends the sleep.
    """

    idle_wait_s = 1.0

    def __init__(
        self, bundle: Bundle, config: EngineConfig, snapshots: SnapshotStore | None = None
    ) -> None:
        self.bundle = bundle
        self.config = config = _without_drafts(config, bundle)
        self.runtime = Runtime(
            bundle, num_rows(bundle, config.slots), config.threads, config.provider
        )
        self.cache = Cache(bundle, self.runtime, config.slots, config.prefix_cache_bytes)
        self.placement = Placement(self.cache, config.stream_buffer)
        self.metrics = EngineMetrics(bundle.name)
        self.metrics.buffer_bytes(self.runtime.nbytes)
        most = limits(config, memory_bytes())
        about = bundle.manifest
        self.metrics.serves(most.state_bytes, about.version, about.fingerprint, about.attention)
        self.ledger = Ledger(bundle, most)
        self.decoding = Decoding(config, bundle, self.cache, self.placement, self.metrics)
        self._lock = threading.Lock()
        self.streams = StreamLifecycle(
            bundle,
            config,
            self.placement,
            self.decoding,
            self.ledger,
            self._lock,
            self.metrics,
            snapshots,
        )
        self._loop = StepLoop(
            bundle,
            config,
            self.cache,
            self.placement,
            self.decoding,
            self.streams,
            self.ledger,
            self.metrics,
        )
        self._inbox: deque[Action] = deque()
        self.wakeup = threading.Event()
        self._accepting = True
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{bundle.name}", daemon=True)

    # ---- called from any thread

    def start(self, holder: StreamHolder) -> None:
        """Start the thread. `holder` owns the streams."""
        self.streams.holder = holder
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs. A thread that has ended never runs again."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether the engine stops, has stopped, or has died."""
        return self._closing

    @property
    def num_actions(self) -> int:
        """Number of actions in the inbox."""
        return len(self._inbox)

    @property
    def is_empty(self) -> bool:
        """Whether no action waits and the engine holds no stream."""
        placement = self.placement
        places = (placement.waiting, placement.running, placement.paused, placement.prefilling)
        kept = (*places, self.streams.limited, self.cache.num_running, self._inbox)
        return self.ledger.is_empty and not any(kept)

    def require_room(self) -> None:
        """Raises Overloaded if no further stream can be admitted now, and EngineStopped."""
        with self._lock:
            self._require_open(admits=True)
            self._raise_if(self.ledger.full(time.monotonic()))

    def room_after_s(self, ends: int, of: int) -> float:
        """Estimated seconds until `ends` of some of its streams have ended, `of` how many."""
        with self._lock:
            held = self.ledger.held.streams
            return self.ledger.ends_after_s(ends * held / of, time.monotonic())

    def reserve(self, streams: Sequence[Stream]) -> None:
        """Make room for streams, all or none: `admit` them, or `release` the room.

        Raises Overloaded if there is no room now, InvalidRequest if there never is room, and
        EngineStopped.
        """
        with self._lock:
            self._require_open(admits=True)
            if streams:
                self._raise_if(self.ledger.admit(streams, time.monotonic()))

    def release(self, streams: Sequence[Stream]) -> None:
        """Give back the room of streams that were reserved and are not admitted."""
        with self._lock:
            for stream in streams:
                self.ledger.release(stream)

    def admit(self, streams: Sequence[Stream], register: Callable[[], Action]) -> None:
        """Take in streams that have room: call `register` and post the action that it returns.

        If that action raises, the streams end with StepFailed. Raises EngineStopped, and what
        `register` raises.
        """
        with self._lock:
            self._require_open(admits=True)
            action = register()
            self.post(lambda: self._open(streams, action))

    def stop_accepting(self) -> None:
        """Admit no further streams; those that are admitted continue."""
        self._accepting = False

    def ask(self, action: Action) -> Future[None]:
        """Post `action`. The future completes when it is done, with the exception that it raises.

        Cancelling the future before that drops the action. Raises EngineStopped.
        """
        answer: Future[None] = Future()

        def act() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                action()
                answer.set_result(None)
            except Exception as error:
                answer.set_exception(error)

        with self._lock:
            self._require_open()
            self.post(act)
        return answer

    def post(self, action: Action) -> None:
        """Run `action` on the engine's thread before the next turn."""
        self._inbox.append(action)
        self.wakeup.set()

    def wake(self) -> None:
        """Wake the thread up to plan again."""
        self.wakeup.set()

    def close(self) -> None:
        """Stop the thread. Streams that have not ended end with an error."""
        self._closing = True
        self.wakeup.set()
        self._thread.join()

    def _raise_if(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self.metrics.refused(refusal.reason)
            raise refusal.error

    def _require_open(self, admits: bool = False) -> None:
        if self._closing or (admits and not self._accepting):
            raise EngineStopped("the server is shutting down; try another one, or try again later")

    # ---- called on the engine's thread

    def _run(self) -> None:
        holder = self.streams.holder
        assert holder is not None
        try:
            turn_s = 0.0
            while not self._closing:
                # A full inbox may delay the next step of running streams by half a step, no more.
                self._take_inbox(turn_s / 2 if self.placement.running else inf)
                began = time.perf_counter()
                idle = self._loop.turn(holder)
                turn_s = time.perf_counter() - began
                if idle:
                    self.wakeup.wait(self._idle_s(holder))
                    self.wakeup.clear()
            holder.hand_over()
        except Exception:
            _log.exception("the engine of %s died", self.bundle.name)
        with self._lock:  # after this, `admit` and `ask` raise: no stream is left behind
            self._closing = True
        self._take_inbox()
        gone = EngineStopped("the model was taken down before the stream ended; try again later")
        self.streams.fail_all(gone)
        holder.publish()
        self.metrics.closed(self.runtime.nbytes)

    def _open(self, streams: Sequence[Stream], action: Action) -> None:
        try:
            action()
        except Exception:
            for stream in streams:
                self.streams.end(stream, StepFailed(NOT_OPENED))
            raise

    def _take_inbox(self, limit_s: float = inf) -> None:
        """Do what is in the inbox. After `limit_s` seconds the rest waits for the next turn."""
        began = time.perf_counter()
        while self._inbox and time.perf_counter() - began <= limit_s:
            action = self._inbox.popleft()
            try:
                action()
            except Exception:
                _log.exception("an action in the inbox of %s failed", self.bundle.name)

    def _idle_s(self, holder: StreamHolder) -> float:
        soonest = min(self.streams.next_expiry, holder.next_expiry)
        return max(0.0, min(self.idle_wait_s, soonest - time.monotonic()))


def _without_drafts(config: EngineConfig, bundle: Bundle) -> EngineConfig:
    """`config`, without draft tokens if they could change the output of the bundle's streams."""
    if not (config.draft_tokens and bundle.pairs_rows):
        return config
    few = bundle.manifest.quantisation.bits
    _log.warning(
        "draft_tokens is %d, but %s is served without drafts: its %s, and with these, tokens that "
        "are pushed together get other log-probabilities than one by one; for drafts, export the "
        "model without %s",
        config.draft_tokens,
        bundle.name,
        f"matrices have {few} bits" if few else "int8 caches depend on sums over tokens",
        " and ".join(["--weights"] * (few > 0) + ["--state int8"] * bundle.rounds_sums),
    )
    return replace(config, draft_tokens=0)
