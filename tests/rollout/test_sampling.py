"""Sampling: the distribution, its top-p and top-k sets, the random numbers, independence of the batch split, memory."""

import models
import plain_llama
import pytest
import torch
import torch.distributed as dist
from models import largest_difference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.packed_row import Chunk, RowLayout
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.model import log_probabilities
from megatron_ebft.model.weights import unwrap
from megatron_ebft.rollout import sampler, token_sampling
from megatron_ebft.rollout.sampler import SamplingConfig, sample_rollouts
from megatron_ebft.rollout.token_sampling import filter_probabilities, sample, uniform

pytestmark = pytest.mark.usefixtures("one_rank")


def numbers(shape, **changes) -> torch.Tensor:
    """uniform() with a document for each row, a block for each column, …; `changes` replaces arguments."""
    index = [torch.arange(size, device=device()).view(-1, *[1] * (2 - i)) for i, size in enumerate(shape)]
    arguments = dict(seed=1, iteration=2, document=index[0], block=index[1], sample=index[2], step=3)
    return uniform(**{**arguments, **changes}).cpu()


def random_logits(*shape, seed=0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device())


def draw(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    drawn = sample(logits, logits.shape[1], u.to(logits.device), temperature, top_p, top_k, dist.group.WORLD)
    return [x.cpu() for x in drawn]


# ---------------------------------------------------------------- random numbers


def test_uniform_numbers_look_uniform():
    u = numbers((40, 50, 10))
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    count = u.numel()
    ranks = torch.arange(1, count + 1) / count
    assert (u.flatten().sort().values - ranks).abs().max() < 1.95 / count**0.5  # Kolmogorov-Smirnov, p = 0.001
    for dimension in range(3):  # neighbours in document, block and sample are independent
        a, b = u.narrow(dimension, 0, u.shape[dimension] - 1), u.narrow(dimension, 1, u.shape[dimension] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / a.numel() ** 0.5
    assert u.unique().numel() == count


def test_uniform_numbers_depend_on_every_argument():
    u, later = numbers((4, 5, 6)), torch.arange(100, 104).view(4, 1, 1)
    changes = dict(seed=5, iteration=3, step=4, document=later, block=later, sample=later)
    others = [numbers((4, 5, 6), **{name: value if isinstance(value, int) else value.to(device())})
              for name, value in changes.items()]
    for other in others:
        assert not (other == u).any()
    assert torch.equal(u, numbers((4, 5, 6)))
    swapped = numbers((4, 5, 6), seed=2, iteration=1)  # arguments do not stand for each other
    assert not (swapped == u).any()


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_frequencies_are_the_softmax(temperature):
    logits = random_logits(3, 12)
    u = numbers((3, 40, 500)).flatten(1)
    tokens, log_probs, _ = draw(logits, u, temperature)
    expected = (logits.cpu().double() / temperature).softmax(-1)
    torch.testing.assert_close(log_probs.double(), expected.log().gather(-1, tokens), atol=1e-5, rtol=0)
    for row in range(3):
        counts, wanted = torch.bincount(tokens[row], minlength=12), u.shape[1] * expected[row]
        chi_square = ((counts - wanted) ** 2 / wanted).sum()
        assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_a_grid_of_numbers_gives_every_token_its_share():
    logits = random_logits(2, 9)
    grid = ((torch.arange(4096) + 0.5) / 4096).double().expand(2, -1)
    tokens, _, _ = draw(logits, grid, 0.7)
    for row, p in zip(tokens, (logits.cpu().double() / 0.7).softmax(-1)):
        assert (torch.bincount(row, minlength=9) - 4096 * p).abs().max() <= 1.01


def test_entropy():
    logits = random_logits(5, 30)
    _, _, entropy = draw(logits, numbers((5, 1, 1)).flatten(1), 0.6, top_p=0.5)
    p = (logits.cpu().double() / 0.6).softmax(-1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=0)


def test_a_logit_of_minus_infinity():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).to(device())
    tokens, log_probs, entropy = draw(logits, torch.tensor([[0.3, 0.999]]).double())
    assert tokens.tolist() == [[0, 2]]
    torch.testing.assert_close(torch.cat([-log_probs, entropy[:, None]], 1), torch.tensor([[2.0, 2.0, 2.0]]).log())


SHARD_WIDTHS = {"one segment": 700, "whole segments": 2048, "a part of a segment": 2500}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", SHARD_WIDTHS.values(), ids=SHARD_WIDTHS)
def test_draws_invert_the_distribution_function(width, dtype):
    """Against the inverse in float64: another token only where the number is within rounding of its interval."""
    logits = 3 * random_logits(6, width + 5)
    logits[:, width:] = torch.nan  # padding
    logits[0, :width - 1] = logits[1, 1:width] = -torch.inf  # all mass at one end
    logits[2, 0] = logits[2, width // 3 : width - 20] = -torch.inf  # a massless segment, and a massless first token
    logits[3, :width] = 1.25
    logits[4, 5] = 200.0
    logits = logits.to(dtype)
    u = numbers((6, 50, 60)).flatten(1)
    u[:, :3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
    for temperature in (1.0, 0.6):
        tokens, log_probs, entropy = (x.cpu() for x in sample(
            logits, width, u.to(logits.device), temperature, 1.0, 0, dist.group.WORLD))
        log_p = (logits[:, :width].cpu().double() / temperature).log_softmax(-1)
        end = log_p.exp().cumsum(-1)
        expected = torch.searchsorted(end, u, right=True).clamp(max=width - 1)
        start_of, end_of = (end - log_p.exp()).gather(-1, tokens), end.gather(-1, tokens)
        assert (log_p.gather(-1, tokens) > -torch.inf).all()
        assert ((u > start_of - 1e-6) & (u < end_of + 1e-6)).all()
        assert (tokens == expected).float().mean() > 0.998
        torch.testing.assert_close(log_probs.double(), log_p.gather(-1, tokens), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1), atol=5e-6, rtol=0)


# ---------------------------------------------------------------- top-p and top-k


def kept_by_sorting(p: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Which tokens of one distribution stay: top-k first, then top-p of what is left; equals stay together."""
    p = p.double()
    if top_k:
        p = p.where(p >= p.sort(descending=True).values[min(top_k, len(p)) - 1], 0)
    if top_p < 1:
        ordered = p.sort(descending=True).values
        enough = (ordered.cumsum(0) >= top_p * p.sum()).nonzero()[0]
        p = p.where(p >= ordered[enough], 0)
    return p > 0


FILTERS = [(0.9, 0), (0.5, 0), (0.05, 0), (1.0, 1), (1.0, 5), (1.0, 40), (1.0, 100), (0.8, 7), (0.3, 3)]


@pytest.mark.parametrize("top_p, top_k", FILTERS)
def test_filtered_sets_are_those_of_a_sort(top_p, top_k):
    p = random_logits(50, 40).softmax(-1)
    kept = filter_probabilities(p, top_p, top_k, dist.group.WORLD)
    for row, kept_row in zip(p.cpu(), kept.cpu()):
        assert torch.equal(kept_row > 0, kept_by_sorting(row, top_p, top_k))
        assert torch.equal(kept_row[kept_row > 0], row[kept_row > 0])


@pytest.mark.parametrize("top_p, top_k", [(0.5, 0), (0.75, 0), (0.25, 0), (1.0, 2), (1.0, 3), (0.5, 4)])
def test_equal_probabilities_are_kept_together(top_p, top_k):
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        eighths = torch.bincount(torch.randint(6, (8,), generator=generator), minlength=6)
        p = (eighths / 8).float()  # sums are exact
        kept = filter_probabilities(p[None].to(device()), top_p, top_k, dist.group.WORLD)[0].cpu() > 0
        assert torch.equal(kept, kept_by_sorting(p, top_p, top_k)), p


def test_a_certain_token_and_an_even_choice():
    p = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]).to(device())
    for top_p, top_k in FILTERS:
        kept = filter_probabilities(p, top_p, top_k, dist.group.WORLD)
        assert torch.equal(kept, p)


@pytest.mark.parametrize("top_p, top_k", [(0.5, 0), (1.0, 3), (0.7, 5)])
def test_tokens_stay_in_the_set_with_the_frequencies_left(top_p, top_k):
    logits = random_logits(4, 20)
    u = numbers((4, 20, 200)).flatten(1)
    u[:, 0], u[:, 1] = 0.0, 1 - 2.0**-53
    tokens, log_probs, _ = draw(logits, u, 0.9, top_p, top_k)
    p = (logits.cpu().double() / 0.9).softmax(-1)
    torch.testing.assert_close(log_probs.double(), p.log().gather(-1, tokens), atol=1e-5, rtol=0)  # before filtering
    for row, p_row in zip(tokens, p):
        left = p_row * kept_by_sorting(p_row, top_p, top_k)
        counts, wanted = torch.bincount(row, minlength=20), len(row) * left / left.sum()
        assert (counts[left == 0] == 0).all()
        assert ((counts - wanted)[left > 0] ** 2 / wanted[left > 0]).sum() < 37.7  # at most 15 degrees of freedom


# ---------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def policy(one_rank):
    config, weights = plain_llama.random_llama(0, layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=30)
    return models.build_policy(config, weights)


LAYOUT = StridedLayout(seq_length=20, context_length=3, stride=4, rollout_length=4, num_samples=3)


def sampled(policy, gold: GoldBatch, rows_per_group=0, iteration=5, **changes):
    config = SamplingConfig(**{**dict(temperature=0.8, top_p=0.9, top_k=0, seed=3), **changes})
    return sample_rollouts(policy, gold, LAYOUT, config, iteration, rows_per_group).tokens_BKNG


def gold_rows(documents: bool) -> GoldBatch:
    tokens = torch.randint(30, (4, 20), generator=torch.Generator().manual_seed(0))
    return models.gold_batch(tokens, eod=7 if documents else None, first=10)


def some_rows(gold: GoldBatch, rows: list[int]) -> GoldBatch:
    return GoldBatch(gold.tokens_BT[rows], gold.index_B[rows],
                     None if gold.document_BT is None else gold.document_BT[rows])


@pytest.mark.parametrize("documents", [False, True])
def test_rollouts_do_not_depend_on_the_batch(policy, documents):
    gold = gold_rows(documents)
    tokens = sampled(policy, gold)
    assert tokens.shape == (4, LAYOUT.num_blocks, 3, 4)
    for rows_per_group in (1, 2, 3, 8):
        assert torch.equal(sampled(policy, gold, rows_per_group), tokens)
    for rows in ([2], [0, 1], [3, 2, 1]):
        assert torch.equal(sampled(policy, some_rows(gold, rows)), tokens[rows])


def test_rollouts_depend_on_seed_and_iteration(policy):
    gold = gold_rows(documents=False)
    tokens = sampled(policy, gold)
    for other in (sampled(policy, gold, seed=4), sampled(policy, gold, iteration=6)):
        assert (other != tokens).float().mean() > 0.5
    samples = tokens.flatten(0, 1)
    assert (samples[:, 0] != samples[:, 1]).any(-1).float().mean() > 0.9  # samples of a block differ


def test_sampling_leaves_the_mode_of_the_policy(policy):
    for training in (True, False):
        policy[0].train(training)
        sampled(policy, gold_rows(documents=False))
        assert policy[0].training is training


class Made(TorchDispatchMode):
    """Tensors that operations return in storages of their own: (operation, dtype, elements)."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, before = func(*args, **(kwargs or {})), {x.data_ptr() for x in tree_leaves((args, kwargs))
                                                      if isinstance(x, torch.Tensor)}
        if not func.is_view:
            self.tensors += [(func.overloadpacket.__name__, x.dtype, x.numel()) for x in tree_leaves(out)
                             if isinstance(x, torch.Tensor) and x.data_ptr() not in before]
        return out


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_live_for_a_chunk_of_rows(one_rank, monkeypatch, dtype, top_p):
    """They stay in the model's dtype, and neither they nor anything of their size leaves the model."""
    vocab, rows = 5000, 8
    config, weights = plain_llama.random_llama(0, layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=vocab)
    policy = models.build_policy(config, weights, 64, params_dtype=dtype, bf16=dtype == torch.bfloat16)
    gold, padded = gold_rows(documents=False), -(-vocab // 64) * 64
    expected = sampled(policy, gold, top_p=top_p, temperature=1.0)
    assert expected.numel() > 10 * rows and (expected < vocab).all()
    monkeypatch.setattr(token_sampling, "HEAD_ROWS", rows)
    monkeypatch.setattr(token_sampling, "temporary_elements", lambda: rows * padded)
    outputs = []
    hook = policy[0].register_forward_hook(lambda module, inputs, out: outputs.append(out))
    with Made() as made:
        tokens = sampled(policy, gold, top_p=top_p, temperature=1.0)
    hook.remove()
    assert (tokens == expected).float().mean() > 0.95  # rows of other products round otherwise
    large = [x for x in made.tensors if x[2] >= vocab]
    assert max(size for *_, size in large) <= rows * padded
    assert {dt for name, dt, _ in large if name in ("mm", "linear", "addmm")} == {dtype}
    assert not [name for name, *_ in large if name in ("div", "sort", "clone")]
    assert top_p < 1 or not [x for x in made.tensors if x[0] == "cumsum" and x[2] >= rows * vocab]
    assert [[x.dtype for x in out] for out in outputs] == [[torch.int64, torch.float32, torch.float32]] * len(outputs)
    assert max(x.numel() for out in outputs for x in out) <= tokens.numel()


def test_padding_of_the_vocabulary_costs_the_backward_pass_nothing(one_rank, monkeypatch):
    """The logits and their gradient are all there is of that size; padding has a gradient of 0, whatever its logits."""
    rows, vocab = 40, 51
    config, weights = plain_llama.random_llama(0, layers=1, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=vocab)
    model = unwrap(models.build_policy(config, weights, 64)[0])
    weight = model.output_layer.weight
    with torch.no_grad():
        weight[vocab:] = torch.inf  # logits of ±inf and NaN
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 1, 16, generator=generator).to(device())
    targets = torch.randint(vocab, (rows, 1, 1), generator=generator).to(device())
    sections = [log_probabilities.Section(slice(0, rows), targets, temperature) for temperature in (1.0, 0.6)]
    monkeypatch.setattr(log_probabilities, "temporary_elements", lambda: 4 * 64)
    for section in sections:
        with Made() as made:
            log_probs, = log_probabilities.LogProbs([section])(hidden, model)
            grad, = torch.autograd.grad(log_probs.sum(), [weight])
        large = [name for name, _, size in made.tensors if size >= rows * 64]
        assert len(large) == 2 and large[1] == "empty_like", large
        leaf = weight.detach()[:vocab].clone().requires_grad_()
        expected = (hidden @ leaf.t() / section.temperature).log_softmax(-1).gather(-1, targets)
        expected.sum().backward()
        torch.testing.assert_close(log_probs, expected, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(grad[:vocab], leaf.grad, atol=1e-5, rtol=1e-5)
        assert (grad[vocab:] == 0).all()


class NothingForTheHost(TorchDispatchMode):
    """Operations whose result the host has to read, which would make it wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique"), name
        assert not (name in ("index", "index_put", "index_put_") and masks), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("real", [0, 20, 24])
def test_gradient_as_one_kernel_writes_it(real):
    """What a GPU compiles, in plain torch: several targets a row, some elsewhere, padding full of NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 24, generator=generator)
    targets = torch.randint(24, (5, 2, 3), generator=generator)
    is_local = (torch.rand(5, 2, 3, generator=generator) < 0.7) & (targets < real)
    lse = logits[..., : max(real, 1)].logsumexp(-1)
    logits[..., real:] = torch.nan
    grad = torch.randn(5, 2, 3, generator=generator)
    expected, actual = torch.full_like(logits, 7), torch.full_like(logits, 8)
    log_probabilities._write_gradient(expected, logits, real, targets, is_local, lse, grad, 0.6)
    log_probabilities._write_gradient_in_one.__wrapped__(actual, logits, real, targets, is_local, lse, grad, 0.6)
    assert largest_difference(actual, expected) < 1e-6
    assert not actual[..., real:].any()


@pytest.mark.parametrize("documents", [False, True])
def test_decoding_needs_nothing_of_the_host(policy, documents, monkeypatch):
    """After the prefill no number is read, and none of the layout's host tensors is used or sent."""
    work = sampler._Group.work

    def refuse(*args):
        raise AssertionError("asked of the host while decoding")

    def watched(self, step, virtual, given):
        if step == 0:
            return work(self, step, virtual, given)
        with pytest.MonkeyPatch.context() as patch, NothingForTheHost():
            for name in ("blocks", "anchors", "is_real", "pick_BU", "rollout_number", "rollout_anchor", "rollout_step"):
                vars(self.row).pop(name, None)
                patch.setattr(RowLayout, name, property(refuse))
            for name in ("positions", "rollout_index", "anchor_predictors"):
                patch.setattr(RowLayout, name, refuse)
            patch.setattr(visible_keys, "upload", refuse)
            patch.setattr(sampler, "upload", refuse)
            patch.setattr(Chunk, "gold", property(lambda chunk: 20))  # of the path without a GPU's kernel
            return work(self, step, virtual, given)

    expected = sampled(policy, gold_rows(documents))
    monkeypatch.setattr(sampler._Group, "work", watched)
    assert torch.equal(sampled(policy, gold_rows(documents)), expected)


@pytest.mark.parametrize("changes", [dict(temperature=0.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)])
def test_settings_out_of_range_are_refused(policy, changes):
    with pytest.raises(AssertionError, match=f"{next(iter(changes))}={next(iter(changes.values()))}"):
        sampled(policy, gold_rows(documents=False), **changes)


def test_a_gpu_and_a_cpu_find_the_same_place():
    """In one level and in two; of masses with gaps, at shares from the first to past the last."""
    generator = torch.Generator().manual_seed(0)
    mass_RMC = torch.rand(200, 3, 128, generator=generator) ** 4
    mass_RMC *= torch.rand(mass_RMC.shape, generator=generator) < 0.1
    mass_RMC[:, :, 40:100] = 0  # parts without any
    share_RM = torch.rand(200, 3, generator=generator, dtype=torch.float64)
    share_RM[0], share_RM[1] = 0, 1 + 1e-12
    places = token_sampling._place(mass_RMC, share_RM)
    assert torch.equal(places, token_sampling._place_by_parts(mass_RMC, share_RM))
    assert (mass_RMC.gather(2, places[..., None]) > 0).all() and len(places.unique()) > 30


@pytest.mark.parametrize("top_p, top_k, width", [(1.0, 0, 30), (1.0, 0, 2500), (0.8, 7, 30)])
def test_draws_from_a_shared_row_are_those_from_copies(top_p, top_k, width, monkeypatch):
    monkeypatch.setattr(token_sampling, "temporary_elements", lambda: 2 * max(width, token_sampling.SEGMENT))  # chunks
    logits, source_R = random_logits(5, width), torch.tensor([4, 0, 0, 2, 4, 4, 1]).to(device())
    options = (width, numbers((7, 1, 1)).flatten(1).to(device()), 0.7, top_p, top_k, dist.group.WORLD)
    copies = token_sampling.draw(logits[source_R], *options)
    assert all(map(torch.equal, token_sampling.draw(logits, *options, source_R), copies))
