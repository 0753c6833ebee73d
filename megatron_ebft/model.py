"""Construction of policy and encoder on Megatron-Core: the one place that knows GPTModel and its layer specs.

1. `ModelArgs` is the architecture: what a checkpoint records and `--use-checkpoint-args` restores.
2. Rotary embeddings take explicit positions. GPTModel hands `position_ids` to its rotary module only in its "mrope"
   mode, so that mode is selected and the module replaced by `PositionRotary`, which knows one position per token.
3. What is read out of the final hidden states is the caller's choice: `labels` is a readout (readout.py), so that the
   output head runs only where it is needed and no full-vocabulary tensor leaves the model.
4. The encoder is the same GPTModel without the layers above the deepest feature layer, final norm and output head.
"""

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ebft.attention import StridedAttention
from megatron_ebft.device import device, have_gpu


@dataclass
class ModelArgs:
    """Architecture of policy and encoder; field names are Megatron's flags."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    padded_vocab_size: int
    max_position_embeddings: int
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02


class PositionRotary(torch.nn.Module):
    """Rotary angles at explicit positions, with Llama 3's frequency scaling where asked for.

    forward: position_ids int64 [B, S] → angles float32 [S, B, 1, rotary dimension] (halves repeated), the shape
    Megatron-Core's unfused rotary embedding broadcasts over heads.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = int(args.kv_channels * args.rotary_percent)
        inv_freq = 1.0 / args.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if args.use_rope_scaling:
            inv_freq = _llama3_scaling(inv_freq, args)
        self.inv_freq = inv_freq.to(device())

    def forward(self, position_ids: Tensor, mrope_section=None, cp_group=None) -> Tensor:
        angles = position_ids.t()[:, :, None, None].float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)


def _llama3_scaling(inv_freq: Tensor, args: ModelArgs) -> Tensor:
    """Llama 3.1's rotary scaling: long wavelengths divided by the factor, a smooth ramp between the two cut-offs."""
    turns = args.rope_original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / args.rope_scaling_factor)


def transformer_config(args: ModelArgs, **overrides) -> TransformerConfig:
    """Megatron-Core's configuration for `args`; overrides carry precision, parallelism and recomputation."""
    values = dict(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, normalization=args.normalization, layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu, add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        qk_layernorm=args.qk_layernorm, init_method_std=args.init_method_std, attention_dropout=0.0,
        hidden_dropout=0.0, mrope_section=[1, 1, 1], use_cpu_initialization=not have_gpu(),
        persist_layer_norm=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
        calculate_per_token_loss=True)
    return TransformerConfig(**{**values, **overrides})


class LanguageModel(GPTModel):
    """GPTModel whose `labels` argument is a readout: called with the final hidden states [S, B, H], the output head
    (hidden states → logits of this rank's vocabulary shard) and the tensor-parallel group; its result is returned."""

    def _postprocess(self, hidden_states, labels, **unused):
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return labels(hidden_states, lambda x: self.output_layer(x, weight=weight)[0], self.pg_collection.tp)


def _layer_spec(args: ModelArgs):
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    spec.submodules.self_attention.submodules.core_attention = StridedAttention
    return spec


def _build_gpt(args: ModelArgs, config: TransformerConfig, *, post_process: bool):
    rope = args.position_embedding_type == "rope"
    model = LanguageModel(
        config=config, transformer_layer_spec=_layer_spec(args), vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings, pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=post_process and parallel_state.is_pipeline_last_stage(), parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="mrope" if rope else args.position_embedding_type,
        rotary_percent=args.rotary_percent, rotary_base=args.rotary_base)
    if rope:
        model.rotary_pos_emb = PositionRotary(args)
    model.to(device())
    return Float16Module(config, model) if config.bf16 else model


def build_policy(args: ModelArgs, ddp: DistributedDataParallelConfig, **overrides) -> list:
    """The trained model: one DDP-wrapped LanguageModel per virtual pipeline stage (one, for now).

    Losses are divided by global token counts before the backward pass, so gradients are plain sums.
    """
    config = transformer_config(args, **overrides)
    policy = DistributedDataParallel(config, ddp, _build_gpt(args, config, post_process=True))
    config.no_sync_func = policy.no_sync
    config.finalize_model_grads_func = lambda models, num_tokens, **kwargs: finalize_model_grads(models, None, **kwargs)
    return [policy]


def build_frozen(args: ModelArgs, **overrides):
    """A whole model without gradients: the starting policy."""
    return _freeze(_build_gpt(args, transformer_config(args, **overrides), post_process=True))


def build_encoder(args: ModelArgs, deepest_layer: int, **overrides):
    """The encoder: the lower layers up to the deepest feature layer, no final norm, no output head, no gradients."""
    config = transformer_config(args, **{**overrides, "num_layers": deepest_layer})
    return _freeze(_build_gpt(args, config, post_process=False))


def copy_weights(source, target) -> None:
    """Copy into `target` the weights it has in common with `source`: its own start, or an encoder of it."""
    weights = dict(unwrap(source).named_parameters())
    with torch.no_grad():
        for name, parameter in unwrap(target).named_parameters():
            parameter.copy_(weights[name])


def _freeze(model):
    model.eval()
    return model.requires_grad_(False)


def unwrap(model) -> LanguageModel:
    """The LanguageModel inside DDP and precision wrappers."""
    while not isinstance(model, LanguageModel):
        model = model.module
    return model


def feature_layers(fractions: list[float], num_layers: int) -> list[int]:
    """Layers ⌊f·L⌋ counted from 1 (METHOD: "Features").

    Raises:
        ValueError: a fraction outside (0, 1], or one that names no layer.
    """
    layers = [math.floor(fraction * num_layers) for fraction in fractions]
    if not layers or min(layers) < 1 or max(layers) > num_layers or len(set(layers)) != len(layers):
        raise ValueError(f"--ebft-feature-layers {' '.join(map(str, fractions))}: with --num-layers {num_layers} these "
                         f"are layers {layers}; each must be different and between 1 and {num_layers}")
    return layers
