"""From rollouts to advantages, on all ranks: the encoder's Gram matrices, rewards, baselines (METHOD: "Features" to
"Advantages"). The mathematics is in energy.py."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout.strided import first_alike
from megatron_ebft.method import energy
from megatron_ebft.method.batches import encoder_rows
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.features import block_grams
from megatron_ebft.method.means import Means
from megatron_ebft.model.fp8 import quantised
from megatron_ebft.parallel.groups import (
    all_samples,
    from_first_tensor_rank,
    from_last_stage,
    sample_rank,
    sample_size,
)
from megatron_ebft.rollout.sampler import Rollouts


@dataclass
class Rewards:
    """The two parts of each rollout's reward; n counts the samples of all ranks of a sample group."""

    alignment_BKn: Tensor
    """2φ_jᵀφ_y, float64 [B, K, n]."""
    diversity_BKn: Tensor
    """2/(n−1) Σ_{j'≠j} φ_jᵀφ_j', float64 [B, K, n]."""


def feature_grams(encoder, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
                  means: Means | None = None, blocks_BK: Tensor | None = None, whole: int | None = None) -> Tensor:
    """Inner products of the features of every block's n rollouts and its gold completion, float64 [B, K, n+1, n+1].

    Rollouts of blocks that are not asked for have the features of their gold completion, if rows leave anything out.

    Args:
        means: receives the share of the encoder's tokens that was left out, "encoder_tokens_saved".
        blocks_BK: rows hold the rollouts of these blocks alone, bool. None: those of blocks that count, or of all
            without `skip_duplicates`.
        whole: length of a row that leaves none of these out (MicroBatches.saved_tokens).
    """
    is_restricted = blocks_BK is not None
    blocks_BK = blocks_BK if is_restricted else gold.valid_blocks(config.layout)
    needed_BKN = blocks_BK[..., None].expand(rollouts.tokens_BKNG.shape[:3])
    rows = encoder_rows(gold, rollouts, replace(config, skip_duplicates=True) if is_restricted else config, needed_BKN)
    if means is not None:
        means.add("encoder_tokens_saved", *rows.saved_tokens(whole))
    with torch.no_grad(), quantised([encoder], config.encoder_fp8):
        return block_grams(encoder, config.feature_map, rows, [config.layout.rollout_length])[:, :, 0]


def compute_rewards(gram: Tensor, rollouts: Rollouts, config: EBFTConfig) -> Rewards:
    """Rewards of all n rollouts of each block, after whitening.

    Args:
        gram: `feature_grams`.
    """
    alignment, diversity = energy.rewards(gram, config.whitening)
    if config.skip_duplicates:  # identical rollouts may differ by rounding: on two sample ranks, or after whitening
        first_BKn = first_alike(all_samples(rollouts.tokens_BKNG))
        alignment, diversity = alignment.gather(-1, first_BKn), diversity.gather(-1, first_BKn)
    return Rewards(alignment, diversity)


def compute_advantages(rewards: Rewards, config: EBFTConfig) -> Tensor:
    """Advantages of this rank's N = n/S samples of each block, float32 [B, K, N], equal on all ranks of a model."""
    advantage_BKn = energy.advantages(rewards.alignment_BKn, rewards.diversity_BKn, config.advantage,
                                      config.alignment_coef, config.diversity_coef)
    advantage_BKN = advantage_BKn.chunk(sample_size(), dim=-1)[sample_rank()].float().contiguous()
    # Whitening cuts at a threshold: ranks that share a model must not end on two sides of it by the last bit.
    return from_last_stage(from_first_tensor_rank(advantage_BKN))
