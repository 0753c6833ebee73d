"""Checkpoints on disk: Megatron's folders, written whole or not at all, and checked before they are believed.

1. `<dir>/iter_0000100/` holds Megatron-Core's torch_dist files, `ebft.json` (readable: progress, layout, the caller's
   metadata), small companions, and `manifest.json` (size and checksum of every file).
   `<dir>/latest_checkpointed_iteration.txt` names the latest.
2. A save writes a folder of its own, renames it when all ranks are done, then replaces the pointer: a killed save
   leaves the older checkpoint latest. A save over an iteration keeps the old folder as `.old` until the new one stands.
3. Tensors, the optimizer's too, are stored whole and layer by layer: another tensor-, pipeline- or data-parallel size,
   other virtual stages and a truncated encoder take the parts they need. The rows that pad the vocabulary belong to a
   layout: they load as zeros where there are more of them (weights and optimizer alike).
4. Only random states belong to their ranks; they are restored where every size is the same, so that training continues
   bit for bit there.
5. A problem on one rank raises ValueError on every rank, so that none waits for the others.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import random
from dataclasses import asdict, dataclass
from inspect import signature

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ebft.checkpointing.files import (
    FORMAT,
    RECORD,
    check_whole,
    clear_leftovers,
    drop_old,
    folder_name,
    hold_space,
    newest_first,
    publish,
    read_record,
    reading,
    release_space,
    resolve,
    seal,
    temporary_name,
    write_json,
    write_sums,
    writing,
)
from megatron_ebft.checkpointing.fingerprint import SHARDING, real_vocab_size, sharded_tensors, sharded_weights
from megatron_ebft.common.device import have_gpu
from megatron_ebft.hf.files import COMPANIONS, write_companions
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.parallel.errors import together
from megatron_ebft.run.stopping import shielded

# Megatron-Core 0.19 offers a package of NVIDIA's for saving; its own way, which all versions have, is enough here.
STRATEGY = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
for module, remark in (("torch", "async save is deprecated"),
                       ("common", "load_common is deprecated")):  # where converted checkpoints suit all versions
    logging.getLogger(f"megatron.core.dist_checkpointing.strategies.{module}").addFilter(
        lambda record, remark=remark: remark not in record.getMessage())


@dataclass
class TrainState:
    """Progress of a run."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows drawn from the training data, over all ranks."""
    evaluated: int = -1
    """The last iteration after which there was an evaluation."""
    reached: float = 0.0
    """Unix time at which the iteration was done."""
    restarts: int = 0
    lost_to_restarts: float = 0.0
    """Seconds from `reached` to the first step of the process that went on there, over all restarts."""
    lost_to_saves: float = 0.0
    """Seconds in which training waited for checkpoints."""
    longest_save: float = 0.0
    """Seconds from the beginning of a save until it was whole, at the most; a new process knows nothing else of it."""


