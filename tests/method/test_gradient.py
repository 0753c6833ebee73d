"""The policy gradient is the gradient of feature matching: exact enumeration of all rollouts, in float64.

A vocabulary of V tokens and rollouts of G have V^G outcomes; a block's n rollouts, V^(nG) tuples. All tuples go in as
the rows of one batch, each row's blocks all with the same tuple, and each advantage times the probability of its
block's tuple: the sum over rows is the expectation over rollouts. L_RL is a mean over R rows · K blocks · n samples ·
G tokens, and the n samples of a tuple contribute alike, so that

    R · ∇L_RL = −1/(K n G) Σ_k Σ_j E[A_kj ∇log p(ŷ_kj)] = 1/(K G) · Σ_k ∇‖E_ŷ φ_k(ŷ) − φ_k(y)‖².

The right-hand side is worked out by brute_force.py and autograd, with no sampling, reward or advantage in it. It needs
what METHOD.md says the identity needs: no whitening, α = 1, features of unit length (alignment is a cosine).
"""


import brute_force as bf
import models
import pytest
import torch
from models import relative_error
from toy import TEMPERATURE, G, T, Toy

from megatron_ebft.common.device import device
from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.sampler import sample_rollouts

pytestmark = pytest.mark.usefixtures("one_rank", "float64")


def largest_relative_error(actual: dict, expected: dict) -> float:
    """Over the parameters, of the package's gradient times K·G."""
    assert actual.keys() == expected.keys()
    return max(relative_error(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("advantage", ["rloo", "reinforce"])
@pytest.mark.parametrize("n", [2, 3])
def test_the_policy_gradient_is_unbiased(n, advantage):
    toy = Toy(n)
    actual = toy.expected_policy_gradient(advantage, alpha=1.0)
    expected = {name: grad / (toy.blocks * G) for name, grad in toy.feature_matching_gradient().items()}
    assert toy.blocks == 2 and all(grad.norm() > 1e-6 for grad in expected.values())
    assert largest_relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("n", [2, 3])
def test_the_gradient_of_a_fused_step_is_unbiased(n, monkeypatch):
    toy = Toy(n)
    actual = toy.expected_policy_gradient("rloo", alpha=1.0, fused=monkeypatch)
    expected = {name: grad / (toy.blocks * G) for name, grad in toy.feature_matching_gradient().items()}
    assert largest_relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("advantage, alpha", [("rloo", 0.0), ("rloo", 0.5), ("group_norm", 1.0)])
def test_other_coefficients_give_another_gradient(advantage, alpha):
    toy = Toy(2)
    actual = toy.expected_policy_gradient(advantage, alpha)
    expected = {name: grad / (toy.blocks * G) for name, grad in toy.feature_matching_gradient().items()}
    assert largest_relative_error(actual, expected) > 0.05


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
