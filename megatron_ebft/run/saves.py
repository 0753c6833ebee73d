"""The checkpoints of a run: when they are written, what happens when one fails, and when older ones go."""

import os
import time
from contextlib import contextmanager, suppress

from megatron_ebft.checkpointing.folders import POINTER, complete_iterations, latest_iteration, listed
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.errors import NotFinite, SaveFailed
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
        self.unproven = self._loaded()
        """Iteration of the newest checkpoint, until a step from its weights has been finite. Older ones stay until
        then: a step can leave weights that are finite and ruined."""
        run.stopper.longest_save = run.state.longest_save

    def _place(self) -> tuple[int, int]:
        return self.run.state.iteration, self.run.state.evaluated

    def _loaded(self) -> int | None:
        """The iteration the run was loaded from, if it is the latest in --save."""
        args, iteration = self.run.args, self.run.state.iteration
        with suppress(ValueError):
            if iteration and args.load and os.path.abspath(args.load) == os.path.abspath(args.save):
                return iteration if latest_iteration(args.save) == iteration else None

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now.

        Raises:
            ValueError: on every rank, another run has taken the folder.
            NotFinite: the last step has ruined the run. Nothing is written and nothing is removed.
        """
        run = self.run
        with collective_errors():
            if run.lock is not None:
                run.lock.check()
        self.log.flush()
        self.poll(wait=True)
        self.begun = time.perf_counter()
        try:
            with self._attempt():
                self.saver.save(run.state, run.policy, run.optimizer, run.scheduler, run.metadata, run.companions)
                self.last = self._place()
        except NotFinite as failure:
            raise self.explain(NotFinite(f"after step {run.state.iteration} {failure}")) from failure
        self.poll()

    def poll(self, wait: bool = False) -> None:
        """Report a checkpoint that has become complete."""
        with self._attempt():
            folder = self.saver.finished(wait)
            if folder is not None:  # for a save in the background this includes the writing
                self.run.callbacks.saved(self.run, self.log, folder)
                self.unproven = self.last[0]
                longest = max(self.run.state.longest_save, time.perf_counter() - self.begun)
                self.run.state.longest_save = self.run.stopper.longest_save = longest
        if self.unproven is not None and self.run.state.iteration > self.unproven:
            self.unproven = None
            self.run.watchdog.enter("removing older checkpoints", PATIENCE)  # the others wait for rank 0
            try:
                self.saver.drop_old(self.run.in_use)
            except ValueError as error:
                self.log.print(f"warning: {error}")

    def explain(self, failure: NotFinite) -> NotFinite:
        """The failure of the present step, with what it means for the checkpoints."""
        folder, iteration = self.run.args.save, self.run.state.iteration
        there = complete_iterations(folder)
        if self.last is not None and self.last[0] == iteration and iteration > 0:
            older = listed([x for x in there if x < iteration])
            advice = (f"The checkpoint of step {iteration} is not proven good: this was the first step from it. To "
                      f"go back to an older one (there: {older}), write its iteration into {POINTER}")
        elif there:
            advice = f"The last checkpoint, of step {there[-1]}, is good"
        else:
            advice = "There is no checkpoint"
        return NotFinite(f"{failure}. {advice} (--save {folder})")

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
