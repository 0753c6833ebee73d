"""Construction of policy, start and encoder: configuration, layers, split over the pipeline.

1. Layers are Megatron-Core's TransformerLayer on Transformer Engine's linears or on Megatron-Core's own, as kernels.py
   decides. The core attention is ours in both.
2. Names in checkpoints are those of Transformer Engine's layers, whose linears hold the norms before them. Names of
   parameters differ between the two kinds, so only sharded state dicts may carry weights from one run to another.
3. The split over the pipeline is always spelled out (Megatron-Core's `pipeline_model_parallel_layout`), so that the
   encoder, which has fewer layers than the policy, can be balanced over the stages on its own.
"""

import functools
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ebft.common.device import device, have_gpu
from megatron_ebft.model import kernels
from megatron_ebft.model.architecture import ModelArgs, balanced_split, split_layers
from megatron_ebft.model.attention import StridedAttention
from megatron_ebft.model.decoder import Decoder


@dataclass
class ModelConfig(TransformerConfig):
    """Megatron-Core's configuration and the choice of our attention."""

    attention_kernel: str = "sdpa"
    """`flex` or `sdpa`."""
    training_fp8: str | None = None
    """The value that `fp8` has in the training pass and nowhere else (fp8.training)."""


def transformer_config(args: ModelArgs, *, transformer_impl: str = "auto", attention_kernel: str = "auto",
                       **overrides) -> ModelConfig:
    """The configuration for `args`; overrides carry precision, parallelism and recomputation.

    Raises:
        ValueError: see kernels.choose.
    """
    choice = kernels.choose(transformer_impl, attention_kernel, dtype=overrides.get("params_dtype", torch.float32),
                            head_dim=args.kv_channels)
    values = dict(
        transformer_impl=choice.transformer_impl, attention_kernel=choice.attention_kernel,
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, normalization=args.normalization, layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu, add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        qk_layernorm=args.qk_layernorm, init_method_std=args.init_method_std, attention_dropout=0.0,
        hidden_dropout=0.0, use_cpu_initialization=not have_gpu(),
        persist_layer_norm=False, masked_softmax_fusion=False,
        bias_activation_fusion=choice.fused_elementwise and args.swiglu,
        bias_dropout_fusion=choice.fused_elementwise,
        gradient_accumulation_fusion=choice.fused_weight_gradients, calculate_per_token_loss=True)
    return ModelConfig(**{**values, **overrides})


class Norm:
    """Builds torch's RMSNorm or LayerNorm for any parallelism.

    Megatron-Core's wrapper of these norms refuses sequence parallelism. This one marks the parameters, so that their
    gradients are summed over the tensor ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _layer_specs(args: ModelArgs, num_layers: int, transformer_impl: str) -> TransformerBlockSubmodules:
    """Layers of one stage: what Megatron-Core's specs of dense GPT layers build, with our core attention."""
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import (
            TELayerNormColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )

        norm, column_linear, row_linear = TENorm, TELayerNormColumnParallelLinear, TERowParallelLinear
        norms_before_linears = {}
    else:
        norm, column_linear, row_linear = Norm, ColumnParallelLinear, RowParallelLinear
        norms_before_linears = dict(input_layernorm=norm, pre_mlp_layernorm=norm, sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"})
    qk_norm = norm if args.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(linear_qkv=column_linear, core_attention=StridedAttention,
                                        linear_proj=row_linear, q_layernorm=qk_norm, k_layernorm=qk_norm)
    mlp = MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear)
    if hasattr(MLP, "as_mlp_submodule"):  # Megatron-Core takes a builder from 0.18 on
        build_mlp = functools.partial(MLP.as_mlp_submodule, submodules=mlp)
    else:
        build_mlp = ModuleSpec(module=MLP, submodules=mlp)
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal},
                                  submodules=attention),
        self_attn_bda=get_bias_dropout_add, mlp=build_mlp, mlp_bda=get_bias_dropout_add, **norms_before_linears)
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=TransformerLayer, submodules=layer)] * num_layers, layer_norm=norm)


