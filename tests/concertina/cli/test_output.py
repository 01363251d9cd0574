"""What is printed is whole, is no markup, and does without a stream that is closed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from concertina.cli.output import plain_console, print_whole
from tests.concertina.cli.test_commands import Run, run
from tests.concertina.conftest import WAIT, Fake, text_model

__all__ = ["run"]

ROOT = Path(__file__).parents[3]
LONG = "a-name-" * 9 + "[int8]:smile:"


def test_a_name_is_whole_when_piped_and_no_markup(
    fake: Fake, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    fake.models = [text_model(LONG)]
    (line,) = [line for line in run("models")[1].splitlines() if LONG in line]
    assert line.split()[0] == LONG
    assert LONG in run("paint")[2]


def test_a_table_keeps_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("name")
    table.add_row(LONG)
    print_whole(table)
    assert LONG in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes it: a terminal
    print_whole(table)
    assert LONG not in capsys.readouterr().out


def test_a_message_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print("runs/[red]x[/red]:smile: " + "y" * 300)
    assert capsys.readouterr().out == "runs/[red]x[/red]:smile: " + "y" * 300 + "\n"


def _calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for folder in ("server", "model", "export", "loadtest", "protos/concertina"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_console_takes_what_it_prints_for_markup() -> None:
    consoles = dict(_calls("Console"))
    assert len(consoles) >= 3
    for place, call in consoles.items():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert (given.get("markup"), given.get("emoji")) == ("False", "False"), place
    for place, call in _calls("TextColumn"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("markup") == "False" or "{task" not in ast.unparse(call.args[0]), place


@pytest.mark.parametrize(
    ("closed", "arguments"),
    [
        (">&-", ["models"]),
        (">&-", ["generate", "x", "--json"]),
        ("<&- >&-", ["generate", "-"]),
        (">&-", ["paint"]),
        (">&-", ["--help"]),
    ],
    ids=str,
)
def test_a_closed_stream_is_no_error(fake: Fake, closed: str, arguments: list[str]) -> None:
    picture = fake.pixels(2, 0, [2] * 5) if arguments == ["paint"] else fake.text(2, 0, "ab")
    fake.script = [fake.accepted(), picture, fake.finished(3)]
    ran = _shell(closed, fake, *arguments)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_without_a_stream_for_errors_the_exit_code_tells(fake: Fake) -> None:
    ran = _shell("2>&-", fake, "generate", "--model", "none")
    assert (ran.returncode, ran.stdout) == (1, b"")


def test_a_full_disk_is_an_error_of_one_line(fake: Fake) -> None:
    ran = _shell(">/dev/full", fake, "models")
    assert ran.returncode == 1
    assert ran.stderr == b"error: [Errno 28] No space left on device\n"


def test_a_reader_that_leaves_before_the_end_is_quiet(fake: Fake) -> None:
    ran = _shell("| true", fake, "models", before="set -o pipefail;")
    assert (ran.returncode, ran.stderr) == (1, b"")


def test_what_an_output_cannot_show_is_replaced(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "é\ufffd"), fake.text(3, 5, "z")]
    fake.script.append(fake.finished(4))
    ran = _shell("", fake, "generate", PYTHONIOENCODING="latin-1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"\xe9?z", b"")


def _shell(
    redirection: str, fake: Fake, *arguments: str, before: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {
        "CONCERTINA_ADDRESS": fake.address,
        "PYTHONPATH": os.pathsep.join(sys.path),
        **variables,
    }
    script = f'{before} "$0" -m concertina.cli.main "$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", script, sys.executable, *arguments],
        env=environment,
        capture_output=True,
        timeout=WAIT * 3,
    )


def test_a_kept_stream_is_named(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(keep=600), fake.text(2, 0, "ab"), fake.finished(3)]
    assert run("generate", "x", "--keep", "600") == (
        0,
        "ab",
        "stream s1 is kept for 600 s: concertina sessions continue s1\n",
    )
    for arguments in (("--keep", "0"), (), ("--keep", "600", "--json")):
        assert run("generate", "x", *arguments)[2] == ""
