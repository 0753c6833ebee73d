"""Child processes that judge answers in parallel. One that hangs, crashes or is killed costs its answer alone.

Such an answer has failed: the verifier could not judge it. Only the time of `code` is the answer's own, which has
written the program.
"""

import collections
import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

from megatron_ebft.common.signals import shielded
from megatron_ebft.verifiers.programs import ending
from megatron_ebft.verifiers.verdict import Verdict, failure, wrong

START = 120
"""Seconds until a child must be ready. math-verify imports for a second, from a busy filesystem much longer."""
SPARE = 5
"""Seconds that a child of `code` has beyond an answer's time: it stops the answer's program itself."""
ROOT = Path(__file__).parents[2]
"""Where the package is imported from."""
PROGRAM = ("import sys; sys.path = [sys.argv[1], *sys.path, *sys.argv[4:]]; "
           "from megatron_ebft.verifiers.worker import main; main()")
CLEAN = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
         "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
         **{name: value for name, value in os.environ.items() if name == "TMPDIR"}}
"""Environment of programs: none of this process's secrets. Sets have the same order in each. TMPDIR is where answers
have their folders where there is no sandbox."""


class CannotStart(RuntimeError):
    """A child cannot judge; the message says why."""


class _Child:
    """One child process.

    Args:
        judge: arguments of the worker's judge.
    """

    def __init__(self, judge: dict):
        is_clean = judge["name"] == "code"
        self.seconds = judge["seconds"] + (SPARE if is_clean else 0)
        self.talk, theirs = socket.socketpair()
        settings = json.dumps({"parent": os.getpid(), "judge": judge})
        path = [sysconfig.get_path(x) for x in ("purelib", "platlib")] if is_clean else [*sys.path, os.getcwd()]
        command = [sys.executable, "-P", *(("-S", "-s") if is_clean else ()), "-c", PROGRAM, str(ROOT),
                   str(theirs.fileno()), settings, *path]
        with theirs, shielded():
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
                                            env=CLEAN if is_clean else None, start_new_session=True)
        self.index: int | None = None
        """The answer that it judges."""
        self.is_ready = False
        self.until = time.monotonic() + START
        """When it is taken to hang."""
        self._received = b""

    def give(self, index: int, job: tuple[dict, str]) -> bool:
        """Have it judge an answer. False if it has ended."""
        begin = time.monotonic()
        self.talk.settimeout(self.seconds)
        try:
            with contextlib.suppress(TimeoutError):  # it does not read, and its time is over
                self.talk.sendall(json.dumps(job).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.index, self.until = index, begin + self.seconds
        return True

    def take(self) -> dict | None:
        """Its message; None if that is not there to its end, {} if the child has ended."""
        try:
            part = self.talk.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        self._received += part
        if part and not part.endswith(b"\n"):
            return None
        message, self._received = self._received, b""
        return json.loads(message) if part else {}

    def end(self) -> str:
        """Kill it and what it has started. How it ended."""
        os.killpg(self.process.pid, signal.SIGKILL)  # of no effect on one that has ended by itself
        self.talk.close()
        return ending(self.process.wait())


class Pool:
    """Children that judge in the same way. They end with the thread that makes the pool, which alone may use it.

    Args:
        judge: arguments of the worker's judge.
        workers: most children at a time.
    """

    def __init__(self, judge: dict, workers: int):
        self.judge, self.workers = judge, workers
        self._children: list[_Child] = []
        self._thread = threading.get_ident()

    def start(self) -> None:
        """Start a child.

        Raises:
            CannotStart: it cannot judge.
        """
        child = _Child(self.judge)
        self._children.append(child)
        child.talk.settimeout(START)
        try:
            while (message := child.take()) is None:
                pass
        except TimeoutError:
            message = {"error": f"not ready after {START} s"}
        self._be_ready(child, message)

    def run(self, jobs: list[tuple[dict, str]]) -> list[Verdict]:
        """Judge answers, each with its question; in their order.

        Raises:
            CannotStart: there is no child any more that judges.
        """
        assert threading.get_ident() == self._thread, "a pool belongs to the thread that made it"
        try:
            return self._run(jobs)
        except BaseException:
            self.close()  # children that still judge would answer the next call
            raise

    def _run(self, jobs: list[tuple[dict, str]]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        waiting = collections.deque(enumerate(jobs))
        while len(verdicts) < len(jobs):
            while len(self._children) < min(self.workers, len(jobs) - len(verdicts)):
                self._children.append(_Child(self.judge))
            for child in self._children:
                if child.is_ready and child.index is None and waiting and child.give(*waiting[0]):
                    waiting.popleft()
            for child in self._wait():
                message = child.take()
                if message == {}:
                    self._lose(child, verdicts, "")
                elif message is not None and child.is_ready:
                    verdicts[child.index] = Verdict(**message)
                    child.index, child.until = None, math.inf
                elif message is not None:
                    self._be_ready(child, message)
            for child in [x for x in self._children if x.until < time.monotonic()]:
                self._lose(child, verdicts, f"timeout after {self.judge['seconds']:g} s")
        return [verdicts[i] for i in range(len(jobs))]

    def _wait(self) -> list[_Child]:
        """Children that have sent something, or ended, by the time that the first one is taken to hang."""
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.talk, selectors.EVENT_READ, child)
            left = min(child.until for child in self._children) - time.monotonic()
            return [key.data for key, _ in selector.select(min(max(left, 0), START))]

    def _be_ready(self, child: _Child, message: dict) -> None:
        """Take the first message of a child: what keeps it from judging, or nothing."""
        if message == {"error": ""}:
            child.is_ready, child.until = True, math.inf
            return
        self._children.remove(child)
        how = child.end()
        raise CannotStart(message["error"] if message else how)

    def _lose(self, child: _Child, verdicts: dict[int, Verdict], reason: str) -> None:
        """End a child. Its answer has failed, or is wrong if its program has taken too long.

        Args:
            reason: why; "" if it has ended by itself.
        """
        self._children.remove(child)
        how = child.end()
        if not child.is_ready:
            raise CannotStart(reason or how)
        if child.index is not None:
            is_programs = bool(reason) and self.judge["name"] == "code"
            verdicts[child.index] = wrong(reason) if is_programs else failure(reason or how)

    def close(self) -> None:
        """End all children."""
        while self._children:
            self._children.pop().end()
