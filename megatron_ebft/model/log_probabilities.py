"""The readout that computes log-probabilities of given tokens. (The one that samples is in token_sampling.py.)

1. Logits of the whole vocabulary are never gathered over tensor ranks: maxima, sums and target logits are reduced.
2. Several targets, at different temperatures, can be read from one row of logits: the gold token before an anchor
   predicts its successor at τ = 1, and the first token of n rollouts at the sampling temperature. The backward pass
   fills one gradient buffer for all of them. It recomputes the softmax from the logits, so no other tensor of their
   size is kept.
3. On a GPU, one kernel reads the logits for the normalisers and one writes the gradient, in the dtype of the logits.
   Elsewhere a few rows at a time are converted to float32.
4. A vocabulary shard may have columns of padding, or no others. They are not read, and get a gradient of 0. Writing
   −inf into them instead would make the backward pass copy the whole gradient.

Suffixes: S row length, B rows, V vocabulary shard, P rows of logits that are read, M targets of each.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import temporary_elements, upload
from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.model import kernels


@dataclass
class Section:
    """Rows of the logits and the tokens they predict."""

    rows: Tensor | slice
    """Indices along S, int64 [P], or a slice."""
    targets_PBM: Tensor
    """Token ids, int64."""
    temperature: float
    log_sum_PB: Tensor | None = None
    """log Σ exp(logits / temperature), where it is known."""


@dataclass
class LogProbs:
    """Readout: log-probabilities of the targets of each section, float32 [P, B, M] (float64 stays), differentiable.

    Sections given by slices must not overlap. Those given by indices may share rows with them.
    """

    sections: list[Section]

    def __call__(self, hidden_SBH: Tensor, model) -> tuple[Tensor, ...]:
        return log_probs(model.head(hidden_SBH), self.sections, model)


def log_probs(logits_SBV: Tensor, sections: list[Section], model) -> tuple[Tensor, ...]:
    """What `LogProbs` returns, from the logits of all S rows of this rank's vocabulary shard."""
    return _VocabParallelLogProbs.apply(logits_SBV, model.num_real_ids, model.pg_collection.tp, sections)


def gold_section(gold_BT: Tensor, temperature: float = 1.0) -> Section:
    """Tokens 1..T−1 of plain rows, each predicted by the token before it."""
    return Section(slice(0, gold_BT.shape[1] - 1), gold_BT[:, 1:].t()[:, :, None], temperature)


def training_readout(row: RowLayout, gold_BT: Tensor, rollout_BKNG: Tensor, temperature: float) -> LogProbs:
    """Log-probabilities of a packed training row: gold tokens, then step 0 and steps 1..G−1 of its rollouts.

    Args:
        rollout_BKNG: rollouts of ALL blocks.
    """
    first_KBN, later_RB1 = row.split_targets(rollout_BKNG)
    return LogProbs([gold_section(gold_BT),
                     Section(upload(row.anchor_predictors()), first_KBN, temperature),
                     Section(slice(row.layout.seq_length, row.end), later_RB1, temperature)])


def local_targets(targets: Tensor, vocab_shard: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Targets as indices into this rank's vocabulary shard (0 if in another one), and whether they are in it."""
    local = targets - dist.get_rank(group) * vocab_shard
    here = (local >= 0) & (local < vocab_shard)
    return local.where(here, 0), here


def log_sum_exp(logits: Tensor, real: int, temperature: float, group: dist.ProcessGroup) -> Tensor:
    """log Σ exp(logits / temperature) over the vocabulary, float32 (float64 stays): [...] from [..., V].

    Args:
        logits: of this rank's vocabulary shard.
        real: number of its columns that are token ids.
        group: the tensor ranks, over which it is summed up.
    """
    local = _local_log_sum_exp(logits, real, temperature)
    if dist.get_world_size(group) == 1:
        return local
    top = local.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (local - top).exp()
    dist.all_reduce(total, group=group)
    return total.log() + top


@kernels.compiled
def _local_log_sum_exp(logits: Tensor, real: int, temperature: float) -> Tensor:
    return scaled(logits[..., :real], temperature).logsumexp(-1)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SBV: Tensor, real: int, group: dist.ProcessGroup, sections: list[Section]):
        ctx.real, ctx.group, ctx.sections = real, group, sections
        outputs, normalisers = [], []
        for section in sections:
            if section.log_sum_PB is not None:
                lse = section.log_sum_PB
                values = _target_logits(logits_SBV[section.rows], section.targets_PBM, section.temperature,
                                        group) - lse[..., None]
            else:
                parts = [_log_probs(logits_SBV[rows], real, targets, section.temperature, group)
                         for rows, targets in _chunks(section, logits_SBV)]
                values, lse = (torch.cat(x) for x in zip(*parts)) if parts else _nothing(section, logits_SBV)
            outputs.append(values)
            normalisers.append(lse)
        ctx.save_for_backward(logits_SBV, *normalisers)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        logits_SBV, *normalisers = ctx.saved_tensors
        grad_SBV = torch.empty_like(logits_SBV)
        covered = torch.zeros(len(logits_SBV), dtype=torch.bool)
        write = _write_gradient if kernels.available().no_compiler else _write_gradient_in_one
        sections = zip(ctx.sections, normalisers, grads, strict=True)
        slices_first = sorted(sections, key=lambda x: not isinstance(x[0].rows, slice))
        for section, lse, grad in slices_first:
            done = 0
            for rows, targets in _chunks(section, logits_SBV):
                here = slice(done, done + len(targets))
                done = here.stop
                is_slice = isinstance(rows, slice)
                out = grad_SBV[rows] if is_slice else torch.empty_like(logits_SBV[: len(rows)])
                local, is_local = local_targets(targets, logits_SBV.shape[-1], ctx.group)
                grad_PBM = grad[here] if section.temperature == 1 else grad[here] / section.temperature
                write(out, logits_SBV[rows], ctx.real, local, is_local, lse[here], grad_PBM, section.temperature)
                if is_slice:
                    covered[rows] = True
                else:
                    _zero_rows(grad_SBV, covered)
                    grad_SBV.index_add_(0, rows, out)
        _zero_rows(grad_SBV, covered)
        return grad_SBV, None, None, None


