"""The rollouts of a block as a tree, so that what they have in common is decoded once.

A node is the tokens of a rollout so far. Rollouts of a block share it while they draw the same tokens, and part where
they draw different ones. A decoding step computes one token for each of the W nodes of a row, not for each of its U
rollouts. Nodes never join again: once every rollout has a node of its own, the steps are those of the row itself.

As everywhere, W is that of the fullest row, rounded up (`RowLayout.room`).

Suffixes: B rows, K blocks, N samples, U rollouts of a row, W nodes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.layout.strided import computed_rollouts, first_alike


@dataclass(frozen=True, eq=False)
class Shared:
    """Who shares which node; int64. Nodes are in the order of the first rollout of each."""

    first_BW: Tensor
    """Number, in the row of the tree, of the first rollout of each node."""
    block_BWN: Tensor
    """Numbers of all rollouts of the node's block."""
    node_BU: Tensor
    """Node of each rollout. Arbitrary for rollouts that are not needed."""
    sample_BU: Tensor
    """Sample of each rollout."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """What one decoding step computes."""

    row: RowLayout
    """A row that holds the first rollout of each node; the row of the tree where every rollout has its own node."""
    shared: Shared | None = None
    """None where every rollout has its own node."""
    parent_BW: Tensor | None = None
    """The node of the step before that each continues, int64; None in the first step, and where nodes are those of the
    step before."""


class RolloutTree:
    """The nodes of a row, step by step."""

    def __init__(self, row: RowLayout, needed_BKN: Tensor):
        """
        Args:
            row: of all blocks; the rollouts that are decoded.
            needed_BKN: which of ALL rollouts are needed, bool, on the host; the row has them all.
        """
        assert row.size == row.layout.num_blocks, "the row has a part of the blocks"
        self.row, self._whole, self._needed_BKN = row, replace(row, kept=None), needed_BKN
        self._tokens: list[Tensor] = []
        self._computed_BKN: Tensor | None = None
        self._nodes: Nodes | None = None

    @property
    def is_apart(self) -> bool:
        """Whether every rollout has a node of its own."""
        return self._nodes is not None and self._nodes.shared is None

    def grow(self, tokens_BKN: Tensor | None) -> Nodes:
        """The nodes after each rollout has drawn one more token. Waits for the device, unless all are apart.

        Args:
            tokens_BKN: of ALL blocks, int64. Not read once all are apart.
        """
        if self.is_apart:
            self._nodes = Nodes(self.row)
            return self._nodes
        self._tokens.append(tokens_BKN)
        first_BKN = first_alike(torch.stack(self._tokens, dim=-1)).cpu()
        computed_BKN, before = computed_rollouts(self._needed_BKN, first_BKN), self._nodes
        if before is not None and torch.equal(computed_BKN, self._computed_BKN):
            self._nodes = replace(before, parent_BW=None)
        else:
            self._computed_BKN, self._nodes = computed_BKN, self._after(before, computed_BKN, first_BKN)
        return self._nodes

    def _after(self, before: Nodes | None, computed_BKN: Tensor, first_BKN: Tensor) -> Nodes:
        room, samples, batch = self._whole.room(computed_BKN), self.row.layout.num_samples, len(computed_BKN)
        if room >= self.row.num_rollouts:
            return Nodes(self.row, parent_BW=None if before is None else before.shared.node_BU)
        row = self._whole.keep(computed_BKN, first_BKN, room)
        where_BM, block_BW1 = self.row.where_BM.expand(batch, -1), (row.pick_BU // samples * samples)[..., None]
        pick_BU = self.row.pick_BU.expand(batch, -1)
        return Nodes(row, Shared(
            first_BW=upload(where_BM.gather(1, row.pick_BU)),
            block_BWN=upload(where_BM[:, None].expand(-1, room, -1).gather(2, block_BW1 + torch.arange(samples))),
            node_BU=upload(row.where_BM.gather(1, pick_BU)), sample_BU=upload(pick_BU % samples)),
            parent_BW=None if before is None else upload(before.row.where_BM.gather(1, row.pick_BU)))
