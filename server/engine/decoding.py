"""Runs the model over the streams: prefill, decode steps and draft tokens."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final

import numpy as np

from server.arrays import Floats
from server.bundles.bundle import Bundle
from server.checkpoint import FinishReason, TokenLogprobs
from server.config import EngineConfig
from server.engine.kv_cache import Cache
from server.engine.placement import Placement
from server.engine.prompt_lookup import WINDOW, propose
from server.engine.sampling.logprobs import surprisal, token_logprobs
from server.engine.sampling.sampler import failures, sample
from server.engine.stream import Stream
from server.engine.updates import Ending, Scored, StreamUpdate
from server.ops.engine_metrics import EngineMetrics

PREDICTED_BYTES: Final = 64 << 20
"""Most memory for the logits of one pass of a prompt whose own tokens are predicted, in bytes."""


class Decoding:
    """Runs the passes of the model, on the engine's thread. It does not move streams."""

    def __init__(
        self,
        config: EngineConfig,
        bundle: Bundle,
        cache: Cache,
        placement: Placement,
        metrics: EngineMetrics,
    ) -> None:
        self._config = config
        self._bundle = bundle
        self._cache = cache
        self._placement = placement
        self._metrics = metrics
        self._last_step_at: float | None = None

    @property
    def is_resting(self) -> bool:
        """Whether the next step follows a rest, so that no time since the last step is measured."""
        return self._last_step_at is None

    def rest(self) -> None:
        """Record that nothing is decoded for a while."""
        self._last_step_at = None

    @property
    def prefill_room(self) -> int:
        """Most tokens that the next pass of the prefill slot may push."""
        limit, stream = self._config.prefill_chunk, self._placement.prefilling
        if stream is not None and stream.request.predicts_prompt:
            row = self._bundle.vocabulary * np.dtype(np.float32).itemsize
            limit = min(limit, max(1, PREDICTED_BYTES // row))
        return self._cache.prefill_room(limit)

    def prefill(self, stream: Stream, count: int) -> tuple[float, Ending | None]:
        """Push `count` prompt tokens of the stream in the prefill slot.

        Returns the seconds that this takes, and the stream's ending if it ends: its score is
        complete, or the logits of its prompt are not finite.
        """
        began = time.perf_counter()
        first = self._cache.prefill_pushed
        tokens = stream.request.prompt.inputs(first, first + count)
        logits = self._cache.prefill(tokens, stream.request.predicts_prompt)
        seconds = time.perf_counter() - began
        self._metrics.prefilled(count, seconds)
        self._metrics.folded(int(self._cache.block_room == self._bundle.span))
        if not stream.request.predicts_prompt:
            return seconds, None
        return seconds, self._predict_prompt(stream, logits, first)

    def decode(self) -> dict[Stream, Ending]:
        """Draw a token for each stream of the batch, or several if the batch is a single stream.

        Returns the endings of the streams that end. Full blocks are folded. A kept stream that ends
        has its state saved, if it can be.
        """
        streams = self._placement.running
        if self._config.draft_tokens and len(streams) == 1 and not streams[0].replay_tokens:
            return self._decode_ahead(streams[0])
        return self._step(streams)

    def commit(self) -> None:
        """Push the uncommitted tokens, which draft tokens leave behind."""
        for stream in [s for s in self._placement.running if s.uncommitted]:
            self._cache.push_ahead(np.array(stream.uncommitted, np.int64), logits=False)
            self._cache.commit(len(stream.uncommitted), len(stream.uncommitted))
            stream.uncommitted = []

    # ---- the prompt's own tokens

    def _predict_prompt(self, stream: Stream, logits: Floats, first: int) -> Ending | None:
        """Report or score the prompt tokens from `first` on, given their `logits`."""
        request = stream.request
        targets = request.prompt.targets(first, len(logits))
        failed = failures(logits, targets, first + np.arange(len(logits)))
        if failed:
            return failed[min(failed)]
        if request.prompt_logprobs is not None:
            logprobs = token_logprobs(logits, targets, [request.prompt_logprobs] * len(targets))
            if stream.is_kept:
                stream.prompt_logprobs += logprobs
            stream.subscriber.put(StreamUpdate(prompt=logprobs))
        if request.score:
            stream.prompt_bits += surprisal(logits, targets).tolist()
            if self._cache.prefill_pushed >= len(request.prompt):
                return Scored(tuple(stream.prompt_bits))
        return None

    # ---- one token for every stream

    def _step(self, streams: list[Stream]) -> dict[Stream, Ending]:
        sampling = self._placement.sampling
        began = time.perf_counter()
        logits = self._cache.step(np.array([s.last_token for s in streams], np.int64))
        positions = self._cache.pushed - 1
        tokens = sample(logits, sampling, positions)
        for row, stream in enumerate(streams):
            if stream.replay_tokens:
                tokens[row] = stream.replay_tokens.popleft()
        sampling.remember(tokens)
        logprobs = sampling.logprobs(logits, tokens)
        now, perf = time.monotonic(), time.perf_counter()
        ended: dict[int, Ending] = {**failures(logits, tokens, positions)}
        for row, (stream, token) in enumerate(zip(streams, tokens.tolist(), strict=True)):
            if row not in ended:
                reason = self._take_token(stream, token, logprobs.get(row), now)
                if reason is not None:
                    ended[row] = self._finish(stream, reason, int(self._cache.pushed[row]), now)
        kept = {row for row in ended if streams[row].is_kept}
        self._fold(ended.keys() - kept)
        for row in kept:
            streams[row].saved = self._placement.try_save(streams[row])
        since = self._last_step_at and perf - self._last_step_at
        self._metrics.stepped(len(streams), perf - began, since)
        self._last_step_at = perf
        return {streams[row]: ended[row] for row in sorted(ended, reverse=True)}

    # ---- draft tokens for a single stream: propose, verify, commit

    def _decode_ahead(self, stream: Stream) -> dict[Stream, Ending]:
        """Push draft tokens for the only stream, and keep those that the model draws, too.

        Never pushes beyond a fold. Every token is drawn from the logits that a plain step gives, so
        that a draft saves passes of the model and changes no output.
        """
        began, first = time.perf_counter(), int(self._cache.pushed[0])
        drawn = [*stream.uncommitted, stream.last_token]
        pushed = [*drawn, *self._propose(stream, len(drawn))]
        logits = self._cache.push_ahead(np.array(pushed, np.int64))
        correct, ending = self._verify(stream, pushed, len(drawn), logits)
        stream.uncommitted = pushed[self._cache.commit(correct, len(pushed)) : correct]
        since = self._last_step_at and began - self._last_step_at
        accepted = correct - len(drawn)
        self._metrics.stepped(1, time.perf_counter() - began, since, accepted + 1)
        self._metrics.drafted(len(pushed) - len(drawn), accepted)
        self._last_step_at = began
        saves = ending is not None and stream.is_kept
        if saves:
            self.commit()
        if int(self._cache.pushed[0]) > first and (ending is None or saves):
            self._fold()
        if saves:
            stream.saved = self._placement.try_save(stream)
        return {} if ending is None else {stream: ending}

    def _propose(self, stream: Stream, drawn: int) -> list[int]:
        """Draft tokens that fit into the open block after the `drawn` tokens to push first."""
        wanted = min(self._config.draft_tokens, self._cache.row_room - drawn)
        return propose(stream.latest(WINDOW), wanted).tolist() if wanted > 0 else []

    def _verify(
        self, stream: Stream, pushed: list[int], drawn: int, logits: Floats
    ) -> tuple[int, Ending | None]:
        """Draw tokens from `logits[T, vocabulary]` until one differs from the draft.

        pushed: `[T]`, first `drawn` tokens that are drawn already, then the draft. Returns how many
        of them are correct, and the stream's ending if it ends.
        """
        sampling, first = self._placement.sampling, int(self._cache.pushed[0])
        now = time.monotonic()
        for correct in range(drawn, len(pushed) + 1):
            row, position = logits[correct - 1 : correct], np.array([first + correct - 1])
            tokens = sample(row, sampling, position)
            sampling.remember(tokens)
            failed = failures(row, tokens, position).get(0)
            if failed is not None:
                return correct, failed
            logprobs = sampling.logprobs(row, tokens).get(0)
            reason = self._take_token(stream, int(tokens[0]), logprobs, now)
            if reason is not None:
                return correct, self._finish(stream, reason, first + correct, now)
            if correct == len(pushed) or pushed[correct] != stream.last_token:
                break
        return correct, None

    # ---- a token that was drawn

    def _take_token(
        self, stream: Stream, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> FinishReason | None:
        is_first = stream.first_token_at is None
        text, reason = stream.accept_token(token, now, logprobs)
        if is_first:
            self._metrics.first_token(now - stream.accepted_at)
        if reason is not None and stream.detokenizer.matched is None:
            text += stream.detokenizer.flush()
        if reason is not None and stream.request.is_unsent(token):
            stream.subscriber.put(StreamUpdate(text=text))
        else:
            stream.subscriber.put(StreamUpdate(token, text, logprobs))
        return reason

    def _fold(self, ended: Collection[int] = ()) -> None:
        """Fold the blocks that the last step filled, except in `ended` rows."""
        began = time.perf_counter()
        blocks = self._cache.fold(ended)
        self._metrics.folded(blocks, time.perf_counter() - began)

    def _finish(self, stream: Stream, reason: FinishReason, pushed: int, now: float) -> Ending:
        return stream.finish(reason, sum(self._bundle.state_bytes(pushed).values()), now)
