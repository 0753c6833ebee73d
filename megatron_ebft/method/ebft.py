"""One EBFT step: Algorithm 1 of the paper (METHOD: "Objective" to "Losses").

    rollouts     ŷ_1..ŷ_n ~ p_θ(·|c)                for every block, by the policy
    features     φ_c(ŷ_j), φ_c(y)                   by the frozen encoder
    rewards      2φ_jᵀφ_y − α·2/(n−1) Σ φ_jᵀφ_j'    after whitening
    advantages   leave-one-out baselines
    loss         rl_coef·L_RL + γ·L_CE + β·KL       forward and backward through Megatron's schedule
    step         Megatron's optimizer               (training.py)

Savings (`skip_duplicates`), with the same loss and gradient. Rollouts of a block that are identical token for token are
one rollout in the encoder's and in the policy's rows (micro_batches.py): features are read there for each of them, and
so are log-probabilities, whose gradients add up. Rollouts of blocks that do not count are in neither. Those whose
advantage is zero are not in the policy's, unless the KL term wants them. "Zero" means equal to 0, not nearly: identical rollouts are
given identical rewards, of which a baseline leaves exactly nothing (energy.py). Step 0 of a rollout is predicted by a
gold token, so its log-probability is always read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.micro_batches import GoldBatch, MicroBatch, MicroBatches
from megatron_ebft.layout.strided import StridedLayout, first_alike
from megatron_ebft.method import energy, losses
from megatron_ebft.method.features import FeatureMap, block_grams
from megatron_ebft.method.means import Means
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.attention import StridedPattern, as_mask
from megatron_ebft.model.fp8 import FP8, quantised
from megatron_ebft.model.log_probabilities import training_readout
from megatron_ebft.parallel.groups import (
    all_samples,
    dp_sum,
    from_first_tensor_rank,
    from_last_stage,
    sample_rank,
    sample_size,
)
from megatron_ebft.rollout.sampler import Rollouts, SamplingConfig


@dataclass
class EBFTConfig:
    """Everything about the method, and the three sizes that bound its memory."""

    layout: StridedLayout
    sampling: SamplingConfig
    feature_map: FeatureMap
    whitening: str
    advantage: str
    alignment_coef: float
    diversity_coef: float
    """α."""
    rl_coef: float
    ce_coef: float
    """γ."""
    kl_coef: float
    """β."""
    kl_estimator: str
    micro_batch_size: int
    blocks_per_microbatch: int
    """0: all."""
    rollout_rows: int
    """Rows that decode together; 0: all, or as many as keep the pipeline busy."""
    importance_cap: float
    """C, of the importance weights; 0: none."""
    encoder_fp8: FP8
    """What of the encoder runs in FP8, in training."""
    skip_duplicates: bool
    """See "Savings" above."""

    @property
    def num_samples(self) -> int:
        """n, rollouts of a block over all ranks; `layout` has this rank's n/S."""
        return self.layout.num_samples * sample_size()


@dataclass
class Rewards:
    """What the encoder says of each rollout; n is over all ranks of a sample group. With savings, rollouts of blocks
    that do not count have their reference's features."""

    gram: Tensor
    """float64 [B, K, n+1, n+1]."""
    alignment: Tensor
    """float32 [B, K, n]."""
    diversity: Tensor
    """float32 [B, K, n]."""
    advantage: Tensor
    """float32 [B, K, N], of this rank's N = n/S samples."""


@dataclass
class Scores:
    """Log-probabilities under one model: of rollout tokens at the sampling temperature, of gold tokens at 1."""

    rollout_BKNG: Tensor
    """NaN where it was not read."""
    gold_BT: Tensor
    """[B, T−1]: of gold tokens 1..T−1."""
    is_scored_BKNG: Tensor
    """False where it was not read: after step 0 of rollouts left out, bool."""


