"""Bugs in the bounds of requests: what passes, what is refused, and when."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, bugs

_LIMITS = "tests/server/api/test_limits.py"
_WIRE = "tests/server/api/test_wire.py"

MUTANTS = (
    *bugs(
        "server/api/wire.py",
        _WIRE,
        (
            "a flood is parsed before it is refused",
            "if len(content) > most and (fault",
            "if False and (fault",
            "test_a_flood_ends_after_few_steps",
        ),
        (
            "a walk has no end",
            "if self.left < 0:",
            "if False:",
            "test_a_flood_ends_after_few_steps",
        ),
        (
            "packed numbers count as one",
            "return int(np.count_nonzero(packed < 128))",
            "return 1",
            "test_a_flood_ends_after_few_steps",
        ),
        (
            "an entry of a map has any size",
            "if part.is_map and size > _ENTRY_BYTES:",
            "if False:",
        ),
    ),
    *bugs(
        "server/api/limits.py",
        _LIMITS,
        ("a value that must be above a bound is at it", "value > above", "value >= above"),
        ("a zero that is left out passes", "for name, found in needed:", "for name, found in ():"),
        (
            "characters count as bytes",
            "len(value) if is_short else len(value.encode())",
            "len(value)",
        ),
        ("no number is a number", "if low <= value <= most and", "if not value < low and"),
    ),
    Mutant(
        "a handler takes what is beyond its bounds",
        "server/api/context.py",
        "    require_within_limits(request)\n    return caller",
        "    return caller",
        _LIMITS,
    ),
    Mutant(
        "a part of a snapshot has any size",
        "server/api/sessions.py",
        "            require_within_limits(request)\n            size +=",
        "            size +=",
        _LIMITS,
    ),
    Mutant(
        "lists that a session holds weigh nothing",
        "server/engine/admission.py",
        "(r.lists_bytes if r is first else 0)",
        "0",
        "tests/server/engine/test_admission.py",
    ),
)
