"""A server whose models come, change and go while it runs, in both homes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from concertina.client import Accepted, Client, ConcertinaError, Finished, Tokens
from tests.e2e.servers import Server, concertina, serving, until
from tests.server.bundle_folders import put

SOON = 30.0
STREAMS = ("concertina_streams_running", "concertina_streams_paused")


def models(server: Server) -> list[str]:
    """What the command line lists."""
    with Client(server.address) as client:
        return sorted(model.name for model in client.models(timeout=SOON))


@pytest.mark.parametrize(
    "home",
    [
        pytest.param([], id="ray", marks=pytest.mark.slow),
        pytest.param(["--local"], id="local"),
    ],
)
def test_models_come_and_go(
    home: list[str], long_bundle: Path, image_bundle: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "bundles"
    directory.mkdir()
    arguments = ["--watch", str(directory), "--threads", "1", "--drain-seconds", "90", *home]
    with serving(*arguments) as server, Client(server.address) as client:
        assert models(server) == []
        put(long_bundle, directory / "long")
        until(lambda: models(server) == ["long-text"])
        process = concertina(
            *("generate", "abc", "-m", "long-text", "--max-tokens", "20"),
            *("--address", server.address),
        )
        assert process.wait(SOON) == 0

        labels = {"model_name": "long-text"}
        stream = client.generate(
            "abc", model="long-text", max_tokens=32_000, ignore_eos=True, time_limit=30.0
        )
        with stream:
            accepted = next(iter(stream))
            assert isinstance(accepted, Accepted)
            put(image_bundle, directory / "image")
            until(lambda: models(server) == ["long-text", "tiny-image"])
            with client.generate(model="tiny-image", timeout=SOON) as image:
                assert any(isinstance(event, Finished) for event in image)
            shutil.rmtree(directory / "long")
            until(lambda: models(server) == ["tiny-image"])
            with pytest.raises(ConcertinaError, match="not served here"):
                client.score("abc", model="long-text", timeout=SOON)
            assert sum(server.metric(name, **labels) for name in STREAMS) == 1
            *more, last = stream
            positions = [event.first_position for event in more if isinstance(event, Tokens)]
            assert positions == sorted(positions) and isinstance(last, Finished)
            assert last.reason in ("max_tokens", "time_limit")
        until(lambda: server.metric("concertina_state_buffer_bytes", **labels) == 0)

        shutil.rmtree(directory / "image")
        until(lambda: models(server) == [])
