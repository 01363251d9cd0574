"""Bugs in the examples."""

from __future__ import annotations

from tests.mutants.mutant import bugs

MUTANTS = (
    *bugs(
        "examples/node/generate.js",
        "tests/examples/test_node.py",
        (
            "a character beyond 16 bits counts twice",
            "[...message.tokens.text].length",
            "message.tokens.text.length",
            "test_it_asks_for_what_is_missing_and_for_nothing_else",
        ),
        (
            "a large seed is rounded",
            "{ seed: digits(",
            "{ seed: Number(values.seed) || digits(",
            "test_it_asks_for_what_is_missing_and_for_nothing_else",
        ),
        (
            "a stream that is accepted begins again",
            "seen.accepted ? generation.Resume(",
            "false ? generation.Resume(",
            "test_it_asks_for_what_is_missing_and_for_nothing_else",
        ),
        (
            "every try has a key of its own",
            "generation.Generate(first);",
            "generation.Generate({ ...first, idempotency_key: randomUUID() });",
            "test_before_it_is_accepted_the_same_request_is_sent_again",
        ),
    ),
)
