"""FlexAttention's masks and what they cost, on a CPU: torch runs the same masks there, without the kernel.

What every query sees is written out pair by pair here, from METHOD's definition; VisibleKeys, BlockMask and the
attention that follows them must say the same.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from golden import Case
from models import largest_difference
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_mask

from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout, document_starts
from megatron_ebft.layout.tree import RolloutTree
from megatron_ebft.model import flex_attention, kernels
from megatron_ebft.model.attention import CausalPattern, StridedPattern
from megatron_ebft.model.decoding import DecodePattern, PrefillPattern, RolloutCache
from megatron_ebft.model.flex_attention import TILE

GEOMETRIES = {  # T, c, s, G, n, padding to a multiple of, blocks of a part, steps kept of a rollout
    "training": (40, 4, 4, 4, 2, 1, 0, 3), "encoder": (40, 4, 4, 4, 2, 1, 0, 4), "padded": (40, 3, 5, 3, 3, 8, 0, 2),
    "parts": (60, 5, 3, 6, 2, 4, 5, 5), "tokens": (30, 7, 3, 1, 2, 1, 0, 0), "tiles": (300, 8, 16, 8, 4, 1, 0, 7)}


@pytest.fixture(autouse=True)
def eagerly(monkeypatch):
    """flex_attention as it is: compiling for a CPU takes longer than all of this."""
    monkeypatch.setattr(flex_attention, "_kernel", lambda function: function)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def rows(name):
    T, c, s, G, n, pad_to, blocks, steps = GEOMETRIES[name]
    return split_blocks(StridedLayout(T, c, s, G, n, pad_to), blocks, steps)


def documents(batch, length):
    """Documents of different lengths in each row; some start within a block's context or completion."""
    index = torch.arange(length)
    return torch.stack([(index >= 5 + 3 * b).long() + (index >= length // 2 + b) for b in range(batch)])


def expected(row, document_BT):
    """Pair by pair, bool [B or 1, S, S]: the definition in METHOD's section 2."""
    gold, layout = row.layout.seq_length, row.layout
    starts = [[0] * gold] if document_BT is None else document_starts(document_BT).tolist()
    seen = torch.zeros(len(starts), row.length, row.length, dtype=torch.bool)
    for b, start in enumerate(starts):
        for q in range(gold):
            seen[b, q, start[q]:q + 1] = True
        rollouts = itertools.product(range(row.first_block, row.first_block + row.size), range(layout.num_samples))
        for number, (block, _) in enumerate(rollouts):
            anchor = layout.context_length + layout.stride * min(block, layout.num_blocks - 1)
            first = gold + number * row.steps
            for step in range(row.steps):
                seen[b, first + step, start[anchor - 1]:anchor] = True
                seen[b, first + step, first:first + step + 1] = True
        seen[b, row.end:, 0] = True  # padding, so that its softmax is finite
    return seen


def heads(row_length, batch=2, heads=4, groups=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, row_length, dim, generator=generator) for h in (heads, groups, groups)]


def pairs(reach, mask=None):
    """What the kernel lets through, tile by tile: bool [B, Q, C]."""
    mask = mask or flex_attention.tile_mask(reach)
    tiles = mask.tiles
    batch, _, queries, keys = tiles.is_full.shape
    assert all(x.is_contiguous() for x in (*tiles.by_query, *tiles.by_key))  # the kernel takes that for granted
    is_visible = flex_attention._mask_mod(*mask.intervals)
    by_pair = create_mask(is_visible, batch, 1, queries * TILE, keys * TILE, device="cpu")[:, 0]
    by_query = _dense(*tiles.by_query[:2]), _dense(*tiles.by_query[2:])
    by_key = _dense(*tiles.by_key[:2]).mT, _dense(*tiles.by_key[2:]).mT
    assert all(map(torch.equal, by_query, by_key)) and not (by_query[0] & by_query[1]).any()
    partial, full = (x[:, 0].repeat_interleave(TILE, 1).repeat_interleave(TILE, 2) for x in by_query)
    seen = (by_pair & partial) | full
    assert seen.any(-1).all() and not seen[:, :, reach.num_keys:].any()
    return seen[:, : reach.gold_end.shape[1], : reach.num_keys]


def _dense(counts, indices):
    tiles = torch.zeros(indices.shape, dtype=torch.bool)
    for place in itertools.product(*map(range, counts.shape)):
        tiles[place][indices[place][:counts[place]].long()] = True
    return tiles


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_pairs_are_those_of_the_method(name, has_documents):
    for row in rows(name):
        document_BT = documents(2, row.layout.seq_length) if has_documents else None
        reach = visible_keys.strided(row, None if document_BT is None else document_starts(document_BT), 2)
        should = expected(row, document_BT)
        assert torch.equal(reach.sees(torch.arange(reach.num_keys)), should)
        assert torch.equal(pairs(reach), should.expand(2, -1, -1))


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_attend_as_in_the_chunked_path(name, has_documents):
    row = rows(name)[-1]
    document_BT = documents(2, row.layout.seq_length) if has_documents else None
    q, k, v = heads(row.length)
    by_flex, by_chunks = (StridedPattern(row, document_BT).attend(1, q, k, v, 0.3, flex=x) for x in (True, False))
    assert by_flex.isfinite().all()
    assert largest_difference(by_flex[:, :, :row.end], by_chunks[:, :, :row.end]) < 1e-6
    q, k, v = heads(row.layout.seq_length)
    by_flex, by_chunks = (CausalPattern(document_BT).attend(1, q, k, v, 0.3, flex=x) for x in (True, False))
    assert largest_difference(by_flex, by_chunks) < 1e-6


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", ["training", "padded", "tiles"])
def test_rows_that_leave_rollouts_out(name, has_documents):
    """Other ones in each row: what stays attends as in the whole row, in both kernels."""
    whole = rows(name)[0]
    gold, count = whole.layout.seq_length, whole.layout.num_blocks
    document_BT = documents(2, gold) if has_documents else None
    computed_BKN = torch.rand(2, count, whole.layout.num_samples, generator=torch.Generator().manual_seed(1)) < 0.5
    row = whole.keep(computed_BKN, torch.arange(whole.layout.num_samples).expand(computed_BKN.shape),
                     whole.room(computed_BKN))
    assert row.num_rollouts < whole.num_rollouts
    tokens_UG = (row.kept.pick_BU * row.steps)[..., None] + torch.arange(row.steps)
    place_BS = torch.cat([torch.arange(gold).expand(2, -1), gold + tokens_UG.flatten(1)], dim=1)
    q, k, v = heads(whole.length)
    expected = StridedPattern(whole, document_BT).attend(1, q, k, v, 0.3, flex=False)

    def picked(x):
        x = x.gather(2, place_BS[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return torch.nn.functional.pad(x, (0, 0, 0, row.length - row.end))

    for kernel in (True, False):
        out = StridedPattern(row, document_BT).attend(1, *map(picked, (q, k, v)), 0.3, flex=kernel)
        assert out.isfinite().all()
        assert largest_difference(out[:, :, :row.end], picked(expected)[:, :, :row.end]) < 1e-6


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", ["training", "padded", "tiles"])
def test_decoding_attends_as_the_whole_row(name, has_documents):
    """Every cached step, with packed heads of a group, against the same tokens in one packed row."""
    row = rows(name)[0]
    gold, layout = row.layout.seq_length, row.layout
    document_BT = documents(2, gold) if has_documents else None
    starts = None if document_BT is None else document_starts(document_BT)
    q, k, v = heads(row.length)
    whole = StridedPattern(row, document_BT).attend(1, q, k, v, 0.3, flex=False)
    caches = {kernel: RolloutCache(row, visible_keys.decoding(row, starts, 2), document_BT) for kernel in (True, False)}
    with torch.no_grad():
        for kernel, cache in caches.items():
            PrefillPattern(cache).attend(1, *(x[:, :, :gold] for x in (q, k, v)), 0.3, flex=kernel)
    cache = caches[True]
    for step in range(row.steps):
        index = row.rollout_index(range(step, step + 1)).flatten()
        now = [torch.nn.functional.pad(x[:, :, index], (0, 0, 0, row.decode_length - len(index))) for x in (q, k, v)]
        reach = cache.visible.at_step(step)
        assert torch.equal(pairs(reach, cache.tile_mask(step, 1)), reach.sees(torch.arange(reach.num_keys)).expand(
            2, -1, -1))
        for kernel, cache in caches.items():
            out = DecodePattern(cache, step).attend(1, *now, 0.3, flex=kernel)
            assert out.shape == now[0].shape and out.isfinite().all()
            assert largest_difference(out[:, :, :len(index)], whole[:, :, index]) < 1e-6
    assert layout.num_blocks * layout.num_samples == len(index)


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name, leaves_out", [("training", False), ("padded", True)])
def test_decoding_with_gradient(name, leaves_out, has_documents, monkeypatch):
    """All steps differentiated together, by both kernels, against the same tokens in one packed row. Steps are padded,
    and rows may leave blocks out."""
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    row = rows(name)[0]
    if leaves_out:
        wanted = (torch.arange(row.size) % 3 > 0)[None, :, None].expand(2, -1, row.layout.num_samples)
        row = row.keep(wanted, torch.arange(row.layout.num_samples).expand_as(wanted), row.room(wanted))
        assert row.kept is not None and row.decode_length > row.num_rollouts
    gold = row.layout.seq_length
    document_BT = documents(2, gold) if has_documents else None
    starts = None if document_BT is None else document_starts(document_BT)
    q, k, v = (x[:, :, : row.end].double().requires_grad_() for x in heads(row.length))
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()

    def by_steps(flex: bool):
        cache = RolloutCache(row, visible_keys.decoding(row, starts, 2), document_BT)
        total = (PrefillPattern(cache).attend(1, *(x[:, :, :gold] for x in (q, k, v)), 0.3, flex)
                 * weights[:, :, :gold]).sum()
        for step in range(row.steps):
            index = gold + torch.arange(row.num_rollouts) * row.steps + step
            now = [torch.nn.functional.pad(x[:, :, index], (0, 0, 0, row.decode_length - len(index)))
                   for x in (q, k, v)]
            out = DecodePattern(cache, step).attend(1, *now, 0.3, flex)
            total = total + (out[:, :, :len(index)] * weights[:, :, index]).sum()
        return total

    whole = (plain_attention(row, document_BT, q, k, v) * weights).sum()
    expected = torch.autograd.grad(whole, (q, k, v))
    for kernel in (False, True):
        total = by_steps(kernel)
        assert abs(total - whole) < 1e-5 * weights.numel() ** 0.5
        for actual, right in zip(torch.autograd.grad(total, (q, k, v)), expected):
            assert largest_difference(actual, right) < 1e-6


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", ["padded", "parts"])
def test_decoding_of_a_tree_with_gradient(name, has_documents, monkeypatch):
    """The same where rollouts begin alike and so are decoded together: their gradients add up."""
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    row = split_blocks(rows(name)[0].layout, 0, GEOMETRIES[name][-1])[0]
    gold, shape = row.layout.seq_length, (2, row.layout.num_blocks, row.layout.num_samples, row.steps)
    document_BT = documents(2, gold) if has_documents else None
    starts = None if document_BT is None else document_starts(document_BT)
    tokens_BKNt = torch.randint(2, shape, generator=torch.Generator().manual_seed(2))
    leaves = q, k, v = [x[:, :, : row.end].double().requires_grad_() for x in heads(row.length)]
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()
    of_whole, of_steps = [torch.arange(gold).expand(2, -1)], []
    tree, cache = RolloutTree(row, torch.ones(shape[:3]).bool()), {}
    for step in range(row.steps):
        nodes = tree.grow(tokens_BKNt[..., step])
        same = torch.arange(row.num_rollouts).expand(2, -1)
        first_BW, node_BU = (nodes.shared.first_BW, nodes.shared.node_BU) if nodes.shared else (same, same)
        of_steps.append((nodes, gold + first_BW * row.steps + step, node_BU))
    assert of_steps[0][0].shared and of_steps[1][0].parent_BW is not None
    if name == "parts":  # of more steps: some part again, and in the end all are apart
        assert of_steps[1][0].shared and of_steps[-1][0].row is row
    of_rollouts = torch.stack([index.gather(1, node_BU) for _, index, node_BU in of_steps], -1).flatten(1)
    whole_BS = torch.cat([*of_whole, of_rollouts], 1)

    def picked(x, index):
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    whole = (plain_attention(row, document_BT, *(picked(x, whole_BS) for x in leaves)) * weights).sum()
    expected = torch.autograd.grad(whole, leaves)
    for kernel in (False, True):
        cache = RolloutCache(row, visible_keys.decoding(row, starts, 2), document_BT)
        total = (PrefillPattern(cache).attend(1, *(x[:, :, :gold] for x in leaves), 0.3, kernel)
                 * weights[:, :, :gold]).sum()
        for step, (nodes, index, node_BU) in enumerate(of_steps):
            if nodes.row is not cache.row:
                cache.move_to(nodes.row, visible_keys.decoding(nodes.row, starts, 2))
            padding = (0, 0, 0, nodes.row.decode_length - index.shape[1])
            now = [torch.nn.functional.pad(picked(x, index), padding) for x in leaves]
            out = DecodePattern(cache, step, nodes.parent_BW).attend(1, *now, 0.3, kernel)
            places = gold + torch.arange(row.num_rollouts) * row.steps + step
            total = total + (picked(out, node_BU) * weights[:, :, places]).sum()
        assert abs(total - whole) < 1e-5 * weights.numel() ** 0.5
        for actual, right in zip(torch.autograd.grad(total, leaves), expected):
            assert largest_difference(actual, right) < 1e-6


def plain_attention(row, document_BT, q, k, v):
    """Softmax over what each query sees, with no kernel."""
    visible = visible_keys.strided(row, None if document_BT is None else document_starts(document_BT), len(q))
    sees = visible.queries(slice(0, row.end)).sees(torch.arange(row.end))[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.mT * 0.3).masked_fill(~sees, -torch.inf).softmax(-1) @ v


def test_golden_gradient_through_flex_attention(one_rank, monkeypatch):
    """Its operator's backward pass in plain torch (which flex_attention refuses on a CPU, in case it is compiled)."""
    monkeypatch.setattr(kernels, "available", lambda: kernels.Available(no_compiler=""))
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    case = Case("step", 1, 3, attention_kernel="flex", bias_activation_fusion=False, bias_dropout_fusion=False)
    assert case.policy[0].config.attention_kernel == "flex"
    case.gradient()
    case.check_gradient(1e-5)


def computed(mask) -> int:
    """Pairs in the tiles that the kernel visits, of one row of the batch."""
    return int((mask.tiles.is_partial | mask.tiles.is_full).sum()) * TILE**2 / len(mask.tiles.is_full)


def waste(reach) -> float:
    """Computed pairs for each that is wanted."""
    return computed(flex_attention.tile_mask(reach)) / reach.sees(torch.arange(reach.num_keys)).sum().item()


def test_tiles_are_not_many_more_than_needed():
    """At the paper's geometry, with the 4 query heads to a key head of an 8B Llama: 1.50 in training, 1.32 in the
    encoder, 1.76 and 1.74 in decoding (3.0 without packed heads). Most of the waste is in tiles of own keys."""
    layout = StridedLayout(1024, 8, 8, 8, 4)
    row = split_blocks(layout, 0, 7)[0]
    assert waste(visible_keys.strided(row, None, 1)) < 1.51
    assert waste(visible_keys.strided(split_blocks(layout, 0, 8)[0], None, 1)) < 1.33
    for step in (0, 6):
        assert waste(visible_keys.decoding(row, None, 1).at_step(step).repeat(4)) < 1.77
    document_BT = (torch.arange(1024) // 256)[None]  # of four documents: tiles of other documents are not visited
    hidden = visible_keys.strided(row, document_starts(document_BT), 1)
    assert computed(flex_attention.tile_mask(hidden)) < 0.6 * computed(flex_attention.tile_mask(
        visible_keys.strided(row, None, 1)))


def test_a_full_tile_does_not_skip_the_document_test():
    document_BT = torch.stack([torch.zeros(512, dtype=torch.int64), torch.arange(512) // 200])
    reach = visible_keys.causal(2, 512, document_starts(document_BT))
    assert flex_attention.tile_mask(reach).tiles.is_full.sum((1, 2, 3)).tolist() == [6, 0]
    assert torch.equal(pairs(reach), (document_BT[:, :, None] == document_BT[:, None]).tril())


def compilations(monkeypatch):
    """A list that grows by one whenever torch compiles the kernel. The kernel answers zeros: in plain torch, the rows
    of this test would take minutes."""
    made = []

    def counted(graph, inputs):
        made.append(graph)
        shape = graph.graph.output_node().args[0][0].meta["example_value"].shape
        return lambda *_: (torch.zeros(shape),)

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 8  # torch's own, which is too low; compile_kernels raises it
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
        compiled = kernels.compile_kernels(flex_attention._attend, flex_attention.COMPILATIONS)
    monkeypatch.setattr(flex_attention, "_kernel", lambda function: compiled)
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)  # allows gradients
    return made


def attend(row, document_BT, batch, has_gradient):
    q, k, v = (x.requires_grad_(has_gradient) for x in heads(row.length, batch, 2, 1))
    with torch.set_grad_enabled(has_gradient):
        assert StridedPattern(row, document_BT).attend(1, q, k, v, 0.3, flex=True).isfinite().all()


@torch.no_grad()
def decode(row, document_BT, batch):
    cache = RolloutCache(row, visible_keys.decoding(row, None if document_BT is None else document_starts(document_BT),
                                                  batch), document_BT)
    PrefillPattern(cache).attend(1, *heads(row.layout.seq_length, batch, 2, 1), 0.3, flex=True)
    for step in range(row.steps):
        DecodePattern(cache, step).attend(1, *heads(row.decode_length, batch, 2, 1), 0.3, flex=True)


def test_compilations_of_a_run(monkeypatch):
    """Every share of duplicates left out, in training and in evaluation's longer rollouts, documents, every step of
    decoding, another number of rows: at most COMPILATIONS; none for other documents, steps, or selective recomputation.
    """
    made = compilations(monkeypatch)
    layout = StridedLayout(1024, 8, 16, 8, 4, TILE, row_sizes=flex_attention.ROW_SIZES)
    held_out = replace(layout, rollout_length=32, stride=32)
    lengths, first = set(), torch.arange(4)
    passes = ((layout, 7, True), (layout, 7, False), (layout, 8, False),  # training, scores, encoder
              (held_out, 31, False), (held_out, 32, False))
    for document_BT in (None, documents(1, 1024)):
        for blocks, steps, has_gradient in passes:
            for kept in range(0, blocks.num_blocks + 1, blocks.num_blocks // flex_attention.ROW_SIZES):
                computed_BKN = (torch.arange(blocks.num_blocks) < kept)[None, :, None].expand(1, -1, 4)
                row = split_blocks(blocks, 0, steps)[0]
                row = row.keep(computed_BKN, first.expand(computed_BKN.shape), row.room(computed_BKN))
                assert row.length % TILE == 0
                lengths.add((row.length, steps, has_gradient))
                attend(row, document_BT, 1, has_gradient)
        decode(split_blocks(layout, 0, 7)[0], document_BT, 1)
        decode(split_blocks(held_out, 0, 31)[0], document_BT, 1)
    assert len(lengths) == 5 * (flex_attention.ROW_SIZES + 1)
    assert 3 * (flex_attention.ROW_SIZES + 1) < len(made) <= len(lengths) + 4
    decode(split_blocks(layout, 0, 7)[0], documents(2, 1024), 2)
    before = len(made)
    with torch.no_grad():
        StridedPattern(split_blocks(layout, 0, 7)[0]).attend(
            1, *(x.requires_grad_() for x in heads(split_blocks(layout, 0, 7)[0].length, 1, 2, 1)), 0.3, flex=True)
    assert len(made) == before <= flex_attention.COMPILATIONS
