"""Construction of policy and encoder on Megatron-Core: the one place that knows GPTModel and its layer specs.

1. `ModelArgs` is the architecture: what a checkpoint records and `--use-checkpoint-args` restores.
2. Rotary embeddings take explicit positions, and GPTModel's take none: it is built without. Every stage computes a
   pass's angles once (`PositionRotary`) and hands them to its core attentions beside the pattern (attention.py).
3. What is read out of the final hidden states is the caller's choice: `labels` is a readout (log_probabilities.py), so
   that the output head runs only where it is needed and no full-vocabulary tensor leaves the model.
4. The encoder is the same GPTModel without the layers above the deepest feature layer, final norm and output head.
5. Layers are Transformer Engine's or Megatron-Core's own, as kernels.py decides; the core attention is ours in both.
   Names in checkpoints are those of Transformer Engine's layers, whose linears hold the norms before them; names of
   parameters are not, so nothing but sharded state dicts may carry weights from one run to another.
6. A pipeline's split is always spelled out (Megatron-Core's `pipeline_model_parallel_layout`), so that the encoder's
   fewer layers can be balanced over the stages on their own.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from megatron_ebft.common.device import device, have_gpu
from megatron_ebft.model import kernels
from megatron_ebft.model.attention import StridedAttention, as_mask
from megatron_ebft.model.rotary import Angles, angles


@dataclass
class ModelArgs:
    """Architecture of policy and encoder; field names are Megatron's flags."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """Ids that exist."""
    padded_vocab_size: int
    """Rows of the embedding, a multiple of --make-vocab-size-divisible-by × the tensor-parallel size: not part of the
    model, other layouts pad otherwise."""
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


def free_fields(architecture: dict) -> set[str]:
    """Fields of an architecture in which a model may differ from the checkpoint whose weights it takes."""
    free = {"init_method_std", "padded_vocab_size"}
    return free | {"max_position_embeddings"} if architecture["position_embedding_type"] == "rope" else free


class PositionRotary(torch.nn.Module):
    """Rotary angles at explicit positions, with Llama 3's frequency scaling where asked for."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = int(args.kv_channels * args.rotary_percent)
        inv_freq = 1.0 / args.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        if args.use_rope_scaling:
            inv_freq = _llama3_scaling(inv_freq, args)
        self.inv_freq = inv_freq.to(device())

    def forward(self, positions_BS: Tensor) -> Angles:
        return angles(positions_BS, self.inv_freq)


def _llama3_scaling(inv_freq: Tensor, args: ModelArgs) -> Tensor:
    """Llama 3.1's rotary scaling: long wavelengths divided by the factor, a smooth ramp between the two cut-offs."""
    turns = args.rope_original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / args.rope_scaling_factor)


@dataclass
class ModelConfig(TransformerConfig):
    """Megatron-Core's configuration and the choice of our attention."""

    attention_kernel: str = "sdpa"
    """`flex` or `sdpa`."""
    training_fp8: str | None = None
    """`fp8` of the training pass (fp8.training), which alone has one."""


def transformer_config(args: ModelArgs, *, transformer_impl: str = "auto", attention_kernel: str = "auto",
                       **overrides) -> ModelConfig:
    """The configuration for `args`; overrides carry precision, parallelism and recomputation.

    Raises:
        ValueError: as kernels.choose.
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
    """Builds torch's RMSNorm or LayerNorm whose parameters Megatron-Core knows to be replicated over the tensor ranks
    (its own wrapper of these norms refuses sequence parallelism)."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LanguageModel(GPTModel):
    """GPTModel whose `labels` argument is a readout: called with the final hidden states [S, B, H] (with sequence
    parallelism this rank's part of S) and the model, it says what is returned."""

    real_vocab_size: int
    """Ids that exist; the rest of the padded vocabulary has probability 0."""
    rotary: PositionRotary | None
    """None: positions are learned embeddings."""

    def forward(self, input_ids: Tensor | None, position_ids: Tensor, attention_mask: Tensor, **kwargs):
        if self.rotary is not None:
            attention_mask = as_mask(attention_mask.pattern, self.rotary(position_ids))
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def _postprocess(self, hidden_states, labels, **unused):
        return labels(hidden_states, self) if self.post_process else hidden_states

    @property
    def vocab_shard(self) -> int:
        """Columns of this rank's logits."""
        return self.vocab_size // self.pg_collection.tp.size()

    @property
    def num_real_ids(self) -> int:
        """How many of this rank's columns are ids; those after them are padding, which no readout may read."""
        first = self.pg_collection.tp.rank() * self.vocab_shard
        return min(max(self.real_vocab_size - first, 0), self.vocab_shard)

    def head(self, hidden_SBH: Tensor) -> Tensor:
        """Logits [S, B, V] of this rank's vocabulary shard, differentiable."""
        return self.output_layer(hidden_SBH, weight=self._tied_weight())[0]

    def select_rows(self, hidden_SBH: Tensor, rows: Tensor | slice) -> Tensor:
        """Hidden states [P, B, H] of these rows of the whole sequence, without gradient."""
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.pg_collection.tp)
        return hidden_SBH[rows]

    def row_logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] of this rank's vocabulary shard, without gradient."""
        tied = self._tied_weight()
        return linear(hidden_RH, self.output_layer.weight if tied is None else tied)

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None


