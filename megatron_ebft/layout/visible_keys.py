"""What every query of a pass sees, as two intervals of keys: the form in which attention kernels are told.

The keys of a pass are one sequence: gold tokens, then rollout tokens ordered (block, sample, step). A query sees gold
keys [gold_start, gold_end) and, of its own rollout, keys [own_start, own_end). A document mask moves gold_start.
Padding sees the first gold key, so that its softmax is finite; no result is read from it.

The constructors (`causal`, `strided`, `decoding`) compute on the host and upload. All methods run on the device and
never wait for it.

Suffixes: B rows, Q queries, C keys, T gold tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.packed_row import RowLayout


@dataclass
class VisibleKeys:
    """Intervals of keys that each query sees, int32 [B, Q]."""

    gold_start: Tensor
    gold_end: Tensor
    own_start: Tensor
    own_end: Tensor
    num_keys: int
    """C, keys of the pass."""
    same_rows: bool
    """Whether the queries of all rows see the same: without a document mask, in rows that leave no rollouts out."""

    @property
    def intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gold_start, self.gold_end, self.own_start, self.own_end

    def rows(self) -> "VisibleKeys":
        """The first row alone where all rows are the same, else all of them."""
        return self._map(lambda x: x[:1]) if self.same_rows else self

    def queries(self, part: slice) -> "VisibleKeys":
        """Some of the queries."""
        return self._map(lambda x: x[:, part])

    def repeat(self, times: int) -> "VisibleKeys":
        """Every query `times` times in a row, for the query heads that share a key head."""
        return self._map(lambda x: x.repeat_interleave(times, dim=1))

    def padded(self, count: int) -> "VisibleKeys":
        """With `count` more queries of padding at the end."""
        padded = self._map(lambda x: torch.nn.functional.pad(x, (0, count)))
        padded.gold_end[:, padded.gold_end.shape[1] - count:] = 1
        return padded

    def at_step(self, step: int) -> "VisibleKeys":
        """From `decoding`, which is step 0, to another step."""
        return replace(self, own_end=(self.own_end + step).where(self.own_end > self.own_start, self.own_end))

    def gold_alone(self, num_gold: int) -> "VisibleKeys":
        """The gold keys that it sees, as a pass over gold keys alone."""
        nothing = torch.zeros_like(self.own_start)
        return replace(self, own_start=nothing, own_end=nothing, num_keys=num_gold)

    def sees(self, keys: Tensor) -> Tensor:
        """Whether each query sees each of these keys (their numbers, int [C']), bool [B or 1, Q, C']."""
        gold_start, gold_end, own_start, own_end = (x[..., None] for x in self.rows().intervals)
        return ((keys >= gold_start) & (keys < gold_end)) | ((keys >= own_start) & (keys < own_end))

    def _map(self, change) -> "VisibleKeys":
        return VisibleKeys(*map(change, self.intervals), self.num_keys, self.same_rows)


def causal(batch: int, length: int, starts_BT: Tensor | None) -> VisibleKeys:
    """Gold rows alone.

    Args:
        starts_BT: `document_starts`, or None without a document mask.
    """
    ends = torch.arange(1, length + 1)
    return _uploaded(ends[None], torch.zeros(2, length, dtype=torch.int64), starts_BT, batch, length, 0)


def strided(row: RowLayout, starts_BT: Tensor | None, batch: int) -> VisibleKeys:
    """A packed row: gold tokens, rollout tokens, padding."""
    gold, anchor = row.layout.seq_length, row.rollout_anchor
    ends = torch.cat([torch.arange(1, gold + 1).expand(len(anchor), -1), anchor], dim=1)
    own_start = gold + row.rollout_number * row.steps
    own = torch.nn.functional.pad(torch.stack([own_start, own_start + row.rollout_step + 1]), (gold, 0))
    starts = None if starts_BT is None else torch.cat([starts_BT, _starts_at_anchors(anchor, starts_BT)], dim=1)
    return _uploaded(ends, own, starts, batch, row.length, row.length - row.end)


def decoding(row: RowLayout, starts_BT: Tensor | None, batch: int) -> VisibleKeys:
    """Step 0 of every rollout of a row, and padding, against keys [gold | `row.steps` of every rollout]."""
    anchor = row.anchor_of_rollouts
    own_start = row.layout.seq_length + torch.arange(row.num_rollouts) * row.steps
    starts = None if starts_BT is None else _starts_at_anchors(anchor, starts_BT)
    return _uploaded(anchor, torch.stack([own_start, own_start + 1]), starts, batch, row.end,
                     row.decode_length - row.num_rollouts)


def _starts_at_anchors(anchor: Tensor, starts_BT: Tensor) -> Tensor:
    """First gold token of the document of each rollout token's context, [B, Q].

    Args:
        anchor: of each rollout token, [B, Q], or [1, Q] for all rows.
    """
    return starts_BT.gather(1, upload(anchor - 1).expand(len(starts_BT), -1))


def _uploaded(gold_end: Tensor, own: Tensor, starts: Tensor | None, batch: int, num_keys: int,
              padding: int) -> VisibleKeys:
    """Intervals on the device, with `padding` queries of padding.

    Args:
        gold_end: int [B, Q], or [1, Q] for all rows; on the host.
        own: own_start and own_end of all rows, int [2, Q]; on the host.
        starts: gold_start, [B, Q] on the device, or None for 0.
    """
    ends = upload(torch.nn.functional.pad(gold_end, (0, padding), value=1).int()).expand(batch, -1).contiguous()
    own_start, own_end = upload(torch.nn.functional.pad(own, (0, padding)).int())[:, None].expand(-1, batch, -1)
    gold_start = torch.zeros_like(ends)
    if starts is not None:
        gold_start[:, : starts.shape[1]] = starts
    return VisibleKeys(gold_start, ends, own_start.contiguous(), own_end.contiguous(), num_keys,
                       same_rows=starts is None and len(gold_end) == 1)
