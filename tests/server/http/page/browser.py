"""A browser without a window, and the words in which tests talk to the page."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

WAIT = 120.0
READY = "document.querySelectorAll('#model option').length > 0"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


# A short stream has ended before anybody looks.
_WATCH_BUSY = """
window.hasBeenBusy = false;
new MutationObserver((_, self) => {
  if (!document.body.classList.contains('busy')) return;
  window.hasBeenBusy = true;
  self.disconnect();
}).observe(document.body, {attributes: true});
"""


@dataclass(eq=False)
class Tab:
    """The page in a tab. noise: what the browser's console has said."""

    page: Any
    noise: list[str] = field(default_factory=list)

    def until(self, condition: str, seconds: float = WAIT) -> None:
        """Wait for an expression of JavaScript to be true."""
        deadline = time.monotonic() + seconds
        while not self.js(condition):
            said = self.text("#says"), self.text("#problem"), self.noise
            assert time.monotonic() < deadline, f"{condition} is not true: {said}"
            time.sleep(0.03)

    def js(self, expression: str) -> Any:
        """The value of an expression."""
        return self.page.evaluate(expression)

    def text(self, selector: str) -> str:
        """The text of an element, hidden or not."""
        return str(self.page.text_content(selector))

    def set(self, **values: object) -> None:
        """Set fields, by their ids, as a user would."""
        for name, value in values.items():
            self.page.evaluate(
                "([id, value]) => { const field = document.getElementById(id); field.value = value;"
                " field.dispatchEvent(new Event('input')); }",
                [name, str(value)],
            )

    def choose(self, model: str) -> None:
        """Choose a model."""
        self.page.select_option("#model", model)
        self.until(f"document.querySelector('#about').textContent !== '' && '{model}' !== ''")

    def says(self, word: str, seconds: float = WAIT) -> None:
        """Wait until the page says how its stream is."""
        self.until(f"document.querySelector('#says').textContent.startsWith('{word}')", seconds)

    def write(self, *, wait: bool = True, **values: object) -> str:
        """Ask for a text, and return it when all of it is there."""
        self.set(**values)
        self.js(_WATCH_BUSY)
        self.page.click("#write")
        if not wait:
            return ""
        self.until("window.hasBeenBusy")
        self.until("!document.body.classList.contains('busy')")
        return self.texts[0] if self.texts else ""

    def wait_for_tokens(self, least: int) -> None:
        """Wait until so many tokens are there."""
        self.until(f"document.querySelectorAll('.text [data-token]').length >= {least}")

    @property
    def texts(self) -> list[str]:
        """What is written, with its prompt, in each column."""
        return list(self.js("[...document.querySelectorAll('.text')].map((e) => e.textContent)"))

    @property
    def tokens(self) -> int:
        """How many tokens the stack has, by what is said of it."""
        return int(re.sub(r"\D", "", self.text("#stack-says").partition(" token")[0]))

    def bytes(self, name: str) -> int:
        """The bytes that a bar stands for: `held` or `full`."""
        return int(self.js(f"document.querySelector('#bytes-{name}').dataset.bytes"))


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("needs Debian's package chromium")
    with playwright.sync_playwright() as running:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = running.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser: Any, address: str, **options: Any) -> Iterator[Tab]:
    """The page of a gateway, in a browser that has been nowhere. Its console has to stay silent."""
    chosen = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
    path, is_ready = chosen.pop("path", "/"), chosen.pop("is_ready", READY)
    context = browser.new_context(**chosen)
    try:
        opened = Tab(context.new_page())
        opened.page.on("console", lambda told: opened.noise.append(f"{told.type}: {told.text}"))
        opened.page.on("pageerror", lambda error: opened.noise.append(f"error: {error}"))
        opened.page.goto(f"http://{address}{path}")
        opened.until(is_ready)
        yield opened
        assert opened.noise == [], opened.noise
        with suppress(Exception):  # so that nothing runs on for those who come next
            opened.page.click("#stop", timeout=500)
    finally:
        context.close()
