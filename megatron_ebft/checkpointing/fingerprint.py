"""A content hash of a model's weights that does not depend on how they are laid out over ranks."""

import hashlib
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch import Tensor

from megatron_ebft.common.device import device
from megatron_ebft.common.hashing import GOLDEN, mix64
from megatron_ebft.model.weights import unwrap

SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True}
"""Metadata of every sharded state dict. One key per layer, so that an encoder is a subset of a model. The optimizer's
state has the model's shapes, so that it can be cut otherwise; while saving, the first data-parallel rank gathers it in
host memory (12 bytes for each parameter of its tensor- and pipeline-parallel part, and one bucket's more), bucket by
bucket over gloo. Pass a copy: Megatron-Core writes its process groups into it."""


def sharded_weights(model) -> dict:
    """Megatron-Core's sharded state dict of a model (or encoder): one entry for each of its chunks on this rank.

    Without objects (_extra_state), which hold no weights and are not the same in all kinds of layers.

    Args:
        model: a Decoder, wrapped or not, or a list of them (virtual pipeline stages).
    """
    chunks = model if isinstance(model, list) else [model]
    return {f"model{i}": {key: value for key, value in unwrap(chunk).sharded_state_dict(metadata=dict(SHARDING)).items()
                          if not isinstance(value, ShardedObject)} for i, chunk in enumerate(chunks)}


def weights_fingerprint(model) -> str:
    """64-bit content hash of a model's weights, in hex: the same for every parallel layout, on every rank.

    Σ over tensors and elements of mix64(bits ⊕ (hash(key, shape, dtype) + flat global index · odd constant)) mod 2⁶⁴,
    each element counted by its main replica, rows that pad the vocabulary by none. Parameters in flight
    (overlap_param_gather) must have arrived.

    Args:
        model: as sharded_weights.
    """
    weights, vocab_size = sharded_weights(model), real_vocab_size(model)
    total = torch.zeros((), dtype=torch.int64, device=device())
    with torch.no_grad():
        for tensor in sharded_tensors(weights):
            if is_main_replica(tensor.replica_id):
                total += _tensor_hash(tensor, vocab_size)
    dist.all_reduce(total)
    return f"{total.item() % 2**64:016x}"


def real_vocab_size(model) -> int:
    """Ids that exist; `model` as sharded_weights."""
    return unwrap(model[0] if isinstance(model, list) else model).real_vocab_size


def _tensor_hash(tensor: ShardedTensor, vocab_size: int, chunk: int = 2**18) -> Tensor:
    """Sum of element hashes of one local shard, int64 []; `chunk` elements at a time (5× slower at 2²² on a CPU)."""
    data, global_shape = tensor.data.detach(), tuple(tensor.global_shape)
    if tensor.allow_shape_mismatch:  # embedding or output layer
        data, global_shape = data[:max(0, vocab_size - tensor.global_offset[0])], (vocab_size, *global_shape[1:])
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    name = f"{tensor.key} {global_shape} {data.dtype}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    strides = list(itertools.accumulate(global_shape[:0:-1], lambda a, b: a * b, initial=1))[::-1]
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
