"""The command line: loading of commands, help, exit codes, messages."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer

import concertina
from concertina.cli import main as cli
from concertina.cli.group import Command, load
from concertina.cli.main import COMMANDS, main

WAIT = 60.0

Run = Callable[..., tuple[int, str, str]]
Add = Callable[[Any], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `concertina` with arguments in this process: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CONCERTINA_TRACEBACK", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concertina", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds the command `probe`: a function, an app, or the error that importing it raises."""

    def add(target: Any) -> None:
        def load() -> Any:
            if isinstance(target, Exception):
                raise target
            return target

        monkeypatch.setattr(cli, "COMMANDS", {**COMMANDS, "probe": Command("The probe.", load)})

    return add


def test_help_lists_every_command_and_imports_none() -> None:
    heavy = {"grpc", "PIL", "ray", "torch", "onnxruntime"}
    code = (
        "import sys; from concertina.cli.main import main\n"
        "sys.argv = ['concertina', '--help']\n"
        "try: main()\n"
        f"except SystemExit: print('LOADED', sorted({heavy} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=True
    ).stdout
    for name, command in COMMANDS.items():
        assert name in shown
        assert command.summary in shown
    assert "LOADED []" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name: str) -> None:
    lines = ast.parse(textwrap.dedent(inspect.getsource(COMMANDS[name].load)))
    (loaded,) = (line for line in ast.walk(lines) if isinstance(line, ast.ImportFrom))
    (alias,) = loaded.names
    assert loaded.module is not None
    found = find_spec(loaded.module)
    assert found is not None and found.origin is not None
    defined = ast.parse(Path(found.origin).read_text()).body
    functions = {line.name for line in defined if isinstance(line, ast.FunctionDef)}
    groups = {ast.unparse(line.targets[0]) for line in defined if isinstance(line, ast.Assign)}
    assert alias.name == name.replace("-", "_")
    assert alias.name in functions | groups


def test_the_version_is_shown(run: Run) -> None:
    assert run("--version") == (0, f"concertina {concertina.__version__}\n", "")


@pytest.mark.parametrize("name", ["generate", "paint", "score", "models"])
def test_every_help_page_has_examples(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"$ concertina {name}" in out
    assert "Examples:" not in out
    assert "--address" in out


def test_a_function_becomes_a_command(run: Run, add: Add) -> None:
    def probe(count: Annotated[int, typer.Argument(help="How many.")], loud: bool = False) -> None:
        """Probes [things].

        At length.

        A paragraph that is broken here
        goes on in the line.

        Examples:

          concertina probe 3 --loud

          cat [a] | concertina probe 4
        """
        print(count, loud)

    add(probe)
    assert run("probe", "3", "--loud") == (0, "3 True\n", "")
    assert run("probe", "x")[0] == 2
    code, out, _ = run("probe", "-h")
    assert code == 0
    for part in (
        "concertina probe [OPTIONS]",
        "At length.",
        "broken here goes on in the line.",
        "How many.",
        "$ concertina probe 3 --loud",
        "$ cat [a] | concertina probe 4",
    ):
        assert part in out
    assert out.count("$") == 2


def test_an_app_becomes_a_group(run: Run, add: Add) -> None:
    probes = typer.Typer()

    @probes.command()
    def first() -> None:
        print("first")

    @probes.command()
    def second() -> None:
        print("second")

    add(probes)
    assert run("probe", "second") == (0, "second\n", "")


def test_an_exit_code_is_passed_on(run: Run, add: Add) -> None:
    def probe() -> None:
        raise typer.Exit(3)

    add(probe)
    assert run("probe")[0] == 3


@pytest.mark.parametrize("late", [False, True])
def test_a_missing_extra_is_named(run: Run, add: Add, late: bool) -> None:
    missing = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    def probe() -> None:
        raise missing

    add(probe if late else missing)
    code, out, err = run("probe")
    assert (code, out) == (1, "")
    assert err == (
        "error: concertina probe needs the 'train' extra (No module named 'torch.nn'): "
        "run pip install '.[train]' in its checkout\n"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("probe_command", "is not installed completely (No module named 'probe_command')"),
        (
            "PIL.Image",
            "needs the 'cli' extra (No module named 'PIL.Image'): run pip install './pro",
        ),
        ("server", "is part of the server, which is not installed (No module named 'server'): run"),
    ],
)
def test_a_missing_part_of_ours_is_named(run: Run, add: Add, name: str, message: str) -> None:
    add(ModuleNotFoundError(f"No module named '{name}'", name=name))
    code, _, err = run("probe")
    assert code == 1
    assert message in err


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_command_line_without_its_packages_says_what_to_install(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from concertina.cli.__main__ import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: the command concertina needs the 'cli' extra (")
    assert ran.stderr.endswith(": run pip install './protos[cli]' in its checkout\n")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n"),
        (
            KeyError("x"),
            "error: KeyError: 'x' (set CONCERTINA_TRACEBACK=1 to see where)\n",
        ),
    ],
)
def test_an_error_is_one_line(run: Run, add: Add, error: Exception, message: str) -> None:
    def probe() -> None:
        raise error

    add(probe)
    assert run("probe") == (1, "", message)


