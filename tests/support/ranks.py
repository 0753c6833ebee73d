"""Ranks of a multi-rank test on one machine: `run_ranks(2, "test_x:function", arg)`.

Ranks are processes with torchrun's environment, which talk over gloo and need no GPU. They stay alive in a pool: the
next test finds them with everything imported. A rank that fails or hangs fails its test, and the pool starts afresh.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from megatron_ebft.common.signals import end_with_parent

TESTS = Path(__file__).parents[1]
FOLDERS = [TESTS.parent, TESTS / "support", TESTS.parent / "tools", TESTS.parent / "tools" / "convert"]
"""Where a rank finds modules; a module of tests is looked for in all of tests/."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


# ---------------------------------------------------------------- in the test's process


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """Starts processes by forking one that has imported the package, which takes most of a rank's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_ebft.run.loop"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


def free_port() -> int:
    """A port nobody listens on, for MASTER_PORT, outside the range the system hands out to other sockets meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Process:
    """A process of `target(*args)`, whose output goes to a file."""

    def __init__(self, target, *args):
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = server().Process(target=_with_output_in, args=(self._log.name, target, args))
        self.process.start()

    def output(self, characters: int = 6000) -> str:
        """The end of what it has written."""
        self._log.seek(0)
        return self._log.read()[-characters:]

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._log.close()


class Rank(Process):
    """A process that calls one function after another."""

    def __init__(self):
        self.calls, theirs = server().Pipe()
        super().__init__(_serve, theirs)
        theirs.close()  # so that the end of the process is the end of the pipe


_pool: list[Rank] = []


def run_ranks(world_size: int, function: str, *args, timeout: float = 900.0) -> list:
    """Call 'module:function' (a module of the tests) with JSON arguments on every rank; their JSON results by rank.

    Args:
        timeout: seconds after which ranks hang. Generous: what matters is that a hang ends.

    Raises:
        AssertionError: with each failed rank's last output.
    """
    while len(_pool) < world_size:
        _pool.append(Rank())
    ranks = _pool[:world_size]
    variables = {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    try:
        for number, rank in enumerate(ranks):
            its_own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            rank.calls.send((function, json.dumps(args), variables | its_own, timeout))
        return _results(ranks, timeout)
    except BaseException:
        stop_ranks()
        raise


def _results(ranks: list[Rank], timeout: float) -> list:
    """What the ranks answer. Once one has failed, the others get 3 seconds: they may fail for a better reason."""
    results, end = {}, time.monotonic() + timeout
    waiting = {rank.calls: number for number, rank in enumerate(ranks)}
    while waiting and (ready := multiprocessing.connection.wait(list(waiting), max(0, end - time.monotonic()))):
        for calls in ready:
            number = waiting.pop(calls)
            try:
                results[number] = json.loads(calls.recv())
            except (EOFError, ConnectionResetError):
                end = min(end, time.monotonic() + 3)
    problems = [f"rank {number} gave no result:\n{rank.output()}" for number, rank in enumerate(ranks)
                if number not in results]
    assert not problems, "\n".join(problems)
    return [results[number] for number in range(len(ranks))]


@atexit.register
def stop_ranks() -> None:
    """End the pool; the next test starts another one."""
    while _pool:
        _pool.pop().kill()


def start_script(path: Path, *flags: str, before: str = "") -> Process:
    """`python path flags…`, after the statements of `before`, forked from a process with everything imported."""
    return Process(_run_script, str(path), flags, before)


def run_script(path: Path, *flags: str, before: str = "") -> tuple[int, str]:
    """The same; its exit code, negative for a signal, and its output."""
    process = start_script(path, *flags, before=before)
    try:
        process.process.join(600)
        return process.process.exitcode, process.output()
    finally:
        process.kill()


# ---------------------------------------------------------------- in a rank


def enter_world(size: int) -> bool:
    """Start torch.distributed among the first `size` ranks; False in those that are left out.

    Worlds may follow one another, each left by groups.shut_down(): every rank calls this for each of them. (Over
    init_method="file://…" the ranks that wait for a world keep the processors busy.)
    """
    import torch.distributed as dist

    from megatron_ebft.common.device import backend

    rank, number = int(os.environ["RANK"]), next(_worlds)
    if rank < size:
        dist.init_process_group(backend(), store=dist.PrefixStore(str(number), _store(os.environ["MASTER_PORT"])),
                                rank=rank, world_size=size)
    return rank < size


_worlds = itertools.count()


@functools.lru_cache(maxsize=1)
def _store(port: str):
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(port), is_master=os.environ["RANK"] == "0", wait_for_workers=False)


def spare_the_collector() -> None:
    """Exempt from garbage collection what this process was forked with: a million objects of imported modules. Going
    through them took a third of the time of a short run, since Megatron-Core collects at every save."""
    gc.freeze()


def _with_output_in(log: str, target, args: tuple) -> None:
    end_with_parent()  # the server ends when a test run is killed
    spare_the_collector()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(ENVIRONMENT)
    os.chdir(TESTS.parent)
    sys.path[:0] = map(str, FOLDERS)
    target(*args)


def _run_script(path: str, flags: list[str], before: str) -> None:
    exec(before, {})
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def _serve(calls: multiprocessing.connection.Connection) -> None:
    """Answer calls until the test's process closes the pipe. An error ends the rank, its traceback in the log."""
    global _worlds
    import torch.distributed as dist

    while True:
        try:
            function, args, variables, timeout = calls.recv()
        except EOFError:
            os._exit(0)
        os.ftruncate(1, 0)
        os.environ.update(variables)
        _worlds = itertools.count()
        faulthandler.dump_traceback_later(timeout - 1)  # shows where a rank waits for ever
        result = _find(function)(*json.loads(args))
        faulthandler.cancel_dump_traceback_later()
        assert not dist.is_initialized(), f"{function} has left its process groups to the next test"
        calls.send(json.dumps(result))


@functools.cache
def _find(name: str):
    """The function 'module:function' of a file anywhere in tests/."""
    module, function = name.split(":")
    if module not in sys.modules:
        path, = TESTS.rglob(f"{module}.py")
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], function)
