"""The process groups of a run: Megatron's (tensor, pipeline, data) and two more.

1. Sample groups: `--ebft-sample-parallel-size` S consecutive data-parallel ranks take the same rows and n/S rollouts
   of each block. Rows are dealt out by `document_rank`, of which there are data-parallel size / S.
2. Wrap groups: the last and the first stage of a pipeline share a communicator. Sampled tokens travel back on it while
   hidden states travel forward on the pipeline's, so that neither waits for the other. (Over gloo two stages have one
   group for both, see common/device.py: messages in opposite directions do not wait.)
"""

import datetime
import gc
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_ebft.common.device import backend, be_deterministic, device, init_device

_sample_group: dist.ProcessGroup | None = None
_wrap_group: dist.ProcessGroup | None = None


def init_parallel(tensor_model_parallel_size: int, pipeline_model_parallel_size: int, seed: int,
                  timeout_minutes: int = 10, *, virtual_pipeline_model_parallel_size: int | None = None,
                  sample_parallel_size: int = 1, is_deterministic: bool = False) -> None:
    """Start torch.distributed, unless it runs already, and all process groups.

    torch.distributed starts from torchrun's environment, or as a world of one rank without it.

    Args:
        timeout_minutes: of every collective.
        is_deterministic: see `device.be_deterministic`.

    Raises:
        ValueError: the sizes do not divide the world size; names the flag.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel = tensor_model_parallel_size * pipeline_model_parallel_size
    if world % model_parallel:
        raise ValueError(
            f"world size {world} is not a multiple of --tensor-model-parallel-size {tensor_model_parallel_size} × "
            f"--pipeline-model-parallel-size {pipeline_model_parallel_size}; start a multiple of {model_parallel}")
    if world // model_parallel % sample_parallel_size:
        raise ValueError(f"--ebft-sample-parallel-size {sample_parallel_size}: does not divide the "
                         f"{world // model_parallel} data-parallel ranks")
    if is_deterministic:
        be_deterministic()
    init_device()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend(), **alone, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes)
    _init_groups(tensor_model_parallel_size, pipeline_model_parallel_size, sample_parallel_size, timeout)
    set_seed(seed)


def _init_groups(tp: int, pp: int, samples: int, timeout) -> None:
    global _sample_group, _wrap_group
    dp = dist.get_world_size() // (tp * pp)
    ranks = torch.arange(dist.get_world_size()).view(pp, dp, tp)  # Megatron's order, tp innermost
    samples_of = ranks.view(pp, dp // samples, samples, tp).transpose(2, 3).reshape(-1, samples)
    _sample_group = _new_groups(samples_of.tolist(), timeout) if samples > 1 else None
    _wrap_group = _new_groups(ranks[[0, -1]].flatten(1).t().tolist(), timeout) if pp > 1 else None


def _new_groups(groups: list[list[int]], timeout) -> dist.ProcessGroup | None:
    """Make all groups on every rank, as torch requires; returns the group of this rank."""
    own = None
    for members in groups:
        group = dist.new_group(members, timeout=timeout)
        if dist.get_rank() in members:
            own = group
    return own


def set_seed(seed: int) -> None:
    """Seed every generator. Tensor and pipeline ranks get different numbers, data-parallel ranks the same."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def dp_size() -> int:
    """Number of data-parallel ranks."""
    return parallel_state.get_data_parallel_world_size()


def dp_sum(values: Tensor) -> Tensor:
    """Sum over the data-parallel ranks, in place."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def dp_max(count: int) -> int:
    """The largest count of the data-parallel ranks."""
    counts = torch.full((), count, device=device())
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return int(counts)


def tp_group() -> dist.ProcessGroup:
    """The ranks that split each layer among them."""
    return parallel_state.get_tensor_model_parallel_group()


def pp_group() -> dist.ProcessGroup:
    """The ranks that hold the stages of one pipeline, in their order."""
    return parallel_state.get_pipeline_model_parallel_group()


def sample_group() -> dist.ProcessGroup | None:
    """The data-parallel ranks that roll out the same rows; None for S = 1."""
    return _sample_group


def sample_rank() -> int:
    """This rank's place in its sample group. It draws samples [rank · n/S, (rank + 1) · n/S)."""
    return 0 if _sample_group is None else dist.get_rank(_sample_group)


def sample_size() -> int:
    """S, the number of ranks in a sample group."""
    return 1 if _sample_group is None else dist.get_world_size(_sample_group)


def wrap_group() -> dist.ProcessGroup | None:
    """The first and the last stage of this rank's pipeline; None on the stages between."""
    return _wrap_group


def document_rank() -> int:
    """This rank's place among those that take different rows."""
    return parallel_state.get_data_parallel_rank() // sample_size()


def document_size() -> int:
    """Number of sample groups (ranks, for S = 1), each of which takes different rows."""
    return dp_size() // sample_size()


def is_first_stage() -> bool:
    """Whether this rank holds the first pipeline stage."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage."""
    return parallel_state.is_pipeline_last_stage()


def from_last_stage(values: Tensor) -> Tensor:
    """Broadcast the last stage's values to every stage, in place."""
    if dist.get_world_size(pp_group()) > 1:
        dist.broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), group=pp_group())
    return values


def from_first_tensor_rank(values: Tensor) -> Tensor:
    """Broadcast the first tensor rank's values to its tensor group, in place."""
    if dist.get_world_size(tp_group()) > 1:
        dist.broadcast(values, parallel_state.get_tensor_model_parallel_src_rank(), group=tp_group())
    return values


def all_samples(values_BKN: Tensor) -> Tensor:
    """Gather the rollouts of all ranks of a sample group: [B, K, n/S, ...] to [B, K, n, ...]."""
    return values_BKN if sample_group() is None else torch.cat(_all_gather(values_BKN, sample_group()), dim=2)


def all_documents(values_B: Tensor) -> Tensor:
    """Gather the rows of the global batch in their order: [B, ...] to [global batch size, ...]."""
    return torch.cat(_all_gather(values_B, parallel_state.get_data_parallel_group())[:: sample_size()])


def dealt(items: list) -> list:
    """This data-parallel rank's share of items that every rank has."""
    return items[parallel_state.get_data_parallel_rank() :: dp_size()]


def collected(results: list) -> list:
    """The results of all data-parallel ranks, on every rank, in the order of the items that were `dealt`. Any objects
    that can be pickled."""
    parts: list[list] = [[] for _ in range(dp_size())]
    dist.all_gather_object(parts, results, group=parallel_state.get_data_parallel_group())
    whole: list = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def _all_gather(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks of a group. They must have the same shape."""
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


def shut_down() -> None:
    """Destroy all process groups."""
    global _sample_group, _wrap_group
    _sample_group = _wrap_group = None
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # unused models hold groups, and each gloo group has a thread that polls