def test_errors_of_our_folders_need_no_class_name(run: Run, add: Add) -> None:
    failure = type("BundleError", (Exception,), {"__module__": "server.errors"})

    def probe() -> None:
        raise failure("step.onnx [a] is missing")

    add(probe)
    assert run("probe") == (1, "", "error: step.onnx [a] is missing\n")


def test_the_traceback_is_there_for_those_who_ask(
    add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> None:
        raise KeyError("x")

    add(probe)
    monkeypatch.setenv("CONCERTINA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["concertina", "probe"])
    with pytest.raises(KeyError):
        main()


def test_wrong_usage_is_2(run: Run) -> None:
    for arguments in (("nothing",), ("generate", "--seed", "x"), ("paint", "--scale", "0")):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: concertina" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("LONG",),
        ("generate", "--LONG"),
        ("generate", "--logit-bias", "LONG"),
        ("generate", "--key-file", "LONG"),
        ("paint", "--out", "LONG"),
        ("score", "LONG"),
        ("models", "--address", "LONG"),
        ("serve", "LONG"),
        ("keys", "remove", "LONG", "--keys", "/nowhere"),
    ],
    ids=" ".join,
)
def test_a_message_is_short_whatever_was_given(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*(argument.replace("LONG", "x" * 50_000) for argument in arguments))
    assert code and not out
    assert "x" in err
    assert len(err) < 3000  # with the frame around it


def _numbers(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for parameter in command.params:
        annotation = parameter.type_descriptor.annotation
        if {annotation, *get_args(annotation)} & {int, float}:
            yield f"{name} {parameter.opts[0]}", parameter
    for subcommand, group in getattr(command, "commands", {}).items():
        yield from _numbers(f"{name} {subcommand}", group)


def test_every_number_has_a_range() -> None:
    numbers = [number for name in COMMANDS for number in _numbers(name, load(name, COMMANDS[name]))]
    assert len(numbers) > 80
    unbounded = [name for name, parameter in numbers if parameter.min is None]
    assert unbounded == ["data --heldout"]  # a callback bounds it, since its ends do not belong
    served = dict(_numbers("serve", load("serve", COMMANDS["serve"])))
    assert all(parameter.max is not None for parameter in served.values())
    assert len(served) == 18


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--replicas", "0"),
        ("serve", "--prefill-share", "nan"),
        ("serve", "--port", "65536"),
        ("generate", "--temperature", "nan"),
        ("loadtest", "--streams", "0"),
        ("train", "data", "run", "--heads", "0"),
        ("compare", "data", "out", "--span", "0"),
        ("data", "text", "out", "--heldout", "nan"),
        ("sessions", "fork", "s", "--n", "0"),
    ],
    ids=" ".join,
)
def test_a_number_out_of_its_range_is_wrong_usage(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert f"Invalid value for '{arguments[-2]}'" in err
