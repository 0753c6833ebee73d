"""The training command, held before each step until a test lets it go on.

    EBFT_PACE=FILE python tests/support/paced.py -m megatron_ebft.train FLAGS...

FILE holds the number of the last step that may begin; without FILE, and without EBFT_PACE, the run is free. So is one
that a signal has asked to stop. A test that interrupts a run this way does not depend on how fast the machine is. Any
other arguments are passed to Python as they are, so that a job script can take this file for its interpreter.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

TRAIN = ["-m", "megatron_ebft.train"]


class Pace:
    """The file, as a test sees it."""

    def __init__(self, file: Path):
        self.file = file

    def allow(self, step: int) -> None:
        """Let the run begin steps up to this one."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(str(step))
        draft.rename(self.file)

    def free(self) -> None:
        self.file.unlink(missing_ok=True)


def is_allowed(file: str, step: int) -> bool:
    try:
        return step <= int(Path(file).read_text())
    except FileNotFoundError:
        return True


def hold_before_steps(file: str) -> None:
    """Make the training loop wait in this process."""
    from megatron_ebft.run.watchdog import Watchdog

    enter, set_handler, signals = Watchdog.enter, signal.signal, []

    def set_noting_handler(number, handler):
        if not callable(handler):
            return set_handler(number, handler)
        return set_handler(number, lambda *args: (signals.append(number), handler(*args)))

    def enter_when_allowed(self, phase: str, *options) -> None:
        enter(self, phase, *options)
        if phase.startswith("data of step "):
            while not signals and not is_allowed(file, int(phase.split()[-1])):
                time.sleep(0.005)

    signal.signal, Watchdog.enter = set_noting_handler, enter_when_allowed


if __name__ == "__main__":
    if sys.argv[1:3] != TRAIN:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    if "EBFT_PACE" in os.environ:
        hold_before_steps(os.environ["EBFT_PACE"])
    del sys.argv[1:3]
    runpy.run_module(TRAIN[1], run_name="__main__", alter_sys=True)
