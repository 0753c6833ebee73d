"""The token order of step files: step-major, as in the released code.

There is one row for each sample. Gold tokens come first; the token of block k at step t is at T + t·NB + k.
"""

import torch
from torch import Tensor

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout


def to_step_major(layout: StridedLayout, values_BKNG: Tensor, gold_BT: Tensor | None = None) -> Tensor:
    """Values of rollout tokens in step-major order [B·n, G·NB], the n samples of a row in consecutive rows.

    Args:
        gold_BT: values of gold tokens. If given, they come first in each of the n rows: [B·n, T + G·NB].
    """
    rows = values_BKNG.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)
    if gold_BT is None:
        return rows
    return torch.cat([gold_BT.repeat_interleave(layout.num_samples, dim=0), rows], dim=1)


def from_step_major(layout: StridedLayout, rows: Tensor) -> Tensor:
    """The inverse of `to_step_major` for rollout tokens alone: [B·n, G·NB] → [B, NB, n, G]."""
    by_step = rows.unflatten(1, (-1, layout.num_blocks)).unflatten(0, (-1, layout.num_samples))
    return by_step.permute(0, 3, 1, 2)


def step_major_positions(layout: StridedLayout, starts_BT: Tensor | None, batch: int) -> Tensor:
    """Position ids of step-major rows, int64 [B·n, T + G·NB]; with a document mask they restart at each document.

    Args:
        starts_BT: `document_starts`, or None without a document mask.
    """
    row = split_blocks(layout, 0, layout.rollout_length)[0]
    gold, rollouts = row.positions(starts_BT, batch)[:, : row.end].tensor_split([layout.seq_length], dim=1)
    shape = (layout.num_blocks, layout.num_samples, layout.rollout_length)
    return to_step_major(layout, rollouts.unflatten(1, shape), gold)
