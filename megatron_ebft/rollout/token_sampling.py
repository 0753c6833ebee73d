"""Sampling of tokens from vocabulary-parallel logits, reproducible whatever the batch split.

1. A token is drawn by inverting the distribution function at one uniform number, which is a hash of
   (seed, iteration, document, block, sample, step): no generator state, no dependence on who computes it.
2. The readout `Draws` samples inside the model, a chunk of rows at a time, so that logits never leave it and stay in
   the model's dtype.
3. Without filters, a draw needs one pass over the logits. It reduces every segment of SEGMENT ids to three sums
   (`segment_sums`, on a GPU one compiled kernel), which give the normaliser, the entropy and the mass of each segment.
   The draw chooses a rank's shard, then a segment, and reads only that segment's tokens again.
4. Top-k and top-p keep the tokens above a threshold per row. The threshold is found by radix selection on the bits of
   the probabilities, a byte a round: four small histograms are summed over the vocabulary's ranks, with no sort and no
   gathered logits. Equal probabilities are kept or dropped together. Masses are integers, so that no sum depends on
   the order of ranks or of a GPU's atomic additions.

Suffixes: B rows of the batch, P rows read of each, R = B·P, V vocabulary shard, S segments, M draws per row; L rows of
logits where several draws may read the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import temporary_elements
from megatron_ebft.common.hashing import GOLDEN, mix64
from megatron_ebft.model import kernels
from megatron_ebft.model.log_probabilities import log_sum_exp, scaled

SEGMENT = 1024
"""Ids that the first pass sums together: as many as one GPU thread block holds in registers."""
PART = 32
"""Ids of a segment that a CPU adds up together before it looks at them one by one."""
HEAD_ROWS = 256
"""Fewest rows that the output head takes at once. With fewer, reading its weight costs more than multiplying."""
LOWEST = -1e30
"""Maximum of a segment without any mass, where −inf would give NaN."""


@dataclass
class Draws:
    """Readout that draws tokens after the given rows. Returns tokens and log-probabilities [B, P, M] and entropies
    [B, P], as `sample` does, without gradient."""

    rows: Tensor | slice
    numbers_BPM: Tensor
    """Uniform in [0, 1), float64: M draws after each row."""
    temperature: float
    top_p: float
    top_k: int

    def __call__(self, hidden_SBH: Tensor, model) -> tuple[Tensor, Tensor, Tensor]:
        hidden_BPH = model.select_rows(hidden_SBH, self.rows).transpose(0, 1)
        hidden_RH, numbers_RM = hidden_BPH.flatten(0, 1), self.numbers_BPM.flatten(0, 1)
        size = max(HEAD_ROWS, temporary_elements() // model.vocab_shard)
        parts = [sample(model.row_logits(hidden_RH[i : i + size]), model.num_real_ids, numbers_RM[i : i + size],
                        self.temperature, self.top_p, self.top_k, model.pg_collection.tp)
                 for i in range(0, len(hidden_RH), size)]
        return tuple(torch.cat(x).unflatten(0, hidden_BPH.shape[:2]) for x in zip(*parts))

    def from_logits(self, logits_SBV: Tensor, model,
                    source_BP: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same draws, from logits of all S rows; and the normalisers log Σ exp(logits / temperature), [B, P].

        Args:
            source_BP: where several of the P draws read one of the given rows, which of them each reads, int64. None:
                each reads its own.
        """
        logits_LBV, source_R = logits_SBV.detach()[self.rows], None
        if source_BP is not None:
            batch = logits_LBV.shape[1]
            source_R = (source_BP.t() * batch + torch.arange(batch, device=source_BP.device)).flatten()
        numbers_PBM = self.numbers_BPM.transpose(0, 1)
        drawn = draw(logits_LBV.flatten(0, 1), model.num_real_ids, numbers_PBM.flatten(0, 1), self.temperature,
                     self.top_p, self.top_k, model.pg_collection.tp, source_R)
        return tuple(x.unflatten(0, numbers_PBM.shape[:2]).transpose(0, 1) for x in drawn)


