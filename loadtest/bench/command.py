"""`concertina bench`."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer

from concertina.bundle.manifest import ManifestError
from concertina.cli.output import plain_console, print_whole
from concertina.machine import cores as usable_cores
from concertina.machine import memory_bytes
from loadtest.bench.contestants import CONTESTANTS, ON_GPU, Source, contestants_of, read_source
from loadtest.bench.plan import (
    CELLS,
    DRY_RUN,
    DRY_RUN_CELLS,
    FIRST_TOKEN,
    QUICK_CELLS,
    ROOM,
    Cell,
    Plan,
    Shape,
    expected_s,
    parse_cell,
)
from loadtest.bench.plots import plot
from loadtest.bench.process import describe_machine, in_processes, prepare_source
from loadtest.bench.report import as_json
from loadtest.bench.run import Progress, Report, run
from loadtest.bench.tables import render
from loadtest.bench.worker import PACKAGES

_GIGABYTE = 10**9
_CELLS = ",".join(str(cell).replace(" ", "") for cell in CELLS)
_CELLS_OF_SOURCE = "256x1,256x8"
_MEMORY_SHARE = 0.9
_QUICK_ROUNDS, _QUICK_OPEN_S = 5, 120.0


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="One cell: 16k x 8, in about ten minutes.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            help="Pretrained model that all run in place of random weights: a run, a Hugging Face "
            "folder, or a GGUF file, which llama.cpp then runs, too.",
        ),
    ] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="Bundle of --source, of any precision, to measure too; repeat."),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            help="Contexts and streams to measure, with commas between; '' for none of them. "
            f"Default: {_CELLS}; with --source {_CELLS_OF_SOURCE}.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help=f"Contestants, likewise: {', '.join(c.name for c in CONTESTANTS)}; with --source "
            "ours, ours-cache-float16, names of bundles, and the peers; default all."
        ),
    ] = "",
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(
            help="Where all compute; on a GPU ours with float16 caches and transformers. "
            "docs/performance.md has a script for one."
        ),
    ] = "cpu",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="A tiny model and cell, to see what works here, and fails."),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of each cell, two windows each; default 9, quick 5."),
    ] = None,
    window: Annotated[float, typer.Option(min=0.01, help="Seconds of a window, about.")] = 0.5,
    first_token: Annotated[
        bool, typer.Option(help="Time the first token of a 16k prompt; not when quick.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores for each contestant; default all.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="GB for all contestants that are open at once, with --device cuda of the card; "
            "default 90% of the memory that is free.",
        ),
    ] = None,
    open_limit: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds until a contestant stands at its context; default 900, quick 120.",
        ),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Python that has a peer (genai, transformers, llama, vllm); repeat for others. "
            "A path alone is for all; default: this Python.",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the models for the next run; default none."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every window as JSON, cell by cell."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw them, as SVG, in this folder.")
    ] = None,
) -> None:
    """Compare decoding with other engines: one architecture, equal threads, windows in turns.

    All contestants of a cell stay open, each in a process of its own, and their windows go round
    A B C C B A: one computes, the others sleep. A ratio is the median of those within a round, so
    that it holds on a machine whose speed changes. All models have random weights: 8 layers, width
    512, 25M parameters; with --source, all are that model, and decode greedily. Needs the extra
    'train'; the peers may live in environments of their own, and the report names those that are
    missing.

    Examples:
    concertina bench --quick --json quick.json
    concertina bench --peer-python genai=genai/bin/python --peer-python vllm=vllm/bin/python
    concertina bench --source models/smollm2.Q4_1.gguf --bundle bundles/smollm2-int8 --models kept
    concertina bench --cells 256x1,16kx8 --only fixed,fixed-int8,full --rounds 20 --plots .
    """
    cores = usable_cores()
    free = min(psutil.virtual_memory().available, memory_bytes()) * _MEMORY_SHARE
    if source is not None and (device != "cpu" or dry_run):
        raise typer.BadParameter("--source is measured as it is, on the CPU")
    if bundle and source is None:
        raise typer.BadParameter("--bundle needs --source, the model that it is of")
    pythons = _pythons(peer_python or [])
    for path in (json_file, plots):
        if path is not None:  # not after hours
            path.parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        cells=(),
        contestants=(),
        rounds=rounds or (_QUICK_ROUNDS if quick else Plan.rounds),
        first_token_rounds=min(rounds or Plan.first_token_rounds, Plan.first_token_rounds),
        window_s=window,
        threads=min(threads or cores, cores),
        device=device,
        shape=DRY_RUN if dry_run else Shape(),
        memory_bytes=int(memory * _GIGABYTE if memory else free),
        open_s=open_limit or (_QUICK_OPEN_S if quick else Plan.open_s),
    )
    kept: AbstractContextManager[Path | str] = (
        tempfile.TemporaryDirectory(prefix="concertina-")
        if models is None or dry_run  # whose tiny models have the names of others
        else nullcontext(models)
    )
    with kept as root:
        folder = Path(root).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None:
            folder = _prepared(source, folder)
            plan = _plan_of(plan, read_source(folder), bundle or [])
        else:
            plan = replace(plan, contestants=CONTESTANTS if device == "cpu" else ON_GPU)
        plan = _chosen(plan, only)
        plan = replace(plan, cells=_wanted(plan, quick, cells, first_token))
        if dry_run:
            plan = replace(plan, cells=DRY_RUN_CELLS, rounds=1, window_s=0.01)
        report = _measure(plan, pythons, folder, json_file)
    print_whole(render(report))
    if plots is not None:
        for path in plot(report, plots):
            typer.echo(path)


def _measure(
    plan: Plan, pythons: Mapping[str, str], folder: Path, json_file: Path | None
) -> Report:
    console = plain_console(stderr=True)
    machine = describe_machine()
    clock = Waiting(plan)
    with in_processes(pythons) as open_contender, console.status("") as status:

        def on_progress(progress: Progress) -> None:
            what = clock.describe(progress)
            status.update(what) if console.is_terminal else console.print(what)

        def on_cell(report: Report) -> None:
            if json_file is not None:
                text = json.dumps(as_json(report, machine), indent=1)
                json_file.write_text(text + "\n", encoding="utf-8")

        return run(plan, open_contender, folder, on_progress, on_cell=on_cell)


class Waiting:
    """Says how much of a run is left, by how long the part behind it took."""

    def __init__(self, plan: Plan, now: Callable[[], float] = time.monotonic) -> None:
        self._cells, self._now, self._began = plan.cells, now, now()
        self._expected = [expected_s(plan, cell) for cell in plan.cells]

    def describe(self, progress: Progress) -> str:
        """A line such as `16k x 8 (cell 5 of 7), round 2 of 9, about 12 min left`."""
        done = sum(self._expected[: progress.cell])
        done += progress.share * self._expected[progress.cell]
        left = sum(self._expected) - done
        if done > 0:
            left *= (self._now() - self._began) / done
        where = f"{self._cells[progress.cell]} (cell {progress.cell + 1} of {len(self._cells)})"
        return f"{where}, {progress.what}, about {_span(left)} left"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _prepared(source: Path, folder: Path) -> Path:
    try:
        return prepare_source(source, folder)
    except RuntimeError as error:
        raise typer.BadParameter(f"--source: {error}") from None


def _plan_of(plan: Plan, source: Source, bundles: Sequence[Path]) -> Plan:
    try:
        contestants = contestants_of(source, bundles)
    except ManifestError as error:
        raise typer.BadParameter(f"--bundle: {error}") from None
    name, times = Counter(each.name for each in contestants).most_common(1)[0]
    if times > 1:
        raise typer.BadParameter(f"--bundle: two contestants are called {name}: rename a folder")
    return replace(
        plan,
        contestants=contestants,
        source=source.name,
        shape=source.shape,
        longest=source.context,
    )


def _chosen(plan: Plan, only: str) -> Plan:
    given = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := given - {c.name for c in plan.contestants}:
        raise typer.BadParameter(
            f"--only: there is no {', '.join(sorted(unknown))}; there are "
            f"{', '.join(c.name for c in plan.contestants)}"
        )
    chosen = tuple(c for c in plan.contestants if not given or c.name in given)
    return replace(plan, contestants=chosen, asked_for=bool(given))


def _wanted(plan: Plan, quick: bool, cells: str | None, first_token: bool) -> tuple[Cell, ...]:
    usual = _CELLS_OF_SOURCE if plan.source else _CELLS
    wanted = QUICK_CELLS if quick else _cells(usual if cells is None else cells)
    if (
        first_token
        and not quick
        and not (plan.source and FIRST_TOKEN.context + ROOM > plan.longest)
    ):
        wanted += (FIRST_TOKEN,)
    if not wanted:
        raise typer.BadParameter("--cells is empty, and so is the plan without --first-token")
    for cell in wanted:
        if plan.longest and cell.context + ROOM > plan.longest:
            raise typer.BadParameter(
                f"--cells: {cell} and {ROOM} more tokens are above the model's context, "
                f"{plan.longest}"
            )
    return wanted


def _cells(text: str) -> tuple[Cell, ...]:
    if not text:
        return ()
    try:
        return tuple(dict.fromkeys(parse_cell(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(
            f"--cells: {text!r} is not a list of contexts and streams such as 256x1,16kx8"
        ) from None


def _pythons(given: list[str]) -> dict[str, str]:
    """The Python of each kind of peer; that of all under the empty name."""
    pythons = {}
    for each in given:
        name, _, path = each.rpartition("=")
        if name and name not in PACKAGES:
            known = ", ".join(sorted(PACKAGES.keys() - {"ours"}))
            raise typer.BadParameter(f"--peer-python: there is no {name}; there are {known}")
        if shutil.which(path) is None:
            raise typer.BadParameter(f"--peer-python: {path} is no program that can be run")
        pythons[name] = path
    return pythons
