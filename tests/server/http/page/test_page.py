"""The page in a browser: what it shows is what the server says."""

from __future__ import annotations

import base64
import io
import itertools
import json
import urllib.request
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concertina.bundle.manifest import read_manifest
from concertina.bundle.resources import state_bytes
from concertina.client import Client, SessionPhase
from tests.e2e.servers import ROOT, Server, until
from tests.server.http.page.browser import Tab, tab

pytestmark = pytest.mark.browser
TOP_P, TEMPERATURE = 0.98, 0.9
MANIFEST = read_manifest(ROOT / "bundles" / "python-4k")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SPAN = 64


def answered(server: Server, path: str, body: dict[str, Any]) -> Any:
    """What the gateway answers to OpenAI's clients."""
    request = urllib.request.Request(
        f"http://{server.http_address}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def completed(server: Server, prompt: str, tokens: int, seed: int) -> Any:
    body = {"model": "python-4k", "prompt": prompt, "max_tokens": tokens, "seed": seed}
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "logprobs": 1}
    return answered(server, "/v1/completions", body | sampling)["choices"][0]


def sessions(server: Server) -> dict[str, SessionPhase]:
    with Client(server.address) as client:
        return {each.stream_id: each.phase for each in client.sessions.list(timeout=60)}


def nothing_runs(server: Server) -> bool:
    held = ("running", "waiting", "paused")
    idle = not any(server.metric(f"concertina_streams_{each}") for each in held)
    return idle and SessionPhase.RUNNING not in sessions(server).values()


def test_a_text_is_the_servers_and_coloured_by_its_surprisal(here: Tab, server: Server) -> None:
    text = here.write(prompt="import ", length=200, seed=7)
    choice = completed(server, "import ", 200, 7)
    assert text == "import " + choice["text"]
    bits = [-each / np.log(2) for each in choice["logprobs"]["token_logprobs"]]
    mean = sum(bits) / len(choice["text"].encode())
    assert float(here.text("#f-bits")) == pytest.approx(mean, abs=0.006)
    levels = here.js(
        "[...document.querySelectorAll('.text [data-token]')].map((e) => e.className.slice(1, 2))"
    )
    order = np.argsort(bits)
    assert list(np.array(levels)[order]) == sorted(levels)
    assert len(set(levels)) > 3 and here.text("#f-tokens") == "200"
    # The same with a mouse and with a keyboard: five alternatives, and the token among them.
    here.page.hover("[data-token='3']")
    assert here.js("document.querySelectorAll('#tip li').length") >= 5
    assert here.text("#tip p") == f"{bits[3]:.2f} bits, token 4"
    here.page.focus(".text")
    for _ in range(2):
        here.page.keyboard.press("ArrowRight")
    assert here.text("#tip p").endswith(("token 2", "token 6"))
    here.page.keyboard.press("Escape")
    assert here.js("document.querySelector('#tip').hidden")


def test_the_stack_is_drawn_as_it_is_held(here: Tab, server: Server) -> None:
    here.write(wait=False, prompt="def ", length=400, seed=6, pace=75)
    seen: dict[int, tuple[int, int, str]] = {}
    while here.js("document.body.classList.contains('busy')") or not seen:
        tokens, held, full, said = here.js(
            "[document.querySelector('#stack-says').textContent.replace(/[^0-9].*/, ''),"
            " ...['held', 'full'].map((e) => +document.querySelector('#bytes-' + e).dataset.bytes),"
            " document.querySelector('#stack-says').textContent]"
        )
        tokens = int("".join(itertools.takewhile(str.isdigit, said[6:].replace(",", ""))))
        seen[tokens] = held, full, said
    assert len(seen) > 20
    for tokens, (held, full, said) in seen.items():
        assert held == state_bytes(MANIFEST, tokens)
        assert full == tokens * 8192
        summaries, raw = divmod(tokens, SPAN)
        assert f"{summaries} summar" in said and f"{raw} raw entr" in said
    # It shrank at folds, and what it held at last is what the server counts.
    ordered = [held for _, (held, *_) in sorted(seen.items())]
    assert sum(after < before for before, after in itertools.pairwise(ordered)) >= 3
    here.until("document.querySelector('#bytes-held').textContent.endsWith('B ✓')")
    (wide, wider) = here.js(
        "['held', 'full'].map((e) => document.querySelector('#bar-' + e).clientWidth)"
    )
    assert wide / wider == pytest.approx(here.bytes("held") / here.bytes("full"), abs=0.01)
    drawn = here.js(
        "(() => { const c = document.querySelector('#stack'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; return d.filter((e, i) => i % 4 === 3 && e)"
        ".length / (c.width * c.height); })()"
    )
    assert 0.05 < drawn < 0.6


