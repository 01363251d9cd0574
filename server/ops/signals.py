"""What the main thread does about SIGINT and SIGTERM."""

from __future__ import annotations

import signal
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_stop_signals() -> None:
    """Raise KeyboardInterrupt for each: also for the SIGINT of a process that a shell put in the
    background, and for the SIGTERM of a container's runtime.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_stop_signals() -> None:
    """Let nothing disturb what is going on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
