"""Programs of answers in the sandbox: what they do stays there, and none of it is right.

A program tells what it could do: its tests hold if it could not.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from code_verifier import code_verifier

from megatron_ebft.verifiers import sandbox

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SECRET = "EBFT_SECRET_OF_THE_TESTS"
NAME = "import ctypes; ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0)\n"
"""Gives a program's process a name that others see."""
FAILURE = """
import ctypes, os, socket
def failure(function, *arguments):
    try:
        return repr(function(*arguments))
    except OSError as error:
        return type(error).__name__
"""
BELOW_TMP = sorted({folder.split("/")[2] for folder in sandbox.visible_folders() if folder.startswith("/tmp/")})
"""What of /tmp programs see: nothing, unless Python is installed there. It is read-only then."""
LIBC = "ctypes.CDLL(None, use_errno=True)"
ONE_VERIFIER = """
from megatron_ebft.verifiers.build import build_verifier
verifier = build_verifier("code", timeout=60, workers=1)
print(verifier.verify([({{"tests": "pass"}}, {!r})]), flush=True)
"""


@pytest.fixture(scope="module")
def code():
    """The verifier, with a secret in this process's environment when its workers start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET, "secret")
        with code_verifier(timeout=30) as verifier:
            yield verifier


@pytest.fixture(scope="module")
def impatient():
    with code_verifier(timeout=1) as verifier:
        yield verifier


def named(name: str) -> list[int]:
    """Processes with this name."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and (folder / "comm").read_text().strip() == name:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def until_none(name: str) -> None:
    """Wait until there is no process of this name any more."""
    end = time.monotonic() + 300
    while named(name):
        assert time.monotonic() < end, named(name)
        time.sleep(0.02)


def test_nothing_outside_can_be_reached(code, tmp_path):
    """Each line is a test of its own, so that all that fail are named."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    lines = [
        f"assert failure(open, {str(secret)!r}) == 'FileNotFoundError'",
        f"assert failure(open, {__file__!r}) == 'FileNotFoundError'",
        "assert failure(open, '/etc/passwd') == 'FileNotFoundError'",
        f"assert os.listdir('/tmp') == {BELOW_TMP} and os.listdir('.') == os.listdir('/proc') == []",
        "assert set(os.listdir('/dev')) == {'null', 'zero', 'random', 'urandom'}",
        "assert failure(open, '/usr/x', 'w') == failure(open, '/x', 'w') == 'OSError'",
        f"assert failure(os.chmod, {os.__file__!r}, 0o777) == 'OSError'",
        f"assert {SECRET!r} not in os.environ and os.environ['HOME'] == os.getcwd() == '/sandbox'",
        "assert os.getuid() and os.getgid() and os.getpid() == 2",
        "assert socket.gethostname() == 'sandbox'",
        f"assert failure(socket.create_connection, {listener.getsockname()!r}) == 'PermissionError'",
        "assert failure(socket.socket, 40, 1) == 'PermissionError'  # AF_VSOCK: to the host of a virtual machine",
        "assert failure(socket.socketpair)[0] == '('",
        "assert failure(os.kill, 1, 9) == 'PermissionError' or os.getppid() == 1",
        "assert failure(os.setuid, 0) == failure(os.chroot, '/tmp') == 'PermissionError'",
        "assert failure(os.memfd_create, 'x') == 'PermissionError'",
        f"assert [{LIBC}.unshare(0x10000000), ctypes.get_errno()] == [-1, 1]",
        f"assert [{LIBC}.ptrace(16, 1, None, None), ctypes.get_errno()] == [-1, 1]",
        f"assert [{LIBC}.mount(b'x', b'/tmp', b'tmpfs', 0, None), ctypes.get_errno()] == [-1, 1]",
        f"assert [{LIBC}.syscall(435, None, 0), ctypes.get_errno()] == [-1, 38]  # clone3",
        f"open('{'.' if BELOW_TMP else '/tmp'}/ebft_left_behind', 'w').write('x')",
        "import numpy; assert numpy.arange(4) @ numpy.ones(4) == 6",
    ]
    for line, verdict in zip(lines, code.verify([({"tests": line}, FAILURE) for line in lines])):
        assert verdict.is_right, (line, verdict.reason)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert not Path("/tmp/ebft_left_behind").exists()


NO_FILTER = """
from megatron_ebft.verifiers import seccomp
seccomp.install = lambda: None
from megatron_ebft.verifiers.code import Judge
from megatron_ebft.verifiers.sandbox import Sandbox, visible_folders
judge = Judge(Sandbox([*visible_folders(), {folder!r}], 30))
for test in ("assert os.listdir({folder!r}) == ['seen']", "assert socket.if_nameindex() == [(1, 'lo')]",
             "assert failure(socket.create_connection, {address!r}) == 'OSError'  # the network is unreachable"):
    print(judge({{"tests": test}}, {failure!r}))
