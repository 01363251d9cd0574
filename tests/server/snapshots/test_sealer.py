from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.v1 import snapshot_pb2 as pb
from server.config import ConfigError
from server.errors import SnapshotRefused
from server.snapshots.sealer import KEY_VARIABLE, VERSION, Sealer, refuse_expired

KEY, OTHER = bytes(range(32)), bytes(32)
SNAPSHOT = pb.Snapshot(outputs=[pb.OutputSnapshot(generated=b"secret words", pushed=3)])


def header(**fields: object) -> pb.SnapshotHeader:
    made = pb.SnapshotHeader(version=VERSION, stream_id="s", owner="me", model="m")
    made.expires.FromSeconds(int(time.time()) + 60)
    made.MergeFrom(pb.SnapshotHeader(**fields))  # type: ignore[arg-type]
    return made


SEALED = Sealer([KEY]).seal(header(), SNAPSHOT)


def test_the_owner_opens_a_sealed_snapshot() -> None:
    opened, snapshot = Sealer([KEY]).open(SEALED, "me")
    assert (opened.stream_id, snapshot) == ("s", SNAPSHOT)
    assert b"secret words" not in SEALED


@given(at=st.integers(0, len(SEALED) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_is_refused(at: int, bit: int) -> None:
    changed = bytearray(SEALED)
    changed[at] ^= 1 << bit
    with pytest.raises(SnapshotRefused):
        Sealer([KEY]).open(bytes(changed), "me")


@pytest.mark.parametrize("size", range(len(SEALED)))
def test_a_missing_byte_is_refused(size: int) -> None:
    with pytest.raises(SnapshotRefused):
        Sealer([KEY]).open(SEALED[:size], "me")


def test_an_added_byte_is_refused() -> None:
    with pytest.raises(SnapshotRefused):
        Sealer([KEY]).open(SEALED + b"\0", "me")


@pytest.mark.parametrize("owner", ["", "you", "ME"])
def test_another_owner_does_not_open_it(owner: str) -> None:
    with pytest.raises(SnapshotRefused, match="another API key"):
        Sealer([KEY]).open(SEALED, owner)


def test_another_server_does_not_open_it() -> None:
    with pytest.raises(SnapshotRefused, match=KEY_VARIABLE):
        Sealer([OTHER]).open(SEALED, "me")


def test_keys_can_be_rotated() -> None:
    """The first key seals; the former ones still open."""
    changed = Sealer([OTHER, KEY])
    assert changed.open(SEALED, "me")[1] == SNAPSHOT
    again = changed.seal(header(), SNAPSHOT)
    assert Sealer([OTHER]).open(again, "me")[1] == SNAPSHOT


def test_another_format_is_refused() -> None:
    newer = Sealer([KEY]).seal(header(version=VERSION + 1), SNAPSHOT)
    with pytest.raises(SnapshotRefused, match=f"format {VERSION + 1}, .* reads 2, 3, 4$"):
        Sealer([KEY]).open(newer, "me")


def test_an_expired_snapshot_is_refused() -> None:
    refuse_expired(header())
    old = header()
    old.expires.FromSeconds(int(time.time()) - 1)
    with pytest.raises(SnapshotRefused, match="expired at"):
        refuse_expired(old)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert Sealer.from_environment() is None
    texts = [base64.b64encode(key).decode() for key in (OTHER, KEY)]
    monkeypatch.setenv(KEY_VARIABLE, " , ".join(texts))
    sealer = Sealer.from_environment()
    assert sealer is not None
    assert sealer.open(SEALED, "me")[1] == SNAPSHOT
    assert sealer.secret == Sealer([OTHER]).secret != Sealer([KEY]).secret


@pytest.mark.parametrize("text", ["short", "%%%", base64.b64encode(bytes(31)).decode()])
def test_a_wrong_key_is_refused_and_not_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, text)
    with pytest.raises(ConfigError, match="openssl rand -base64 32") as raised:
        Sealer.from_environment()
    assert text not in str(raised.value)