class Saver:
    """Saves the checkpoints of a run, one at a time: `<directory>/iter_<iteration>`, written by all ranks.

    Args:
        is_async: training goes on while processes of their own write what was copied to host memory.
        keep, retain_interval: as checkpoint_files.drop_old, after each save.
    """

    def __init__(self, directory: str, *, is_async: bool = False, keep: int = 0, retain_interval: int = 0,
                 flag: str = "--save"):
        self.directory, self.keep, self.retain_interval, self.flag = directory, keep, retain_interval, flag
        self._is_async, self._queue = is_async, AsyncCallsQueue()
        self._done: str | None = None

    def save(self, state: TrainState, model: list, optimizer, scheduler, metadata: dict,
             companions: dict[str, bytes] | None = None) -> None:
        """Begin a save, after waiting for the one before; without `is_async`, it is whole and the latest on return.

        Args:
            metadata: JSON-able description of the run; `metadata["architecture"]` is what loading compares.
            companions: small files to keep in the checkpoint, by name (hf/files.py).

        Raises:
            ValueError: the directory cannot be written, or is not the same on every rank; older checkpoints are as
                they were.
        """
        self._settle(wait=True)
        temporary = self._begin(state.iteration)
        record = {"format": FORMAT, "train_state": asdict(state), "layout": _layout(), "optimizer": _kind(optimizer),
                  "metadata": metadata}
        overlapped = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
        for chunk in overlapped:
            chunk.disable_forward_pre_hook()  # gathers what the next forward pass would have gathered
        try:
            self._schedule(temporary, (model, optimizer, scheduler), record, companions)
        finally:
            for chunk in overlapped:
                chunk.enable_forward_pre_hook()
        if not self._is_async:  # written in another process all the same: torch's writer crashes its own on a full disk
            self._settle(wait=True)

    def _schedule(self, temporary: str, parts: tuple, record: dict, companions: dict | None) -> None:
        """Copy the state to host memory and have it written."""
        with together(), writing(self.directory, self.flag), shielded(), torch.no_grad():
            if getattr(filesystem_async, "_results_queue", False) is None:
                filesystem_async._results_queue = _Results()
            request = dist_checkpointing.save(_sharded_state(*parts, with_rng=True), temporary,
                                              async_sharded_save=True, **STRATEGY)
            request.finalize_fns.insert(0, functools.partial(self._release, temporary))
            iteration = record["train_state"]["iteration"]
            request.finalize_fns.append(functools.partial(self._commit, temporary, iteration, record, companions))
            if request.async_fn is not None:  # this rank has something to write
                write = functools.partial(_write_and_sum, request.async_fn, temporary, dist.get_rank())
                request = request._replace(async_fn=write)
        with together(), writing(self.directory, self.flag):
            if dist.get_rank() == 0:
                hold_space(temporary)
        with together(), writing(self.directory, self.flag):
            self._queue.schedule_async_request(request)

    def finished(self, wait: bool = False) -> str | None:
        """The folder of a save that has become whole since this was last asked, on every rank; all must ask.

        Raises:
            ValueError: the save failed; older checkpoints are as they were.
        """
        self._settle(wait)
        done, self._done = self._done, None
        return done

    def _settle(self, wait: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with together(), writing(self.directory, self.flag):
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def _begin(self, iteration: int) -> str:
        """A new temporary folder, which every rank sees."""
        name = [temporary_name(iteration)]
        dist.broadcast_object_list(name)
        temporary = os.path.join(self.directory, name[0])
        with together(), writing(self.directory, self.flag):
            if dist.get_rank() == 0:
                clear_leftovers(self.directory)
                os.makedirs(temporary)
        with together():
            if not os.path.isdir(temporary):
                raise ValueError(f"{self.flag} {self.directory}: rank {dist.get_rank()} does not see the folder rank 0 "
                                 f"made there; name a directory on a filesystem that all ranks share")
        return temporary

    def _release(self, temporary: str) -> None:
        if dist.get_rank() == 0:
            release_space(temporary)

    def _commit(self, temporary: str, iteration: int, record: dict, companions: dict | None) -> None:
        folder = os.path.join(self.directory, folder_name(iteration))
        with together(), writing(self.directory, self.flag):
            if dist.get_rank() == 0:
                if companions:
                    write_companions(os.path.join(temporary, COMPANIONS), companions)
                write_json(os.path.join(temporary, RECORD), record)
                seal(temporary)
                publish(self.directory, temporary, iteration)
                drop_old(self.directory, self.keep, self.retain_interval)
        self._done = folder


class _Results:
    """The queue in which a writing process says what it wrote, passed on as bytes.

    Megatron-Core's is served by a process that has to import torch and Megatron-Core to take its first item, on every
    rank: seconds of the first save, which is the one that a stop waits for.
    """

    def __init__(self):
        self._queue = multiprocessing.get_context("spawn").Manager().Queue()

    def put(self, found) -> None:
        self._queue.put(pickle.dumps(found))

    def get_nowait(self):
        return pickle.loads(self._queue.get_nowait())


def _write_and_sum(write, temporary: str, rank: int, *args, **kwargs) -> None:
    """Megatron-Core's writing of a rank's tensors, which reports its failures itself, and their checksums."""
    write(*args, **kwargs)
    with contextlib.suppress(OSError):  # then the commit sums up, or fails
        write_sums(temporary, rank)


def newest_whole(directory: str, flag: str = "--load") -> str:
    """The folder of the newest whole checkpoint: the one the pointer names or, where it is damaged, one before it.

    Ranks share out the reading. A directory that is an iter_* folder itself is the only candidate.

    Raises:
        ValueError: none is whole; says what is wrong with each.
    """
    problems = []
    try:
        resolve(directory, flag)
    except ValueError as error:  # of the one that the pointer names, manifest or folder are missing
        problems.append(str(error))
    for folder in newest_first(directory, flag):
        try:
            with together():
                read_record(folder, flag)
                check_whole(folder, flag, dist.get_rank(), dist.get_world_size())
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems and dist.get_rank() == 0:
            print("\n".join(f"warning: {problem}" for problem in problems), flush=True)
            print(f"warning: {flag} {directory}: goes back to {folder}, the newest that is whole", flush=True)
        return folder
    raise ValueError(f"{flag} {directory}: no checkpoint there is whole: {'; '.join(problems)}")


def load_checkpoint(directory: str, model: list, optimizer, scheduler, *, architecture: dict | None = None,
                    is_whole: bool = False, flag: str = "--load") -> tuple[TrainState, dict]:
    """Restore weights, optimizer, scheduler and, where the layout is unchanged, every rank's random states.

    The layout (tensor-, pipeline- and data-parallel sizes, virtual stages, padding of the vocabulary) is free.

    Args:
        directory: one with a latest pointer, or an `iter_*` folder itself.
        architecture: fields that must equal those of the checkpoint's `metadata["architecture"]`.
        is_whole: the folder is one that newest_whole found; its files are not read once more.

    Returns:
        The progress and the metadata that were saved.

    Raises:
        ValueError: nothing to load, a damaged file, or a checkpoint of another architecture, optimizer or format.
    """
    folder, record = _open(directory, architecture, flag, is_whole)
    if record["optimizer"] is None:
        raise ValueError(f"{flag} {folder}: holds weights alone; give it as --pretrained-checkpoint")
    if record["optimizer"] != _kind(optimizer):
        raise ValueError(f"{flag} {folder}: the optimizer was another one ({record['optimizer']}, now "
                         f"{_kind(optimizer)}); load the weights alone with --pretrained-checkpoint")
    saved, now = record["layout"], _layout()
    template = _sharded_state(model, optimizer, scheduler, with_rng=saved == now, is_loading=True)
    loaded = _read(folder, template, real_vocab_size(model), flag)
    _set_weights(model, loaded)
    with together(), torch.no_grad():
        try:
            scheduler.num_steps = 0  # its load_state_dict adds
            scheduler.load_state_dict(loaded["opt_param_scheduler"])
            _load_optimizer(optimizer, loaded["optimizer"], scheduler.override_opt_param_scheduler)
            scheduler.step(0)  # the groups' learning rate and weight decay
        except (AssertionError, KeyError) as error:
            raise ValueError(
                f"{flag} {folder}: optimizer or schedule is not the saved one ({error}); give the saved run's flags, "
                f"or --override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler") from error
    if saved == now:
        _set_rng_state(loaded["rng_state"])
    elif dist.get_rank() == 0:
        changes = ", ".join(f"{name} {saved[name]}, now {now[name]}" for name in now if saved[name] != now[name])
        print(f"{flag} {folder}: saved with {changes}; random states start anew", flush=True)
    return TrainState(**record["train_state"]), record["metadata"]


def load_weights(directory: str, model, *, architecture: dict | None = None,
                 flag: str = "--pretrained-checkpoint") -> dict:
    """Load the weights of a model, whole or truncated, in any layout; what it does not have is not read.

    A mixed-precision optimizer built on the model has its own copy: call its `reload_model_params` afterwards.

    Args:
        model: a Decoder, wrapped or not, or a list of them (virtual pipeline stages).

    Returns:
        The checkpoint's metadata.

    Raises:
        ValueError: as load_checkpoint; tensors that the checkpoint lacks, or has in another shape, are named.
    """
    folder, record = _open(directory, architecture, flag)
    loaded = _read(folder, sharded_weights(model), real_vocab_size(model), flag)
    _set_weights(model if isinstance(model, list) else [model], loaded)
    return record["metadata"]


def _set_weights(chunks: list, loaded: dict) -> None:
    for i, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{i}"], strict=False)
        assert not unexpected and all(key.endswith("_extra_state") for key in missing), (missing, unexpected)


def _sharded_state(model: list, optimizer, scheduler, with_rng: bool, is_loading: bool = False) -> dict:
    """What a checkpoint holds, as Megatron-Core's sharded state dict: the data to save or the template to load."""
    state = sharded_weights(model)
    _begin_adam_state(optimizer)
    with torch.no_grad(), _aligned_buckets(_inner(optimizer)[0]):
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(SHARDING))
    if state["optimizer"].get("param_state", state) is None:  # gathered by the first data-parallel rank
        del state["optimizer"]["param_state"]  # else a warning about ranks that differ
    state["opt_param_scheduler"] = scheduler.state_dict()
    if with_rng:
        state["rng_state"] = ShardedObject("rng_state", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))
    return state


