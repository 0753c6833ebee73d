"""A content hash of a model's weights that is the same for every layout of ranks."""

import hashlib
import itertools

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megatron_ebft.checkpointing.sharded_weights import real_vocab_size, sharded_tensors, sharded_weights
from megatron_ebft.common.device import device
from megatron_ebft.common.hashing import GOLDEN, mix64


def weights_fingerprint(model) -> str:
    """64-bit content hash of a model's weights, hexadecimal, on every rank.

    It is the sum over all elements of mix64(bits ⊕ (hash(key, shape, dtype) + flat global index · odd constant)),
    modulo 2⁶⁴. Only the main replica of an element counts, and rows that pad the vocabulary do not. Parameters that
    are being gathered (overlap_param_gather) must have arrived.

    Args:
        model: as in `sharded_weights`.
    """
    weights, vocab_size = sharded_weights(model), real_vocab_size(model)
    total = torch.zeros((), dtype=torch.int64, device=device())
    with torch.no_grad():
        for tensor in sharded_tensors(weights):
            if is_main_replica(tensor.replica_id):
                total += _tensor_hash(tensor, vocab_size)
    dist.all_reduce(total)
    return f"{total.item() % 2**64:016x}"


def _tensor_hash(tensor: ShardedTensor, vocab_size: int, chunk: int = 2**18) -> Tensor:
    """Sum of the element hashes of one local shard, int64 [].

    Args:
        chunk: elements at a time (2²² are 5× slower on a CPU).
    """
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
