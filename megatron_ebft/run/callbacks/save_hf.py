"""Checkpoints as Hugging Face models, written while training goes on.

1. A process of rank 0 converts one checkpoint at a time (hf/export.py), on the CPU. It writes aside and renames, so a
   folder that is there is complete.
2. A checkpoint is not removed before it is converted.
3. A run that is complete waits for what is left to convert. One that is stopped does not: when it resumes, it converts
   the checkpoint that it resumes from, if that one is due.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_ebft.checkpointing.companions import CONFIG
from megatron_ebft.checkpointing.folders import folder_name
from megatron_ebft.common import signals
from megatron_ebft.common.progress import clock
from megatron_ebft.common.signals import shielded
from megatron_ebft.hf.config import describe
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.watchdog import PATIENCE

ROOT = Path(__file__).parents[3]
"""Where the package is imported from."""
FOLDER = "hf"
"""In --save."""


class SaveHF(Callback):
    """Converts the checkpoints of every `--ebft-save-hf-interval`-th step, and the last one."""

    def __init__(self, args):
        self.folder, self.interval, self.last = args.save, args.ebft_save_hf_interval, args.train_iters
        self.longest_wait = PATIENCE / 2 * 60 * args.distributed_timeout_minutes
        """Seconds at the end of a run. Other ranks wait for twice as long."""
        self.waiting: list[int] = []
        """Iterations to convert, the first of them by `process` if there is one."""
        self.process: subprocess.Popen | None = None

    def train_start(self, run, log):
        if CONFIG not in run.companions:
            describe(ModelArgs(**run.metadata["architecture"]), f"--ebft-save-hf-interval {self.interval}")
        if not log.is_main:
            return
        self.resumed = run.state.iteration
        if self.resumed and os.path.isdir(os.path.join(self.folder, folder_name(self.resumed))):
            self._add(run, log, self.resumed)

    def saved(self, run, log, folder):
        if log.is_main:
            self._add(run, log, int(os.path.basename(folder).removeprefix("iter_")))

    def step_end(self, run, log, step):
        self._poll(run, log)

    def train_end(self, run, log, is_done):
        run.watchdog.enter("conversion to Hugging Face", PATIENCE)
        self._poll(run, log)
        end = time.monotonic() + (self.longest_wait if is_done else 0)
        while self.process is not None and time.monotonic() < end and not signals.received:
            time.sleep(0.1)
            self._poll(run, log)
        if self.waiting:
            log.print(f"warning: --ebft-save-hf-interval {self.interval}: not converted: steps "
                      f"{', '.join(map(str, self.waiting))}. tools/convert/megatron_to_hf.py converts them")
            self._end()

    def _output(self, iteration: int) -> str:
        return os.path.join(self.folder, FOLDER, folder_name(iteration))

    def _add(self, run, log, iteration: int) -> None:
        """Convert a checkpoint, if it is due, after those that wait."""
        if iteration % self.interval and iteration != self.last:
            return
        if iteration == self.resumed and os.path.isdir(self._output(iteration)):  # of the same weights
            return
        if self.process is not None and self.waiting[0] == iteration:  # it has been saved again
            self._end()
        if iteration not in self.waiting:
            self.waiting.append(iteration)
        run.in_use.add(iteration)
        self._poll(run, log)

    def _poll(self, run, log) -> None:
        """Report a conversion that has ended, and begin the next."""
        if self.process is not None and self.process.poll() is not None:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            problem = said[-1] if said else f"exit code {self.process.returncode}"
            self._done(run, log, problem if self.process.returncode else "")
            self._end()
        while self.process is None and self.waiting:
            try:
                self._start(self.waiting[0])
            except OSError as error:
                self._done(run, log, f"{error}")

    def _done(self, run, log, problem: str) -> None:
        """Report the first that waits."""
        iteration = self.waiting.pop(0)
        run.in_use.discard(iteration)
        if problem:
            log.print(f"warning: --ebft-save-hf-interval {self.interval}: step {iteration} could not be converted "
                      f"({problem}). Training goes on")
        else:
            log.print(f"converted {self._output(iteration)} in {clock(time.perf_counter() - self.begun)}")

    def _start(self, iteration: int) -> None:
        output, self.begun, self.errors = self._output(iteration), time.perf_counter(), tempfile.TemporaryFile()
        shutil.rmtree(output, ignore_errors=True)  # of an earlier run from here
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "megatron_ebft.hf.export",
                   os.path.join(self.folder, folder_name(iteration)), output, str(os.getpid())]
        with shielded():
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                            stderr=self.errors, env=os.environ | variables)

    def _end(self) -> None:
        """End the process, if it has not ended. Removes what it has left unfinished, and others that were killed."""
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.process = None
        for left in glob.glob(os.path.join(glob.escape(self.folder), FOLDER, "*.tmp.*")):
            shutil.rmtree(left, ignore_errors=True)
