"""Saves the checkpoints of a run.

1. `<dir>/iter_0000100/` holds Megatron-Core's torch_dist files, `ebft.json` (record.py), the companions
   (companions.py) and `manifest.json` (manifest.py). `<dir>/latest_checkpointed_iteration.txt` names the latest.
2. A save writes into a temporary folder and renames it when all ranks are done (folders.py).
3. Tensors, those of the optimizer too, are stored whole and layer by layer, so that any other layout can load them.
   Random states belong to their ranks.
4. A problem on one rank raises ValueError on every rank, so that no rank waits for another.
"""

import contextlib
import functools
import logging
import os
import pickle
import queue
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from inspect import signature

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_ebft.checkpointing.companions import COMPANIONS, write_companions
from megatron_ebft.checkpointing.errors import writing
from megatron_ebft.checkpointing.folders import (
    RECORD,
    clear_leftovers,
    drop_old,
    folder_name,
    publish,
    temporary_name,
)
from megatron_ebft.checkpointing.manifest import seal, write_sums
from megatron_ebft.checkpointing.optimizer_state import check_finite, optimizer_kind
from megatron_ebft.checkpointing.random_states import random_states
from megatron_ebft.checkpointing.record import FORMAT, TrainState
from megatron_ebft.checkpointing.sharded_state import current_layout, sharded_state
from megatron_ebft.common.disk import write_json
from megatron_ebft.common.signals import end_with_parent, shielded
from megatron_ebft.parallel.errors import collective_errors

# From 0.19 on Megatron-Core can save with another package of NVIDIA's. Its own way works in every version.
STRATEGY = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
SPARE, SPARE_BYTES = "spare", 1 << 25
"""File that reserves room, while tensors are written, for the small files that complete the checkpoint."""
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").addFilter(
    lambda record: "async save is deprecated" not in record.getMessage())


