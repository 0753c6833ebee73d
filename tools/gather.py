"""Gathers the unsplit features and gradients of a step for tools/replay.py. Training never forms either.

1. Features are formed as in the definition: hidden states of the chosen layers, normalised, concatenated and pooled.
   They come from the pass of which features.py only needs inner products. Each pipeline stage fills its layers into a
   tensor of zeros, and the tensors of all stages are added.
2. Gradients reach rank 0 one tensor of the unsplit model at a time, in an order that all ranks know, and leave under
   their Hugging Face names. No rank holds more than its own part and one tensor.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ebft.checkpointing.sharded_weights import sharded_tensors, sharded_weights
from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.hf.families import HFModel
from megatron_ebft.method.features import Catch, FeatureMap
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.attention import StridedPattern, as_mask
from megatron_ebft.model.weights import local_layers, unwrap
from megatron_ebft.parallel.groups import is_last_stage, pp_group, tp_group


@torch.no_grad()
def gather_features(encoder, feature_map: FeatureMap, micro_batches: MicroBatches) -> tuple[Tensor, Tensor]:
    """Pooled features of this rank's rollouts [B, K, N, D] and gold completions [B, K, D], float32.

    Args:
        micro_batches: rows packed with all G tokens of each rollout.
    """
    steps = feature_map.steps(micro_batches.layout.rollout_length)
    own_layers = sorted(layer for layer in feature_map.layers if layer in local_layers(encoder))
    hidden_size, states = unwrap(encoder).config.hidden_size, []

    def forward_step(iterator, model):
        mb = next(iterator)
        index = torch.cat([mb.row.rollout_index(steps), mb.row.completion_index(steps)[:, None]], dim=1).flatten()
        with Catch(model, feature_map.layers) as catch:
            out = model(mb.tokens, mb.positions, as_mask(StridedPattern(mb.row, mb.document_BT)))
        pooled = torch.zeros(len(feature_map.layers), len(index), len(mb.tokens), hidden_size, device=device())
        for layer, hidden_SBH in zip(own_layers, catch.caught, strict=True):
            if len(hidden_SBH) < mb.row.length:
                hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=tp_group())
            pooled[feature_map.layers.index(layer)] = hidden_SBH[index.to(device())]
        states.append(pooled)
        return (torch.zeros((), device=device()) if is_last_stage() else out), None

    run_schedule(forward_step, micro_batches, encoder, forward_only=True)
    features = []
    for mb, pooled in zip(micro_batches, states, strict=True):
        dist.all_reduce(pooled, group=pp_group())  # only after the schedule, in which stages wait for each other
        tokens = pooled.permute(1, 2, 0, 3)  # [size·(n+1)·P, b, layers, H]
        if feature_map.norm == "layer":
            tokens = normalize(tokens, dim=-1).flatten(2)
        else:
            tokens = normalize(tokens.flatten(2), dim=-1)
        by_block = tokens.unflatten(0, (mb.row.size, -1, len(steps))).mean(2)
        features.append(by_block.movedim(2, 0))
    joined = micro_batches.join_blocks(features)
    return joined[:, :, :-1].contiguous(), joined[:, :, -1].contiguous()


def gather_gradients(policy: list, hf: HFModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, float32 gradient on the CPU) on rank 0, in the order of `hf.entries`.

    The gradients are those that the last backward pass left in the buffers. The other ranks must iterate as well and
    get nothing. The policy loses its weights: the gradients take their place.

    Args:
        policy: stages built without the distributed optimizer, so that every data-parallel rank has whole gradients.
    """
    for parameter in itertools.chain(*(unwrap(chunk).parameters() for chunk in policy)):
        parameter.data = parameter.main_grad
    own_shards: dict[str, list] = {}
    for shard in sharded_tensors(sharded_weights(policy)):
        if is_main_replica(shard.replica_id):
            own_shards.setdefault(shard.key, []).append(shard)
    assert own_shards.keys() <= hf.entries.keys(), own_shards.keys() - hf.entries.keys()
    places = {key: [(x.global_shape, x.global_offset, tuple(x.data.shape)) for x in shards]
              for key, shards in own_shards.items()}
    places_by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(places_by_rank, places)
    for key, entry in hf.entries.items():
        parts = [(rank, number, *place) for rank, known in enumerate(places_by_rank)
                 for number, place in enumerate(known.get(key, []))]
        whole = None
        for rank, number, global_shape, offset, shape in parts:
            if rank == dist.get_rank():
                part = own_shards[key][number].data.contiguous()
                if rank > 0:
                    dist.send(part, 0)
            elif dist.get_rank() == 0:
                part = torch.empty(shape, device=device())
                dist.recv(part, rank)
            if dist.get_rank() == 0:
                if whole is None:
                    whole = torch.full(global_shape, torch.nan)
                whole[tuple(slice(first, first + size) for first, size in zip(offset, shape))] = part
        if dist.get_rank() == 0:
            yield from zip(entry.names, entry.split(whole), strict=True)
