"""A content hash of a model's weights that does not depend on how they are laid out over ranks."""

import hashlib
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch import Tensor

from megatron_ebft.device import device
from megatron_ebft.hashing import GOLDEN, mix64
from megatron_ebft.model import unwrap

SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "dp_reshardable"}
"""Metadata of every sharded state dict: one key per layer, so that an encoder is a subset of a model. Pass a copy:
Megatron-Core writes its process groups into it."""


def weights_fingerprint(module) -> str:
    """64-bit content hash of a model's weights, in hex: the same for every parallel layout, on every rank.

    Σ over tensors and elements of mix64(bits ⊕ (hash(key, shape, dtype) + flat global index · odd constant)) mod 2⁶⁴,
    each element counted by its main replica. Parameters in flight (overlap_param_gather) must have arrived.
    """
    total = torch.zeros((), dtype=torch.int64, device=device())
    with torch.no_grad():
        for tensor in sharded_tensors(unwrap(module).sharded_state_dict(metadata=dict(SHARDING))):
            if is_main_replica(tensor.replica_id):
                total += _tensor_hash(tensor)
    dist.all_reduce(total)
    return f"{total.item() % 2**64:016x}"


def _tensor_hash(tensor: ShardedTensor, chunk: int = 2**18) -> Tensor:
    """Sum of element hashes of one local shard, int64 []; `chunk` elements at a time (5× slower at 2²² on a CPU)."""
    data = tensor.data.detach()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    name = f"{tensor.key} {tuple(tensor.global_shape)} {data.dtype}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    strides = list(itertools.accumulate(tensor.global_shape[:0:-1], lambda a, b: a * b, initial=1))[::-1]
    base = sum(offset * stride for offset, stride in zip(tensor.global_offset, strides))
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    rows = data.reshape(1) if data.dim() == 0 else data
    for start in range(0, len(rows), step := max(1, chunk * len(rows) // max(1, rows.numel()))):
        part = rows[start:start + step]
        index = torch.full((), base, dtype=torch.int64, device=data.device)
        for axis, (size, stride) in enumerate(zip(part.shape, strides[tensor.prepend_axis_num:])):
            first = start if axis == 0 else 0
            places = torch.arange(first, first + size, device=data.device) * stride
            index = index.unsqueeze(-1) + places
        bits = part.contiguous().view(integer).long()
        total += mix64(bits ^ (index * GOLDEN + seed)).sum()
    return total


def sharded_tensors(sharded) -> Iterator[ShardedTensor]:
    """The sharded tensors of a state dict, factories applied."""
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value
