"""One bug that the tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in `file`, and `test`, a file or one test, has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


def bugs(file: str, test: str, *planted: tuple[str, ...]) -> list[Mutant]:
    """Name, old and new of each bug that is planted into `file` and noticed by `test`.

    A fourth item names the test of that file that notices it: the others need not run.
    """
    return [
        Mutant(name, file, old, new, "::".join([test, *noticing]))
        for name, old, new, *noticing in planted
    ]
