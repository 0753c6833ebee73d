"""The rollouts of a block as a tree, so that what they have in common is decoded once.

A node is the tokens of a rollout so far. Rollouts of a block share it while they draw the same tokens, and part where
they draw different ones. A decoding step computes one token for each of the W nodes of a row, not for each of its U
rollouts. Nodes never join again: once every rollout has a node of its own, the steps are those of the row itself.

Suffixes: B rows, K blocks, N samples, U rollouts of a row, W nodes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.layout.strided import computed_rollouts


@dataclass(frozen=True, eq=False)
class Nodes:
    """What one decoding step computes. Nodes are in the order of the first rollout of each. All tensors are int64."""

    row: RowLayout
    """A row that holds the first rollout of each node; the row of the tree where every rollout has its own node."""
    first_BW: Tensor | None = None
    """Number of that rollout in the row of the tree; None where every rollout has its own node."""
    block_BWN: Tensor | None = None
    """Numbers there of all rollouts of the node's block; None likewise."""
    node_BU: Tensor | None = None
    """Node of each rollout; None likewise. Arbitrary for rollouts that are not wanted."""
    sample_BU: Tensor | None = None
    """Sample of each rollout; None likewise."""
    parent_BW: Tensor | None = None
    """Number, in the step before, of the node that each continues; None: nodes are those of the step before."""


class RolloutTree:
    """The nodes of a row, step by step."""

    def __init__(self, row: RowLayout, wanted_BKN: Tensor):
        """
        Args:
            row: of all blocks; the rollouts that are decoded.
            wanted_BKN: which of ALL rollouts these are, bool, on the host.
        """
        assert row.size == row.layout.num_blocks, "the row has a part of the blocks"
        self.row, self._wanted_BKN = row, wanted_BKN
        self._whole, batch = replace(row, kept=None), len(wanted_BKN)
        self._pick_BU, self._where_BM = (x.expand(batch, -1) for x in (_pick(row), _where(row)))
        self._alike: Tensor | bool = True
        self._computed_BKN: Tensor | None = None
        self._nodes: Nodes | None = None

    def grow(self, tokens_BKN: Tensor) -> Nodes:
        """The nodes after each rollout has drawn one more token. Waits for the device while any are shared.

        Args:
            tokens_BKN: of ALL blocks, int64.
        """
        before = self._nodes
        if before is not None and before.row is self.row:
            return self._keep(replace(before, parent_BW=None))
        self._alike = (tokens_BKN[..., :, None] == tokens_BKN[..., None, :]) & self._alike
        first_BKN = self._alike.byte().argmax(-1).cpu()
        computed_BKN = computed_rollouts(self._wanted_BKN, first_BKN)
        if before is not None and torch.equal(computed_BKN, self._computed_BKN):
            return self._keep(replace(before, parent_BW=None))
        self._computed_BKN, room = computed_BKN, self._whole.room(computed_BKN)
        if room >= self.row.num_rollouts:
            return self._keep(Nodes(self.row, parent_BW=None if before is None else before.node_BU))
        row, samples = self._whole.keep(computed_BKN, first_BKN, room), self.row.layout.num_samples
        block_BW1 = (_pick(row) // samples * samples)[..., None]
        block_BWN = self._where_BM[:, None].expand(-1, room, -1).gather(2, block_BW1 + torch.arange(samples))
        return self._keep(Nodes(
            row, first_BW=upload(self._where_BM.gather(1, _pick(row))), block_BWN=upload(block_BWN),
            node_BU=upload(_where(row).gather(1, self._pick_BU)), sample_BU=upload(self._pick_BU % samples),
            parent_BW=None if before is None else upload(_where(before.row).gather(1, _pick(row)))))

    def _keep(self, nodes: Nodes) -> Nodes:
        self._nodes = nodes
        return nodes


def _pick(row: RowLayout) -> Tensor:
    """The rollouts of a row, each as block · n + sample, int64 [B, U]; [1, U] in a regular row."""
    return torch.arange(row.num_rollouts)[None] if row.kept is None else row.kept.pick_BU


def _where(row: RowLayout) -> Tensor:
    """The inverse: for each rollout of each block the number of itself or its equal, int64 [B, M = K · N]; [1, M] in a
    regular row."""
    return _pick(row) if row.kept is None else row.kept.where_BKN.flatten(1)