def _zero_rows(grad_SBV: Tensor, covered: Tensor) -> None:
    """Set the rows that are not yet written to zero."""
    if not covered.all():
        grad_SBV.index_fill_(0, upload((~covered).nonzero().squeeze(1), grad_SBV.device), 0)
        covered.fill_(True)


def _chunks(section: Section, logits_SBV: Tensor):
    """Rows and targets of a section, at most `temporary_elements` logits at a time."""
    count = len(section.targets_PBM)
    size = max(1, temporary_elements() // logits_SBV[0].numel())
    for first in range(0, count, size):
        last = min(first + size, count)
        if isinstance(section.rows, slice):
            rows = slice(section.rows.start + first, section.rows.start + last)
        else:
            rows = section.rows[first:last]
        yield rows, section.targets_PBM[first:last]


def _nothing(section: Section, logits_SBV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and normalisers of a section without rows."""
    dtype = torch.promote_types(logits_SBV.dtype, torch.float32)
    return (logits_SBV.new_zeros(section.targets_PBM.shape, dtype=dtype),
            logits_SBV.new_zeros(section.targets_PBM.shape[:2], dtype=dtype))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 (float64 stays); maybe the given tensor itself."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return x if temperature == 1 else x / temperature


def _log_probs(logits_PBV: Tensor, real: int, targets_PBM: Tensor, temperature: float,
               group) -> tuple[Tensor, Tensor]:
    """Log-probabilities [P, B, M] and normalisers [P, B]."""
    lse = log_sum_exp(logits_PBV, real, temperature, group)
    return _target_logits(logits_PBV, targets_PBM, temperature, group) - lse[..., None], lse


def _target_logits(logits_PBV: Tensor, targets_PBM: Tensor, temperature: float, group) -> Tensor:
    """Logits of the targets, divided by the temperature, [P, B, M]."""
    local, here = local_targets(targets_PBM, logits_PBV.shape[-1], group)
    target = scaled(logits_PBV.gather(-1, local), temperature).where(here, 0.0)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(target, group=group)
    return target


def _write_gradient(out_PBV, logits_PBV, real: int, local_PBM, is_local_PBM, lse_PB, grad_PBM,
                    temperature: float) -> None:
    """Writes the gradient (onehot(target) − softmax) · grad, summed over the targets of a row; 0 on padding."""
    x = scaled(logits_PBV, temperature)
    softmax = torch.sub(x, lse_PB[..., None], out=out_PBV if out_PBV.dtype == x.dtype else None).exp_()
    softmax[..., real:] = 0
    softmax *= -grad_PBM.sum(-1, keepdim=True)
    softmax.scatter_add_(-1, local_PBM, grad_PBM * is_local_PBM)
    if softmax is not out_PBV:
        out_PBV.copy_(softmax)


@kernels.compiled
def _write_gradient_in_one(out_PBV, logits_PBV, real: int, local_PBM, is_local_PBM, lse_PB, grad_PBM,
                           temperature: float) -> None:
    """The same as one kernel, which writes each number once and needs no atomic additions."""
    column_V = torch.arange(logits_PBV.shape[-1], device=logits_PBV.device)
    softmax = (scaled(logits_PBV, temperature) - lse_PB[..., None]).exp()
    gradient = softmax.where(column_V < real, 0.0) * -grad_PBM.sum(-1, keepdim=True)
    for local_PB1, is_local_PB1, grad_PB1 in zip(*(x.split(1, -1) for x in (local_PBM, is_local_PBM, grad_PBM))):
        gradient = gradient + grad_PB1.where((column_V == local_PB1) & is_local_PB1, 0.0)
    out_PBV.copy_(gradient)
