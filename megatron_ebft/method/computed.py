"""What a step computes up to its gradient, whichever way it computes it (fused.py, separate.py)."""

from dataclasses import dataclass

from torch import Tensor

from megatron_ebft.method.gradient import Scores
from megatron_ebft.method.rewards import Rewards
from megatron_ebft.rollout.sampler import Rollouts


@dataclass(kw_only=True)
class Computed:
    """Of some rows of this rank. The gradient is in the policy's buffers."""

    rollouts: Rollouts
    gram: Tensor
    """Inner products of features, before whitening, float64 [B, K, n+1, n+1]."""
    rewards: Rewards
    advantage_BKN: Tensor
    scores: Scores
    """The policy's."""
    start_BKNG: Tensor | None
    """Log-probabilities of the rollout tokens under the start; None without a start."""
