"""The record of a checkpoint (ebft.json): format, progress, layout, optimizer and the caller's metadata."""

import json
import os
from dataclasses import dataclass

from megatron_ebft.checkpointing.errors import reading
from megatron_ebft.checkpointing.folders import RECORD, newest_first, resolve
from megatron_ebft.checkpointing.manifest import check_whole

FORMAT, READABLE = 4, (3, 4)
"""Version of the format, and the versions that can be read. Format 1 stored the optimizer's state as it lay on the
ranks, format 2 had no checksums, format 3 pickled the random states."""


@dataclass
class TrainState:
    """Progress of a run."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows drawn from the training data, over all ranks."""
    evaluated: int = -1
    """The last iteration that was followed by an evaluation."""
    reached: float = 0.0
    """Unix time at which the iteration was done."""
    restarts: int = 0
    """Times a process has continued the run."""
    lost_to_restarts: float = 0.0
    """Seconds from `reached` to the first step of the next process, over all restarts."""
    lost_to_saves: float = 0.0
    """Seconds in which training waited for checkpoints."""
    longest_save: float = 0.0
    """Seconds that the slowest save took, from its beginning until the checkpoint was whole."""


def read_record(folder: str, flag: str) -> dict:
    """The record of a checkpoint folder.

    Raises:
        ValueError: the record is damaged, or another version of this package wrote it.
    """
    with reading(folder, flag):
        with open(os.path.join(folder, RECORD)) as file:
            record = json.load(file)
        number = record["format"]
    if number not in READABLE:
        raise ValueError(f"{flag} {folder}: a checkpoint of format {number}, and this version reads formats "
                         f"{' and '.join(map(str, READABLE))}; load it with the version of megatron_ebft that wrote "
                         "it, or name another one")
    check_whole(folder, flag, is_chosen=lambda name: name == RECORD)
    return record


def read_metadata(directory: str, *, flag: str = "--load") -> dict:
    """The caller's metadata of a checkpoint, as it was saved. Needs no process groups.

    Raises:
        ValueError: no checkpoint there, or its record cannot be read.
    """
    return read_record(resolve(directory, flag), flag)["metadata"]


def first_readable(directory: str, flag: str) -> tuple[str, dict]:
    """Folder and record of the newest checkpoint with a readable record.

    Raises:
        ValueError: no record can be read; the message is about the newest.
    """
    problems = []
    for folder in newest_first(directory, flag):
        try:
            return folder, read_record(folder, flag)
        except ValueError as error:
            problems.append(error)
    raise problems[0]
