"""Block features in the frozen encoder (METHOD: "Features"), reduced to one Gram matrix per block.

1. A feature is made of hidden states: the residual stream after the feature layers. Forward hooks catch it on whichever
   rank a layer lives.
2. No rank forms a whole feature. Inner products of a block's pooled tokens are sums over layers and over slices of the
   hidden dimension, and the diagonal normalises a token afterwards (energy.pool). So tensor ranks and pipeline stages
   sum one small matrix per block. Where several tokens are averaged, their norms are summed first.
3. With sample parallelism a block's samples are on S ranks. An all-to-all gives each rank all samples of one slice of
   the hidden dimension. It runs while the encoder works on the next micro-batch.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import device, upload
from megatron_ebft.data.micro_batches import MicroBatch, MicroBatches
from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.method import energy
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.attention import StridedPattern, as_mask
from megatron_ebft.model.weights import local_layers
from megatron_ebft.parallel.groups import is_last_stage, pp_group, sample_group, sample_rank, sample_size, tp_group


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
        assert self.norm in ("joint", "layer") and self.pooling in ("last_token", "mean"), self

    def steps(self, length: int) -> range:
        """Which tokens of a completion of this length are pooled."""
        return range(length - 1 if self.pooling == "last_token" else 0, length)

    def is_pooled_first(self, length: int, stages: int) -> bool:
        """Whether tokens are normalised and pooled before the inner products.

        Only where there are several tokens to pool and one stage knows their norms. A single token is normalised
        afterwards, and so are tokens whose norm spans layers on several stages.
        """
        return len(self.steps(length)) > 1 and (self.norm == "layer" or stages == 1)


class Catch:
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
    """Inner products of the features of every block's n rollouts and its gold completion: float64
    [B, K, len(lengths), n+1, n+1], equal on all ranks that share the encoder or the rows.

    Args:
        micro_batches: rows packed with all G tokens of each rollout (with sample parallelism, of this rank's n/S).
        lengths: completions are cut to each of these lengths, at most G; training uses [G].
    """
    grams: list[list[Tensor]] = []  # by micro-batch and length
    pending: list[PendingGrams] = []  # of the last micro-batch, whose features are still being exchanged

    def forward_step(iterator, model):
        micro_batch = next(iterator)
        with Catch(model, feature_map.layers) as catch:
            out = model(micro_batch.tokens, micro_batch.positions,
                        as_mask(StridedPattern(micro_batch.row, micro_batch.document_BT)))
        grams.extend(x.finish() for x in pending)
        pending[:] = [PendingGrams(feature_map, micro_batch, catch.caught, lengths)]
        return (torch.zeros((), device=out.device) if is_last_stage() else out), None

    run_schedule(forward_step, micro_batches, encoder, forward_only=True)
    grams.extend(x.finish() for x in pending)
    by_length, stages = [], dist.get_world_size(pp_group())
    for length, parts in zip(lengths, zip(*grams)):
        gram = micro_batches.join_blocks(list(parts)).contiguous()  # collectives read past the gaps of a view
        if stages > 1:
            dist.all_reduce(gram, group=pp_group())
        is_raw = feature_map.norm == "joint" and not feature_map.is_pooled_first(length, stages)
        by_length.append(energy.pool(gram, len(feature_map.steps(length))) if is_raw else gram)
    return torch.stack(by_length, dim=2)


class PendingGrams:
    """Inner products of one micro-batch's blocks on this stage. `__init__` starts the exchange, `finish` completes it.
    """

    def __init__(self, feature_map: FeatureMap, micro_batch: MicroBatch, hidden_SBH: list[Tensor], lengths: list[int]):
        self.norm, self.row, self.batch = feature_map.norm, micro_batch.row, len(micro_batch.tokens)
        stages, self.parts = dist.get_world_size(pp_group()), []
        for length in lengths:
            steps, is_pooled = feature_map.steps(length), feature_map.is_pooled_first(length, stages)
            wait = None  # no feature layer on this stage
            if hidden_SBH:
                slices = _pooled_slices(self.row, steps, hidden_SBH)
                wait = _exchange_samples(_pool(slices, self.norm) if is_pooled else slices)
            self.parts.append((1 if is_pooled else len(steps), is_pooled, wait))

    def finish(self) -> list[Tensor]:
        """For each length, inner products to be summed over the stages: of features, [b, size, n+1, n+1], or, with a
        `joint` norm over several stages, of hidden states not yet normalised, [b, size, (n+1)·P, (n+1)·P]."""
        return [self._finish(*part) for part in self.parts]

    def _finish(self, vectors: int, is_normalised: bool, wait) -> Tensor:
        if wait is None:
            width = vectors * (self.row.layout.num_samples * sample_size() + 1)
            return torch.zeros(self.batch, self.row.size, width, width, dtype=torch.float64, device=device())
        gram = energy.gram(wait().flatten(2, 3))  # [layers, b·size, (n+1)·P, (n+1)·P]
        is_layered = self.norm == "layer" and not is_normalised
        if not is_layered:
            gram = gram.sum(0)
        for group in (tp_group(), sample_group()):
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(gram, group=group)
        gram = energy.pool(gram, 1).sum(0) if is_layered else gram
        return gram.unflatten(0, (self.batch, self.row.size))


def _pool(slices: Tensor, norm: str) -> Tensor:
    """Features of all pooled tokens: divided by the norm over the whole hidden dimension, averaged over P.

    slices: [layers, b·size, n+1, P, H/tp] → [layers, b·size, n+1, 1, H/tp], float32.
    """
    squared = slices.double().square().sum(-1, keepdim=True)
    if norm == "joint":
        squared = squared.sum(0, keepdim=True)
    if dist.get_world_size(tp_group()) > 1:
        dist.all_reduce(squared, group=tp_group())
    inverse = squared.clamp(min=energy.NORM_FLOOR**2).rsqrt()
    features = (slices * inverse).mean(-2, keepdim=True)
    return features.to(torch.promote_types(slices.dtype, torch.float32))


def _pooled_slices(row: RowLayout, steps: range, hidden_SBH: list[Tensor]) -> Tensor:
    """This tensor rank's slice of the pooled tokens' hidden states: [layers, b·size, n+1, P, H/tp].

    Without sequence parallelism every tensor rank has all tokens and takes its slice. With it each rank has some of the
    tokens, and one all-to-all moves the pooled ones.
    """
    group, index = tp_group(), row.pooled_index(steps)  # [b or 1, size, n+1, P]
    batch, places_PB = hidden_SBH[0].shape[1], index.flatten(1).t()
    if len(hidden_SBH[0]) == row.length:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        places_PB, rows_B = upload(places_PB, hidden_SBH[0].device), torch.arange(batch, device=hidden_SBH[0].device)
        pooled = torch.stack([h.chunk(size, dim=-1)[rank][places_PB, rows_B] for h in hidden_SBH])
    else:
        pooled = _trade_tokens(hidden_SBH, places_PB.expand(-1, batch), group)
    return pooled.transpose(1, 2).reshape(len(pooled), -1, *index.shape[2:], pooled.shape[-1])


def _trade_tokens(hidden_SBH: list[Tensor], places_PB: Tensor, group) -> Tensor:
    """From tokens split in order over the group to the tokens at each row's places: a slice of H, [L, P, b, H/tp]."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    here, batch, width = hidden_SBH[0].shape
    places, rows = places_PB.flatten(), torch.arange(batch).repeat(len(places_PB))
    owner = places // here
    mine = upload(places[owner == rank] - rank * here, hidden_SBH[0].device)
    row = upload(rows[owner == rank], mine.device)
    counts = torch.bincount(owner, minlength=size).tolist()
    outgoing = torch.stack([h[mine, row].unflatten(-1, (size, -1)).movedim(-2, 0) for h in hidden_SBH], dim=2)
    incoming = outgoing.new_empty(len(places), len(hidden_SBH), width // size)  # outgoing [tp, P·b, L, H/tp]
    dist.all_to_all_single(incoming, outgoing.flatten(0, 1), counts, [len(mine)] * size, group=group)
    by_place = upload(owner.argsort(stable=True).argsort(), incoming.device)  # tokens arrive by owner
    return incoming[by_place].unflatten(0, (-1, batch)).permute(2, 0, 1, 3)


def _exchange_samples(pooled: Tensor):
    """Start the exchange between sample ranks. Returns a function that waits for all samples of this rank's slice of H:
    [layers, b·size, n+1, P, H/(tp·S)].

    Gram matrices are sums over slices of H, so no rank needs whole features of samples it did not draw. This moves 1/S
    of the bytes of an all-gather. Every rank knows the gold feature.
    """
    count, group = sample_size(), sample_group()
    if count == 1:
        return lambda: pooled
    own = torch.stack(pooled[:, :, :-1].flatten(0, 1).chunk(count, dim=-1))  # [S, layers·b·size, n/S, P, H/(tp·S)]
    everyone = torch.empty_like(own)
    work = dist.all_to_all_single(everyone, own, group=group, async_op=True)
    gold = pooled[:, :, -1:].chunk(count, dim=-1)[sample_rank()].contiguous()  # a view would keep the whole

    def wait(own=own) -> Tensor:  # `own` must live until the exchange is done
        work.wait()
        samples = everyone.transpose(0, 1).flatten(1, 2).unflatten(0, gold.shape[:2])
        return torch.cat([samples, gold], dim=2)

    return wait
