"""FlexAttention: one compiled kernel for every pattern of keys that `Reach` describes.

1. A BlockMask is made of a Reach's intervals, tile by tile, on the device: its cost is queries × tiles of keys, not
   queries × keys, so it is made afresh for each pass, knows the documents, and skips what they hide. A tile counts as
   full, which spares the kernel the mask, only if one interval of each of its queries covers it.
2. The kernel is compiled once for a shape. The intervals are captured tensors: other values, other documents and other
   decoding steps take the compiled kernel. They are never changed in place, since the backward pass of one micro-batch
   may come after the forward pass of the next.
3. Rollout tokens ordered (block, sample, step) keep tiles full: see tests/test_flex_attention.py for their number.

Written against torch 2.11 to 2.14. FlexAttention has a backward pass on GPUs only.
"""

import functools

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_ebft.visibility import Reach

TILE = 128
"""Queries and keys of a tile. Tiles of 64 keys would compute a sixth less in training and a fifth less in decoding (T =
1024), but torch's kernel settings for some head dimensions, and for the backward pass, want a multiple of 128."""
SHAPES = 64
"""Shapes (rows of training, encoder, evaluation; decoding) that may be compiled; torch gives up after 8 by default and
would go on with a dense mask."""
OPTIONS = {"BACKEND": "TRITON"}
"""Never torch's decoding kernel, which it would choose for fewer than 128 queries: with grouped heads its tile of queries
need not divide TILE, and no kernel is left."""


@functools.cache
def _kernel():
    """flex_attention, compiled for every shape of its own."""
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)


def attend(q_BHQD: Tensor, k_BJCD: Tensor, v_BJCD: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention of H query heads that share J key heads, [B, H, Q, D], differentiable; the mask is `block_mask`'s."""
    try:
        return _kernel()(q_BHQD, k_BJCD, v_BJCD, block_mask=mask, scale=scale,
                         enable_gqa=q_BHQD.shape[1] != k_BJCD.shape[1], kernel_options=OPTIONS)
    except Exception as error:
        error.add_note("In FlexAttention's kernel; --ebft-attention sdpa does without it.")
        raise


def block_mask(reach: Reach) -> BlockMask:
    """The BlockMask of what each query sees, for all heads."""
    rows = reach.rows()
    batch, queries = rows.gold_end.shape
    first = torch.arange(0, reach.num_keys, TILE, device=rows.gold_end.device)
    last = (first + TILE).clamp(max=reach.num_keys)
    is_touched = torch.zeros((), dtype=torch.bool, device=first.device)
    is_covered = is_touched
    for start, end in (rows.intervals[:2], rows.intervals[2:]):
        start, end = (torch.nn.functional.pad(x, (0, -queries % TILE))[..., None] for x in (start, end))
        is_touched = is_touched | ((start < last) & (end > first))  # an empty interval is [0, 0)
        is_covered = is_covered | ((start <= first) & (end >= first + TILE))
    is_touched = is_touched.unflatten(1, (-1, TILE)).any(2)[:, None]  # [B, 1, tiles of queries, tiles of keys]
    is_full = is_covered.unflatten(1, (-1, TILE)).all(2)[:, None]
    return BlockMask.from_kv_blocks(*_listed(is_touched & ~is_full), *_listed(is_full), BLOCK_SIZE=TILE,
                                    mask_mod=_mask_mod(reach), seq_lengths=(queries, reach.num_keys))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row there are, and their numbers first in each row: int32."""
    return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()


def _mask_mod(reach: Reach):
    """The test of a single pair; captures tensors alone, so that it compiles once."""
    gold_start, gold_end, own_start, own_end = reach.intervals

    def is_visible(b, h, q, kv):
        sees_gold = (kv >= gold_start[b, q]) & (kv < gold_end[b, q])
        return sees_gold | ((kv >= own_start[b, q]) & (kv < own_end[b, q]))

    return is_visible
