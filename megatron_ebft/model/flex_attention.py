"""FlexAttention: one compiled kernel for every pattern of keys that `Reach` describes.

1. The kernel's lists of tiles are made of a Reach's intervals, tile by tile, on the device: their cost is queries ×
   tiles of keys, not queries × keys, so they are made afresh for each pass, know the documents, and skip what those
   hide. A tile counts as full, which spares the kernel the mask, only if one interval of each of its queries covers it.
2. The kernel is compiled for each shape. Lengths are whole tiles, so it checks no bounds, and rows that leave rollouts
   out have few lengths (ROOMS): a run needs at most COMPILATIONS. One kernel for all lengths, with the number of tiles
   unknown, was slower on an H100 (8B, T = 1024: backward 2.4 ms in place of 1.3, forward in the encoder 0.36 of 0.22).
3. Rows in a run are whole tiles already (`arguments.ebft_config`), at the price of less than a tile of padding a row.
   Other lengths are filled up here, which copies queries, keys and values in each layer.
4. Lists and intervals are tensors: other values, other documents and other decoding steps take the compiled kernel.
   They are never changed in place, since the backward pass of one micro-batch may come after the next one's forward.
5. Rollout tokens ordered (block, sample, step) keep tiles full: tests/model/test_flex_attention.py counts them.

Written against torch 2.11 to 2.14. FlexAttention has a backward pass on GPUs only.

Suffixes: B rows, H query heads, J key heads, Q queries, C keys, M tiles of queries, N tiles of keys, D head dimension.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_ebft.layout.visible_keys import Reach
from megatron_ebft.model import kernels

TILE = 128
"""Queries and keys of a tile. Tiles of 64 keys would compute a sixth less in training and a fifth less in decoding (T =
1024), but torch's kernel settings for some head dimensions, and for the backward pass, want a multiple of 128."""
ROOMS = 8
"""Room for rollouts in a row is none or a multiple of a whole row's eighth: each size is a length, and so a kernel."""
COMPILATIONS = 5 * (ROOMS + 1) + 10
"""The most kernels that a run compiles: for ROOMS + 1 lengths of rows each in training (with gradients and without), in
the encoder, and in evaluation's encoder and scores; 8 for prefill of documents and decoding, of training and
evaluation, for two numbers of rows each; 2 for the cross entropy of documents. Torch gives up after 8 unless told."""
OPTIONS = {"BACKEND": "TRITON"}
"""Never torch's decoding kernel, which it may choose for few queries: with grouped heads its tile of queries need not
divide TILE, and no kernel is left."""


