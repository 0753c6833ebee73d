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
    """Forward and backward of rl_coef·L_RL + γ·L_CE + β·KL; gradients are left in the policy's buffers.

    Both means are over the valid tokens of the global batch, known before the schedule starts: every micro-batch adds
    its share, and gradients are summed (not averaged) over micro-batches and data-parallel ranks.

    Args:
        means: receives the parts of the loss, and the share of tokens that was left out, "training_tokens_saved".
        start_BKNG: log-probabilities of the rollout tokens under the start, needed for β ≠ 0.

    Returns:
        The policy's own scores, detached.
    """
    loss = _Loss(gold, rollouts, advantage_BKN, config, means, start_BKNG)
    rows = training_rows(gold, rollouts, config, loss.needed_BKN())
    means.add("training_tokens_saved", *rows.saved_tokens())
    collected = _Collected(rows)

    def forward_step(iterator, model):
        mb = next(iterator)

        def loss_func(sections):
            log_probs, gold_log_probs = _by_token(mb, sections)
            collected.add(mb, log_probs, gold_log_probs)
            return loss(mb, log_probs, gold_log_probs), torch.zeros((), dtype=torch.int), {}

        return _forward(model, mb, gold, rollouts, config), loss_func

    run_schedule(forward_step, rows, policy, forward_only=False)
    return collected.scores()


class _Loss:
    """The loss of each micro-batch, as its share of the global batch's."""

    def __init__(self, gold: GoldBatch, rollouts: Rollouts, advantage_BKN: Tensor, config: EBFTConfig, means: Means,
                 start_BKNG: Tensor | None):
        self.rollouts, self.advantage_BKN, self.start_BKNG = rollouts, advantage_BKN, start_BKNG
        self.config, self.means = config, means
        self.valid_BK, self.gold_valid = gold.valid_blocks(config.layout), gold.gold_valid()
        self.rollout_count, self.gold_count = token_counts(gold, config.layout).clamp(min=1)

    def needed_BKN(self) -> Tensor:
        """Rollouts that change the gradient, bool."""
        needed_BKN = self.valid_BK[..., None].expand_as(self.advantage_BKN)
        return needed_BKN if self.start_BKNG is not None else needed_BKN & (self.advantage_BKN != 0)

    def __call__(self, mb: MicroBatch, log_probs: Tensor, gold_log_probs: Tensor) -> Tensor:
        """log_probs: [b, size, N, G] of rollout tokens; gold_log_probs: [b, T−1] of gold tokens."""
        blocks = upload(mb.row.blocks, self.valid_BK.device)
        is_real = upload(mb.row.is_real, blocks.device)
        valid = (self.valid_BK[mb.rows][:, blocks] & is_real)[:, :, None]
        token_valid = valid[..., None].expand_as(log_probs)
        loss = self._reinforce(mb, blocks, log_probs, valid, token_valid)
        if self.start_BKNG is not None:
            loss = loss + self._kl(mb, blocks, log_probs, token_valid)
        if mb.is_first_part:  # gold tokens are in every part of a row and count once
            loss = loss + self._cross_entropy(mb, gold_log_probs)
        return loss

    def _reinforce(self, mb, blocks, log_probs, valid, token_valid) -> Tensor:
        weight = None
        if self.rollouts.log_probs_BKNG is not None:
            sampled = self.rollouts.log_probs_BKNG[mb.rows][:, blocks]
            weight = losses.importance_weight(log_probs, sampled, self.config.importance_cap)
        rl = losses.reinforce_loss(log_probs, self.advantage_BKN[mb.rows][:, blocks], valid, weight)
        self.means.add("rl_loss", rl.detach(), token_valid.sum())
        return self.config.rl_coef * rl / self.rollout_count

    def _kl(self, mb, blocks, log_probs, token_valid) -> Tensor:
        # The start's may be NaN where nothing counts.
        start = self.start_BKNG[mb.rows][:, blocks].where(token_valid, log_probs.detach())
        kl = losses.kl_estimate(log_probs, start, self.config.kl_estimator).where(token_valid, 0.0).sum()
        self.means.add("kl_loss", kl.detach(), token_valid.sum())
        return self.config.kl_coef * kl / self.rollout_count

    def _cross_entropy(self, mb, gold_log_probs) -> Tensor:
        ce = losses.cross_entropy(gold_log_probs, self.gold_valid[mb.rows])
        self.means.add("ce_loss", ce.detach(), self.gold_valid[mb.rows].sum())
        return self.config.ce_coef * ce / self.gold_count


def _forward(model, mb: MicroBatch, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig):
    readout = training_readout(mb.row, gold.tokens_BT[mb.rows], rollouts.tokens_BKNG[mb.rows],
                               config.sampling.temperature)
    return model(mb.tokens, mb.positions, as_mask(StridedPattern(mb.row, mb.document_BT)), labels=readout)


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
