"""Conversations and keys: what a tab remembers, and for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.auth.api_keys import Caller, new_key, write_keys
from tests.server.http.gateways import Front, fronting, serving
from tests.server.http.page.browser import READY, tab

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def front(browser: Any, text_bundle: Path, image_bundle: Path) -> Iterator[Front]:
    """A gateway to a server of tiny models, one of which has a chat template."""
    with serving(text_bundle, image_bundle) as upstream, fronting(upstream) as front:
        yield front


def test_a_conversation_is_sent_whole(browser: Any, front: Front) -> None:
    with tab(browser, f"127.0.0.1:{front.port}") as here:
        sent: list[Any] = []
        here.page.on(
            "request",
            lambda each: (
                sent.append(json.loads(each.post_data)) if each.url.endswith("/c/streams") else None
            ),
        )
        here.choose("tiny-text")
        first = here.write(prompt="<b>hello</b>", length=5, seed=1)
        here.write(prompt="more", length=5, seed=2)
        assert sent[0]["messages"] == [{"role": "user", "content": "<b>hello</b>"}]
        assert sent[1]["messages"] == [
            *sent[0]["messages"],
            {"role": "assistant", "content": first},
            {"role": "user", "content": "more"},
        ]
        shown = here.js("[...document.querySelectorAll('#chat-log p')].map((e) => e.textContent)")
        assert shown == ["<b>hello</b>", first, "more"]
        assert here.js("document.querySelectorAll('#chat-log b').length") == 0
        here.page.reload()
        here.says("all tokens")
        assert here.js("document.querySelectorAll('#chat-log p').length") == 3


def test_a_key_stays_in_its_tab(browser: Any, text_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key, secret = new_key(Caller("me"))
    write_keys(keys, [key])
    asks = "document.querySelector('#access').open"
    with serving(text_bundle, keys=keys) as upstream, fronting(upstream) as front:
        address = f"127.0.0.1:{front.port}"
        with tab(browser, address, is_ready=asks) as here:
            assert "API key" in here.text("#problem")
            assert all("401" in each for each in here.noise)
            here.noise.clear()
            here.page.fill("#key", secret)
            here.page.keyboard.press("Enter")
            here.until(READY)
            assert here.write(prompt="a", length=3)
            here.page.reload()
            here.until(READY)
            assert here.js("Object.values(localStorage).join() + document.cookie") in ("", "light")
            assert here.js("sessionStorage.getItem('api-key')") == secret
            with tab(browser, address, is_ready=asks) as other:
                other.noise.clear()
