"""The checkpoints of a run: when they are written, and what happens when one fails."""

import time
from contextlib import contextmanager

from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.errors import SaveFailed
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.run.state import Run
from megatron_ebft.run.watchdog import PATIENCE


class RunCheckpoints:
    """The checkpoints of a run with --save. A save that fails costs a warning, unless it is the last one."""

    def __init__(self, run: Run, log):
        args = run.args
        self.run, self.log = run, log
        self.saver = Saver(args.save, is_async=args.async_save, keep=args.ebft_keep_checkpoints,
                           retain_interval=args.save_retain_interval)
        self.last: tuple[int, int] | None = self._place()
        """Progress at the last save that did not fail, or at the checkpoint that was loaded."""
        self.begun = 0.0
        """When the save under way began, by time.perf_counter()."""
        run.stopper.longest_save = run.state.longest_save

    def _place(self) -> tuple[int, int]:
        return self.run.state.iteration, self.run.state.evaluated

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now; ValueError on every rank if another run has taken the folder."""
        run = self.run
        with collective_errors():
            if run.lock is not None:
                run.lock.check()
        self.log.flush()
        self.poll(wait=True)
        self.begun = time.perf_counter()
        with self._attempt():
            self.saver.save(run.state, run.policy, run.optimizer, run.scheduler, run.metadata, run.companions)
            self.last = self._place()
        self.poll()

    def poll(self, wait: bool = False) -> None:
        """Report a checkpoint that has become complete."""
        with self._attempt():
            folder = self.saver.finished(wait)
            self.log.saved(folder)
            if folder is not None:  # for a save in the background this includes the writing
                longest = max(self.run.state.longest_save, time.perf_counter() - self.begun)
                self.run.state.longest_save = self.run.stopper.longest_save = longest

    def finish(self) -> None:
        """Save the end of the run unless it is saved already; raises SaveFailed where that is impossible."""
        self.poll(wait=True)
        if self.last != self._place():
            self.save()
            self.poll(wait=True)
        if self.last != self._place():
            raise SaveFailed(f"--save {self.run.args.save}: the run's end, step {self.run.state.iteration}, could "
                             "not be saved; make room there and start the same command again")

    @contextmanager
    def _attempt(self):
        start, state = time.perf_counter(), self.run.state
        self.run.watchdog.enter(f"saving after step {state.iteration}", PATIENCE)
        try:
            yield
        except ValueError as error:
            self.log.print(f"warning: {error}. Training goes on")
            self.last = None
        state.lost_to_saves += time.perf_counter() - start
