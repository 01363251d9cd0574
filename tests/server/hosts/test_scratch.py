"""The folder of a server, and the folders of servers that were killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.hosts.ray_environment import ray_environment
from server.hosts.scratch import scratch_folder
from tests.server.hosts.test_ray_environment import CONFIG

HOLD = """
import sys
from server.hosts.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "certificate.pem").write_text("secret")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folders are made."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold() -> tuple[subprocess.Popen[str], Path]:
    """A server that runs, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_and_gone_at_the_end(parent: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_only_what_a_dead_server_left_is_removed(parent: Path) -> None:
    strange = parent / "concertina-strange"
    strange.mkdir()
    (strange / "notes").write_text("x")
    (parent / "other").mkdir()
    killed, left = hold()
    running, held = hold()
    try:
        with scratch_folder():
            assert left.exists() and held.exists()
        killed.kill()
        killed.wait(20)
        with scratch_folder() as folder:
            assert {path.name for path in parent.iterdir()} == {
                folder.name,
                held.name,
                strange.name,
                "other",
            }
        running.communicate("")
        assert not held.exists()
    finally:
        for process in (killed, running):
            process.kill()
            process.communicate()


def test_sessions_of_ray_go_there_if_their_sockets_may(tmp_path: Path) -> None:
    short, long = Path("/tmp/concertina-abcdefgh"), tmp_path / ("x" * 60)
    long.mkdir()
    assert "RAY_TMPDIR" not in ray_environment(CONFIG, long)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="concertina-") as folder:
        assert len(folder) == len(str(short))
        environment = ray_environment(CONFIG, Path(folder))
    assert environment["RAY_TMPDIR"] == folder
