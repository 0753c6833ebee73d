"""Writes that survive a crash of the machine."""

import json
import os


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
