"""Cost of an EBFT step against an SFT step: same rows, same model, one run.

    python tools/benchmark.py                                        # the shape of the README's table
    python tools/benchmark.py --shape 8b-quarter                     # a shape by name, on a GPU
    torchrun --nproc-per-node 8 tools/benchmark.py --shape 8b --tensor-model-parallel-size 8 --sequence-parallel
    python tools/benchmark.py --pretrained-checkpoint DIR --data-path PREFIX --seq-length 256  # a trained model, CPU

Weights and rows are random, or come from a checkpoint and a dataset. There are no masks and no KL term. Tokens and
operations are those of one rank. The tool prints a table and, with --json, writes its figures. Every repeat runs an SFT
step, then an EBFT step; the table has medians.

1. Further kinds of steps, each in every repeat:
   "sft, rows at once": if a rank has several micro-batches, an SFT step on all its rows at once. Rows of gold tokens
   are short, and a GPU that takes them one by one may wait for launches.
   "ebft, separate": if EBFT steps are fused (--ebft-step), a step with separate passes for sampling and training.
   "ebft, whole rows": on a CPU, if the first EBFT step skips rollouts (--ebft-skip-duplicates), an EBFT step on the
   same rows that skips none. It shows what skipping is worth. Rollouts of random weights have nothing in common.
   "ebft, no FP8": with --ebft-rollout-fp8 or --ebft-encoder-fp8, an EBFT step with neither.
2. On a GPU, operations and the expected peak of memory come from tools/plan.py, because torch's counter sees neither
   Transformer Engine's kernels nor compiled ones. Attention counts as torch's SDPA in chunks.
3. On a GPU, one more step of each kind is profiled. It gives the share of attention kernels in the GPU's busy time, the
   time of the matrix products of rollouts (without the kernels that quantise activations) and the longest kernels of
   each phase. MFU is relative to the bfloat16 peak.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import plan
import torch
from benchmark_report import (
    AT_ONCE,
    MATRIX_PRODUCT,
    NO_FP8,
    SEPARATE,
    WHOLE,
    attention_share,
    table,
    time_of,
)
from torch.utils import flop_counter

from megatron_ebft.common.device import matmul_rate, peak_tflops
from megatron_ebft.common.disk import aside, write_json
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.data import DATA
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser, as_argv
from megatron_ebft.run.flags.table import FLAGS, STEP
from megatron_ebft.run.plan import attention_flops  # noqa: F401 (registers formulas)

SHAPE = dict(num_layers=8, hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, num_query_groups=4,
             seq_length=512, vocab_size=8192, micro_batch_size=2, global_batch_size=2, ebft_track_kl=False,
             untie_embeddings_and_output_weights=True)
"""The default: small enough for two CPU cores, with all parts of a Llama."""
LLAMA = dict(num_query_groups=8, vocab_size=128256, rotary_base=500000.0, use_rope_scaling=True, seq_length=1024,
             max_position_embeddings=131072, global_batch_size=4, ebft_track_kl=False, bf16=True)
LLAMA_8B = dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                untie_embeddings_and_output_weights=True, **LLAMA)
SHAPES = {
    "small": SHAPE,
    "1b": dict(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, kv_channels=64,
               rope_scaling_factor=32.0, **LLAMA),
    "8b": LLAMA_8B, "8b-quarter": {**LLAMA_8B, "num_layers": 8}}
"""Llama 3.2 1B and 3.1 8B with the paper's blocks (the flags' defaults) in 4 rows, and a quarter of the layers of 8B.
The quarter fits one GPU of 80 GB with optimizer and encoder; head and sampler weigh four times as much in it."""
ROWS_AT_ONCE = 4
"""Largest micro-batch of "sft, rows at once": the logits of 16 rows of 8B do not fit beside the rest."""
BENCHMARK = Group("benchmark", (
    Flag("--shape", str, "model, rows and precision by name; other flags override it", default="small",
         choices=tuple(SHAPES)),
    Flag("--repeats", int, "timed steps of each kind", default=5, valid=at_least(1)),
    Flag("--json", str, "write the figures to this file", metavar="FILE"),
    Flag("--plan", str, "on a GPU, read operations and memory from this file instead of planning, which takes minutes",
         metavar="FILE"),
    Flag("--write-plan", str, "on any machine, only write the file for --plan, for WORLD_SIZE ranks (default 1)",
         metavar="FILE")))
READS = STEP - {"ebft_kl_coef"} | {
    "pretrained_checkpoint", *(name for name in DATA.dests if name not in ("ebft_document_mask", "ebft_answer_only"))}


def build_pretrained(args):
    """A Run on a checkpoint's weights and a dataset, and this rank's rows of each repeat's global batch."""
    from megatron_ebft.run.build import build_run
    from megatron_ebft.run.loop import gold_batch

    args.use_checkpoint_args, args.eval_interval = True, 0
    run = build_run(args)
    return run, [gold_batch(run, run.train_data, i * args.global_batch_size) for i in range(args.repeats)]