@contextlib.contextmanager
def _aligned_buckets(inner):
    """Mends the distributed optimizer's sharded_state_dict (Megatron-Core 0.16.1 … 0.19.2) for several buckets.

    It gathers them without the padding at their ends, then looks for parameters where they are with it: what follows
    a padded bucket (overlapped gradient reduction, tied embeddings over a pipeline) would be saved displaced.
    """
    if not isinstance(inner, DistributedOptimizer):
        yield
        return
    gather_buffers = inner.get_parameter_state_dp_zero

    def gather(**kwargs):
        gathered = gather_buffers(**kwargs)  # None but on the first data-parallel rank
        for number, buffer in enumerate(inner.buffers if gathered else ()):
            for tensors in gathered[number].values():
                tensors.update({key: _align(tensor, buffer) for key, tensor in tensors.items()
                                if key != "numel_unpadded"})
        return gathered

    inner.get_parameter_state_dp_zero = gather
    try:
        yield
    finally:
        del inner.get_parameter_state_dp_zero


def _align(gathered: torch.Tensor, buffer) -> torch.Tensor:
    """A gathered buffer, float32, with the padding of its buckets put back."""
    if len(buffer.buckets) == 1:
        return gathered
    aligned = torch.zeros(buffer.numel)
    for bucket, part in zip(buffer.buckets, gathered.split([bucket.numel_unpadded for bucket in buffer.buckets])):
        aligned[bucket.offset:bucket.offset + len(part)] = part
    return aligned


