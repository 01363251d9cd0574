"""The command `uptrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from concertina.machine import cores_if_fewer
from model.data import DataError, load_dataset
from model.report import REPORT
from model.run import RunError
from model.stopping import on_signals
from model.text import python_dataset
from model.uptraining.choose import BudgetError
from model.uptraining.compared import verdict
from model.uptraining.run import Settings
from model.uptraining.run import uptrain as uptrain_into
from model.uptraining.summaries import FitConfig, Fitted, Interrupted

_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def uptrain(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run with full attention, as `convert` leaves it.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder of the new run; an interrupted one goes on there.")
    ],
    budget: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="State to keep, as a share of full attention's in the context."
        ),
    ] = 0.25,
    span: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 32,
    sink: Annotated[int, typer.Option(min=0, help="First blocks that no layer forgets.")] = 1,
    window: Annotated[
        int, typer.Option(min=0, help="Newest complete blocks that no layer forgets.")
    ] = 3,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Dataset of text, from `concertina data`; default: Python's own library.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to fit summaries on.")] = 16_384,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", min=1, help="Tokens of a window of the text.")
    ] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the fit, for each layer.")] = 80,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate of the fit.")] = 0.03,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text's places and the fit.")] = 0,
    measure: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Length of held-out texts to compare on; may be given several times. Default: "
            "2048. 0 measures nothing.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts of each length.")] = 4,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")] = 0,
) -> None:
    """Make a model with full attention remember less.

    Layers that would lose most stay full, as many as the budget has room for. The others keep the
    first blocks and the newest ones; an older block becomes one entry, or is dropped where that
    loses no more. How blocks are summarised is fitted to each layer; the model itself stays as it
    is. Minutes on a CPU. Ctrl-C ends it after the layer at hand, and the same command goes on.

    Then it is compared on held-out text with full attention, and with sliding windows that keep as
    much; if these lose less, the new run has them in place of folds. The report says by how much.

    Examples:
    concertina uptrain runs/smollm2 runs/smollm2-folded
    concertina uptrain runs/smollm2 runs/smollm2-folded --budget 0.15 --data data/notes
    """
    if threads := threads or cores_if_fewer():
        torch.set_num_threads(threads)
    try:
        settings = Settings(
            budget,
            span,
            sink,
            window,
            tokens,
            window_tokens,
            FitConfig(steps, rate, seed),
            tuple(length for length in ([2048] if measure is None else measure) if length),
            texts,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    def on_layer(done: Fitted, layers: int) -> None:
        found = done.errors
        _console.print(
            f"layer {done.layer + 1} of {layers}: attention is off by {found.window:.3f} with a "
            f"window, {found.tangent:.3f} folded, {found.fitted:.3f} fitted"
        )

    def on_variant(what: str) -> None:
        _console.print(f"measuring {what}")

    with on_signals() as request:
        try:
            dataset = python_dataset()[0] if data is None else load_dataset(data)
            made = uptrain_into(
                run,
                out,
                dataset,
                settings,
                on_layer=on_layer,
                on_variant=on_variant,
                stop=request,
            )
        except Interrupted as stopped:
            _console.print(str(stopped))
            raise typer.Exit(128 + request.signal) from None
        except (BudgetError, DataError, FileNotFoundError, RunError) as error:
            _console.print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(1) from None
    folding = made.config.architecture.folding
    assert folding is not None
    full, folds, slides = (folding.layers.count(kind) for kind in ("full", "fold", "window"))
    _console.print(
        f"{out}: {full} layers full, {folds} fold, {slides} slide; {made.share:.3f} of the state "
        f"of full attention at {made.config.context:,} tokens; {made.seconds:.0f} s"
    )
    if (found := made.comparison) is not None:
        whole, own = found.measured[0], found.measured[2 if found.folds_win else 3]
        _console.print(
            f"a stream of {made.config.context:,} tokens has {own.sizes[-1].bytes / 1e6:.1f} MB of "
            f"state in float32, not {whole.sizes[-1].bytes / 1e6:.1f}"
        )
        less, lost = whole.losses[-1], own.losses[-1]
        _console.print(
            f"{verdict(found)}; against full attention, {lost.mean - less.mean:+.3f} in all and "
            f"{lost.parts[-1] - less.parts[-1]:+.3f} in the last quarter; {out / REPORT}"
        )
        if not found.folds_win:
            _console.print("so the run slides, and does not fold")
