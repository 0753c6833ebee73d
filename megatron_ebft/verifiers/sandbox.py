"""The sandbox for the programs of answers: Linux namespaces.

1. A worker enters user, mount, network, IPC and UTS namespaces once. Its root folder then holds Python, the system's
   libraries and four devices, all read-only. There is no network, not even to this machine.
2. Every program gets new pid, mount and IPC namespaces, an empty folder to work in and no /proc. It has no
   capabilities, but limits and a seccomp filter.
3. The first process of the pid namespace is ours. It watches the memory of all others. When it ends, Linux kills them.
4. It is killed when the worker dies.
"""

import os
import platform
import re
import resource
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from megatron_ebft.common.signals import end_with_parent
from megatron_ebft.verifiers import linux, seccomp
from megatron_ebft.verifiers.programs import DISK, MEMORY, close_others, ending, fork, limit, settle

PROCESSES = 32
"""Processes and threads of a program."""
PAUSE = 0.05
"""Seconds between two looks at the processes."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
MOUNT_POINT = "/sys"
"""Where the new root is made: a folder that exists everywhere and that the sandbox does not show."""
WORK = "/sandbox"
"""The folder in which programs run, and may write."""
OLDEST_LINUX = (5, 14)
NOBODY = 65534
"""User and group of programs if the worker is root: Linux does not limit root's processes."""
SETTINGS = (("kernel.unprivileged_userns_clone", "0", "1"), ("user.max_user_namespaces", "0", "10000"),
            ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"))
"""Settings that forbid namespaces: name, the value that does, another one."""


def visible_folders() -> list[str]:
    """Folders with this Python, its packages and the system's libraries; none is inside another."""
    paths = sysconfig.get_paths()
    wanted = {"/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", sys.prefix, sys.base_prefix, sys.exec_prefix,
              sys.base_exec_prefix, *(paths[x] for x in ("stdlib", "platstdlib", "purelib", "platlib"))}
    folders = sorted(os.path.abspath(x) for x in wanted if os.path.isdir(x))
    return [x for x in folders if not any(x.startswith(y + "/") for y in folders)]


def mend() -> str:
    """What to change where namespaces are forbidden."""
    for name, forbidding, allowing in SETTINGS:
        path = Path("/proc/sys", name.replace(".", "/"))
        if path.exists() and path.read_text().strip() == forbidding:
            return f"allow it with sysctl -w {name}={allowing}"
    return ("in a container, allow namespaces and an unmasked /proc (docker run --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined --security-opt systempaths=unconfined)")


class Sandbox:
    """Programs in namespaces. Moves this process into some of them: there is one sandbox for a process.

    Args:
        folders: what programs see.
        seconds: time of a program. Whoever starts one stops it; the processor time is limited here.

    Raises:
        OSError: the kernel forbids it.
    """

    def __init__(self, folders: list[str], seconds: float):
        if platform.machine() not in seccomp.MACHINES:
            raise OSError(f"there is no seccomp filter for {platform.machine()}")
        if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < OLDEST_LINUX:
            raise OSError(f"Linux {platform.release()} is too old; 5.14 or later counts the processes of a sandbox")
        self.seconds, self._first = seconds, 0
        is_root = os.geteuid() == 0 and _is_known(NOBODY)
        self._user, self._group = (NOBODY, NOBODY) if is_root else (os.geteuid(), os.getegid())
        parent = os.getppid()
        self._unshare()
        end_with_parent(signal.SIGKILL, parent)  # again: new credentials cancel it
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        socket.sethostname("sandbox")
        _make_root(folders)

    def _unshare(self) -> None:
        """Enter the namespaces. Users keep their numbers there."""
        users, groups = sorted({os.geteuid(), self._user}), sorted({os.getegid(), self._group})
        go, gone = os.pipe()

        def write_maps() -> None:
            os.read(go, 1)
            worker = Path("/proc", str(os.getppid()))
            try:
                if len(users) == 1:
                    (worker / "setgroups").write_text("deny")
                (worker / "gid_map").write_text("".join(f"{x} {x} 1\n" for x in groups))
                (worker / "uid_map").write_text("".join(f"{x} {x} 1\n" for x in users))
            except OSError as error:
                os._exit(error.errno)

        writer = fork(write_maps)  # a process that has entered has no right any more to map other users than itself
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC
                      | linux.CLONE_NEWUTS)
        os.write(gone, b"x")
        os.close(go)
        os.close(gone)
        error = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
        if error:
            raise OSError(error, f"uid_map: {os.strerror(error)}")

    def start(self, program: Callable[[], None], kept: int, report: int) -> None:
        """Run a function in namespaces of its own.

        Args:
            kept: the only file that it keeps.
            report: takes how the program ended.
        """
        def enter() -> None:
            close_others(kept, report)
            linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWIPC)  # pid: of children
            first = fork(lambda: self._first_process(program, kept, report))
            os.close(kept)
            os.close(report)
            os.waitpid(first, 0)

        self._first = fork(enter)

    def stop(self) -> None:
        """Kill the program that was started last. None of its processes is left."""
        os.kill(self._first, signal.SIGKILL)  # then the first process of the pid namespace, then all others
        while True:
            try:
                os.wait()  # until all have ended: they become children of this process when their parents end
            except ChildProcessError:
                return

    def _first_process(self, program: Callable[[], None], kept: int, report: int) -> None:
        """Start the program and watch it."""
        linux.prctl(linux.PR_SET_DUMPABLE, 0)  # closed to debuggers
        linux.mount("tmpfs", WORK, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV,
                    f"size={DISK},nr_inodes=10000,mode=700,uid={self._user},gid={self._group}")
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        linux.unmount("/proc")
        linux.unmount("/proc")  # the one outside
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        child = fork(lambda: self._be_confined(program, kept))
        os.close(kept)
        os.write(report, _watch(child, processes).encode())

    def _be_confined(self, program: Callable[[], None], kept: int) -> None:
        settle(WORK, kept)
        linux.empty_bounding_set()
        if self._user != os.geteuid():
            os.setgroups([])
            os.setresgid(*[self._group] * 3)
            os.setresuid(*[self._user] * 3)
        linux.drop_capabilities()
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
        limit(self.seconds)
        program()