def encoder_rows(gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig, needed_BKN: Tensor) -> MicroBatches:
    """Rows of T gold tokens and all G of each rollout; with savings, of those needed (bool)."""
    return MicroBatches(gold, rollouts.tokens_BKNG, config.layout, config.layout.rollout_length,
                        config.micro_batch_size, config.blocks_per_microbatch,
                        needed_BKN if config.skip_duplicates else None)


def compute_rewards(encoder, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
                    means: Means | None = None) -> Rewards:
    """Features of all rollouts and completions, and from them rewards and advantages.

    Args:
        means: receives the share of the encoder's tokens that was saved.
    """
    tokens_BKNG, length = rollouts.tokens_BKNG, config.layout.rollout_length
    needed_BKN = gold.valid_blocks(config.layout)[..., None].expand(tokens_BKNG.shape[:3])
    rows = encoder_rows(gold, rollouts, config, needed_BKN)
    if means is not None:
        means.add("encoder_tokens_saved", *rows.saved_tokens())
    with torch.no_grad(), quantised([encoder], config.encoder_fp8):
        gram = block_grams(encoder, config.feature_map, rows, [length])[:, :, 0]
    alignment, diversity = energy.rewards(gram, config.whitening)
    if config.skip_duplicates:  # rounding may differ between them: on two sample ranks, or by whitening
        first_BKn = first_alike(all_samples(tokens_BKNG))
        alignment, diversity = alignment.gather(-1, first_BKn), diversity.gather(-1, first_BKn)
    advantage = energy.advantages(alignment, diversity, config.advantage, config.alignment_coef, config.diversity_coef)
    advantage = advantage.chunk(sample_size(), dim=-1)[sample_rank()].float().contiguous()
    # Whitening cuts at a threshold: ranks that share a model must not end on two sides of it by the last bit.
    advantage = from_last_stage(from_first_tensor_rank(advantage))
    return Rewards(gram, alignment.float(), diversity.float(), advantage)


def token_counts(gold: GoldBatch, layout: StridedLayout) -> Tensor:
    """Valid rollout tokens and valid gold tokens of the GLOBAL batch, [2]: the denominators of the two means.

    Ranks of a sample group all count their gold tokens, and all add their share of the cross entropy of these.
    """
    rollout_tokens = gold.valid_blocks(layout).sum() * layout.num_samples * layout.rollout_length
    return dp_sum(torch.stack([rollout_tokens, gold.gold_valid().sum()]).float())


def training_rows(gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
                  needed_BKN: Tensor | None = None) -> MicroBatches:
    """Rows of T gold tokens and G − 1 of each rollout, whose last token predicts nothing; with savings, of those needed
    (bool; None: all)."""
    return MicroBatches(gold, rollouts.tokens_BKNG, config.layout, config.layout.rollout_length - 1,
                        config.micro_batch_size, config.blocks_per_microbatch,
                        needed_BKN if config.skip_duplicates else None)


def _forward(model, mb: MicroBatch, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig):
    readout = training_readout(mb.row, gold.tokens_BT[mb.rows], rollouts.tokens_BKNG[mb.rows],
                               config.sampling.temperature)
    return model(mb.tokens, mb.positions, as_mask(StridedPattern(mb.row, mb.document_BT)), readout=readout)


@torch.no_grad()
def score(model, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig,
          needed_BKN: Tensor | None = None) -> Scores:
    """Log-probabilities of given rollouts and gold tokens under a model, forward only.

    Args:
        needed_BKN: rollouts that are wanted, bool; with savings, others are left out. None: all.
    """
    rows, found, found_gold = training_rows(gold, rollouts, config, needed_BKN), [], []

    def forward_step(iterator, model):
        mb = next(iterator)

        def collect(sections):
            found.append(mb.row.join_targets(*sections[1:]))
            if mb.is_first_part:
                found_gold.append(sections[0].squeeze(-1).t())
            return sections[0].sum(), {}

        return _forward(model, mb, gold, rollouts, config), collect

    run_schedule(forward_step, rows, model, forward_only=True)
    return _scores(rows, found, found_gold)


