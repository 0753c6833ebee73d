"""System calls that Python lacks, by ctypes: namespaces, mounts, capabilities, process attributes."""

import ctypes
import errno
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 24, 36, 38
CAPABILITY_VERSION_3, LAST_CAPABILITY = 0x20080522, 64
NUMBERS = {"x86_64": {"pivot_root": 155, "mount_setattr": 442}, "aarch64": {"pivot_root": 41, "mount_setattr": 442}}
"""Numbers of the system calls that glibc does not wrap, by machine."""
libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, function, *arguments) -> None:
    if function(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _syscall(name: str, *arguments) -> None:
    _call(name, libc.syscall, ctypes.c_long(NUMBERS[platform.machine()][name]), *arguments)


def prctl(option: int, first: int, second: int = 0) -> None:
    """Set an attribute of this process."""
    _call(f"prctl {option}", libc.prctl, option, *map(ctypes.c_ulong, (first, second, 0, 0)))


def unshare(namespaces: int) -> None:
    """Move this process (of a pid namespace: its children) into new namespaces."""
    _call("unshare", libc.unshare, namespaces)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount a filesystem, or a folder that is mounted already (MS_BIND)."""
    _call(f"mount {target}", libc.mount, os.fsencode(source), os.fsencode(target), kind.encode() or None,
          ctypes.c_ulong(flags), options.encode() or None)


def make_read_only(path: str, attributes: int = 0, is_recursive: bool = True) -> None:
    """Make the mount at a path read-only, and those below it, with more MOUNT_ATTRs."""
    wanted = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | attributes, 0, 0, 0)
    _syscall("mount_setattr", AT_FDCWD, os.fsencode(path), AT_RECURSIVE if is_recursive else 0, wanted,
             ctypes.c_size_t(len(wanted)))


def unmount(path: str) -> None:
    """Detach what is mounted at a path."""
    _call(f"umount {path}", libc.umount2, os.fsencode(path), MNT_DETACH)


def pivot_root(root: str) -> None:
    """Make the mount at a path the root of this mount namespace. Nothing of the old root is left."""
    os.chdir(root)
    _syscall("pivot_root", b".", b".")  # the old root now covers the new one
    unmount(".")
    os.chdir("/")


def empty_bounding_set() -> None:
    """From now on, this process gains no capability by running a program."""
    for capability in range(LAST_CAPABILITY):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # the kernel knows no more


def drop_capabilities() -> None:
    """Give up all capabilities."""
    _call("capset", libc.capset, struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
