"""The engine of one bundle: a thread that owns its streams, and the inbox by which others reach it.

Other threads meet it in two places only: the inbox (`admit`, `post`, `ask`), and the updates that
subscribers get, passed on once a turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import psutil

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.admission import Ledger, Refusal, limits
from server.engine.decoding import Decoding
from server.engine.interfaces import SnapshotStore, StreamHolder
from server.engine.kv_cache import Cache
from server.engine.lifecycle import StreamLifecycle
from server.engine.loop import StepLoop
from server.engine.placement import Placement
from server.engine.stream import Stream
from server.errors import EngineStopped
from server.ops.metrics import EngineMetrics
from server.runtime.onnx_session import Runtime

_log = logging.getLogger(__name__)

Action = Callable[[], None]


class Engine:
    """Runs the streams of one bundle once it is started.

    Its parts belong to the engine's thread: others may look at them while that stands still.
    idle_wait_s: how long the thread sleeps at most when there is nothing to do. wakeup: set when
    there may be something.
    """

    idle_wait_s = 1.0

    def __init__(
        self, bundle: Bundle, config: EngineConfig, snapshots: SnapshotStore | None = None
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.runtime = Runtime(bundle, config.slots + 1, config.threads, config.provider)
        self.cache = Cache(bundle, self.runtime, config.slots, config.prefix_cache_bytes)
        self.placement = Placement(self.cache, config.stream_buffer)
        self.metrics = EngineMetrics(bundle.name)
        self.metrics.buffer_bytes(self.runtime.nbytes)
        self.ledger = Ledger(bundle, limits(config, psutil.virtual_memory().total))
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
        """Begin to work, for the `holder` of its streams."""
        self.streams.holder = holder
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; once it does not, it never will again."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether it was told to stop, or has died."""
        return self._closing

    @property
    def num_actions(self) -> int:
        """Actions that wait in the inbox."""
        return len(self._inbox)

    @property
    def is_empty(self) -> bool:
        """Whether no action waits, and nothing of any stream is left anywhere."""
        placement = self.placement
        places = (placement.waiting, placement.running, placement.paused, placement.prefilling)
        kept = (*places, self.streams.limited, self.cache.num_running, self._inbox)
        return self.ledger.is_empty and not any(kept)

    def require_room(self) -> None:
        """Raises Overloaded while not one more stream is taken on, and EngineStopped."""
        with self._lock:
            self._require_open(takes_on=True)
            self._heed(self.ledger.full(time.monotonic()))

    def admit(self, streams: Sequence[Stream], register: Callable[[], Action]) -> None:
        """Take on streams, all or none. `register` is called if so, and what it returns is posted.

        Raises Overloaded while there is no room, InvalidRequest if there never is, EngineStopped.
        """
        with self._lock:
            self._require_open(takes_on=True)
            if streams:
                self._heed(self.ledger.admit(streams, time.monotonic()))
            self.post(register())

    def stop_accepting(self) -> None:
        """Take on nothing new; what is there goes on."""
        self._accepting = False

    def ask(self, action: Action) -> Future[None]:
        """Have `action` done as `post` does; the answer says when, or what it raised.

        It is not done if the answer is cancelled before. Raises EngineStopped.
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
        """Have `action` done on the engine's thread before the next step."""
        self._inbox.append(action)
        self.wakeup.set()

    def wake(self) -> None:
        """Look again at what there is to do."""
        self.wakeup.set()

    def close(self) -> None:
        """Stop. Streams that have not ended end with an error."""
        self._closing = True
        self.wakeup.set()
        self._thread.join()

    def _heed(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self.metrics.rejected(refusal.reason)
            raise refusal.error

    def _require_open(self, takes_on: bool = False) -> None:
        if self._closing or (takes_on and not self._accepting):
            raise EngineStopped("the server is shutting down; try another one, or again later")

    # ---- the thread's own, from here on

    def _run(self) -> None:
        holder = self.streams.holder
        assert holder is not None
        try:
            while not self._closing:
                self._take_inbox()
                if self._loop.turn(holder):
                    self.wakeup.wait(self._idle_s(holder))
                    self.wakeup.clear()
            holder.hand_over()
        except Exception:
            _log.exception("the engine of %s died", self.bundle.name)
        with self._lock:  # whatever was not refused is in the inbox by now
            self._closing = True
        self._take_inbox()
        gone = EngineStopped("the model was taken down before the stream ended; try again later")
        self.streams.fail_all(gone)
        holder.publish()
        self.metrics.closed(self.runtime.nbytes)

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _idle_s(self, holder: StreamHolder) -> float:
        soonest = min(self.streams.next_expiry, holder.next_expiry)
        return max(0.0, min(self.idle_wait_s, soonest - time.monotonic()))