def test_a_picture_is_the_servers(here: Tab, server: Server) -> None:
    here.choose("emoji-32")
    here.set(seed=5)
    here.page.select_option("#label", "Food & Drink")
    here.page.click("#write")
    here.until("document.querySelector('#f-tokens').textContent === '1,024'")
    here.says("it came to its end")
    pixels = here.js(
        "[...document.querySelector('.art').getContext('2d').getImageData(0, 0, 32, 32).data]"
    )
    body = {"model": "emoji-32", "prompt": "Food & Drink", "seed": 5, "temperature": TEMPERATURE}
    made = answered(server, "/v1/images/generations", body)["data"][0]["b64_json"]
    image = Image.open(io.BytesIO(base64.b64decode(made))).convert("RGBA")
    assert np.array_equal(np.array(pixels).reshape(32, 32, 4), np.asarray(image))
    assert here.text("#f-bits-name") == "bits/pixel"
    here.until("document.querySelector('#bytes-held').textContent.endsWith('B ✓')")


def test_stop_leaves_nothing_running(here: Tab, server: Server) -> None:
    here.write(wait=False, prompt="def ", length=3000, seed=1)
    here.wait_for_tokens(5)
    (stream_id,) = (each["id"] for each in here.js("JSON.parse(sessionStorage.runs)"))
    assert sessions(server)[stream_id] is SessionPhase.RUNNING
    here.page.click("#stop")
    here.says("stopped")
    until(lambda: nothing_runs(server) and stream_id not in sessions(server), 60)


def test_what_is_written_is_never_markup(here: Tab) -> None:
    text = here.write(prompt=HOSTILE, length=8, seed=1)
    assert text.startswith(HOSTILE)
    assert here.js("document.querySelectorAll('main img, main script').length") == 0
    # A model's name, too, and its labels.
    model = here.js("fetch('c/models').then((e) => e.json()).then((e) => e.models[0])")
    served = {"version": "1", "models": [{**model, "name": HOSTILE, "labels": [HOSTILE]}]}
    here.page.route("**/c/models", lambda route: route.fulfill(json=served))
    here.page.reload()
    here.until("document.querySelector('#models td') !== null")
    assert here.js("document.querySelector('#models td').textContent") == HOSTILE
    assert here.js("document.querySelector('#model').value") == HOSTILE
    assert here.js("document.querySelectorAll('main img, main script, header img').length") == 0


def test_a_browser_would_refuse_markup_and_foreign_code(here: Tab) -> None:
    assert "TrustedHTML" in here.js(
        "(() => { try { document.body.innerHTML = 'x'; } catch (e) { return e.message; } })()"
    )
    here.js("fetch('http://127.0.0.1:1/').catch(() => 0)")
    assert all("Content Security Policy" in each or "Trusted" in each for each in here.noise)
    assert here.noise
    here.noise.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wrong_with_it_for_those_who_do_not_see_it(
    scheme: str, browser: Any, server: Server
) -> None:
    axe = pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT
    with tab(browser, server.http_address, color_scheme=scheme, bypass_csp=True) as here:
        here.write(prompt="def ", length=120, seed=3)
        here.page.hover("[data-token='9']")
        here.page.evaluate(axe + "; 0")
        for width in (1280, 390):
            here.page.set_viewport_size({"width": width, "height": 844})
            found = here.js("axe.run().then((e) => e.violations)")
            bad = [
                (each["id"], [node["html"] for node in each["nodes"]])
                for each in found
                if each["impact"] in ("serious", "critical")
            ]
            assert bad == []
            assert here.js("document.documentElement.scrollWidth") <= width
