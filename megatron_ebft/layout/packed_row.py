"""One packed row: gold tokens and the rollouts of some blocks.

1. A row is [gold tokens | rollout tokens | padding], rollout tokens ordered (block, sample, step).
2. A row may hold a contiguous part of the blocks (`split_blocks`), so that long rows can be split over micro-batches.
   Parts have equal size, `size` block slots. Slots past the last block repeat it and are marked as not real.
3. Sequence parallelism distributes the tokens of a row over tensor ranks, so rows (and decoding steps) are padded to a
   multiple of `pad_to`. No token sees padding, and no result is read from it.
4. A row may leave rollouts out (KeptRollouts): those that equal an earlier rollout of their block, and those that are
   not needed. The U rollouts that stay keep their order. U is the same in every row of a micro-batch. A row that leaves
   none out is called regular; it has U = size · n.

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
    """The rollouts of the row, each as slot · n + sample, int64, rising. A row that keeps fewer than U repeats the
    last; the repetitions are not read."""
    where_BKN: Tensor
    """For each rollout of each slot, the number (of the U) of itself or of its equal, int64; 0 if it is left out."""
    is_here_BKN: Tensor
    """Whether it, or its equal, is in the row, bool."""


@dataclass(frozen=True)
class RowLayout:
    """One packed row: T gold tokens, `steps` tokens of each rollout of `size` blocks from `first_block` on, padding.

    A rollout token sees the gold tokens before its anchor (`rollout_anchor`), and the tokens of its own rollout
    (`rollout_number`) up to its own step (`rollout_step`). With a document mask it sees only the gold tokens in the
    document of the last one before its anchor.
    """

    layout: StridedLayout
    first_block: int
    size: int
    """Block slots in this row."""
    steps: int
    """Tokens that the row holds of each rollout, its first ones."""
    kept: KeptRollouts | None = None
    """None: a regular row."""

    def room(self, computed_BKN: Tensor) -> int:
        """U, the number of rollouts that rows need room for: the most that one of them computes, rounded up to one of
        `row_sizes` numbers.

        Args:
            computed_BKN: `computed_rollouts` of ALL blocks of these rows.
        """
        whole = self.size * self.layout.num_samples
        step = -(-whole // self.layout.row_sizes)
        most = int(self._is_computed(computed_BKN).sum(1).max())
        return min(whole, -(-most // step) * step)

    def keep(self, computed_BKN: Tensor, first_BKN: Tensor, room: int) -> "RowLayout":
        """The row with room for `room` rollouts, which holds the computed ones; this row if it has room for all.

        Args:
            computed_BKN: `computed_rollouts` of ALL blocks of these rows, on the CPU.
            first_BKN: `first_alike`, likewise.
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
        """`computed_rollouts` of the slots of this row, bool [B, size · n]; False where a slot is not real."""
        return (computed_BKN[:, self.blocks] & self.is_real[:, None]).flatten(1)

    @property
    def num_rollouts(self) -> int:
        """U; size · n in a regular row."""
        return self.size * self.layout.num_samples if self.kept is None else self.kept.pick_BU.shape[1]

    @cached_property
    def pick_BU(self) -> Tensor:
        """The rollouts of the row, each as slot · n + sample, int64 [B, U]; [1, U] in a regular row."""
        return torch.arange(self.num_rollouts)[None] if self.kept is None else self.kept.pick_BU

    @cached_property
    def where_BM(self) -> Tensor:
        """The inverse: for each of the M = size · n rollouts the number of itself or its equal, int64 [B, M]; [1, M] in
        a regular row."""
        return self.pick_BU if self.kept is None else self.kept.where_BKN.flatten(1)

    @property
    def num_rollout_tokens(self) -> int:
        """R = U · steps."""
        return self.num_rollouts * self.steps

    @property
    def end(self) -> int:
        """T + R, the index of the first token of padding."""
        return self.layout.seq_length + self.num_rollout_tokens

    @property
    def length(self) -> int:
        """S = T + R + padding."""
        return self.end + -self.end % self.layout.pad_to

    @property
    def decode_length(self) -> int:
        """Tokens of one decoding step: one for each rollout, and padding."""
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
        """Number, of the U rollouts of the row, of each rollout token's rollout, int64 [R]."""
        return torch.arange(self.num_rollouts).repeat_interleave(self.steps)

    @cached_property
    def rollout_step(self) -> Tensor:
        """Step t of each rollout token, int64 [R]."""
        return torch.arange(self.steps).repeat(self.num_rollouts)

    @cached_property
    def anchor_of_rollouts(self) -> Tensor:
        """Anchor of each rollout's block, int64 [B, U]; [1, U] in a regular row, since all rows are the same."""
        return self.anchors[self.pick_BU // self.layout.num_samples]

    @cached_property
    def rollout_anchor(self) -> Tensor:
        """Anchor of each rollout token's block, int64 [B, R] or [1, R]."""
        return self.anchor_of_rollouts.repeat_interleave(self.steps, dim=1)

    def of_rollouts(self, values_BKNG: Tensor) -> Tensor:
        """Values of the rollouts of this row, [B, U, G], from those of ALL blocks."""
        here = values_BKNG[:, upload(self.blocks, values_BKNG.device)].flatten(1, 2)
        if self.kept is None:
            return here
        pick = upload(self.kept.pick_BU, here.device)
        return here.gather(1, pick[..., None].expand(-1, -1, here.shape[2]))

    def pack(self, gold_BT: Tensor, rollout_BKNG: Tensor) -> Tensor:
        """Tokens of the row [B, S], from its gold tokens and the rollouts of ALL blocks [B, NB, n, G]."""
        kept = self.of_rollouts(rollout_BKNG)[..., : self.steps]
        return pad(torch.cat([gold_BT, kept.flatten(1)], dim=1), self.length)

    def positions(self, starts_BT: Tensor | None, batch: int) -> Tensor:
        """Position ids, int64 [B, S]; with a document mask they restart at each document.

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
        """Row index of the predictor of step 0, which the n samples of a block slot share, int64 [size]."""
        return self.anchors - 1

    def rollout_index(self, steps: range) -> Tensor:
        """Row indices of the given steps of every rollout of a regular row, int64 [size, n, len(steps)]."""
        assert self.kept is None and steps.start >= 0 and steps.stop <= self.steps
        index = torch.arange(self.layout.seq_length, self.end).view(
            self.size, self.layout.num_samples, self.steps)
        return index[:, :, steps.start:steps.stop]

    def completion_index(self, steps: range) -> Tensor:
        """Gold positions a_k + t of the given steps of each slot's gold completion, int64 [size, len(steps)]."""
        return self.layout.completion_index()[self.blocks][:, steps.start : steps.stop]

    def pooled_index(self, steps: range) -> Tensor:
        """Row indices of the given steps of every slot's n rollouts and, last, of its gold completion: int64
        [B, size, n + 1, len(steps)], or [1, …] in a regular row. Rollouts left out get the indices of the completion.
        """
        completion = self.completion_index(steps)[:, None]
        if self.kept is None:
            return torch.cat([self.rollout_index(steps), completion], dim=1)[None]
        first_token = self.layout.seq_length + self.kept.where_BKN[..., None] * self.steps
        rollouts = (first_token + torch.arange(steps.start, steps.stop)).where(self.kept.is_here_BKN[..., None],
                                                                               completion)
        return torch.cat([rollouts, completion.expand(len(rollouts), -1, -1, -1)], dim=2)

    def split_targets(self, rollout_BKNG: Tensor) -> tuple[Tensor, Tensor]:
        """Rollout tokens, grouped by their predictors.

        Args:
            rollout_BKNG: rollouts of ALL blocks.

        Returns:
            step 0 of every slot, predicted at `anchor_predictors`, [size, B, N]; and the token after each rollout token
            of the row, predicted by that one, [R, B, 1].
        """
        first = rollout_BKNG[:, upload(self.blocks, rollout_BKNG.device), :, 0]
        return first.transpose(0, 1), self.of_rollouts(rollout_BKNG)[..., 1:].flatten(1).t()[:, :, None]

    def join_targets(self, first_KBN: Tensor, later_RB1: Tensor) -> Tensor:
        """The inverse of `split_targets`, for values read at the predictors: [B, size, N, G]."""
        later = later_RB1.squeeze(-1).t().reshape(later_RB1.shape[1], self.num_rollouts, self.steps)
        return self.join_steps(first_KBN.transpose(0, 1), later)

    def join_steps(self, first_BKN: Tensor, later_BUt: Tensor) -> Tensor:
        """Values of step 0 of every slot's rollouts, and of the later steps of the row's U rollouts: [B, size, N, G].

        Identical rollouts get the same values, whose gradients add up. Steps 1..G−1 of rollouts that were left out are
        arbitrary: another rollout's, or zero.
        """
        return torch.cat([first_BKN[..., None], self.of_slots(later_BUt)], dim=-1)

    def of_slots(self, values_BUt: Tensor) -> Tensor:
        """Values of the rollouts of every slot, [B, size, N, t], from those of the row's U. Rollouts that were left out
        get another's, or zero."""
        if self.kept is None:
            return values_BUt.unflatten(1, (self.size, self.layout.num_samples))
        if not self.num_rollouts:
            return values_BUt.new_zeros(*self.kept.where_BKN.shape, values_BUt.shape[2])
        row = torch.arange(len(values_BUt), device=values_BUt.device)[:, None, None]
        return values_BUt[row, upload(self.kept.where_BKN, values_BUt.device)]

    def chunks(self, blocks_per_chunk: int) -> list["Chunk"]:
        """The rollouts of the row in chunks of as many as `blocks_per_chunk` blocks have, for attention."""
        size = blocks_per_chunk * self.layout.num_samples
        return [Chunk(self, first, min(first + size, self.num_rollouts))
                for first in range(0, self.num_rollouts, size)]


def split_blocks(layout: StridedLayout, blocks_per_part: int, steps: int) -> list[RowLayout]:
    """Regular rows that together have all blocks, `blocks_per_part` in each (0: all in one row).

    Args:
        steps: tokens that a row holds of each rollout: G for the encoder, G − 1 for training.
    """
    size = min(blocks_per_part, layout.num_blocks) or layout.num_blocks
    return [RowLayout(layout, first, size, steps) for first in range(0, layout.num_blocks, size)]


@dataclass(frozen=True)
class Chunk:
    """Rollouts [first, last) of a row, whose attention is computed together."""

    row: RowLayout
    first: int
    last: int

    @property
    def gold(self) -> int:
        """The end of the gold tokens that its rollouts see: no rollout sees more than [0, gold)."""
        return int(self.row.rollout_anchor[:, self.tokens(self.row.steps)].max())

    def tokens(self, steps: int) -> slice:
        """Its rollout tokens among those of a row (or decoding step) that holds `steps` of each rollout."""
        return slice(self.first * steps, self.last * steps)
