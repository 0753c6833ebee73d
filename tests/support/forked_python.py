#!/usr/bin/env -S python3 -S -E
"""Stands in for python in a script under test: `forked_python.py -c CODE ARGUMENTS...`

The test's process forks one that has imported the package, which saves ten processor seconds for each start. The
forked process writes to the files of this one and ends with the same code.
"""

import json
import os
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "FORKED_PYTHON"


@contextmanager
def forked_python(folder: Path):
    """Variables for a script that reads PYTHON. The socket is in the folder."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "forked_python"))
        listener.listen()
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield {"PYTHON": __file__, ADDRESS: listener.getsockname()}


def _serve(listener: socket.socket) -> None:
    """One start after another, until the listener is closed."""
    from ranks import server

    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        with caller, caller.makefile("rw") as file:
            process = server().Process(target=_run, args=json.loads(file.readline()))
            process.start()
            process.join()
            file.write(str(process.exitcode))


def _run(caller: int, folder: str, variables: dict[str, str], arguments: list[str]) -> None:
    from ranks import spare_the_collector

    spare_the_collector()
    for stream in (1, 2):
        os.dup2(os.open(f"/proc/{caller}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:0] = variables["PYTHONPATH"].split(":")
    assert arguments[0] == "-c"
    sys.argv = ["-c", *arguments[2:]]
    exec(arguments[1], {"__name__": "__main__"})


def main() -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        with connection.makefile("rw") as file:
            file.write(json.dumps([os.getpid(), os.getcwd(), dict(os.environ), sys.argv[1:]]) + "\n")
            file.flush()
            return int(file.read())


if __name__ == "__main__":
    sys.exit(main())
