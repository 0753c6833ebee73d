"""Cost of an EBFT step against an SFT step: same rows, same model, one run.

    python tools/benchmark.py                                        # the shape of the README's table
    python tools/benchmark.py --shape 8b-quarter                     # a shape by name, on a GPU
    torchrun --nproc-per-node 8 tools/benchmark.py --shape 8b --tensor-model-parallel-size 8 --sequence-parallel
    python tools/benchmark.py --pretrained-checkpoint DIR --data-path PREFIX --seq-length 256  # a trained model, CPU

Takes the training flags of model, optimizer, memory and method (see `python -m megatron_ebft.train --help`); random
weights and rows, or those of a checkpoint and a dataset; no masks, no reference. Tokens and operations are those of
one rank. Prints a table and, with --json, writes the same as JSON. Every repeat runs an SFT step, then an EBFT step;
medians are reported.

Where a rank has several micro-batches, every repeat also runs an SFT step on all its rows at once: rows of gold tokens
alone are short, and a GPU may wait for launches where they are taken one by one.

Random weights hardly ever draw a rollout twice, so they show what a step costs where nothing is saved. Where the first
EBFT step leaves rollouts out (--ebft-skip-duplicates), every repeat on a CPU also runs one on the same rows that leaves
out none, as "ebft, whole rows": what the savings are worth, beside the share of tokens they are.

With --ebft-rollout-fp8 or --ebft-encoder-fp8 every repeat also runs an EBFT step with neither, as "ebft, no FP8".

On a GPU operations and the expected peak of memory are what tools/plan.py says of the same flags, since torch's counter
sees neither Transformer Engine's nor compiled kernels; attention counts as torch's SDPA in chunks. The share of
attention is that of its kernels in the GPU's busy time of one more, profiled step, whose longest kernels are printed by
phase; matrix products of rollouts are its kernels of that kind (what quantises activations is not among them). MFU is
of the bfloat16 peak.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.utils import flop_counter

PHASES = ("rollout", "features", "train", "optimizer")
SHAPE = dict(num_layers=8, hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, num_query_groups=4,
             seq_length=512, vocab_size=8192, micro_batch_size=2, global_batch_size=2, ebft_track_kl=False,
             untie_embeddings_and_output_weights=True)
"""The default: small enough for two CPU cores, with every ingredient of a Llama."""
LLAMA = dict(num_query_groups=8, vocab_size=128256, rotary_base=500000.0, use_rope_scaling=True, seq_length=1024,
             max_position_embeddings=131072, global_batch_size=4, ebft_track_kl=False, bf16=True)
LLAMA_8B = dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                untie_embeddings_and_output_weights=True, **LLAMA)
SHAPES = {
    "small": SHAPE,
    "1b": dict(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, kv_channels=64,
               rope_scaling_factor=32.0, **LLAMA),
    "8b": LLAMA_8B, "8b-quarter": {**LLAMA_8B, "num_layers": 8}}
"""Llama 3.2 1B and 3.1 8B with the paper's blocks (the flags' defaults) in 4 rows; a quarter of the layers of 8B, which
with optimizer and encoder fit one GPU of 80 GB (and in which head and sampler weigh four times as much)."""
PEAKS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 TFLOP/s by what is in a GPU's name."""
ATTENTION = re.compile("flash|fmha|attention|triton_tem", re.I)
"""Names of attention's kernels; compiled templates are FlexAttention's, there are no others."""
MATRIX_PRODUCT = re.compile("gemm|nvjet|xmma|cutlass", re.I)
"""Names of cuBLAS's kernels, in bfloat16 and in FP8."""
KINDS = {"attention": ATTENTION, "products": MATRIX_PRODUCT, "compiled": re.compile("triton"),
         "optimizer": re.compile("multi_tensor", re.I),
         "FP8 casts": re.compile("transformer_engine.*(quant|cast|transpose|scal)|amax", re.I),
         "copies": re.compile("memcpy|memset|copy|CatArray", re.I), "norms": re.compile("norm", re.I),
         "rest": re.compile("")}
"""Kinds of kernels by name, the first that fits."""


