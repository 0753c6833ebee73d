"""Keys and values of completions that grow token by token, and the patterns of the passes that fill and read them.

1. Completions have a row of the buffers each, and a column for every position. A row's new token is written at its own
   position, so prompts of unequal length need no alignment and no padding on the left.
2. Rows come and go while others grow: the last row moves to the place of one that leaves.
3. A decoding pass puts one token of each completion side by side in one sequence, [1, R]. Sequence parallelism splits
   that as it splits any other.

Suffixes: B prompts, R completions, C columns of the buffers, S padded length, H query heads, J key heads,
M = H/J, D head dimension.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_ebft.common.device import upload
from megatron_ebft.model.attention import CausalPattern
from megatron_ebft.model.prefix_attention import additive

COLUMNS = 64
"""Buffers grow by at least so many columns. Attention reads a multiple of it: few shapes, and an alignment that the GPU
kernels need for masks."""


def _whole(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


class CompletionCache:
    """Keys and values of at most `rows` completions, by layer number."""

    def __init__(self, rows: int):
        self.rows, self.size = rows, 0
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values, [rows, J, C, D]. Rows from `size` on are free."""

    def add(self, prompts: "PromptPattern", prompt_R: Tensor, columns: int) -> None:
        """Make room for completions of prompts, each a row at the end, with the prompt's keys and values.

        Args:
            prompt_R: which of the prompts each completion continues.
            columns: as many as the longest completion has use for soon.
        """
        rows = slice(self.size, self.size + len(prompt_R))
        assert rows.stop <= self.rows
        self.size = rows.stop
        for layer, kept in prompts.kept.items():
            self._reserve(layer, kept, columns)
            for buffer, values_BJSD in zip(self.buffers[layer], kept):
                buffer[rows, :, : values_BJSD.shape[2]] = values_BJSD[prompt_R]

    def remove(self, rows: list[int]) -> None:
        """Drop these rows. For each, from the highest number on, the last row takes its place."""
        order = list(range(self.size))
        for row in sorted(rows, reverse=True):
            last = order.pop()
            if row < len(order):
                order[row] = last
        self.size = len(order)
        moved = [row for row, before in enumerate(order) if row != before]
        if moved:
            to, origin = upload(torch.tensor([moved, [order[row] for row in moved]]))
            for buffer in (buffer for buffers in self.buffers.values() for buffer in buffers):
                buffer[to] = buffer[origin]

    def reserve(self, columns: int) -> None:
        """Make the buffers at least this long; what they hold stays."""
        for layer, buffers in self.buffers.items():
            if columns > buffers[0].shape[2]:
                self._reserve(layer, buffers, max(columns, buffers[0].shape[2] * 3 // 2))

    def _reserve(self, layer: int, like: tuple[Tensor, Tensor], columns: int) -> None:
        old = self.buffers.get(layer)
        columns = max(_whole(columns), 0 if old is None else old[0].shape[2])
        if old is not None and old[0].shape[2] == columns:
            return
        self.buffers[layer] = tuple(x.new_zeros(self.rows, x.shape[1], columns, x.shape[3]) for x in like)
        for buffer, values in zip(self.buffers[layer], old or ()):
            buffer[: self.size, :, : values.shape[2]] = values[: self.size]


@dataclass
class PromptPattern:
    """Causal attention over prompts that are padded on the right; keeps their keys and values."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """[B, J, S, D] by layer number. Those of padding are arbitrary: a completion overwrites them before it sees
    them."""

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        self.kept[layer_number] = k_BJSD, v_BJSD
        return CausalPattern().attend(layer_number, q_BHSD, k_BJSD, v_BJSD, scale, flex)


@dataclass
class NextTokenPattern:
    """One token of each completion, which sees its own completion up to itself; then padding. Sequences of [1, S]."""

    cache: CompletionCache
    position_R: Tensor
    """int64."""
    columns: int
    """More than any of the positions."""
    _mask_R11C: Tensor | None = None
    """Additive. Made by the first layer, used by all."""

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        count, length, groups = len(self.position_R), q_BHSD.shape[2], k_BJSD.shape[1]
        seen = slice(0, _whole(self.columns))
        row_R = torch.arange(count, device=self.position_R.device)
        for buffer, new in zip(self.cache.buffers[layer_number], (k_BJSD, v_BJSD)):
            buffer[row_R, :, self.position_R] = new[0, :, :count].transpose(0, 1)
        keys, values = (buffer[:count, :, seen] for buffer in self.cache.buffers[layer_number])
        if self._mask_R11C is None:
            column_C = torch.arange(keys.shape[2], device=row_R.device)
            self._mask_R11C = additive(column_C <= self.position_R[:, None], q_BHSD.dtype)[:, None, None]
        q_RJMD = q_BHSD[0, :, :count].transpose(0, 1).unflatten(1, (groups, -1))
        mask = self._mask_R11C.expand(-1, groups, q_RJMD.shape[2], -1)
        out_RHD = scaled_dot_product_attention(q_RJMD, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)
        return pad(out_RHD.transpose(0, 1)[None], (0, 0, 0, length - count))
