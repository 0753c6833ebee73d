"""Writes JSON Lines: a file that appears whole, or a pipe, a device or the console as the lines come."""

import contextlib
import json
import os
import stat
import sys


def check_output(path: str | None, flag: str) -> None:
    """Raise ValueError, naming the flag, if a file could not be written there."""
    if path is None:
        return
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"{flag} {path}: {folder} is no folder that can be written to")


def as_line(fields: dict) -> str:
    """A line of JSON, in UTF-8 where it can be."""
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        line = json.dumps(fields)
    return line + "\n"


class LinesFile:
    """The lines are in a temporary file until the context ends without an error.

    Args:
        path: None: the console.
        flag: that named the path, for errors.
    """

    def __init__(self, path: str | None, flag: str):
        self.path, self.flag, self.temporary = path and os.path.realpath(path), flag, None
        with self._writing():
            if path is None:
                self.file = sys.stdout
            elif os.path.exists(self.path) and not stat.S_ISREG(os.stat(self.path).st_mode):
                self.file = open(self.path, "w", encoding="utf-8")
            else:
                self.temporary = f"{self.path}.{os.getpid()}.tmp"
                self.file = open(self.temporary, "w", encoding="utf-8")

    def write(self, fields: dict) -> None:
        self.write_line(as_line(fields))

    def write_line(self, line: str) -> None:
        """Write a line that is JSON already, with its end."""
        with self._writing():
            self.file.write(line)

    def __enter__(self) -> "LinesFile":
        return self

    def __exit__(self, kind, *exc) -> None:
        try:
            with self._writing():
                self.file.flush() if self.file is sys.stdout else self.file.close()
                if kind is None and self.temporary:
                    os.replace(self.temporary, self.path)
        finally:
            if self.temporary:
                with contextlib.suppress(OSError):
                    os.remove(self.temporary)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise ValueError(f"{self.flag} {self.path}: cannot be written ({error.strerror})") from error
