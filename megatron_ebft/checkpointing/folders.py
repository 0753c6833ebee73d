"""The folders of a checkpoint directory: their names, the pointer to the latest, and the life of a folder.

1. A save writes into `iter_0000100.tmp.<random>`. `publish` renames that folder to `iter_0000100` and then replaces
   the pointer. A killed save leaves the older checkpoint as the latest.
2. A save over an existing iteration renames the old folder to `.old` until the new one stands.
3. A checkpoint counts as complete once its folder has the final name and holds a manifest (manifest.py).
"""

import os
import re
import secrets
import shutil
from collections.abc import Collection

from megatron_ebft.common.disk import file_mode, is_folder, names_in, read_bytes, sync

POINTER, RECORD, MANIFEST, METADATA = "latest_checkpointed_iteration.txt", "ebft.json", "manifest.json", ".metadata"


def folder_name(iteration: int) -> str:
    """Final name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def temporary_name(iteration: int) -> str:
    """Name of the folder that a save writes into. It is random, since a killed save may still write into its own."""
    return f"{folder_name(iteration)}.tmp.{secrets.token_hex(4)}"


def complete_iterations(directory: str) -> list[int]:
    """Iterations with a complete checkpoint, ascending, including those kept as `.old` by a killed save."""
    matches = filter(None, (re.fullmatch(r"iter_(\d{7,18})(\.old)?", name) for name in names_in(directory)))
    return sorted({int(match[1]) for match in matches if file_mode(os.path.join(directory, match[0], MANIFEST))})


def listed(iterations: list[int]) -> str:
    """Iterations in words, for messages."""
    return ", ".join(map(str, iterations)) or "none"


def latest_iteration(directory: str, *, flag: str = "--load") -> int | None:
    """Iteration of the latest complete checkpoint, or None if there is none. Needs no process groups.

    Raises:
        ValueError: the pointer holds no iteration, or names an iteration without a complete checkpoint.
    """
    complete, text = complete_iterations(directory), _pointer(directory)
    if text is None:
        return max(complete, default=None)
    if not _is_iteration(text) or int(text) not in complete:
        raise ValueError(f"{flag} {directory}: {POINTER} says {text!r}, but complete checkpoints there are "
                         f"{listed(complete)}; write one of these iterations into {os.path.join(directory, POINTER)}, "
                         "or remove that file")
    return int(text)


def _pointer(directory: str) -> str | None:
    """Content of the pointer file; None if there is no such file."""
    path = os.path.join(directory, POINTER)
    return read_bytes(path).decode(errors="replace").strip()[:80] if file_mode(path) else None


def _is_iteration(text: str) -> bool:
    """Whether a pointer's text is a number."""
    return re.fullmatch("[0-9]{1,18}", text) is not None


def resolve(directory: str, flag: str) -> str:
    """The checkpoint folder that a directory stands for: the directory itself, or the folder its pointer names.

    Raises:
        ValueError: no such directory, no complete checkpoint in it, or a wrong pointer.
    """
    if not is_folder(directory):
        raise ValueError(f"{flag} {directory}: no such directory; name one that --save wrote")
    if file_mode(os.path.join(directory, RECORD)):
        return directory
    iteration = latest_iteration(directory, flag=flag)
    if iteration is None:
        raise ValueError(f"{flag} {directory}: no complete checkpoint there (no iter_* folder with {MANIFEST}); name a "
                         "directory that --save wrote")
    return _resolve_iteration(directory, iteration)


def _resolve_iteration(directory: str, iteration: int) -> str:
    """The folder of a complete checkpoint."""
    folder = os.path.join(directory, folder_name(iteration))
    return folder if is_folder(folder) else folder + ".old"


def newest_first(directory: str, flag: str) -> list[str]:
    """The folders a run may continue from: the latest checkpoint, then the older ones, newest first.

    Raises:
        ValueError: as `resolve`.
    """
    if file_mode(os.path.join(directory, RECORD)):
        return [directory]
    complete, text = complete_iterations(directory), _pointer(directory)
    if text is not None and _is_iteration(text):  # damage may keep the named checkpoint from counting as complete
        complete = [number for number in complete if number <= int(text)]
    if not complete or text is not None and not _is_iteration(text):
        resolve(directory, flag)  # raises, and names the problem
    return [_resolve_iteration(directory, number) for number in reversed(complete)]


def publish(directory: str, temporary: str, iteration: int) -> None:
    """Make a sealed folder the checkpoint of its iteration, then make it the latest."""
    folder = os.path.join(directory, folder_name(iteration))
    if is_folder(folder):
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


def drop_old(directory: str, keep: int, retain_interval: int, in_use: Collection[int] = ()) -> None:
    """Keep the `keep` newest checkpoints (0: keep all), every `retain_interval`-th one and those in use; remove the
    others.

    A run that went back from a damaged checkpoint leaves later iterations behind. They are removed as well.
    """
    latest, complete = latest_iteration(directory), complete_iterations(directory)
    kept = [iteration for iteration in complete if iteration <= latest][-keep:]
    for iteration in complete if keep else []:
        is_retained = retain_interval and iteration % retain_interval == 0 and iteration < latest
        if iteration not in kept and iteration not in in_use and not is_retained:
            doomed = os.path.join(directory, temporary_name(iteration))
            os.rename(_resolve_iteration(directory, iteration), doomed)  # no longer a checkpoint, even if killed here
            shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(directory: str) -> None:
    """Remove what killed saves left, and make the directory if it is missing.

    A checkpoint that was moved to `.old`, and whose successor never appeared, gets its name back.
    """
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        final = path.removesuffix(".old")
        is_replaced = re.fullmatch(r"iter_\d{7,}\.old", name) and is_folder(final)
        if re.fullmatch(r"iter_\d{7,}\.tmp\.\w+", name) or is_replaced:
            shutil.rmtree(path, ignore_errors=True)  # the writing process of a killed rank may still be at work there
        elif re.fullmatch(r"iter_\d{7,}\.old", name):
            os.rename(path, final)


def leftover_bytes(directory: str) -> int:
    """Bytes that `clear_leftovers` will free at the next save."""
    paths = [os.path.join(parent, file) for name in names_in(directory) if re.fullmatch(r"iter_\d{7,}\.tmp\.\w+", name)
             for parent, _, files in os.walk(os.path.join(directory, name)) for file in files]
    return sum(os.path.getsize(path) for path in paths)
