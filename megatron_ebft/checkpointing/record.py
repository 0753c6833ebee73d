"""The record of a checkpoint (ebft.json): format, progress, layout, optimizer and the caller's metadata."""

import json
import math
import os
from dataclasses import dataclass, fields

from megatron_ebft.checkpointing.errors import reading
from megatron_ebft.checkpointing.folders import RECORD, newest_first, resolve
from megatron_ebft.checkpointing.manifest import check_whole
from megatron_ebft.common.disk import read_json

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
    lost_to_evaluation: float = 0.0
    """Seconds that evaluations took."""
    longest_save: float = 0.0
    """Seconds that the slowest save took, from its beginning until the checkpoint was whole."""


def read_record(folder: str, flag: str) -> dict:
    """The record of a checkpoint folder. Its parts have the types that their readers expect.

    Raises:
        ValueError: the record is damaged, or another version of this package wrote it.
    """
    with reading(folder, flag):
        record = read_json(os.path.join(folder, RECORD), RECORD)
        number = record.get("format")
    if number not in READABLE:
        raise ValueError(f"{flag} {folder}: a checkpoint of format {number}, and this version reads formats "
                         f"{' and '.join(map(str, READABLE))}; load it with the version of megatron_ebft that wrote "
                         "it, or name another one")
    check_whole(folder, flag, is_chosen=lambda name: name == RECORD)
    with reading(folder, flag):
        _check(record)
    return record


def _check(record: dict) -> None:
    """ValueError, naming the part, unless the parts of a record have their types."""
    def require(is_right: bool, what: str, value) -> None:
        if not is_right:
            raise ValueError(f"{RECORD}: {what} is {json.dumps(value)[:80]}")

    for name in ("train_state", "metadata"):
        require(isinstance(record.get(name), dict), name, record.get(name))
    state, metadata = record["train_state"], record["metadata"]
    known = {field.name: field.type for field in fields(TrainState)}
    for name in ("iteration", "consumed_samples", *state):
        value, is_whole = state.get(name), known.get(name) is int
        require(name in known and type(value) in ((int,) if is_whole else (int, float)) and math.isfinite(value)
                and -1 <= value < 2**63, f"train_state.{name}", value)
    for name in ("layout", "optimizer"):
        require(isinstance(record.get(name), dict | None) and name in record, name, record.get(name))
    require(isinstance(metadata.get("architecture"), dict), "metadata.architecture", metadata.get("architecture"))
    require(isinstance(metadata.get("arguments", {}), dict), "metadata.arguments", metadata.get("arguments"))
    require("tokenizer" in metadata, "metadata.tokenizer", "missing")
    for name, keys in (("tokenizer", ("type", "fingerprint")), ("start", ("origin", "fingerprint")),
                       ("encoder", ("origin", "fingerprint"))):
        part = metadata.get(name)
        require(part is None or isinstance(part, dict) and all(isinstance(part.get(key), str) for key in keys),
                f"metadata.{name}", part)


def architecture_of(folder: str, flag: str) -> str:
    """How errors name the architecture in a record."""
    return f"{flag} {folder}: the architecture in {RECORD}"


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