def _attention_flops(query_shape, key_shape, value_shape) -> int:
    """Of both products of attention, the whole rectangle: [B, H, Q, D] with [B, J, C, D] and [B, J, C, E]."""
    batch, heads, queries, dim = query_shape
    keys = key_shape[2]
    return 2 * batch * heads * queries * keys * (dim + value_shape[3])


def _sdpa(query, key, value, *args, out_shape=None, **kwargs):
    return _attention_flops(query, key, value)


def _sdpa_backward(grad, query, key, value, *args, out_shape=None, **kwargs):
    """The scores again, then the gradients of both operands of both products: 5 products for 2."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (3 * dim + 2 * value[3])


for _operation, _formula in (("_scaled_dot_product_flash_attention_for_cpu", _sdpa),
                             ("_scaled_dot_product_flash_attention_for_cpu_backward", _sdpa_backward)):
    # torch has none before 2.15, and its formulas for other kernels know no grouped heads before 2.13
    flop_counter.flop_registry.pop(getattr(torch.ops.aten, _operation), None)
    flop_counter.register_flop_formula(getattr(torch.ops.aten, _operation))(_formula)


ROWS_AT_ONCE = 4
"""The most rows in one micro-batch of an SFT step: the logits of 16 rows of 8B do not fit beside the rest."""
AT_ONCE, WHOLE, NO_FP8 = "sft, rows at once", "ebft, whole rows", "ebft, no FP8"


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
    from megatron_ebft.run.arguments import ebft_config, model_args
    from megatron_ebft.run.loop import Run
    from megatron_ebft.run.models import build_models, build_optimizer

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

    class Counter:
        def __call__(self, phase):
            counts[phase] = flop_counter.FlopCounterMode(display=False)
            return counts[phase]

    train_step(run, gold, Counter(), check=False)
    return {phase: float(counter.get_total_flops()) for phase, counter in counts.items()}


def matmul_rate(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the best of a few size³ matrix products: what this device reaches on large ones."""
    from megatron_ebft.common.device import device, synchronize

    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def plan_of(flags: list[str]) -> dict[str, dict]:
    """`planned` for both training modes."""
    return {mode: planned([*flags, "--training-mode", mode]) for mode in ("sft", "ebft")}


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


def read_plan(file: str, flags: list[str]) -> dict[str, dict]:
    """What --write-plan left in a file, for the same flags.

    Raises:
        ValueError: the file is missing, no plan, or was made for other flags.
    """
    try:
        plan = json.loads(Path(file).read_text())
        planned_flags, modes = plan["flags"], plan["modes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--plan {file}: cannot be read ({error}); make it with --write-plan {file}") from None
    if planned_flags != without_fp8(flags):
        raise ValueError(f"--plan {file}: made for other flags, {' '.join(planned_flags)}; make it again with "
                         "--write-plan")
    return modes


def without_fp8(flags: list[str]) -> list[str]:
    """The flags but for those of rollouts and encoder in FP8, which the plan leaves out."""
    kept, rest = [], iter(flags)
    for flag in rest:
        if flag in ("--ebft-rollout-fp8", "--ebft-encoder-fp8"):
            next(rest)
        elif not flag.startswith(("--ebft-rollout-fp8=", "--ebft-encoder-fp8=", "--ebft-fp8-emulate")):
            kept.append(flag)
    return kept


def time_of(kind: re.Pattern, kernels: list[tuple[str, float]]) -> float:
    """Time of the kernels of a kind, of (name, time) each."""
    return sum(time for name, time in kernels if kind.search(name))


def attention_share(phases: dict[str, list]) -> float:
    """Attention's part of the time of all kernels, by phase as `profiled_step` gives them."""
    kernels = [(name, time) for kernels in phases.values() for name, time, _ in kernels]
    return time_of(ATTENTION, kernels) / sum(time for _, time in kernels)


def profiled_step(run, gold) -> dict[str, list[tuple[str, float, int]]]:
    """Name, milliseconds and number of calls of the GPU's kernels in one step, by phase, longest first."""
    from megatron_ebft.run.loop import train_step

    phases = {}

    @contextlib.contextmanager
    def timer(phase):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield
            torch.cuda.synchronize()
        kernels = [(event.key, event.self_device_time_total / 1e3, event.count) for event in profile.key_averages()
                   if event.device_type == torch.autograd.DeviceType.CUDA]
        phases[phase] = sorted(kernels, key=lambda kernel: -kernel[1])

    train_step(run, gold, timer, check=False)
    return phases


