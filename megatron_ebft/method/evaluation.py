"""Evaluation on held-out rows: cross entropy, CFM as a function of completion length, alignment, KL to the start.

Every evaluation uses the same rows and random numbers, temperature 1 and no whitening, so that two evaluations differ
by the policy alone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method import energy
from megatron_ebft.method.batches import encoder_rows
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.diagnostics import measure_positions
from megatron_ebft.method.features import block_grams
from megatron_ebft.method.gradient import score
from megatron_ebft.method.losses import kl_estimate
from megatron_ebft.method.means import Means
from megatron_ebft.method.sft import cross_entropy_pass
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.parallel.groups import pp_group, sample_rank, sample_size
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts
from megatron_ebft.rollout.schedule import row_groups

EVALUATION_ITERATION = -1
"""Names evaluation in the sampler's random numbers, where training has its iteration."""


@dataclass
class EvaluationRollouts:
    """Rollouts of one batch of evaluation rows, for showing."""

    gold: GoldBatch
    layout: StridedLayout
    rollouts: Rollouts
    reward_BKN: Tensor
    """Rewards of their first G tokens, without whitening."""
    valid_BK: Tensor
    """Blocks that count at G tokens, bool."""


def evaluation_config(config: EBFTConfig, longest: int, rows: int) -> tuple[EBFTConfig, list[int]]:
    """The configuration evaluation rolls out with, and the completion lengths it measures: 1, 2, 4, …, and G.

    Rollouts have the longest of these lengths and blocks are that far apart. A micro-batch holds no more rollout tokens
    than in training (but one block at least), and no more are decoded together. Lengths that leave no room for a block
    are skipped.

    Args:
        rows: of a batch on this rank.
    """
    training = config.layout
    longest = max(min(longest, training.seq_length - training.context_length), training.rollout_length)
    lengths = sorted({training.rollout_length, *(2**i for i in range(longest.bit_length()))})
    layout = replace(training, rollout_length=lengths[-1], stride=max(training.stride, lengths[-1]))
    sampling = replace(config.sampling, temperature=1.0, top_p=1.0, top_k=0, fp8=FP8())
    blocks = (config.blocks_per_microbatch or training.num_blocks) * training.rollout_length // layout.rollout_length
    decoded = config.rollout_rows
    if cached_tokens(layout) > cached_tokens(training):
        groups = row_groups(rows, dist.get_world_size(pp_group()), config.rollout_rows)
        decoded = max(1, (groups[0].stop - groups[0].start) * cached_tokens(training) // cached_tokens(layout))
    return replace(config, layout=layout, sampling=sampling, blocks_per_microbatch=max(1, blocks),
                   rollout_rows=decoded), lengths


def cached_tokens(layout: StridedLayout) -> int:
    """Tokens of a row whose keys and values are cached while it decodes."""
    return layout.seq_length + layout.num_blocks * layout.num_samples * (layout.rollout_length - 1)


def evaluate(policy: list, encoder, start, batches: Iterable[GoldBatch], config: EBFTConfig | None,
             longest: int, micro_batch_size: int) -> tuple[dict[str, float], EvaluationRollouts | None]:
    """All evaluation metrics over `batches`, the same on every rank. Metrics without a valid completion are absent.

    Args:
        encoder: None in plain next-token training without one: cross entropy only.
        start: frozen starting policy; None: its KL is not measured.
        config: the method's configuration; needed with an encoder.
        longest: completions are measured up to this many tokens.
    """
    means, shown = Means(), None
    was_training = policy[0].training
    for chunk in policy:
        chunk.eval()
    with torch.no_grad():
        for gold in batches:
            cross_entropy_pass(policy, gold, micro_batch_size, means, forward_only=True)
            if encoder is not None:
                measured = _measure_rollouts(policy, encoder, start, gold, config, longest, means)
                shown = shown or measured
    for chunk in policy:
        chunk.train(was_training)
    metrics = means.reduce()
    if "ce_loss" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["ce_loss"], 700))
    return metrics, shown


def _measure_rollouts(policy, encoder, start, gold, config, longest, means) -> EvaluationRollouts:
    training_length = config.layout.rollout_length
    config, lengths = evaluation_config(config, longest, len(gold.tokens_BT))
    layout = config.layout
    rollouts = sample_rollouts(policy, gold, layout, config.sampling, EVALUATION_ITERATION, config.rollout_rows)
    valid_BKNG = _valid_tokens(gold, layout)
    needed_BKN = valid_BKNG[..., 0].expand(rollouts.tokens_BKNG.shape[:3])
    rows = encoder_rows(gold, rollouts, config, needed_BKN)
    gram_BKLMM = block_grams(encoder, config.feature_map, rows, lengths)
    biased, unbiased = energy.cfm(gram_BKLMM)
    alignment, diversity = energy.rewards(gram_BKLMM, "none")
    for i, length in enumerate(lengths):
        valid_BK = gold.valid_blocks(replace(layout, rollout_length=length))[:, : layout.num_blocks]
        if config.num_samples > 1:
            means.add_masked(f"cfm_length/{length:02d}", unbiased[:, :, i], valid_BK)
            if length == training_length:
                measure_positions(unbiased[:, :, i], valid_BK, layout, means)
        means.add_masked(f"cfm_biased_length/{length:02d}", biased[:, :, i], valid_BK)
        means.add_masked(f"alignment_length/{length:02d}", alignment[:, :, i].mean(-1), valid_BK)
    means.add_masked("entropy", rollouts.entropy_BKNG, valid_BKNG)
    if start is not None:
        start_BKNG = score(start, gold, rollouts, config, needed_BKN).rollout_BKNG
        # The sampler's log-probabilities are the policy's own; k3 has the lowest variance.
        means.add_masked("kl_to_start", kl_estimate(rollouts.log_probs_BKNG, start_BKNG, "k3"), valid_BKNG)
    reward_BKLn = config.alignment_coef * alignment - config.diversity_coef * diversity
    reward_BKN = reward_BKLn[:, :, lengths.index(training_length)].chunk(sample_size(), dim=-1)[sample_rank()]
    valid_BK = gold.valid_blocks(replace(layout, rollout_length=training_length))[:, : layout.num_blocks]
    return EvaluationRollouts(gold, layout, rollouts, reward_BKN, valid_BK)


def _valid_tokens(gold: GoldBatch, layout: StridedLayout) -> Tensor:
    """Rollout tokens up to which the gold completion is valid, bool [B, K, 1, G]."""
    upto = [gold.valid_blocks(replace(layout, rollout_length=length))[:, : layout.num_blocks]
            for length in range(1, layout.rollout_length + 1)]
    return torch.stack(upto, dim=-1)[:, :, None]
