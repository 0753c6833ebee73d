"""Processes that run the programs of answers: their limits, how they end, and how they run without a sandbox."""

import itertools
import math
import os
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable

from megatron_ebft.common.signals import STOP_SIGNALS, end_with_parent
from megatron_ebft.verifiers import linux, seccomp

MEMORY = 1 << 30
"""Bytes of address space of a process. In the sandbox also bytes of resident memory of all processes of a program."""
DISK = 1 << 26
"""Bytes of a file. In the sandbox also bytes of all files."""
FILES = 256
"""Open files of a process."""
SIGNALS = {number.value: number.name for number in signal.Signals}
"""Most real-time signals have no name."""


def fork(body: Callable[[], None]) -> int:
    """Run a function in a new process, which is killed when this one ends. The process's id."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    try:
        end_with_parent(signal.SIGKILL, parent if os.getpid() != 1 else None)  # the first one cannot see its parent
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into the parent's code


def limit(seconds: float) -> None:
    """Limit this process and all that it starts: sizes, processor time, system calls."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*STOP_SIGNALS, signal.SIGCHLD])
    processor = math.ceil(seconds) + 1
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, DISK), (resource.RLIMIT_NOFILE, FILES),
                       (resource.RLIMIT_CPU, processor), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install()


def close_others(*kept: int) -> None:
    """Close all files but the standard ones and these."""
    for low, high in itertools.pairwise((2, *sorted(kept), 1 << 20)):
        os.closerange(low + 1, high)


def settle(folder: str, kept: int) -> None:
    """Work in a folder, with empty standard streams and no other file than one."""
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    close_others(kept)
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.close(null)


def ending(code: int) -> str:
    """How a process ended: its exit code, or minus the signal that killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"killed by {SIGNALS.get(-code, f'signal {-code}')}"


class Unsandboxed:
    """Programs in a process group and a folder of their own, with limits, and nothing more.

    A program that leaves its process group outlives its time.

    Args:
        seconds: time of a program.
    """

    def __init__(self, seconds: float):
        self.seconds, self._group, self._folder = seconds, 0, ""

    def start(self, program: Callable[[], None], kept: int, report: int) -> None:
        """Run a function in a process of its own.

        Args:
            kept: the only file that it keeps.
            report: takes how the process ended.
        """
        self._folder = tempfile.mkdtemp(prefix="ebft_answer_")
        self._group = fork(lambda: self._watch(program, kept, report))
        os.setpgid(self._group, self._group)  # here as well: `stop` may come before the other process gets to it

    def _watch(self, program: Callable[[], None], kept: int, report: int) -> None:
        os.setpgid(0, 0)
        close_others(kept, report)

        def run() -> None:
            settle(self._folder, kept)
            limit(self.seconds)
            program()

        child = fork(run)
        os.close(kept)
        os.write(report, ending(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())

    def stop(self) -> None:
        """Kill the program that was started last."""
        os.killpg(self._group, signal.SIGKILL)
        os.waitpid(self._group, 0)
        shutil.rmtree(self._folder, ignore_errors=True)
