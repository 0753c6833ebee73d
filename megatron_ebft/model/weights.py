"""A model's parameters and layers, whatever wraps it and however it is split over stages."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ebft.common.device import device
from megatron_ebft.model.decoder import Decoder


def unwrap(model) -> Decoder:
    """The Decoder inside DDP and precision wrappers."""
    while not isinstance(model, Decoder):
        model = model.module
    return model


def local_layers(model) -> dict[int, torch.nn.Module]:
    """Decoder layers of this rank's stage by their number in the whole model, counted from 1."""
    return {layer.layer_number: layer for layer in unwrap(model).decoder.layers}


def _weights(chunks: list) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank's stages under their names in an unsplit model.

    The last stage's copy of a tied embedding is left out.
    """
    weights = {}
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue
            weights[name] = parameter
    return weights


def copy_weights(source: list, target) -> None:
    """Copy weights of a policy into a frozen model: its start, or an encoder of its lower layers.

    Their layers may be on different stages, so weights go round the pipeline one at a time.

    Args:
        source: stages of the policy on this rank.
        target: a frozen model, of the same kind of layers; all its weights are set.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    own, wanted, filled = _weights(source), _weights([target]), set()
    own_shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    shapes = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, own_shapes, group=group)
    dtype = next(iter(own.values())).dtype
    inner = unwrap(target)
    has_tied_copy = inner.share_embeddings_and_output_weights and inner.post_process and not inner.pre_process
    with torch.no_grad():
        for stage, shapes_there in enumerate(shapes):
            for name, shape in shapes_there.items():
                is_own = stage == dist.get_rank(group)
                weight = own[name].detach() if is_own else torch.empty(shape, dtype=dtype, device=device())
                if len(shapes) > 1:
                    dist.broadcast(weight, dist.get_global_rank(group, stage), group=group)
                if name in wanted:
                    wanted[name].copy_(weight)
                    filled.add(name)
                if name == "embedding.word_embeddings.weight" and has_tied_copy:
                    inner.output_layer.weight.copy_(weight)
    assert filled == wanted.keys(), wanted.keys() - filled
