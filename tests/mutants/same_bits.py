"""Bugs that let a stream's output depend on its company, or on when it is read."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_FEW_BITS = "tests/parity/test_few_bits.py"
_ENGINE = "tests/parity/test_determinism.py"
_TEXT = "tests/server/engine/test_detokenizer.py"
_STREAM = "tests/server/engine/test_stream.py"

MUTANTS = (
    *bugs(
        "server/runtime/onnx_session.py",
        _FEW_BITS,
        (
            "an odd batch stays odd",
            "if self._pairs and batch % 2:",
            "if False:",
            "test_the_size_of_the_batch_changes_no_bit",
        ),
        (
            "an odd chunk stays odd",
            "if not (self._pairs and time % 2):",
            "if True:",
            "test_the_chunks_of_a_prompt_change_no_bit",
        ),
        (
            "the last token of an odd chunk overwrites the one before it",
            "position, length = position + time - 1, length + time - 1",
            "position, length = position + time - 2, length + time - 2",
            "test_the_chunks_of_a_prompt_change_no_bit",
        ),
    ),
    *bugs(
        "server/bundles/bundle.py",
        _FEW_BITS,
        (
            "sums of summaries do not count as sums",
            '(":mean", ":tangent", ":fitted")',
            '(":mean",)',
            "test_rows_come_in_pairs_only_where_it_matters",
        ),
    ),
    *bugs(
        "server/engine/kv_cache.py",
        _FEW_BITS,
        (
            "an odd batch overwrites the prefill slot",
            "return slots + slots % 2 if bundle.pairs_rows else slots",
            "return slots",
            "test_a_full_batch_and_the_prefill_slot_leave_each_other_alone",
        ),
        (
            "odd chunks of a prompt",
            "max(2, limit - limit % 2))",
            "max(2, limit))",
            "test_the_chunks_of_a_prompt_change_no_bit",
        ),
        (
            "a prompt in chunks of one token",
            "max(2, limit - limit % 2))",
            "max(1, limit - limit % 2))",
            "test_the_chunks_of_a_prompt_change_no_bit",
        ),
        (
            "chunks of a block",
            "if self._bundle.span is not None:",
            "if False:",
            "test_rows_come_in_pairs_only_where_it_matters",
        ),
        (
            "tokens that were stepped become a block of a prompt",
            "known = _NEVER if self._bundle.pairs_rows else blocks",
            "known = blocks",
            "test_what_was_pushed_one_by_one_is_no_block_of_another_prompt",
        ),
    ),
    *bugs(
        "server/runtime/host_state.py",
        "tests/server/runtime/test_host_state.py",
        ("odd folds stay odd", "if len(rows) % 2:", "if False:"),
        (
            "many folds are cut into odd parts",
            "max(2, FOLDED_BYTES // size // 2 * 2)",
            "max(1, FOLDED_BYTES // size)",
        ),
    ),
    *bugs(
        "server/engine/engine.py",
        _ENGINE,
        (
            "drafts with matrices of few bits",
            "if not (config.draft_tokens and bundle.pairs_rows):",
            "if True:",
            "test_neither_do_drafts",
        ),
    ),
    *bugs(
        "server/engine/detokenizer.py",
        _TEXT,
        (
            "what follows a stop string in one byte is text",
            "self._held = self._held[: at + len(matched) if self._include_stop else at]",
            "self._held = self._held.removesuffix(matched)",
        ),
        (
            "text is sent again when a new stop string may begin with it",
            "self._sent = max(0, sent - len(released))",
            "self._sent = 0",
        ),
        (
            "text that was sent before is dropped for ever",
            "self._sent = max(0, self._sent - len(released))",
            "pass",
        ),
    ),
    *bugs(
        "server/engine/restore.py",
        _STREAM,
        (
            "what was sent before a pause is forgotten",
            "sent = checkpoint.base_characters",
            "sent = 0",
        ),
    ),
)
