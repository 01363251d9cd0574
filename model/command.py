"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from concertina.machine import cores_if_fewer
from model.config import Attention, ModelConfig, Pooling, Positions
from model.data import load_dataset
from model.initial import Initial
from model.memory import check_memory
from model.report import REPORT, draw_samples, write_report
from model.run import Progress, TrainConfig, load_checkpoint
from model.shown import shown
from model.stopping import on_signals
from model.train import SAVE_EVERY_S, Stopped
from model.train import train as train_into

_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def train(
    dataset: Annotated[Path, typer.Argument(help="Dataset made by `concertina data`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run; an existing run is resumed.")],
    context: Annotated[
        int, typer.Option(min=1, help="Tokens per window (for images: their pixels).")
    ] = 1024,
    span: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 32,
    width: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 4,
    heads: Annotated[
        int, typer.Option(min=1, help="Number of heads; each summarises a block differently.")
    ] = 8,
    mlp: Annotated[int, typer.Option(min=1, help="Width of the MLP.")] = 1024,
    attention: Annotated[
        Attention, typer.Option(help="Attention pattern; docs/quality.md compares them.")
    ] = "fixed",
    pooling: Annotated[Pooling, typer.Option(help="How fixed attention pools a block.")] = "max",
    positions: Annotated[Positions, typer.Option(help="Position embedding.")] = "factored",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.")] = 10_000_000,
    rows: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 0.01,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the peak learning rate.")] = 100,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=100, help="Weight decay of the layers' matrices.")
    ] = 0.3,
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="Dropout on every residual branch.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, batches and dropout.")] = 0,
    float32: Annotated[
        bool, typer.Option("--float32", help="Multiply matrices in float32, not bfloat16.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")] = 0,
    save_every: Annotated[
        float, typer.Option(min=0, help="Minutes between checkpoints; also on SIGINT and SIGTERM.")
    ] = SAVE_EVERY_S / 60,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Run or bundle whose weights to begin with; the optimiser begins anew.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if memory seems to be too small.")
    ] = False,
) -> None:
    """Train a decoder with any attention pattern, and report bits on held-out data.

    Ctrl-C, SIGTERM and SIGHUP save the run and end it with 128 + the number of the signal. The same
    command continues from the last checkpoint, and ends with the same weights. A loss that is not
    finite ends the run with 1, and keeps the last checkpoint. The bidirectional pattern learns to
    fill in masked tokens; it cannot be served as a stream.

    Examples:
    concertina train data/emoji runs/emoji --context 1024 --span 32
    concertina train data/python runs/python --context 4096 --span 64 --rows 2
    concertina train data/python runs/twin --context 4096 --span 64 --rows 2 --attention full
    concertina train data/notes runs/mine --init runs/python --context 4096 --span 64 --rate 0.001
    concertina train data/emoji runs/rows --context 1024 --span 32 --attention axial-rowmajor
    """
    if threads := threads or cores_if_fewer():
        torch.set_num_threads(threads)
    loaded = load_dataset(dataset)
    try:
        model_config = ModelConfig(
            vocabulary=loaded.info.vocabulary,
            starts=loaded.info.starts,
            context=context,
            width=width,
            layers=layers,
            heads=heads,
            mlp=mlp,
            span=span,
            attention=attention,
            pooling=pooling,
            positions=positions,
        )
        train_config = TrainConfig(
            tokens=tokens,
            rows=rows,
            rate=rate,
            warmup=warmup,
            weight_decay=weight_decay,
            dropout=dropout,
            seed=seed,
            bfloat16=not float32,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not force:
        check_memory(model_config, train_config)

    def on_start(first: int, initial: Initial | None) -> None:
        shows.start(out, first, train_config.steps(context))
        if initial is not None:
            shows.say(f"{out}: begins with {initial}")

    def on_step(done: Progress) -> None:
        shows.step(done)
        if done.heldout is not None:
            write_report(out, loaded.info)

    with on_signals() as request, shown(_console, loaded.info.unit) as shows:
        try:
            bits = train_into(
                out,
                model_config,
                train_config,
                loaded,
                on_step,
                on_start=on_start,
                stop=request,
                save_every_s=60 * save_every,
                init=init,
            )
        except Stopped as stopped:
            shows.say(str(stopped))
            raise typer.Exit(128 + request.signal) from None
    write_report(out, loaded.info, draw_samples(load_checkpoint(out)))
    _console.print(f"{out}: {bits:.4f} {loaded.info.unit} on all held-out data; {out / REPORT}")
