"""Policies and encoders made from Hugging Face weights (brute_force.load_llama, random_llama), and gradients under
those names: what lets a test hold the package against brute_force.py.

Megatron-Core keeps Q, K and V of a layer in one matrix, ordered by key head: the query heads that share the key head,
the key head, the value head. Gate and up projection are one matrix as well, one after the other.
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_ebft import model
from megatron_ebft.batch import GoldBatch
from megatron_ebft.dataset import document_ids
from megatron_ebft.device import device
from megatron_ebft.ebft import EBFTConfig
from megatron_ebft.features import FeatureMap
from megatron_ebft.layout import StridedLayout
from megatron_ebft.model import ModelArgs, feature_layers, unwrap
from megatron_ebft.rollout import SamplingConfig

TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
RECOMPUTE = {
    "off": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "selective": dict(recompute_granularity="selective"),
}


def architecture(config: dict) -> ModelArgs:
    """Our architecture for a Hugging Face Llama or Qwen2 configuration."""
    scaling = config["rope_scaling"]
    rope = {} if scaling is None else dict(
        use_rope_scaling=True, rope_scaling_factor=scaling["factor"], rope_low_freq_factor=scaling["low_freq_factor"],
        rope_high_freq_factor=scaling["high_freq_factor"],
        rope_original_max_position_embeddings=scaling["original_max_position_embeddings"])
    return ModelArgs(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"], kv_channels=config["head_dim"],
        padded_vocab_size=config["vocab_size"], max_position_embeddings=config["max_position_embeddings"],
        rotary_base=config["rope_theta"], norm_epsilon=config["rms_norm_eps"],
        add_qkv_bias=config["model_type"] == "qwen2",
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"], **rope)


def _hf_names(name: str) -> list[str]:
    """Hugging Face names of the tensors in the Megatron-Core parameter `name`."""
    if name in TOP:
        return [TOP[name]]
    _, _, layer, rest = name.split(".", 3)
    return [f"model.layers.{layer}.{part}" for part in LAYER[rest]]


def _join(name: str, parts: list[Tensor], config: dict) -> Tensor:
    if "linear_qkv" not in name:
        return torch.cat(parts)
    return torch.cat([x.unflatten(0, (config["num_key_value_heads"], -1)) for x in parts], dim=1).flatten(0, 1)


def _split(name: str, tensor: Tensor, config: dict) -> list[Tensor]:
    if "linear_fc1" in name:
        return list(tensor.chunk(2))
    if "linear_qkv" not in name:
        return [tensor]
    by_key_head, key = tensor.unflatten(0, (config["num_key_value_heads"], -1)), config["head_dim"]
    parts = by_key_head.split([by_key_head.shape[1] - 2 * key, key, key], dim=1)
    return [x.flatten(0, 1) for x in parts]


def load(target, config: dict, weights: dict) -> None:
    """Set the weights of a policy, encoder or reference from Hugging Face ones."""
    with torch.no_grad():
        for name, parameter in unwrap(target).named_parameters():
            parameter.copy_(_join(name, [weights[x] for x in _hf_names(name)], config))
    rotary = unwrap(target).rotary_pos_emb
    rotary.inv_freq = rotary.inv_freq.to(parameter.dtype)  # float64 angles for a float64 model


def gradients(policy: list, config: dict) -> dict[str, Tensor]:
    """What the last backward pass left in the policy's gradient buffers, under Hugging Face names."""
    return {hf: part.cpu().clone() for name, parameter in unwrap(policy[0]).named_parameters()
            for hf, part in zip(_hf_names(name), _split(name, parameter.main_grad, config), strict=True)}


def build_policy(config: dict, weights: dict, **overrides) -> list:
    """A policy with these weights, gradient buffers zero; all in torch's default dtype."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    policy = model.build_policy(architecture(config), ddp, params_dtype=torch.get_default_dtype(), **overrides)
    load(policy[0], config, weights)
    policy[0].zero_grad_buffer()
    return policy


def build_encoder(config: dict, weights: dict, fractions=(0.25, 0.5, 0.75), **overrides):
    """An encoder with these weights, of the layers that these depths need."""
    deepest = max(feature_layers(fractions, config["num_hidden_layers"]))
    encoder = model.build_encoder(architecture(config), deepest, params_dtype=torch.get_default_dtype(), **overrides)
    load(encoder, config, weights)
    return encoder


def build_reference(config: dict, weights: dict):
    """A frozen whole model with these weights."""
    reference = model.build_frozen(architecture(config), params_dtype=torch.get_default_dtype())
    load(reference, config, weights)
    return reference


def ebft_config(settings, seq_length: int, num_layers: int, *, micro_batch_size=1, blocks_per_microbatch=0,
                rollout_rows=0, seed=0) -> EBFTConfig:
    """The configuration that does what brute_force.Settings describes."""
    g = settings.geometry
    return EBFTConfig(
        layout=StridedLayout(seq_length, g.context, g.stride, g.rollout_length, g.num_samples),
        sampling=SamplingConfig(settings.temperature, top_p=1.0, top_k=0, seed=seed),
        feature_map=FeatureMap(feature_layers(settings.fractions, num_layers), settings.norm, settings.pooling),
        whitening=settings.whitening, advantage=settings.advantage, alignment_coef=1.0, diversity_coef=settings.alpha,
        rl_coef=settings.rl_coef, ce_coef=settings.ce_coef, kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator, micro_batch_size=micro_batch_size,
        blocks_per_microbatch=blocks_per_microbatch, rollout_rows=rollout_rows)


def gold_batch(tokens_BT: Tensor, eod: int | None = None, answer_BT: Tensor | None = None, first: int = 0) -> GoldBatch:
    """Rows on this rank's device, numbered from `first`, with a document mask where an eod is given."""
    tokens_BT = tokens_BT.to(device())
    return GoldBatch(tokens_BT, first + torch.arange(len(tokens_BT), device=device()),
                     None if eod is None else document_ids(tokens_BT, eod),
                     None if answer_BT is None else answer_BT.to(device()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return ((actual.cpu() - expected).norm() / expected.norm()).item()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (actual.cpu() - expected).abs().max().item()