def build(args):
    """A Run on random weights, and random rows on this rank, the same for every repeat."""
    from megatron_ebft.common.device import device
    from megatron_ebft.data.micro_batches import GoldBatch
    from megatron_ebft.parallel.groups import document_rank, document_size
    from megatron_ebft.run.configs import ebft_config, model_args
    from megatron_ebft.run.models import build_models, build_optimizer
    from megatron_ebft.run.state import Run

    config = ebft_config(args, args.num_layers)
    models = build_models(args, model_args(args, args.vocab_size), config)
    optimizer, scheduler = build_optimizer(args, models.policy)
    run = Run(mode="ebft", policy=models.policy, encoder=models.encoder, optimizer=optimizer, scheduler=scheduler,
              config=config, args=args)
    rows = args.global_batch_size // document_size()
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(0, args.vocab_size, (args.global_batch_size, args.seq_length), generator=generator)
    mine = slice(document_rank() * rows, (document_rank() + 1) * rows)
    gold = GoldBatch(tokens[mine].to(device()), torch.arange(args.global_batch_size)[mine].to(device()))
    return run, [gold] * args.repeats


def measure_step(run, gold) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one step, by phase and in all; and its metrics."""
    from megatron_ebft.common.timer import PhaseTimer
    from megatron_ebft.run.loop import train_step

    timer, start = PhaseTimer(), time.perf_counter()
    metrics = train_step(run, gold, timer, check=False)
    return {**timer.seconds, "step": time.perf_counter() - start}, metrics


def count_flops(run, gold) -> dict[str, float]:
    """Floating-point operations of the phases' matrix products and attention."""
    from megatron_ebft.run.loop import train_step

    counts = {}
    with flop_counter.FlopCounterMode(display=False) as counter:

        @contextlib.contextmanager
        def phase(name):
            inside_before, before = sum(counts.values()), counter.get_total_flops()
            yield
            within = sum(counts.values()) - inside_before  # phases inside this one count for themselves
            counts[name] = counts.get(name, 0) + counter.get_total_flops() - before - within

        train_step(run, gold, phase, check=False)
    return {name: float(count) for name, count in counts.items()}


def plan_of(flags: list[str]) -> dict[str, dict]:
    """`planned` for both training modes, and for separate passes if the flags ask for a fused step."""
    plans = {mode: planned([*flags, "--training-mode", mode]) for mode in ("sft", "ebft")}
    if "--ebft-step=fused" in flags:
        plans[SEPARATE] = planned([*flags, "--ebft-step", "separate"])
    return plans


def planned(flags: list[str]) -> dict:
    """What tools/plan.py says of rank 0 with these flags: operations and bytes at the peak, by phase."""
    with tempfile.NamedTemporaryFile() as file:
        command = ("import json, sys, plan\n"
                   "json.dump(plan.measure_rank(json.loads(sys.argv[1]), 0), open(sys.argv[2], 'w'))")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, "-c", command, json.dumps(flags), file.name], env=environment, check=True)
        phases = json.load(file)["phases"]
    return {"flops": {name: float(phase["flops"]) for name, phase in phases.items()},
            "peak": max(sum(phase["peak"].values()) for phase in phases.values())}


def flags_of_plan(args, world_size: int) -> list[str]:
    """The flags of tools/plan.py for this benchmark. FP8 of rollouts and encoder is left out: plans have none."""
    without = {"ebft_rollout_fp8", "ebft_encoder_fp8", "ebft_fp8_emulate", "training_mode"}
    values = {name: vars(args)[name] for name in FLAGS if name in plan.READS - without}
    return [*as_argv({name: value for name, value in values.items() if value != FLAGS[name].default}),
            f"--world-size={world_size}"]


