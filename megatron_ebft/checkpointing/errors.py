"""Errors of reading and writing checkpoint files, as ValueErrors that name the flag and the folder."""

import contextlib
import os
import pickle
import zipfile

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ebft.checkpointing.folders import POINTER, complete_iterations, folder_name, listed
from megatron_ebft.common.disk import is_passing, unreadable

UNREADABLE = (CheckpointingException, CheckpointException, pickle.UnpicklingError, zipfile.BadZipFile, EOFError,
              OSError, RuntimeError, KeyError, ValueError, AttributeError, IndexError, ImportError, TypeError)
"""What torch and Megatron-Core raise when they read damaged files."""
UNWRITABLE = ("iostream error", "PytorchStreamWriter", "inline_container", "Worker failure", "results_queue",
              "Incomplete worker results")
"""Parts of RuntimeError messages that stand for an OSError, or for a writing process that has died."""


class Distrusted(ValueError):
    """A file asks for something that could run code. Megatron-Core pickles it to tell the other ranks."""


def distrusted(where: str, what: str) -> Distrusted:
    """The error for a file whose pickle names a class or function that is not allowed."""
    return Distrusted(f"{where} asks for {what}, which no checkpoint needs and which could run code. Nothing was run; "
                      "do not use this checkpoint unless its author can explain that")


def damaged(folder: str, flag: str, what: str) -> ValueError:
    """The error for a damaged checkpoint. It names the older iterations that could be loaded instead."""
    directory, name = os.path.split(os.path.abspath(folder))
    older = [iteration for iteration in complete_iterations(directory) if folder_name(iteration) != name]
    return ValueError(f"{flag} {folder}: the checkpoint is damaged ({what}); remove that folder and write another "
                      f"iteration (there: {listed(older)}) into {os.path.join(directory, POINTER)}")


@contextlib.contextmanager
def reading(folder: str, flag: str):
    """Turn the errors that damaged files cause into a ValueError that names the folder.

    Raises:
        ValueError: a file is damaged, or is not to be trusted.
        OSError: a passing error (common/disk.py) of the filesystem. It says nothing about the checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        cause = _cause(error)
        if isinstance(cause, Distrusted):
            raise ValueError(f"{flag} {folder}: {cause}") from error
        if is_passing(cause):
            raise unreadable(cause, f"{flag} {folder}") from error
        kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        raise damaged(folder, flag, f"{kind}{cause}"[:300]) from error


@contextlib.contextmanager
def writing(directory: str, flag: str, otherwise: str = "Earlier checkpoints are untouched"):
    """Turn the errors of a full or read-only disk into a ValueError that names the directory.

    Other errors leave the wrappers of torch and Megatron-Core and are raised as they were.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        cause = _cause(error)
        is_elsewhere = isinstance(cause, CheckpointException)  # without failures: rank 0 knows what failed and where
        if not (is_elsewhere or isinstance(cause, OSError) or any(text in str(cause) for text in UNWRITABLE)):
            raise cause from (error if cause is not error else None)
        raise ValueError(f"{flag} {directory}: cannot write there ({cause}); free space or name another directory. "
                         f"{otherwise}") from error


def _cause(error: BaseException) -> BaseException:
    """The first cause of a failed save or load."""
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
            continue
        within = error.__cause__ or error.__context__  # torch's writer hides an OSError behind an error of its own
        if not isinstance(error, RuntimeError | CheckpointingException) or within is None:
            return error
        error = within
