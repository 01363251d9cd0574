"""Contestants that compute on a machine made up, whose speed drifts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtest.bench.worker import Answer, Job

STEPS = 16


@dataclass
class Machine:
    """Time passes only where a contestant computes or someone sleeps."""

    speed: Callable[[float], float]
    """Of the moment, in seconds."""
    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def work(self, seconds: float) -> float:
        """Do what takes so long at speed 1; seconds that it takes, a step of 1 ms at a time."""
        began, left = self.now, seconds
        while left > 0:
            part = min(left, 1e-3)
            self.now += part / self.speed(self.now)
            left -= part
        return self.now - began


def drifting(now: float) -> float:
    """Between 1 and 2, within a minute, and a jump now and then."""
    return 1.5 + 0.5 * math.sin(now / 10) if now % 47 > 2 else 0.6


@dataclass
class Simulated:
    """A contestant whose step takes `step_s` at speed 1."""

    job: Job
    machine: Machine
    step_s: float
    name: str
    answer: Callable[[str, int], Answer | None] = lambda request, index: None
    """An answer to a window in place of the usual one, by its number."""
    windows: int = 0
    used_s: float = 0.0
    closed: bool = False

    def ask(self, request: str, limit_s: float) -> Answer:
        """See Contender."""
        assert not self.closed, "a closed contestant was asked"
        self.machine.log.append(f"{self.name} {request}")
        given = self.answer(request, self.windows)
        if request != "window":
            return given or Answer(steps=STEPS, cache_bytes=5, peak_bytes=7)
        self.windows += 1
        if given is None:
            took = self.machine.work(self.step_s * STEPS)
            self.used_s += took
            given = Answer(step_s=took / STEPS, steps=STEPS, peak_bytes=9)
        return given

    def cpu_s(self) -> float:
        """See Contender."""
        return self.used_s

    def close(self) -> None:
        """See Contender."""
        self.closed = True
