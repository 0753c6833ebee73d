"""What is read out of the final hidden states: log-probabilities of given tokens, or logits of chosen rows.

1. The output head runs only on the rows that are read, and full-vocabulary logits are never gathered over tensor
   ranks: maxima, sums and target logits are reduced instead.
2. Several targets, at different temperatures, can be read from one row (a gold token before an anchor predicts its
   successor at τ = 1 and the first token of n rollouts at the sampling temperature); the backward pass fills one
   gradient buffer for all of them. It recomputes the softmax from the logits, so nothing else of their size is kept.

Suffixes: S row length, B rows, V vocabulary shard, P rows read, M targets per row.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.layout import RowLayout


@dataclass
class Section:
    """Rows of the logits and the tokens they predict."""

    rows: Tensor | slice
    """Row indices, int64 [P], or a slice."""
    targets_PBM: Tensor
    """Token ids, int64."""
    temperature: float


@dataclass
class LogProbs:
    """Readout: log-probabilities of each section's targets, a list of float32 [P, B, M], differentiable."""

    sections: list[Section]

    def __call__(self, hidden_SBH: Tensor, head, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        return _VocabParallelLogProbs.apply(head(hidden_SBH), group, self.sections)


@dataclass
class Logits:
    """Readout: logits of the given rows (all: None), [P, B, V], of this rank's vocabulary shard."""

    rows: Tensor | None

    def __call__(self, hidden_SBH: Tensor, head, group: dist.ProcessGroup) -> Tensor:
        return head(hidden_SBH if self.rows is None else hidden_SBH[self.rows])


def gold_section(gold_BT: Tensor) -> Section:
    """Gold tokens 1..T−1, each predicted by the one before it, at temperature 1."""
    return Section(slice(0, gold_BT.shape[1] - 1), gold_BT[:, 1:].t()[:, :, None], 1.0)


def training_readout(row: RowLayout, gold_BT: Tensor, rollout_BKNG: Tensor, temperature: float) -> LogProbs:
    """Log-probabilities of a packed training row: gold tokens, then step 0 and steps 1..G−1 of its rollouts.

    Args:
        rollout_BKNG: rollouts of ALL blocks.
    """
    blocks = row.blocks.to(rollout_BKNG.device)
    here = rollout_BKNG[:, blocks]
    first_KBN = here[..., 0].transpose(0, 1)
    later_RB1 = here[..., 1:].flatten(1).t()[:, :, None]
    return LogProbs([gold_section(gold_BT),
                     Section(row.anchor_predictors().to(gold_BT.device), first_KBN, temperature),
                     Section(slice(row.layout.seq_length, row.length), later_RB1, temperature)])


def rollout_log_probs(row: RowLayout, first_KBN: Tensor, later_RB1: Tensor) -> Tensor:
    """The two rollout sections of `training_readout` as [B, K, N, G]."""
    later = later_RB1.squeeze(-1).t().reshape(later_RB1.shape[1], row.size, row.layout.num_samples, row.steps)
    return torch.cat([first_KBN.transpose(0, 1)[..., None], later], dim=-1)


def local_targets(targets: Tensor, vocab_shard: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Targets as indices into this rank's vocabulary shard (0 where elsewhere), and which are here."""
    local = targets - dist.get_rank(group) * vocab_shard
    here = (local >= 0) & (local < vocab_shard)
    return local.where(here, 0), here


def log_sum_exp(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log Σ exp over the last dimension and the vocabulary shards of `group`; x float, result without that dimension."""
    local = x.logsumexp(-1)
    if dist.get_world_size(group) == 1:
        return local
    top = local.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (local - top).exp()
    dist.all_reduce(total, group=group)
    return total.log() + top


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SBV: Tensor, group: dist.ProcessGroup, sections: list[Section]):
        ctx.group, ctx.sections = group, sections
        normalisers, outputs = [], []
        for section in sections:
            x = _scaled(logits_SBV, section)
            lse = log_sum_exp(x, group)
            local, here = local_targets(section.targets_PBM, x.shape[-1], group)
            target = x.gather(-1, local).where(here, 0.0)
            if dist.get_world_size(group) > 1:
                dist.all_reduce(target, group=group)
            normalisers.append(lse)
            outputs.append(target - lse[..., None])
        ctx.save_for_backward(logits_SBV, *normalisers)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        logits_SBV, *normalisers = ctx.saved_tensors
        grad_SBV = torch.zeros_like(logits_SBV)
        for section, lse, grad in zip(ctx.sections, normalisers, grads):
            grad = grad / section.temperature
            softmax = _scaled(logits_SBV, section).sub_(lse[..., None]).exp_()
            softmax *= -grad.sum(-1, keepdim=True)
            local, here = local_targets(section.targets_PBM, softmax.shape[-1], ctx.group)
            softmax.scatter_add_(-1, local, grad * here)
            if isinstance(section.rows, slice):
                grad_SBV[section.rows] += softmax
            else:
                grad_SBV.index_add_(0, section.rows, softmax.to(grad_SBV.dtype))
        return grad_SBV, None, None


def _scaled(logits_SBV: Tensor, section: Section) -> Tensor:
    """A fresh copy of the section's logits over its temperature, in float32 (float64 stays)."""
    x = logits_SBV[section.rows]
    return x.to(torch.promote_types(x.dtype, torch.float32)) / section.temperature
