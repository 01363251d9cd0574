"""The example for Node.js: its text is whole, whatever happens to calls and servers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from concertina.client import Client
from concertina.v1 import generation_service_pb2 as pb
from loadtest.scenarios.clusters import Processes, Store
from tests.concertina.conftest import Fake, Status
from tests.e2e.servers import ROOT, until

BUNDLE = ROOT / "bundles" / "python-4k"
SEED = 2**53 + 1  # JavaScript's numbers have 2**53 and 2**53 + 2
TOKENS, BEFORE = 2_500, 300
SOON, LATE = 60.0, 120.0


@dataclass(frozen=True)
class Ran:
    """What the example printed, and its exit status."""

    text: str
    notes: str
    code: int


@dataclass(frozen=True)
class Example:
    """The example, installed in `folder`."""

    folder: Path

    def start(self, out: Path, *arguments: object) -> subprocess.Popen[bytes]:
        """Start it; what it prints goes into files that begin with `out`."""
        with out.open("wb") as text, out.with_suffix(".notes").open("wb") as notes:
            command = ["node", "generate.js", *map(str, arguments)]
            return subprocess.Popen(command, cwd=self.folder, stdout=text, stderr=notes)

    def end(self, process: subprocess.Popen[bytes], out: Path) -> Ran:
        """Wait for its end, and read what it printed."""
        try:
            code = process.wait(LATE)
        finally:
            process.kill()
            process.wait(SOON)
        return Ran(out.read_text(), out.with_suffix(".notes").read_text(), code)

    def run(self, out: Path, *arguments: object) -> Ran:
        """Start it, and wait for its end."""
        return self.end(self.start(out, *arguments), out)


def missing(reason: str) -> None:
    """Skip what needs something that not everybody has; CI has to have it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The example with its packages, in a copy, so that nothing is installed into the checkout."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            missing(f"{program} is not on PATH: install Debian's nodejs and npm, or their like")
    root = tmp_path_factory.mktemp("checkout")
    folder = root / "examples" / "node"
    ignored = shutil.ignore_patterns("node_modules")
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=ignored)
    (root / "protos").symlink_to(ROOT / "protos")
    ran = subprocess.run(["npm", "ci"], cwd=folder, capture_output=True, text=True, timeout=LATE)
    if ran.returncode:
        missing(f"npm ci fails: {ran.stderr.strip()[-500:]}")
    return Example(folder)


def test_it_asks_for_what_is_missing_and_for_nothing_else(
    example: Example, fake: Fake, tmp_path: Path
) -> None:
    broken = Status(grpc.StatusCode.UNAVAILABLE, "gone")
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "é😀"), broken]
    fake.scripts = [
        [fake.error(3, "RESOURCE_EXHAUSTED", "no room", retry_after_ms=50)],
        [fake.text(3, 6, "x"), pb.GenerateResponse(sequence=4, handed_over=pb.HandedOver())],
        [fake.text(4, 7, "y")],  # ends well, but early
        [Status(grpc.StatusCode.NOT_FOUND, "Application metadata not set: RayServeAPIService")],
        [fake.text(5, 8, "z"), fake.finished(6)],
    ]
    ran = example.run(tmp_path / "out", "--address", fake.address, "--seed", SEED, "abc")
    assert (ran.text, ran.code) == ("é😀xyz", 0), ran.notes
    first, *resumed = fake.requests
    assert first.sampling.seed == SEED
    assert first.prompt.text == "abc" and first.keep.seconds > 0 and first.idempotency_key
    ids = list("é😀xyz".encode())
    at = [(2, 6, 2), (2, 6, 2), (3, 7, 3), (4, 8, 4), (4, 8, 4)]
    assert [
        (each.stream_id, each.after_sequence, *_received(each.cursors), list(last))
        for each in resumed
        for last in [each.cursors[0].last_ids]
    ] == [("s1", sequence, tokens, text, ids[:tokens]) for sequence, tokens, text in at]
    assert [each.stream_id for each in fake.releases] == ["s1"]


