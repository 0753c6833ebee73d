"""Decides when a run stops before its end, on all ranks at once, so that it can continue later.

1. Requests to stop are SIGUSR1, SIGTERM, SIGINT or SIGHUP to any rank (common/signals.py), the file of
   --ebft-stop-file, and a deadline (--exit-duration-in-mins) that another step and a save would miss.
2. Ranks agree at fixed places: before a step, after its rollouts, between batches of an evaluation. All stop at the
   same place and abandon what is under way. Nothing has changed yet, and no random number depends on it.
3. The exit code says what to do next.

train.py imports this module before torch, so that the deadline counts the seconds that importing torch takes.
"""

import os
import time

from megatron_ebft.common import signals

EXIT_CRASHED, EXIT_USAGE, EXIT_STEP_FAILED, EXIT_HUNG, EXIT_UNREACHABLE, EXIT_RESUME = 1, 64, 65, 70, 74, 75
"""Exit codes other than 0 (finished). 1: anything unforeseen, or a full disk at the end. 64: flags or files are wrong.
65: a step was not finite. Both would fail again. 70: a rank hangs. 74: a filesystem did not answer, however often it
was asked. 75: stopped on request after saving; the same command continues the run."""

_process_start = time.monotonic()


class StopAsked(Exception):
    """All ranks stop here. The message says why."""


class CannotGoOn(ValueError):
    """All ranks stop here: one of them has no rows for its next step, or the verifier judges no answer. The message
    says why."""


class Stopper:
    """Watches for requests to stop.

    Args:
        minutes: age of the process at which it should have ended; None: no deadline.
        stop_file: file whose existence is a request; None: no such file.
    """

    def __init__(self, minutes: float | None = None, stop_file: str | None = None):
        self.minutes, self.stop_file = minutes, stop_file
        self.longest_step = self.longest_save = 0.0
        """Seconds. The time left must cover one of each, and half as much again."""

    def check(self, steps: int = 1, problem: ValueError | None = None) -> None:
        """Raise StopAsked on every rank if any rank has a request. All ranks must call.

        Args:
            steps: steps until the next check. The deadline must leave time for them.
            problem: this rank cannot go on. Asked here, since every rank waits here for the others anyway.

        Raises:
            StopAsked: a rank has a request.
            CannotGoOn: a rank has a problem.
        """
        import torch
        import torch.distributed as dist

        from megatron_ebft.common.device import device

        reason = self._reason(steps)
        asked = torch.full((), float(bool(reason or problem)), device=device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            reasons = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, (reason, problem and f"{problem}"))
            for asking in filter(None, (asking for asking, _ in reasons)):
                raise StopAsked(asking)
            for text in filter(None, (text for _, text in reasons)):
                raise CannotGoOn(text) from problem

    def _reason(self, steps: int) -> str | None:
        import torch.distributed as dist

        if signals.received:
            return signals.received[0]
        if self.stop_file and dist.get_rank() == 0 and os.path.exists(self.stop_file):
            return f"--ebft-stop-file {self.stop_file}"
        left = float("inf") if self.minutes is None else self.minutes * 60 - (time.monotonic() - _process_start)
        if left < 1.5 * (steps * self.longest_step + self.longest_save):
            return f"--exit-duration-in-mins {self.minutes:g}, {max(left, 0):.0f} s before its end"
        return None
