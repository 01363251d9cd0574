"""Who sends requests that are too large does not make others wait."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from concertina.client import Client, Tokens
from tests.e2e.conftest import CONTEXT
from tests.e2e.servers import ROOT, Server

TEXT = "long-text"
ROUNDS = 7
WARM_SECONDS, SECONDS = 0.3, 1.5
MOST_TIMES = 3.0


@pytest.fixture
def flooding(server: Server) -> Iterator[subprocess.Popen[str]]:
    """A process that floods the server between two lines."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    command = [sys.executable, "-m", "tests.e2e.flooding", server.address]
    with subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_others_hardly_notice(server: Server, flooding: subprocess.Popen[str]) -> None:
    """The longest gap of a stream, with and without a flood in turns, by their medians."""
    stdin, stdout = flooding.stdin, flooding.stdout
    assert stdin is not None and stdout is not None
    gaps: dict[bool, list[float]] = {False: [], True: []}
    sent = 0
    with Client(server.address) as client:
        longest_gap(client)
        for turn in range(2 * ROUNDS):
            flooded = turn % 2 == 1
            if flooded:
                print("go", file=stdin, flush=True)
            gaps[flooded].append(longest_gap(client))
            if flooded:
                print("stop", file=stdin, flush=True)
                sent += int(stdout.readline())
    assert sent > 5 * ROUNDS
    quiet, loud = (statistics.median(gaps[flooded]) for flooded in (False, True))
    print(f"longest gap {1e3 * quiet:.1f} ms, flooded {1e3 * loud:.1f} ms, {sent} requests")
    assert loud <= MOST_TIMES * quiet, gaps


def longest_gap(client: Client) -> float:
    """The longest time between two events of a stream, in seconds."""
    with client.generate("x", model=TEXT, max_tokens=CONTEXT - 1, ignore_eos=True) as stream:
        begin = last = time.perf_counter()
        longest = 0.0
        for event in stream:
            now = time.perf_counter()
            if isinstance(event, Tokens) and now - begin > WARM_SECONDS:
                longest = max(longest, now - last)
            last = now
            if now - begin > WARM_SECONDS + SECONDS:
                return longest
    raise AssertionError("the stream ended before its time")
