"""Seconds spent in each phase of a step."""

import time
from collections import defaultdict
from contextlib import contextmanager

from megatron_ebft.common.device import synchronize


class PhaseTimer:
    """Wall-clock seconds of the phases of a step.

    Args:
        on_enter: called with the name of each phase when it begins.
    """

    def __init__(self, on_enter=lambda phase: None):
        self.seconds: dict[str, float] = defaultdict(float)
        self.on_enter = on_enter

    @contextmanager
    def __call__(self, phase: str):
        self.on_enter(phase)
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[phase] += time.perf_counter() - start
