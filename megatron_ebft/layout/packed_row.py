"""One packed row: gold tokens and the rollouts of some blocks.

1. A row is [gold tokens | rollout tokens | padding], rollout tokens ordered (block, sample, step).
2. A row may hold a contiguous part of the blocks (`split_blocks`), so that long rows can be split over micro-batches.
   Parts have equal size; a part past the end repeats the last block, marked as not real.
3. Sequence parallelism shares a row's tokens out over tensor ranks, so rows (and decoding steps) end in padding up to a
   multiple of `pad_to`. Padding sees nothing, nothing sees it, and nothing is read there.
4. A row may leave rollouts out (KeptRollouts): those that an earlier rollout of their block equals token for token,
   and those that nobody needs. The U that stay, in the same order, take the place of the size · n; U is the same in
   every row of a micro-batch. A row that leaves nothing out is the regular one.

Suffixes of tensor names: B rows, T gold tokens, R rollout tokens of a row, K blocks, N samples, G steps, S row length,
U rollouts of a row.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.strided import StridedLayout, pad


@dataclass(frozen=True, eq=False)
class KeptRollouts:
    """Which of its size · n rollouts each row of a micro-batch holds."""

    pick_BU: Tensor
    """Slot · n + sample of each, int64, rising. Rows that keep fewer than U repeat the last; nobody reads it there."""
    where_BKN: Tensor
    """Which of the U a slot's rollout, or its equal, is, int64; 0 for those left out."""
    is_here_BKN: Tensor
    """False for rollouts left out, bool."""