"""


def test_there_is_no_network_without_the_filter_either(code, tmp_path):
    """And Python may be installed below /tmp."""
    tmp_path.chmod(0o755)
    (tmp_path / "seen").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = NO_FILTER.format(address=listener.getsockname(), failure=FAILURE, folder=str(tmp_path))
        run = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                             check=True)
    assert run.stdout == 3 * "Verdict(score=1.0, is_right=True, reason='', failed=False)\n"


BOMBS = (
    ("import ctypes\ndef f(): ctypes.string_at(0)", "killed by SIGSEGV"),
    ("import os\ndef f(): os.kill(os.getpid(), 40)", "killed by signal 40"),
    ("def f(): f()", "RecursionError"),
    ("import os\ndef f():\n while True: os.fork()", "BlockingIOError"),
    ("def f(): return bytearray(1 << 31)", "MemoryError"),
    ("import os, time\ndef f():\n for _ in range(5):\n  if not os.fork():\n   x = bytearray(b'x') * (250 << 20)\n"
     "   time.sleep(60)\n time.sleep(60)", "more than 1024 MiB of memory"),
    ("def f():\n with open('x', 'wb') as file:\n  while True: file.write(bytes(1 << 20))", "OSError: [Errno 27]"),
    ("def f():\n for i in range(10):\n  with open(f'{i}', 'wb') as file: file.write(bytes(1 << 23))",
     "OSError: [Errno 28]"),
    ("import os\ndef f():\n while True:\n  for file in range(3, 99):\n   try: os.write(file, b'x' * 1000)\n"
     "   except OSError: pass", "xxx"),
    ("def f(): raise ValueError('x' * 10**6 + '\\n\\0')", "ValueError: xxx"),
    ("def f(): return 'x' * 10**8", "expected 1, got 'xxx"),
)
"""Programs that do not return 1 from f, and the beginning of the reason."""


def test_a_bomb_costs_its_answer_alone(code):
    """All in one call, with a right answer after each."""
    tests, right = {"tests": "assert f() == 1"}, "def f(): return 1"
    answers = [(tests, program) for bomb, _ in BOMBS for program in (bomb, right)]
    verdicts = code.verify(answers)
    assert all(x.is_right for x in verdicts[1::2])
    for (program, reason), verdict in zip(BOMBS, verdicts[::2], strict=True):
        assert not verdict.is_right and verdict.score == 0, program
        assert verdict.reason.startswith(reason) and len(verdict.reason) <= 200, (program, verdict.reason)


def test_hangs(impatient):
    """Asleep, writing all the time, and asleep without any files. The verifier's own children stay."""
    impatient.verify([({"tests": "pass"}, "")] * 8)
    before = {x.process.pid for x in impatient._pool._children}
    hangs = ["import time\ntime.sleep(60)", "def f():\n while True: print('x' * 1000)",
             "import os, time\ndef f():\n os.closerange(0, 99)\n time.sleep(60)"]
    for verdict in impatient.verify([({"tests": "f()"}, program) for program in hangs]):
        assert not verdict.is_right and verdict.reason == "timeout after 1 s"
    assert {x.process.pid for x in impatient._pool._children} >= before