def read_plan(file: str, flags: list[str]) -> dict[str, dict]:
    """The plan that --write-plan left in a file, by training mode.

    Args:
        flags: `flags_of_plan`, which must be those of the file.

    Raises:
        ValueError: the file is missing, is no plan, or was made for other flags.
    """
    try:
        content = json.loads(Path(file).read_text())
        flags_of_file, modes = content["flags"], content["modes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--plan {file}: cannot be read ({error}); make it with --write-plan {file}") from None
    if flags_of_file != flags:
        raise ValueError(f"--plan {file}: made for other flags, {' '.join(flags_of_file)}; make it again with "
                         "--write-plan")
    return modes


def profiled_step(run, gold) -> dict[str, list[tuple[str, float, int]]]:
    """Name, milliseconds and number of calls of the GPU's kernels in one step, by phase, longest first."""
    from megatron_ebft.run.loop import train_step

    phases = {}

    @contextlib.contextmanager
    def timer(phase):
        if "" in phases:  # inside another phase, whose profile it is in
            yield
            return
        phases[""] = []
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield
            torch.cuda.synchronize()
        kernels = [(event.key, event.self_device_time_total / 1e3, event.count) for event in profile.key_averages()
                   if event.device_type == torch.autograd.DeviceType.CUDA]
        del phases[""]
        phases[phase] = sorted(kernels, key=lambda kernel: -kernel[1])

    train_step(run, gold, timer, check=False)
    return phases


def kinds_of_steps(run, gold) -> dict:
    """A Run for each kind of step that is measured, by name."""
    from megatron_ebft.common.device import have_gpu
    from megatron_ebft.model.fp8 import FP8

    runs, rows, config = {"sft": dataclasses.replace(run, mode="sft"), "ebft": run}, len(gold.tokens_BT), run.config
    if run.args.micro_batch_size < rows <= ROWS_AT_ONCE:
        together = argparse.Namespace(**{**vars(run.args), "micro_batch_size": rows})
        runs[AT_ONCE] = dataclasses.replace(runs["sft"], args=together)
    if config.fused:
        runs[SEPARATE] = dataclasses.replace(run, config=dataclasses.replace(config, fused=False))
    if any(saved_tokens(measure_step(run, gold)[1]).values()) and not have_gpu():
        runs[WHOLE] = dataclasses.replace(run, config=dataclasses.replace(config, skip_duplicates=False))
    if config.sampling.fp8.recipe != "off" or config.encoder_fp8.recipe != "off":
        sampling = dataclasses.replace(config.sampling, fp8=FP8())
        runs[NO_FP8] = dataclasses.replace(run, config=dataclasses.replace(config, sampling=sampling,
                                                                           encoder_fp8=FP8()))
    return runs


def measure_repeats(runs: dict, batches: list) -> tuple[dict[str, list], list[dict], dict[str, int]]:
    """By kind of step, the seconds of each repeat and the peak bytes of a GPU; and the tokens each EBFT step saved."""
    from megatron_ebft.common.device import have_gpu

    steps, saved, peaks = {name: [] for name in runs}, [], dict.fromkeys(runs, 0)
    for repeat, gold in enumerate(batches, 1):
        for name, kind in runs.items():
            if have_gpu():
                torch.cuda.reset_peak_memory_stats()
            seconds, metrics = measure_step(kind, gold)
            steps[name].append(seconds)
            if have_gpu():
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            if name == "ebft":
                saved.append(saved_tokens(metrics))
        if torch.distributed.get_rank() == 0:
            print(f"repeat {repeat}/{len(batches)}: "
                  + ", ".join(f"{name} {seconds[-1]['step']:.3f} s" for name, seconds in steps.items()))
    return steps, saved, peaks


def profile_gpu(runs: dict, gold, peaks: dict[str, int], planned_peaks: dict[str, int]) -> dict:
    """What only a GPU has: kernels of one step of each kind, and memory."""
    profiles = {name: profiled_step(kind, gold) for name, kind in runs.items()}
    config = runs["ebft"].policy[0].config
    figures = {"peak_tflops": peak_tflops(torch.cuda.get_device_name(), "bf16"), "peak_bytes": peaks,
               "planned_peak_bytes": planned_peaks, "layers": config.transformer_impl,
               "attention": config.attention_kernel, "kernels": profiles,
               "attention_share": {name: attention_share(phases) for name, phases in profiles.items()}}
    if NO_FP8 in runs:
        figures["rollout_products_ms"] = {
            name: time_of(MATRIX_PRODUCT, [kernel[:2] for kernel in profiles[name].get("rollout", [])])
            for name in ("ebft", NO_FP8)}
    return figures


