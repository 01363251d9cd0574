"""The command line: loading of commands, help, exit codes, messages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from concertina.cli import main as cli
from concertina.cli.main import COMMANDS, Command, main

WAIT = 60.0

Run = Callable[..., tuple[int, str, str]]


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
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty module that the commands `probe` and `probes` come from."""
    module = ModuleType("probe_command")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    probes = {name: Command(module.__name__, name, f"The {name}.") for name in ("probe", "probes")}
    monkeypatch.setattr(cli, "COMMANDS", {**COMMANDS, **probes})
    return module


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
    module, attribute, _ = COMMANDS[name]
    found = find_spec(module)
    assert found is not None and found.origin is not None
    defined = ast.parse(Path(found.origin).read_text()).body
    functions = {line.name for line in defined if isinstance(line, ast.FunctionDef)}
    groups = {ast.unparse(line.targets[0]) for line in defined if isinstance(line, ast.Assign)}
    assert attribute in functions | groups


@pytest.mark.parametrize("name", ["generate", "paint", "score", "models"])
def test_every_help_page_has_examples(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"$ concertina {name}" in out
    assert "Examples:" not in out
    assert "--address" in out


def test_a_function_becomes_a_command(run: Run, module: ModuleType) -> None:
    def probe(count: Annotated[int, typer.Argument(help="How many.")], loud: bool = False) -> None:
        """Probes [things].

        At length.

        Examples:

          concertina probe 3 --loud

          cat [a] | concertina probe 4
        """
        print(count, loud)

    module.probe = probe
    assert run("probe", "3", "--loud") == (0, "3 True\n", "")
    assert run("probe", "x")[0] == 2
    code, out, _ = run("probe", "-h")
    assert code == 0
    for part in (
        "concertina probe [OPTIONS]",
        "At length.",
        "How many.",
        "$ concertina probe 3 --loud",
        "$ cat [a] | concertina probe 4",
    ):
        assert part in out
    assert out.count("$") == 2


def test_an_app_becomes_a_group(run: Run, module: ModuleType) -> None:
    module.probes = typer.Typer()

    @module.probes.command()
    def first() -> None:
        print("first")

    @module.probes.command()
    def second() -> None:
        print("second")

    assert run("probes", "second") == (0, "second\n", "")


def test_an_exit_code_is_passed_on(run: Run, module: ModuleType) -> None:
    def probe() -> None:
        raise typer.Exit(3)

    module.probe = probe
    assert run("probe")[0] == 3


@pytest.mark.parametrize("late", [False, True])
def test_a_missing_extra_is_named(
    run: Run, module: ModuleType, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    def probe() -> None:
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    if late:
        module.probe = probe
    else:
        monkeypatch.setattr(cli, "import_module", lambda _: probe())
    code, out, err = run("probe")
    assert (code, out) == (1, "")
    assert err == (
        "error: concertina probe needs the 'train' extra (No module named 'torch.nn'): "
        "run pip install '.[train]' in its checkout\n"
    )


def test_a_missing_part_of_ours_is_named(run: Run, module: ModuleType) -> None:
    del sys.modules[module.__name__]
    code, _, err = run("probe")
    assert code == 1
    assert "is not installed completely (No module named 'probe_command')" in err


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
def test_an_error_is_one_line(run: Run, module: ModuleType, error: Exception, message: str) -> None:
    def probe() -> None:
        raise error

    module.probe = probe
    assert run("probe") == (1, "", message)


def test_errors_of_our_folders_need_no_class_name(run: Run, module: ModuleType) -> None:
    failure = type("BundleError", (Exception,), {"__module__": "server.errors"})

    def probe() -> None:
        raise failure("step.onnx [a] is missing")

    module.probe = probe
    assert run("probe") == (1, "", "error: step.onnx [a] is missing\n")


def test_the_traceback_is_there_for_those_who_ask(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> None:
        raise KeyError("x")

    module.probe = probe
    monkeypatch.setenv("CONCERTINA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["concertina", "probe"])
    with pytest.raises(KeyError):
        main()


def test_wrong_usage_is_2(run: Run) -> None:
    for arguments in (("nothing",), ("generate", "--seed", "x"), ("paint", "--scale", "0")):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: concertina" in err
