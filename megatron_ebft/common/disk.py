"""Writes that survive a crash of the machine; and whether a folder can be written at all."""

import json
import os
import tempfile


def sync(path: str) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, value: dict) -> None:
    """Write an indented JSON file and flush it to the disk."""
    with open(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
    sync(path)


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