def benchmark(args) -> dict:
    """All figures, JSON-able."""
    from megatron_ebft.common.device import have_gpu

    run, batches = build_pretrained(args) if args.pretrained_checkpoint else build(args)
    gold, layout, gpu = batches[0], run.config.layout, {}
    runs = kinds_of_steps(run, gold)
    if have_gpu():
        flags = flags_of_plan(args, torch.distributed.get_world_size())
        plans = read_plan(args.plan, flags) if args.plan else plan_of(flags)
        flops = {name: plans.get(name, plans[kind.mode])["flops"] for name, kind in runs.items()}
        for name in set(runs) - {"ebft"}:
            measure_step(runs[name], gold)  # compiles
    else:
        flops = {name: count_flops(kind, gold) for name, kind in runs.items()}  # also warms up
    rate = matmul_rate(torch.bfloat16 if args.bf16 else torch.float32, 8192 if have_gpu() else 2048)
    steps, saved, peaks = measure_repeats(runs, batches)
    if have_gpu():
        gpu = profile_gpu(runs, gold, peaks, {name: plans.get(name, plans[kind.mode])["peak"]
                                             for name, kind in runs.items()})
    seconds = {name: {phase: statistics.median(step[phase] for step in repeats) for phase in repeats[0]}
               for name, repeats in steps.items()}
    others = [name for name in runs if runs[name].mode != "sft"]
    base = AT_ONCE if AT_ONCE in runs else "sft"
    return {
        "device": torch.cuda.get_device_name() if have_gpu() else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "repeats": args.repeats, "matmul_gflops_per_second": rate / 1e9,
        "gold_tokens": gold.tokens_BT.numel(), "blocks": layout.num_blocks,
        "rollout_tokens": len(gold.tokens_BT) * layout.num_blocks * layout.num_samples * layout.rollout_length,
        "tokens_saved": {phase: statistics.mean(step[phase] for step in saved) for phase in saved[0]},
        "seconds": seconds, "gflops": {name: {k: v / 1e9 for k, v in f.items()} for name, f in flops.items()},
        "ratio": {name: seconds[name]["step"] / seconds["sft"]["step"] for name in others},
        "ratio_of_each_repeat": {name: [e["step"] / s["step"] for e, s in zip(steps[name], steps["sft"])]
                                 for name in others},
        "ratio_to_rows_at_once": {name: seconds[name]["step"] / seconds[base]["step"] for name in others},
        "flops_ratio": {name: sum(flops[name].values()) / sum(flops["sft"].values()) for name in others}, "gpu": gpu}


def saved_tokens(metrics: dict[str, float]) -> dict[str, float]:
    """Share of tokens that an EBFT step saved, by phase."""
    return {"features": metrics["encoder_tokens_saved"], "train": metrics["training_tokens_saved"]}


def parse(argv: list[str]) -> argparse.Namespace:
    """The benchmark's flags and those of training that it reads.

    Raises:
        ValueError: naming the flag.
    """
    from megatron_ebft.common.device import have_gpu

    parser = Parser("tools/benchmark.py", __doc__, own=(BENCHMARK,), reads=READS)
    parser.defaults = {"train_iters": 1000, **SHAPES[parser.parse_own(argv).shape]}
    args = check_args(parser.parse_args(argv))
    if args.pretrained_checkpoint and have_gpu():
        raise ValueError("--pretrained-checkpoint: is for CPUs; on a GPU, where tools/plan.py counts operations, "
                         "weights are random. Leave it out")
    if bool(args.pretrained_checkpoint) != bool(args.data_path or args.train_data_path):
        raise ValueError("--pretrained-checkpoint, --data-path: trained weights need text and text needs trained "
                         "weights; give both")
    return args


def main(argv: list[str]) -> None:
    """Parse, measure, print."""
    warnings.filterwarnings("ignore")
    args = parse(argv)
    if args.write_plan:
        flags = flags_of_plan(args, int(os.environ.get("WORLD_SIZE", "1")))
        with aside(args.write_plan) as file:
            write_json(file, {"flags": flags, "modes": plan_of(flags)})
        return
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.configs import parallel_sizes

    init_parallel(**parallel_sizes(args))
    result = benchmark(args)
    if torch.distributed.get_rank() == 0:
        print(table(result))
        if args.json:
            with aside(args.json) as file:
                write_json(file, result)
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
