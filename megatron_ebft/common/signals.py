"""Signals that ask a run to stop. Imports no torch: a signal that arrives while torch is imported must not kill."""

import contextlib
import signal
from multiprocessing import resource_tracker

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
received: list[str] = []
"""Names of the stop signals that have arrived, in order."""


def install_handlers() -> None:
    """Record SIGUSR1 and SIGTERM in `received` from now on."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))


def ignore_signals() -> None:
    """Ignore both signals until the process ends.

    An interpreter that shuts down restores the default action, which kills the process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def shielded():
    """Processes started inside never receive these signals.

    SLURM sends a signal to every process of a job step. Without the shield it would kill the processes that
    Megatron-Core starts for saving. Signals that reach this process inside are handled at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # starts with the first process, and unblocks SIGTERM when it does
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
