"""The tree of a row's rollouts, against the tokens that they have drawn."""

import pytest
import torch

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.layout.tree import RolloutTree


def layout(row_sizes):
    """Five blocks of four rollouts; a row has room for one of so many numbers of them."""
    return StridedLayout(seq_length=27, context_length=2, stride=4, rollout_length=6, num_samples=4,
                         row_sizes=row_sizes)


@pytest.mark.parametrize("row_sizes", [20, 4])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 50])
@pytest.mark.parametrize("needed_blocks", [[[1, 1, 1, 1, 1]] * 3, [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0] * 5],
                                           [[0, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]])
def test_nodes_are_the_distinct_beginnings(alphabet, needed_blocks, row_sizes):
    tokens_BKNG = torch.randint(alphabet, (3, 5, 4, 6), generator=torch.Generator().manual_seed(alphabet))
    needed_BKN = torch.tensor(needed_blocks).bool()[..., None].expand(-1, -1, 4)
    row = split_blocks(layout(row_sizes), 0, 5)[0]
    row = row.keep(needed_BKN, torch.arange(4).expand_as(needed_BKN), row.room(needed_BKN))
    place_BU = row.of_rollouts(torch.arange(20).view(1, 5, 4, 1).expand(3, -1, -1, -1)).squeeze(-1)
    tree, before, step = RolloutTree(row, needed_BKN), None, 20 // row_sizes
    for length in range(1, 6):
        nodes = tree.grow(tokens_BKNG[..., length - 1])
        begun = [[(place // 4, *x[:length]) for place, x in zip(places, row)] for places, row in zip(
            place_BU.tolist(), row.of_rollouts(tokens_BKNG).tolist())]
        needed = [[is_needed[block].any().item() for block, *_ in row] for row, is_needed in zip(begun, needed_BKN)]
        distinct = [{x for x, is_needed in zip(*both) if is_needed} for both in zip(begun, needed)]
        assert nodes.row.num_rollouts == min(row.num_rollouts, -(-max(map(len, distinct)) // step) * step)
        same = torch.arange(row.num_rollouts).expand(3, -1)
        first_BW, node_BU = (nodes.shared.first_BW, nodes.shared.node_BU) if nodes.shared else (same, same)
        for b in range(3):
            heads = [begun[b][u] for u in first_BW[b]]
            assert not distinct[b] - set(heads)
            for u in range(row.num_rollouts):
                if needed[b][u]:
                    assert heads[node_BU[b, u]] == begun[b][u]
                    if nodes.shared:
                        there = nodes.shared.block_BWN[b, node_BU[b, u], nodes.shared.sample_BU[b, u]]
                        assert place_BU[b, there] == place_BU[b, u]
            if before is not None:
                parents = range(len(heads)) if nodes.parent_BW is None else nodes.parent_BW[b]
                assert all(before[b][x] == head[:-1] for x, head in zip(parents, heads) if head in distinct[b])
        before = [[begun[b][u] for u in first_BW[b]] for b in range(3)]
    assert alphabet < 50 or nodes.row is row


def test_nodes_that_do_not_part_stay():
    needed_BKN = torch.ones(1, 5, 4, dtype=torch.bool)
    tree = RolloutTree(split_blocks(layout(20), 0, 5)[0], needed_BKN)
    tokens_BKN = torch.tensor([0, 0, 1, 1]).expand(1, 5, 4)
    first, second = tree.grow(tokens_BKN), tree.grow(tokens_BKN)
    assert first.row.num_rollouts == 10 and second.row is first.row and second.parent_BW is None
