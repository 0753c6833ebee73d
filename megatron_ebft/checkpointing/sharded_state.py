"""Everything a checkpoint of a run holds, as Megatron-Core's sharded state dict: weights, optimizer, schedule, random
states. The same dict is the data of a save and the template of a load.
"""

import random

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject

from megatron_ebft.checkpointing.optimizer_state import sharded_optimizer_state
from megatron_ebft.checkpointing.sharded_weights import sharded_weights
from megatron_ebft.common.device import have_gpu
from megatron_ebft.parallel.groups import sample_size


def sharded_state(model: list, optimizer, scheduler, with_random_states: bool, is_loading: bool = False) -> dict:
    """The sharded state dict of a run.

    Args:
        with_random_states: the random states of this rank too. They fit the same layout only.
        is_loading: make the template of a load instead of the data of a save.
    """
    state = sharded_weights(model)
    state["optimizer"] = sharded_optimizer_state(optimizer, state, is_loading)
    state["opt_param_scheduler"] = scheduler.state_dict()
    if with_random_states:
        state["rng_state"] = ShardedObject("rng_state", _random_states(), (dist.get_world_size(),), (dist.get_rank(),))
    return state


def current_layout() -> dict[str, int]:
    """The sizes that decide whether random states fit; a part of the record."""
    return {"world_size": dist.get_world_size(),
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline_model_parallel_size":
                parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
            "sample_parallel_size": sample_size()}


def _random_states() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if have_gpu() else None,
            "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def restore_random_states(states: dict) -> None:
    """Set every random generator of this rank to its saved state."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if have_gpu():
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
