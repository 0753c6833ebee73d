"""Policies and encoders made from Hugging Face weights (plain_llama.load_llama, random_llama), and gradients under
those names: what lets a test hold the package against brute_force.py.

Megatron-Core keeps Q, K and V of a layer in one matrix, ordered by key head: the query heads that share the key head,
the key head, the value head. Gate and up projection are one matrix as well, one after the other.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_ebft.checkpointing.sharded_weights import SHARDING, sharded_tensors
from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import GoldBatch, MicroBatch
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.features import Catch, FeatureMap
from megatron_ebft.method.means import Means
from megatron_ebft.method.rewards import compute_advantages, compute_rewards, feature_grams
from megatron_ebft.model import build
from megatron_ebft.model.architecture import ModelArgs, feature_layers
from megatron_ebft.model.attention import StridedPattern, as_mask
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.model.weights import unwrap
from megatron_ebft.rollout.sampler import Rollouts, SamplingConfig

TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
RECOMPUTE = {
    "off": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "selective": dict(recompute_granularity="selective"),
}


def architecture(config: dict, vocab_multiple: int = 1) -> ModelArgs:
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
        vocab_size=config["vocab_size"], max_position_embeddings=config["max_position_embeddings"],
        padded_vocab_size=-(-config["vocab_size"] // vocab_multiple) * vocab_multiple,
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
    if "linear_qkv" not in name or "layer_norm" in name:
        return torch.cat(parts)
    return torch.cat([x.unflatten(0, (config["num_key_value_heads"], -1)) for x in parts], dim=1).flatten(0, 1)


def _split(name: str, tensor: Tensor, config: dict) -> list[Tensor]:
    if "layer_norm" in name:
        return [tensor]
    if "linear_fc1" in name:
        return list(tensor.chunk(2))
    if "linear_qkv" not in name:
        return [tensor]
    by_key_head, key = tensor.unflatten(0, (config["num_key_value_heads"], -1)), config["head_dim"]
    parts = by_key_head.split([by_key_head.shape[1] - 2 * key, key, key], dim=1)
    return [x.flatten(0, 1) for x in parts]


def _whole(name: str, config: dict, weights: dict, rows: int) -> Tensor:
    """The Megatron-Core tensor of an unsplit model, its vocabulary padded to `rows`."""
    whole = _join(name, [weights[x] for x in _hf_names(name)], config)
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.nn.functional.pad(whole, (0, 0, 0, rows - len(whole)))
    return whole


def _local(tensor: ShardedTensor) -> tuple[slice, ...]:
    """Where this rank's part is in the unsplit tensor."""
    offset = tensor.global_offset[tensor.prepend_axis_num:]
    return tuple(slice(first, first + size) for first, size in zip(offset, tensor.data.shape))


def _shards(model) -> list[ShardedTensor]:
    """This rank's parts of a model, whose data are its parameters."""
    return list(sharded_tensors(unwrap(model).sharded_state_dict(metadata=dict(SHARDING))))


def load(target, config: dict, weights: dict) -> None:
    """Set the weights of a policy's stages, an encoder or a start from Hugging Face ones."""
    for chunk in target if isinstance(target, list) else [target]:
        with torch.no_grad():
            for shard in _shards(chunk):
                shard.data.copy_(_whole(shard.key, config, weights, shard.global_shape[0])[_local(shard)])
        rotary, dtype = unwrap(chunk).rotary, next(iter(weights.values())).dtype
        rotary.inv_freq = rotary.inv_freq.to(dtype)  # float64 angles for a float64 model


def load_whole(policy: list, whole: dict[str, Tensor], vocab_size: int) -> None:
    """Set the weights of a policy's stages from `whole_tensors` of another one, however its vocabulary is padded."""
    for chunk in policy:
        with torch.no_grad():
            for shard in _shards(chunk):
                tensor = whole[shard.key]
                if shard.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    tensor = torch.nn.functional.pad(tensor[:vocab_size], (0, 0, 0, shard.global_shape[0] - vocab_size))
                shard.data.copy_(tensor[_local(shard)])


def whole_tensors(policy: list, of_gradients: bool) -> dict[str, Tensor]:
    """Weights, or what the last backward pass left in the gradient buffers, of the unsplit model, on every rank (with
    one data-parallel rank, or after summing over them)."""
    parts = []
    for chunk in policy:
        parameters = list(unwrap(chunk).parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters if of_gradients else []:
                p.copy_(p.main_grad)
            parts += [(x.key, x.global_shape, _local(x), x.data.detach().cpu().clone()) for x in _shards(chunk)]
            for p, value in zip(parameters, kept):
                p.copy_(value)
    everywhere = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, parts)
    whole = {}
    for key, shape, where, data in (part for rank in everywhere for part in rank):
        whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))[where] = data
    assert not any(x.isnan().any() for x in whole.values())
    return whole


def gradients(policy: list, config: dict) -> dict[str, Tensor]:
    """What the last backward pass left in the policy's gradient buffers, under Hugging Face names."""
    return {hf: part for name, gradient in whole_tensors(policy, of_gradients=True).items()
            for hf, part in zip(_hf_names(name), _split(name, gradient[: _rows(name, config)], config), strict=True)}


def _rows(name: str, config: dict) -> int | None:
    return config["vocab_size"] if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None


