"""Feature matching: Gram matrices, whitening, rewards, baselines and CFM (METHOD: "Objective", "Whitening and
rewards", "Advantages", "Metrics"). Pure functions of tensors.

Everything is computed from the Gram matrix of [x_1 .. x_n; y], the features of a block's n rollouts and
of its gold completion. It is additive over the feature dimension, so layers and shards of layers contribute by a sum.

Names: M [..., n+1, n+1] Gram matrix, X Xᵀ its leading n×n block, g = X y, U S² Uᵀ the eigendecomposition of X Xᵀ.
"""

import torch
from torch import Tensor

SINGULAR_VALUE_CUTOFF = 1e-5
"""Whitening drops singular values of the inverted matrix (Σ̂, XXᵀ) below this share of the largest."""
NORM_FLOOR = 1e-12
"""A hidden state whose norm is smaller is divided by this instead."""
GROUP_NORM_EPS = 1e-6
COSINE_EPS = 1e-8


def gram(features: Tensor) -> Tensor:
    """Inner products of features [..., m, D], or of a shard of them, in float64 so that squaring costs whitening no
    precision: [..., m, m]."""
    features = features.double()
    return features @ features.mT


def pool(gram: Tensor, tokens: int) -> Tensor:
    """From inner products of hidden states to inner products of features: every token normalised, then the mean.

    Args:
        gram: [..., m·P, m·P], of m completions' P pooled tokens.

    Returns:
        [..., m, m].
    """
    inverse = gram.diagonal(dim1=-2, dim2=-1).clamp(min=NORM_FLOOR**2).rsqrt()
    normalised = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    m = gram.shape[-1] // tokens
    return normalised.unflatten(-1, (m, tokens)).mean(-1).unflatten(-2, (m, tokens)).mean(-2)


def whiten(M: Tensor, whitening: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner products of whitened features.

    `paper` (Eq. 8): x̃ = x W, ỹ = W y with W = (XᵀX/n)^{†1/2}, so X̃X̃ᵀ = n·UUᵀ, X̃ỹ = n·(XXᵀ)† g,
    ‖ỹ‖² = n·‖(XXᵀ)† g‖². `released`: X̃ = W X, Ỹ = W [y; …; y] with W = (XXᵀ)^{†1/2}, so X̃X̃ᵀ = UUᵀ.

    Returns:
        X̃X̃ᵀ [..., n, n]; x̃_jᵀỹ_j [..., n]; ‖ỹ_j‖² [..., n]; ‖x̃_j‖² [..., n].
    """
    XX, g, yy = M[..., :-1, :-1], M[..., :-1, -1], M[..., -1, -1].unsqueeze(-1)
    n = g.shape[-1]
    if whitening == "none":
        inner, cross, gold = XX, g, yy.expand_as(g)
    else:
        eigenvalues, U = torch.linalg.eigh(XX)
        kept = eigenvalues > SINGULAR_VALUE_CUTOFF * eigenvalues[..., -1:]
        inverse = eigenvalues.clamp(min=0).rsqrt().where(kept, 0.0)
        inner = (U * kept.unsqueeze(-2)) @ U.mT
        if whitening == "paper":
            inner = n * inner
            projected = ((U * inverse.square().unsqueeze(-2)) @ U.mT @ g.unsqueeze(-1)).squeeze(-1)
            cross, gold = n * projected, (n * projected.square().sum(-1, keepdim=True)).expand_as(g)
        else:
            assert whitening == "released", whitening
            W = (U * inverse.unsqueeze(-2)) @ U.mT
            row_sums = W.sum(-1)
            cross, gold = (W @ g.unsqueeze(-1)).squeeze(-1) * row_sums, row_sums.square() * yy
    return inner, cross, gold, inner.diagonal(dim1=-2, dim2=-1)


def rewards(M: Tensor, whitening: str) -> tuple[Tensor, Tensor]:
    """alignment_j = 2 cos(x̃_j, ỹ_j) and diversity_j = 2/(n−1) Σ_{j'≠j} x̃_jᵀx̃_{j'}, each [..., n].

    NaN for blocks whose features are not finite (LAPACK would raise, on one rank alone).
    """
    finite = M.isfinite().flatten(-2).all(-1)[..., None]
    inner, cross, gold, own = whiten(M.where(finite[..., None], 1.0), whitening)
    n = cross.shape[-1]
    norms = gold.clamp(min=0).sqrt().clamp(min=COSINE_EPS) * own.clamp(min=0).sqrt().clamp(min=COSINE_EPS)
    alignment = 2 * cross / norms
    diversity = 2 / max(n - 1, 1) * (inner.sum(-1) - own)
    return alignment.where(finite, torch.nan), diversity.where(finite, torch.nan)


def advantages(alignment: Tensor, diversity: Tensor, kind: str, alignment_coef: float, diversity_coef: float) -> Tensor:
    """Advantage of each rollout within its group, [..., n].

    `rloo`: reward minus the leave-one-out baselines of both parts; `reinforce`: the reward; `group_norm`: the reward
    centred and divided by the group's (population) standard deviation. Where all rollouts of a group have the same
    rewards, their advantages are exactly 0, except with `rloo` and n = 2, whose diversity has no baseline.
    """
    n = alignment.shape[-1]
    reward = alignment_coef * alignment - diversity_coef * diversity
    if kind == "reinforce":
        return reward
    assert n > 1, "one rollout has no others to compare with"
    if kind == "group_norm":
        centred = _from_first(reward) - _from_first(reward).mean(-1, keepdim=True)
        return centred / (reward.std(-1, unbiased=False, keepdim=True) + GROUP_NORM_EPS)
    assert kind == "rloo", kind
    alignment = _from_first(alignment)
    alignment = alignment - (alignment.sum(-1, keepdim=True) - alignment) / (n - 1)
    if n > 2:
        diversity = _from_first(diversity)
        diversity = diversity - (diversity.sum(-1, keepdim=True) - 2 * diversity) / (n - 2)
    return alignment_coef * alignment - diversity_coef * diversity


def _from_first(values: Tensor) -> Tensor:
    """Differences from the group's first. A baseline removes the shift, and equal values leave exactly 0, without
    rounding."""
    return values - values[..., :1]


def cfm(M: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional feature-matching loss of a block, biased and unbiased estimate, each [...].

    Biased: ‖mean_j f_j − g‖². Unbiased: Σ_{i≠j} f_iᵀf_j/(n(n−1)) − (2/n) Σ_i f_iᵀg + ‖g‖² (NaN for n = 1).
    """
    XX, g, yy = M[..., :-1, :-1], M[..., :-1, -1], M[..., -1, -1]
    n = g.shape[-1]
    total, own, cross = XX.sum((-1, -2)), XX.diagonal(dim1=-2, dim2=-1).sum(-1), 2 * g.mean(-1)
    unbiased = (total - own) / (n * (n - 1)) if n > 1 else torch.full_like(total, torch.nan)
    return total / n**2 - cross + yy, unbiased - cross + yy
