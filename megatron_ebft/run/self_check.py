"""The first step of a process checks itself before it changes the weights.

The sampler is the training pass: their log-probabilities agree on the rollouts just drawn. Before any training, the
policy is its start. Rewards are finite.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_ebft.common.errors import StepFailed
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.data.questions import Question
from megatron_ebft.method.completions import completion_batch, completion_scores
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.gradient import score
from megatron_ebft.method.means import Means
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.rollout.generation import generate
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts
from megatron_ebft.run.flags.checks import fp8_recipes
from megatron_ebft.run.state import Run

LIMIT_FLOAT32, LIMIT_BF16 = 1e-3, 5e-2
"""Mean |Δ log-probability| per token above which sampler and trainer, or trainer and start, are not the same model."""
LIMIT_FP8 = 0.3
"""The same for what FP8 may add to it."""
LOOKED_AT = 16
"""Tokens of each completion that are drawn a second time for a comparison without FP8."""


def self_check(run: Run, gold: GoldBatch, computed: Computed, means: Means) -> None:
    """Raises StepFailed, naming every problem, on all ranks.

    FP8's rounding would hide a mistake. Where the sampler or the training pass runs in FP8, they are compared without
    it, and what FP8 adds must stay within LIMIT_FP8.
    """
    metrics = {"reward": 0.0, "mismatch": 0.0, **means.reduce()}  # a batch without a valid block has neither
    if run.config.fused:  # the step has compared the sampler with itself
        metrics["mismatch"] = mismatch(run, gold, computed.rollouts)
    _check(run, metrics, lambda: mismatch_without_fp8(run, gold))


def check_completions(run: Run, questions: list[Question], means: Means) -> None:
    """The same for a step of RLVR. Where no completion went through the training pass, nothing is compared."""
    metrics = {"mismatch": 0.0, **means.reduce()}
    _check(run, metrics, lambda: completions_without_fp8(run, questions))


def _check(run: Run, metrics: dict[str, float], without_fp8: Callable[[], float]) -> None:
    """Raises StepFailed if what the step has measured is not as it must be.

    Args:
        without_fp8: mean |Δ log-probability| a token between training pass and sampler, both without FP8.
    """
    limit = LIMIT_BF16 if run.args.bf16 else LIMIT_FLOAT32
    problems = []
    if not math.isfinite(metrics["reward"]):
        problems.append(f"the mean reward is {metrics['reward']}, not finite: check the weights of --ebft-encoder-load "
                        "or --pretrained-checkpoint")
    if not math.isfinite(metrics["mismatch"]):
        problems.append("the policy's log-probabilities are not finite: check the weights of --pretrained-checkpoint "
                        "or --load")
    else:
        problems += _sampler_problems(run, metrics["mismatch"], limit, without_fp8)
    distance, limit = metrics.get("distance_to_start", 0.0), LIMIT_FP8 if run.args.fp8_format else limit
    if run.state.iteration == 0 and distance > limit:
        problems.append(f"the policy's log-probabilities differ from the starting policy's by {distance:.2e} a token "
                        f"before the first step (limit {limit:.0e})")
    if problems:
        raise StepFailed("first-step self-check failed; nothing was trained. " + "; ".join(problems))


def _sampler_problems(run: Run, mismatch: float, limit: float, without_fp8: Callable[[], float]) -> list[str]:
    """What is wrong between sampler and training pass, which differ by `mismatch` a token."""
    recipes = {flag: recipe for flag, recipe in fp8_recipes(run.args).items() if flag != "--ebft-encoder-fp8"}
    has_fp8 = bool(recipes)
    compared = without_fp8() if has_fp8 else mismatch
    if not compared <= limit:
        return [f"the sampler's log-probabilities differ from the training pass's by {compared:.2e} a token on "
                f"average{' without FP8' * has_fp8} (limit {limit:.0e}): rollouts are not on-policy"]
    if has_fp8 and mismatch > LIMIT_FP8:
        return [f"{' and '.join(map(' '.join, recipes.items()))}: changes log-probabilities by {mismatch:.2e} a token "
                f"on average (limit {LIMIT_FP8:g}), more than the correction can take back: use another recipe, or "
                "--first-last-layers-bf16"]
    return []


def mismatch_without_fp8(run: Run, gold: GoldBatch) -> float:
    """Mean |Δ log-probability| a token between training pass and sampler, for rollouts drawn without FP8."""
    config = run.config
    sampling = replace(config.sampling, fp8=FP8())
    rollouts = sample_rollouts(run.policy, gold, config.layout, sampling, run.state.iteration, config.rollout_rows)
    return mismatch(run, gold, rollouts)


def mismatch(run: Run, gold: GoldBatch, rollouts: Rollouts) -> float:
    """Mean |Δ log-probability| a token between a pass over packed rows and the sampler."""
    config, means = run.config, Means()
    scores = score(run.policy, gold, rollouts, config)
    valid = gold.valid_blocks(config.layout)[..., None, None]
    means.add_masked("mismatch", (scores.rollout_BKNG - rollouts.log_probs_BKNG).abs(), valid)
    return means.reduce().get("mismatch", 0.0)


def completions_without_fp8(run: Run, questions: list[Question]) -> float:
    """The same for the beginnings of completions of these questions."""
    config, means = run.rlvr.config, Means()
    generation = replace(config.generation, fp8=FP8(), max_new_tokens=min(LOOKED_AT, config.generation.max_new_tokens))
    completions = generate(run.policy, [question.prompt for question in questions], generation,
                           iteration=run.state.iteration)
    everything = torch.ones(len(questions), generation.num_samples)
    batch = completion_batch(questions, completions, everything, everything.bool(), config)
    scores_C = completion_scores(run.policy, batch, config)
    means.add_masked("mismatch", (scores_C - batch.sampled_C).abs(), torch.ones_like(scores_C, dtype=torch.bool))
    return means.reduce()["mismatch"]
