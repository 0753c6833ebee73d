"""Stopping a run before its end, so that it can go on later: who asks, and how all ranks agree.

1. A request is SIGUSR1 or SIGTERM to any rank, the file of --ebft-stop-file, or a deadline (--exit-duration-in-mins)
   that another step and a save would miss.
2. Handlers are installed before torch is imported, which takes seconds in which a signal would kill.
3. Ranks agree at fixed places (before a step, after its rollouts, between batches of an evaluation), so that all stop
   at the same one. What is under way there is abandoned: nothing has changed yet, and no random number depends on it.
4. The exit code says what to do next.
"""

import contextlib
import os
import signal
import time
from multiprocessing import resource_tracker

EXIT_USAGE, EXIT_STEP_FAILED, EXIT_HUNG, EXIT_RESUME = 64, 65, 70, 75
"""Besides 0, finished. 64: flags or files are wrong; 65: a step was not finite; both would fail again. 70: ranks waited
too long for another; 75: stopped on request, after saving: the same command goes on."""

_begun = time.monotonic()
_received: list[str] = []


def install_handlers() -> None:
    """From now on SIGUSR1 and SIGTERM are requests to stop."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: _received.append(signal.Signals(number).name))


def ignore_signals() -> None:
    """For the way out: an interpreter that shuts down gives signals their default action, which kills."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def shielded():
    """Processes started within never get these signals: SLURM sends them to all processes of a job step, and those that
    are no ranks (Megatron-Core starts one for saving) would be killed."""
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        resource_tracker.ensure_running()  # comes with the first process, and unblocks SIGTERM when it is started
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # what came meanwhile is handled now


class StopAsked(Exception):
    """All ranks stop here; the message says why."""


class Stopper:
    """What may ask a run to stop.

    Args:
        minutes: of the process's life, after which it should have ended; None: no deadline.
        stop_file: None: there is none.
    """

    def __init__(self, minutes: float | None = None, stop_file: str | None = None):
        self.minutes, self.stop_file = minutes, stop_file
        self.longest_step = self.longest_save = 0.0
        """Seconds, so far; what is left must be enough for one of each, and half as much again."""

    def check(self, steps: int = 1) -> None:
        """Raises StopAsked on every rank if any of them has a request; all must ask.

        Args:
            steps: that would follow before the next check; the deadline must leave time for them.
        """
        import torch
        import torch.distributed as dist

        from megatron_ebft.common.device import device

        reason = self._reason(steps)
        asked = torch.full((), float(reason is not None), device=device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            reasons = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, reason)
            for asking in filter(None, reasons):
                raise StopAsked(asking)

    def _reason(self, steps: int) -> str | None:
        import torch.distributed as dist

        if _received:
            return _received[0]
        if self.stop_file and dist.get_rank() == 0 and os.path.exists(self.stop_file):
            return f"--ebft-stop-file {self.stop_file}"
        left = float("inf") if self.minutes is None else self.minutes * 60 - (time.monotonic() - _begun)
        if left < 1.5 * (steps * self.longest_step + self.longest_save):
            return f"--exit-duration-in-mins {self.minutes:g}, {max(left, 0):.0f} s before its end"
        return None