def uniform(seed: int, iteration: int, document: Tensor, block: Tensor | int, sample: Tensor,
            step: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), float64, of the broadcast shape of document, block, sample and step (int64)."""
    state = torch.zeros((), dtype=torch.int64, device=document.device)
    for part in (seed, iteration, document, block, sample, step):
        state = mix64(state + part + GOLDEN)
    return ((state >> 11) & (1 << 53) - 1).double() * 2.0**-53


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _over_ranks(x.sum(-1, keepdim=True), group)


def _over_ranks(x: Tensor, group: dist.ProcessGroup, op=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or `op`) over the vocabulary's ranks, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


def filter_probabilities(p: Tensor, top_p: float, top_k: int, group: dist.ProcessGroup) -> Tensor:
    """Probabilities with all but the most likely tokens set to 0, not renormalised.

    Kept: the `top_k` most likely tokens (0: all), and of these the fewest whose share of their mass reaches `top_p`
    (1: all); ties are kept. p: float32 [..., V], this rank's shard of a distribution, whose mass counts in units of
    2 ** -52.
    """
    if top_k > 0:
        p = _keep_most_likely(p, (p > 0).long(), top_k, group)
    if top_p < 1:
        mass = (p * 2.0**52).long()
        p = _keep_most_likely(p, mass, _sum(mass, group).double() * top_p, group)
    return p


def _keep_most_likely(p: Tensor, weights: Tensor, wanted: Tensor | int, group: dist.ProcessGroup) -> Tensor:
    """p at and above the highest threshold with at least the wanted weight above it; all of p where there is less.

    weights: int64 [..., V]; sums must stay below 2 ** 63.
    """
    bits = p.view(torch.int32)  # of non-negative floats these are in their order
    low = above = torch.zeros_like(weights[..., :1])
    for shift in (24, 16, 8, 0):  # the threshold is in [low, low + (256 << shift)); above: weight past that interval
        bucket = (bits >> shift) - (low >> shift)
        bucket.masked_fill_((bucket < 0) | (bucket >= 256), 256)
        mass = weights.new_zeros(*weights.shape[:-1], 257).scatter_add_(-1, bucket, weights)
        del bucket  # as large as the weights
        mass = _over_ranks(mass, group)[..., :256]
        reach = above + mass.flip(-1).cumsum(-1).flip(-1)  # weight from each bucket on: falls
        last = ((reach >= wanted).sum(-1, keepdim=True) - 1).clamp(min=0)
        low = low + (last << shift)
        above = reach.gather(-1, last) - mass.gather(-1, last)
    return p.where(bits >= low, 0.0)


def sample(logits_RV: Tensor, real: int, numbers_RM: Tensor, temperature: float, top_p: float, top_k: int,
           group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens from softmax(logits / temperature), filtered by top-p and top-k.

    Args:
        logits_RV: this rank's vocabulary shard, of any floating-point dtype.
        real: columns of the shard that are ids; those after them are padding, which is not read. May be 0.
        numbers_RM: uniform in [0, 1), float64: M draws from each distribution.

    Returns:
        tokens int64 [R, M]; their log-probabilities under the unfiltered softmax(logits / temperature), float32
        [R, M]; that distribution's entropy in nats, float32 [R].
    """
    return draw(logits_RV, real, numbers_RM, temperature, top_p, top_k, group)[:3]


