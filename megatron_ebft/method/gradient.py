"""The policy's training pass: log-probabilities, loss and gradient (METHOD: "Losses")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.micro_batches import GoldBatch, MicroBatch, MicroBatches
from megatron_ebft.method import losses
from megatron_ebft.method.batches import token_counts, training_rows
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.means import Means
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.attention import StridedPattern, as_mask
from megatron_ebft.model.log_probabilities import training_readout
from megatron_ebft.parallel.groups import from_last_stage
from megatron_ebft.rollout.sampler import Rollouts


@dataclass
class Scores:
    """Log-probabilities under one model, float32: of rollout tokens at the sampling temperature, of gold tokens at 1.
    """

    rollout_BKNG: Tensor
    """NaN where it was not read."""
    gold_BT: Tensor
    """[B, T−1]: of gold tokens 1..T−1."""
    is_scored_BKNG: Tensor
    """False where it was not read: after step 0 of rollouts left out, bool."""


@torch.no_grad()
def score(model, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig, needed_BKN: Tensor | None = None) -> Scores:
    """Log-probabilities of given rollouts and gold tokens under a model, forward only.

    Args:
        needed_BKN: bool; with `skip_duplicates`, other rollouts are left out. None: all are needed.
    """
    rows = training_rows(gold, rollouts, config, needed_BKN)
    collected = _Collected(rows)

    def forward_step(iterator, model):
        mb = next(iterator)

        def collect(sections):
            collected.add(mb, *_by_token(mb, sections))
            return sections[0].sum(), {}

        return _forward(model, mb, gold, rollouts, config), collect

    run_schedule(forward_step, rows, model, forward_only=True)
    return collected.scores()


def policy_gradient(policy: list, gold: GoldBatch, rollouts: Rollouts, advantage_BKN: Tensor, config: EBFTConfig,
                    means: Means, start_BKNG: Tensor | None = None) -> Scores:
    """Forward and backward of the loss (`Loss`) of given rollouts; gradients are left in the policy's buffers.

    Args:
        means: receives the parts of the loss, and the share of tokens that was left out, "training_tokens_saved".
        start_BKNG: log-probabilities of the rollout tokens under the start, needed for β ≠ 0.

    Returns:
        The policy's own scores, detached.
    """
    loss, valid_BK, gold_valid_BT = Loss(gold, config, means), gold.valid_blocks(config.layout), gold.gold_valid()
    needed_BKN = valid_BK[..., None].expand_as(advantage_BKN)  # rollouts that change the gradient
    if start_BKNG is None:
        needed_BKN = needed_BKN & (advantage_BKN != 0)
    rows = training_rows(gold, rollouts, config, needed_BKN)
    means.add("training_tokens_saved", *rows.saved_tokens())
    collected = _Collected(rows)

    def terms(mb: MicroBatch) -> LossTerms:
        blocks, is_real = upload(mb.row.blocks, valid_BK.device), upload(mb.row.is_real, valid_BK.device)

        def here(values):
            return None if values is None else values[mb.rows][:, blocks]

        return LossTerms(advantage_BKN=here(advantage_BKN), valid_BK=here(valid_BK) & is_real,
                         gold_valid_BT=gold_valid_BT[mb.rows] if mb.is_first_part else None,
                         sampled_BKNG=here(rollouts.log_probs_BKNG), start_BKNG=here(start_BKNG))

    def forward_step(iterator, model):
        mb = next(iterator)

        def loss_func(sections):
            log_probs, gold_log_probs = _by_token(mb, sections)
            collected.add(mb, log_probs, gold_log_probs)
            return loss(log_probs, gold_log_probs, terms(mb)), torch.zeros((), dtype=torch.int), {}

        return _forward(model, mb, gold, rollouts, config), loss_func

    run_schedule(forward_step, rows, policy, forward_only=False)
    return collected.scores()


@dataclass(kw_only=True)
class LossTerms:
    """What the loss of some rows and blocks needs besides log-probabilities."""

    advantage_BKN: Tensor
    valid_BK: Tensor
    """Blocks that count here, bool."""
    gold_valid_BT: Tensor | None
    """Gold tokens 1..T−1 that count here, bool [B, T−1]; None: none."""
    sampled_BKNG: Tensor | None
    """The sampler's log-probabilities; None: no importance weights."""
    start_BKNG: Tensor | None
    """The start's; None: no KL term. NaN where nothing counts."""


