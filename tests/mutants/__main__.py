"""`python -m tests.mutants`: plant known bugs, and require that the tests notice every one."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tests.mutants.runner import ROOT, survey
from tests.mutants.table import MUTANTS


def mutants(
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only bugs whose name or file holds this text.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Test runs side by side.")] = os.cpu_count() or 1,
) -> None:
    """Plant known bugs into copies of the source. Exit code 1 when the tests miss one.

    Nothing is written to the working tree.

    Examples:
    python -m tests.mutants
    python -m tests.mutants --only kv_cache --jobs 1
    """
    chosen = [mutant for mutant in MUTANTS if only in mutant.name or only in mutant.file]
    if not chosen:
        raise typer.BadParameter(f"--only: no bug has {only!r} in its name or file")
    if not survey(ROOT, chosen, jobs):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(mutants)
