"""A model's weights as Megatron-Core's sharded tensors, which know their place in the unsplit model."""

from collections.abc import Iterator

from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_ebft.model.weights import unwrap

SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True}
"""Metadata of every sharded state dict. Pass a copy: Megatron-Core writes its process groups into it.

Each layer has keys of its own, so that an encoder is a subset of a model. The optimizer's state has the shapes of the
model's tensors, so that it can be split differently. To save it, the first data-parallel rank gathers it in host
memory, bucket by bucket over gloo: 12 bytes for each parameter of its tensor- and pipeline-parallel part, and one
bucket more."""


def sharded_weights(model) -> dict:
    """Megatron-Core's sharded state dict of a model (or encoder): one entry for each of its chunks on this rank.

    Objects (_extra_state) are left out. They hold no weights and differ between kinds of layers.

    Args:
        model: a Decoder, wrapped or not, or a list of them (virtual pipeline stages).
    """
    chunks = model if isinstance(model, list) else [model]
    return {f"model{i}": {key: value for key, value in unwrap(chunk).sharded_state_dict(metadata=dict(SHARDING)).items()
                          if not isinstance(value, ShardedObject)} for i, chunk in enumerate(chunks)}


def real_vocab_size(model) -> int:
    """Number of ids without padding. `model` as in `sharded_weights`."""
    return unwrap(model[0] if isinstance(model, list) else model).real_vocab_size


def sharded_tensors(state) -> Iterator[ShardedTensor]:
    """The sharded tensors of a sharded state dict, with factories applied."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value
