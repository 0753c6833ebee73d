"""The step in separate passes: sampling without gradient, then the training pass over packed rows of all rollouts.

It works with pipeline stages, activation recomputation, FP8 rollouts and rollouts that come from a file, where the
fused step (fused.py) does not.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.gradient import policy_gradient, score
from megatron_ebft.method.means import Means
from megatron_ebft.method.rewards import compute_advantages, compute_rewards, feature_grams
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts


def separate_gradient(policy: list, encoder, start, gold: GoldBatch, config: EBFTConfig, iteration: int, means: Means,
                      phase: Callable[[str], AbstractContextManager], after_rollouts: Callable[[], None],
                      rollouts: Rollouts | None = None) -> Computed:
    """Rollouts, features, rewards, advantages, and the gradient of the loss; arguments as for `ebft_step`."""
    with phase("rollout"):
        rollouts = rollouts or sample_rollouts(policy, gold, config.layout, config.sampling, iteration,
                                               config.rollout_rows)
    after_rollouts()
    with phase("features"):
        gram = feature_grams(encoder, gold, rollouts, config, means)
        rewards = compute_rewards(gram, rollouts, config)
        advantage_BKN = compute_advantages(rewards, config)
    start_BKNG = None
    if start is not None:
        with phase("start_scores"):
            needed_BKN = gold.valid_blocks(config.layout)[..., None].expand_as(advantage_BKN)
            start_BKNG = score(start, gold, rollouts, config, needed_BKN).rollout_BKNG
    with phase("train"):
        scores = policy_gradient(policy, gold, rollouts, advantage_BKN, config, means,
                                 start_BKNG if config.kl_coef else None)
    return Computed(rollouts=rollouts, gram=gram, rewards=rewards, advantage_BKN=advantage_BKN, scores=scores,
                    start_BKNG=start_BKNG)
