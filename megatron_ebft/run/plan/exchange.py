"""Bytes that ranks exchange for the rewards, worked out from the sizes alone. tools/plan.py prints them."""

import itertools
from dataclasses import dataclass

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.features import FeatureMap
from megatron_ebft.model.architecture import balanced_split
from megatron_ebft.parallel.groups import document_size


@dataclass
class ExchangeBytes:
    """Bytes a rank receives in one step so that rewards see all of a feature (of a sum: its operand)."""

    gram: int
    """As it is done here: slices of hidden states between sample ranks, Gram matrices otherwise."""
    features: int
    """If whole features went to every rank instead."""


def exchange_bytes(feature_map: FeatureMap, layout: StridedLayout, rows: int, blocks_per_microbatch: int,
                   hidden_size: int, element_size: int, layers_here: int, *, tensor: int, is_sequence_parallel: bool,
                   pipeline: int, samples: int) -> ExchangeBytes:
    """Bytes of `block_grams` for one step on a rank whose stage holds `layers_here` feature layers.

    Args:
        layout: of this rank's n/S samples. rows: rows of this rank. element_size: bytes of a hidden state's number.
        tensor, pipeline, samples: sizes of the parallel groups.
    """
    n, everyone = layout.num_samples, layout.num_samples * samples + 1
    pooled = len(feature_map.steps(layout.rollout_length))
    slots = rows * sum(part.size for part in split_blocks(layout, blocks_per_microbatch, layout.rollout_length))
    pools_first = feature_map.is_pooled_first(layout.rollout_length, pipeline)
    vectors, number_size = (1, max(4, element_size)) if pools_first else (pooled, element_size)
    is_layered = feature_map.norm == "layer"
    gram = features = 0
    if is_sequence_parallel:
        tokens = slots * (n + 1) * pooled * layers_here * hidden_size * element_size
        gram += tokens // tensor
        features += tokens
    if pools_first and tensor > 1:
        gram += slots * (n + 1) * pooled * 8 * (layers_here if is_layered else min(layers_here, 1))
    summed = layers_here if is_layered and not pools_first else min(layers_here, 1)
    gram += ((tensor > 1) + (samples > 1)) * slots * summed * (everyone * vectors) ** 2 * 8
    if samples > 1:
        gram += slots * n * vectors * layers_here * hidden_size // tensor * number_size
        features += slots * n * samples * layers_here * hidden_size * number_size
    if pipeline > 1:
        gram += rows * layout.num_blocks * (everyone * vectors) ** 2 * 8
        features += rows * layout.num_blocks * everyone * len(feature_map.layers) * hidden_size * number_size
    return ExchangeBytes(gram, features)


def feature_exchange(args, config: EBFTConfig, hidden_size: int) -> ExchangeBytes:
    """What a rank receives in a step for the rewards, on the stage that has most feature layers."""
    layers, stages = config.feature_map.layers, args.pipeline_model_parallel_size
    ends = list(itertools.accumulate(balanced_split(max(layers), stages), initial=0))
    layers_here = max(sum(first < layer <= last for layer in layers) for first, last in zip(ends, ends[1:]))
    return exchange_bytes(
        config.feature_map, config.layout, args.global_batch_size // document_size(), config.blocks_per_microbatch,
        hidden_size, 2 if args.bf16 else 4, layers_here, tensor=args.tensor_model_parallel_size,
        is_sequence_parallel=args.sequence_parallel, pipeline=stages, samples=args.ebft_sample_parallel_size)