@dataclass
class Tiles:
    """Which tiles of keys each tile of queries visits."""

    is_partial: Tensor
    """Tiles of which the mask hides a part, bool [B, 1, M, N]."""
    is_full: Tensor
    """Tiles without a mask, bool [B, 1, M, N]."""

    @functools.cached_property
    def by_query(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tiles of keys that each tile of queries visits: how many partial ones and which; the same of full ones."""
        return *_listed(self.is_partial), *_listed(self.is_full)

    @functools.cached_property
    def by_key(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tiles of queries that visit each tile of keys, which only a backward pass asks for."""
        return *_listed(self.is_partial.mT), *_listed(self.is_full.mT)


@dataclass
class TileMask:
    """What each query sees, as the kernel wants it; made by `tile_mask`."""

    intervals: tuple[Tensor, Tensor, Tensor, Tensor]
    """Those of a Reach, int32 [B, Q]."""
    tiles: Tiles

    def with_intervals(self, reach: Reach) -> "TileMask":
        """The mask of another Reach within the same tiles."""
        return TileMask(_intervals(reach), self.tiles)


def attend(q_BHQD: Tensor, k_BJCD: Tensor, v_BJCD: Tensor, mask: TileMask, scale: float) -> Tensor:
    """Attention of H query heads that share J key heads, [B, H, Q, D], differentiable; the mask is `tile_mask`'s."""
    qkv, by_key = map(_filled_up, (q_BHQD, k_BJCD, v_BJCD)), (None,) * 4
    if torch.is_grad_enabled():
        by_key = mask.tiles.by_key
    else:
        qkv = (x.detach() for x in qkv)  # or recomputation would compile a kernel of its own
    try:
        out = _kernel()(*qkv, mask.intervals, mask.tiles.by_query, by_key, scale)
    except Exception as error:
        error.add_note("In FlexAttention's kernel; --ebft-attention sdpa does without it.")
        raise
    return out[:, :, : q_BHQD.shape[2]]


def tile_mask(reach: Reach, widest: Reach | None = None) -> TileMask:
    """The mask of what each query sees, for all heads; padding up to a whole tile sees the first gold key.

    Args:
        widest: a Reach whose intervals contain those of `reach`. The tiles then serve every Reach between the two, with
            their own intervals (`TileMask.with_intervals`).
    """
    batch = len(reach.gold_end)
    first = torch.arange(0, reach.num_keys, TILE, device=reach.gold_end.device)
    is_touched = is_covered = torch.zeros((), dtype=torch.bool, device=first.device)
    for start, end in _pairs(widest or reach):
        is_touched = is_touched | ((start < first + TILE) & (end > first))  # an empty interval is [0, 0)
    for start, end in _pairs(reach):
        is_covered = is_covered | ((start <= first) & (end >= first + TILE))
    is_touched, is_full = (x[:, None].expand(batch, -1, -1, -1) for x in (
        is_touched.unflatten(1, (-1, TILE)).any(2), is_covered.unflatten(1, (-1, TILE)).all(2)))
    return TileMask(_intervals(reach), Tiles(is_touched & ~is_full, is_full))


def _whole_tiles(reach: Reach) -> Reach:
    return reach.padded(-reach.gold_end.shape[1] % TILE)


def _pairs(reach: Reach) -> list[tuple[Tensor, Tensor]]:
    """Starts and ends of the two intervals of each query, [B or 1, M · TILE, 1]."""
    gold_start, gold_end, own_start, own_end = (x[..., None] for x in _whole_tiles(reach).rows().intervals)
    return [(gold_start, gold_end), (own_start, own_end)]


def _intervals(reach: Reach) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _whole_tiles(reach).intervals


@functools.cache
def _kernel():
    return kernels.compile_kernels(_attend, COMPILATIONS)


def _attend(q_BHQD, k_BJCD, v_BJCD, intervals, by_query, by_key, scale) -> Tensor:
    """What is compiled; Q and C are whole tiles."""
    mask = BlockMask((q_BHQD.shape[2], k_BJCD.shape[2]), *by_query, *by_key, BLOCK_SIZE=(TILE, TILE),
                     mask_mod=_mask_mod(*intervals))
    return flex.flex_attention(q_BHQD, k_BJCD, v_BJCD, block_mask=mask, scale=scale, kernel_options=OPTIONS,
                               enable_gqa=q_BHQD.shape[1] != k_BJCD.shape[1])


def _mask_mod(gold_start, gold_end, own_start, own_end):
    """The test of a single pair; captures tensors alone."""

    def is_visible(b, h, q, kv):
        sees_gold = (kv >= gold_start[b, q]) & (kv < gold_end[b, q])
        return sees_gold | ((kv >= own_start[b, q]) & (kv < own_end[b, q]))

    return is_visible


def _filled_up(x_BHSD: Tensor) -> Tensor:
    """Filled up with zeros to whole tiles."""
    padding = -x_BHSD.shape[2] % TILE
    return torch.nn.functional.pad(x_BHSD, (0, 0, 0, padding)) if padding else x_BHSD


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row there are, and their numbers first in each row: int32."""
    tiles = tiles.contiguous()  # the kernel reads lists as contiguous, whatever their strides
    which = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return tiles.sum(-1, dtype=torch.int32), which
