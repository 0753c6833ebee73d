"""What a step measures besides its loss: rewards, CFM, and how near the sampler is to the training pass."""

import math

import torch
from torch import Tensor

from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method import energy
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.gradient import Scores
from megatron_ebft.method.means import Means
from megatron_ebft.method.rewards import Rewards
from megatron_ebft.rollout.sampler import Rollouts

NO_SPREAD = 1e-6
"""A group whose rewards have a smaller standard deviation counts as one without a spread."""


PARTS = 8
"""CFM is also measured by eighth of the row, to see whether matching depends on the position."""


def measure_rewards(gram: Tensor, rewards: Rewards, valid_BK: Tensor, config: EBFTConfig, means: Means) -> None:
    """Rewards and their two parts, their spread within groups, and CFM of features before whitening.

    Args:
        gram: `feature_grams`, float64 [B, K, n+1, n+1].
    """
    alignment, diversity = rewards.alignment_BKn.float(), rewards.diversity_BKn.float()
    reward = config.alignment_coef * alignment - config.diversity_coef * diversity
    spread = reward.std(-1, unbiased=False)
    biased, unbiased = energy.cfm(gram)
    means.add_masked("reward", reward, valid_BK[..., None])
    means.add_masked("alignment", alignment, valid_BK[..., None])
    means.add_masked("diversity", diversity, valid_BK[..., None])
    means.add_masked("reward_std", spread, valid_BK)
    means.add_masked("zero_spread", (spread < NO_SPREAD).float(), valid_BK)
    means.add_masked("cfm_biased", biased, valid_BK)
    if config.num_samples > 1:
        means.add_masked("cfm", unbiased, valid_BK)
        measure_positions(unbiased, valid_BK, config.layout, means)
    means.add_masked("valid_blocks", valid_BK.float(), torch.ones_like(valid_BK))


def measure_positions(cfm_BK: Tensor, valid_BK: Tensor, layout: StridedLayout, means: Means) -> None:
    """CFM of the blocks whose anchors are in each eighth of the row, `cfm_position/1` to `cfm_position/8`."""
    first_tokens = torch.arange(PARTS + 1)[:, None] * layout.seq_length
    ends = (layout.anchors() * PARTS < first_tokens).sum(1).tolist()
    for part, blocks in enumerate(map(slice, ends, ends[1:]), 1):
        if blocks.start < blocks.stop:
            means.add_masked(f"cfm_position/{part}", cfm_BK[:, blocks], valid_BK[:, blocks])


def measure_mismatch(rollouts: Rollouts, scores: Scores, start_BKNG: Tensor | None, valid_BK: Tensor, cap: float,
                     means: Means) -> None:
    """Distances per rollout token, where the training pass has read it: to the sampler, and to the start.

    Args:
        start_BKNG: log-probabilities under the start; None: not measured.
        cap: of the importance weights; 0: none.
    """
    valid = valid_BK[..., None, None]
    scored = valid & scores.is_scored_BKNG
    means.add_masked("entropy", rollouts.entropy_BKNG, valid)
    measure_sampler(scores.rollout_BKNG, rollouts.log_probs_BKNG, scored, cap, means)
    if start_BKNG is not None:
        means.add_masked("distance_to_start", (scores.rollout_BKNG - start_BKNG).abs(), scored)


def measure_sampler(log_probs: Tensor, sampled: Tensor, scored: Tensor, cap: float, means: Means) -> None:
    """How far the sampler is from the training pass.

    Args:
        log_probs, sampled: log-probabilities of tokens, by the training pass and by the sampler.
        scored: bool; which of them count.
        cap: of the importance weights; 0: none.
    """
    change = log_probs - sampled
    mismatch = change.abs()
    means.add_masked("mismatch", mismatch, scored)
    means.add_masked("mismatch_ratio", mismatch.exp(), scored)
    means.add_masked("mismatch_kl", torch.expm1(change) - change, scored)  # KL(sampler ‖ training pass), k3
    means.add_masked("importance_truncated", (change > math.log(cap or math.inf)).float(), scored)
