"""The one owner of token order: where every gold and rollout token stands, and what it sees.

Strided blocks (METHOD: "Strided blocks"). A document row holds T gold tokens. Block k has its anchor at
a_k = c + k·s; its gold completion is gold[a_k : a_k+G]; its n rollouts continue gold[0:a_k].

1. A packed row is [gold tokens | rollout tokens], rollout tokens ordered (block, sample, step).
2. Rollout token (k, j, t) has position a_k + t, sees gold[0:a_k] and (k, j, 0..t), and nothing else. Gold is causal.
3. Its predictor, the row index whose logits give its log-probability, is gold position a_k − 1 for t = 0 and
   rollout token (k, j, t−1) otherwise. The last rollout token therefore predicts nothing and nobody sees it:
   a training row needs only G − 1 steps of each rollout, an encoder row all G.
4. A row may hold a contiguous part of the blocks, so that long rows can be split over micro-batches.
   Parts have equal size; a part past the end repeats the last block, marked as not real.
5. Sequence parallelism shares a row's tokens out over tensor ranks, so rows (and decoding steps) end in padding up to a
   multiple of `pad_to`. Padding sees nothing, nothing sees it, and nothing is read there.
6. With a document mask, a gold token sees its own document only, positions restart there, and a block counts
   only if the token before its anchor and its whole completion are in one document.
7. Files of steps (step_file.py) keep the order of the released code, step-major: a row for every sample of a document,
   gold tokens first, then the token of block k at step t at T + t·NB + k.

Suffixes of tensor names: B rows, T gold tokens, R rollout tokens of a row, K blocks, N samples, G steps, S row length.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class StridedLayout:
    """Geometry of the blocks of one row.

    Raises:
        ValueError: naming the flag, when a value is out of range or no block fits the row.
    """

    seq_length: int
    """T, gold tokens in a row."""
    context_length: int
    """c, the first anchor; at least 1, since the first rollout token needs a predictor."""
    stride: int
    """s, gold tokens between anchors."""
    rollout_length: int
    """G, tokens of a rollout."""
    num_samples: int
    """n, rollouts of a block (with sample parallelism: those of this rank)."""
    pad_to: int = 1
    """Rows and decoding steps have a multiple of this many tokens."""

    def __post_init__(self):
        for flag, value in (("context-length", self.context_length), ("stride", self.stride),
                            ("rollout-length", self.rollout_length), ("num-samples", self.num_samples)):
            if value < 1:
                raise ValueError(f"--ebft-{flag} {value}: must be at least 1")
        if self.seq_length < self.context_length + self.rollout_length:
            raise ValueError(
                f"--seq-length {self.seq_length} is too short for one block: it needs at least --ebft-context-length "
                f"{self.context_length} + --ebft-rollout-length {self.rollout_length} tokens")
        assert self.seq_length % self.pad_to == 0  # the flags were checked

    @property
    def num_blocks(self) -> int:
        """NB = (T − G − c) // s + 1."""
        return (self.seq_length - self.rollout_length - self.context_length) // self.stride + 1

    def anchors(self, device=None) -> Tensor:
        """a_k = c + k·s, int64 [K]."""
        return self.context_length + self.stride * torch.arange(self.num_blocks, device=device)

    def completion_index(self, device=None) -> Tensor:
        """Gold positions a_k .. a_k+G−1 of every block's reference completion, int64 [K, G]."""
        return self.anchors(device)[:, None] + torch.arange(self.rollout_length, device=device)

    def valid_blocks(self, document_BT: Tensor | None, answer_BT: Tensor | None) -> Tensor | bool:
        """Blocks that count: bool [B, K], or True when neither mask is given.

        Args:
            document_BT: document number of each gold token, not decreasing along a row; None: no document mask.
            answer_BT: True on answer tokens; None: every token may be generated.
        """
        valid = True
        if document_BT is not None:
            anchors = self.anchors(document_BT.device)
            valid = document_BT[:, anchors - 1] == document_BT[:, anchors + self.rollout_length - 1]
        if answer_BT is not None:
            valid = answer_BT[:, self.completion_index(answer_BT.device)].all(-1) & valid
        return valid

    def parts(self, blocks_per_part: int, steps: int) -> list["RowLayout"]:
        """The rows that cover all blocks, `blocks_per_part` at a time (0: all in one row).

        Args:
            steps: rollout tokens kept of each rollout: G for the encoder, G − 1 for training.
        """
        size = min(blocks_per_part, self.num_blocks) or self.num_blocks
        return [RowLayout(self, first, size, steps) for first in range(0, self.num_blocks, size)]

    def to_step_major(self, values_BKNG: Tensor, gold_BT: Tensor | None = None) -> Tensor:
        """Values of rollout tokens in a step file's order [B·n, G·NB], a document's samples in consecutive rows.

        Args:
            gold_BT: values of gold tokens, which come first in each of their document's rows.
        """
        rows = values_BKNG.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)
        if gold_BT is None:
            return rows
        return torch.cat([gold_BT.repeat_interleave(self.num_samples, dim=0), rows], dim=1)

    def from_step_major(self, rows: Tensor) -> Tensor:
        """The inverse of `to_step_major` without gold tokens: [B·n, G·NB] → [B, NB, n, G]."""
        by_step = rows.unflatten(1, (-1, self.num_blocks)).unflatten(0, (-1, self.num_samples))
        return by_step.permute(0, 3, 1, 2)

    def step_major_positions(self, starts_BT: Tensor | None, batch: int) -> Tensor:
        """Position ids of a step file's rows, int64 [B·n, T + G·NB]; they restart at documents under a document mask.

        Args:
            starts_BT: `document_starts`, or None without a document mask.
        """
        row = self.parts(0, self.rollout_length)[0]
        gold, rollouts = row.positions(starts_BT, batch)[:, : row.end].tensor_split([self.seq_length], dim=1)
        shape = (self.num_blocks, self.num_samples, self.rollout_length)
        return self.to_step_major(rollouts.unflatten(1, shape), gold)


