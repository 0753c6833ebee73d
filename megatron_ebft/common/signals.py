"""Signals that ask a run to stop, and processes that end with their parent.

Imports no torch: a signal that arrives while torch is imported must not kill.
"""

import contextlib
import ctypes
import os
import signal

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Whoever starts a run may have these ignored: nohup does, and a shell for its background jobs."""
PR_SET_PDEATHSIG = 1
received: list[str] = []
"""Names of the stop signals that have arrived, in order."""


def install_handlers() -> None:
    """Record stop signals in `received` from now on. A second Ctrl-C raises KeyboardInterrupt."""
    for number in STOP_SIGNALS:
        if number not in MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _record)


def _record(number: int, _) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in received:
        raise KeyboardInterrupt
    received.append(name)


def ignore_signals() -> None:
    """Ignore these signals until the process ends.

    An interpreter that shuts down restores the default action, which kills the process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def shielded():
    """Processes forked inside never receive these signals.

    SLURM, torchrun and the keyboard send a signal to whole groups of processes. Without the shield it would kill the
    processes that Megatron-Core starts for saving. Signals that reach this process inside are handled at the end of the
    block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have Linux send this process a signal when the thread that started it ends, in whatever way.

    Args:
        parent: its process id. If it has ended already, the signal comes at once.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)
