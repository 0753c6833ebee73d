"""Checkpoint folders: names, the latest pointer, what is whole and what is damaged, and how a save becomes visible.

A checkpoint is whole when every file has the size and the checksum (CRC-32, which notices any flipped byte) that its
manifest says. Ranks sum up the files they wrote themselves, and share out the reading when one is checked.
"""

import contextlib
import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
import zlib

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ebft.common.progress import Countdown, gigabytes

POINTER, RECORD, MANIFEST = "latest_checkpointed_iteration.txt", "ebft.json", "manifest.json"
FORMAT = 3
"""Of a checkpoint, as its record says; 1 kept the optimizer's state as it lay on the ranks, 2 had no checksums."""
SPARE, SPARE_BYTES = "spare", 1 << 25
"""A file that holds room, while tensors are written, for the small files that make a checkpoint whole."""
UNREADABLE = (CheckpointingException, CheckpointException, pickle.UnpicklingError, zipfile.BadZipFile, EOFError,
              OSError, RuntimeError, KeyError, ValueError, AttributeError, IndexError, ImportError, TypeError)
"""What damaged files make torch and Megatron-Core raise."""
UNWRITABLE = ("iostream error", "PytorchStreamWriter", "inline_container", "Worker failure", "results_queue",
              "Incomplete worker results")
"""In the messages of RuntimeErrors that mean an OSError, or a writing process that is gone."""


def read_metadata(directory: str, *, flag: str = "--load") -> dict:
    """The metadata dict that was saved; needs no process groups. Raises ValueError as load_checkpoint does."""
    return read_record(resolve(directory, flag), flag)["metadata"]


def read_record(folder: str, flag: str) -> dict:
    """The ebft.json of a checkpoint folder.

    Raises:
        ValueError: it is damaged, or another version of this package wrote it.
    """
    record = read_json(folder, RECORD, flag)
    with reading(folder, flag):
        number = record["format"]
    if number == FORMAT:
        check_whole(folder, flag, is_chosen=lambda name: name == RECORD)
        return record
    raise ValueError(f"{flag} {folder}: a checkpoint of format {number}, and this version reads format {FORMAT}; load "
                     "it with the version of megatron_ebft that wrote it, or name another one")


def latest_iteration(directory: str, *, flag: str = "--load") -> int | None:
    """Iteration of the newest complete checkpoint, or None where there is none; needs no process groups.

    Raises:
        ValueError: the pointer holds no iteration, or one whose folder is not there.
    """
    complete, text = complete_iterations(directory), _pointer(directory)
    if text is None:
        return max(complete, default=None)
    if not text.isdecimal() or int(text) not in complete:
        raise ValueError(f"{flag} {directory}: {POINTER} says {text!r}, but complete checkpoints there are "
                         f"{_listed(complete)}; write one of these iterations into {os.path.join(directory, POINTER)}, "
                         "or remove that file")
    return int(text)


