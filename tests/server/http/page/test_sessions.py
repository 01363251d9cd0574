"""Streams that outlive what happens to a page: pauses, reloads, forks, files, and slow readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import Server, until
from tests.server.http.page.browser import Tab, tab
from tests.server.http.page.relay import relayed

pytestmark = pytest.mark.browser
ASKED = {"prompt": "def ", "length": 1500, "seed": 6}
COMMON = "[...document.querySelectorAll('.text')].map((e) => e.querySelectorAll('.given').length)"


@pytest.fixture(scope="module")
def undisturbed(browser: Any, server: Server) -> str:
    """The text that nothing happened to."""
    with tab(browser, server.http_address) as here:
        return here.write(**ASKED)


def test_a_pause_and_a_reload_change_nothing(here: Tab, undisturbed: str) -> None:
    here.write(wait=False, **ASKED)
    here.wait_for_tokens(40)
    here.page.click("#pause")
    here.says("paused")
    (begun,) = here.texts
    assert undisturbed.startswith(begun) and len(begun) < len(undisturbed)
    assert here.text("#bytes-held").endswith("B ✓")
    # Paused, and loaded again; going on, and loaded again; complete, and loaded again.
    here.page.reload()
    here.says("paused")
    assert here.texts == [begun]
    here.page.click("#pause")
    here.wait_for_tokens(len(begun) + 20)
    here.page.reload()
    here.says("all tokens")
    assert here.texts == [undisturbed]
    here.page.reload()
    here.says("all tokens")
    assert here.texts == [undisturbed]


def test_a_connection_that_is_cut_loses_nothing(
    browser: Any, server: Server, undisturbed: str
) -> None:
    with relayed(server.http_address) as relay, tab(browser, relay.address) as here:
        here.set(pace=80)
        here.write(wait=False, **ASKED)
        for tokens in (30, 200):
            here.wait_for_tokens(tokens)
            relay.cut()
            here.until("document.querySelector('#says').textContent.startsWith('the connection')")
            here.until("document.querySelector('#says').textContent === 'writing'")
        here.set(pace=100)
        here.says("all tokens")
        assert here.texts == [undisturbed]
        # The browser tells of each cut, and of calls that were under way.
        assert all("Failed to load" in each or "ERR_" in each for each in here.noise)
        here.noise.clear()


def test_three_go_on_side_by_side(here: Tab, server: Server, undisturbed: str) -> None:
    here.write(wait=False, **ASKED)
    here.wait_for_tokens(40)
    here.set(length=60)
    here.page.click("#fork")
    here.until("document.querySelectorAll('.text').length === 3")
    here.says("all tokens")
    here.until("!document.body.classList.contains('busy')")
    counts, texts = here.js(COMMON), here.texts
    assert len(set(counts)) == 1 and counts[0] > 40
    common = len("def ") + counts[0] - 1
    assert {text[:common] for text in texts} == {undisturbed[:common]}
    assert len(set(texts)) == 3 and {len(text) for text in texts} == {common + 60}


def test_a_file_carries_a_session(here: Tab, undisturbed: str, tmp_path: Path) -> None:
    here.write(wait=False, **ASKED)
    here.wait_for_tokens(40)
    with here.page.expect_download() as saved:
        here.page.click("#export")
    file = tmp_path / saved.value.suggested_filename
    saved.value.save_as(file)
    (begun,) = here.texts
    here.page.click("#pause")
    here.page.click("#stop")
    here.page.set_input_files("#import", str(file))
    here.until("document.querySelector('.sheet h3')?.textContent.startsWith('from ')")
    assert here.texts == [begun]
    here.page.reload()
    here.says("paused")
    assert here.texts == [begun]
    here.page.click("#pause")
    here.until("document.body.classList.contains('busy')", 10)
    here.says("all tokens")
    assert here.texts == [undisturbed]
    here.until("document.querySelector('#bytes-held').textContent.endsWith('B ✓')")


def test_a_link_carries_prompt_seed_and_settings(here: Tab, browser: Any, server: Server) -> None:
    text = here.write(prompt="import a&b#c", length=50, seed="", temperature=0.5)
    here.page.click("#link")
    path = here.js("location.pathname + location.hash")
    with tab(browser, server.http_address, path=path) as other:
        assert other.write() == text


@pytest.mark.slow
def test_a_slow_reader_parks_its_stream(here: Tab, server: Server) -> None:
    here.write(wait=False, prompt="def ", length=3500, seed=2, pace=60)
    here.until("document.querySelector('#pace-says').textContent.startsWith('parked')")
    until(lambda: server.metric("concertina_streams_paused") == 1)
    assert server.metric("concertina_streams_running") == 0
    assert here.tokens < 600
    here.set(pace=100)
    here.says("all tokens")
    assert server.metric("concertina_streams_paused") == 0


def test_half_a_picture_is_completed(here: Tab, server: Server, tmp_path: Path) -> None:
    from PIL import Image

    made = tmp_path / "half.png"
    Image.new("RGB", (64, 64), (250, 200, 40)).save(made)
    here.choose("emoji-32")
    here.set(seed=3)
    here.page.set_input_files("#picture", str(made))
    here.says("it came to its end")
    assert here.text("#f-tokens") == "512"
    pixels = here.js(
        "[...document.querySelector('.art').getContext('2d').getImageData(0, 0, 32, 32).data]"
    )
    assert pixels[: 4 * 512] == [250, 200, 40, 255] * 512
    assert len({tuple(pixels[at : at + 4]) for at in range(4 * 512, 4 * 1024, 4)}) > 3
    assert set(pixels[3::4]) == {255}