def build_policy(config: dict, weights: dict, vocab_multiple: int = 1, **overrides) -> list:
    """A policy with these weights, gradient buffers zero; in torch's default dtype unless overrides say otherwise."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True,
                                        grad_reduce_in_fp32=overrides.get("bf16", False))
    policy = build.build_policy(architecture(config, vocab_multiple), ddp,
                                **{"params_dtype": torch.get_default_dtype(), **overrides})
    load(policy, config, weights)
    for chunk in policy:
        chunk.zero_grad_buffer()
    return policy


def build_encoder(config: dict, weights: dict, fractions=(0.25, 0.5, 0.75), vocab_multiple: int = 1, **overrides):
    """An encoder with these weights, of the layers that these depths need."""
    deepest = max(feature_layers(fractions, config["num_hidden_layers"]))
    encoder = build.build_encoder(architecture(config, vocab_multiple), deepest,
                                  **{"params_dtype": torch.get_default_dtype(), **overrides})
    load(encoder, config, weights)
    return encoder


def build_start(config: dict, weights: dict):
    """A frozen whole model with these weights."""
    start = build.build_start(architecture(config), params_dtype=torch.get_default_dtype())
    load(start, config, weights)
    return start


def ebft_config(settings, seq_length: int, num_layers: int, *, micro_batch_size=1, blocks_per_microbatch=0,
                rollout_rows=0, seed=0, skip_duplicates=True, importance_cap=0.0, rollout_fp8=FP8()) -> EBFTConfig:
    """The configuration that does what brute_force.Settings describes."""
    g = settings.geometry
    return EBFTConfig(
        layout=StridedLayout(seq_length, g.context, g.stride, g.rollout_length, g.num_samples),
        sampling=SamplingConfig(settings.temperature, top_p=1.0, top_k=0, seed=seed, fp8=rollout_fp8),
        feature_map=FeatureMap(feature_layers(settings.fractions, num_layers), settings.norm, settings.pooling),
        whitening=settings.whitening, advantage=settings.advantage, alignment_coef=1.0, diversity_coef=settings.alpha,
        rl_coef=settings.rl_coef, ce_coef=settings.ce_coef, kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator, micro_batch_size=micro_batch_size,
        blocks_per_microbatch=blocks_per_microbatch, rollout_rows=rollout_rows,
        importance_cap=importance_cap, encoder_fp8=FP8(), skip_duplicates=skip_duplicates)


def document_ids(tokens_BT: Tensor, eod: int) -> Tensor:
    """Document numbers of rows whose documents end with an eod, int32 [B, T]."""
    ends = (tokens_BT == eod).int()
    return (ends.cumsum(dim=1) - ends).int()


def gold_batch(tokens_BT: Tensor, eod: int | None = None, answer_BT: Tensor | None = None, first: int = 0) -> GoldBatch:
    """Rows on this rank's device, numbered from `first`, with a document mask where an eod is given."""
    tokens_BT = tokens_BT.to(device())
    return GoldBatch(tokens_BT, first + torch.arange(len(tokens_BT), device=device()),
                     None if eod is None else document_ids(tokens_BT, eod),
                     None if answer_BT is None else answer_BT.to(device()))


def block_features(encoder, feature_map: FeatureMap, micro_batch: MicroBatch,
                   lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The feature route, which the package does not take: the features themselves, on one rank.

    Returns:
        for each length that completions are cut to, rollouts [b, size, n, D] and references [b, size, D], float32.
    """
    row, pooled = micro_batch.row, []
    with Catch(encoder, feature_map.layers) as catch:
        encoder(micro_batch.tokens, micro_batch.positions, as_mask(StridedPattern(row, micro_batch.document_BT)))
    for length in lengths:
        steps = feature_map.steps(length)
        for index in (row.rollout_index(steps), row.completion_index(steps)):
            states = [h.transpose(0, 1)[:, index.to(h.device)] for h in catch.caught]
            states = [h.to(torch.promote_types(h.dtype, torch.float32)) for h in states]
            if feature_map.norm == "layer":
                states = [torch.nn.functional.normalize(h, dim=-1) for h in states]
            joined = torch.cat(states, dim=-1)
            if feature_map.norm == "joint":
                joined = torch.nn.functional.normalize(joined, dim=-1)
            pooled.append(joined.mean(-2))
    return list(zip(pooled[::2], pooled[1::2]))


@dataclass
class Rewarded:
    """What the encoder makes of rollouts."""

    gram: Tensor
    """float64 [B, K, n+1, n+1]."""
    alignment: Tensor
    """float32 [B, K, n]."""
    diversity: Tensor
    """float32 [B, K, n]."""
    advantage: Tensor
    """float32 [B, K, N]."""


def rewarded(encoder, gold: GoldBatch, rollouts: Rollouts, config: EBFTConfig, means: Means | None = None) -> Rewarded:
    """Features, rewards and advantages, as in a step."""
    gram = feature_grams(encoder, gold, rollouts, config, means)
    rewards = compute_rewards(gram, rollouts, config)
    return Rewarded(gram, rewards.alignment_BKn.float(), rewards.diversity_BKn.float(),
                    compute_advantages(rewards, config))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return ((actual.cpu() - expected).norm() / expected.norm()).item()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (actual.cpu() - expected).abs().max().item()