def kernel_table(phases: dict[str, list], seconds: dict[str, float], longest: int = 12) -> list[str]:
    """By phase of one step: the GPU's busy time, that of each kind of kernel, and the longest kernels, as Markdown."""
    lines = ["| phase | ms | GPU busy | kernels | " + " | ".join(KINDS) + " |",
             "|---|--:|--:|--:|" + "--:|" * len(KINDS)]
    for phase, kernels in phases.items():
        times = dict.fromkeys(KINDS, 0.0)
        for name, ms, _ in kernels:
            times[next(kind for kind, pattern in KINDS.items() if pattern.search(name))] += ms
        lines.append(f"| {phase} | {seconds[phase] * 1e3:.1f} | {sum(times.values()):.1f} | "
                     f"{sum(calls for *_, calls in kernels)} | "
                     + " | ".join(f"{time:.1f}" for time in times.values()) + " |")
    lines += ["", "| phase | ms | calls | kernel |", "|---|--:|--:|---|"]
    lines += [f"| {phase} | {time:.2f} | {calls} | `{name[:110]}` |"
              for phase, kernels in phases.items() for name, time, calls in kernels[:longest]]
    return lines


def benchmark(args, flags: list[str]) -> dict:
    """All figures, JSON-able. flags: the same as `args`, for tools/plan.py."""
    from megatron_ebft.common.device import have_gpu
    from megatron_ebft.model.fp8 import FP8

    run, batches = build_pretrained(args) if args.pretrained_checkpoint else build(args)
    runs = {"sft": dataclasses.replace(run, mode="sft"), "ebft": run}
    rows = len(batches[0].tokens_BT)
    if args.micro_batch_size < rows <= ROWS_AT_ONCE:
        together = argparse.Namespace(**{**vars(args), "micro_batch_size": rows})
        runs[AT_ONCE] = dataclasses.replace(runs["sft"], args=together)
    if any(saved(measure_step(run, batches[0])[1]).values()) and not have_gpu():
        runs[WHOLE] = dataclasses.replace(run, config=dataclasses.replace(run.config, skip_duplicates=False))
    if run.config.sampling.fp8.recipe != "off" or run.config.encoder_fp8.recipe != "off":
        sampling = dataclasses.replace(run.config.sampling, fp8=FP8())
        runs[NO_FP8] = dataclasses.replace(run, config=dataclasses.replace(run.config, sampling=sampling,
                                                                           encoder_fp8=FP8()))
    gpu, planned_peak, peaks, profiles = {}, {}, dict.fromkeys(runs, 0), {}
    if have_gpu():
        by_mode = read_plan(args.plan, flags) if args.plan else plan_of(flags)
        flops, planned_peak = ({name: by_mode[kind.mode][key] for name, kind in runs.items()}
                               for key in ("flops", "peak"))
        for name in set(runs) - {"ebft"}:
            measure_step(runs[name], batches[0])  # compiles
    else:
        flops = {name: count_flops(kind, batches[0]) for name, kind in runs.items()}  # also warms up
    rate = matmul_rate(torch.bfloat16 if args.bf16 else torch.float32, 8192 if have_gpu() else 2048)
    steps, shares = {name: [] for name in runs}, []
    for repeat, gold in enumerate(batches):
        for name, kind in runs.items():
            if have_gpu():
                torch.cuda.reset_peak_memory_stats()
            seconds, metrics = measure_step(kind, gold)
            steps[name].append(seconds)
            if have_gpu():
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            if name == "ebft":
                shares.append(saved(metrics))
        if torch.distributed.get_rank() == 0:
            print(f"repeat {repeat + 1}/{args.repeats}: "
                  + ", ".join(f"{name} {found[-1]['step']:.3f} s" for name, found in steps.items()))
    layout, gold = run.config.layout, batches[0]
    if have_gpu():
        profiles = {name: profiled_step(kind, gold) for name, kind in runs.items()}
        gpu = {"peak_tflops": peak_tflops(torch.cuda.get_device_name()), "peak_bytes": peaks,
               "planned_peak_bytes": planned_peak, "layers": run.policy[0].config.transformer_impl,
               "attention": run.policy[0].config.attention_kernel, "kernels": profiles,
               "attention_share": {name: attention_share(phases) for name, phases in profiles.items()}}
        if NO_FP8 in runs:
            gpu["rollout_products_ms"] = {
                name: time_of(MATRIX_PRODUCT, [kernel[:2] for kernel in profiles[name]["rollout"]])
                for name in ("ebft", NO_FP8)}
    seconds = {name: {phase: statistics.median(step[phase] for step in found) for phase in found[0]}
               for name, found in steps.items()}
    others = [name for name in runs if runs[name].mode != "sft"]
    base = AT_ONCE if AT_ONCE in runs else "sft"
    return {
        "device": torch.cuda.get_device_name() if have_gpu() else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "repeats": args.repeats, "matmul_gflops_per_second": rate / 1e9,
        "gold_tokens": gold.tokens_BT.numel(), "blocks": layout.num_blocks,
        "rollout_tokens": len(gold.tokens_BT) * layout.num_blocks * layout.num_samples * layout.rollout_length,
        "tokens_saved": {phase: statistics.mean(x[phase] for x in shares) for phase in shares[0]},
        "seconds": seconds, "gflops": {name: {k: v / 1e9 for k, v in f.items()} for name, f in flops.items()},
        "ratio": {name: seconds[name]["step"] / seconds["sft"]["step"] for name in others},
        "ratio_of_each_repeat": {name: [e["step"] / s["step"] for e, s in zip(steps[name], steps["sft"])]
                                 for name in others},
        "ratio_to_rows_at_once": {name: seconds[name]["step"] / seconds[base]["step"] for name in others},
        "flops_ratio": {name: sum(flops[name].values()) / sum(flops["sft"].values()) for name in others}, "gpu": gpu}


