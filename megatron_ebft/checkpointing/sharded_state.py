"""Everything a checkpoint of a run holds, as Megatron-Core's sharded state dict: weights, optimizer, schedule, random
states. The same dict is the data of a save and the template of a load.
"""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ebft.checkpointing.optimizer_state import sharded_optimizer_state
from megatron_ebft.checkpointing.random_states import KEY
from megatron_ebft.checkpointing.sharded_weights import sharded_weights
from megatron_ebft.parallel.groups import sample_size


def sharded_state(model: list, optimizer, scheduler, random_states=None, is_loading: bool = False) -> dict:
    """The sharded state dict of a run.

    Args:
        random_states: those of this rank, or their template (random_states.py); None: without them.
        is_loading: make the template of a load instead of the data of a save.
    """
    state = sharded_weights(model)
    state["optimizer"] = sharded_optimizer_state(optimizer, state, is_loading)
    state["opt_param_scheduler"] = scheduler.state_dict()
    if random_states is not None:
        state[KEY] = random_states
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
