"""Loads the weights of a Hugging Face folder into a model on this rank, without a checkpoint in between."""

import torch

from megatron_ebft.checkpointing.sharded_weights import sharded_tensors, sharded_weights
from megatron_ebft.hf.families import VOCABULARY, HFModel
from megatron_ebft.hf.weights import HFWeights


@torch.no_grad()
def load_hf_weights(model, hf: HFModel, weights: HFWeights) -> None:
    """Set this rank's part of a model; padding of the vocabulary becomes 0.

    Args:
        model: a Decoder, wrapped or not, or a list of them (virtual pipeline stages).
        weights: of the same model, and checked (`HFWeights.check`).
    """
    for tensor in sharded_tensors(sharded_weights(model)):
        entry = hf.entries[tensor.key]
        whole = entry.join([weights.read(name) for name in entry.names])
        if tensor.key in VOCABULARY:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, tensor.global_shape[0] - len(whole)))
        place = tensor.global_offset[tensor.prepend_axis_num:]
        tensor.data.copy_(whole[tuple(slice(first, first + size) for first, size in zip(place, tensor.data.shape))])
