"""A seccomp filter for the code sandbox: system calls that an answer does not need and that namespaces and limits do
not contain. They fail with EPERM.

Left out are calls that need capabilities: answers have none.
"""

import ctypes
import errno
import platform
import struct

from megatron_ebft.verifiers import linux

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: the column of the tables below, and seccomp's name of the architecture."""
DENIED = {
    # into other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "mq_open": (240, 180),
    # parts of the kernel that had many faults, or that a filter does not see into
    "io_uring_setup": (425, 425), "io_setup": (206, 0), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "personality": (135, 92),
}
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
AF_UNIX = 1
NEW_NAMESPACES = (linux.CLONE_NEWNS | linux.CLONE_NEWCGROUP | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
                  | linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET)
X32 = 0x40000000
"""The bit of x86_64's second set of numbers."""
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
"""Offsets in what a filter sees of a call."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of BPF."""
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
"""What a filter returns. FAIL takes an error number."""
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


def program(machine: str) -> bytes:
    """The filter's instructions. A comparison skips its second number of instructions if it does not hold."""
    column, architecture = MACHINES[machine]
    deny = (RETURN, 0, 0, FAIL | errno.EPERM)
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER),
             (AT_LEAST, 0, 1, X32), deny]
    for numbers in DENIED.values():
        steps += [(EQUAL, 0, 1, numbers[column]), deny]
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]  # glibc then calls clone
    steps += [(EQUAL, 0, 4, SOCKET[column]), (LOAD, 0, 0, ARGUMENT), (EQUAL, 1, 0, AF_UNIX), deny,
              (RETURN, 0, 0, ALLOW)]  # AF_VSOCK, for one, knows no network namespaces
    steps += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES), deny,
              (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def install() -> None:
    """Put the filter on this process and on all that it starts. Needs no_new_privs."""
    instructions = ctypes.create_string_buffer(program(platform.machine()))
    header = ctypes.create_string_buffer(struct.pack("HP", len(instructions) // 8, ctypes.addressof(instructions)))
    linux.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))
