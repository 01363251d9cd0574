"""The demo that kills servers: the page goes on, and its text is that of an undisturbed twin."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.servers import ROOT, concertina, stop, until
from tests.server.http.page.browser import tab

LATE = 240.0


@pytest.fixture
def demo(browser: Any, tmp_path: Path) -> Iterator[tuple[psutil.Popen, str, str]]:
    """The demo: its process, its address, and the path with the token."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = concertina("demo", "--chaos", cwd=ROOT, stdout=output, stderr=output)
    try:
        until(lambda: "page: " in log.read_text() or process.poll() is not None, LATE)
        found = re.search(r"page: http://([^/]+)(/\S+)", log.read_text())
        assert found, log.read_text()
        yield process, found[1], found[2]
        servers = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(LATE) == 0, log.read_text()
        assert not [each for each in servers if each.is_running()]
        assert log.read_text().endswith("stopped; no process is left\n")
    finally:
        stop(process)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_server_leaves_the_text_as_it_would_have_been(
    browser: Any, demo: tuple[psutil.Popen, str, str]
) -> None:
    process, address, path = demo
    with tab(browser, address, path=path) as here:
        assert here.js("location.hash") == ""  # the token is not left in the history
        here.choose("python-4k")
        here.set(pace=80)
        here.write(wait=False, prompt="def ", length=1000, seed=11)
        here.wait_for_tokens(300)
        before = {each.pid for each in process.children()}
        here.page.click("#kill")
        here.until("document.querySelector('#chaos-says').textContent.startsWith('SIGKILL')")
        assert len(before - {each.pid for each in process.children() if each.is_running()}) == 1
        here.set(pace=100)
        here.until("document.querySelector('#chaos-says').textContent.startsWith('An undist')")
        said = here.text("#chaos-says")
        assert said == "An undisturbed twin wrote the same 1,000 tokens."
        assert here.js("document.querySelectorAll('.went-on').length") == 1
        assert here.text("#bytes-held").endswith("B ✓")
        # The link has been used: nobody else has the button.
        with tab(browser, address, path=path) as other:
            other.until("!document.querySelector('#problem').hidden")
            assert "start the demo again" in other.text("#problem")
            assert other.js("document.querySelector('#chaos').hidden")
            assert all("403" in each for each in other.noise)
            other.noise.clear()
