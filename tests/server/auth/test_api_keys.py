"""The file of keys, and how a caller is found in it."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.auth import api_keys as keys
from server.auth.api_keys import ANYONE, Caller, Callers, new_key, read_keys, write_keys
from server.errors import KeysError, Unauthenticated

READER = Caller("reader", ("tiny-text",), 2)
WRITER = Caller("writer")


def call(secret: str, scheme: str = "Bearer") -> list[tuple[str, str]]:
    """The metadata of a call."""
    return [("user-agent", "test"), ("authorization", f"{scheme} {secret}")]


def save(path: Path, callers: Sequence[Caller]) -> list[str]:
    """Writes a file with a key for each caller. Returns their secrets."""
    made = [new_key(caller) for caller in callers]
    write_keys(path, [key for key, _ in made])
    return [secret for _, secret in made]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_server_without_keys_serves_anyone() -> None:
    anyone: Any = [("user-agent", "test")]
    assert Callers(None).of(anyone) is ANYONE
    assert Callers(None).of(call("whatever")) is ANYONE
    assert ANYONE.may_use("any model") and ANYONE.max_streams is None


def test_a_secret_names_its_caller(path: Path) -> None:
    reader, writer = save(path, [READER, WRITER])
    callers = Callers(path)
    assert callers.of(call(reader)) == READER
    assert callers.of(call(writer, scheme="bearer")) == WRITER
    assert READER.may_use("tiny-text") and not READER.may_use("tiny-image")
    assert WRITER.may_use("tiny-image")


def test_a_call_without_a_valid_secret_is_refused(path: Path) -> None:
    (secret,) = save(path, [READER])
    digest = read_keys(path)[0].digest.hex()
    callers = Callers(path)
    strangers: list[Any] = [
        [("user-agent", "test")],
        [("user-agent", "test"), ("authorization", secret)],
        [("user-agent", "test"), ("authorization", f"Basic {secret}")],
        [("user-agent", "test"), ("authorization", "Bearer")],
        [("user-agent", "test"), ("x-authorization", f"Bearer {secret}")],
        [("user-agent", "test"), *[("authorization", f"Bearer {secret}")] * 2],
        *map(call, ("", secret[:-1], secret + "x", secret.upper(), digest, "\udcff", READER.name)),
    ]
    for stranger in strangers:
        with pytest.raises(Unauthenticated) as raised:
            callers.of(stranger)
        assert secret[12:20] not in raised.value.message


def test_an_empty_file_refuses_all_calls(path: Path) -> None:
    save(path, [])
    with pytest.raises(Unauthenticated):
        Callers(path).of(call(""))


def test_no_secret_is_stored(path: Path) -> None:
    secrets = save(path, [READER, WRITER])
    content = path.read_text()
    for secret in secrets:
        assert len(secret) > 43  # 256 bits, six of them a character
        assert secret not in content and secret[11:] not in content
    assert len(set(secrets)) == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_call_compares_all_digests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = save(path, [READER, WRITER, Caller("third")])
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys, "hmac", type("hmac", (), {"compare_digest": compare}))
    callers = Callers(path)
    for secret in secrets:
        compared.clear()
        callers.of(call(secret))
        assert compared == [key.digest for key in read_keys(path)]


def test_keys_come_and_go_while_the_server_runs(path: Path) -> None:
    first, writer = save(path, [READER, WRITER])
    callers = Callers(path)
    assert callers.of(call(first)) == READER
    reader, _ = read_keys(path)
    write_keys(path, [reader])
    assert callers.of(call(first)) == READER
    with pytest.raises(Unauthenticated):
        callers.of(call(writer))
    (second,) = save(path, [WRITER])
    assert callers.of(call(second)) == WRITER
    with pytest.raises(Unauthenticated):
        callers.of(call(first))


@pytest.mark.parametrize("change", ["broken", "gone"])
def test_a_file_that_cannot_be_read_leaves_the_keys_as_they_were(
    change: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (secret,) = save(path, [READER])
    callers = Callers(path)
    if change == "broken":
        path.write_text("{")
    else:
        path.unlink()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert callers.of(call(secret)) == READER
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    (other,) = save(path, [WRITER])
    assert callers.of(call(other)) == WRITER


def entry(**changes: object) -> dict[str, object]:
    return {"name": "reader", "sha256": "ab" * 32} | changes


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not a keys file"),
        ([], "is not a keys file"),
        ({}, "is not a keys file: 'keys'"),
        ({"keys": [{"name": "reader"}]}, "sha256"),
        ({"keys": [entry(sha256="abcd")]}, "sha256 of reader has 2 bytes"),
        ({"keys": [entry(sha256="no")]}, "is not a keys file"),
        ({"keys": [entry(modles=["a"])]}, "unknown field modles"),
        ({"keys": [entry(models="tiny-text")]}, "models is 'tiny-text': it must be a list"),
        ({"keys": [entry(models=[1])]}, "models of reader"),
        ({"keys": [entry(max_streams=0)]}, "max_streams of reader is 0"),
        ({"keys": [entry(max_streams=True)]}, "max_streams of reader is True"),
        ({"keys": [entry(name="a b")]}, "'a b' is not a valid key name"),
        ({"keys": [entry(name="")]}, "is not a valid key name"),
        ({"keys": [entry(), entry()]}, "several keys named reader"),
    ],
)
def test_a_file_that_is_wrong_is_refused(content: object, complaint: str, path: Path) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(KeysError) as raised:
        Callers(path)
    assert complaint in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(KeysError, match="does not exist: `concertina keys add"):
        Callers(path)
    with pytest.raises(KeysError, match="cannot be read"):
        Callers(path.parent)
