"""What every query of a pass sees, as two intervals of keys: the one form in which attention kernels are told.

Keys of a pass stand in one sequence, gold tokens first, then rollout tokens ordered (block, sample, step). A query sees
gold keys [gold_start, gold_end) and, of its own rollout, keys [own_start, own_end). A document mask moves gold_start.
Padding sees the first gold key, so that its softmax is finite; nothing is read there.

Everything after the constructors runs on the device, without waiting for it.

Suffixes: B rows, Q queries, C keys, T gold tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.packed_row import RowLayout


@dataclass
class Reach:
    """Intervals of keys that each query sees, int32 [B, Q] (equal rows where `same_rows`)."""

    gold_start: Tensor
    gold_end: Tensor
    own_start: Tensor
    own_end: Tensor
    num_keys: int
    """C, keys of the pass."""
    same_rows: bool
    """Whether every row of the batch sees the same: so without a document mask, unless rows leave rollouts out."""

    @property
    def intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gold_start, self.gold_end, self.own_start, self.own_end

    def rows(self) -> "Reach":
        """One row that stands for all where they are the same, else all of them."""
        return self._map(lambda x: x[:1]) if self.same_rows else self

    def queries(self, part: slice) -> "Reach":
        """Some of the queries."""
        return self._map(lambda x: x[:, part])

    def repeat(self, times: int) -> "Reach":
        """Every query so many times in a row: the query heads that share a key head."""
        return self._map(lambda x: x.repeat_interleave(times, dim=1))

    def padded(self, count: int) -> "Reach":
        """Append `count` queries of padding, which see the first gold key."""
        padded = self._map(lambda x: torch.nn.functional.pad(x, (0, count)))
        padded.gold_end[:, padded.gold_end.shape[1] - count:] = 1
        return padded

    def at_step(self, step: int) -> "Reach":
        """Queries of `decoding`, at another step than 0."""
        return replace(self, own_end=(self.own_end + step).where(self.own_end > self.own_start, self.own_end))

    def sees(self, keys: Tensor) -> Tensor:
        """Which of the keys (int [C'], by their places) each query sees, bool [B or 1, Q, C']."""
        gold_start, gold_end, own_start, own_end = (x[..., None] for x in self.rows().intervals)
        return ((keys >= gold_start) & (keys < gold_end)) | ((keys >= own_start) & (keys < own_end))

    def _map(self, change) -> "Reach":
        return Reach(*map(change, self.intervals), self.num_keys, self.same_rows)


def _reach(gold_end: Tensor, own: Tensor, starts: Tensor | None, batch: int, num_keys: int, padding: int) -> Reach:
    """gold_end: int [B, Q], or [1, Q] for all rows, and own: own_start and own_end, int [2, Q], on the host; starts:
    gold_start, [B, Q], or None for 0."""
    ends = upload(torch.nn.functional.pad(gold_end, (0, padding), value=1).int()).expand(batch, -1).contiguous()
    own_start, own_end = upload(torch.nn.functional.pad(own, (0, padding)).int())[:, None].expand(-1, batch, -1)
    gold_start = torch.zeros_like(ends)
    if starts is not None:
        gold_start[:, : starts.shape[1]] = starts
    return Reach(gold_start, ends, own_start.contiguous(), own_end.contiguous(), num_keys,
                 same_rows=starts is None and len(gold_end) == 1)


def causal(batch: int, length: int, starts_BT: Tensor | None) -> Reach:
    """Gold rows alone. starts_BT: `document_starts`, or None without a document mask."""
    ends = torch.arange(1, length + 1)
    return _reach(ends[None], torch.zeros(2, length, dtype=torch.int64), starts_BT, batch, length, 0)


def strided(row: RowLayout, starts_BT: Tensor | None, batch: int) -> Reach:
    """A packed row: gold tokens, rollout tokens, padding."""
    gold, anchor = row.layout.seq_length, row.rollout_anchor
    ends = torch.cat([torch.arange(1, gold + 1).expand(len(anchor), -1), anchor], dim=1)
    own_start = gold + row.rollout_number * row.steps
    own = torch.nn.functional.pad(torch.stack([own_start, own_start + row.rollout_step + 1]), (gold, 0))
    starts = None if starts_BT is None else torch.cat([starts_BT, _at_anchors(anchor, starts_BT)], dim=1)
    return _reach(ends, own, starts, batch, row.length, row.length - row.end)


def decoding(row: RowLayout, starts_BT: Tensor | None, batch: int) -> Reach:
    """Step 0 of every rollout and padding, against keys [gold | `row.steps` of every rollout]; of a regular row."""
    anchor = row.anchors.repeat_interleave(row.layout.num_samples)[None]
    own_start = row.layout.seq_length + torch.arange(row.num_rollouts) * row.steps
    starts = None if starts_BT is None else _at_anchors(anchor, starts_BT)
    return _reach(anchor, torch.stack([own_start, own_start + 1]), starts, batch, row.end,
                  row.decode_length - row.num_rollouts)


def _at_anchors(anchor: Tensor, starts_BT: Tensor) -> Tensor:
    """Where the document of each rollout's context starts, [B, Q]; anchor: [B, Q], or [1, Q] for all rows."""
    return starts_BT.gather(1, upload(anchor - 1).expand(len(starts_BT), -1))
