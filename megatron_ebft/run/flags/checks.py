"""What is wrong with flags alone, before a file is read or torch is imported.

Each `_check_…` function raises ValueError, naming the flag, where flags contradict each other. What depends on the
machine or on files is checked where it is used: run/configs.py, run/build.py.
"""

import argparse
import math
import os
import sys

from megatron_ebft.model.fp8_sizes import BLOCK, ROWS
from megatron_ebft.run.flags.flag import dest, in_float32
from megatron_ebft.run.flags.refused import REFUSED
from megatron_ebft.run.flags.table import FLAGS

WITHOUT_ROLLOUTS = {"sft": "next-token training has no rollouts", "rlvr": "RLVR has no rollouts of blocks"}
"""What other modes lack, for errors."""


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags, if nothing about them alone is wrong. Turns --sequence-parallel off where it has no effect.

    Raises:
        ValueError: naming the flag and its value.
    """
    _check_refused(args)
    for name, flag in FLAGS.items():
        flag.check(vars(args)[name])
    _check_parallelism(args)
    _check_row_length(args)
    _check_batch(args)
    _check_schedule(args)
    _check_blocks(args)
    _check_questions(args)
    _check_dumped_steps(args)
    _check_step(args)
    _check_logging(args)
    _check_observing(args)
    if args.use_checkpoint_args and not (args.load or args.pretrained_checkpoint):
        raise ValueError("--use-checkpoint-args: needs --load or --pretrained-checkpoint to take them from")
    return args


def _check_refused(args) -> None:
    for name, reason in REFUSED.items():
        value = vars(args)[dest(name)]
        if value is not None and not (value == "1" and name.endswith("-parallel-size")):
            raise ValueError(f"{name}{'' if value == 'on' else ' ' + value}: {reason}")


def _check_parallelism(args) -> None:
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False  # as Megatron does, so that a job script's size may be set to 1
        if os.environ.get("RANK", "0") == "0":
            print("note: --sequence-parallel has no effect at --tensor-model-parallel-size 1", file=sys.stderr)
    if args.pipeline_model_parallel_size == 1:
        for name in ("num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers",
                     "decoder_last_pipeline_num_layers"):
            if vars(args)[name] != FLAGS[name].default:
                raise ValueError(f"{FLAGS[name].name}: needs --pipeline-model-parallel-size above 1")
    samples, ranks = args.ebft_num_samples, args.ebft_sample_parallel_size
    if samples % ranks:
        raise ValueError(f"--ebft-sample-parallel-size {ranks}: must divide --ebft-num-samples {samples}")
    if ranks > 1 and args.training_mode != "ebft":
        raise ValueError(f"--ebft-sample-parallel-size {ranks}: {WITHOUT_ROLLOUTS[args.training_mode]} to split")


def _check_row_length(args) -> None:
    length, ranks = args.seq_length, args.tensor_model_parallel_size
    if args.sequence_parallel and length % ranks:
        raise ValueError(f"--seq-length {length}: with --sequence-parallel it must be a multiple of "
                         f"--tensor-model-parallel-size {ranks}")
    require_multiple(args, fp8_row_multiple(args))


def reads_rows(args: argparse.Namespace) -> bool:
    """Whether a run reads rows of gold tokens: always, but in rlvr only for evaluation, where data are given."""
    return args.training_mode != "rlvr" or bool(args.eval_interval and (args.data_path or args.valid_data_path))


def _check_batch(args) -> None:
    if reads_rows(args) and args.global_batch_size % args.micro_batch_size:
        raise ValueError(f"--global-batch-size {args.global_batch_size}: must be a multiple of --micro-batch-size "
                         f"{args.micro_batch_size}")


def _check_schedule(args) -> None:
    if args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr}: must not be above --lr {args.lr}")
    for value, text in ((args.lr / (1 - args.adam_beta1), "/ (1 − --adam-beta1)"),
                        (args.lr * args.weight_decay, f"× --weight-decay {args.weight_decay}")):
        if not math.isfinite(in_float32(value)):
            raise ValueError(f"--lr {args.lr}: a step of AdamW, --lr {text}, is beyond float32; lower it")
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ValueError("--override-opt-param-scheduler takes the schedule of the flags, "
                         "--use-checkpoint-opt-param-scheduler that of the checkpoint: give one of the two")


def _check_blocks(args) -> None:
    if args.training_mode != "ebft" and args.ebft_encoder_load is None:
        return  # no blocks
    if args.seq_length < args.ebft_context_length + args.ebft_rollout_length:
        raise ValueError(f"--seq-length {args.seq_length} is too short for one block: it needs at least "
                         f"--ebft-context-length {args.ebft_context_length} + --ebft-rollout-length "
                         f"{args.ebft_rollout_length} tokens")
    if args.training_mode == "ebft" and args.ebft_num_samples < 2 and args.ebft_advantage != "reinforce":
        raise ValueError(f"--ebft-num-samples {args.ebft_num_samples} with --ebft-advantage {args.ebft_advantage}: "
                         "needs at least 2 rollouts of a block; use --ebft-advantage reinforce for one")


def _check_questions(args) -> None:
    if args.training_mode != "rlvr" and args.ebft_questions:
        raise ValueError(f"--ebft-questions {args.ebft_questions}: needs --training-mode rlvr; evaluation reads "
                         "--ebft-eval-questions")
    if "" in (args.ebft_stop or ()):
        raise ValueError("--ebft-stop '': an empty text is in every completion; leave it out")
    _check_eval_questions(args)
    if args.training_mode != "rlvr":
        return
    for name in ("ebft_questions", "ebft_verifier"):
        if not vars(args)[name]:
            raise ValueError(f"--training-mode rlvr: needs {FLAGS[name].name}")
    if args.ebft_max_new_tokens >= args.seq_length:
        raise ValueError(f"--ebft-max-new-tokens {args.ebft_max_new_tokens}: leaves no room for a prompt in rows of "
                         f"--seq-length {args.seq_length}; raise --seq-length, or lower it")
    if args.ebft_rlvr_num_samples < 2 and args.ebft_advantage != "reinforce":
        raise ValueError(f"--ebft-rlvr-num-samples {args.ebft_rlvr_num_samples} with --ebft-advantage "
                         f"{args.ebft_advantage}: needs at least 2 completions of a question; use --ebft-advantage "
                         "reinforce for one")


def _check_eval_questions(args) -> None:
    given, verifier = args.ebft_eval_questions, args.ebft_verifier
    if given and not verifier:
        raise ValueError(f"--ebft-eval-questions {given}: needs --ebft-verifier")
    if verifier and not given and args.training_mode != "rlvr":
        raise ValueError(f"--ebft-verifier {verifier}: needs --ebft-eval-questions or --training-mode rlvr")
    if given and args.eval_interval == 0:
        raise ValueError(f"--ebft-eval-questions {given}: --eval-interval 0 turns evaluation off")
    if args.ebft_eval_samples and not given:
        raise ValueError(f"--ebft-eval-samples {args.ebft_eval_samples}: needs --ebft-eval-questions")
    if args.ebft_pass_at and max(args.ebft_pass_at) > args.ebft_eval_samples:
        raise ValueError(f"--ebft-pass-at {max(args.ebft_pass_at)}: needs as many samples; --ebft-eval-samples is "
                         f"{args.ebft_eval_samples}")


def _check_dumped_steps(args) -> None:
    for name in ("ebft_dump_steps", "ebft_replay_steps"):
        if vars(args)[name] and args.training_mode != "ebft":
            raise ValueError(f"{FLAGS[name].name}: {WITHOUT_ROLLOUTS[args.training_mode]}; leave the flag out")
    if args.ebft_dump_steps and args.ebft_dump_steps == args.ebft_replay_steps:
        raise ValueError(f"--ebft-dump-steps {args.ebft_dump_steps}: would overwrite the steps that "
                         "--ebft-replay-steps reads")


def _check_logging(args) -> None:
    for name in ("wandb_exp_name", "wandb_save_dir"):
        if vars(args)[name] and not args.wandb_project:
            raise ValueError(f"{FLAGS[name].name} {vars(args)[name]}: needs --wandb-project")
    interval = args.ebft_save_hf_interval
    if interval and not args.save:
        raise ValueError(f"--ebft-save-hf-interval {interval}: needs --save")
    if interval % args.save_interval:
        raise ValueError(f"--ebft-save-hf-interval {interval}: must be a multiple of --save-interval "
                         f"{args.save_interval}")


def why_separate(args: argparse.Namespace) -> str:
    """Which flag keeps a step from being fused (--ebft-step), or ""."""
    recipes = {flag: recipe for flag, recipe in fp8_recipes(args).items() if flag != "--ebft-encoder-fp8"}
    if args.pipeline_model_parallel_size > 1:
        return f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}"
    if args.recompute_granularity not in (None, "none"):
        return f"--recompute-granularity {args.recompute_granularity}"
    if recipes:
        return " and ".join(map(" ".join, recipes.items()))
    return f"--ebft-replay-steps {args.ebft_replay_steps}" if args.ebft_replay_steps else ""


def _check_step(args) -> None:
    if args.ebft_step == "fused" and args.training_mode == "ebft" and why_separate(args):
        raise ValueError(f"--ebft-step fused: not with {why_separate(args)}; use auto or separate")


def _check_observing(args) -> None:
    if args.ebft_peak_tflops and not args.log_throughput:
        raise ValueError(f"--ebft-peak-tflops {args.ebft_peak_tflops:g}: needs --log-throughput")
    for name in ("use_pytorch_profiler", "record_memory_history"):
        if vars(args)[name] and not args.profile:
            raise ValueError(f"{FLAGS[name].name}: needs --profile")
    if args.profile and args.profile_step_end <= args.profile_step_start:
        raise ValueError(f"--profile-step-end {args.profile_step_end}: must be above --profile-step-start "
                         f"{args.profile_step_start}")


def fp8_recipes(args: argparse.Namespace) -> dict[str, str]:
    """Recipe of each pass that runs in FP8, by the flag that asks for it."""
    recipes = {"--fp8-format": args.fp8_recipe} if args.fp8_format else {}
    if args.training_mode in ("ebft", "rlvr"):
        recipes["--ebft-rollout-fp8"] = args.ebft_rollout_fp8
    if args.training_mode == "ebft":
        recipes["--ebft-encoder-fp8"] = args.ebft_encoder_fp8
    return {flag: recipe for flag, recipe in recipes.items() if recipe != "off"}


def fp8_row_multiple(args: argparse.Namespace) -> int:
    """Rows and decoding steps have a multiple of this many tokens, on any machine: of the tensor ranks that split them,
    times what FP8 products need."""
    ranks, recipes = args.tensor_model_parallel_size if args.sequence_parallel else 1, fp8_recipes(args)
    if recipes.get("--fp8-format") == "blockwise":
        return ranks * BLOCK
    return ranks * ROWS if recipes else ranks


def require_multiple(args: argparse.Namespace, multiple: int) -> None:
    """ValueError unless --seq-length is a multiple of this many tokens, which FP8 needs."""
    if args.seq_length % multiple:
        each = f" ({multiple // args.tensor_model_parallel_size} on each tensor rank)" if args.sequence_parallel else ""
        raise ValueError(f"--seq-length {args.seq_length}: with {', '.join(fp8_recipes(args))} it must be a multiple "
                         f"of {multiple}{each}")
