"""The policy gradient is the gradient of feature matching: exact enumeration of all rollouts, in float64.

A vocabulary of V tokens and rollouts of G have V^G outcomes; a block's n rollouts, V^(nG) tuples. All tuples go in as
the rows of one batch, each row's blocks all with the same tuple, and each advantage times the probability of its
block's tuple: the sum over rows is the expectation over rollouts. L_RL is a mean over R rows · K blocks · n samples ·
G tokens, and the n samples of a tuple contribute alike, so that

    R · ∇L_RL = −1/(K n G) Σ_k Σ_j E[A_kj ∇log p(ŷ_kj)] = 1/(K G) · Σ_k ∇‖E_ŷ φ_k(ŷ) − φ_k(y)‖².

The right-hand side is worked out by brute_force.py and autograd, with no sampling, reward or advantage in it. It needs
what METHOD.md says the identity needs: no whitening, α = 1, features of unit length (alignment is a cosine).
"""

from itertools import product

import brute_force as bf
import models
import pytest
import torch
from models import relative_error

from megatron_ebft.common.device import device
from megatron_ebft.layout.strided import first_alike
from megatron_ebft.method import energy, gradient
from megatron_ebft.method.means import Means
from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts

pytestmark = pytest.mark.usefixtures("one_rank", "float64")
V, G, T, TEMPERATURE = 3, 2, 7, 0.7


class Toy:
    """A policy and another model as encoder, one document, and every rollout's probability and feature."""

    def __init__(self, n: int, length: int = G):
        self.n, self.length = n, length
        self.outcomes_OG = torch.tensor(list(product(range(V), repeat=length)))
        options = dict(layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=V, dtype=torch.float64)
        self.config, self.weights = bf.random_llama(3, **options)
        self.encoder_weights = bf.random_llama(4, **options)[1]
        self.doc = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
        self.geometry = bf.Geometry(context=2, stride=2, rollout_length=length, num_samples=len(self.outcomes_OG))
        self.blocks = len(self.geometry.anchors(T))
        self.outcomes = self.outcomes_OG.expand(1, self.blocks, -1, -1)  # every outcome as a rollout of every block
        features, reference = bf.features(self.encoder_weights, self.config, self.doc, self.outcomes, self.geometry)
        self.features_KOD, self.reference_KD = features[0], reference[0]

    def log_probs(self, weights) -> torch.Tensor:
        """log p of every outcome in every block, [K, O]."""
        log_probs = bf.rollout_log_probs(weights, self.config, self.doc, self.outcomes, self.geometry, TEMPERATURE)
        return log_probs[0].sum(-1)

    def feature_matching_gradient(self) -> dict[str, torch.Tensor]:
        """∇ Σ_k ‖E φ − φ_y‖², the expectation written out."""
        leaves = {name: x.clone().requires_grad_() for name, x in self.weights.items()}
        mean_KD = (self.log_probs(leaves).exp()[..., None] * self.features_KOD).sum(1)
        loss = (mean_KD - self.reference_KD).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    def expected_policy_gradient(self, advantage: str, alpha: float) -> dict[str, torch.Tensor]:
        """R · ∇L_RL over all tuples of n outcomes, by the package."""
        tuples_RN = torch.tensor(list(product(range(len(self.outcomes_OG)), repeat=self.n)))
        R, K = len(tuples_RN), self.blocks
        settings = bf.Settings(bf.Geometry(2, 2, self.length, self.n), TEMPERATURE, alpha=alpha, advantage=advantage)
        method = models.ebft_config(settings, T, self.config["num_hidden_layers"], micro_batch_size=R)
        tokens = self.outcomes_OG[tuples_RN][:, None].expand(R, K, self.n, self.length).to(device())
        gold, rollouts = models.gold_batch(self.doc.expand(R, T)), Rollouts(tokens, None, None)
        policy = models.build_policy(self.config, self.weights)
        encoder = models.build_encoder(self.config, self.encoder_weights)
        rewards = models.rewarded(encoder, gold, rollouts, method)
        first = first_alike(tokens)  # identical rollouts have identical rewards, whatever rounding says
        exact = energy.advantages(*(x.gather(-1, first) for x in energy.rewards(rewards.gram, "none")), advantage, 1.0,
                                  alpha)
        assert torch.equal(rewards.advantage, exact.float())  # float32 is all the package keeps of them
        probability_RK = self.log_probs(self.weights)[:, tuples_RN].sum(-1).t().exp().to(device())
        assert (probability_RK.sum(0) - 1).abs().max() < 1e-12
        gradient.policy_gradient(policy, gold, rollouts, exact * probability_RK[..., None], method, Means())
        return {name: R * grad for name, grad in models.gradients(policy, self.config).items()}


def largest_relative_error(found: dict, expected: dict) -> float:
    """Over the parameters, of the package's gradient times K·G."""
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("advantage", ["rloo", "reinforce"])
@pytest.mark.parametrize("n", [2, 3])
def test_the_policy_gradient_is_unbiased(n, advantage):
    toy = Toy(n)
    found = toy.expected_policy_gradient(advantage, alpha=1.0)
    expected = {name: grad / (toy.blocks * G) for name, grad in toy.feature_matching_gradient().items()}
    assert toy.blocks == 2 and all(grad.norm() > 1e-6 for grad in expected.values())
    assert largest_relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("advantage, alpha", [("rloo", 0.0), ("rloo", 0.5), ("group_norm", 1.0)])
def test_other_coefficients_give_another_gradient(advantage, alpha):
    toy = Toy(2)
    found = toy.expected_policy_gradient(advantage, alpha)
    expected = {name: grad / (toy.blocks * G) for name, grad in toy.feature_matching_gradient().items()}
    assert largest_relative_error(found, expected) > 0.05


def test_the_sampler_draws_each_outcome_with_its_probability(monkeypatch):
    """A grid of M × M numbers in place of random ones: counts must be right to the rounding of the grid."""
    toy, M = Toy(2), 64
    settings = bf.Settings(bf.Geometry(2, 2, G, M * M), TEMPERATURE)
    method = models.ebft_config(settings, T, toy.config["num_hidden_layers"])
    grid = (torch.arange(M).double() + 0.5) / M
    by_step = [grid.repeat_interleave(M).to(device()), grid.repeat(M).to(device())]
    monkeypatch.setattr(sampler, "uniform", lambda seed, iteration, document, block, sample, step:
                        torch.stack(by_step, -1).repeat(len(document), len(block), 1, 1))
    policy = models.build_policy(toy.config, toy.weights)
    drawn = sample_rollouts(policy, models.gold_batch(toy.doc), method.layout, method.sampling, iteration=0)
    tokens, log_p = drawn.tokens_BKNG[0].cpu(), toy.log_probs(toy.weights)
    for k in range(toy.blocks):
        for o, outcome in enumerate(toy.outcomes_OG):
            here = (tokens[k] == outcome).all(-1)
            assert abs(here.double().mean() - log_p[k, o].exp()) <= 2 / M, (k, outcome)
            if here.any():
                assert (drawn.log_probs_BKNG[0, k].cpu()[here].sum(-1) - log_p[k, o]).abs().max() <= 1e-5
