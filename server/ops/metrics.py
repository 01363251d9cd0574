"""Every metric of the server, in one table. Names follow vLLM's where the meaning is the same."""

from __future__ import annotations

import time

import psutil
from prometheus_client import Counter, Gauge, Histogram

from concertina.bundle.resources import KIND_NAMES

_GAUGE_INTERVAL_S = 0.25
_MEMORY_INTERVAL_S = 1.0

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_STEP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
_STATE_KINDS = tuple(KIND_NAMES.values())
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, ("model_name", *labels), multiprocess_mode="livesum")


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, ("model_name",), buckets=buckets)


RUNNING = _gauge("concertina_streams_running", "Streams that hold a slot.")
WAITING = _gauge("concertina_streams_waiting", "Streams that wait for a slot.")
PAUSED = _gauge("concertina_streams_paused", "Streams parked until their reader catches up.")
STATE_BYTES = _gauge("concertina_state_bytes", "Live state of the running streams.", "kind")
PROMISED_BYTES = _gauge(
    "concertina_state_promised_bytes", "State that the streams taken on may come to hold."
)
BUFFER_BYTES = _gauge("concertina_state_buffer_bytes", "State memory reserved for all slots.")
PROCESS_MEMORY = Gauge(
    "concertina_process_resident_memory_bytes",
    "Resident memory of the processes that hold an engine.",
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter("concertina_prompt_tokens", "Prompt tokens pushed.", ("model_name",))
SHARED_TOKENS = Counter(
    "concertina_prefix_cache_hits",
    "Prompt tokens that did not have to be pushed: an earlier prompt began with them.",
    ("model_name",),
)
PREFIX_BYTES = _gauge("concertina_prefix_cache_bytes", "Folded blocks kept for later prompts.")
DRAFT_TOKENS = Counter(
    "concertina_draft_tokens", "Tokens guessed ahead.", ("model_name", "outcome")
)
GENERATION_TOKENS = Counter("concertina_generation_tokens", "Tokens drawn.", ("model_name",))
FINISHED = Counter(
    "concertina_streams_finished", "Streams that ended.", ("model_name", "finished_reason")
)
REJECTED = Counter("concertina_streams_rejected", "Requests refused.", ("model_name", "reason"))
PREEMPTED = Counter(
    "concertina_streams_preempted",
    "Running streams parked for one of a higher priority.",
    ("model_name",),
)
FOLDS = Counter("concertina_folds", "Blocks folded into summaries.", ("model_name",))
TIME_TO_FIRST_TOKEN = _histogram(
    "concertina_time_to_first_token_seconds", "From acceptance to the first token.", _TTFT
)
INTER_TOKEN = _histogram(
    "concertina_inter_token_latency_seconds",
    "Between two tokens of the running streams; observed once a step, not once a token.",
    _STEP,
)
QUEUE_TIME = _histogram(
    "concertina_stream_queue_time_seconds", "From acceptance until work on it began.", _TTFT
)
STREAM_TIME = _histogram(
    "concertina_e2e_stream_latency_seconds", "From acceptance to the end.", _LONG
)
STEP_TIME = Histogram(
    "concertina_step_seconds", "One pass of the model.", ("model_name", "phase"), buckets=_STEP
)
SNAPSHOT_TIME = Histogram(
    "concertina_snapshot_seconds", "One snapshot, from its bytes until it is stored.", buckets=_STEP
)
SNAPSHOT_BYTES = Counter("concertina_snapshot_bytes", "Snapshots stored, sealed.")
SNAPSHOT_FAILURES = Counter("concertina_snapshot_failures", "Snapshots that could not be stored.")
RESUMED = Counter(
    "concertina_streams_resumed",
    "Readers that came back: to a stream held here, or revived from the store.",
    ("model_name", "source"),
)
BATCH_SIZE = _histogram("concertina_step_batch_size", "Streams in one decode step.", _BATCH)


class EngineMetrics:
    """The metrics of one engine, its label filled in."""

    def __init__(self, model_name: str) -> None:
        self._name = model_name
        self._held_at = self._memory_at = 0.0
        self._running = RUNNING.labels(model_name)
        self._waiting = WAITING.labels(model_name)
        self._paused = PAUSED.labels(model_name)
        self._state = {kind: STATE_BYTES.labels(model_name, kind) for kind in _STATE_KINDS}
        self._promised = PROMISED_BYTES.labels(model_name)
        self._inter_token = INTER_TOKEN.labels(model_name)
        self._batch_size = BATCH_SIZE.labels(model_name)
        self._decode_time = STEP_TIME.labels(model_name, "decode")
        self._prefill_time = STEP_TIME.labels(model_name, "prefill")
        self._generated = GENERATION_TOKENS.labels(model_name)
        self._folds = FOLDS.labels(model_name)

    def buffer_bytes(self, size: int) -> None:
        """State memory was reserved, beside that of an engine of the same name which leaves."""
        BUFFER_BYTES.labels(self._name).inc(size)

    def closed(self, size: int) -> None:
        """The engine holds nothing any more, and gave back the state memory it had reserved."""
        BUFFER_BYTES.labels(self._name).dec(size)
        PREFIX_BYTES.labels(self._name).set(0)
        self.holding(0, 0, 0, dict.fromkeys(_STATE_KINDS, 0))
        self.promising(0)

    def are_due(self, now: float) -> bool:
        """Whether a busy engine should tell what it holds; it need not after every step."""
        return now - self._held_at >= _GAUGE_INTERVAL_S

    def holding(self, running: int, waiting: int, paused: int, state: dict[str, int]) -> None:
        """What the engine holds after a turn of its loop."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._paused.set(paused)
        for kind, size in state.items():
            self._state[kind].set(size)
        self._held_at = time.monotonic()
        if self._held_at - self._memory_at > _MEMORY_INTERVAL_S:
            self._memory_at = self._held_at
            PROCESS_MEMORY.set(psutil.Process().memory_info().rss)

    def promising(self, size: int) -> None:
        """The state that the streams taken on may come to hold."""
        self._promised.set(size)

    def preempted(self) -> None:
        """A running stream was parked for one of a higher priority."""
        PREEMPTED.labels(self._name).inc()

    def stepped(
        self, batch: int, seconds: float, since_last: float | None, tokens: int | None = None
    ) -> None:
        """A decode step of `batch` streams was done, `since_last` after the one before it.

        It drew a token for each of them, unless it drew another number of `tokens`.
        """
        self._batch_size.observe(batch)
        self._decode_time.observe(seconds)
        self._generated.inc(batch if tokens is None else tokens)
        if since_last is not None:
            self._inter_token.observe(since_last)

    def drafted(self, proposed: int, accepted: int) -> None:
        """So many tokens were guessed ahead, and so many of them were right."""
        if proposed:
            DRAFT_TOKENS.labels(self._name, "accepted").inc(accepted)
            DRAFT_TOKENS.labels(self._name, "rejected").inc(proposed - accepted)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Prompt tokens were pushed."""
        PROMPT_TOKENS.labels(self._name).inc(tokens)
        self._prefill_time.observe(seconds)

    def shared(self, tokens: int, kept: int) -> None:
        """So many tokens of a prompt were found folded; `kept` bytes are held for such prompts."""
        SHARED_TOKENS.labels(self._name).inc(tokens)
        PREFIX_BYTES.labels(self._name).set(kept)

    def folded(self, blocks: int) -> None:
        """Blocks became summaries."""
        if blocks:
            self._folds.inc(blocks)

    def started(self, queued_s: float) -> None:
        """A stream left the queue."""
        QUEUE_TIME.labels(self._name).observe(queued_s)

    def first_token(self, seconds: float) -> None:
        """A stream got its first token."""
        TIME_TO_FIRST_TOKEN.labels(self._name).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """A stream ended, for whatever reason."""
        FINISHED.labels(self._name, reason).inc()
        STREAM_TIME.labels(self._name).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused."""
        REJECTED.labels(self._name, reason).inc()
