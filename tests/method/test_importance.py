"""Importance weights above their cap: by hand, and in a golden step whose sampler was another distribution."""

from dataclasses import replace

import brute_force as bf
import models
import plain_llama
import pytest
import torch
from golden import GOLDEN, Case, by_rollout, load_golden

from megatron_ebft.method import losses

CAP = 2.0


@pytest.mark.parametrize("cap, loss, gradient", [(CAP, -7.5, [-6.0, -1.5]), (0.0, -6.0, [-3.0, -3.0])])
def test_two_tokens_by_hand(cap, loss, gradient):
    """Ratios of 0.8 / 0.2 = 4, capped to 2, and 0.1 / 0.2 = 0.5; an advantage of 3. Cap 0: no weights."""
    log_probs = torch.tensor([[0.8, 0.1]], dtype=torch.float64).log().requires_grad_()
    sampler_log_probs = torch.tensor([[0.2, 0.2]], dtype=torch.float64).log()
    weight = losses.importance_weight(log_probs, sampler_log_probs, cap)
    value = losses.reinforce_loss(log_probs, torch.tensor([3.0]), torch.tensor([True]), weight)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert log_probs.grad.tolist() == [pytest.approx(gradient)]


def test_a_golden_step_above_the_cap(one_rank):
    """Log-ratios from -1.5 to 1.5: a quarter of the tokens are above the cap."""
    golden, settings, docs, tokens = load_golden("step")
    log_probs = by_rollout(torch.nn.functional.pad(golden["log_probs"], (1, 0)), settings, docs)
    order = torch.randperm(log_probs.numel(), generator=torch.Generator().manual_seed(0))
    log_ratios = torch.linspace(-1.5, 1.5, len(order))[order].view_as(log_probs)
    assert 0.2 < (log_ratios.exp() > CAP).float().mean() < 0.3
    config, weights = plain_llama.load_llama(GOLDEN / "llama")
    expected = bf.step(weights, config, docs, tokens, replace(settings, importance_cap=CAP), encoder=weights,
                       sampler_log_probs=log_probs - log_ratios)
    case = Case("step", 1, 3)
    case.config = replace(case.config, importance_cap=CAP)
    case.rollouts = replace(case.rollouts, log_probs_BKNG=log_probs - log_ratios)
    case.gradient()
    assert case.means.reduce()["rl_loss"] == pytest.approx(expected["rl_loss"].item(), abs=1e-5)
    for name, gradient in models.gradients(case.policy, case.model).items():
        assert models.relative_error(gradient, expected["grads"][name]) <= 2e-5, name
    golden_gradient = golden["grad.model.norm.weight"]
    assert models.relative_error(expected["grads"]["model.norm.weight"], golden_gradient) > 0.01  # the weights count
