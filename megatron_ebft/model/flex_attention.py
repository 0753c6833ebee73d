"""FlexAttention: one compiled kernel for every pattern that `VisibleKeys` describes.

1. The kernel's lists of tiles are made from the intervals of VisibleKeys, on the device. This costs queries × tiles of
   keys, not queries × keys, so each pass makes its own lists. They skip tiles that a document mask hides. The kernel
   applies the mask in every tile that is not full; a tile is full if, for each of its queries, one interval covers it.
2. The kernel is compiled for each shape. All lengths are whole tiles, so it checks no bounds. Rows that leave rollouts
   out have few lengths (ROW_SIZES), so a run needs at most COMPILATIONS. One kernel for all lengths was slower on an
   H100 (8B, T = 1024: backward 2.4 ms instead of 1.3, forward in the encoder 0.36 ms instead of 0.22).
3. In a run all rows are whole tiles (`configs.ebft_config`); this adds less than a tile of padding to a row. Other
   lengths are padded here, which copies queries, keys and values in each layer.
4. Lists and intervals are tensors, so new documents and decoding steps need no new compilation. They are never changed
   in place, since the backward pass of one micro-batch may come after the forward pass of the next.
5. Rollout tokens are ordered (block, sample, step), which keeps tiles full: tests/model/test_flex_attention.py counts.

Written against torch 2.11 to 2.14. FlexAttention has a backward pass on GPUs only.

Suffixes: B rows, H query heads, J key heads, Q queries, C keys, M tiles of queries, N tiles of keys, D head dimension.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_ebft.layout.visible_keys import VisibleKeys
from megatron_ebft.model import kernels

TILE = 128
"""Queries, and keys, of a tile. Tiles of 64 keys would compute a sixth less in training and a fifth less in decoding
(T = 1024), but torch's settings for some head dimensions, and for the backward pass, need a multiple of 128."""
ROW_SIZES = 8
"""A row has room for a multiple of an eighth of its rollouts (or for none). Each size is a length, and so a kernel."""
COMPILATIONS = 5 * (ROW_SIZES + 1) + 10
"""The most kernels that a run compiles. ROW_SIZES + 1 lengths of rows, in five passes: training with gradients and
without, encoder, and the encoder and the scores of evaluation. 8 for sampling: prefill with documents and decoding, in
training and evaluation, for two numbers of rows each. 2 for the cross entropy with documents. (Torch's limit is 8.)
The decoding of a fused step is a function of its own, of up to ROW_SIZES lengths (layout/tree.py)."""
OPTIONS = {"BACKEND": "TRITON"}
"""Excludes torch's decoding kernel, which it may choose for few queries. With grouped heads, its tile of queries need
not divide TILE, and then torch finds no kernel."""


