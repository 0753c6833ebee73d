"""The manifest: size and checksum of every file of a checkpoint.

A checkpoint is whole when every file has the size and the CRC-32 of its manifest. CRC-32 notices any flipped byte.
Each rank sums up the files it wrote. Ranks share the reading when a checkpoint is checked.
"""

import os
import re
import zlib

from megatron_ebft.checkpointing.errors import reading
from megatron_ebft.checkpointing.folders import MANIFEST, METADATA, RECORD
from megatron_ebft.common.disk import file_mode, is_inside, is_regular, patiently, read_json, sync, write_json
from megatron_ebft.common.progress import Progress, gigabytes


def write_sums(folder: str, rank: int) -> None:
    """Write `sums_<rank>.json`, the checksums of the tensor files of a rank; `seal` collects these files."""
    names = [name for name in os.listdir(folder) if name.startswith(f"__{rank}_")]
    write_json(os.path.join(folder, f"sums_{rank}.json"),
               {name: _crc32(os.path.join(folder, name)) for name in names})


def seal(temporary: str) -> None:
    """Write the manifest of a finished temporary folder, and flush everything to the disk."""
    sums = {}
    for name in os.listdir(temporary):
        if re.fullmatch(r"sums_\d+\.json", name):
            sums |= read_json(os.path.join(temporary, name))
            os.remove(os.path.join(temporary, name))
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(temporary) for name in sorted(names)]
    manifest = {}
    for path in paths:
        sync(path)
        name = os.path.relpath(path, temporary)
        manifest[name] = {"bytes": os.path.getsize(path), "crc32": sums.get(name) or _crc32(path)}
    write_json(os.path.join(temporary, MANIFEST), manifest)
    for parent, _, _ in os.walk(temporary):
        sync(parent)


def check_sizes(folder: str, flag: str, part: int = 0, parts: int = 1, is_chosen=lambda name: True
                ) -> list[tuple[int, str, str]]:
    """Compare the sizes of a checkpoint's files with its manifest.

    Args:
        part, parts: check only this share of the files.
        is_chosen: check only the files whose name it accepts.

    Returns:
        bytes, name and checksum of each file that was checked, the largest first.

    Raises:
        ValueError: a file is missing, is a device or a FIFO, or has another size; names the file.
    """
    with reading(folder, flag):
        manifest = read_json(os.path.join(folder, MANIFEST), MANIFEST)
        for name, entry in manifest.items():
            if not is_inside(name):
                raise ValueError(f"{MANIFEST} names {name!r}, outside the checkpoint's folder")
            if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("bytes", "crc32")] != [int, str]:
                raise ValueError(f"{MANIFEST} says {entry!r} of {name}")
        if not {RECORD, METADATA} <= manifest.keys():
            raise ValueError(f"{MANIFEST} does not name {RECORD} and {METADATA}")
        files = sorted(((entry["bytes"], name, entry["crc32"]) for name, entry in manifest.items() if is_chosen(name)),
                       reverse=True)
        for size, name, _ in files[part::parts]:
            path = os.path.join(folder, name)
            if not is_regular(path):
                raise ValueError(f"{name} is {'no regular file' if file_mode(path) else 'missing'}")
            actual = patiently(os.path.getsize, path)
            if actual != size:
                raise ValueError(f"{name} has {actual} bytes instead of {size}")
    return files[part::parts]


def check_whole(folder: str, flag: str, part: int = 0, parts: int = 1, say=lambda line: None,
                is_chosen=lambda name: True) -> None:
    """Compare sizes and checksums of a checkpoint's files with its manifest.

    Args:
        part, parts, is_chosen: as `check_sizes`.
        say: receives a progress line every ten seconds.

    Raises:
        ValueError: a file is missing or differs; names the file.
    """
    files = check_sizes(folder, flag, part, parts, is_chosen)
    progress = Progress("checked", sum(size for size, _, _ in files), say, gigabytes)
    with reading(folder, flag):
        for size, name, crc32 in files:
            if patiently(_crc32, os.path.join(folder, name)) != crc32:
                raise ValueError(f"{name} is not what was written: its checksum differs")
            progress.add(size)


def _crc32(path: str) -> str:
    """CRC-32 of a file, hexadecimal."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
    return f"{total:08x}"
