"""The figures of tools/benchmark.py as Markdown: phases, ratios, and a GPU's kernels by kind."""

import re

PHASES = ("rollout", "features", "train", "optimizer")
ATTENTION = re.compile("flash|fmha|attention|triton_tem", re.I)
"""Names of attention kernels. Compiled templates are FlexAttention's; there are no others."""
MATRIX_PRODUCT = re.compile("gemm|nvjet|xmma|cutlass", re.I)
"""Names of cuBLAS kernels, in bfloat16 and in FP8."""
KINDS = {"attention": ATTENTION, "products": MATRIX_PRODUCT, "compiled": re.compile("triton"),
         "optimizer": re.compile("multi_tensor", re.I),
         "FP8 casts": re.compile("transformer_engine.*(quant|cast|transpose|scal)|amax", re.I),
         "copies": re.compile("memcpy|memset|copy|CatArray", re.I), "norms": re.compile("norm", re.I),
         "rest": re.compile("")}
"""Kinds of kernels by name; the first match counts."""
# Kinds of steps besides "sft" and "ebft", which tools/benchmark.py explains.
AT_ONCE, SEPARATE, WHOLE, NO_FP8 = "sft, rows at once", "ebft, separate", "ebft, whole rows", "ebft, no FP8"


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
                    f"{gpu['planned_peak_bytes'][name] / 2**30:.1f} |" for name in gpu["peak_bytes"])]
        for name, phases in gpu["kernels"].items():
            lines += ["", f"Kernels of one {name} step", "", *kernel_table(phases, result["seconds"][name])]
    return "\n".join(lines)


def mfu(gflops_per_second: float, peak: float | None) -> str:
    """Model FLOP/s as a share of the GPU's peak (TFLOP/s)."""
    return "?" if peak is None else f"{gflops_per_second / 1e3 / peak:.1%}"


def kernel_table(phases: dict[str, list], seconds: dict[str, float], longest: int = 12) -> list[str]:
    """For each phase of one step: the GPU's busy time, the time of each kind of kernel, and the longest kernels."""
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


def time_of(kind: re.Pattern, kernels: list[tuple[str, float]]) -> float:
    """Total time of the kernels of a kind. kernels: (name, time)."""
    return sum(time for name, time in kernels if kind.search(name))


def attention_share(phases: dict[str, list]) -> float:
    """Attention's share of the time of all kernels. phases: as `profiled_step` returns them."""
    kernels = [(name, time) for kernels in phases.values() for name, time, _ in kernels]
    return time_of(ATTENTION, kernels) / sum(time for _, time in kernels)
