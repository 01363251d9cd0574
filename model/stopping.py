"""How a person or a machine asks a training run to stop: signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Request:
    """Whether to stop. `signal` is the number of the signal that asked for it, or 0."""

    signal = 0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal)


@contextmanager
def on_signals() -> Iterator[Request]:
    """A request that SIGINT, SIGTERM and SIGHUP make. A second one ends the process at once."""
    request = Request()
    # What is ignored already stays so: a run under nohup survives its terminal.
    before = {
        number: handler
        for number in _SIGNALS
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        _restore(before)
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more to stop at once, unsaved\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
