"""Training losses (METHOD: "Losses"): pure functions of log-probabilities.

Each returns a SUM over the tokens that count; the caller divides by the global number of such tokens, so that the
loss does not depend on how the batch is split over ranks or micro-batches.
"""

import torch
from torch import Tensor


def on_policy_ratio(log_probs: Tensor) -> Tensor:
    """ρ = exp(logp − stopgrad(logp)): value 1, gradient ∇logp."""
    return torch.exp(log_probs - log_probs.detach())


def importance_weight(log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """min(p_train / p_sampler, cap) of each token, detached; 1 for cap 0 (METHOD: "Losses").

    On average over tokens this corrects how the sampler's numerics change the distribution of one token. It does not
    correct the tokens before it, nor the other rollouts of its block, which the sampler drew as well.
    """
    if cap == 0:
        return torch.ones_like(log_probs)
    return (log_probs.detach() - sampler_log_probs).exp().clamp(max=cap)


def reinforce_loss(log_probs: Tensor, advantages: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """−Σ A·ρ over the valid tokens.

    Args:
        weight: of each token, [..., G]; None: 1.
        log_probs: [..., G] of rollout tokens under the training pass, at the sampling temperature.
        advantages: [...], one per rollout, shared by its tokens.
        valid: bool, broadcastable to [...].
    """
    ratio = on_policy_ratio(log_probs)
    return -((ratio if weight is None else ratio * weight).sum(-1) * advantages * valid).sum()


def cross_entropy(log_probs: Tensor, valid: Tensor) -> Tensor:
    """−Σ logp over valid gold tokens."""
    return -(log_probs * valid).sum()


def kl_estimate(log_probs: Tensor, start_log_probs: Tensor, estimator: str) -> Tensor:
    """Estimate per token of KL(p_θ ‖ p_start) from tokens sampled from p_θ; d = logp − logp_start.

    k1 = d, differentiated as a score function (d·∇logp; its plain gradient ∇logp has zero mean): unbiased value and
    gradient. k2 = d²/2: the same gradient, a biased value. k3 = exp(−d) − 1 + d: unbiased value of low variance, and
    the gradient of KL(p_start ‖ p_θ).
    """
    d = log_probs - start_log_probs
    if estimator == "k1":
        return d.detach() * on_policy_ratio(log_probs)
    if estimator == "k2":
        return d.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(-d) + d