def document_starts(document_BT: Tensor) -> Tensor:
    """First gold position of each token's document, int64 [B, T]."""
    index = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    is_first = torch.ones_like(document_BT, dtype=torch.bool)
    is_first[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return (index * is_first).cummax(1).values


def pad(tokens_BS: Tensor, length: int) -> Tensor:
    """Rows of tokens or positions, filled up with zeros."""
    return torch.nn.functional.pad(tokens_BS, (0, length - tokens_BS.shape[1]))


def gold_positions(gold_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Position ids [B, T] of gold tokens; with a document mask they restart at each document."""
    positions = torch.arange(gold_BT.shape[1], device=gold_BT.device).expand_as(gold_BT)
    return positions if starts_BT is None else positions - starts_BT


@dataclass(frozen=True)
class RowLayout:
    """One packed row: T gold tokens, `steps` tokens of each rollout of `size` blocks from `first_block` on, padding."""

    layout: StridedLayout
    first_block: int
    size: int
    """Blocks in this row; the last part may repeat the final block (see `is_real`)."""
    steps: int
    """Rollout tokens kept of each rollout."""

    @property
    def num_rollout_tokens(self) -> int:
        """R = size · n · steps."""
        return self.size * self.layout.num_samples * self.steps

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
        rollouts = self.size * self.layout.num_samples
        return rollouts + -rollouts % self.layout.pad_to

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
        """Which rollout of the row, slot · n + sample, each rollout token belongs to, int64 [R]."""
        return torch.arange(self.size * self.layout.num_samples).repeat_interleave(self.steps)

    @cached_property
    def rollout_slot(self) -> Tensor:
        """Block slot of each rollout token, int64 [R]."""
        return torch.arange(self.size).repeat_interleave(self.layout.num_samples * self.steps)

    @cached_property
    def rollout_step(self) -> Tensor:
        """Step t of each rollout token, int64 [R]."""
        return torch.arange(self.steps).repeat(self.size * self.layout.num_samples)

    def pack(self, gold_BT: Tensor, rollout_BKNG: Tensor) -> Tensor:
        """Tokens of the row [B, S], from the gold row and the rollouts of ALL blocks [B, NB, n, G]."""
        kept = rollout_BKNG[:, self.blocks.to(rollout_BKNG.device), :, : self.steps]
        return pad(torch.cat([gold_BT, kept.flatten(1)], dim=1), self.length)

    def positions(self, starts_BT: Tensor | None, batch: int) -> Tensor:
        """Position ids [B, S]; with a document mask they restart at each document.

        Args:
            starts_BT: `document_starts`, or None without a document mask.
        """
        row = torch.cat([torch.arange(self.layout.seq_length), self.anchors[self.rollout_slot] + self.rollout_step])
        if starts_BT is None:
            return pad(row.expand(batch, -1), self.length)
        before_anchor = (self.anchors - 1)[self.rollout_slot].to(starts_BT.device)
        return pad(row.to(starts_BT.device) - torch.cat([starts_BT, starts_BT[:, before_anchor]], dim=1), self.length)

    def anchor_predictors(self) -> Tensor:
        """Row index that predicts step 0 of every block slot (shared by its n samples), int64 [size]."""
        return self.anchors - 1

    def rollout_index(self, steps: range) -> Tensor:
        """Row indices of the given steps of every rollout, int64 [size, n, len(steps)].

        The tokens of steps 0..G−2 predict those of steps 1..G−1.
        """
        assert steps.start >= 0 and steps.stop <= self.steps
        index = torch.arange(self.layout.seq_length, self.end).view(
            self.size, self.layout.num_samples, self.steps)
        return index[:, :, steps.start:steps.stop]

    def completion_index(self, steps: range) -> Tensor:
        """Gold positions a_k + t of the given steps of each slot's reference completion, int64 [size, len(steps)]."""
        return self.layout.completion_index()[self.blocks][:, steps.start : steps.stop]

    def split_targets(self, rollout_BKNG: Tensor) -> tuple[Tensor, Tensor]:
        """Rollout tokens by predictor: step 0, read at `anchor_predictors` [size, B, N], and the steps after each
        rollout token of the row, read there [R, B, 1]. Takes the rollouts of ALL blocks."""
        here = rollout_BKNG[:, self.blocks.to(rollout_BKNG.device)]
        return here[..., 0].transpose(0, 1), here[..., 1:].flatten(1).t()[:, :, None]

    def join_targets(self, first_KBN: Tensor, later_RB1: Tensor) -> Tensor:
        """The inverse of `split_targets` on what was read: [B, size, N, G]."""
        later = later_RB1.squeeze(-1).t().reshape(later_RB1.shape[1], self.size, self.layout.num_samples, self.steps)
        return torch.cat([first_KBN.transpose(0, 1)[..., None], later], dim=-1)

    def chunks(self, blocks_per_chunk: int) -> list["Chunk"]:
        """Block slots a few at a time, for attention."""
        return [Chunk(self, first, min(first + blocks_per_chunk, self.size))
                for first in range(0, self.size, blocks_per_chunk)]


@dataclass(frozen=True)
class Chunk:
    """Block slots [first, last) of a row, whose rollouts attend together."""

    row: RowLayout
    first: int
    last: int

    @property
    def gold(self) -> int:
        """Gold tokens that any of its rollouts sees: [0, gold)."""
        return int(self.row.anchors[self.last - 1])

    def tokens(self, steps: int) -> slice:
        """Its rollout tokens among those of a row (or step) that keeps `steps` of each rollout."""
        per_block = self.row.layout.num_samples * steps
        return slice(self.first * per_block, self.last * per_block)

    def visible(self, query_steps: range, starts_BT: Tensor | None, device) -> Tensor:
        """What queries of `query_steps` see of [gold tokens [0, gold) | own rollout tokens], bool [B or 1, Q, C]."""
        row, mine = self.row, self.tokens(self.row.steps)
        slot, number, step = (x[mine].to(device) for x in (row.rollout_slot, row.rollout_number, row.rollout_step))
        asked = (step >= query_steps.start) & (step < query_steps.stop)
        gold = torch.arange(self.gold, device=device)
        anchor = row.anchors.to(device)[slot[asked]]
        sees_gold = (gold < anchor[:, None])[None]
        sees_own = ((number == number[asked][:, None]) & (step <= step[asked][:, None]))[None]
        if starts_BT is not None:
            sees_gold = sees_gold & (starts_BT[:, anchor - 1][..., None] <= gold)
        return torch.cat([sees_gold, sees_own.expand(len(sees_gold), -1, -1)], dim=2)
