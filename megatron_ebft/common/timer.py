"""Seconds spent in each phase of a step."""

import time
from collections import defaultdict
from contextlib import contextmanager

from megatron_ebft.common.device import synchronize


class PhaseTimer:
    """Wall-clock seconds of the phases of a step. A phase within another one interrupts it.

    Args:
        on_enter: called with the name of each phase when it begins or goes on, and with "" when none does.
    """

    def __init__(self, on_enter=lambda phase: None):
        self.seconds: dict[str, float] = defaultdict(float)
        self.on_enter = on_enter
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str):
        self._switch()
        self._running.append(phase)
        self.on_enter(phase)
        yield
        self._switch()
        self._running.pop()
        self.on_enter(self._running[-1] if self._running else "")

    def _switch(self) -> None:
        """Count the time since the last switch for the phase that is running."""
        synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