class Saver:
    """Saves the checkpoints of a run, one at a time: `<directory>/iter_<iteration>`, written by all ranks.

    Args:
        is_async: training goes on while separate processes write what was copied to host memory.
        keep, retain_interval: which checkpoints `drop_old` leaves, as in `folders.drop_old`.
        flag: for error messages.
    """

    def __init__(self, directory: str, *, is_async: bool = False, keep: int = 0, retain_interval: int = 0,
                 flag: str = "--save"):
        self.directory, self.keep, self.retain_interval, self.flag = directory, keep, retain_interval, flag
        self._is_async, self._queue = is_async, AsyncCallsQueue()
        self._finished: str | None = None

    def save(self, state: TrainState, model: list, optimizer, scheduler, metadata: dict,
             companions: dict[str, bytes] | None = None) -> None:
        """Wait for the previous save, then begin one. Without `is_async` the checkpoint is complete on return.

        Args:
            metadata: JSON-able description of the run. Loading compares `metadata["architecture"]`.
            companions: small files to keep in the checkpoint, by name (companions.py).

        Raises:
            ValueError: the directory cannot be written, or is not the same on every rank. Earlier checkpoints are
                untouched.
            NotFinite: there is a weight or moment that is not finite. Nothing is written.
        """
        self._settle(wait=True)
        check_finite(model, optimizer)
        temporary = self._begin(state.iteration)
        record = {"format": FORMAT, "train_state": asdict(state), "layout": current_layout(),
                  "optimizer": optimizer_kind(optimizer), "metadata": metadata}
        overlapped = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
        for chunk in overlapped:
            chunk.disable_forward_pre_hook()  # also gathers the parameters that the next forward pass would gather
        try:
            self._schedule(temporary, (model, optimizer, scheduler), record, companions)
        finally:
            for chunk in overlapped:
                chunk.enable_forward_pre_hook()
        if not self._is_async:  # another process writes all the same: torch's writer crashes its own on a full disk
            self._settle(wait=True)

    def _schedule(self, temporary: str, parts: tuple, record: dict, companions: dict | None) -> None:
        """Copy the state to host memory and start writing it."""
        with self._attempt(), shielded(), torch.no_grad():
            if getattr(filesystem_async, "_results_queue", False) is None:
                filesystem_async._results_queue = _ResultsQueue()
            request = dist_checkpointing.save(sharded_state(*parts, random_states()), temporary,
                                              async_sharded_save=True, **STRATEGY)
            request.finalize_fns.insert(0, functools.partial(_release_space, temporary))
            iteration = record["train_state"]["iteration"]
            request.finalize_fns.append(functools.partial(self._commit, temporary, iteration, record, companions))
            if request.async_fn is not None:  # this rank has something to write
                write = functools.partial(_write_and_sum, request.async_fn, temporary, dist.get_rank(), os.getpid())
                request = request._replace(async_fn=write)
        with self._attempt():
            if dist.get_rank() == 0:
                _reserve_space(temporary)
        with self._attempt():
            self._queue.schedule_async_request(request)

    def finished(self, wait: bool = False) -> str | None:
        """The folder of a checkpoint that was completed since the last call, on every rank. All ranks must call.

        Args:
            wait: for the save under way.

        Raises:
            ValueError: the save failed. Earlier checkpoints are untouched.
        """
        self._settle(wait)
        folder, self._finished = self._finished, None
        return folder

    def drop_old(self, in_use: Collection[int] = ()) -> None:
        """Remove the checkpoints that need not stay, once a step from the newest was finite: finite weights are not
        yet good ones. Rank 0 does it; the others need not call.

        Args:
            in_use: iterations that stay in any case.

        Raises:
            ValueError: on rank 0: they cannot be removed.
        """
        if dist.get_rank() == 0:
            with writing(self.directory, self.flag):
                drop_old(self.directory, self.keep, self.retain_interval, in_use)

    def _settle(self, wait: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._attempt():
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def _begin(self, iteration: int) -> str:
        """Make a new temporary folder that every rank sees."""
        name = [temporary_name(iteration)]
        dist.broadcast_object_list(name)
        temporary = os.path.join(self.directory, name[0])
        with self._attempt():
            if dist.get_rank() == 0:
                clear_leftovers(self.directory)
                os.makedirs(temporary)
        with collective_errors():
            if not os.path.isdir(temporary):
                raise ValueError(f"{self.flag} {self.directory}: rank {dist.get_rank()} does not see the folder rank 0 "
                                 "made there; name a directory on a filesystem that all ranks share")
        return temporary

    def _commit(self, temporary: str, iteration: int, record: dict, companions: dict | None) -> None:
        """Complete a written folder and publish it. Runs on every rank once all have written."""
        with self._attempt():
            if dist.get_rank() == 0:
                if companions:
                    write_companions(os.path.join(temporary, COMPANIONS), companions)
                write_json(os.path.join(temporary, RECORD), record)
                seal(temporary)
                publish(self.directory, temporary, iteration)
        self._finished = os.path.join(self.directory, folder_name(iteration))

    @contextlib.contextmanager
    def _attempt(self):
        """A failed write on one rank raises ValueError on every rank."""
        with collective_errors(), writing(self.directory, self.flag):
            yield


class _ResultsQueue:
    """Takes what a writing process reports of what it wrote: a file without a name, which the process inherits.

    Megatron-Core's own queue is served by another process. That one would stay when a run is killed, and keep its
    output open for whoever reads it.
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile(buffering=0)  # both processes see one position

    def put(self, report) -> None:
        self._file.write(pickle.dumps(report))

    def get_nowait(self):
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        try:
            return pickle.loads(content)
        except (EOFError, pickle.UnpicklingError):  # the process died, or its disk is full
            raise queue.Empty from None


def _reserve_space(temporary: str) -> None:
    with open(os.path.join(temporary, SPARE), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)


def _release_space(temporary: str) -> None:
    if dist.get_rank() == 0:
        os.remove(os.path.join(temporary, SPARE))


def _write_and_sum(write, temporary: str, rank: int, parent: int, *args, **kwargs) -> None:
    """Write a rank's tensors, and then their checksums. Runs in the writing process; `write` reports its failures.

    The process, and those that it forks, end with the rank: nobody would publish what they write.
    """
    end_with_parent(parent=parent)
    os.register_at_fork(after_in_child=functools.partial(end_with_parent, parent=os.getpid()))
    write(*args, **kwargs)
    with contextlib.suppress(OSError):  # the commit then sums up the files itself, or fails
        write_sums(temporary, rank)
