"""The lines at the top of a run's log: what is about to run."""

import math

import megatron.core
import torch

from megatron_ebft import __version__
from megatron_ebft.common.device import have_gpu, peak_tflops
from megatron_ebft.parallel.groups import document_size, dp_size
from megatron_ebft.rollout.schedule import idle_fraction, row_groups
from megatron_ebft.run.configs import why_not_fused
from megatron_ebft.run.flags.checks import why_separate
from megatron_ebft.run.state import Run

LAUNCH_SECONDS = 2.85e-3
"""What the host needs to launch one layer of one decoding step. Measured on an H100 in rollouts without gradient of
Llama 3.2 1B: 365 ms for 8 steps of 16 layers, most of it waiting for launches (tests/gpu/README.md)."""
PEAK_SHARE = 0.6
"""The part of its peak that the GPU reached in rollouts of 8B while it was busy."""


def mixed_precision(args) -> str:
    """A warning that only one of rollouts and training runs in FP8."""
    sides = "--ebft-rollout-fp8 and --fp8-format set the two sides"
    if args.fp8_format:
        return ("note: the training pass runs in FP8 and rollouts do not. Published runs had FP8 in both or in "
                f"rollouts alone; {sides}")
    return ("note: rollouts run in FP8 and the training pass does not. In published runs this mix lost accuracy, with "
            f"and without importance weights, and FP8 in both did not; {sides}")


def rows_to_hide_launches(parameters: int, layers: int, rollouts: int, peak: float) -> float:
    """The smallest micro-batch, in rows, whose decoding step takes a GPU longer than the host's launches.

    Args:
        parameters: of a rank.
        rollouts: of a row that decode together.
        peak: TFLOP/s.
    """
    return layers * LAUNCH_SECONDS / (2 * parameters * rollouts / (PEAK_SHARE * peak * 1e12))


def launch_estimate(args, parameters: int, rollouts: int, gpu: str) -> list[str]:
    """A line on the micro-batches for which a fused step would wait for launches. None where it cannot run or was
    declined, or without a GPU of known speed. Arguments as for `rows_to_hide_launches`."""
    peak = peak_tflops(gpu, "bf16" if args.bf16 else "fp32")
    if peak is None or args.ebft_step == "separate" or why_separate(args):
        return []
    rows = math.ceil(rows_to_hide_launches(parameters, args.num_layers, rollouts, peak))
    return [f"estimate: a fused step waits for kernel launches if --micro-batch-size, here {args.micro_batch_size}, is "
            f"below {rows}"]


def describe(run: Run) -> str:
    """What is about to run, in two or three lines."""
    parameters = sum(p.numel() for chunk in run.policy for p in chunk.parameters())
    where = torch.cuda.get_device_name() if have_gpu() else "CPU"
    args = run.args
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    kernels = run.policy[0].config
    lines = [f"megatron_ebft {__version__} | {run.mode} | tensor {args.tensor_model_parallel_size}"
             f"{' with sequence' if args.sequence_parallel else ''} × pipeline {stages}"
             f"{f' × {virtual} virtual' if virtual > 1 else ''} × data {dp_size()} ranks on {where} | torch "
             f"{torch.__version__}, megatron-core {megatron.core.__version__}, {kernels.transformer_impl} layers, "
             f"{kernels.attention_kernel} attention | {parameters / 1e6:.3g} M parameters on a rank"]
    if run.mode == "ebft":
        layout, encoder = run.config.layout, run.metadata["encoder"]
        lines.append(f"rows of {layout.seq_length} tokens: {layout.num_blocks} blocks × {run.config.num_samples} "
                     f"rollouts × {layout.rollout_length} tokens | features of layers "
                     f"{run.config.feature_map.layers} of {encoder['origin']} ({encoder['fingerprint']})")
        lines.append("fused step: the pass that samples is differentiated" if run.config.fused else
                     f"separate passes for sampling and training: {why_not_fused(args)}")
        blocks = run.config.blocks_per_microbatch or layout.num_blocks
        lines += launch_estimate(args, parameters, blocks * layout.num_samples, where)
        if stages > 1:
            groups = len(row_groups(args.global_batch_size // document_size(), stages, args.ebft_rollout_rows))
            idle = idle_fraction(groups, stages, layout.rollout_length, virtual)
            lines.append(f"rollouts: {groups} groups of rows over {stages} stages, which idle {idle:.1%} of the time "
                         "if all steps take equally long")
        if (run.config.sampling.fp8.recipe != "off") != bool(args.fp8_format):
            lines.append(mixed_precision(args))
    if run.rlvr is not None:
        questions, generation = run.rlvr.questions, run.rlvr.config.generation
        lines.append(f"{len(questions)} questions of {args.ebft_questions} ({questions.content_hash}) × "
                     f"{generation.num_samples} completions of up to {generation.max_new_tokens} tokens | rewards by "
                     f"{args.ebft_verifier}, advantages by {run.rlvr.config.advantage}")
        if (generation.fp8.recipe != "off") != bool(args.fp8_format):
            lines.append(mixed_precision(args))
    if run.counted is not None:
        blocks = "" if run.counted.blocks is None else f"{run.counted.blocks:.2%} of the blocks and "
        lines.append(f"{blocks}{run.counted.tokens:.2%} of the gold tokens count, in {run.counted.rows} rows of the "
                     "training data")
    if args.ebft_replay_steps:
        lines.append(f"documents and rollouts are those of the steps in {args.ebft_replay_steps}")
    if run.state.iteration:
        changed = f", with other flags: {', '.join(run.metadata['changed'])}" if run.metadata["changed"] else ""
        decay = "" if args.lr_decay_style == "constant" else (
            f"; {args.lr_decay_style} decay to --min-lr {args.min_lr:g} at step {args.train_iters}")
        lines.append(f"continues {run.args.load} after step {run.state.iteration}{changed}{decay}")
    return "\n".join(lines)
