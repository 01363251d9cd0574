"""`concertina bench`."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import psutil
import typer

from concertina.cli.output import plain_console, print_whole
from concertina.machine import cores as usable_cores
from concertina.machine import memory_bytes
from loadtest.bench.plan import CONTESTANTS, CONTEXTS, STREAMS, Plan, all_cells, quick_cells
from loadtest.bench.plots import plot
from loadtest.bench.report import as_json, render
from loadtest.bench.run import Report, in_process, run

_GIGABYTE = 10**9
_MEMORY_SHARE = 0.9
_QUICK_ROUNDS, _QUICK_LIMIT_S = 2, 300.0
_LIBRARIES = ("concertina", "onnxruntime", "numpy")


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="One cell: 16k x 8, in less than ten minutes.")
    ] = False,
    contexts: Annotated[
        str, typer.Option(help="Contexts to measure, with commas between.")
    ] = ",".join(map(str, CONTEXTS)),
    streams: Annotated[str, typer.Option(help="Numbers of streams, likewise.")] = ",".join(
        map(str, STREAMS)
    ),
    only: Annotated[
        str,
        typer.Option(
            help=f"Contestants, likewise: {', '.join(c.name for c in CONTESTANTS)}; default all."
        ),
    ] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each cell; default 3, quick 2.")
    ] = None,
    first_token: Annotated[
        bool, typer.Option(help="Time the first token of a 16k prompt; not when quick.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores for each contestant; default all.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.5, help="GB that one contestant may take; default 90% of what is free."),
    ] = None,
    peer_python: Annotated[
        str, typer.Option(metavar="PATH", help="Python that has the peers; default this one.")
    ] = "",
    models: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the random models for the next run; default none."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw them, as SVG, in this folder.")
    ] = None,
) -> None:
    """Compare decoding with other engines: one architecture, equal threads, runs in turns.

    Every contestant runs in a process of its own, on the same cores and under the same memory
    limit. All models have random weights: 8 layers, width 512, 25M parameters. Needs the extra
    'train'; the peers are in the extra 'bench', and the report names those that are missing.

    Examples:
    concertina bench --quick --json quick.json
    concertina bench --peer-python ~/peers/bin/python --json bench.json --plots .
    concertina bench --contexts 1024,65536 --streams 8 --only fixed,full,genai
    """
    cores = usable_cores()
    given = {name.strip() for name in only.split(",") if name.strip()}
    unknown = given - {c.name for c in CONTESTANTS}
    if unknown:
        raise typer.BadParameter(f"--only: there is no {', '.join(sorted(unknown))}; see --help")
    free = min(psutil.virtual_memory().available, memory_bytes()) * _MEMORY_SHARE
    plan = Plan(
        cells=quick_cells()
        if quick
        else all_cells(_numbers("contexts", contexts), _numbers("streams", streams)),
        first_token=first_token and not quick,
        contestants=tuple(c for c in CONTESTANTS if not given or c.name in given),
        rounds=rounds or (_QUICK_ROUNDS if quick else Plan.rounds),
        threads=min(threads or cores, cores),
        memory_bytes=int(memory * _GIGABYTE if memory else free),
        limit_s=_QUICK_LIMIT_S if quick else Plan.limit_s,
    )
    report = _measure(plan, peer_python or sys.executable, models)
    print_whole(render(report))
    if json_file is not None:
        text = json.dumps(as_json(report, describe_machine()), indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
    if plots is not None:
        for path in plot(report, plots):
            typer.echo(path)


def describe_machine() -> dict[str, object]:
    """The machine that the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _measure(plan: Plan, peer_python: str, models: Path | None) -> Report:
    console = plain_console(stderr=True)
    kept = nullcontext(models) if models else tempfile.TemporaryDirectory(prefix="concertina-")
    with kept as folder, console.status("") as status:
        Path(folder).mkdir(parents=True, exist_ok=True)

        def on_job(what: str) -> None:
            status.update(what) if console.is_terminal else console.print(what)

        return run(plan, in_process(peer_python, plan.limit_s), Path(folder).resolve(), on_job)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"--{option}: {text!r} is not a list of numbers such as 256,1024")
    return numbers


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
