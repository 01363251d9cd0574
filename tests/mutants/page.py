"""Bugs in the page that the gateway serves, and in what it calls."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_GUARD = "tests/server/http/page/test_guard.py"

MUTANTS = (
    *bugs(
        "server/http/page/guard.py",
        _GUARD,
        (
            "a page of any site may call",
            "is_own = named.netloc == request",
            "is_own = bool(named.netloc) or named.netloc == request",
            "test_only_its_own_page_may_call",
        ),
        (
            "what a browser says of the site is not asked",
            "if site in _OWN_SITE and origin is None",
            "if origin is None",
            "test_only_its_own_page_may_call",
        ),
    ),
    *bugs(
        "server/http/page/pace.py",
        "tests/server/http/page/test_pace.py",
        (
            "a slow reader is sent tokens again",
            "[Cursor(0, tokens, characters)]",
            "[Cursor(0, tokens - 1, characters)]",
            "test_every_token_comes_once_at_any_pace",
        ),
    ),
    *bugs(
        "protos/concertina/client/layout.py",
        "tests/concertina/client/test_layout.py",
        (
            "a stack that keeps nothing keeps a summary",
            'tensor.kept if tensor.HasField("kept") else 1',
            "tensor.kept or 1",
            "test_units_are_those_of_the_resource_model",
        ),
    ),
)