def _inner(optimizer):
    """Megatron's optimizer inside the chain (of one: no experts), and whether it steps torch's Adam."""
    if isinstance(optimizer, ChainedOptimizer):
        optimizer, = optimizer.chained_optimizers
    return optimizer, isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _begin_adam_state(optimizer) -> None:
    """Give Adam the state of step 0 where it has none: Megatron-Core reads it even before the first step."""
    inner, is_torch = _inner(optimizer)
    if not inner.optimizer.state:
        inner.init_state_fn(inner.optimizer, inner.config)
        if is_torch:
            for state in inner.optimizer.state.values():
                state["step"] = torch.tensor(0.0)


def _kind(optimizer) -> dict:
    """What the optimizer's part of a checkpoint depends on."""
    return {"class": type(_inner(optimizer)[0]).__name__, "sharding": SHARDING["distrib_optim_sharding_type"]}


def _load_optimizer(optimizer, loaded: dict, keep_lr: bool) -> None:
    """optimizer.load_state_dict, with two things mended.

    The step count of torch's Adam: Megatron-Core leaves out a count of 0 (plain optimizers), or takes it from the
    groups, one tensor for all parameters, and then misses it among the parameters' tensors (distributed one); torch
    adds to it per parameter.
    The groups' learning-rate bounds: 0.16 lets the saved ones win whatever the scheduler was told, 0.19 fails.
    """
    inner, is_torch = _inner(optimizer)
    saved = loaded.get("optimizer", loaded)
    if is_torch and "state" in saved:
        saved["state"].setdefault("common_step", torch.tensor(0.0))
    kind = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    now = {tuple(map(group.get, kind)): group for group in inner.optimizer.param_groups}
    for group in saved["param_groups"]:
        mine = now[tuple(map(group.get, kind))]
        winner, loser = (mine, group) if keep_lr else (group, mine)
        loser.update({bound: winner[bound] for bound in ("max_lr", "min_lr")})
    parameter_state = loaded.pop("param_state", None)
    optimizer.load_state_dict(loaded)
    states = [(inner.optimizer.state[parameter], group)
              for group in inner.optimizer.param_groups for parameter in group["params"]] if is_torch else []
    steps = [float(group.get("step", state.pop("step"))) for state, group in states]
    if parameter_state is not None:
        inner.load_parameter_state_from_fully_reshardable(parameter_state)
    for (state, _), step in zip(states, steps):
        state["step"] = torch.tensor(step)