def policy_gradient(policy: list, gold: GoldBatch, rollouts: Rollouts, advantage_BKN: Tensor, config: EBFTConfig,
                    means: Means, reference_BKNG: Tensor | None = None) -> Scores:
    """Forward and backward of rl_coef·L_RL + γ·L_CE + β·KL; gradients are left in the policy's buffers.

    Both means are over the valid tokens of the global batch, known before the schedule starts: every micro-batch adds
    its share, and gradients are summed (not averaged) over micro-batches and data-parallel ranks.

    Args:
        means: receives the parts of the loss, and the share of tokens that was saved.
        reference_BKNG: `score` of the frozen starting policy, needed for β ≠ 0.

    Returns:
        The policy's own scores, detached.
    """
    valid_BK, gold_valid = gold.valid_blocks(config.layout), gold.gold_valid()
    needed_BKN = valid_BK[..., None].expand_as(advantage_BKN)
    if reference_BKNG is None:
        needed_BKN = needed_BKN & (advantage_BKN != 0)
    rows, found, found_gold = training_rows(gold, rollouts, config, needed_BKN), [], []
    means.add("training_tokens_saved", *rows.saved_tokens())
    rollout_count, gold_count = token_counts(gold, config.layout).clamp(min=1)

    def forward_step(iterator, model):
        mb = next(iterator)
        blocks = upload(mb.row.blocks, valid_BK.device)

        def loss_func(sections):
            log_probs = mb.row.join_targets(*sections[1:])
            valid = (valid_BK[mb.rows][:, blocks] & upload(mb.row.is_real, blocks.device))[:, :, None]
            weight = None
            if rollouts.log_probs_BKNG is not None:
                sampled = rollouts.log_probs_BKNG[mb.rows][:, blocks]
                weight = losses.importance_weight(log_probs, sampled, config.importance_cap)
            rl = losses.reinforce_loss(log_probs, advantage_BKN[mb.rows][:, blocks], valid, weight)
            loss = config.rl_coef * rl / rollout_count
            token_valid = valid[..., None].expand_as(log_probs)
            means.add("rl_loss", rl.detach(), token_valid.sum())
            if reference_BKNG is not None:
                base = reference_BKNG[mb.rows][:, blocks].where(token_valid, log_probs.detach())  # else it may be NaN
                kl = losses.kl_estimate(log_probs, base, config.kl_estimator).where(token_valid, 0.0).sum()
                loss = loss + config.kl_coef * kl / rollout_count
                means.add("kl_loss", kl.detach(), token_valid.sum())
            gold_log_probs = sections[0].squeeze(-1).t()
            if mb.is_first_part:
                ce = losses.cross_entropy(gold_log_probs, gold_valid[mb.rows])
                loss = loss + config.ce_coef * ce / gold_count
                means.add("ce_loss", ce.detach(), gold_valid[mb.rows].sum())
                found_gold.append(gold_log_probs.detach())
            found.append(log_probs.detach())
            return loss, torch.zeros((), dtype=torch.int), {}

        return _forward(model, mb, gold, rollouts, config), loss_func

    run_schedule(forward_step, rows, policy, forward_only=False)
    return _scores(rows, found, found_gold)


def _scores(rows: MicroBatches, found: list[Tensor], found_gold: list[Tensor]) -> Scores:
    """What the last stage found, on every stage."""
    gold = rows.gold.tokens_BT
    if found:
        rollout_BKNG, gold_BT = rows.join_blocks(found).contiguous(), torch.cat(found_gold)
    else:
        rollout_BKNG = torch.empty(rows.rollout_BKNG.shape, device=gold.device)
        gold_BT = torch.empty(len(gold), gold.shape[1] - 1, device=gold.device)
    rollout_BKNG, gold_BT = from_last_stage(rollout_BKNG), from_last_stage(gold_BT.contiguous())
    is_scored_BKNG = rows.is_here_BKN[..., None].expand(rollout_BKNG.shape).clone()
    is_scored_BKNG[..., 0] = True
    return Scores(rollout_BKNG.where(is_scored_BKNG, torch.nan), gold_BT, is_scored_BKNG)