def _block_spec(args: ModelArgs, num_layers: int, transformer_impl: str) -> TransformerBlockSubmodules:
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm as norm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=args.qk_layernorm)
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
        norm = Norm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = StridedAttention
    if args.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def split_layers(num_layers: int, stages: int, first: int | None = None, last: int | None = None,
                 virtual: int = 1) -> list[int]:
    """Decoder layers of each stage, in the order they are passed through (`virtual` times round the pipeline).

    Args:
        first, last: layers of the first and the last stage, where they are not to have an equal share.

    Raises:
        ValueError: naming the flag, when the layers do not divide.
    """
    ends = [x for x in (first, last) if x is not None]
    middle, rest = stages * virtual - len(ends), num_layers - sum(ends)
    if virtual > 1 and ends:
        raise ValueError("--num-virtual-stages-per-pipeline-rank: not with --decoder-first-pipeline-num-layers or "
                         "--decoder-last-pipeline-num-layers")
    if rest < 0:
        raise ValueError(f"--num-layers {num_layers}: fewer than --decoder-first-pipeline-num-layers and "
                         f"--decoder-last-pipeline-num-layers give to the ends, {sum(ends)}")
    if rest % middle if middle else rest:
        raise ValueError(f"--num-layers {num_layers}: cannot be split evenly over --pipeline-model-parallel-size "
                         f"{stages}" + (f" × --num-virtual-stages-per-pipeline-rank {virtual}" if virtual > 1 else "") +
                         "; change one of them, or give the ends a share of their own with "
                         "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers")
    split = [rest // middle if middle else 0] * (stages * virtual)
    if first is not None:
        split[0] = first
    if last is not None:
        split[-1] = last
    return split


def balanced_split(num_layers: int, stages: int) -> list[int]:
    """Any number of layers, as evenly as it goes; the encoder's split, which has fewer layers than the policy."""
    return [num_layers // stages + (stage < num_layers % stages) for stage in range(stages)]


def _usual_strides(module, inputs, embedded_SBH: Tensor) -> Tensor:
    """The same view of memory with the strides of a fresh tensor.

    For B = 1 a transposed embedding counts as contiguous with any stride of that dimension. It passes down the residual
    stream, and torch.matmul then multiplies by a frozen weight token by token, from a copy of the weight for each.
    """
    return embedded_SBH.flatten(0, 1).unflatten(0, embedded_SBH.shape[:2])


def _build_gpt(args: ModelArgs, config: TransformerConfig, split: list[int], vp_stage: int = 0, *, has_head=True):
    """This rank's stage of a model split as `split_layers` says, on its device."""
    model = _assemble(args, config, split, vp_stage, has_head)
    model.to(device())
    return Float16Module(config, model) if config.bf16 else model


def _assemble(args: ModelArgs, config: TransformerConfig, split: list[int], vp_stage: int = 0,
              has_head: bool = True) -> LanguageModel:
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), config.pipeline_model_parallel_size
    place = vp_stage * stages + stage
    rope = args.position_embedding_type == "rope"
    is_virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    model = LanguageModel(
        config=config, transformer_layer_spec=_block_spec(args, split[place], config.transformer_impl),
        vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings, pre_process=place == 0,
        post_process=has_head and place == len(split) - 1, parallel_output=True,
        share_embeddings_and_output_weights=has_head and not args.untie_embeddings_and_output_weights,
        position_embedding_type="none" if rope else args.position_embedding_type,
        vp_stage=vp_stage if is_virtual else None)
    if model.pre_process:
        model.embedding.register_forward_hook(_usual_strides)
    model.rotary = PositionRotary(args) if rope else None
    model.real_vocab_size = args.vocab_size
    return model


def _config(args: ModelArgs, split: list[int], overrides: dict) -> TransformerConfig:
    """The configuration of a model whose stages have these many layers."""
    stages = [["decoder"] * layers for layers in split]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    layout = stages if len(split) > 1 else None
    return transformer_config(args, **{**overrides, "num_layers": sum(split), "pipeline_model_parallel_layout": layout})


def build_policy(args: ModelArgs, ddp: DistributedDataParallelConfig, *, first_stage_layers: int | None = None,
                 last_stage_layers: int | None = None, **overrides) -> list:
    """The trained model's stages on this rank: one DDP-wrapped LanguageModel per virtual pipeline stage.

    Losses are divided by global token counts before the backward pass, so gradients are plain sums.
    """
    virtual = overrides.get("virtual_pipeline_model_parallel_size") or 1
    split = split_layers(args.num_layers, overrides.get("pipeline_model_parallel_size", 1), first_stage_layers,
                         last_stage_layers, virtual)
    config = _config(args, split, overrides)
    policy = [DistributedDataParallel(config, ddp, _build_gpt(args, config, split, vp_stage),
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
    """Let Transformer Engine's layers add weight gradients to the buffers of DDP themselves.

    Megatron-Core's switch for it, gradient_accumulation_fusion, is also the output head's, which needs apex for it.
    """
    for chunk in policy:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def _frozen_overrides(overrides: dict) -> dict:
    """A frozen model has one stage on each rank, whatever the policy has."""
    interleaved = ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm")
    return {name: value for name, value in overrides.items() if name not in interleaved}


def build_frozen(args: ModelArgs, **overrides):
    """A whole model without gradients, split evenly over the pipeline: the starting policy."""
    split = balanced_split(args.num_layers, overrides.get("pipeline_model_parallel_size", 1))
    config = _config(args, split, _frozen_overrides(overrides))
    return _freeze(_build_gpt(args, config, split))


def build_encoder(args: ModelArgs, deepest_layer: int, **overrides):
    """The encoder: the lower layers up to the deepest feature layer, no final norm, no output head, no gradients.

    It is split evenly over the pipeline, so its stages hold other layers than the policy's.
    """
    split = balanced_split(deepest_layer, overrides.get("pipeline_model_parallel_size", 1))
    config = _config(args, split, _frozen_overrides(overrides))
    return _freeze(_build_gpt(args, config, split, has_head=False))


def build_skeleton(args: ModelArgs) -> LanguageModel:
    """A whole model in float32 whose parameters have shapes but no memory, to be filled one module at a time."""
    config = _config(args, [args.num_layers], dict(
        perform_initialization=False, transformer_impl="local", attention_kernel="sdpa"))  # others take no meta device
    with torch.device("meta"):
        return _freeze(_assemble(args, config, [args.num_layers]))


def local_layers(model) -> dict[int, torch.nn.Module]:
    """Decoder layers of this rank's stage by their number in the whole model, counted from 1."""
    return {layer.layer_number: layer for layer in unwrap(model).decoder.layers}


def _weights(chunks: list) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank's stages under the names they have in an unsplit model."""
    found = {}
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue  # the last stage's copy of the embedding; see below
            found[name] = parameter
    return found


def copy_weights(source: list, target) -> None:
    """Copy into `target` the weights it has in common with `source`, a policy: its own start, or an encoder of it.

    Their layers may live on different stages: weights go round the pipeline one at a time.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    mine, wanted, filled = _weights(source), _weights([target]), set()
    shapes = {name: tuple(parameter.shape) for name, parameter in mine.items()}
    everywhere = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, shapes, group=group)
    dtype = next(iter(mine.values())).dtype
    with torch.no_grad():
        for stage, there in enumerate(everywhere):
            for name, shape in there.items():
                is_mine = stage == dist.get_rank(group)
                weight = mine[name].detach() if is_mine else torch.empty(shape, dtype=dtype, device=device())
                if len(everywhere) > 1:
                    dist.broadcast(weight, dist.get_global_rank(group, stage), group=group)
                if name in wanted:
                    wanted[name].copy_(weight)
                    filled.add(name)
                tied = unwrap(target).share_embeddings_and_output_weights and unwrap(target).post_process
                if name == "embedding.word_embeddings.weight" and tied and not unwrap(target).pre_process:
                    unwrap(target).output_layer.weight.copy_(weight)
    assert filled == wanted.keys(), wanted.keys() - filled


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
