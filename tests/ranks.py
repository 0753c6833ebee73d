"""Starts the ranks of a multi-rank test on one machine: `run_ranks(2, "test_x:function", arg)`.

Each rank is a process with torchrun's environment that calls function(*args); the function
starts the process groups itself. Ranks on CPUs talk over gloo, so these tests need no GPU.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent


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
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{rank}.json") for rank in range(world_size)]
        logs = [open(Path(folder, f"{rank}.log"), "w+") for rank in range(world_size)]
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
                "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
            command = [sys.executable, __file__, function, str(results[rank]), str(timeout), *map(json.dumps, args)]
            processes.append(subprocess.Popen(command, env=environment, cwd=TESTS.parent, stdout=logs[rank],
                                              stderr=subprocess.STDOUT))
        try:
            _wait(processes, timeout)
            problems = [f"rank {rank} ended with {process.poll()}:\n{_tail(log)}"
                        for rank, (process, log) in enumerate(zip(processes, logs)) if process.poll() != 0]
            assert not problems, "\n".join(problems)
            return [json.loads(result.read_text()) for result in results]
        finally:
            for process, log in zip(processes, logs):
                process.kill()
                process.wait()
                log.close()


def _wait(processes: list, timeout: float) -> None:
    """Until all have ended; a few seconds more once one has failed (the others may fail for a better reason)."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + 3)
        time.sleep(0.05)


def _tail(log, characters: int = 6000) -> str:
    log.seek(0)
    return log.read()[-characters:]


def _main() -> None:
    """One rank: python ranks.py module:function result_file timeout args…"""
    faulthandler.dump_traceback_later(float(sys.argv[3]) - 1)  # shows where a rank waits for ever
    sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "tools"),
                    str(TESTS.parent / "tools/convert")]
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), name)(*map(json.loads, sys.argv[4:]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
