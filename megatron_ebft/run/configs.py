"""The typed configurations that the rest of the code takes, made from the flags.

Flags that cannot be right by themselves are refused before (run/flags/checks.py). What a machine cannot run, and sizes
that need the architecture, are refused here: a ValueError names the flag before any GPU time is spent.
"""

import argparse
import dataclasses
import math

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_ebft.common.device import have_gpu, memory_bytes
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.layout.strided import ROW_SIZES, StridedLayout
from megatron_ebft.method.config import EBFTConfig, RLVRConfig
from megatron_ebft.method.features import FeatureMap
from megatron_ebft.model import flex_attention, kernels
from megatron_ebft.model.architecture import ModelArgs, feature_layers, matrix_elements, split_layers
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.model.fp8_sizes import BLOCK, ROWS
from megatron_ebft.rollout.generation import GenerationConfig
from megatron_ebft.rollout.sampler import SamplingConfig
from megatron_ebft.rollout.stop_strings import StopStrings
from megatron_ebft.run.flags.checks import fp8_recipes, fp8_row_multiple, require_multiple, why_separate
from megatron_ebft.run.flags.flag import spelled
from megatron_ebft.run.flags.precision import COMPLETIONS


def model_args(args: argparse.Namespace, vocab_size: int) -> ModelArgs:
    """The architecture the flags describe, for a tokenizer of `vocab_size` ids.

    Raises:
        ValueError: a size is missing or does not divide.
    """
    for flag in ("num_layers", "hidden_size", "num_attention_heads"):
        if vars(args)[flag] is None:
            raise ValueError(f"{spelled(flag)}: give it, or --use-checkpoint-args with a checkpoint")
    hidden, heads = args.hidden_size, args.num_attention_heads
    groups = args.num_query_groups or heads
    if args.kv_channels is None and hidden % heads:
        raise ValueError(f"--hidden-size {hidden}: must be a multiple of --num-attention-heads {heads}")
    if heads % groups:
        raise ValueError(f"--num-attention-heads {heads}: must be a multiple of --num-query-groups {groups}")
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    derived = dict(
        ffn_hidden_size=args.ffn_hidden_size or (math.ceil(hidden * 8 / 3 / 64) * 64 if args.swiglu else 4 * hidden),
        num_query_groups=groups, kv_channels=args.kv_channels or hidden // heads, vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / multiple) * multiple,
        max_position_embeddings=args.max_position_embeddings or args.seq_length)
    rotated = int(derived["kv_channels"] * args.rotary_percent)
    if args.position_embedding_type == "rope" and (rotated < 2 or rotated % 2):
        raise ValueError(f"--rotary-percent {args.rotary_percent}: rotates {rotated} of the {derived['kv_channels']} "
                         "dimensions of a head (--kv-channels); this must be an even number, and at least 2")
    for flag, value in (("num-attention-heads", heads), ("num-query-groups", groups),
                        ("ffn-hidden-size", derived["ffn_hidden_size"])):
        if value % args.tensor_model_parallel_size:
            raise ValueError(f"--{flag} {value}: must be a multiple of --tensor-model-parallel-size "
                             f"{args.tensor_model_parallel_size}")
    slices = args.tensor_model_parallel_size * args.ebft_sample_parallel_size
    if hidden % slices:
        raise ValueError(f"--hidden-size {hidden}: must be a multiple of --tensor-model-parallel-size × "
                         f"--ebft-sample-parallel-size, {slices}")
    split_layers(args.num_layers, args.pipeline_model_parallel_size, args.decoder_first_pipeline_num_layers,
                 args.decoder_last_pipeline_num_layers, args.num_virtual_stages_per_pipeline_rank)
    flags = {f.name: vars(args)[f.name] for f in dataclasses.fields(ModelArgs) if f.name not in derived}
    architecture = ModelArgs(**flags, **derived)
    check_fp8_sizes(args, architecture)
    return architecture


