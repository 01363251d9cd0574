"""One bug that the tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in `file`, and `test` has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


def bugs(file: str, test: str, *planted: tuple[str, str, str]) -> list[Mutant]:
    """Name, old and new of each bug that is planted into `file` and noticed by `test`."""
    return [Mutant(name, file, old, new, test) for name, old, new in planted]
