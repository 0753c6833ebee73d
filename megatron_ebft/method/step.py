"""One EBFT step: Algorithm 1 of the paper.

    rollouts      ŷ_1..ŷ_n ~ p_θ(·|c)                  for every block, by the policy
    features      φ_c(ŷ_j), φ_c(y)                     by the frozen encoder, as inner products
    rewards       2φ_jᵀφ_y − α·2/(n−1) Σ φ_jᵀφ_j'      after whitening
    advantages    leave-one-out baselines
    gradient      of rl_coef·L_RL + γ·L_CE + β·KL
    update        clip, AdamW

The first five lines are one pass over each micro-batch (fused.py), or passes of their own (separate.py). Parallelism,
precision and savings are below. What a run adds (timers, dumped steps, the self-check) comes in through `phase` and
`inspect`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.diagnostics import measure_mismatch, measure_rewards
from megatron_ebft.method.fused import fused_gradient
from megatron_ebft.method.means import Means
from megatron_ebft.method.separate import separate_gradient
from megatron_ebft.method.update import clear_gradients, update
from megatron_ebft.rollout.sampler import Rollouts


def ebft_step(*, policy: list, encoder, start, optimizer, gold: GoldBatch, config: EBFTConfig, iteration: int,
              rollouts: Rollouts | None = None, phase: Callable[[str], AbstractContextManager],
              after_rollouts: Callable[[], None] = lambda: None,
              inspect: Callable[[Computed, Means], None] = lambda *step: None) -> dict[str, float]:
    """One optimizer step on the global batch; returns its metrics, the same on every rank.

    Where nothing of the batch counts, there is no loss among the metrics.

    Args:
        policy: this rank's stages, as `build_policy` makes them.
        start: frozen starting policy; None: no KL term, and no distance to the start is measured.
        gold: this rank's rows of the global batch.
        iteration: steps done so far; names the step in the sampler's random numbers.
        rollouts: rollouts of these rows; None: they are sampled.
        phase: makes the context of each phase, from its name.
        after_rollouts: is called after sampling (in a fused step, of the first micro-batch); may end the step by
            an exception.
        inspect: is called with what the step has computed, before the weights change; may raise StepFailed.

    Raises:
        StepFailed: a loss or gradient that is not finite; the weights are as they were.
    """
    means, valid_BK = Means(), gold.valid_blocks(config.layout)
    clear_gradients(policy, optimizer)
    if config.fused and rollouts is None:
        step = fused_gradient(policy, encoder, start, gold, config, iteration, means, phase, after_rollouts)
    else:
        step = separate_gradient(policy, encoder, start, gold, config, iteration, means, phase, after_rollouts,
                                 rollouts)
    measure_rewards(step.gram, step.rewards, valid_BK, config, means)
    measure_mismatch(step.rollouts, step.scores, step.start_BKNG, valid_BK, config.importance_cap, means)
    inspect(step, means)
    metrics = means.reduce()
    parts = {"rl_loss": config.rl_coef, "ce_loss": config.ce_coef, "kl_loss": config.kl_coef}
    parts = {part: coef for part, coef in parts.items() if part in metrics}
    if any(parts.values()):
        metrics["loss"] = sum(coef * metrics[part] for part, coef in parts.items())
    with phase("optimizer"):
        metrics["grad_norm"] = update(optimizer, metrics.get("loss", 0.0))
    return metrics