@dataclass(frozen=True)
class RowLayout:
    """One packed row: T gold tokens, `steps` tokens of each rollout of `size` blocks from `first_block` on, padding.

    What a rollout token sees follows from `rollout_anchor`, `rollout_number` and `rollout_step`: gold tokens before its
    anchor (with a document mask, from the start of the document of the last of these), and the tokens of its own number
    up to its own step.
    """

    layout: StridedLayout
    first_block: int
    size: int
    """Blocks in this row; the last part may repeat the final block (see `is_real`)."""
    steps: int
    """Rollout tokens kept of each rollout."""
    kept: KeptRollouts | None = None
    """None: every rollout."""

    def room(self, computed_BKN: Tensor) -> int:
        """U, rollouts that rows need room for: as many as the fullest computes, rounded up to one of `rooms` sizes.

        Args:
            computed_BKN: `computed_rollouts` of ALL blocks of these rows.
        """
        whole = self.size * self.layout.num_samples
        step = -(-whole // self.layout.rooms)
        most = int(self._is_computed(computed_BKN).sum(1).max())
        return min(whole, -(-most // step) * step)

    def keep(self, computed_BKN: Tensor, first_BKN: Tensor, room: int) -> "RowLayout":
        """The row with `room` rollouts, the computed ones; the regular row if that is all there is.

        Args:
            computed_BKN: `computed_rollouts`, first_BKN: `first_alike`, of ALL blocks of these rows, on the CPU.
        """
        if room == self.size * self.layout.num_samples:
            return self
        computed_BM = self._is_computed(computed_BKN)
        counts_B1 = computed_BM.sum(1, keepdim=True)
        in_order_BM = (~computed_BM).byte().argsort(dim=1, stable=True)
        pick_BU = in_order_BM.gather(1, torch.arange(room).expand(len(counts_B1), -1).minimum(
            (counts_B1 - 1).clamp(min=0)))
        place_BKN = (computed_BM.cumsum(1) - 1).unflatten(1, (self.size, -1))
        first_BKN = first_BKN[:, self.blocks]
        is_here_BKN = computed_BM.view(place_BKN.shape).gather(-1, first_BKN)
        where_BKN = place_BKN.gather(-1, first_BKN).where(is_here_BKN, 0)
        return replace(self, kept=KeptRollouts(pick_BU, where_BKN, is_here_BKN))

    def _is_computed(self, computed_BKN: Tensor) -> Tensor:
        """Of the rollouts of this row's slots, [B, size · n]."""
        return (computed_BKN[:, self.blocks] & self.is_real[:, None]).flatten(1)

    @property
    def num_rollouts(self) -> int:
        """U, size · n unless rollouts are left out."""
        return self.size * self.layout.num_samples if self.kept is None else self.kept.pick_BU.shape[1]

    @property
    def num_rollout_tokens(self) -> int:
        """R = U · steps."""
        return self.num_rollouts * self.steps

    @property
    def end(self) -> int:
        """T + R, where padding begins."""
        return self.layout.seq_length + self.num_rollout_tokens

    @property
    def length(self) -> int:
        """S, T + R and padding."""
        return self.end + -self.end % self.layout.pad_to

    @property
    def decode_length(self) -> int:
        """Tokens of one decoding step: one of each rollout, and padding."""
        return self.num_rollouts + -self.num_rollouts % self.layout.pad_to

    @cached_property
    def blocks(self) -> Tensor:
        """Block number of each block slot, int64 [size]."""
        return torch.arange(self.first_block, self.first_block + self.size).clamp(max=self.layout.num_blocks - 1)

    @cached_property
    def is_real(self) -> Tensor:
        """False for slots past the last block, bool [size]."""
        return torch.arange(self.first_block, self.first_block + self.size) < self.layout.num_blocks

    @cached_property
    def anchors(self) -> Tensor:
        """Anchor of each block slot, int64 [size]."""
        return self.layout.anchors()[self.blocks]

    @cached_property
    def rollout_number(self) -> Tensor:
        """Which of the row's U rollouts each rollout token belongs to, int64 [R]."""
        return torch.arange(self.num_rollouts).repeat_interleave(self.steps)

    @cached_property
    def rollout_step(self) -> Tensor:
        """Step t of each rollout token, int64 [R]."""
        return torch.arange(self.steps).repeat(self.num_rollouts)

    @cached_property
    def rollout_anchor(self) -> Tensor:
        """Anchor of each rollout token's block, int64 [B, R], or [1, R] in regular rows, which are all the same."""
        if self.kept is None:
            slot = torch.arange(self.size).repeat_interleave(self.layout.num_samples)[None]
        else:
            slot = self.kept.pick_BU // self.layout.num_samples
        return self.anchors[slot].repeat_interleave(self.steps, dim=1)

    def _of_rollouts(self, values_BKNG: Tensor) -> Tensor:
        """From values of the rollouts of ALL blocks those of the row's own, [B, U, G]."""
        here = values_BKNG[:, upload(self.blocks, values_BKNG.device)].flatten(1, 2)
        if self.kept is None:
            return here
        pick = upload(self.kept.pick_BU, here.device)
        return here.gather(1, pick[..., None].expand(-1, -1, here.shape[2]))

    def pack(self, gold_BT: Tensor, rollout_BKNG: Tensor) -> Tensor:
        """Tokens of the row [B, S], from the gold row and the rollouts of ALL blocks [B, NB, n, G]."""
        kept = self._of_rollouts(rollout_BKNG)[..., : self.steps]
        return pad(torch.cat([gold_BT, kept.flatten(1)], dim=1), self.length)

    def positions(self, starts_BT: Tensor | None, batch: int) -> Tensor:
        """Position ids [B, S]; with a document mask they restart at each document.

        Args:
            starts_BT: `document_starts`, or None without a document mask.
        """
        rollouts = self.rollout_anchor + self.rollout_step
        gold = torch.arange(self.layout.seq_length).expand(len(rollouts), -1)
        row = torch.cat([gold, rollouts], dim=1).expand(batch, -1)
        if starts_BT is not None:
            before_anchor = upload(self.rollout_anchor - 1, starts_BT.device).expand(batch, -1)
            row = upload(row, starts_BT.device) - torch.cat([starts_BT, starts_BT.gather(1, before_anchor)], dim=1)
        return pad(row, self.length)

    def anchor_predictors(self) -> Tensor:
        """Row index that predicts step 0 of every block slot (shared by its n samples), int64 [size]."""
        return self.anchors - 1

    def rollout_index(self, steps: range) -> Tensor:
        """Row indices of the given steps of every rollout of a regular row, int64 [size, n, len(steps)].

        The tokens of steps 0..G−2 predict those of steps 1..G−1.
        """
        assert self.kept is None and steps.start >= 0 and steps.stop <= self.steps
        index = torch.arange(self.layout.seq_length, self.end).view(
            self.size, self.layout.num_samples, self.steps)
        return index[:, :, steps.start:steps.stop]

    def completion_index(self, steps: range) -> Tensor:
        """Gold positions a_k + t of the given steps of each slot's reference completion, int64 [size, len(steps)]."""
        return self.layout.completion_index()[self.blocks][:, steps.start : steps.stop]

    def pooled_index(self, steps: range) -> Tensor:
        """Row indices of the given steps of every slot's rollouts and, as the last, its reference completion, int64
        [B, size, n + 1, len(steps)], or [1, …] in regular rows. A rollout left out stands where the reference does.
        """
        reference = self.completion_index(steps)[:, None]
        if self.kept is None:
            return torch.cat([self.rollout_index(steps), reference], dim=1)[None]
        first_token = self.layout.seq_length + self.kept.where_BKN[..., None] * self.steps
        rollouts = (first_token + torch.arange(steps.start, steps.stop)).where(self.kept.is_here_BKN[..., None],
                                                                               reference)
        return torch.cat([rollouts, reference.expand(len(rollouts), -1, -1, -1)], dim=2)

    def split_targets(self, rollout_BKNG: Tensor) -> tuple[Tensor, Tensor]:
        """Rollout tokens by predictor: step 0, read at `anchor_predictors` [size, B, N], and the steps after each
        rollout token of the row, read there [R, B, 1]. Takes the rollouts of ALL blocks."""
        first = rollout_BKNG[:, upload(self.blocks, rollout_BKNG.device), :, 0]
        return first.transpose(0, 1), self._of_rollouts(rollout_BKNG)[..., 1:].flatten(1).t()[:, :, None]

    def join_targets(self, first_KBN: Tensor, later_RB1: Tensor) -> Tensor:
        """The inverse of `split_targets` on what was read: [B, size, N, G]. Identical rollouts have the same values,
        whose gradients add up; steps 1..G−1 of a rollout left out are of any other one, or zero."""
        later = later_RB1.squeeze(-1).t().reshape(later_RB1.shape[1], self.num_rollouts, self.steps)
        if self.kept is None:
            later = later.unflatten(1, (self.size, self.layout.num_samples))
        elif self.num_rollouts:
            row = torch.arange(len(later), device=later.device)[:, None, None]
            later = later[row, upload(self.kept.where_BKN, later.device)]
        else:
            later = later.new_zeros(*self.kept.where_BKN.shape, self.steps)
        return torch.cat([first_KBN.transpose(0, 1)[..., None], later], dim=-1)

    def chunks(self, blocks_per_chunk: int) -> list["Chunk"]:
        """Rollouts a few at a time, as many as so many blocks have, for attention."""
        size = blocks_per_chunk * self.layout.num_samples
        return [Chunk(self, first, min(first + size, self.num_rollouts))
                for first in range(0, self.num_rollouts, size)]


def split_blocks(layout: StridedLayout, blocks_per_part: int, steps: int) -> list[RowLayout]:
    """The rows that cover all blocks, `blocks_per_part` at a time (0: all in one row).

    Args:
        steps: rollout tokens kept of each rollout: G for the encoder, G − 1 for training.
    """
    size = min(blocks_per_part, layout.num_blocks) or layout.num_blocks
    return [RowLayout(layout, first, size, steps) for first in range(0, layout.num_blocks, size)]


@dataclass(frozen=True)
class Chunk:
    """Rollouts [first, last) of a row, which attend together."""

    row: RowLayout
    first: int
    last: int

    @property
    def gold(self) -> int:
        """Gold tokens that any of its rollouts sees: [0, gold)."""
        return int(self.row.rollout_anchor[:, self.tokens(self.row.steps)].max())

    def tokens(self, steps: int) -> slice:
        """Its rollout tokens among those of a row (or step) that keeps `steps` of each rollout."""
        return slice(self.first * steps, self.last * steps)
