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
        ),
        ("a large seed is rounded", "{ seed: digits(", "{ seed: Number(values.seed) || digits("),
        (
            "a stream that is accepted begins again",
            "seen.accepted ? generation.Resume(",
            "false ? generation.Resume(",
        ),
        (
            "every try has a key of its own",
            "generation.Generate(first);",
            "generation.Generate({ ...first, idempotency_key: randomUUID() });",
        ),
    ),
)