def _received(cursors: list[pb.ResumeCursor]) -> tuple[int, int]:
    (cursor,) = cursors
    return cursor.tokens, cursor.characters


def test_before_it_is_accepted_the_same_request_is_sent_again(
    example: Example, fake: Fake, tmp_path: Path
) -> None:
    fake.script = [Status(grpc.StatusCode.UNAVAILABLE, "gone")]
    process = example.start(tmp_path / "out", "--address", fake.address)
    until(lambda: len(fake.requests) > 1, SOON)
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "x"), fake.finished(3)]
    ran = example.end(process, tmp_path / "out")
    assert (ran.text, ran.code) == ("x", 0), ran.notes
    assert all(request == fake.requests[0] for request in fake.requests)


@pytest.mark.parametrize(
    "last",
    [
        Status(grpc.StatusCode.ABORTED, "taken over"),
        Status(grpc.StatusCode.NOT_FOUND, "no such stream"),
        Fake.error(3, "INTERNAL", "taken over"),
        Fake.text(4, 1, "y"),
    ],
    ids=["aborted", "not found", "error", "gap"],
)
def test_what_no_new_call_mends_ends_it(
    last: Status | pb.GenerateResponse, example: Example, fake: Fake, tmp_path: Path
) -> None:
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "x"), last]
    ran = example.run(tmp_path / "out", "--address", fake.address)
    assert (ran.text, ran.code) == ("x", 1)
    assert len(fake.requests) == 1
    assert "error: " in ran.notes


@pytest.mark.parametrize(
    "wrong",
    [f"--seed={2**64}", "--seed=-1", "--seed=x", f"--max-tokens={2**32}", "--max-tokens=x"],
)
def test_a_number_that_would_be_sent_as_another_is_refused(
    wrong: str, example: Example, fake: Fake, tmp_path: Path
) -> None:
    ran = example.run(tmp_path / "out", "--address", fake.address, wrong)
    assert ran.code == 1 and "it must be a whole number of 0 to" in ran.notes
    assert not fake.requests


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, None])
def test_whoever_leaves_deletes_the_stream(
    how: signal.Signals | None, example: Example, fake: Fake
) -> None:
    first, *others = (fake.text(2 + at, at, "x") for at in range(2_000))
    going_on = threading.Event()
    fake.script = [fake.accepted(keep=60), first, going_on, *others, fake.finished(2_002)]
    command = ["node", "generate.js", "--address", fake.address]
    with subprocess.Popen(command, cwd=example.folder, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.read(1) == b"x"
            if how is None:
                process.stdout.close()  # as `head` does
            else:
                process.send_signal(how)
            going_on.set()
            assert process.wait(SOON) == 0
        finally:
            process.kill()
    assert [each.stream_id for each in fake.releases] == ["s1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two servers that share a store. The first address of a list serves while it is there."""
    cluster = Processes(BUNDLE, Store(f"file://{tmp_path_factory.mktemp('store')}"))
    with cluster.running():
        yield cluster


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_text_is_that_of_an_undisturbed_stream(
    how: signal.Signals, example: Example, cluster: Processes, tmp_path: Path
) -> None:
    until(cluster.is_healthy, LATE)
    asked = ("--address", cluster.addresses[0], "--seed", SEED, "--max-tokens", TOKENS, "def ")
    out = tmp_path / "out"
    process = example.start(out, *asked)
    until(lambda: out.stat().st_size > BEFORE or process.poll() is not None, SOON)
    cluster.restart(0, how)
    ran = example.end(process, out)
    assert ran.code == 0, ran.notes
    assert ran.notes.count("[trying again after: ") >= 1
    assert ("hands the stream over" in ran.notes) is (how == signal.SIGTERM), ran.notes
    with Client(cluster.addresses[1]) as client:
        twin = client.complete(
            "def ", seed=SEED, max_tokens=TOKENS, ignore_eos=True, keep=0, timeout=LATE
        )
        other = client.complete("def ", seed=2**53, max_tokens=100, ignore_eos=True, keep=0)
    assert ran.text == twin.text
    assert not twin.text.startswith(other.text)
    assert f"[seed {SEED}]" in ran.notes
