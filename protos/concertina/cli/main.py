"""The command `concertina`: a table of commands, each imported only when it is used."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

_OURS = ("concertina", "server", "model", "export", "loadtest", "__main__")
_EXTRAS = {
    "onnxruntime": "cpu",
    "fontTools": "train",
    "onnx": "train",
    "onnxscript": "train",
    "safetensors": "train",
    "torch": "train",
}
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Command(NamedTuple):
    """Where a command lives: a typer-annotated function, or a `typer.Typer`, in a module.

    A function's docstring is its help page; what follows the line `Examples:` (or `Example:`),
    one command a line, is shown below the options. So with the commands of a `typer.Typer`.
    """

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "demo": Command("server.hosts.serve", "demo", "Serve the bundled models and watch them write."),
    "serve": Command("server.hosts.serve", "serve", "Serve bundles over gRPC."),
    "keys": Command("server.auth.keys_command", "keys", "Say who may call a server."),
    "models": Command("concertina.cli.generate", "models", "List what a server serves."),
    "generate": Command("concertina.cli.generate", "generate", "Write text as it is generated."),
    "paint": Command("concertina.cli.generate", "paint", "Paint an image as it is generated."),
    "score": Command(
        "concertina.cli.generate", "score", "Measure how well a model predicts a file."
    ),
    "sessions": Command(
        "concertina.cli.sessions", "sessions", "Pause, continue, copy and move streams."
    ),
    "loadtest": Command("loadtest.command", "loadtest", "Drive a server hard and report."),
    "bench": Command("loadtest.bench.command", "bench", "Compare with other engines."),
    "data": Command("model.command", "data", "Prepare training data."),
    "train": Command("model.command", "train", "Train a model."),
    "export": Command("export.command", "export", "Turn a checkpoint into a bundle."),
    "compare": Command("export.compare_command", "compare", "Train patterns side by side."),
}


class CommandUnavailable(Exception):
    """A command, or something that it imports, is not installed."""

    def __init__(self, name: str, missing: ModuleNotFoundError) -> None:
        package = (missing.name or "").split(".")[0]
        extra = _EXTRAS.get(package)
        remedy = f"run pip install '.[{extra}]' in its checkout" if extra else "install it anew"
        needs = f"needs the '{extra}' extra" if extra else "is not installed completely"
        super().__init__(f"concertina {name} {needs} ({missing}): {remedy}")


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # What gRPC logs below errors would stand between a command's own lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        command_line(COMMANDS).main(prog_name="concertina")
    except Exception as error:
        if os.environ.get("CONCERTINA_TRACEBACK"):
            raise
        print_error(_explain(error))
        sys.exit(1)


def print_error(message: str) -> None:
    """One line on standard error."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message))


def command_line(commands: dict[str, Command]) -> TyperGroup:
    """The group of `commands`. Its help page lists their summaries and imports none of them."""
    app = typer.Typer(
        cls=TyperGroup,
        name="concertina",
        no_args_is_help=True,
        context_settings=_HELP_NAMES,
        rich_markup_mode="rich",
    )
    app.callback()(_concertina)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in commands.items():
        group.add_command(_LazyCommand(name, command))
    return group


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"concertina {version('concertina')}")
        raise typer.Exit


def _concertina(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Models that write long sequences, streamed over gRPC."""


class _LazyCommand(TyperCommand):
    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name=name, help=command.summary)
        self._command = command

    # Both running a command and its --help start here, on the real command; listing it does not.
    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        assert self.name is not None
        return _load(self.name, self._command).make_context(info_name, args, *rest, **extra)


def _load(name: str, command: Command) -> Any:
    try:
        target = getattr(import_module(command.module), command.attribute)
    except ModuleNotFoundError as error:
        raise CommandUnavailable(name, error) from None
    if isinstance(target, typer.Typer):
        for one in target.registered_commands:
            one.help, one.epilog = _help(one.callback)
    else:
        function = target
        target = typer.Typer(
            add_completion=False, context_settings=_HELP_NAMES, rich_markup_mode="rich"
        )
        text, epilog = _help(function)
        target.command(name, help=text, epilog=epilog)(_guarded(name, function))
    return typer.main.get_command(target)


def _guarded(name: str, function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except ModuleNotFoundError as error:
            raise CommandUnavailable(name, error) from None

    return run


def _help(function: Callable[..., None] | None) -> tuple[str, str | None]:
    """The help page of a function, and what stands below its options."""
    text, *examples = re.split("\n\nExamples?:\n", inspect.getdoc(function) or "", maxsplit=1)
    return text, _epilog(examples[0]) if examples else None


def _epilog(examples: str) -> str:
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return "\n".join(["[bold]Examples[/]", *(f"  [dim]$[/] [cyan]{escape(x)}[/]" for x in lines)])


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _OURS:
        return str(error)
    return f"{type(error).__name__}: {error} (set CONCERTINA_TRACEBACK=1 to see where)"


if __name__ == "__main__":
    main()
