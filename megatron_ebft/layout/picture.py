"""The attention mask of a packed row as cells of a picture: gold tokens, then the rollouts of every block."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ebft.layout.packed_row import RowLayout, split_blocks
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.layout.visible_keys import strided

KINDS = ("hidden", "gold", "context", "own")
"""Nothing; gold → gold; rollout → gold before its anchor; rollout → itself."""
COLORS = {"hidden": "#f1f2f4", "gold": "#e3a72f", "context": "#4a86d8", "own": "#2f9e7a"}
SIDE, BLOCKS, SAMPLES, TOKENS = 600, 4, 4, 2000
"""Least number of pixels of a picture's side, and the most blocks, samples and tokens that it shows."""


def cells(row: RowLayout) -> Tensor:
    """What each query (down) sees of each key (across): places in KINDS, uint8 [T + R, T + R]."""
    gold, index = row.layout.seq_length, torch.arange(row.end)
    kind = torch.where(index[:, None] < gold, 1, torch.where(index < gold, 2, 3))
    return (kind * strided(row, None, batch=1).sees(index)[0]).to(torch.uint8)


def picture(layout: StridedLayout) -> Tensor | None:
    """The mask of the first blocks of an encoder row: uint8 [side, side, 3]. None where one block is too large."""
    length = layout.rollout_length
    for blocks, samples in ((BLOCKS, SAMPLES), (2, SAMPLES), (2, 2), (1, 2), (1, 1)):
        blocks, samples = min(blocks, layout.num_blocks), min(samples, layout.num_samples)
        gold = layout.context_length + (blocks - 1) * layout.stride + length
        if gold + blocks * samples * length <= TOKENS:
            break
    else:
        return None
    drawn = cells(split_blocks(replace(layout, seq_length=gold, num_samples=samples, pad_to=1), 0, length)[0])
    pixels = -(-SIDE // len(drawn))
    colors = torch.tensor([[int(COLORS[kind][i:i + 2], 16) for i in (1, 3, 5)] for kind in KINDS], dtype=torch.uint8)
    return colors[drawn.int()].repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
