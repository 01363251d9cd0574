"""`concertina keys`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from concertina.cli.main import COMMANDS, command_line
from server.auth.api_keys import Caller, Callers, read_keys
from server.errors import KeysError
from tests.server.auth.test_api_keys import call

GROUP = command_line({"keys": COMMANDS["keys"]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keys(path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on its own keys file. Returns its standard output."""

    def run(*arguments: str) -> str:
        GROUP.main(["keys", *arguments, "--keys", str(path)], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_an_added_key_is_accepted(keys: Any, path: Path) -> None:
    everything = keys("add", "writer").strip()
    limited = keys("add", "reader", "-m", "a", "--model", "b", "--streams", "8").strip()
    callers = Callers(path)
    assert callers.of(call(everything)) == Caller("writer")
    assert callers.of(call(limited)) == Caller("reader", ("a", "b"), 8)


def test_the_list_shows_names_and_limits_but_no_secret(keys: Any, path: Path) -> None:
    keys("add", "writer")
    secret = keys("add", "reader", "-m", "a", "--streams", "8").strip()
    shown = keys("list")
    assert shown.splitlines() == [
        "writer: every model, any number of streams",
        "reader: a, 8 streams",
    ]
    as_json = keys("list", "--json")
    assert json.loads(as_json.splitlines()[1]) == {
        "name": "reader",
        "models": ["a"],
        "max_streams": 8,
    }
    for digest in (key.digest.hex() for key in read_keys(path)):
        assert digest not in shown + as_json
    assert secret not in shown + as_json


def test_a_removed_key_is_gone(keys: Any, path: Path) -> None:
    keys("add", "writer")
    keys("add", "reader")
    keys("remove", "writer")
    assert [key.caller.name for key in read_keys(path)] == ["reader"]
    with pytest.raises(KeysError, match="no key named writer; it has: reader"):
        keys("remove", "writer")


def test_a_name_is_not_given_twice(keys: Any, path: Path) -> None:
    keys("add", "writer")
    before = path.read_bytes()
    with pytest.raises(KeysError, match="already has a key named writer"):
        keys("add", "writer")
    with pytest.raises(KeysError, match="is not a valid key name"):
        keys("add", "two words")
    assert path.read_bytes() == before


def test_a_secret_goes_into_a_file_that_only_its_owner_can_read(
    keys: Any, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "writer.key"
    assert keys("add", "writer", "--out", str(file)) == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert Callers(path).of(call(file.read_text().strip())) == Caller("writer")
    with pytest.raises(KeysError, match="is there already"):
        keys("add", "reader", "--out", str(file))
    with pytest.raises(FileNotFoundError):
        keys("add", "reader", "--out", str(tmp_path / "nowhere" / "reader.key"))
    assert [key.caller.name for key in read_keys(path)] == ["writer"]
    with pytest.raises(KeysError, match="not a valid key name"):
        keys("add", "re/ader", "--out", str(tmp_path / "reader.key"))
    assert not (tmp_path / "reader.key").exists()
