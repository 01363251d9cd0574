"""Bugs that draw other tokens from a large vocabulary than from whole rows."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_TOKENS = "tests/server/engine/sampling/test_same_tokens.py"
_RUNTIME = "tests/server/runtime/test_onnx_session.py"

MUTANTS = (
    *bugs(
        "server/engine/sampling/long_rows.py",
        _TOKENS,
        (
            "ties with the last token of a top_k are dropped",
            "ids, weights = _where(weights >= floor, ids, weights)",
            "ids, weights = _where(weights > floor, ids, weights)",
            "test_parameters",
        ),
        (
            "tokens whose weights are rounded alike are no ties",
            "reaching(row, bound, 1e-12 * temperature + 1e-14 * abs(best))",
            "reaching(row, bound)",
            "test_parameters",
        ),
        (
            "the maxima of blocks give too few candidates",
            "return float(np.partition(maxima, size - count)[size - count])",
            "return float(np.partition(maxima, size - 1)[size - 1])",
            "test_parameters",
        ),
        (
            "a min_p drops what just reaches it",
            "weights >= parameters.min_p",
            "weights > parameters.min_p",
            "test_parameters",
        ),
        (
            "a rough sum decides where a nucleus ends",
            "if last == len(falling) or falling[first] != falling[last]:",
            "if last == len(falling):",
            "test_top_p_next_to_where_a_token_reaches_it",
        ),
        (
            "a nucleus of too few candidates",
            "        if reached[-1] >= enough.most:\n            break\n",
            "        enough = Limits.around(min(enough.least, reached[-1]), 0.0)\n        break\n",
            "test_top_p_next_to_where_a_token_reaches_it",
        ),
        (
            "a rough sum decides on which token a number falls",
            "if first != last or not 0 < first < len(upto):",
            "if not 0 < first < len(upto):",
            "test_parameters",
        ),
        (
            "a rough sum decides what is typical",
            "if (outermost != outermost[0]).any() or reached[0] >= enough.least"
            " or reached[1] < enough.most:",
            "if False:",
            "test_parameters",
        ),
    ),
    *bugs(
        "server/engine/sampling/estimates.py",
        _TOKENS,
        (
            "sums in float32 count as exact",
            "error = 2.0**-24 * (SUMMED + 8 + 3 * size)",
            "error = 2.0**-50",
            "test_numbers_on_the_border_of_a_token",
        ),
        (
            "exponents are left out where the largest logit is 0",
            "if exponents is not None or shift or row.dtype",
            "if shift or row.dtype",
            "test_rough_exponents",
        ),
    ),
    *bugs(
        "server/engine/sampling/logits_processors.py",
        _TOKENS,
        (
            "a token counts once",
            "self.counts[known] += 1",
            "self.counts[known] = 1",
            "test_processors_step_by_step",
        ),
        (
            "a token that had an entry is not seen",
            "self.repetition[known] = self.penalty[known]",
            "pass",
            "test_a_biased_token_is_repetitive_once_it_has_come",
        ),
        (
            "a stream's new tokens overwrite those of the next",
            "if (at >= self.starts[owners + 1]).any():",
            "if (at >= len(self.tokens)).any():",
            "test_penalties_take_memory_for_the_tokens_that_there_are",
        ),
        (
            "bad words hold for every stream",
            "np.flatnonzero(self.word_owner == owner)",
            "np.arange(len(self.word_owner))",
            "test_processors_step_by_step",
        ),
        (
            "withheld tokens are withheld from every stream",
            "early = (self.withheld_owner == owner) & (position",
            "early = (self.withheld_owner >= 0) & (position",
            "test_tokens_are_withheld_from_the_stream_that_asks",
        ),
        (
            "what is recalled counts once",
            "self.counts[at] += counts",
            "self.counts[at] += 1",
            "test_processors_step_by_step",
        ),
        (
            "a token that is not allowed may be drawn",
            "out.fill(-np.inf)",
            "out[:] = logits",
            "test_processors_step_by_step",
        ),
    ),
    *bugs(
        "server/engine/sampling/sampler.py",
        _TOKENS,
        (
            "a token is drawn where none is left",
            "if ours is scratch.row and ours.max() == -np.inf:",
            "if False:",
            "test_processors_step_by_step",
        ),
    ),
    *bugs(
        "server/engine/placement.py",
        "tests/server/engine/test_engine_sampling.py",
        ("a parked stream holds the memory of its batch", "stream.penalties.detach()", "pass"),
    ),
    *bugs(
        "server/runtime/onnx_session.py",
        _RUNTIME,
        (
            "logits go to a buffer that nobody reads",
            "self._steps.clear()  # they are bound to the old one",
            "pass",
        ),
        (
            "every size of a batch has logits of its own",
            "logits = self._logits[:wanted]",
            "logits = self._logits[:wanted].copy()",
        ),
    ),
    *bugs(
        "server/runtime/onnx_session.py",
        "tests/parity/test_few_bits.py",
        (
            "the last token of an odd chunk overwrites the logits of the first",
            "self._push(row, tokens[:-1], position, length, logits).copy()",
            "self._push(row, tokens[:-1], position, length, logits)",
            "test_the_chunks_of_a_prompt_change_no_bit",
        ),
    ),
)
