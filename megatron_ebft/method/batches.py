"""Which rows the encoder and the policy compute: all rollouts, or only those that can change the gradient.

With `skip_duplicates`, loss and gradient stay the same, and these rollouts are left out. (The policy of a fused step is
different: it leaves out those of point 2, and computes once what rollouts of a block have in common, layout/tree.py.)

1. Rollouts that equal an earlier one of their block token for token. Their features and log-probabilities are read
   where the first is; gradients add up there.
2. Rollouts of blocks that do not count, in both models.
3. Rollouts whose advantage is zero, in the policy, unless the KL term needs them. "Zero" means exactly 0: identical
   rollouts are given identical rewards, of which the baseline leaves exactly nothing (energy.py).

A gold token predicts step 0 of a rollout, so the log-probability of step 0 is always read.
"""

import torch
from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch, MicroBatches
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.parallel.groups import dp_sum
from megatron_ebft.rollout.sampler import Rollouts


def encoder_rows(gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
                 needed_BKN: Tensor | None = None) -> MicroBatches:
    """Rows of T gold tokens and all G tokens of each rollout.

    Args:
        needed_BKN: bool; with `skip_duplicates`, other rollouts are left out. None: all are needed.
    """
    return _rows(gold, rollouts, config, config.layout.rollout_length, needed_BKN)


def training_rows(gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
                  needed_BKN: Tensor | None = None) -> MicroBatches:
    """Rows of T gold tokens and G − 1 tokens of each rollout, whose last token predicts nothing.

    Args:
        needed_BKN: bool; with `skip_duplicates`, other rollouts are left out. None: all are needed.
    """
    return _rows(gold, rollouts, config, config.layout.rollout_length - 1, needed_BKN)


def _rows(gold, rollouts, config: EBFTConfig, steps: int, needed_BKN: Tensor | None) -> MicroBatches:
    return MicroBatches(gold, rollouts.tokens_BKNG, config.layout, steps, config.micro_batch_size,
                        config.blocks_per_microbatch, needed_BKN if config.skip_duplicates else None)


def token_counts(gold: GoldBatch, layout: StridedLayout) -> Tensor:
    """Valid rollout tokens and valid gold tokens of the GLOBAL batch, float32 [2]: the denominators of the two means.

    All ranks of a sample group count the same gold tokens, and each adds its own share of their cross entropy.
    """
    rollout_tokens = gold.valid_blocks(layout).sum() * layout.num_samples * layout.rollout_length
    return dp_sum(torch.stack([rollout_tokens, gold.gold_valid().sum()]).float())
