"""Loads checkpoints, at any layout of ranks.

1. Another tensor-, pipeline- or data-parallel size, other virtual stages and a truncated encoder take the parts of the
   stored tensors that they need. The rows that pad the vocabulary belong to a layout: where the checkpoint has fewer
   of them, the rest load as zeros (weights and optimizer alike).
2. Random states are restored if every size is the same. Training then continues bit for bit.
3. A problem on one rank raises ValueError on every rank, so that no rank waits for another.
"""

import logging

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ebft.checkpointing.errors import reading
from megatron_ebft.checkpointing.folders import newest_first, resolve
from megatron_ebft.checkpointing.manifest import check_whole
from megatron_ebft.checkpointing.optimizer_state import load_optimizer_state, optimizer_kind
from megatron_ebft.checkpointing.random_states import KEY, random_states_template, restore_random_states
from megatron_ebft.checkpointing.record import TrainState, read_record
from megatron_ebft.checkpointing.sharded_state import current_layout, sharded_state
from megatron_ebft.checkpointing.sharded_weights import real_vocab_size, sharded_tensors, sharded_weights
from megatron_ebft.checkpointing.unpickling import CheckpointFiles
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel.errors import collective_errors

# Converted checkpoints use the form that every version reads; newer versions warn about it.
logging.getLogger("megatron.core.dist_checkpointing.strategies.common").addFilter(
    lambda record: "load_common is deprecated" not in record.getMessage())


def newest_whole(directory: str, flag: str = "--load") -> str:
    """The folder of the newest whole checkpoint: the one that the pointer names, or an older one if it is damaged.

    Ranks share the reading. A directory that is an iter_* folder itself is the only candidate.

    Raises:
        ValueError: no checkpoint is whole; the message says what is wrong with each.
    """
    problems = []
    try:
        resolve(directory, flag)
    except ValueError as error:  # the checkpoint that the pointer names has no manifest or no folder
        problems.append(str(error))
    for folder in newest_first(directory, flag):
        try:
            with collective_errors():
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
    """Restore weights, optimizer, scheduler and, if the layout is the saved one, the random states of every rank.

    Args:
        directory: one with a pointer to the latest checkpoint, or an `iter_*` folder itself.
        architecture: fields that must equal those of the checkpoint's `metadata["architecture"]`.
        is_whole: `newest_whole` has returned this folder, so its files are not checked again.

    Returns:
        The progress and the metadata that were saved.

    Raises:
        ValueError: nothing to load, a damaged file, or a checkpoint of another architecture, optimizer or format.
    """
    folder, record = _open(directory, architecture, flag, is_whole)
    if record["optimizer"] is None:
        raise ValueError(f"{flag} {folder}: holds weights alone; give it as --pretrained-checkpoint")
    if record["optimizer"] != optimizer_kind(optimizer):
        raise ValueError(f"{flag} {folder}: the optimizer was another one ({record['optimizer']}, now "
                         f"{optimizer_kind(optimizer)}); load the weights alone with --pretrained-checkpoint")
    saved, current = record["layout"], current_layout()
    files, shapes, objects = _opened(folder, flag)
    states = random_states_template(shapes, objects) if saved == current else None
    template = sharded_state(model, optimizer, scheduler, states, is_loading=True)
    loaded = _read(files, shapes, template, real_vocab_size(model), flag)
    _set_weights(model, loaded)
    with collective_errors(), torch.no_grad():
        try:
            scheduler.num_steps = 0  # its load_state_dict adds to this
            scheduler.load_state_dict(loaded["opt_param_scheduler"])
            load_optimizer_state(optimizer, loaded["optimizer"], scheduler.override_opt_param_scheduler)
            scheduler.step(0)  # sets learning rate and weight decay of the groups
        except (AssertionError, KeyError) as error:
            raise ValueError(
                f"{flag} {folder}: optimizer or schedule is not the saved one ({error}); give the saved run's flags, "
                "or --override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler") from error
    with collective_errors(), reading(folder, flag):
        if states is not None:
            restore_random_states(loaded[KEY])
    if states is None and dist.get_rank() == 0:
        before = saved or {}
        changes = ", ".join(f"{name} {before.get(name)}, now {size}" for name, size in current.items()
                            if before.get(name) != size) or "another kind of device"
        print(f"{flag} {folder}: saved with {changes}; random states start anew", flush=True)
    return TrainState(**record["train_state"]), record["metadata"]


