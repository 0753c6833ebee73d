"""Tells the watchdog where a step is."""

from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.watchdog import PATIENCE


class Watch(Callback):
    """Enters the phases of each step. The verifier gets as much patience as a save: one rank works, the others wait."""

    def step_start(self, run, log, iteration):
        self.watchdog, self.iteration = run.watchdog, iteration

    def phase(self, name):
        if name:
            self.watchdog.enter(f"{name} of step {self.iteration}", PATIENCE if name == "verify" else 1)
