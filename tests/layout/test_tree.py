"""The tree of a row's rollouts, against the tokens that they have drawn."""

import pytest
import torch

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.layout.tree import RolloutTree

LAYOUT = StridedLayout(seq_length=27, context_length=2, stride=4, rollout_length=6, num_samples=4, row_sizes=20)
"""Five blocks of four rollouts; a row has room for any number of them."""


@pytest.mark.parametrize("alphabet", [1, 2, 3, 50])
@pytest.mark.parametrize("wanted_blocks", [[[1, 1, 1, 1, 1]] * 3, [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0] * 5],
                                           [[0, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]])
def test_nodes_are_the_distinct_beginnings(alphabet, wanted_blocks):
    tokens_BKNG = torch.randint(alphabet, (3, 5, 4, 6), generator=torch.Generator().manual_seed(alphabet))
    wanted_BKN = torch.tensor(wanted_blocks).bool()[..., None].expand(-1, -1, 4)
    row = split_blocks(LAYOUT, 0, 5)[0]
    row = row.keep(wanted_BKN, torch.arange(4).expand_as(wanted_BKN), row.room(wanted_BKN))
    place_BU = row.of_rollouts(torch.arange(20).view(1, 5, 4, 1).expand(3, -1, -1, -1)).squeeze(-1)
    tree, before = RolloutTree(row, wanted_BKN), None
    for length in range(1, 6):
        nodes = tree.grow(tokens_BKNG[..., length - 1])
        begun = [[(place // 4, *x[:length]) for place, x in zip(places, row)] for places, row in zip(
            place_BU.tolist(), row.of_rollouts(tokens_BKNG).tolist())]
        wanted = [[is_wanted[block].any().item() for block, *_ in row] for row, is_wanted in zip(begun, wanted_BKN)]
        distinct = [{x for x, is_wanted in zip(*both) if is_wanted} for both in zip(begun, wanted)]
        assert nodes.row.num_rollouts == min(row.num_rollouts, max(map(len, distinct)))
        same = torch.arange(row.num_rollouts).expand(3, -1)
        first_BW, node_BU = (same if x is None else x for x in (nodes.first_BW, nodes.node_BU))
        for b in range(3):
            heads = [begun[b][u] for u in first_BW[b]]
            assert not distinct[b] - set(heads)
            for u in range(row.num_rollouts):
                if wanted[b][u]:
                    assert heads[node_BU[b, u]] == begun[b][u]
                    if nodes.first_BW is not None:
                        there = nodes.block_BWN[b, node_BU[b, u], nodes.sample_BU[b, u]]
                        assert place_BU[b, there] == place_BU[b, u]
            if before is not None:
                parents = range(len(heads)) if nodes.parent_BW is None else nodes.parent_BW[b]
                assert all(before[b][x] == head[:-1] for x, head in zip(parents, heads) if head in distinct[b])
        before = [[begun[b][u] for u in first_BW[b]] for b in range(3)]
    assert alphabet < 50 or nodes.row is row


def test_nodes_that_do_not_part_stay():
    wanted_BKN = torch.ones(1, 5, 4, dtype=torch.bool)
    tree = RolloutTree(split_blocks(LAYOUT, 0, 5)[0], wanted_BKN)
    tokens_BKN = torch.tensor([0, 0, 1, 1]).expand(1, 5, 4)
    first, second = tree.grow(tokens_BKN), tree.grow(tokens_BKN)
    assert first.row.num_rollouts == 10 and second.row is first.row and second.parent_BW is None
