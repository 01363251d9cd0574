"""The metrics of one engine, as its parts report them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import psutil

from concertina.bundle.resources import KIND_NAMES
from server.ops import metrics

GAUGE_INTERVAL_S = 0.25
_MEMORY_INTERVAL_S: Final = 1.0
_STATE_KINDS: Final = tuple(KIND_NAMES.values())
OUTCOMES: Final = (
    *("end", "stop", "max_tokens", "time_limit", "paused", "scored", "handed_over", "cancelled"),
    "error",
)
REFUSAL_REASONS: Final = ("queue_full", "queue_tokens", "state_bytes")


@dataclass(frozen=True, slots=True)
class Lived:
    """What became of a stream, in seconds since it was accepted and in tokens.

    started_s, first_token_s: None if that never happened. first_token_s may lie before started_s
    for a stream that another server began.
    """

    total_s: float
    started_s: float | None
    first_token_s: float | None
    prompt_tokens: int
    generated: int
    preemptions: int


class EngineMetrics:
    """The metrics of one engine, with its model name as the label."""

    def __init__(self, model_name: str) -> None:
        self._name = model_name
        self._held_at = self._memory_at = 0.0
        self._steps: list[tuple[int, float, float | None, int]] = []  # not observed yet
        self._folded = 0  # not counted yet
        self._fold_times: list[float] = []  # not observed yet
        self._state_limit = 0
        self._info: tuple[str, ...] = ()
        self._running = metrics.RUNNING.labels(model_name)
        self._waiting = metrics.WAITING.labels(model_name)
        self._paused = metrics.PAUSED.labels(model_name)
        self._state = {kind: metrics.STATE_BYTES.labels(model_name, kind) for kind in _STATE_KINDS}
        self._admitted = metrics.ADMITTED_BYTES.labels(model_name)
        self._usage = metrics.STATE_USAGE.labels(model_name)
        self._inter_token = metrics.INTER_TOKEN.labels(model_name)
        self._batch_size = metrics.BATCH_SIZE.labels(model_name)
        self._step_tokens = metrics.STEP_TOKENS.labels(model_name)
        self._fold_time = metrics.FOLD_TIME.labels(model_name)
        self._decode_time = metrics.STEP_TIME.labels(model_name, "decode")
        self._prefill_time = metrics.STEP_TIME.labels(model_name, "prefill")
        self._generated = metrics.GENERATION_TOKENS.labels(model_name)
        self._folds = metrics.FOLDS.labels(model_name)
        self._exist_from_the_start()

    def _exist_from_the_start(self) -> None:
        """A counter that appears with its first count hides that count from `rate()`."""
        for counter in (
            metrics.PROMPT_TOKENS,
            metrics.LOOKED_UP_TOKENS,
            metrics.SHARED_TOKENS,
            metrics.PREEMPTED,
        ):
            counter.labels(self._name)
        for counter, values in (
            (metrics.DRAFT_TOKENS, ("accepted", "rejected")),
            (metrics.FINISHED, OUTCOMES),
            (metrics.REFUSED, REFUSAL_REASONS),
            (metrics.RESUMED, ("memory", "store")),
        ):
            for value in values:
                counter.labels(self._name, value)

    def serves(self, state_limit: int, version: str, fingerprint: str, attention: str) -> None:
        """Say what is served, and how large the states of all streams may become."""
        self._state_limit = state_limit
        metrics.STATE_LIMIT.labels(self._name).inc(state_limit)
        self._info = (version, fingerprint, attention)
        metrics.MODEL_INFO.labels(self._name, *self._info).inc()

    def buffer_bytes(self, size: int) -> None:
        """Add reserved state memory. A draining engine of the same name may still have its own."""
        metrics.BUFFER_BYTES.labels(self._name).inc(size)

    def closed(self, size: int) -> None:
        """The engine closed: its gauges become 0 and its `size` bytes of state memory are freed."""
        metrics.BUFFER_BYTES.labels(self._name).dec(size)
        metrics.STATE_LIMIT.labels(self._name).dec(self._state_limit)
        if self._info:
            metrics.MODEL_INFO.labels(self._name, *self._info).dec()
        metrics.PREFIX_BYTES.labels(self._name).set(0)
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
            metrics.PROCESS_MEMORY.set(psutil.Process().memory_info().rss)

    def admitted(self, size: int) -> None:
        """Set the largest state, in bytes, that all admitted streams can reach."""
        self._admitted.set(size)
        if self._state_limit:
            self._usage.set(size / self._state_limit)

    def preempted(self) -> None:
        """A running stream was parked for a stream of higher priority."""
        metrics.PREEMPTED.labels(self._name).inc()

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
        for batch, seconds, since_last, tokens in self._steps:
            self._batch_size.observe(batch)
            self._step_tokens.observe(tokens)
            self._decode_time.observe(seconds)
            if since_last is not None:
                self._inter_token.observe(since_last)
        self._generated.inc(sum(tokens for *_, tokens in self._steps))
        self._folds.inc(self._folded)
        for seconds in self._fold_times:
            self._fold_time.observe(seconds)
        self._fold_times.clear()
        self._steps.clear()
        self._folded = 0

    def drafted(self, proposed: int, accepted: int) -> None:
        """Of `proposed` draft tokens, `accepted` were right."""
        if proposed:
            metrics.DRAFT_TOKENS.labels(self._name, "accepted").inc(accepted)
            metrics.DRAFT_TOKENS.labels(self._name, "rejected").inc(proposed - accepted)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prefill pass pushed prompt tokens."""
        metrics.PROMPT_TOKENS.labels(self._name).inc(tokens)
        self._prefill_time.observe(seconds)

    def shared(self, looked_up: int, tokens: int, kept: int) -> None:
        """Of `looked_up` tokens of a prompt, the prefix cache held the first `tokens`.

        It now holds `kept` bytes.
        """
        metrics.LOOKED_UP_TOKENS.labels(self._name).inc(looked_up)
        metrics.SHARED_TOKENS.labels(self._name).inc(tokens)
        metrics.PREFIX_BYTES.labels(self._name).set(kept)

    def folded(self, blocks: int, seconds: float | None = None) -> None:
        """Blocks were folded into summaries, which took `seconds`, if known. `observe` shows it."""
        self._folded += blocks
        if blocks and seconds is not None:
            self._fold_times.append(seconds)

    def started(self, queued_s: float) -> None:
        """A stream left the queue after `queued_s` seconds."""
        metrics.QUEUE_TIME.labels(self._name).observe(queued_s)

    def first_token(self, seconds: float) -> None:
        """A stream got its first token, `seconds` after acceptance."""
        metrics.TIME_TO_FIRST_TOKEN.labels(self._name).observe(seconds)

    def finished(self, reason: str, lived: Lived) -> None:
        """A stream ended. Who sees that sees its steps, too."""
        self.observe()
        metrics.FINISHED.labels(self._name, reason).inc()
        metrics.STREAM_TIME.labels(self._name).observe(lived.total_s)
        metrics.STREAM_PROMPT_TOKENS.labels(self._name).observe(lived.prompt_tokens)
        metrics.STREAM_GENERATION_TOKENS.labels(self._name).observe(lived.generated)
        metrics.STREAM_PREEMPTIONS.labels(self._name).observe(lived.preemptions)
        if lived.started_s is None:
            return
        metrics.INFERENCE_TIME.labels(self._name).observe(lived.total_s - lived.started_s)
        if lived.first_token_s is None or lived.first_token_s < lived.started_s:
            return
        decode_s = lived.total_s - lived.first_token_s
        metrics.PREFILL_TIME.labels(self._name).observe(lived.first_token_s - lived.started_s)
        metrics.DECODE_TIME.labels(self._name).observe(decode_s)
        if lived.generated > 1:
            metrics.PER_TOKEN_TIME.labels(self._name).observe(decode_s / (lived.generated - 1))

    def refused(self, reason: str) -> None:
        """A request was refused."""
        metrics.REFUSED.labels(self._name, reason).inc()
