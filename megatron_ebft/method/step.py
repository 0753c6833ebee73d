"""One EBFT step: Algorithm 1 of the paper.

    rollouts      ŷ_1..ŷ_n ~ p_θ(·|c)                  for every block, by the policy
    features      φ_c(ŷ_j), φ_c(y)                     by the frozen encoder, as inner products
    rewards       2φ_jᵀφ_y − α·2/(n−1) Σ φ_jᵀφ_j'      after whitening
    advantages    leave-one-out baselines
    gradient      of rl_coef·L_RL + γ·L_CE + β·KL
    update        clip, AdamW

Parallelism, precision and savings are below: in the functions called here. What a run adds (timers, dumped steps, the
self-check) comes in through `phase` and `inspect`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.diagnostics import measure_mismatch, measure_rewards
from megatron_ebft.method.gradient import Scores, policy_gradient, score
from megatron_ebft.method.means import Means
from megatron_ebft.method.rewards import Rewards, compute_advantages, compute_rewards, feature_grams
from megatron_ebft.method.update import clear_gradients, update
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts


@dataclass(kw_only=True)
class EBFTStep:
    """Everything a step computed up to its gradient, this rank's part."""

    gold: GoldBatch
    rollouts: Rollouts
    rewards: Rewards
    advantage_BKN: Tensor
    scores: Scores
    """The policy's."""
    means: Means


def ebft_step(*, policy: list, encoder, start, optimizer, gold: GoldBatch, config: EBFTConfig, iteration: int,
              rollouts: Rollouts | None = None, phase: Callable[[str], AbstractContextManager],
              after_rollouts: Callable[[], None] = lambda: None,
              inspect: Callable[[EBFTStep], None] = lambda step: None) -> dict[str, float]:
    """One optimizer step on the global batch; returns its metrics, the same on every rank.

    Where nothing of the batch counts, there is no loss among the metrics.

    Args:
        policy: this rank's stages, as `build_policy` makes them.
        start: frozen starting policy; None: no KL term, and no distance to the start is measured.
        gold: this rank's rows of the global batch.
        iteration: steps done so far; names the step in the sampler's random numbers.
        rollouts: rollouts of these rows; None: they are sampled.
        phase: makes the context of each phase, from its name.
        after_rollouts: is called after sampling, which takes longest; may end the step by an exception.
        inspect: is called with the step before the weights change; may raise StepFailed.

    Raises:
        StepFailed: a loss or gradient that is not finite; the weights are as they were.
    """
    means = Means()
    clear_gradients(policy, optimizer)
    with phase("rollout"):
        rollouts = rollouts or sample_rollouts(policy, gold, config.layout, config.sampling, iteration,
                                               config.rollout_rows)
    after_rollouts()
    with phase("features"):
        gram = feature_grams(encoder, gold, rollouts, config, means)
        rewards = compute_rewards(gram, rollouts, config)
        advantage_BKN = compute_advantages(rewards, config)
    start_BKNG, valid_BK = None, gold.valid_blocks(config.layout)
    if start is not None:
        with phase("start_scores"):
            needed_BKN = valid_BK[..., None].expand_as(advantage_BKN)
            start_BKNG = score(start, gold, rollouts, config, needed_BKN).rollout_BKNG
    with phase("train"):
        scores = policy_gradient(policy, gold, rollouts, advantage_BKN, config, means,
                                 start_BKNG if config.kl_coef else None)
    measure_rewards(gram, rewards, valid_BK, config, means)
    measure_mismatch(rollouts, scores, start_BKNG, valid_BK, config.importance_cap, means)
    inspect(EBFTStep(gold=gold, rollouts=rollouts, rewards=rewards, advantage_BKN=advantage_BKN, scores=scores,
                     means=means))
    metrics = means.reduce()
    parts = {"rl_loss": config.rl_coef, "ce_loss": config.ce_coef, "kl_loss": config.kl_coef}
    parts = {part: coef for part, coef in parts.items() if part in metrics}
    if any(parts.values()):
        metrics["loss"] = sum(coef * metrics[part] for part, coef in parts.items())
    with phase("optimizer"):
        metrics["grad_norm"] = update(optimizer, metrics.get("loss", 0.0))
    return metrics
