"""Reads and writes of files: parsers' errors name the file, passing errors are waited out, writes survive a crash, and
folders are tried before they are needed."""

import contextlib
import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PASSING = frozenset(getattr(errno, name) for name in (
    "ESTALE", "EIO", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EREMOTEIO", "ENOLINK", "ECOMM", "ENOTCONN", "ESHUTDOWN",
    "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH",
    "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"))
"""Numbers of OSErrors that say nothing about the file: a filesystem, a network or a machine is in trouble."""
PAUSES = (1, 4, 15, 40)
"""Seconds before each further attempt to read."""
MOST_LEVELS = 100
"""Deepest nesting of a JSON file."""


def is_passing(error: BaseException) -> bool:
    """Whether the same read may succeed later."""
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(read, *args):
    """read(*args), repeated after a pause while it fails with a passing error.

    Raises:
        OSError: one that is_passing, after the last attempt; any other at once.
    """
    for pause in PAUSES:
        try:
            return read(*args)
        except OSError as error:
            if not is_passing(error):
                raise
            print(f"warning: {error}: trying again in {pause} s", flush=True)
            time.sleep(pause)
    return read(*args)


def file_mode(path: str) -> int:
    """The mode of what a path names, as in os.stat; 0 if there is nothing, or nothing that may be seen.

    os.path.exists and its kin take a passing error of the filesystem for a missing file.
    """
    try:
        return patiently(os.stat, path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if is_passing(error):
            raise
        return 0


def is_folder(path: str) -> bool:
    """Whether a path names a folder, or a link to one."""
    return stat.S_ISDIR(file_mode(path))


def is_regular(path: str) -> bool:
    """Whether a path names a regular file, or a link to one. A device may never end, a FIFO may never begin."""
    return stat.S_ISREG(file_mode(path))


def names_in(folder: str) -> list[str]:
    """Names in a folder; none if it does not exist.

    Raises:
        ValueError: it may not be listed.
    """
    try:
        return patiently(os.listdir, folder) if is_folder(folder) else []
    except PermissionError as error:
        raise ValueError(f"{folder}: may not be listed ({error.strerror}); make it readable") from error


def is_inside(name: str) -> bool:
    """Whether a name in a file's list stays below the folder of the list: relative, without `..`."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.split("/") and "\0" not in name


def unreadable(error: Exception, where: str, what: str = "cannot be read") -> Exception:
    """What to raise for an error of reading a file: a passing error stays one, others are the user's to mend.

    Args:
        where: flag and file.
    """
    if is_passing(error):
        return OSError(error.errno, f"{where}: {os.strerror(error.errno)}: the filesystem did not answer; start the "
                       "same command again")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ValueError(f"{where} {what} ({reason}); copy it again")


def read_bytes(path: str) -> bytes:
    """Content of a regular file.

    Raises:
        ValueError: it is a folder, a device or a FIFO; names the file.
        OSError: it is missing or cannot be read.
    """
    if not is_regular(path) and file_mode(path):
        raise ValueError(f"{path} is no regular file; put a copy of the file there")

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return patiently(read)


def read_json(path: str, where: str = "", kind: type = dict):
    """Content of a JSON file: an object, or a value of another `kind`.

    Args:
        where: what names the file in errors; default: its path.

    Raises:
        ValueError: it is missing or cannot be read, is not JSON, or its value is of another kind; begins with `where`.
        OSError: a passing one.
    """
    try:
        content = read_bytes(path)
    except (OSError, ValueError) as error:
        raise unreadable(error, where or path) from error
    return parse_json(content, where or path, kind)


def parse_json(content: bytes | str, where: str, kind: type = dict):
    """As `read_json`, of a content in memory."""
    try:
        value = json.loads(content)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not JSON ({reason}); copy it again") from error
    if not isinstance(value, kind):
        name = {dict: "object", list: "array"}.get(kind, kind.__name__)
        raise ValueError(f"{where} is not a JSON {name}; copy it again")
    return value


def _check_depth(value) -> None:
    """RecursionError if a value is nested so deeply that printing it, say, could fail later."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [x for part in level if isinstance(part, dict | list)
                 for x in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return
    raise RecursionError


def sync(path: str) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: dict) -> None:
    """Write an indented JSON file and flush it to the disk, if it is on one: /dev/stdout is not."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
    if os.path.isfile(path):
        sync(f"{path}")


@contextlib.contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """Where to write a file. It gets its name, and replaces an older one, when the block has ended without an error."""
    path = Path(path)
    if path.exists() and not path.is_file():  # /dev/stdout
        yield path
        return
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")  # some writers go by the suffix
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(folder: str, flag: str) -> str:
    """The folder, or the first above it that exists, after a file was written there and removed.

    Raises:
        ValueError: it cannot be written, or is full; names the flag.
    """
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))  # a full disk still takes names
    except OSError as error:
        raise ValueError(f"{flag} {folder}: {there} cannot be written ({error.strerror}); name another folder, or make "
                         "this one writable") from error
    return there