def load_weights(directory: str, model, *, architecture: dict | None = None,
                 flag: str = "--pretrained-checkpoint") -> dict:
    """Load the weights of a model, whole or truncated, at any layout. Tensors that the model lacks are not read.

    A mixed-precision optimizer that was built on the model has a copy of the weights: call its `reload_model_params`
    afterwards.

    Args:
        directory, architecture: as `load_checkpoint`.
        model: a Decoder, wrapped or not, or a list of them (virtual pipeline stages).

    Returns:
        The checkpoint's metadata.

    Raises:
        ValueError: as `load_checkpoint`; the message names tensors that are missing or have another shape.
    """
    folder, record = _open(directory, architecture, flag)
    files, shapes, _ = _opened(folder, flag)
    loaded = _read(files, shapes, sharded_weights(model), real_vocab_size(model), flag)
    _set_weights(model if isinstance(model, list) else [model], loaded)
    return record["metadata"]


def _set_weights(chunks: list, loaded: dict) -> None:
    for i, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{i}"], strict=False)
        assert not unexpected and all(key.endswith("_extra_state") for key in missing), (missing, unexpected)


def _open(directory: str, architecture: dict | None, flag: str, is_whole: bool = False) -> tuple[str, dict]:
    """Find the checkpoint folder, check its files and compare the architecture; returns the folder and its record."""
    with collective_errors():
        folder = resolve(directory, flag)
        record = read_record(folder, flag)
        if not is_whole:
            check_whole(folder, flag, dist.get_rank(), dist.get_world_size())
        saved = record["metadata"].get("architecture", {})
        differ = [f"{field} (saved {saved.get(field)!r}, now {value!r})"
                  for field, value in (architecture or {}).items() if field not in saved or saved[field] != value]
        if differ:
            raise ValueError(f"{flag} {folder}: another architecture: {', '.join(differ)}; give the saved values, or "
                             "name another checkpoint")
    return folder, record


def _opened(folder: str, flag: str) -> tuple[CheckpointFiles, dict[str, tuple[int, ...]], set[str]]:
    """The reader of a folder, the shapes of the tensors there, and the keys of the objects."""
    with collective_errors(), reading(folder, flag):
        files = CheckpointFiles(folder)
        stored = files.read_metadata().state_dict_metadata
    shapes = {key: tuple(value.size) for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
    return files, shapes, stored.keys() - shapes.keys()


def _read(files: CheckpointFiles, stored: dict[str, tuple[int, ...]], template: dict, vocab_size: int,
          flag: str) -> dict:
    """Check every tensor of the template against the shapes in the checkpoint, then load them.

    An embedding or output layer (and the optimizer's state of one) may have any number of rows from `vocab_size` on.
    """
    folder = files.folder
    with collective_errors():
        wrong = {}
        for tensor in sharded_tensors(template):
            needed, shape = tuple(tensor.global_shape), stored.get(tensor.key)
            if tensor.allow_shape_mismatch and shape and shape[0] >= vocab_size:
                shape = (needed[0], *shape[1:])  # Megatron-Core fills missing rows with zeros
            if shape != needed:
                wrong[tensor.key] = f"{tensor.key}: {'missing' if shape is None else f'shape {shape}'}, needs {needed}"
        if wrong:
            raise ValueError(f"{flag} {folder}: {len(wrong)} tensors do not fit the model: "
                             f"{'; '.join(list(wrong.values())[:8])}; name a checkpoint of this model")
    with collective_errors(), reading(folder, flag), torch.no_grad():
        loaded = files.load(template)
        return {key: loaded.get(key, {}) for key in template}  # {}: a stage without weights