@dataclass
class Tiles:
    """Which tiles of keys each tile of queries visits."""

    is_partial: Tensor
    """Tiles in which the mask is applied, bool [B, 1, M, N]."""
    is_full: Tensor
    """Tiles that are wholly visible, bool [B, 1, M, N]."""

    @functools.cached_property
    def by_query(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tiles of keys for each tile of queries: number and indices of partial ones, and of full ones."""
        return *_listed(self.is_partial), *_listed(self.is_full)

    @functools.cached_property
    def by_key(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tiles of queries for each tile of keys, likewise; only a backward pass needs them."""
        return *_listed(self.is_partial.mT), *_listed(self.is_full.mT)


@dataclass
class TileMask:
    """What each query sees, in the form that the kernel takes; made by `tile_mask`."""

    intervals: tuple[Tensor, Tensor, Tensor, Tensor]
    """VisibleKeys.intervals, padded to whole tiles, int32 [B, Q]."""
    tiles: Tiles

    def with_intervals(self, visible: VisibleKeys) -> "TileMask":
        """The mask of other intervals that lie within the same tiles."""
        return TileMask(_intervals(visible), self.tiles)


def attend(q_BHQD: Tensor, k_BJCD: Tensor, v_BJCD: Tensor, mask: TileMask, scale: float) -> Tensor:
    """Attention of H query heads that share J key heads: [B, H, Q, D], differentiable."""
    return _call(_attend, q_BHQD, k_BJCD, v_BJCD, mask, scale)[:, :, : q_BHQD.shape[2]]


def attend_with_lse(q_BHQD: Tensor, k_BJCD: Tensor, v_BJCD: Tensor, mask: TileMask,
                    scale: float) -> tuple[Tensor, Tensor]:
    """`attend`, and the natural log-sum-exp of each query's scores, float32 [B, H, Q]; both differentiable."""
    out, lse = _call(_attend_with_lse, q_BHQD, k_BJCD, v_BJCD, mask, scale)
    return out[:, :, : q_BHQD.shape[2]], lse[:, :, : q_BHQD.shape[2]]


def _call(function, q_BHQD, k_BJCD, v_BJCD, mask: TileMask, scale: float):
    assert mask.intervals[0].shape[1] == q_BHQD.shape[2] + -q_BHQD.shape[2] % TILE
    qkv, by_key = map(_padded, (q_BHQD, k_BJCD, v_BJCD)), (None,) * 4
    if torch.is_grad_enabled():
        by_key = mask.tiles.by_key
    else:
        qkv = (x.detach() for x in qkv)  # else the first pass of recomputation would compile another kernel
    try:
        return _kernel(function)(*qkv, mask.intervals, mask.tiles.by_query, by_key, scale)
    except Exception as error:
        error.add_note("This came from FlexAttention's kernel; --ebft-attention sdpa does not use it.")
        raise


def tile_mask(visible: VisibleKeys, widest: VisibleKeys | None = None) -> TileMask:
    """The mask of what each query sees, for all heads; queries are padded to whole tiles.

    Args:
        widest: intervals that contain those of `visible`. The tiles then also serve all intervals between the two
            (`TileMask.with_intervals`).
    """
    batch = len(visible.gold_end)
    first = torch.arange(0, visible.num_keys, TILE, device=visible.gold_end.device)
    is_touched = is_covered = torch.zeros((), dtype=torch.bool, device=first.device)
    for start, end in _pairs(widest or visible):
        is_touched = is_touched | ((start < first + TILE) & (end > first))  # an empty interval is [0, 0)
    for start, end in _pairs(visible):
        is_covered = is_covered | ((start <= first) & (end >= first + TILE))
    is_touched, is_full = (x[:, None].expand(batch, -1, -1, -1) for x in (
        is_touched.unflatten(1, (-1, TILE)).any(2), is_covered.unflatten(1, (-1, TILE)).all(2)))
    return TileMask(_intervals(visible), Tiles(is_touched & ~is_full, is_full))


def _whole_tiles(visible: VisibleKeys) -> VisibleKeys:
    return visible.padded(-visible.gold_end.shape[1] % TILE)


def _pairs(visible: VisibleKeys) -> list[tuple[Tensor, Tensor]]:
    """Start and end of each query's gold interval, and of its own one: [B or 1, M · TILE, 1]."""
    gold_start, gold_end, own_start, own_end = (x[..., None] for x in _whole_tiles(visible).rows().intervals)
    return [(gold_start, gold_end), (own_start, own_end)]


def _intervals(visible: VisibleKeys) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _whole_tiles(visible).intervals


@functools.cache
def _kernel(function):
    return kernels.compile_kernels(function, COMPILATIONS)


def _attend(q_BHQD, k_BJCD, v_BJCD, intervals, by_query, by_key, scale, **options):
    """The function that is compiled; Q and C are whole tiles."""
    mask = BlockMask((q_BHQD.shape[2], k_BJCD.shape[2]), *by_query, *by_key, BLOCK_SIZE=(TILE, TILE),
                     mask_mod=_mask_mod(*intervals))
    return flex.flex_attention(q_BHQD, k_BJCD, v_BJCD, block_mask=mask, scale=scale, kernel_options=OPTIONS,
                               enable_gqa=q_BHQD.shape[1] != k_BJCD.shape[1], **options)


def _attend_with_lse(*args) -> tuple[Tensor, Tensor]:
    out, aux = _attend(*args, return_aux=flex.AuxRequest(lse=True))
    return out, aux.lse


def _mask_mod(gold_start, gold_end, own_start, own_end):
    """The test of one pair of query and key. It captures only tensors, whose values may change without compilation."""

    def is_visible(b, h, q, kv):
        sees_gold = (kv >= gold_start[b, q]) & (kv < gold_end[b, q])
        return sees_gold | ((kv >= own_start[b, q]) & (kv < own_end[b, q]))

    return is_visible


def _padded(x_BHSD: Tensor) -> Tensor:
    """x, padded with zeros to whole tiles."""
    padding = -x_BHSD.shape[2] % TILE
    return torch.nn.functional.pad(x_BHSD, (0, 0, 0, padding)) if padding else x_BHSD


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number of tiles in each row of a bool tensor, and their indices (before those of the others), int32."""
    tiles = tiles.contiguous()  # the kernel ignores the strides of lists
    which = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return tiles.sum(-1, dtype=torch.int32), which
