"""The command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from concertina.codecs.tokenizer_file import TOKENIZER
from model.pretrained.convert import convert as convert_into
from model.pretrained.source import UNKNOWN_LICENSE, PretrainedError
from model.run import CHECKPOINT

_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder, or GGUF file.")],
    run: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    license: Annotated[
        str, typer.Option(help="SPDX identifier, where the source names no licence.")
    ] = "",
) -> None:
    """Convert a pretrained model to a run, which `concertina export` takes.

    Architectures: Llama, Mistral, Qwen2, Qwen3, SmolLM3, GPT-2, GPT-NeoX. What cannot be computed
    exactly is refused by name. The licence and the origin of the weights are kept in the run's
    config.json. Nothing is fetched, and no code of the model is run.

    Examples:
    concertina convert models/SmolLM2-135M-Instruct runs/smollm2
    concertina convert models/smollm2.Q4_1.gguf runs/smollm2 --license Apache-2.0
    """
    try:
        with _console.status("reading the settings") as status:
            origin = convert_into(
                source,
                run,
                license=license or None,
                on_tensor=lambda name, done, count: status.update(
                    f"reading weights: {done} of {count}, {name}"
                ),
            )
    except (FileExistsError, PretrainedError) as error:
        _console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from None
    size = (run / CHECKPOINT).stat().st_size
    license = origin.license
    if license == UNKNOWN_LICENSE:
        license = "the source names no licence: find out, and give --license"
    _console.print(f"{run}: {origin.architecture}, {size / 1e6:.1f} MB; {license}")
    if not (run / TOKENIZER).exists():
        _console.print(
            f"{source} has no {TOKENIZER}, and without it the model cannot be served: save its "
            "tokenizer there with transformers' save_pretrained, and convert the model again"
        )
