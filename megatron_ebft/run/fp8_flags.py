"""The flags of FP8: what they choose, and what they ask of rows, widths and layers.

Where FP8 cannot run, or Transformer Engine would stop at a size, the flag is named before any GPU time is spent.
"""

import argparse

import torch

from megatron_ebft.model import kernels
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.fp8 import BLOCK, FP8, RECIPES, ROWS


def add_fp8(group) -> None:
    """Flags of FP8."""
    add = group.add_argument
    for part, what in (("rollout", "linear layers of the policy while it samples"),
                       ("encoder", "linear layers of the encoder in training")):
        add(f"--ebft-{part}-fp8", choices=RECIPES, default="off", help=f"{what} in FP8: blockwise is the closer one, "
            "tensorwise the faster, whose one scale depends on all rows that are computed together: how they are cut "
            "into micro-batches and what is left out (--ebft-skip-duplicates) then changes the rounding")
    add("--ebft-fp8-emulate", action="store_true", help="round to FP8 and multiply as usual: the same numbers on any "
        "hardware, slowly")
    add("--fp8-format", choices=("e4m3", "hybrid"), help="linear layers of the policy in the training pass in FP8, by "
        "Transformer Engine: e4m3, or e4m3 forward and e5m2 backward; default: not in FP8")
    add("--fp8-recipe", choices=RECIPES[1:], default="blockwise", help="of --fp8-format (delayed scaling would need "
        "its history kept)")
    add("--first-last-layers-bf16", action="store_true", help="the first and last layers stay out of FP8")
    add("--num-layers-at-start-in-bf16", type=int, default=1, help="so many at the beginning")
    add("--num-layers-at-end-in-bf16", type=int, default=1, help="so many at the end (of the encoder: below its "
        "deepest feature layer)")


def fp8_recipes(args: argparse.Namespace) -> dict[str, str]:
    """Recipe of each of the passes that run in FP8, by flag."""
    found = {"--fp8-format": args.fp8_recipe} if args.fp8_format else {}
    if args.training_mode == "ebft":
        found |= {"--ebft-rollout-fp8": args.ebft_rollout_fp8, "--ebft-encoder-fp8": args.ebft_encoder_fp8}
    return {flag: recipe for flag, recipe in found.items() if recipe != "off"}


def fp8_config(args: argparse.Namespace, part: str) -> FP8:
    """What of the `rollout` or of the `encoder` runs in FP8; ValueError, naming the flag, where it cannot."""
    at_start, at_end = _layers_out(args)
    fp8 = FP8(vars(args)[f"ebft_{part}_fp8"], args.ebft_fp8_emulate, at_start, at_end, f"--ebft-{part}-fp8")
    fp8.check(_no_layers(args))
    return fp8


def training_fp8(args: argparse.Namespace) -> dict:
    """Fields of TransformerConfig for a training pass in FP8; ValueError, naming the flag, where it cannot be."""
    if args.fp8_format is None:
        return {}
    missing = _no_layers(args) or kernels.available().no_fp8[args.fp8_recipe]
    if missing:
        raise ValueError(f"--fp8-format {args.fp8_format}: {missing}. The training pass has no FP8 without Transformer "
                         "Engine (--ebft-fp8-emulate is for rollouts and encoder)")
    at_start, at_end = _layers_out(args)
    return dict(fp8=args.fp8_format, fp8_recipe=args.fp8_recipe, first_last_layers_bf16=args.first_last_layers_bf16,
                num_layers_at_start_in_bf16=at_start, num_layers_at_end_in_bf16=at_end)


def _layers_out(args) -> tuple[int, int]:
    """Layers at the start and at the end that stay out of FP8."""
    return (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) if args.first_last_layers_bf16 else (0, 0)


def _no_layers(args) -> str:
    """Why layers are not Transformer Engine's, or ""."""
    if args.transformer_impl == "local":
        return "--transformer-impl local has none of its layers"
    return kernels.no_transformer_engine(torch.bfloat16 if args.bf16 else torch.float32)


def row_multiple(args: argparse.Namespace) -> int:
    """What rows and decoding steps have a multiple of, in tokens: of tensor ranks that share them, and of FP8's."""
    ranks, recipes = args.tensor_model_parallel_size if args.sequence_parallel else 1, fp8_recipes(args)
    if recipes.get("--fp8-format") == "blockwise" or _gathers_blocks(args):
        return ranks * BLOCK
    return ranks * ROWS if recipes else ranks


def _gathers_blocks(args) -> bool:
    is_blockwise = "blockwise" in fp8_recipes(args).values() and not args.ebft_fp8_emulate
    return is_blockwise and args.sequence_parallel and kernels.gathers_whole_blocks()


def check_fp8_sizes(args: argparse.Namespace, architecture: ModelArgs) -> None:
    """ValueError, naming the flag, for sizes of a tensor rank's matrices that FP8's products do not take, and for more
    layers out of it in training than Megatron-Core allows."""
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
    for end, layers in zip(("start", "end"), _layers_out(args)):
        if args.fp8_format and not 0 <= layers <= most:
            raise ValueError(f"--num-layers-at-{end}-in-bf16 {layers}: must be from 0 to the layers of a pipeline "
                             f"stage, {most}")
