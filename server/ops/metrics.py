"""All metrics of the server. Names follow vLLM's where the meaning is the same."""

from __future__ import annotations

import time

import psutil
from prometheus_client import Counter, Gauge, Histogram

from concertina.bundle.resources import KIND_NAMES

GAUGE_INTERVAL_S = 0.25
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
STATE_BYTES = _gauge("concertina_state_bytes", "State of the running streams.", "kind")
ADMITTED_BYTES = _gauge(
    "concertina_state_admitted_bytes", "Largest state that all admitted streams can reach."
)
BUFFER_BYTES = _gauge(
    "concertina_state_buffer_bytes", "Memory reserved for the state of all slots."
)
PROCESS_MEMORY = Gauge(
    "concertina_process_resident_memory_bytes",
    "Resident memory of the processes that hold an engine.",
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter("concertina_prompt_tokens", "Prompt tokens pushed.", ("model_name",))
SHARED_TOKENS = Counter(
    "concertina_prefix_cache_hits",
    "Prompt tokens taken from the prefix cache instead of being pushed.",
    ("model_name",),
)
PREFIX_BYTES = _gauge("concertina_prefix_cache_bytes", "Folded blocks kept for later prompts.")
DRAFT_TOKENS = Counter(
    "concertina_draft_tokens", "Draft tokens proposed.", ("model_name", "outcome")
)
GENERATION_TOKENS = Counter("concertina_generation_tokens", "Tokens drawn.", ("model_name",))
FINISHED = Counter(
    "concertina_streams_finished", "Streams that ended.", ("model_name", "finished_reason")
)
REFUSED = Counter(
    "concertina_requests_refused", "Requests refused at admission.", ("model_name", "reason")
)
PREEMPTED = Counter(
    "concertina_streams_preempted",
    "Running streams parked for a stream of higher priority.",
    ("model_name",),
)
FOLDS = Counter("concertina_folds", "Blocks folded into summaries.", ("model_name",))
TIME_TO_FIRST_TOKEN = _histogram(
    "concertina_time_to_first_token_seconds", "From acceptance to the first token.", _TTFT
)
INTER_TOKEN = _histogram(
    "concertina_inter_token_latency_seconds",
    "Time between two tokens of the running streams; observed once per step, not per token.",
    _STEP,
)
QUEUE_TIME = _histogram(
    "concertina_stream_queue_time_seconds", "From acceptance to the first work on it.", _TTFT
)
STREAM_TIME = _histogram(
    "concertina_e2e_stream_latency_seconds", "From acceptance to the end.", _LONG
)
STEP_TIME = Histogram(
    "concertina_step_seconds", "One pass of the model.", ("model_name", "phase"), buckets=_STEP
)
SNAPSHOT_TIME = Histogram(
    "concertina_snapshot_seconds", "Time to seal and store one snapshot.", buckets=_STEP
)
SNAPSHOT_BYTES = Counter("concertina_snapshot_bytes", "Bytes of stored snapshots, sealed.")
SNAPSHOT_FAILURES = Counter(
    "concertina_snapshot_failures", "Attempts to store a snapshot that failed."
)
STORE_UP = Gauge(
    "concertina_store_up",
    "0 while the snapshot store does not work; 1 otherwise, also without a store.",
    multiprocess_mode="livemin",
)
STORE_UP.set(1)
RESUMED = Counter(
    "concertina_streams_resumed",
    "Streams resumed by a reader, from memory or from the store.",
    ("model_name", "source"),
)
BATCH_SIZE = _histogram("concertina_step_batch_size", "Streams in one decode step.", _BATCH)


class EngineMetrics:
    """The metrics of one engine, with its model name as the label."""

    def __init__(self, model_name: str) -> None:
        self._name = model_name
        self._held_at = self._memory_at = 0.0
        self._steps: list[tuple[int, float, float | None, int]] = []  # not observed yet
        self._folded = 0  # not counted yet
        self._running = RUNNING.labels(model_name)
        self._waiting = WAITING.labels(model_name)
        self._paused = PAUSED.labels(model_name)
        self._state = {kind: STATE_BYTES.labels(model_name, kind) for kind in _STATE_KINDS}
        self._admitted = ADMITTED_BYTES.labels(model_name)
        self._inter_token = INTER_TOKEN.labels(model_name)
        self._batch_size = BATCH_SIZE.labels(model_name)
        self._decode_time = STEP_TIME.labels(model_name, "decode")
        self._prefill_time = STEP_TIME.labels(model_name, "prefill")
        self._generated = GENERATION_TOKENS.labels(model_name)
        self._folds = FOLDS.labels(model_name)

    def buffer_bytes(self, size: int) -> None:
        """Add reserved state memory. A draining engine of the same name may still have its own."""
        BUFFER_BYTES.labels(self._name).inc(size)

    def closed(self, size: int) -> None:
        """The engine closed: its gauges become 0 and its `size` bytes of state memory are freed."""
        BUFFER_BYTES.labels(self._name).dec(size)
        PREFIX_BYTES.labels(self._name).set(0)
        self.observe()
        self.holding(0, 0, 0, dict.fromkeys(_STATE_KINDS, 0))
        self.admitted(0)

    def are_due(self, now: float) -> bool:
        """Whether it is time to update the gauges again; a busy engine skips most steps."""
        return now - self._held_at >= GAUGE_INTERVAL_S

    def holding(self, running: int, waiting: int, paused: int, state: dict[str, int]) -> None:
        """Set the gauges: numbers of streams, and bytes of `state` by kind."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._paused.set(paused)
        for kind, size in state.items():
            self._state[kind].set(size)
        self._held_at = time.monotonic()
        if self._held_at - self._memory_at > _MEMORY_INTERVAL_S:
            self._memory_at = self._held_at
            PROCESS_MEMORY.set(psutil.Process().memory_info().rss)

    def admitted(self, size: int) -> None:
        """Set the largest state, in bytes, that all admitted streams can reach."""
        self._admitted.set(size)

    def preempted(self) -> None:
        """A running stream was parked for a stream of higher priority."""
        PREEMPTED.labels(self._name).inc()

    def stepped(
        self, batch: int, seconds: float, since_last: float | None, tokens: int | None = None
    ) -> None:
        """A decode step of `batch` streams took `seconds`. `observe` shows it.

        since_last: seconds since the step before; None for the first one. tokens: how many tokens
        the step drew; None for one per stream.
        """
        self._steps.append((batch, seconds, since_last, batch if tokens is None else tokens))

    def observe(self) -> None:
        """Show the steps and folds since the last call.

        Many at once, since after a step the weights have pushed all this out of the caches.
        """
        for batch, seconds, since_last, _ in self._steps:
            self._batch_size.observe(batch)
            self._decode_time.observe(seconds)
            if since_last is not None:
                self._inter_token.observe(since_last)
        self._generated.inc(sum(tokens for *_, tokens in self._steps))
        self._folds.inc(self._folded)
        self._steps.clear()
        self._folded = 0

    def drafted(self, proposed: int, accepted: int) -> None:
        """Of `proposed` draft tokens, `accepted` were right."""
        if proposed:
            DRAFT_TOKENS.labels(self._name, "accepted").inc(accepted)
            DRAFT_TOKENS.labels(self._name, "rejected").inc(proposed - accepted)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prefill pass pushed prompt tokens."""
        PROMPT_TOKENS.labels(self._name).inc(tokens)
        self._prefill_time.observe(seconds)

    def shared(self, tokens: int, kept: int) -> None:
        """The prefix cache held the first `tokens` of a prompt, and now holds `kept` bytes."""
        SHARED_TOKENS.labels(self._name).inc(tokens)
        PREFIX_BYTES.labels(self._name).set(kept)

    def folded(self, blocks: int) -> None:
        """Blocks were folded into summaries. `observe` shows it."""
        self._folded += blocks

    def started(self, queued_s: float) -> None:
        """A stream left the queue after `queued_s` seconds."""
        QUEUE_TIME.labels(self._name).observe(queued_s)

    def first_token(self, seconds: float) -> None:
        """A stream got its first token, `seconds` after acceptance."""
        TIME_TO_FIRST_TOKEN.labels(self._name).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """A stream ended, `seconds` after acceptance. Who sees that sees its steps, too."""
        self.observe()
        FINISHED.labels(self._name, reason).inc()
        STREAM_TIME.labels(self._name).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused."""
        REFUSED.labels(self._name, reason).inc()
