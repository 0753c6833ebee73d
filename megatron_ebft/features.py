"""Block features in the frozen encoder (METHOD: "Features"), and from them one Gram matrix per block.

1. Hidden states are the residual stream after the feature layers, caught by forward hooks, wherever the layers live.
2. Features themselves are never formed. Inner products of a block's pooled tokens add up over layers and slices of the
   hidden dimension, and normalisation and pooling act on them afterwards (energy.pool). So what tensor ranks and
   pipeline stages sum up is one small matrix a block.
3. With sample parallelism a block's samples are on S ranks. They meet by an all-to-all that gives each rank all samples
   of a slice of the hidden dimension; it runs while the encoder works on the next micro-batch.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft import energy
from megatron_ebft.attention import StridedPattern, as_mask
from megatron_ebft.batch import MicroBatch, MicroBatches, run_schedule
from megatron_ebft.device import device
from megatron_ebft.layout import RowLayout
from megatron_ebft.model import local_layers
from megatron_ebft.parallel import is_last_stage, pp_group, sample_group, sample_rank, sample_size, tp_group

FEATURE_NORMS = ("joint", "layer")
POOLINGS = ("last_token", "mean")


@dataclass
class FeatureMap:
    """φ: which hidden states make up a feature, and how."""

    layers: list[int]
    """Decoder layers, counted from 1."""
    norm: str
    """`joint`: one L2 norm of the concatenated layers; `layer`: one per layer."""
    pooling: str
    """`last_token` of the G, or their `mean`, after normalisation."""

    def __post_init__(self):
        if self.norm not in FEATURE_NORMS:
            raise ValueError(f"--ebft-feature-norm {self.norm}: must be one of {', '.join(FEATURE_NORMS)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"--ebft-feature-pooling {self.pooling}: must be one of {', '.join(POOLINGS)}")

    def steps(self, length: int) -> range:
        """Which tokens of a completion of this length are pooled."""
        return range(length - 1 if self.pooling == "last_token" else 0, length)


class _Catch:
    """Catches the outputs of this stage's feature layers while in its context."""

    def __init__(self, model, layers: list[int]):
        here = local_layers(model)
        self.modules = [here[layer] for layer in layers if layer in here]
        self.caught: list[Tensor] = []

    def __enter__(self):
        self.handles = [m.register_forward_hook(lambda _m, _i, out: self.caught.append(out[0])) for m in self.modules]
        return self

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def block_grams(encoder, feature_map: FeatureMap, micro_batches: MicroBatches, lengths: list[int]) -> Tensor:
    """Inner products of every block's n rollout features and its reference feature, the same on every rank that shares
    the encoder or the documents: float64 [B, K, len(lengths), n+1, n+1].

    Args:
        micro_batches: rows packed with all G steps of each rollout (with sample parallelism, of this rank's n/S).
        lengths: completions are cut to these many tokens, each at most G; training uses [G].
    """
    grams: list[list[Tensor]] = []  # by micro-batch and length
    pending: list[PendingGrams] = []  # the last micro-batch's, whose features are on their way

    def forward_step(iterator, model):
        micro_batch = next(iterator)
        with _Catch(model, feature_map.layers) as catch:
            out = model(micro_batch.tokens, micro_batch.positions,
                        as_mask(StridedPattern(micro_batch.row, micro_batch.document_BT)))
        grams.extend(x.finish() for x in pending)
        pending[:] = [PendingGrams(feature_map, micro_batch, catch.caught, lengths)]
        return (torch.zeros((), device=out.device) if is_last_stage() else out), None

    run_schedule(forward_step, micro_batches, encoder, forward_only=True)
    grams.extend(x.finish() for x in pending)
    by_length = []
    for length, parts in zip(lengths, zip(*grams)):
        gram = micro_batches.join_blocks(list(parts)).contiguous()  # collectives read past the gaps of a view
        if dist.get_world_size(pp_group()) > 1:
            dist.all_reduce(gram, group=pp_group())
        by_length.append(energy.pool(gram, len(feature_map.steps(length))) if feature_map.norm == "joint" else gram)
    return torch.stack(by_length, dim=2)