def draw(logits_LV: Tensor, real: int, numbers_RM: Tensor, temperature: float, top_p: float, top_k: int,
         group: dist.ProcessGroup, source_R: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample`, and log Σ exp(logits / temperature) of each row, float32 (float64 stays) [R].

    Args:
        source_R: where draws share rows of logits, the one that each reads, int64. None: L = R, each reads its own.
    """
    columns = logits_LV[:, :real] if real else logits_LV.new_full((len(logits_LV), 1), -torch.inf)
    width = logits_LV.shape[1]  # not that of the columns: ranks exchange messages for each chunk, so chunks must agree
    first_id = dist.get_rank(group) * width
    if top_k > 0 or top_p < 1:  # their histograms have 257 entries a row
        def filtered(rows, numbers_RM):
            logits_RV = rows if source_R is None else columns[rows]
            return _draw_filtered(logits_RV, numbers_RM, temperature, top_p, top_k, first_id, group)

        drawn = _by_rows(filtered, max(width, 257), columns if source_R is None else source_R, numbers_RM)
    else:  # M segments of a row are looked at again
        sums = _by_rows(lambda logits_LV: segment_sums(logits_LV, temperature), width, columns)
        if source_R is None:
            source_R = torch.arange(len(columns), device=columns.device)
        else:
            sums = (x[source_R] for x in sums)
        drawn = _by_rows(lambda *rows: _draw(columns, *rows, temperature, first_id, group),
                         SEGMENT * numbers_RM.shape[1], source_R, numbers_RM, *sums)
    tokens, log_probs, entropy, log_sum = drawn
    log_sum = log_sum.to(torch.promote_types(logits_LV.dtype, torch.float32))
    return tokens, log_probs.float(), entropy.float(), log_sum


def _by_rows(function: Callable[..., tuple[Tensor, ...]], width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Results for all rows of the tensors. A call takes as many rows as temporary tensors of this width leave room for.
    """
    size = max(1, temporary_elements() // width)
    parts = [function(*(x[i : i + size] for x in tensors)) for i in range(0, len(tensors[0]), size)]
    return tuple(torch.cat(x) for x in zip(*parts)) if len(parts) > 1 else parts[0]


def most_likely(logits_RV: Tensor, real: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The most likely token of each distribution, the first of equal ones, and its log-probability: int64 and float32
    [R]. Arguments as for `sample`."""
    columns = logits_RV[:, :real] if real else logits_RV.new_full((len(logits_RV), 1), -torch.inf)
    top_R, tokens_R = columns.max(-1)
    top_R = top_R.to(torch.promote_types(top_R.dtype, torch.float32))
    tokens_R = tokens_R + dist.get_rank(group) * logits_RV.shape[1]
    log_probs_R = top_R - log_sum_exp(logits_RV, real, 1.0, group)
    if dist.get_world_size(group) > 1:
        tops = [torch.empty_like(top_R) for _ in range(dist.get_world_size(group))]
        dist.all_gather(tops, top_R, group=group)
        tokens_R, log_probs_R = _from_owner(tokens_R, log_probs_R, torch.stack(tops).argmax(0), group)
    return tokens_R, log_probs_R.float()


# ---------------------------------------------------------------- without filters


@kernels.compiled
def segment_sums(logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each segment of x = logits / temperature: top = max x, Σ exp(x − top) and Σ exp(x − top)·(x − top), [R, S].

    Sums are in float32 (float64 stays). A segment of −inf has sums of 0 and the maximum LOWEST.
    """
    whole = logits_RV.shape[1] // SEGMENT * SEGMENT
    parts = []
    if whole:
        parts.append(_sums(logits_RV[:, :whole].unflatten(1, (-1, SEGMENT)), temperature))
    if whole < logits_RV.shape[1]:
        parts.append(_sums(logits_RV[:, None, whole:], temperature))
    return tuple(torch.cat(x, 1) for x in zip(*parts))


def _sums(logits_RSC: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    x = scaled(logits_RSC, temperature)
    top = x.amax(-1, keepdim=True).clamp(min=LOWEST)
    x = (x - top).clamp_(min=-1e4)  # exp is 0 from there on, and 0 · −inf is NaN
    exp = x.exp()
    return top.squeeze(-1), exp.sum(-1), x.mul_(exp).sum(-1)


def _draw(logits_LV, source_R, numbers_RM, top_RS, sum_RS, moment_RS, temperature, first_id: int,
          group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws in levels: the rank, a segment of its shard, a token of the segment.

    Args:
        source_R: the row of logits that each row of draws reads, int64.
        top_RS, sum_RS, moment_RS: that row's `segment_sums`.
    """
    top_RS, sum_RS, moment_RS = (x.double() for x in (top_RS, sum_RS, moment_RS))
    top_R1 = _over_ranks(top_RS.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    shift_RS = top_RS - top_R1
    scale_RS = shift_RS.exp()
    mass_RS = sum_RS * scale_RS
    moment_R1 = (moment_RS * scale_RS + mass_RS * shift_RS).sum(-1, keepdim=True)  # Σ exp(x − top)·(x − top)
    before_R1, total_R1, owner_RM = _shard_of(mass_RS.sum(-1, keepdim=True), numbers_RM, group)
    log_total_R1 = total_R1.log()
    entropy_R1 = log_total_R1 - _over_ranks(moment_R1, group) / total_R1

    segment_RM, rest_RM = _invert(mass_RS, numbers_RM * total_R1 - before_R1)
    x_RMC = scaled(_segments(logits_LV, source_R, segment_RM), temperature)
    exp_RMC = (x_RMC - top_RS.gather(1, segment_RM)[..., None].to(x_RMC.dtype)).exp_()
    share_RM = rest_RM / mass_RS.gather(1, segment_RM)  # of its segment's mass, before the token
    place_RM1 = (_place_by_parts if exp_RMC.is_cpu else _place)(exp_RMC, share_RM)[..., None]
    x_RM = x_RMC.gather(-1, place_RM1).squeeze(-1)
    tokens_RM = segment_RM * SEGMENT + place_RM1.squeeze(-1) + first_id
    log_sum_R1 = top_R1 + log_total_R1
    log_probs_RM = x_RM.double() - log_sum_R1
    return (*_from_owner(tokens_RM, log_probs_RM, owner_RM, group), entropy_R1.squeeze(-1), log_sum_R1.squeeze(-1))


def _segments(logits_LV: Tensor, source_R: Tensor, segment_RM: Tensor) -> Tensor:
    """Logits of one segment of the row that each draw reads, [R, M, SEGMENT], −inf after the last id. A shard smaller
    than a segment is padded to whole parts."""
    ids = logits_LV.shape[1]
    whole = ids // SEGMENT
    rest_R1C = torch.nn.functional.pad(logits_LV[:, whole * SEGMENT :][source_R, None],
                                       (0, -ids % (SEGMENT if whole else PART)), value=-torch.inf)
    if not whole:
        return rest_R1C.expand(-1, segment_RM.shape[1], -1)
    segments = logits_LV[:, : whole * SEGMENT].unflatten(1, (whole, SEGMENT))
    logits_RMC = segments[source_R[:, None], segment_RM.clamp(max=whole - 1)]
    return logits_RMC.where((segment_RM < whole)[..., None], rest_R1C) if rest_R1C.numel() else logits_RMC


def _place(mass_RMC: Tensor, share_RM: Tensor) -> Tensor:
    """The bin of each distribution in which this share of its mass is passed, int64 [R, M]."""
    mass_RMC = mass_RMC.double()
    return _invert(mass_RMC, (share_RM * mass_RMC.sum(-1))[..., None])[0].squeeze(-1)


def _place_by_parts(mass_RMC: Tensor, share_RM: Tensor) -> Tensor:
    """The same in two levels: less to add up, but more kernels, for which a GPU would wait."""
    mass_RMPC = mass_RMC.unflatten(-1, (-1, PART))
    mass_RMP = mass_RMPC.sum(-1, dtype=torch.float64)
    part_RM1, rest_RM1 = _invert(mass_RMP, (share_RM * mass_RMP.sum(-1))[..., None])
    within_RMC = mass_RMPC.take_along_dim(part_RM1[..., None], 2).squeeze(2).double()
    return (part_RM1 * PART + _invert(within_RMC, rest_RM1)[0]).squeeze(-1)


def _invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The bin in which the running sum of the masses passes each target, and what of the target is left in it.

    A target that rounding puts past the end falls into the last bin that has any mass.

    Args:
        mass: float64 [..., C], not negative.
        target: float64 [..., M].
    """
    bounds = mass.cumsum(-1)
    last = _last_with_mass(mass)
    index = torch.searchsorted(bounds, target, right=True).minimum(last)
    rest = target - (bounds.gather(-1, index) - mass.gather(-1, index))
    return index, rest.clamp(min=0)  # rounding must not reach a bin without mass that comes first


def _last_with_mass(mass: Tensor) -> Tensor:
    """The last bin that has any mass, [..., 1]; 0 where none has."""
    return (torch.arange(mass.shape[-1], device=mass.device) * (mass > 0)).amax(-1, keepdim=True)


# ---------------------------------------------------------------- with filters


def _draw_filtered(logits_RV, numbers_RM, temperature, top_p, top_k, first_id: int,
                   group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = scaled(logits_RV, temperature).float()
    lse = log_sum_exp(x, x.shape[1], 1.0, group)
    log_p = x - lse[..., None]
    p = log_p.exp()
    entropy = -_sum(p * log_p.clamp(min=-1e4), group).squeeze(-1)
    kept = filter_probabilities(p, top_p, top_k, group)
    cdf = kept.cumsum(-1, dtype=torch.float64)
    before, total, owner = _shard_of(cdf[..., -1:], numbers_RM, group)
    local = torch.searchsorted(cdf, numbers_RM * total - before, right=True)
    local = local.minimum(_last_with_mass(kept))  # rounding must not reach filtered tokens
    return *_from_owner(local + first_id, log_p.gather(-1, local), owner, group), entropy, lse


# ---------------------------------------------------------------- over the vocabulary's ranks


def _shard_of(mass: Tensor, numbers: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The mass of the shards before this rank's, the mass of all shards, and the rank whose shard holds each number.

    A number that rounding puts past the end falls into the last shard that has any mass.
    """
    if dist.get_world_size(group) == 1:
        return torch.zeros_like(mass), mass, torch.zeros_like(numbers, dtype=torch.int64)
    masses = [torch.empty_like(mass) for _ in range(dist.get_world_size(group))]
    dist.all_gather(masses, mass.contiguous(), group=group)
    masses = torch.cat(masses, -1)
    bounds = masses.cumsum(-1)
    total, rank = bounds[..., -1:], dist.get_rank(group)
    owner = torch.searchsorted(bounds, numbers * total, right=True).minimum(_last_with_mass(masses))
    before = bounds[..., rank - 1 : rank] if rank else torch.zeros_like(mass)
    return before, total, owner


def _from_owner(tokens: Tensor, log_probs: Tensor, owner: Tensor, group) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of the rank in whose shard each draw fell, on every rank."""
    if dist.get_world_size(group) > 1:
        is_here = owner == dist.get_rank(group)
        tokens, log_probs = tokens.where(is_here, -1), log_probs.where(is_here, -torch.inf)
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(log_probs, op=dist.ReduceOp.MAX, group=group)
    return tokens, log_probs
