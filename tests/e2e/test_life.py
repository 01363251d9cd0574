"""How servers start, stop, die and live beside each other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from PIL import Image

from concertina.bundle.manifest import read_manifest, write_manifest
from concertina.client import (
    Accepted,
    Client,
    ConcertinaError,
    Finished,
    GenerationFailed,
    Tokens,
)
from tests.bundles import HEIGHT, WIDTH
from tests.e2e.servers import START_SECONDS, Server, concertina, serving, until

SOON = 30.0


@pytest.fixture(params=[[], ["--local"]], ids=["ray", "local"])
def home(request: pytest.FixtureRequest) -> list[str]:
    """The option that chooses where the servicers run."""
    chosen: list[str] = request.param
    return chosen


def colours(address: str, seed: int) -> bytes:
    with Client(address) as client, client.generate(seed=seed, timeout=SOON) as stream:
        return b"".join(event.rgb for event in stream if isinstance(event, Tokens))


def test_a_corrupt_bundle_ends_the_start(
    home: list[str], image_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(image_bundle, bundle)
    with (bundle / "step.onnx").open("r+b") as step:
        step.seek(-1, os.SEEK_END)
        step.write(b"\0")
    process = concertina("serve", str(bundle), "--http-port", "0", *home, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert errors.startswith(b"error: ")
    assert b"step.onnx does not match its checksum" in errors
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_a_bundle_that_does_not_load_ends_the_start(
    home: list[str], image_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(image_bundle, bundle)
    manifest = read_manifest(bundle)
    (bundle / "step.onnx").write_bytes(b"\n\x0bnot a graph")
    write_manifest(bundle, manifest, [file.path for file in manifest.files])
    process = concertina("serve", str(bundle), "--http-port", "0", *home, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1
    assert b"step.onnx cannot be loaded" in errors
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_ctrl_c_stops_everything(home: list[str], image_bundle: Path) -> None:
    """A terminal sends it to every process of the group; here, while a stream runs."""
    with serving(str(image_bundle), *home, "--drain-seconds", "3") as server:
        assert colours(server.address, 1)
        family = [server.process, *server.process.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=SOON)
        assert not alive
        assert server.process.returncode == 0


@pytest.mark.slow
def test_running_streams_may_end(home: list[str], long_bundle: Path) -> None:
    limits = ["--drain-seconds", "12", "--threads", "1"]
    with serving(str(long_bundle), *limits, *home) as server, Client(server.address) as client:
        asked = {"max_tokens": 30_000, "ignore_eos": True, "timeout": 60}
        short = client.generate("a", time_limit=5, **asked)
        for _ in range(2):
            next(short)
        server.process.terminate()
        assert isinstance(list(short)[-1], Finished)
        assert server.process.wait(SOON) == 0


@pytest.mark.slow
def test_streams_that_do_not_end_are_told(long_bundle: Path) -> None:
    limits = ["--drain-seconds", "1", "--threads", "1", "--local"]
    with serving(str(long_bundle), *limits) as server, Client(server.address) as client:
        endless = client.generate("a", max_tokens=30_000, ignore_eos=True, timeout=60)
        next(endless)
        server.process.terminate()
        with pytest.raises(GenerationFailed, match="taken down") as raised:
            list(endless)
        assert raised.value.retryable
        assert server.process.wait(SOON) == 0


@pytest.mark.slow
def test_two_servers_do_not_meet(image_bundle: Path, long_bundle: Path) -> None:
    with serving(str(image_bundle)) as one, serving(str(long_bundle)) as two:
        for _ in range(8):
            for server, name in ((one, "tiny-image"), (two, "long-text")):
                with Client(server.address) as client:
                    assert [model.name for model in client.models(timeout=SOON)] == [name]


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "path"), [("1", "direct ingress"), ("2", "Python proxy")])
def test_without_haproxy(
    replicas: str, path: str, image_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with serving(str(image_bundle), "--replicas", replicas) as server:
        assert len(colours(server.address, 1)) == 3 * WIDTH * HEIGHT
        with Client(server.address) as client, pytest.raises(ConcertinaError) as raised:
            list(client.generate(model="nope", timeout=SOON))
        assert raised.value.code == "NOT_FOUND"
        assert path in server.output()


@pytest.mark.slow
def test_the_demo(image_bundle: Path, text_bundle: Path, tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    shutil.copytree(image_bundle, bundles / "image")
    shutil.copytree(text_bundle, bundles / "text")
    pipe = subprocess.PIPE
    process = concertina("demo", cwd=tmp_path, stdout=pipe, stderr=pipe)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()
    assert b"no process is left" in output
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width % WIDTH == 0
        assert picture.width == picture.height


@pytest.mark.slow
def test_a_demo_that_fails_says_so(image_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(image_bundle, tmp_path / "bundles" / "image")
    (tmp_path / "bundles" / "image" / "fold.onnx").write_bytes(b"")
    process = concertina("demo", cwd=tmp_path, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"fold.onnx" in errors


@pytest.mark.chaos
def test_a_killed_replica_is_replaced(long_bundle: Path) -> None:
    with serving(str(long_bundle)) as server, Client(server.address) as client:
        stream = client.generate("a", max_tokens=30_000, ignore_eos=True, timeout=300)
        assert isinstance(next(stream), Accepted)
        replica(server).kill()
        # Whatever the status says: without its last event, the client knows that it was cut.
        with pytest.raises(ConcertinaError) as raised:
            list(stream)
        assert type(raised.value).__name__ == "StreamCut"
        until(lambda: len(answer(client)) > 0, 90.0)
        # The dead process holds nothing any more.
        until(lambda: server.metric("concertina_streams_running") == 0)


def replica(server: Server) -> psutil.Process:
    return next(
        process
        for process in server.process.children(recursive=True)
        if "ServeReplica" in " ".join(process.cmdline())
    )


def answer(client: Client) -> list[Tokens]:
    try:
        events = list(client.generate("a", max_tokens=4, ignore_eos=True, timeout=5))
    except ConcertinaError:
        return []
    return [event for event in events if isinstance(event, Tokens)]