def check_memory(args: argparse.Namespace, architecture: ModelArgs) -> None:
    """ValueError if the policy's weights alone, shared out evenly, are larger than a rank's memory.

    Such a model would fail after minutes, in the middle of its construction.
    """
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    needed = matrix_elements(architecture) / ranks * _dtype(args).itemsize
    if needed > memory_bytes():
        sizes = " ".join(f"{spelled(name)} {vars(architecture)[name]}" for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
            "max_position_embeddings"))
        raise ValueError(f"{sizes}, {architecture.padded_vocab_size} token ids: the weights take {needed / 1e9:.3g} GB "
                         f"on each rank, which has {memory_bytes() / 1e9:.3g} GB: correct the sizes, or raise "
                         "--tensor-model-parallel-size or --pipeline-model-parallel-size")


def check_rollouts(args: argparse.Namespace, architecture: ModelArgs, layout: StridedLayout) -> None:
    """ValueError if the keys and values of one row's rollouts alone are larger than a rank's memory."""
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    in_a_token = 2 * architecture.num_layers * architecture.num_query_groups * architecture.kv_channels / ranks
    rollouts = layout.num_blocks * layout.num_samples
    needed = rollouts * (8 * layout.rollout_length + (layout.rollout_length - 1) * in_a_token * _dtype(args).itemsize)
    if needed > memory_bytes():
        raise ValueError(f"--ebft-num-samples {args.ebft_num_samples}: the {rollouts} rollouts of a row take "
                         f"{needed / 1e9:.3g} GB on each rank, which has {memory_bytes() / 1e9:.3g} GB: lower it, "
                         "or raise --ebft-stride or --ebft-sample-parallel-size")


def _dtype(args: argparse.Namespace) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if args.bf16 else torch.float32


def transformer_overrides(args: argparse.Namespace) -> dict:
    """Fields of TransformerConfig outside the architecture, for policy, encoder and start: precision, parallelism,
    recomputation and kernels."""
    dtype, recompute = _dtype(args), {}
    if args.recompute_granularity == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif args.recompute_granularity == "selective":
        recompute = dict(recompute_granularity="selective")
    # Interleaved stages send unbatched: batched, two stages mix up forward and backward messages of the same two ranks.
    p2p = dict(overlap_p2p_comm=True, batch_p2p_comm=False) if virtual_stages(args) else {}
    return dict(bf16=args.bf16, params_dtype=dtype, pipeline_dtype=dtype,
                tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=args.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=virtual_stages(args), sequence_parallel=args.sequence_parallel,
                deterministic_mode=args.deterministic_mode, transformer_impl=args.transformer_impl,
                attention_kernel=args.ebft_attention, **p2p, **recompute)


def policy_overrides(args: argparse.Namespace) -> dict:
    """`transformer_overrides` for the policy, with FP8 in training and the layers of its first and last stage."""
    return {**transformer_overrides(args), **training_fp8(args),
            "first_stage_layers": args.decoder_first_pipeline_num_layers,
            "last_stage_layers": args.decoder_last_pipeline_num_layers}


def parallel_sizes(args: argparse.Namespace) -> dict:
    """The arguments of `init_parallel`."""
    return dict(tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=args.pipeline_model_parallel_size, seed=args.seed,
                timeout_minutes=args.distributed_timeout_minutes,
                virtual_pipeline_model_parallel_size=virtual_stages(args),
                sample_parallel_size=args.ebft_sample_parallel_size, is_deterministic=args.deterministic_mode)


def virtual_stages(args: argparse.Namespace) -> int | None:
    """Virtual pipeline stages of a rank as Megatron-Core counts them: None for one."""
    virtual = args.num_virtual_stages_per_pipeline_rank
    return virtual if virtual > 1 else None


def ddp_config(args: argparse.Namespace) -> DistributedDataParallelConfig:
    """Gradients reduced in float32, sharded over the data-parallel ranks."""
    return DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True,
                                         overlap_grad_reduce=args.overlap_grad_reduce)


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    """AdamW with Megatron's distributed optimizer."""
    overrides = transformer_overrides(args)
    return OptimizerConfig(
        optimizer="adam", lr=args.lr, min_lr=args.min_lr, weight_decay=args.weight_decay, adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2, adam_eps=args.adam_eps, clip_grad=args.clip_grad, bf16=args.bf16,
        params_dtype=overrides["params_dtype"], use_distributed_optimizer=True)


