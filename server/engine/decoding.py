"""Passes of the model over the streams in their places, and the tokens that they draw."""

from __future__ import annotations

import time

import numpy as np

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.events import Ending, FinishReason, Piece, Scored
from server.engine.kv_cache import Cache
from server.engine.placement import Places
from server.engine.prompt_lookup import WINDOW, propose
from server.engine.sampling.logprobs import TokenLogprobs, surprisal, token_logprobs
from server.engine.sampling.sampler import failures, sample
from server.engine.stream import Stream
from server.ops.metrics import EngineMetrics
from server.runtime.onnx_session import Floats
from server.sessions.deliveries import Outbox


class Passes:
    """Runs them for the engine, on its thread. Where streams are is not changed here."""

    def __init__(
        self,
        config: EngineConfig,
        bundle: Bundle,
        cache: Cache,
        places: Places,
        outbox: Outbox,
        measures: EngineMetrics,
    ) -> None:
        self._config = config
        self._bundle = bundle
        self._cache = cache
        self._places = places
        self._outbox = outbox
        self._measures = measures
        self._last_step_at: float | None = None

    def rest(self) -> None:
        """Nothing is decoded for a while: the next step follows none."""
        self._last_step_at = None

    def prefill(self, stream: Stream, count: int) -> tuple[float, Ending | None]:
        """Push `count` tokens for the stream on the bench: seconds that it took, and its ending.

        It ends here if its prompt cannot be predicted, or was all that there is to score.
        """
        began = time.perf_counter()
        first = self._cache.bench_pushed
        predicts = stream.request.predicts_prompt
        logits = self._cache.prefill(stream.unpushed(first)[:count], predicts)
        seconds = time.perf_counter() - began
        self._measures.prefilled(count, seconds)
        self._measures.folded(int(self._cache.block_room == self._bundle.span))
        return seconds, self._predict_prompt(stream, logits, first) if predicts else None

    def decode(self) -> dict[Stream, Ending]:
        """A token for each stream of the batch, or several for one alone; those that end with it.

        Blocks that are full have folded. The state of a stream that ended and is kept is parked.
        """
        streams = self._places.running
        if self._config.draft_tokens and len(streams) == 1 and not streams[0].forced:
            return self._decode_ahead(streams[0])
        return self._step(streams)

    def _predict_prompt(self, stream: Stream, logits: Floats, first: int) -> Ending | None:
        """Report or score the tokens that `logits` predicted, the prompt's from `first` on."""
        request = stream.request
        targets = request.prompt[first + 1 :][: len(logits)]
        failed = failures(logits, targets, first + np.arange(len(logits)))
        if failed:
            return failed[min(failed)]
        if request.prompt_logprobs is not None:
            said = token_logprobs(logits, targets, [request.prompt_logprobs] * len(targets))
            if stream.is_kept:
                stream.prompt_said += said
            self._outbox.put(stream.reader, Piece(prompt=said))
        if request.score:
            stream.bits += surprisal(logits, targets).tolist()
            if not len(stream.unpushed(self._cache.bench_pushed)):
                return Scored(tuple(stream.bits))
        return None

    def _step(self, streams: list[Stream]) -> dict[Stream, Ending]:
        sampling = self._places.sampling
        began = time.perf_counter()
        logits = self._cache.step(np.array([s.last_token for s in streams], np.int64))
        positions = self._cache.pushed - 1
        tokens = sample(logits, sampling, positions)
        for row, stream in enumerate(streams):
            if stream.forced:
                tokens[row] = stream.forced.popleft()
        sampling.remember(tokens)
        logprobs = sampling.logprobs(logits, tokens)
        now, perf = time.monotonic(), time.perf_counter()
        ended: dict[int, Ending] = {**failures(logits, tokens, positions)}
        for row, (stream, token) in enumerate(zip(streams, tokens.tolist(), strict=True)):
            if row not in ended:
                reason = self._take_token(stream, token, logprobs.get(row), now)
                if reason is not None:
                    sizes = self._bundle.state_bytes(int(self._cache.pushed[row]))
                    ended[row] = stream.finish(reason, sum(sizes.values()), now)
        kept = {row for row in ended if streams[row].is_kept}
        self._measures.folded(self._cache.fold(ended.keys() - kept))
        for row in kept:
            streams[row].parked = self._cache.park(row)
        self._measures.stepped(
            len(streams), perf - began, self._last_step_at and perf - self._last_step_at
        )
        self._last_step_at = perf
        return {streams[row]: ended[row] for row in sorted(ended, reverse=True)}

    def _decode_ahead(self, stream: Stream) -> dict[Stream, Ending]:
        """Push what the only stream may say next, and keep what it does.

        Never beyond a fold. Each token is drawn as it would have been alone: a draft saves passes,
        and changes none.
        """
        began, sampling = time.perf_counter(), self._places.sampling
        known = [*stream.behind, stream.last_token]
        room = self._cache.row_room - len(known)
        wanted = min(self._config.draft_tokens, room)
        draft = propose(stream.latest(WINDOW), wanted) if wanted > 0 else ()
        fed, first = [*known, *draft], int(self._cache.pushed[0])
        logits = self._cache.feed(np.array(fed, np.int64))
        ending: Ending | None = None
        now, right = time.monotonic(), len(known) - 1
        while ending is None:
            row, position = logits[right : right + 1], np.array([first + right])
            tokens = sample(row, sampling, position)
            sampling.remember(tokens)
            said = sampling.logprobs(row, tokens).get(0)
            ending = failures(row, tokens, position).get(0)
            right += 1
            if ending is not None:
                break
            reason = self._take_token(stream, int(tokens[0]), said, now)
            if reason is not None:
                held = sum(self._bundle.state_bytes(first + right).values())
                ending = stream.finish(reason, held, now)
            elif right == len(fed) or fed[right] != stream.last_token:
                break
        stream.behind = fed[self._cache.keep(right, len(fed)) : right]
        since = self._last_step_at and began - self._last_step_at
        took = time.perf_counter() - began
        self._last_step_at = began
        drawn = right - len(known) + 1
        self._measures.stepped(1, took, since, drawn)
        self._measures.drafted(len(draft), drawn - 1)
        if ending is not None and stream.is_kept:
            self.catch_up()
        if int(self._cache.pushed[0]) > first and (ending is None or stream.is_kept):
            self._measures.folded(self._cache.fold())
        if ending is None:
            return {}
        if stream.is_kept:
            stream.parked = self._cache.park(0)
        return {stream: ending}

    def catch_up(self) -> None:
        """Push what streams know and their states have not seen, where drafts left any."""
        for stream in [s for s in self._places.running if s.behind]:
            self._cache.feed(np.array(stream.behind, np.int64), logits=False)
            self._cache.keep(len(stream.behind), len(stream.behind))
            stream.behind = []

    def _take_token(
        self, stream: Stream, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> FinishReason | None:
        first = stream.first_token_at is None
        text, reason = stream.accept_token(token, now, logprobs)
        if first:
            self._measures.first_token(now - stream.accepted_at)
        if reason is not None and stream.text.matched is None:
            text += stream.text.flush()
        if stream.request.is_unsent(token):
            self._outbox.put(stream.reader, Piece(text=text))
        else:
            stream.reader.published += 1
            self._outbox.put(stream.reader, Piece(token, text, logprobs))
        return reason
