"""A stream outlives the server that began it."""

from __future__ import annotations

import base64
import threading
import time
from pathlib import Path

import pytest

from concertina.client import Client, Finished, Tokens
from server.ops.ports import free_ports
from server.snapshots.sealer import KEY_VARIABLE
from tests.e2e.servers import ROOT, serving

pytestmark = pytest.mark.e2e

BUNDLE = str(ROOT / "bundles" / "python-4k")
TOKENS, AFTER, STREAMS = 2000, 300, 8
LIMIT_S = 150.0


class Reader(threading.Thread):
    """Reads one long stream through whatever happens."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.address, self.seed = address, seed
        self.text, self.tokens, self.resumed = "", 0, 0
        self.finished: Finished | None = None

    def run(self) -> None:
        with (
            Client(self.address) as client,
            client.generate(
                "def ",
                seed=self.seed,
                max_tokens=TOKENS,
                ignore_eos=True,
                keep=120.0,
                timeout=LIMIT_S,
            ) as stream,
        ):
            for event in stream:
                match event:
                    case Tokens():
                        self.text += event.text
                        self.tokens += len(event.ids)
                    case Finished():
                        self.finished = event
            self.resumed = stream.resumed


@pytest.mark.slow
@pytest.mark.parametrize("home", [("--local",), ()], ids=["local", "ray"])
def test_streams_go_on_after_a_restart(
    home: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop takes as long as handing over does, not as long as streams have left to say."""
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(bytes(range(32))).decode())
    (port,) = free_ports(1)
    arguments = [BUNDLE, "--threads", "1", "--snapshots", f"file://{tmp_path}", *home]
    with serving(*arguments, "--drain-seconds", "100", port=port) as server:
        readers = [Reader(server.address, seed) for seed in range(STREAMS)]
        for reader in readers:
            reader.start()
        while min(reader.tokens for reader in readers) < AFTER:
            assert all(reader.is_alive() for reader in readers)
            time.sleep(0.01)
        before = time.monotonic()
    assert time.monotonic() - before < 30
    assert max(reader.tokens for reader in readers) < TOKENS
    with serving(*arguments, port=port):
        for reader in readers:
            reader.join(LIMIT_S)
            assert reader.finished is not None
            assert reader.finished.usage.generated_tokens == reader.tokens == TOKENS
            assert 0 < reader.finished.usage.time_to_first_token < 10
            assert reader.resumed == 1
        undisturbed = [Reader(server.address, seed) for seed in range(STREAMS)]
        for reader in undisturbed:
            reader.start()
        for reader, twin in zip(readers, undisturbed, strict=True):
            twin.join(LIMIT_S)
            assert reader.text == twin.text