def _pointer(directory: str) -> str | None:
    """What the pointer says; None where there is none."""
    path = os.path.join(directory, POINTER)
    if not os.path.exists(path):
        return None
    with open(path, errors="replace") as file:
        return file.read().strip()


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def complete_iterations(directory: str) -> list[int]:
    """Iterations whose folder was renamed to its final name (or kept as `.old` by a save killed at that moment)."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = {int(match[1]) for match in (re.fullmatch(r"iter_(\d{7,})(\.old)?", name) for name in names)
             if match and os.path.exists(os.path.join(directory, match[0], MANIFEST))}
    return sorted(found)


def _listed(iterations: list[int]) -> str:
    return ", ".join(map(str, iterations)) or "none"


def resolve(directory: str, flag: str) -> str:
    """The checkpoint folder meant by a directory: itself, or the one its pointer names."""
    if not os.path.isdir(directory):
        raise ValueError(f"{flag} {directory}: no such directory; name one that --save wrote")
    if os.path.exists(os.path.join(directory, RECORD)):
        return directory
    iteration = latest_iteration(directory, flag=flag)
    if iteration is None:
        raise ValueError(f"{flag} {directory}: no complete checkpoint there (no iter_* folder with {MANIFEST}); name a "
                         f"directory that --save wrote")
    return resolve_iteration(directory, iteration)


def resolve_iteration(directory: str, iteration: int) -> str:
    """The folder of a complete checkpoint."""
    folder = os.path.join(directory, folder_name(iteration))
    return folder if os.path.isdir(folder) else folder + ".old"


def newest_first(directory: str, flag: str) -> list[str]:
    """The folders a run may continue from: the one meant by the directory, and those of the iterations before it."""
    if os.path.exists(os.path.join(directory, RECORD)):
        return [directory]
    complete, text = complete_iterations(directory), _pointer(directory)
    if text is not None and text.isdecimal():  # its own checkpoint may be too damaged to count as complete
        complete = [number for number in complete if number <= int(text)]
    if not complete or text is not None and not text.isdecimal():
        resolve(directory, flag)  # says what is wrong
    return [resolve_iteration(directory, number) for number in reversed(complete)]


def first_readable(directory: str, flag: str) -> tuple[str, dict]:
    """Folder and record of the newest checkpoint whose record is whole; ValueError about the newest where none is."""
    problems = []
    for folder in newest_first(directory, flag):
        try:
            return folder, read_record(folder, flag)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def clear_leftovers(directory: str) -> None:
    """Remove what killed saves left; a replaced checkpoint whose successor never came gets its name back."""
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        final = path.removesuffix(".old")
        is_replaced = re.fullmatch(r"iter_\d{7,}\.old", name) and os.path.isdir(final)
        if re.fullmatch(r"iter_\d{7,}\.tmp\.\w+", name) or is_replaced:
            shutil.rmtree(path, ignore_errors=True)  # a killed rank's writing process may still be at work there
        elif re.fullmatch(r"iter_\d{7,}\.old", name):
            os.rename(path, final)


def leftover_bytes(directory: str) -> int:
    """Bytes that the next save's clear_leftovers will free."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    paths = [os.path.join(parent, file) for name in names if re.fullmatch(r"iter_\d{7,}\.tmp\.\w+", name)
             for parent, _, files in os.walk(os.path.join(directory, name)) for file in files]
    return sum(os.path.getsize(path) for path in paths)


def temporary_name(iteration: int) -> str:
    """Where a save is written: no other save, of this process or a killed one, writes there."""
    return f"{folder_name(iteration)}.tmp.{secrets.token_hex(4)}"


def hold_space(temporary: str) -> None:
    """Reserve room for the small files; released by `release_space`."""
    with open(os.path.join(temporary, SPARE), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)


def release_space(temporary: str) -> None:
    os.remove(os.path.join(temporary, SPARE))


def write_sums(folder: str, rank: int) -> None:
    """Leave the checksums of the tensors that a rank wrote, for the commit."""
    names = [name for name in os.listdir(folder) if name.startswith(f"__{rank}_")]
    write_json(os.path.join(folder, f"sums_{rank}.json"), {name: _sum(os.path.join(folder, name)) for name in names})


def seal(temporary: str) -> None:
    """Write the manifest of a finished temporary folder, and everything to the disk."""
    sums = {}
    for name in os.listdir(temporary):
        if re.fullmatch(r"sums_\d+\.json", name):
            with open(os.path.join(temporary, name)) as file:
                sums |= json.load(file)
            os.remove(os.path.join(temporary, name))
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(temporary) for name in sorted(names)]
    manifest = {}
    for path in paths:
        sync(path)
        name = os.path.relpath(path, temporary)
        manifest[name] = {"bytes": os.path.getsize(path), "crc32": sums.get(name) or _sum(path)}
    write_json(os.path.join(temporary, MANIFEST), manifest)
    for parent, _, _ in os.walk(temporary):
        sync(parent)


def publish(directory: str, temporary: str, iteration: int) -> None:
    """Make a sealed folder the checkpoint of its iteration, then the latest one."""
    folder = os.path.join(directory, folder_name(iteration))
    if os.path.isdir(folder):
        os.rename(folder, folder + ".old")
    os.rename(temporary, folder)
    sync(directory)
    pointer = os.path.join(directory, POINTER)
    with open(pointer + ".tmp", "w") as file:
        file.write(str(iteration))
    sync(pointer + ".tmp")
    os.replace(pointer + ".tmp", pointer)
    sync(directory)
    shutil.rmtree(folder + ".old", ignore_errors=True)


