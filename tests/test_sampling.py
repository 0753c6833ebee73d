"""Sampling: the distribution, its top-p and top-k sets, the random numbers, and independence of the batch split."""

import brute_force as bf
import models
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ebft import rollout, visibility
from megatron_ebft.batch import GoldBatch
from megatron_ebft.device import device
from megatron_ebft.layout import Chunk, RowLayout, StridedLayout
from megatron_ebft.rollout import SamplingConfig, sample_rollouts
from megatron_ebft.sampling import filter_probabilities, sample, uniform

pytestmark = pytest.mark.usefixtures("one_rank")


def numbers(shape, **changes) -> torch.Tensor:
    """uniform() with a document for each row, a block for each column, …; `changes` replaces arguments."""
    index = [torch.arange(size, device=device()).view(-1, *[1] * (2 - i)) for i, size in enumerate(shape)]
    arguments = dict(seed=1, iteration=2, document=index[0], block=index[1], sample=index[2], step=3)
    return uniform(**{**arguments, **changes}).cpu()


def random_logits(*shape, seed=0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device())


def draw(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    found = sample(logits, u.to(logits.device), temperature, top_p, top_k, dist.group.WORLD)
    return [x.cpu() for x in found]


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
    config, weights = bf.random_llama(0, layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=30)
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


class NothingForTheHost(TorchDispatchMode):
    """Operations whose result the host has to read, which would make it wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique"), name
        assert not (name in ("index", "index_put", "index_put_") and masks), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [False, True])
def test_decoding_needs_nothing_of_the_host(policy, documents, monkeypatch):
    """After the prefill no number is read, and none of the layout's host tensors is used or sent."""
    work = rollout._Group.work

    def refuse(*args):
        raise AssertionError("asked of the host while decoding")

    def watched(self, step, virtual, given):
        if step == 0:
            return work(self, step, virtual, given)
        with pytest.MonkeyPatch.context() as patch, NothingForTheHost():
            for name in ("blocks", "anchors", "is_real", "rollout_number", "rollout_anchor", "rollout_step"):
                vars(self.row).pop(name, None)
                patch.setattr(RowLayout, name, property(refuse))
            for name in ("positions", "rollout_index", "anchor_predictors"):
                patch.setattr(RowLayout, name, refuse)
            patch.setattr(visibility, "upload", refuse)
            patch.setattr(rollout, "upload", refuse)
            patch.setattr(Chunk, "gold", property(lambda chunk: 20))  # of the path without a GPU's kernel
            return work(self, step, virtual, given)

    expected = sampled(policy, gold_rows(documents))
    monkeypatch.setattr(rollout._Group, "work", watched)
    assert torch.equal(sampled(policy, gold_rows(documents)), expected)


@pytest.mark.parametrize("changes, flag", [(dict(temperature=0.0), "temperature"), (dict(top_p=0.0), "top-p"),
                                           (dict(top_p=1.1), "top-p"), (dict(top_k=-1), "top-k")])
def test_settings_out_of_range_name_their_flag(policy, changes, flag):
    with pytest.raises(ValueError, match=f"--ebft-{flag} "):
        sampled(policy, gold_rows(documents=False), **changes)
