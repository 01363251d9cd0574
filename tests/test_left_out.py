"""What CI does not run is what CONTRIBUTING.md lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = re.compile(r"\bmark\.(chaos|gpu|clients)\b")
LISTED = re.compile(r"^\| `(tests/[^`\[]+)(?:\[\w+\])?` \| \S", re.MULTILINE)


def left_out() -> Iterator[str]:
    """Tests with a marker of those, on some of their parameters or on all; and whole folders."""
    for path in ROOT.glob("tests/**/conftest.py"):
        if LEFT_OUT.search(path.read_text()):
            yield str(path.parent.relative_to(ROOT))
    for path in ROOT.glob("tests/**/test_*.py"):
        if not LEFT_OUT.search(source := path.read_text()) or path == Path(__file__):
            continue
        tests = [node for node in ast.parse(source).body if hasattr(node, "decorator_list")]
        marked = [
            test.name
            for test in tests
            if any(LEFT_OUT.search(ast.unparse(each)) for each in test.decorator_list)
        ]
        assert marked, f"{path} has such a marker, but on no test"
        yield from (f"{path.relative_to(ROOT)}::{name}" for name in marked)


def test_all_of_it_is_listed() -> None:
    listed = LISTED.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(listed) == sorted(left_out())
