"""Cuts the rows of one step on one rank into micro-batches.

A micro-batch holds some of the rows with some of their blocks. The cut changes memory, never the result. With pipeline
stages, all micro-batches of a pass have the same shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.packed_row import RowLayout, split_blocks
from megatron_ebft.layout.strided import (
    StridedLayout,
    computed_rollouts,
    document_starts,
    first_alike,
    gold_positions,
)


@dataclass
class GoldBatch:
    """Gold rows of this rank: B rows of T tokens."""

    tokens_BT: Tensor
    """int64."""
    index_B: Tensor
    """int64. Global sample number of each row; the sampler's random numbers depend on it."""
    document_BT: Tensor | None = None
    """Integers. Document number of each token; None without a document mask."""
    answer_BT: Tensor | None = None
    """bool. True on answer tokens; None if all tokens are trained on."""

    def rows(self, part: slice) -> "GoldBatch":
        """Some of the rows."""
        return GoldBatch(self.tokens_BT[part], self.index_B[part], _rows_of(self.document_BT, part),
                         _rows_of(self.answer_BT, part))

    def gold_valid(self) -> Tensor:
        """Which of the gold tokens 1..T−1 count in the cross entropy, bool [B, T−1].

        With a document mask the first token of a document does not count: nothing in the document predicts it.
        """
        valid = torch.ones_like(self.tokens_BT[:, 1:], dtype=torch.bool)
        if self.document_BT is not None:
            valid &= self.document_BT[:, 1:] == self.document_BT[:, :-1]
        if self.answer_BT is not None:
            valid &= self.answer_BT[:, 1:]
        return valid

    def valid_blocks(self, layout: StridedLayout) -> Tensor:
        """Which blocks count, bool [B, NB]."""
        valid = layout.valid_blocks(self.document_BT, self.answer_BT)
        shape = (len(self.tokens_BT), layout.num_blocks)
        return torch.ones(shape, dtype=torch.bool, device=self.tokens_BT.device) if valid is True else valid


@dataclass
class MicroBatch:
    """Some rows of a batch (`rows`), packed with the blocks of `row`. b rows of S tokens."""

    rows: slice
    row: RowLayout | None
    """Layout of the packed rows. None: gold tokens only."""
    tokens: Tensor
    """int64 [b, S]."""
    positions: Tensor
    """int64 [b, S]."""
    document_BT: Tensor | None
    """Document numbers of the rows; None without a document mask."""
    is_first_part: bool
    """Whether gold tokens count in this micro-batch. They count in one of those that hold the same rows."""


@dataclass
class MicroBatches:
    """Micro-batches of gold rows packed with `steps` tokens of each rollout: for each group of rows, each part of its
    blocks.

    Raises:
        ValueError: the micro-batch size does not divide the rows.
    """

    gold: GoldBatch
    rollout_BKNG: Tensor
    layout: StridedLayout
    steps: int
    micro_batch_size: int
    blocks_per_microbatch: int
    needed_BKN: Tensor | None = None
    """bool. Rollouts that are needed: rows hold only these, and identical rollouts of a block once. None: all rollouts,
    with duplicates. Ranks that share a model must pass the same."""

    def __post_init__(self):
        _check_micro_batch_size(self.micro_batch_size, len(self.gold.tokens_BT))
        self.parts = split_blocks(self.layout, self.blocks_per_microbatch, self.steps)
        self.rows = [(rows, part) for rows in row_slices(self.gold, self.micro_batch_size) for part in self.parts]
        self.first_BKN = self.computed_BKN = None
        if self.needed_BKN is not None:
            self.first_BKN = first_alike(self.rollout_BKNG)
            self.computed_BKN = computed_rollouts(self.needed_BKN, self.first_BKN)
            self.rows = self._without_duplicates()

    def _without_duplicates(self) -> list[tuple[slice, RowLayout]]:
        both = torch.stack([self.first_BKN, self.computed_BKN.long()]).cpu()  # the only wait for the GPU in a pass
        first_BKN, computed_BKN = both[0], both[1].bool()
        rooms = [part.room(computed_BKN[rows]) for rows, part in self.rows]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            rooms = [max(rooms)] * len(rooms)
        return [(rows, part.keep(computed_BKN[rows], first_BKN[rows], room))
                for (rows, part), room in zip(self.rows, rooms)]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_length(self) -> int:
        """S of the first micro-batch. With pipeline stages all have the same."""
        return self.rows[0][1].length

    @property
    def is_here_BKN(self) -> Tensor:
        """Rollouts that are needed, or equal to one that is; bool [B, NB, n]. The cut does not change it."""
        if self.needed_BKN is None:
            return torch.ones_like(self.rollout_BKNG[..., 0], dtype=torch.bool)
        return self.computed_BKN.gather(-1, self.first_BKN)

    def saved_tokens(self, whole: int | None = None) -> tuple[float, float]:
        """Tokens saved by leaving rollouts out, and tokens without that saving, both with padding.

        Args:
            whole: length of a row that leaves nothing out; None: with all blocks of the part.
        """
        lengths = [row.length for _, row in self.rows]
        full = len(lengths) * (whole or self.parts[0].length)
        return float(max(0, full - sum(lengths))) * self.micro_batch_size, float(full) * self.micro_batch_size

    def __iter__(self) -> Iterator[MicroBatch]:
        for rows, row in self.rows:
            tokens, documents = self.gold.tokens_BT[rows], _rows_of(self.gold.document_BT, rows)
            starts = None if documents is None else document_starts(documents)
            yield MicroBatch(rows, row, row.pack(tokens, self.rollout_BKNG[rows]),
                             upload(row.positions(starts, len(tokens)), tokens.device), documents,
                             is_first_part=row.first_block == 0)

    def join_blocks(self, values: list[Tensor]) -> Tensor:
        """Join the micro-batches' values [b, size, ...], in order, to [B, NB, ...]; drops slots without a block."""
        count = len(self.parts)
        rows = [torch.cat(values[i : i + count], dim=1) for i in range(0, len(values), count)]
        return torch.cat(rows)[:, : self.layout.num_blocks]


@dataclass
class GoldMicroBatches:
    """Micro-batches of gold rows without rollouts, for the cross entropy.

    Raises:
        ValueError: the micro-batch size does not divide the rows.
    """

    gold: GoldBatch
    micro_batch_size: int

    def __post_init__(self):
        _check_micro_batch_size(self.micro_batch_size, len(self.gold.tokens_BT))

    def __len__(self) -> int:
        return len(self.gold.tokens_BT) // self.micro_batch_size

    @property
    def row_length(self) -> int:
        return self.gold.tokens_BT.shape[1]

    def __iter__(self) -> Iterator[MicroBatch]:
        for rows in row_slices(self.gold, self.micro_batch_size):
            tokens, documents = self.gold.tokens_BT[rows], _rows_of(self.gold.document_BT, rows)
            starts = None if documents is None else document_starts(documents)
            yield MicroBatch(rows, None, tokens, gold_positions(tokens, starts), documents, is_first_part=True)


def _check_micro_batch_size(size: int, rows: int) -> None:
    if rows % size:
        raise ValueError(f"--micro-batch-size {size} does not divide the {rows} rows of a rank "
                         "(--global-batch-size over the data-parallel size)")


def row_slices(gold: GoldBatch, size: int) -> list[slice]:
    """The rows of each micro-batch.

    Raises:
        ValueError: the micro-batch size does not divide the rows.
    """
    _check_micro_batch_size(size, len(gold.tokens_BT))
    return [slice(first, first + size) for first in range(0, len(gold.tokens_BT), size)]


def _rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
