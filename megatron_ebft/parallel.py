"""Process groups of a run: start, sums over the data-parallel ranks, and stop."""

import datetime
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_ebft.device import backend, init_device


def init_parallel(tensor_model_parallel_size: int, pipeline_model_parallel_size: int, seed: int,
                  timeout_minutes: int = 10) -> None:
    """Start torch.distributed from torchrun's environment (or alone) and Megatron's process groups.

    Raises:
        ValueError: when the world size is not a multiple of the model-parallel size.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel = tensor_model_parallel_size * pipeline_model_parallel_size
    if world % model_parallel:
        raise ValueError(
            f"world size {world} is not a multiple of --tensor-model-parallel-size {tensor_model_parallel_size} × "
            f"--pipeline-model-parallel-size {pipeline_model_parallel_size}; start a multiple of {model_parallel}")
    init_device()
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend(), **alone, timeout=datetime.timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size, pipeline_model_parallel_size,
                                             distributed_timeout_minutes=timeout_minutes)
    set_seed(seed)


def set_seed(seed: int) -> None:
    """Seed every generator: weights differ over tensor and pipeline ranks, and agree over data-parallel ranks."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def dp_rank() -> int:
    """This rank's place among the data-parallel ranks."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    """Number of data-parallel ranks."""
    return parallel_state.get_data_parallel_world_size()


def dp_sum(values: Tensor) -> Tensor:
    """Sum over the data-parallel ranks, in place."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def shut_down() -> None:
    """Leave the process groups in order."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
