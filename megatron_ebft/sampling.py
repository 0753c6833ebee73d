"""Sampling of tokens from vocabulary-parallel logits, reproducible whatever the batch split.

1. A token is drawn by inverting the distribution function at one uniform number, which is a hash of
   (seed, iteration, document, block, sample, step): no generator state, no dependence on who computes it.
2. Top-k and top-p keep the tokens above a threshold per row. The threshold is found by radix selection on the bits of
   the probabilities, a byte a round: four small histograms are summed over the vocabulary's ranks, with no sort and no
   gathered logits. Equal probabilities are kept or dropped together. Masses are integers, so that no sum depends on an
   order, be it of ranks or of a GPU's atomic additions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.device import temporary_elements
from megatron_ebft.hashing import GOLDEN, mix64
from megatron_ebft.readout import log_sum_exp


def uniform(seed: int, iteration: int, document: Tensor, block: Tensor, sample: Tensor, step: int) -> Tensor:
    """Uniform numbers in [0, 1), float64, of the broadcast shape of document, block and sample (int64)."""
    state = torch.zeros((), dtype=torch.int64, device=document.device)
    for part in (seed, iteration, document, block, sample, step):
        state = mix64(state + part + GOLDEN)
    return ((state >> 11) & (1 << 53) - 1).double() * 2.0**-53


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _over_ranks(x.sum(-1, keepdim=True), group)


def _over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the vocabulary's ranks, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
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
    """p at and above the highest threshold from which there is as much weight as wanted; all of it, where there is not.

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


def sample(logits: Tensor, numbers: Tensor, temperature: float, top_p: float, top_k: int,
           group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens from softmax(logits / temperature), filtered by top-p and top-k.

    Args:
        logits: [..., V], this rank's vocabulary shard.
        numbers: uniform in [0, 1), float64 [..., m]: m draws from each distribution.

    Returns:
        tokens int64 [..., m]; their log-probabilities under the unfiltered softmax(logits / temperature), float32
        [..., m]; that distribution's entropy in nats, float32 [...].
    """
    shape = logits.shape[:-1]
    logits, numbers = logits.flatten(0, -2), numbers.flatten(0, -2)
    size = max(1, temporary_elements() // max(logits.shape[-1], 257))  # histograms have 257 entries
    parts = [_sample(logits[i : i + size], numbers[i : i + size], temperature, top_p, top_k, group)
             for i in range(0, len(logits), size)]
    return tuple(torch.cat(x).unflatten(0, shape) for x in zip(*parts))


def _sample(logits, numbers, temperature, top_p, top_k, group) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.float() / temperature
    lse = log_sum_exp(x, group)
    log_p = x.sub_(lse[..., None])
    p = log_p.exp()
    entropy = -_sum(p * log_p.clamp(min=-1e4), group).squeeze(-1)
    kept = filter_probabilities(p, top_p, top_k, group)
    cdf = kept.cumsum(-1, dtype=torch.float64)
    before, total, owner = _shard_of(cdf[..., -1:], numbers, group)
    local = torch.searchsorted(cdf, numbers * total - before, right=True)
    last = (kept > 0).to(torch.int8).flip(-1).argmax(-1, keepdim=True)  # rounding must not reach filtered tokens
    local = torch.minimum(local, kept.shape[-1] - 1 - last)
    tokens, log_probs = local, log_p.gather(-1, local)
    if dist.get_world_size(group) > 1:
        here = owner == dist.get_rank(group)
        tokens = (local + dist.get_rank(group) * kept.shape[-1]).where(here, -1)
        log_probs = log_probs.where(here, -torch.inf)
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(log_probs, op=dist.ReduceOp.MAX, group=group)
    return tokens, log_probs, entropy


def _shard_of(mass: Tensor, numbers: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mass of the vocabulary shards before this rank's, of all, and the rank in whose shard each number falls.

    A number that rounding puts past the end falls into the last shard that has any mass.
    """
    if dist.get_world_size(group) == 1:
        return torch.zeros_like(mass), mass, torch.zeros_like(numbers, dtype=torch.int64)
    masses = [torch.empty_like(mass) for _ in range(dist.get_world_size(group))]
    dist.all_gather(masses, mass.contiguous(), group=group)
    masses = torch.cat(masses, -1)
    bounds = masses.cumsum(-1)
    total, rank = bounds[..., -1:], dist.get_rank(group)
    last = masses.shape[-1] - 1 - (masses > 0).to(torch.int8).flip(-1).argmax(-1, keepdim=True)
    owner = torch.searchsorted(bounds, numbers * total, right=True).minimum(last)
    before = bounds[..., rank - 1 : rank] if rank else torch.zeros_like(mass)
    return before, total, owner