class PendingGrams:
    """Inner products of one micro-batch's blocks on this stage, begun in `__init__`, completed by `finish`."""

    def __init__(self, feature_map: FeatureMap, micro_batch: MicroBatch, hidden_SBH: list[Tensor], lengths: list[int]):
        self.feature_map, self.row, self.hidden = feature_map, micro_batch.row, hidden_SBH
        self.batch = len(micro_batch.tokens)
        self.steps = [feature_map.steps(length) for length in lengths]
        self.exchanges = [_exchange_samples(_pooled_slices(self.row, steps, hidden_SBH)) if hidden_SBH else None
                          for steps in self.steps]

    def finish(self) -> list[Tensor]:
        """By length: `joint` norm: of hidden states, summed over this stage's layers, [b, size, (n+1)·P, (n+1)·P];
        `layer` norm: of normalised and pooled features [b, size, n+1, n+1]. Both add up over the stages."""
        return [self._finish(steps, exchange) for steps, exchange in zip(self.steps, self.exchanges)]

    def _finish(self, steps: range, exchange) -> Tensor:
        completions = self.row.layout.num_samples * sample_size() + 1
        if exchange is None:  # no feature layer on this stage
            width = completions * (len(steps) if self.feature_map.norm == "joint" else 1)
            return torch.zeros(self.batch, self.row.size, width, width, dtype=torch.float64, device=device())
        gram = energy.gram(exchange().flatten(-3, -2))  # [layers, b, size, (n+1)·P, (n+1)·P]
        if self.feature_map.norm == "joint":
            gram = gram.sum(0)
        for group in (tp_group(), sample_group()):
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(gram, group=group)
        return gram if self.feature_map.norm == "joint" else energy.pool(gram, len(steps)).sum(0)


def _pooled_slices(row: RowLayout, steps: range, hidden_SBH: list[Tensor]) -> Tensor:
    """Hidden states of the pooled tokens, this tensor rank's slice of them: [layers, b, size, n+1, P, H/tp].

    Without sequence parallelism every tensor rank has all tokens and takes its slice; with it, each has some tokens and
    they trade (an all-to-all that moves the pooled tokens once).
    """
    index = torch.cat([row.rollout_index(steps), row.completion_index(steps)[:, None]], dim=1)  # [size, n+1, P]
    hidden = torch.stack(hidden_SBH)  # [layers, S or S/tp, b, H]
    group = tp_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    places = index.flatten()
    if hidden.shape[1] == row.length:
        pooled = hidden[:, places.to(hidden.device)].chunk(size, dim=-1)[rank]
    else:
        pooled = _trade_tokens(hidden, places, group)
    return pooled.unflatten(1, index.shape).movedim(4, 1)


def _trade_tokens(hidden_LSBH: Tensor, places: Tensor, group) -> Tensor:
    """From tokens shared out in order over the group to all tokens at `places`, a slice of H each: [L, P, b, H/tp]."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    layers, here, batch, width = hidden_LSBH.shape
    owner = places // here
    mine = (places[owner == rank] - rank * here).to(hidden_LSBH.device)
    counts = torch.bincount(owner, minlength=size).tolist()
    outgoing = hidden_LSBH[:, mine].unflatten(-1, (size, -1)).permute(3, 1, 0, 2, 4).contiguous()  # [tp, P, L, b, H/tp]
    incoming = hidden_LSBH.new_empty(len(places), layers, batch, width // size)
    dist.all_to_all_single(incoming, outgoing.flatten(0, 1), counts, [len(mine)] * size, group=group)
    by_place = owner.argsort(stable=True).argsort().to(incoming.device)  # arrived by owner, wanted in order
    return incoming[by_place].transpose(0, 1)


def _exchange_samples(pooled: Tensor):
    """All samples of a sample group, a slice of H each: a function that waits for [layers, b, size, n+1, P, H/(tp·S)].

    Gram matrices add up over slices of H, so no rank needs whole features of samples it did not draw: against an
    all-gather this moves a share 1/S of the bytes. The reference feature is known to every rank.
    """
    count, group = sample_size(), sample_group()
    if count == 1:
        return lambda: pooled
    own = pooled[..., :-1, :, :].unflatten(-1, (count, -1)).movedim(-2, 0).contiguous()  # [S, layers, …]
    everyone = torch.empty_like(own)
    work = dist.all_to_all_single(everyone, own, group=group, async_op=True)
    reference = pooled[..., -1:, :, :].chunk(count, dim=-1)[sample_rank()]

    def wait() -> Tensor:
        work.wait()
        return torch.cat([everyone.movedim(0, 3).flatten(3, 4), reference], dim=3)

    return wait