def test_no_process_is_left(impatient):
    """Of a fork bomb whose processes leave their group and ignore signals."""
    bomb = NAME.format("ebft_bomb") + """import os, signal, time
for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
for _ in range(100):
    try:
        os.fork() or os.setsid()
    except OSError:
        pass
time.sleep(60)
"""
    verdict, = impatient.verify([({"tests": "pass"}, bomb)])
    assert verdict.reason == "timeout after 1 s" and not named("ebft_bomb")


@pytest.mark.parametrize("victim", ["verifier", "worker"])
def test_programs_end_with_those_who_started_them(code, victim):
    program = NAME.format("ebft_orphan") + "import time\ntime.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", ONE_VERIFIER.format(program)], env=ENVIRONMENT, text=True,
                           stdout=subprocess.PIPE)
    end = time.monotonic() + 300
    while not named("ebft_orphan"):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.02)
    worker = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text())
    os.kill(run.pid if victim == "verifier" else worker, signal.SIGKILL)
    until_none("ebft_orphan")
    assert ("killed by SIGKILL" in run.communicate(timeout=300)[0]) == (victim == "worker")


WITHOUT_NAMESPACES = """
import contextlib, os, sys
from pathlib import Path
from megatron_ebft.verifiers import linux
from megatron_ebft.verifiers.build import build_verifier
linux.unshare(linux.CLONE_NEWUSER)
os.read(0, 1)
Path("/proc/sys/user/max_user_namespaces").write_text("0")
try:
    build_verifier("code")
except ValueError as error:
    print(error)
tests = {"tests": "assert f() == 1"}
verifier = build_verifier("code", timeout=60, workers=1, unsafe_code=True)
with contextlib.redirect_stdout(None):
    impatient = build_verifier("code", timeout=1, workers=1, unsafe_code=True)
for body in ("return 1", "return 2", "while True: pass", "return bytearray(1 << 31)",
             "return __import__('os').getcwd()"):
    judge = impatient if body.startswith("while") else verifier
    print(*judge.verify([(tests, f"def f():\\n {body}")]))
verifier.close()
impatient.close()
"""


def test_where_the_kernel_forbids_it(code):
    """In a user namespace that may have none below it."""
    run = subprocess.Popen([sys.executable, "-c", WITHOUT_NAMESPACES], env=ENVIRONMENT, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    own, end = os.readlink("/proc/self/ns/user"), time.monotonic() + 300
    while os.readlink(f"/proc/{run.pid}/ns/user") == own:
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.02)
    Path(f"/proc/{run.pid}/uid_map").write_text(f"0 {os.geteuid()} 1\n")
    refused, warning, *verdicts = run.communicate("x", timeout=300)[0].splitlines()
    assert refused.startswith("--ebft-verifier code: ") and "[Errno 28] unshare" in refused
    assert "sysctl -w user.max_user_namespaces" in refused and "--ebft-unsafe-code" in refused
    assert warning.startswith("warning: --ebft-verifier code: there is no sandbox")
    for verdict, words in zip(verdicts, ("is_right=True", "expected 1, got 2", "timeout after 1 s", "MemoryError",
                                         f"got '{tempfile.gettempdir()}/ebft_answer_"), strict=True):
        assert words in verdict
    assert not list(Path(tempfile.gettempdir()).glob("ebft_answer_*"))


def test_settings_that_forbid_it_are_named(monkeypatch, tmp_path):
    assert "systempaths=unconfined" in sandbox.mend()
    setting = tmp_path / "proc/sys/kernel/apparmor_restrict_unprivileged_userns"
    setting.parent.mkdir(parents=True)
    setting.write_text("1\n")
    monkeypatch.setattr(sandbox, "Path", lambda *parts: tmp_path.joinpath(*(x.lstrip("/") for x in parts)))
    assert sandbox.mend() == "allow it with sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
