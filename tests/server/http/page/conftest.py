"""A browser, and a server of the demo bundles with its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.servers import ROOT, Server, serving
from tests.server.http.page.browser import Tab, browsing, tab

BUNDLES = [str(ROOT / "bundles" / name) for name in ("python-4k", "emoji-32")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Any) -> Iterator[Server]:
    """A server of `python-4k` and `emoji-32`, with a store."""
    options = ["--local", "--threads", "1", "--drain-seconds", "1", "--snapshots", "memory://page"]
    with serving(*BUNDLES, *options, http=True) as server:
        yield server


@pytest.fixture
def here(browser: Any, server: Server) -> Iterator[Tab]:
    """The page."""
    with tab(browser, server.http_address) as here:
        yield here