class Loss:
    """rl_coef·L_RL + γ·L_CE + β·KL of some rows and blocks, as their share of the global batch's.

    Both means are over the valid tokens of the global batch, known before the schedule starts: every micro-batch adds
    its share, and gradients are summed (not averaged) over micro-batches and data-parallel ranks.
    """

    def __init__(self, gold: GoldBatch, config: EBFTConfig, means: Means):
        """
        Args:
            gold: all rows of this rank.
            means: receives the parts of the loss.
        """
        self.config, self.means = config, means
        self.rollout_count, self.gold_count = token_counts(gold, config.layout).clamp(min=1)

    def __call__(self, log_probs_BKNG: Tensor, gold_log_probs_BT: Tensor, terms: LossTerms) -> Tensor:
        valid = terms.valid_BK[:, :, None]
        token_valid = valid[..., None].expand_as(log_probs_BKNG)
        loss = self._reinforce(log_probs_BKNG, terms, valid, token_valid)
        if terms.start_BKNG is not None:
            loss = loss + self._kl(log_probs_BKNG, terms.start_BKNG, token_valid)
        if terms.gold_valid_BT is not None:
            loss = loss + self._cross_entropy(gold_log_probs_BT, terms.gold_valid_BT)
        return loss

    def _reinforce(self, log_probs, terms: LossTerms, valid, token_valid) -> Tensor:
        weight = None
        if terms.sampled_BKNG is not None:
            weight = losses.importance_weight(log_probs, terms.sampled_BKNG, self.config.importance_cap)
        rl = losses.reinforce_loss(log_probs, terms.advantage_BKN, valid, weight)
        self.means.add("rl_loss", rl.detach(), token_valid.sum())
        return self.config.rl_coef * rl / self.rollout_count

    def _kl(self, log_probs, start, token_valid) -> Tensor:
        start = start.where(token_valid, log_probs.detach())
        kl = losses.kl_estimate(log_probs, start, self.config.kl_estimator).where(token_valid, 0.0).sum()
        self.means.add("kl_loss", kl.detach(), token_valid.sum())
        return self.config.kl_coef * kl / self.rollout_count

    def _cross_entropy(self, gold_log_probs, gold_valid) -> Tensor:
        ce = losses.cross_entropy(gold_log_probs, gold_valid)
        self.means.add("ce_loss", ce.detach(), gold_valid.sum())
        return self.config.ce_coef * ce / self.gold_count


def _forward(model, mb: MicroBatch, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig):
    readout = training_readout(mb.row, gold.tokens_BT[mb.rows], rollouts.tokens_BKNG[mb.rows],
                               config.sampling.temperature)
    return model(mb.tokens, mb.positions, as_mask(StridedPattern(mb.row, mb.document_BT)), readout=readout)


def _by_token(mb: MicroBatch, sections) -> tuple[Tensor, Tensor]:
    """From what the readout read: log-probabilities of rollout tokens [b, size, N, G] and of gold tokens [b, T−1]."""
    return mb.row.join_targets(*sections[1:]), sections[0].squeeze(-1).t()


class _Collected:
    """Log-probabilities of all micro-batches, on the last stage."""

    def __init__(self, rows: MicroBatches):
        self.rows = rows
        self.rollout_parts: list[Tensor] = []
        self.gold_parts: list[Tensor] = []

    def add(self, mb: MicroBatch, log_probs: Tensor, gold_log_probs: Tensor) -> None:
        self.rollout_parts.append(log_probs.detach())
        if mb.is_first_part:
            self.gold_parts.append(gold_log_probs.detach())

    def scores(self) -> Scores:
        """What the last stage collected, on every stage."""
        rows, gold = self.rows, self.rows.gold.tokens_BT
        if self.rollout_parts:
            rollout_BKNG, gold_BT = rows.join_blocks(self.rollout_parts).contiguous(), torch.cat(self.gold_parts)
        else:
            rollout_BKNG = torch.empty(rows.rollout_BKNG.shape, device=gold.device)
            gold_BT = torch.empty(len(gold), gold.shape[1] - 1, device=gold.device)
        rollout_BKNG, gold_BT = from_last_stage(rollout_BKNG), from_last_stage(gold_BT.contiguous())
        is_scored_BKNG = rows.is_here_BKN[..., None].expand(rollout_BKNG.shape).clone()
        is_scored_BKNG[..., 0] = True
        return Scores(rollout_BKNG.where(is_scored_BKNG, torch.nan), gold_BT, is_scored_BKNG)
