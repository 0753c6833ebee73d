"""Starts the ranks of a multi-rank test on one machine: `run_ranks(2, "test_x:function", arg)`.

Each rank is a process with torchrun's environment that calls function(*args); the function
starts the process groups itself. Ranks on CPUs talk over gloo, so these tests need no GPU.
"""

import contextlib
import faulthandler
import functools
import importlib
import itertools
import json
import multiprocessing
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

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


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


def run_ranks(world_size: int, function: str, *args, timeout: float = 120.0) -> list:
    """Call 'module:function' (a module of this folder) with JSON arguments on every rank; their JSON results by rank.

    Raises:
        AssertionError: with each failed rank's last output; the other ranks are stopped.
    """
    environment = {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{rank}.json") for rank in range(world_size)]
        logs = [open(Path(folder, f"{rank}.log"), "w+") for rank in range(world_size)]
        processes = []
        for rank in range(world_size):
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(server().Process(target=_rank, args=(
                function, args, variables, str(results[rank]), logs[rank].name, timeout)))
            processes[-1].start()
        try:
            _wait(processes, timeout)
            problems = [f"rank {rank} ended with {process.exitcode}:\n{_tail(log)}"
                        for rank, (process, log) in enumerate(zip(processes, logs)) if process.exitcode != 0]
            assert not problems, "\n".join(problems)
            return [json.loads(result.read_text()) for result in results]
        finally:
            for process, log in zip(processes, logs):
                process.kill()
                process.join()
                log.close()


def run_script(path: Path, *flags: str, before: str = "") -> tuple[int, str]:
    """`python path flags…`, after the statements of `before`; its exit code, negative for a signal, and its output."""
    with tempfile.NamedTemporaryFile("w+") as log:
        process = server().Process(target=_rank, args=("ranks:script", (str(path), flags, before), {}, os.devnull,
                                                       log.name, 120.0))
        process.start()
        try:
            process.join(120)
            return process.exitcode, _tail(log)
        finally:
            process.kill()
            process.join()


def script(path: str, flags: list[str], before: str) -> None:
    exec(before, {})
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def enter_world(size: int) -> bool:
    """In a rank: start torch.distributed among the first `size` ranks; False in those that are left out.

    Worlds may follow one another, each left by parallel.shut_down(): every rank calls this for each of them. (Over
    init_method="file://…" the ranks that wait for a world keep the processors busy.)
    """
    import torch.distributed as dist

    from megatron_ebft.common.device import backend

    rank, number = int(os.environ["RANK"]), next(_worlds)
    if rank < size:
        dist.init_process_group(backend(), store=dist.PrefixStore(str(number), _store()), rank=rank, world_size=size)
    return rank < size


_worlds = itertools.count()


@functools.cache
def _store():
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=os.environ["RANK"] == "0",
                    wait_for_workers=False)


def _wait(processes: list, timeout: float) -> None:
    """Until all have ended; a few seconds more once one has failed (the others may fail for a better reason)."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 3)
        time.sleep(0.05)


def _tail(log, characters: int = 6000) -> str:
    log.seek(0)
    return log.read()[-characters:]


def _rank(function: str, args: tuple, variables: dict[str, str], result: str, log: str, timeout: float) -> None:
    """What one rank does, in a process of its own."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.dump_traceback_later(timeout - 1)  # shows where a rank waits for ever
    os.environ.update(ENVIRONMENT | variables)
    os.chdir(TESTS.parent)
    folders = [TESTS.parent, TESTS.parent / "tools", TESTS.parent / "tools" / "convert"]
    sys.path[:0] = [str(folder) for folder in (*folders, *filter(Path.is_dir, TESTS.iterdir()))]
    module, name = function.split(":")
    found = getattr(importlib.import_module(module), name)(*json.loads(json.dumps(args)))
    Path(result).write_text(json.dumps(found))