def ebft_config(args: argparse.Namespace, num_layers: int) -> EBFTConfig:
    """The method's configuration for an encoder made from a model of `num_layers`.

    Raises:
        ValueError: naming the flag.
    """
    multiple, tiles = row_multiple(args), math.lcm(row_multiple(args), flex_attention.TILE)
    require_multiple(args, multiple)
    is_known = args.hidden_size and args.num_attention_heads  # else a checkpoint's architecture is still to be read
    head_dim = args.kv_channels or (args.hidden_size // args.num_attention_heads if is_known else 128)
    kernel = kernels.choose(args.transformer_impl, args.ebft_attention, dtype=_dtype(args),
                            head_dim=head_dim).attention_kernel
    if kernel == "flex" and args.seq_length % tiles == 0:
        multiple = tiles  # FlexAttention then pads no queries, keys and values
    row_sizes = flex_attention.ROW_SIZES if kernel == "flex" else ROW_SIZES
    layout = StridedLayout(args.seq_length, args.ebft_context_length, args.ebft_stride, args.ebft_rollout_length,
                           args.ebft_num_samples // args.ebft_sample_parallel_size, pad_to=multiple,
                           row_sizes=row_sizes)
    return EBFTConfig(
        layout=layout,
        sampling=SamplingConfig(args.ebft_temperature, args.ebft_top_p, args.ebft_top_k, args.seed,
                                fp8_config(args, "rollout")),
        feature_map=FeatureMap(feature_layers(args.ebft_feature_layers, num_layers), args.ebft_feature_norm,
                               args.ebft_feature_pooling),
        whitening=args.ebft_whitening, advantage=args.ebft_advantage, alignment_coef=args.ebft_alignment_coef,
        diversity_coef=args.ebft_diversity_coef, rl_coef=args.ebft_rl_coef, ce_coef=args.ebft_ce_coef,
        kl_coef=args.ebft_kl_coef, kl_estimator=args.ebft_kl_estimator, micro_batch_size=args.micro_batch_size,
        blocks_per_microbatch=args.ebft_blocks_per_microbatch, rollout_rows=args.ebft_rollout_rows,
        importance_cap=args.ebft_importance_cap, encoder_fp8=fp8_config(args, "encoder"),
        skip_duplicates=args.ebft_skip_duplicates and not (args.ebft_dump_steps or args.ebft_replay_steps),
        fused=why_not_fused(args) == "")


def rlvr_config(args: argparse.Namespace, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> RLVRConfig:
    """The configuration of RLVR, for completions that end with one of these ids.

    Raises:
        ValueError: naming the flag.
    """
    require_multiple(args, row_multiple(args))
    generation = GenerationConfig(
        max_new_tokens=args.ebft_max_new_tokens, temperature=args.ebft_rlvr_temperature, top_p=args.ebft_top_p,
        top_k=args.ebft_top_k, seed=args.seed, num_samples=args.ebft_rlvr_num_samples, end_ids=end_ids,
        rows=args.ebft_rollout_rows or COMPLETIONS, pad_to=row_multiple(args), fp8=fp8_config(args, "rollout"),
        stops=stop_strings(args, tokenizer))
    return RLVRConfig(
        generation=generation, advantage=args.ebft_advantage, rl_coef=args.ebft_rl_coef, kl_coef=args.ebft_kl_coef,
        kl_estimator=args.ebft_kl_estimator, importance_cap=args.ebft_importance_cap, row_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        rows_multiple=args.pipeline_model_parallel_size if virtual_stages(args) else 1)


def stop_strings(args: argparse.Namespace, tokenizer: Tokenizer) -> StopStrings | None:
    """The texts that end a completion; None without --ebft-stop."""
    return StopStrings(args.ebft_stop, tokenizer) if args.ebft_stop else None


def why_not_fused(args: argparse.Namespace) -> str:
    """Why steps are computed in separate passes, or "" where they are fused."""
    if args.ebft_step == "separate":
        return "--ebft-step separate"
    is_unmeasured = args.ebft_step == "auto" and have_gpu()
    return why_separate(args) or ("on a GPU the fused step has not been measured; --ebft-step fused tries it"
                                  if is_unmeasured else "")


def fp8_config(args: argparse.Namespace, part: str) -> FP8:
    """FP8 of the `rollout` or of the `encoder`.

    Raises:
        ValueError: naming the flag, if this machine cannot run it.
    """
    at_start, at_end = _bf16_layers(args)
    fp8 = FP8(vars(args)[f"ebft_{part}_fp8"], args.ebft_fp8_emulate, at_start, at_end, f"--ebft-{part}-fp8")
    fp8.check(_why_no_te_layers(args))
    return fp8


def training_fp8(args: argparse.Namespace) -> dict:
    """Fields of TransformerConfig for a training pass in FP8; none without --fp8-format.

    Raises:
        ValueError: naming the flag, if this machine cannot run it.
    """
    if args.fp8_format is None:
        return {}
    missing = _why_no_te_layers(args) or kernels.available().no_fp8[args.fp8_recipe]
    if missing:
        raise ValueError(f"--fp8-format {args.fp8_format}: {missing}. The training pass has no FP8 without Transformer "
                         "Engine (--ebft-fp8-emulate is for rollouts and encoder)")
    at_start, at_end = _bf16_layers(args)
    return dict(fp8=args.fp8_format, fp8_recipe=args.fp8_recipe, first_last_layers_bf16=args.first_last_layers_bf16,
                num_layers_at_start_in_bf16=at_start, num_layers_at_end_in_bf16=at_end)


def _bf16_layers(args) -> tuple[int, int]:
    """Number of layers at the start and at the end that stay out of FP8."""
    return (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) if args.first_last_layers_bf16 else (0, 0)


def _why_no_te_layers(args) -> str:
    """Why layers are not Transformer Engine's, or ""."""
    if args.transformer_impl == "local":
        return "--transformer-impl local has none of its layers"
    return kernels.no_transformer_engine(_dtype(args))


def row_multiple(args: argparse.Namespace) -> int:
    """Rows and decoding steps have a multiple of this many tokens on this machine."""
    return args.tensor_model_parallel_size * BLOCK if _gathers_blocks(args) else fp8_row_multiple(args)


def _gathers_blocks(args) -> bool:
    """Whether tensor ranks that split rows must each have whole blocks of FP8."""
    is_blockwise = "blockwise" in fp8_recipes(args).values() and not args.ebft_fp8_emulate
    return is_blockwise and args.sequence_parallel and kernels.gathers_whole_blocks()


def check_fp8_sizes(args: argparse.Namespace, architecture: ModelArgs) -> None:
    """Check the architecture against what FP8 products take.

    Raises:
        ValueError: naming the flag: a tensor rank's part of a matrix has a size that FP8 products do not take, or more
            layers stay out of FP8 in training than Megatron-Core allows.
    """
    if not fp8_recipes(args) or args.ebft_fp8_emulate:
        return
    tp, head = args.tensor_model_parallel_size, architecture.kv_channels
    for flag, size, multiple in (
            ("--hidden-size", architecture.hidden_size, BLOCK if _gathers_blocks(args) else ROWS),
            ("--ffn-hidden-size", architecture.ffn_hidden_size, tp * ROWS),
            ("--num-attention-heads × --kv-channels", architecture.num_attention_heads * head, tp * ROWS),
            ("--num-query-groups × --kv-channels", architecture.num_query_groups * head, tp * ROWS)):
        if size % multiple:
            raise ValueError(f"{flag} {size}: with {', '.join(fp8_recipes(args))} it must be a multiple of {multiple}")
    most = architecture.num_layers // args.pipeline_model_parallel_size
    for end, layers in zip(("start", "end"), _bf16_layers(args)):
        if args.fp8_format and layers > most:
            raise ValueError(f"--num-layers-at-{end}-in-bf16 {layers}: must be from 0 to the layers of a pipeline "
                             f"stage, {most}")
