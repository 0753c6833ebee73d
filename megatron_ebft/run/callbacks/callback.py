"""What an extra of a run may do, and when: its methods are called on every rank, in the same order.

A callback observes. It changes neither weights nor random states, so a run has the same bits with and without it. To
stop a run, `step_end` and `evaluated` may raise CannotGoOn (stopping.py), on every rank: the run saves and ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ebft.data.micro_batches import GoldBatch
    from megatron_ebft.method.computed import Computed
    from megatron_ebft.run.logger import Logger
    from megatron_ebft.run.state import Run


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """The results of a step."""

    iteration: int
    """Number of the step; the first is 1."""
    metrics: dict[str, float]
    """Means over the global batch, the same on every rank. A step in which nothing counts has fewer."""
    seconds: dict[str, float]
    """This rank's, by phase. They include waiting for other ranks."""
    duration: float
    """Seconds of the whole step on this rank, without evaluation and saves."""
    is_logged: bool
    """Whether --log-interval shows this step."""


class Callback:
    """An extra that does nothing."""

    def train_start(self, run: Run, log: Logger) -> None:
        """Training begins: everything is built and loaded, and nothing has been evaluated."""

    def step_start(self, run: Run, log: Logger, iteration: int) -> None:
        """The step of this number begins."""

    def phase(self, name: str) -> None:
        """A phase of the step begins or goes on; "": the last one has ended, and none goes on."""

    def computed(self, run: Run, gold: GoldBatch, computed: Computed) -> None:
        """A step of EBFT has its gradient, and the weights are as they were. Keep little of it: it holds memory."""

    def step_end(self, run: Run, log: Logger, step: StepEnd) -> None:
        """The weights have changed, and run.state counts the step."""

    def evaluated(self, run: Run, log: Logger, iteration: int, metrics: dict[str, float], seconds: float) -> None:
        """An evaluation after this step has been logged. Its metrics are the same on every rank."""

    def saved(self, run: Run, log: Logger, folder: str) -> None:
        """A checkpoint has become complete. With --async-save, steps have gone by since it began."""

    def train_end(self, run: Run, log: Logger, is_done: bool) -> None:
        """Training ends, and its last checkpoint is complete. Not called where a run fails.

        Args:
            is_done: the run is complete; False: it was stopped, or cannot go on.
        """


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: tuple[Callback, ...] = ()):
        self.callbacks = callbacks

    def train_start(self, run: Run, log: Logger) -> None:
        for callback in self.callbacks:
            callback.train_start(run, log)

    def step_start(self, run: Run, log: Logger, iteration: int) -> None:
        for callback in self.callbacks:
            callback.step_start(run, log, iteration)

    def phase(self, name: str) -> None:
        for callback in self.callbacks:
            callback.phase(name)

    def computed(self, run: Run, gold: GoldBatch, computed: Computed) -> None:
        for callback in self.callbacks:
            callback.computed(run, gold, computed)

    def step_end(self, run: Run, log: Logger, step: StepEnd) -> None:
        for callback in self.callbacks:
            callback.step_end(run, log, step)

    def evaluated(self, run: Run, log: Logger, iteration: int, metrics: dict[str, float], seconds: float) -> None:
        for callback in self.callbacks:
            callback.evaluated(run, log, iteration, metrics, seconds)

    def saved(self, run: Run, log: Logger, folder: str) -> None:
        for callback in self.callbacks:
            callback.saved(run, log, folder)

    def train_end(self, run: Run, log: Logger, is_done: bool) -> None:
        for callback in self.callbacks:
            callback.train_end(run, log, is_done)