def saved(metrics: dict[str, float]) -> dict[str, float]:
    """Share of tokens that an EBFT step saved, by phase."""
    return {"features": metrics["encoder_tokens_saved"], "train": metrics["training_tokens_saved"]}


def peak_tflops(name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU, where its name is known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def table(result: dict) -> str:
    """The figures as Markdown: seconds and GFLOP on a CPU, ms, TFLOP and MFU on a GPU."""
    gpu, matmul = result["gpu"], result["matmul_gflops_per_second"]
    scale, digits, unit, time_unit = (1e3, 1, "TFLOP", "ms") if gpu else (1, 3, "GFLOP", "seconds")
    lines = [f"{result['device']}, torch {result['torch']}; {result['gold_tokens']} gold and "
             f"{result['rollout_tokens']} rollout tokens a step; matrix product {matmul / scale:.0f} {unit}/s", "",
             f"| step | phase | {time_unit} | share | {unit} | {unit}/s | of the matrix product | tokens saved |"
             + (" MFU |" if gpu else ""), "|---|---|--:|--:|--:|--:|--:|--:|" + ("--:|" if gpu else "")]
    for name in result["seconds"]:
        seconds, gflops = result["seconds"][name], result["gflops"][name]
        for phase in [p for p in PHASES if p in seconds] + ["step"]:
            work = sum(gflops.values()) if phase == "step" else gflops.get(phase, 0.0)
            rate = work / seconds[phase]
            tokens = result["tokens_saved"].get(phase) if name == "ebft" else None
            line = (f"| {name} | {phase} | {seconds[phase] * scale:.{digits}f} | "
                    f"{seconds[phase] / seconds['step']:.0%} | {work / scale:.1f} | {rate / scale:.0f} | "
                    f"{rate / matmul:.0%} | {'' if tokens is None else f'{tokens:.1%}'} |")
            lines.append(line + (f" {mfu(rate, gpu['peak_tflops'])} |" if gpu else ""))
    for name, each in result["ratio_of_each_repeat"].items():
        lines += ["", f"{name} / sft: {result['ratio'][name]:.2f} × in time (single repeats {min(each):.2f} to "
                      f"{max(each):.2f}), {result['flops_ratio'][name]:.2f} × in operations"]
        if AT_ONCE in result["seconds"]:
            lines[-1] += f"; {result['ratio_to_rows_at_once'][name]:.2f} × in time of sft with its rows at once"
    if NO_FP8 in result["seconds"]:
        plain, fp8 = result["seconds"][NO_FP8], result["seconds"]["ebft"]
        lines += ["", "With FP8 " + ", ".join(f"{phase} {plain[phase] / fp8[phase]:.2f} ×" for phase in (
            "rollout", "features", "step")) + " as fast"]
        if gpu:
            fp8, plain = (gpu["rollout_products_ms"][name] for name in ("ebft", NO_FP8))
            lines[-1] += f"; matrix products of rollouts {plain / fp8:.2f} × ({fp8:.1f} and {plain:.1f} ms)"
    if gpu:
        lines += ["", f"{gpu['layers']} layers, {gpu['attention']} attention", "",
                  "| step | attention | peak GiB | tools/plan.py says |", "|---|--:|--:|--:|",
                  *(f"| {name} | {gpu['attention_share'][name]:.1%} | {gpu['peak_bytes'][name] / 2**30:.1f} | "
                    f"{gpu['planned_peak_bytes'][name] / 2**30:.1f} |" for name in ("sft", "ebft"))]
        for name, phases in gpu["kernels"].items():
            lines += ["", f"Kernels of one {name} step", "", *kernel_table(phases, result["seconds"][name])]
    return "\n".join(lines)


def mfu(gflops_per_second: float, peak: float | None) -> str:
    """Model FLOP/s as a share of the GPU's peak (TFLOP/s)."""
    return "?" if peak is None else f"{gflops_per_second / 1e3 / peak:.1%}"


def _own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--shape", choices=SHAPES, default="small", help="model, rows and precision by name; flags "
                        "given beside it win")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind that are timed")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plan", metavar="FILE", help="on a GPU: operations and memory that --write-plan left there, "
                        "instead of planning now, which takes minutes")
    parser.add_argument("--write-plan", metavar="FILE", help="plan only, on any machine, for as many ranks "
                        "as WORLD_SIZE says (default 1)")
    return parser