def drop_old(directory: str, keep: int, retain_interval: int) -> None:
    """Remove all but the `keep` newest checkpoints (0: all are kept) and those of every `retain_interval` steps.

    Those after the latest are not among the newest: a run that went back, from a damaged one, has left them behind.
    """
    latest, complete = latest_iteration(directory), complete_iterations(directory)
    kept = [iteration for iteration in complete if iteration <= latest][-keep:]
    for iteration in complete if keep else []:
        is_retained = retain_interval and iteration % retain_interval == 0 and iteration < latest
        if iteration not in kept and not is_retained:
            doomed = os.path.join(directory, temporary_name(iteration))  # from now on no checkpoint
            os.rename(resolve_iteration(directory, iteration), doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _sum(path: str) -> str:
    """CRC-32 of a file, hexadecimal."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
    return f"{total:08x}"


def sync(path: str) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, value: dict) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
    sync(path)


def read_json(folder: str, name: str, flag: str) -> dict:
    with reading(folder, flag), open(os.path.join(folder, name)) as file:
        return json.load(file)


def check_sizes(folder: str, flag: str, part: int = 0, parts: int = 1, is_chosen=lambda name: True
                ) -> list[tuple[int, str, str]]:
    """ValueError, naming the file, unless the files of a checkpoint have the sizes its manifest says.

    Args:
        part, parts: look at this share of the files only.
        is_chosen: and only at those whose name it accepts.

    Returns:
        bytes, name and checksum of each, the largest first.
    """
    manifest = read_json(folder, MANIFEST, flag)
    with reading(folder, flag):
        files = sorted(((entry["bytes"], name, entry["crc32"]) for name, entry in manifest.items() if is_chosen(name)),
                       reverse=True)
    for size, name, _ in files[part::parts]:
        path = os.path.join(folder, name)
        there = os.path.getsize(path) if os.path.exists(path) else None
        if there != size:
            raise damaged(folder, flag, f"{name} is missing" if there is None else
                          f"{name} has {there} bytes instead of {size}")
    return files[part::parts]


def check_whole(folder: str, flag: str, part: int = 0, parts: int = 1, say=lambda line: None,
                is_chosen=lambda name: True) -> None:
    """The same for the content of the files, by their checksums.

    Args:
        say: is told how far it is, every ten seconds.
    """
    files = check_sizes(folder, flag, part, parts, is_chosen)
    countdown = Countdown("checked", sum(size for size, _, _ in files), say, gigabytes)
    for size, name, crc32 in files:
        if _sum(os.path.join(folder, name)) != crc32:
            raise damaged(folder, flag, f"{name} is not what was written: its checksum differs")
        countdown.add(size)


def damaged(folder: str, flag: str, what: str) -> ValueError:
    directory, name = os.path.split(os.path.abspath(folder))
    older = [iteration for iteration in complete_iterations(directory) if folder_name(iteration) != name]
    return ValueError(f"{flag} {folder}: the checkpoint is damaged ({what}); remove that folder and write another "
                      f"iteration (there: {_listed(older)}) into {os.path.join(directory, POINTER)}")


@contextlib.contextmanager
def reading(folder: str, flag: str):
    """Turn what damaged files raise into a ValueError that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise damaged(folder, flag, f"{type(error).__name__}: {error}"[:300]) from error


@contextlib.contextmanager
def writing(directory: str, flag: str, otherwise: str = "Earlier checkpoints are untouched"):
    """Turn what a full or forbidden disk raises into a ValueError that names the directory; what else was raised while
    tensors were made or written comes out of torch's and Megatron-Core's wrappers as it was."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        cause = _cause(error)
        is_elsewhere = isinstance(cause, CheckpointException)  # without failures: rank 0 knows what failed, and where
        if not (is_elsewhere or isinstance(cause, OSError) or any(text in str(cause) for text in UNWRITABLE)):
            raise cause from (error if cause is not error else None)
        raise ValueError(f"{flag} {directory}: cannot write there ({cause}); free space or name another directory. "
                         f"{otherwise}") from error


def _cause(error: BaseException) -> BaseException:
    """What a failed save failed of."""
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
            continue
        within = error.__cause__ or error.__context__  # torch's writer hides an OSError behind its own trouble
        if not isinstance(error, RuntimeError | CheckpointingException) or within is None:
            return error
        error = within