def _is_known(user: int) -> bool:
    """Whether this user exists in the user namespace of this process."""
    ranges = [[int(x) for x in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= user < first + count for first, _, count in ranges)


def _make_root(folders: list[str]) -> None:
    """Make a root folder that shows these folders and some devices, read-only, and /proc for those who start programs.

    Each is mounted in its place in a new filesystem.
    """
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", MOUNT_POINT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    for folder in (*folders, "/proc"):
        there = Path(MOUNT_POINT + folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(folder):
            there.symlink_to(os.readlink(folder))
            continue
        there.mkdir()
        linux.mount(folder, str(there), flags=linux.MS_BIND | linux.MS_REC)
        linux.make_read_only(str(there), linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV)
    for device in DEVICES:
        there = Path(MOUNT_POINT + device)
        there.parent.mkdir(exist_ok=True)
        there.touch()
        linux.mount(device, str(there), flags=linux.MS_BIND)
    Path(MOUNT_POINT + WORK).mkdir()
    if not Path(MOUNT_POINT, "tmp").exists():  # it does if Python is installed below it
        Path(MOUNT_POINT, "tmp").symlink_to(WORK)
    linux.pivot_root(MOUNT_POINT)
    linux.make_read_only("/", is_recursive=False)


def _watch(child: int, processes: int) -> str:
    """Wait until a process ends, or this pid namespace has too many or too large ones. What happened.

    Args:
        processes: /proc, open.
    """
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            return ending(os.waitstatus_to_exitcode(status))
        if not ended:
            sizes = _sizes(processes)
            if len(sizes) > PROCESSES:  # Linux limits no processes of root
                return f"more than {PROCESSES} processes"
            if sum(sizes) > MEMORY:
                return f"more than {MEMORY >> 20} MiB of memory"
            signal.sigtimedwait([signal.SIGCHLD], PAUSE)


def _sizes(processes: int) -> list[int]:
    """Bytes of resident memory of each process but the first."""
    sizes = []
    for name in os.listdir(processes):
        if name.isdecimal() and name != "1":
            try:
                file = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=processes)
            except FileNotFoundError:
                continue  # it has ended
            sizes.append(int(os.read(file, 100).split()[1]) * resource.getpagesize())
            os.close(file)
    return sizes
