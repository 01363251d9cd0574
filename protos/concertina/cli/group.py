"""A group of commands that are imported only when they are used; each error is one line."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.text import Text
from typer._click import ClickException
from typer.core import TyperCommand, TyperGroup

from concertina import __version__
from concertina.cli.output import plain_console
from concertina.shown import cut

_OURS = ("concertina", "server", "model", "export", "loadtest")
_EXTRAS = {
    "PIL": "cli",
    "fontTools": "train",
    "numpy": "cli",
    "onnx": "train",
    "onnxruntime": "cpu",
    "onnxscript": "train",
    "safetensors": "train",
    "torch": "train",
}
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Command(NamedTuple):
    """A row of the table of commands.

    load: imports the command and returns it: a typer-annotated function, or a `typer.Typer`.

    A parameter that is a dataclass stands for an option for each of its fields. A function's
    docstring is its help page. The lines after `Examples:` (or `Example:`), one
    command each, are shown below the options. The commands of a `typer.Typer` work the same way.
    """

    summary: str
    load: Callable[[], Any]


class CommandUnavailable(Exception):
    """A command, or something that it imports, is not installed."""

    def __init__(self, name: str, missing: ModuleNotFoundError) -> None:
        package = (missing.name or "").split(".")[0]
        extra = _EXTRAS.get(package)
        if extra:
            needs = f"needs the '{extra}' extra"
            what = "./protos[cli]" if extra == "cli" else f".[{extra}]"
            remedy = f"run pip install '{what}' in its checkout"
        elif package in _OURS and package != "concertina":
            needs = "is part of the server, which is not installed"
            remedy = "run pip install ./protos '.[cpu]' in its checkout"
        else:
            needs, remedy = "is not installed completely", "install it anew"
        super().__init__(f"concertina {name} {needs} ({missing}): {remedy}")


def command_line(commands: dict[str, Command]) -> TyperGroup:
    """The group of `commands`. Its help page lists their summaries and imports none of them."""
    app = typer.Typer(
        cls=_Group,
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


def print_error(message: str) -> None:
    """Prints one line on standard error."""
    console = plain_console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), cut(message)))


def explain(error: Exception) -> str:
    """The message of an error; an error that is not ours names its class too."""
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _OURS:
        return str(error)
    return f"{type(error).__name__}: {error} (set CONCERTINA_TRACEBACK=1 to see where)"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"concertina {__version__}")
        raise typer.Exit


def _concertina(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Models that write long sequences, streamed over gRPC."""


class _Group(TyperGroup):
    # What is wrong with the arguments is raised in one of these two.
    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        with _short_errors():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _short_errors():
            return super().invoke(ctx)


@contextmanager
def _short_errors() -> Iterator[None]:
    """Cuts messages about arguments, which repeat them."""
    try:
        yield
    except ClickException as error:
        error.message = cut(error.message)
        raise


class _LazyCommand(TyperCommand):
    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name=name, help=command.summary)
        self._command = command

    # Running a command and showing its --help both start here; listing it does not.
    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        assert self.name is not None
        return load(self.name, self._command).make_context(info_name, args, *rest, **extra)


def load(name: str, command: Command) -> Any:
    try:
        target = command.load()
    except ModuleNotFoundError as error:
        raise CommandUnavailable(name, error) from None
    if isinstance(target, typer.Typer):
        for one in target.registered_commands:
            assert one.callback is not None
            one.help, one.epilog = _help(one.callback)
            one.callback = _spread(one.callback)
    else:
        function = target
        target = typer.Typer(
            add_completion=False, context_settings=_HELP_NAMES, rich_markup_mode="rich"
        )
        text, epilog = _help(function)
        target.command(name, help=text, epilog=epilog)(_guarded(name, _spread(function)))
    return typer.main.get_command(target)


def _guarded(name: str, function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except ModuleNotFoundError as error:
            raise CommandUnavailable(name, error) from None

    return run


def _spread(function: Callable[..., None]) -> Callable[..., None]:
    """The function, with each parameter that is a dataclass replaced by the fields of it."""
    given = inspect.signature(function, eval_str=True).parameters.values()
    groups: dict[str, Callable[..., object]] = {
        each.name: each.annotation
        for each in given
        if isinstance(each.annotation, type) and is_dataclass(each.annotation)
    }
    if not groups:
        return function
    parts = {
        name: [*inspect.signature(group, eval_str=True).parameters.values()]
        for name, group in groups.items()
    }
    flat = [part for each in given for part in parts.get(each.name, [each])]

    @functools.wraps(function)
    def run(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{part.name: options.pop(part.name) for part in parts[name]})
        function(**options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature([each.replace(kind=keyword) for each in flat])  # type: ignore[attr-defined]
    return run


def _help(function: Callable[..., None] | None) -> tuple[str, str | None]:
    """The help page of a function, and the examples to show below its options."""
    text, *examples = re.split("\n\nExamples?:\n", inspect.getdoc(function) or "", maxsplit=1)
    # Rich would keep the line ends of all paragraphs but the first.
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return text, _epilog(examples[0]) if examples else None


def _epilog(examples: str) -> str:
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return "\n".join(["[bold]Examples[/]", *(f"  [dim]$[/] [cyan]{escape(x)}[/]" for x in lines)])
