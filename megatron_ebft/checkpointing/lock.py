"""One run at a time in a folder of checkpoints: two would remove each other's saves.

1. `<folder>/run.lock` names the owner: its machine, its process and when that began, its SLURM job.
2. The owner is gone if it was on this machine and its process has ended; if it is of this SLURM job and on another
   machine, since SLURM starts a job again only after its end; or if it is elsewhere and leaves the file alone for
   WATCH seconds, where owners touch it every HEARTBEAT seconds. No clocks are compared.
3. A process that finds the owner gone replaces the file and owns the folder from then on. An owner that was suspended
   for longer than WATCH may lose the folder this way, so it looks before each save.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time

NAME = "run.lock"
HEARTBEAT, WATCH = 5.0, 30.0
"""Seconds."""


class FolderLock:
    """The right to write into a folder, for this process.

    Args:
        flag: that named the folder, for messages.
    """

    def __init__(self, folder: str, flag: str = "--save"):
        self.folder, self.flag, self.path = folder, flag, os.path.join(folder, NAME)
        self.owner = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(),
                      "started": _start_of(os.getpid()), "job": os.environ.get("SLURM_JOB_ID")}
        """This process, as its lock file describes it."""
        self._is_over = threading.Event()

    def acquire(self, say=print) -> None:
        """Take the folder, which must exist.

        Raises:
            ValueError: another run has it; names the host and the process.
            OSError: the file cannot be written.
        """
        if not self._create():
            self._wait_for_its_end(say)
            draft = f"{self.path}.{secrets.token_hex(4)}"
            with open(draft, "w") as file:
                json.dump(self.owner, file)
            os.replace(draft, self.path)
        threading.Thread(target=self._touch, name="lock", daemon=True).start()

    def check(self) -> None:
        """ValueError if another run has taken the folder since."""
        owner, _ = self._read()
        if owner is None:  # someone has cleared the folder
            with contextlib.suppress(OSError):  # the save says what is wrong there
                self._create()
        elif owner != self.owner:
            raise ValueError(f"{self.flag} {self.folder}: {_in_words(owner)} has taken this folder over, while this "
                             f"run stood still for more than {WATCH:.0f} s; this run ends without another save")

    def release(self) -> None:
        """Leave the folder to others."""
        self._is_over.set()
        with contextlib.suppress(OSError):
            if self._read()[0] == self.owner:
                os.remove(self.path)

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *exc):
        self.release()

    def _create(self) -> bool:
        """Write the file unless there is one."""
        try:
            with open(self.path, "x") as file:
                json.dump(self.owner, file)
            return True
        except FileExistsError:
            return False

    def _read(self) -> tuple[dict | None, int]:
        """The owner, {} if the file says nothing of it and None without a file; and the time of the last touch."""
        try:
            with open(self.path, errors="replace") as file:  # a network file system looks anew when a file is opened
                touched = os.fstat(file.fileno()).st_mtime_ns
                owner = json.load(file)
        except FileNotFoundError:
            return None, 0
        except (ValueError, RecursionError):
            return {}, touched
        return owner if isinstance(owner, dict) else {}, touched

    def _wait_for_its_end(self, say) -> None:
        """Return once the present owner is known to be gone; ValueError if it is known to be alive."""
        first, end, is_told = self._read(), time.monotonic() + WATCH, False
        while True:
            owner, touched = self._read()
            if owner is None or owner == self.owner:
                return
            is_here = owner.get("machine") == self.owner["machine"]
            is_same_job = bool(self.owner["job"]) and owner.get("job") == self.owner["job"]
            if is_here and not _is_running(owner) or is_same_job and not is_here:
                return
            is_over = time.monotonic() > end
            if is_here and (is_over or not is_same_job) or not is_here and (owner, touched) != first:
                raise ValueError(f"{self.flag} {self.folder}: {_in_words(owner)} writes its checkpoints there; let "
                                 "that run end, or name another folder")
            if is_over:
                return
            if not is_told:
                say(f"{self.flag} {self.folder}: waiting up to {WATCH:.0f} s to see whether {_in_words(owner)} is gone")
            is_told = True
            time.sleep(min(1.0, WATCH / 10))

    def _touch(self) -> None:
        while not self._is_over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # its next save will notice whatever is wrong there
                os.utime(self.path)


def _in_words(owner: dict) -> str:
    job = f" (SLURM job {owner['job']})" if owner.get("job") else ""
    return f"process {owner.get('process', 'unknown')} on {owner.get('host', 'an unknown host')}{job}"


def _machine() -> str:
    """The same for two processes only if they run on one machine, since one boot, and see each other's ids."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a sandbox: no other process is known to be on this machine
        return secrets.token_hex(16)


def _is_running(owner: dict) -> bool:
    """Whether a process of this machine is still the one that it was."""
    try:
        os.kill(owner["process"], 0)
        return _start_of(owner["process"]) in (owner["started"], None)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError, KeyError, TypeError):
        return False


def _start_of(process: int) -> int | None:
    """When a process began, in clock ticks since boot. -1: it has ended, and its parent has not noticed yet. None: this
    process may not know."""
    try:
        with open(f"/proc/{process}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