def _rng_state() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if have_gpu() else None,
            "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if have_gpu():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _layout() -> dict:
    return {"world_size": dist.get_world_size(),
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline_model_parallel_size":
                parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
            "sample_parallel_size": groups.sample_size()}


def _open(directory: str, architecture: dict | None, flag: str, is_whole: bool = False) -> tuple[str, dict]:
    """Find the folder, check its files and its architecture; returns the folder and its ebft.json."""
    with together():
        folder = resolve(directory, flag)
        record = read_record(folder, flag)
        if not is_whole:
            check_whole(folder, flag, dist.get_rank(), dist.get_world_size())
        saved = record["metadata"].get("architecture", {})
        differ = [f"{field} (saved {saved.get(field)!r}, now {value!r})"
                  for field, value in (architecture or {}).items() if field not in saved or saved[field] != value]
        if differ:
            raise ValueError(f"{flag} {folder}: another architecture: {', '.join(differ)}; give the saved values, or "
                             f"name another checkpoint")
    return folder, record


def _read(folder: str, template: dict, vocab_size: int, flag: str) -> dict:
    """Check every tensor of the template against the checkpoint, then load it.

    An embedding or output layer (and the optimizer's state of one) may have any number of rows from `vocab_size` on.
    """
    with together():
        with reading(folder, flag):
            # Not dist_checkpointing.load_tensors_metadata: 0.19.2's fails on what torch 2.15 stores.
            stored = {key: tuple(value.size) for key, value in
                      FileSystemReader(folder).read_metadata().state_dict_metadata.items()
                      if isinstance(value, TensorStorageMetadata)}
        wrong = {}
        for tensor in sharded_tensors(template):
            needed, found = tuple(tensor.global_shape), stored.get(tensor.key)
            if tensor.allow_shape_mismatch and found and found[0] >= vocab_size:
                found = (needed[0], *found[1:])  # Megatron-Core fills rows that are not there with zeros
            if found != needed:
                wrong[tensor.key] = f"{tensor.key}: {'missing' if found is None else f'shape {found}'}, needs {needed}"
        if wrong:
            raise ValueError(f"{flag} {folder}: {len(wrong)} tensors do not fit the model: "
                             f"{'; '.join(list(wrong.values())[:8])}; name a checkpoint of this model")
    with together(), reading(folder, flag), torch.no_grad():
        # Sharding was validated when it was saved; doing so again would fail on rank 0 alone while others wait.
        loaded = dist_checkpointing.load(template, folder, validate_access_integrity=False)
        return {key: loaded.get(key, {}) for key in template}  # without what else it holds; {}: a stage without weights