def _as_flags(values: dict) -> list[str]:
    """Defaults as the flags that set them."""
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag, str(value)] if not isinstance(value, bool) else [flag if value else "--no" + flag[1:]]
    return flags


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from megatron_ebft.common.device import have_gpu
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.arguments import build_parser, check_args, parallel_sizes

    parser = _own_flags(build_parser())
    parser.prog, parser.description = "tools/benchmark.py", __doc__.splitlines()[0]
    own, rest = _own_flags(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args(argv)
    flags = ["--train-iters", "1000", *_as_flags(SHAPES[own.shape])]
    args = check_args(parser.parse_args([*flags, *argv]))
    if args.pretrained_checkpoint and have_gpu():
        raise ValueError("--pretrained-checkpoint: on a GPU, where tools/plan.py counts operations, the benchmark has "
                         "random weights alone; leave it out")
    for flag in ("ebft_document_mask", "ebft_answer_only", "ebft_kl_coef", "load", "save"):
        if vars(args)[flag]:
            raise ValueError(f"--{flag.replace('_', '-')}: not part of the benchmark, leave it out")
    if bool(args.pretrained_checkpoint) != bool(args.data_path or args.train_data_path):
        raise ValueError("--pretrained-checkpoint, --data-path: trained weights and text go together, give both")
    if own.write_plan:
        with open(own.write_plan, "w") as file:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            flags = without_fp8([*flags, *rest, "--world-size", str(size)])
            json.dump({"flags": flags, "modes": plan_of(flags)}, file, indent=2)
        return
    init_parallel(**parallel_sizes(args))
    result = benchmark(args, [*flags, *rest, "--world-size", str(torch.distributed.get_world_size())])
    if torch.distributed.get_rank() == 0:
        print(table(result))
        if args.json:
            with open(args.json, "w") as file:
                json.dump(result, file, indent=2)
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