def _stage(args: ModelArgs, config: TransformerConfig, split: list[int], vp_stage: int = 0,
           has_head: bool = True) -> Decoder:
    """This rank's stage of a model, where torch puts new tensors; `split` is the number of layers of each stage."""
    rank, stages = parallel_state.get_pipeline_model_parallel_rank(), config.pipeline_model_parallel_size
    place = vp_stage * stages + rank
    is_virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    return Decoder(
        args, config, _layer_specs(args, split[place], config.transformer_impl), pre_process=place == 0,
        post_process=has_head and place == len(split) - 1,
        share_embeddings_and_output_weights=has_head and not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage if is_virtual else None)


def _build_stage(args: ModelArgs, config: TransformerConfig, split: list[int], vp_stage: int = 0, *, has_head=True):
    """`_stage` on this rank's device, wrapped for bf16 where the configuration asks for it."""
    model = _stage(args, config, split, vp_stage, has_head)
    model.to(device())
    return Float16Module(config, model) if config.bf16 else model


def _config(args: ModelArgs, split: list[int], overrides: dict) -> ModelConfig:
    """The configuration of a model with these numbers of layers on its stages."""
    stages = [["decoder"] * layers for layers in split]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    layout = stages if len(split) > 1 else None
    return transformer_config(args, **{**overrides, "num_layers": sum(split), "pipeline_model_parallel_layout": layout})


def build_policy(args: ModelArgs, ddp: DistributedDataParallelConfig, *, first_stage_layers: int | None = None,
                 last_stage_layers: int | None = None, **overrides) -> list:
    """The trained model's stages on this rank: one DDP-wrapped Decoder per virtual pipeline stage.

    Losses are divided by global token counts before the backward pass, so gradients are plain sums.

    Args:
        first_stage_layers, last_stage_layers: see `split_layers`.
        overrides: fields of ModelConfig.

    Raises:
        ValueError: see kernels.choose and `split_layers`.
    """
    virtual = overrides.get("virtual_pipeline_model_parallel_size") or 1
    split = split_layers(args.num_layers, overrides.get("pipeline_model_parallel_size", 1), first_stage_layers,
                         last_stage_layers, virtual)
    config = _config(args, split, overrides)
    policy = [DistributedDataParallel(config, ddp, _build_stage(args, config, split, vp_stage),
                                      disable_bucketing=vp_stage > 0)
              for vp_stage in range(virtual)]
    if config.transformer_impl == "transformer_engine":
        _accumulate_in_place(policy)
    config.training_fp8, config.fp8 = config.fp8, None
    no_sync = [chunk.no_sync for chunk in policy]
    config.no_sync_func = no_sync if virtual > 1 else no_sync[0]
    config.finalize_model_grads_func = lambda models, num_tokens, **kwargs: finalize_model_grads(models, None, **kwargs)
    return policy


def _accumulate_in_place(policy: list) -> None:
    """Let Transformer Engine's layers add weight gradients to DDP's buffers themselves.

    Megatron-Core's switch for it, gradient_accumulation_fusion, also applies to the output head, which needs apex then.
    """
    for chunk in policy:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def _build_frozen(args: ModelArgs, num_layers: int, overrides: dict, has_head: bool):
    """A model of the lowest `num_layers` layers without gradients, split evenly over the pipeline.

    It has one stage on each rank, even where the policy has virtual stages.
    """
    interleaved = ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm")
    overrides = {name: value for name, value in overrides.items() if name not in interleaved}
    split = balanced_split(num_layers, overrides.get("pipeline_model_parallel_size", 1))
    return _freeze(_build_stage(args, _config(args, split, overrides), split, has_head=has_head))


def build_start(args: ModelArgs, **overrides):
    """The start: a whole model without gradients, the frozen starting policy of the KL term."""
    return _build_frozen(args, args.num_layers, overrides, has_head=True)


def build_encoder(args: ModelArgs, deepest_layer: int, **overrides):
    """The encoder: the layers up to the deepest feature layer, no final norm, no output head, no gradients."""
    return _build_frozen(args, deepest_layer, overrides, has_head=False)


def build_skeleton(args: ModelArgs) -> Decoder:
    """A whole float32 model whose parameters have shapes but no memory, to be filled one module at a time."""
    config = _config(args, [args.num_layers], dict(
        perform_initialization=False, transformer_impl="local", attention_kernel="sdpa"))  # others take no meta device
    with torch.device("meta"):
        return _freeze(_stage(args, config, [args.num_layers]))


def _freeze(model):
    model.eval()
    return model.requires_grad_(False)
