"""How the cost of an EBFT step grows with the length of rows, the blocks, the samples, the model and a split of blocks.

    python tools/cost_growth.py                        # all tables, about half an hour on two CPU cores
    python tools/cost_growth.py --only length parts

Each line is a run of tools/benchmark.py on random weights with one thing changed, a row of 512 tokens otherwise. Times
are medians of --repeats steps. Operations are counted: they tell what time should do.
"""

import sys
import warnings

import benchmark

from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser

BASE = ["--micro-batch-size", "1", "--global-batch-size", "1", "--ebft-step", "fused"]
BLOCKS = 63
"""Of a row of 512 tokens."""
CASES = {
    "length": ("T, one row of", [(str(t), ["--seq-length", str(t)]) for t in (256, 512, 1024, 2048, 4096)]),
    "samples": ("n", [(str(n), ["--ebft-num-samples", str(n)]) for n in (2, 4, 8, 16)]),
    "rollout": ("G, with s = 8", [(str(g), ["--ebft-rollout-length", str(g)]) for g in (2, 4, 8, 16)]),
    "stride": ("s, with G = 8", [(str(s), ["--ebft-stride", str(s)]) for s in (2, 4, 8, 16)]),
    "model": ("layers × width", [(f"{layers} × {width}", [
        "--num-layers", str(layers), "--hidden-size", str(width), "--ffn-hidden-size", str(3 * width),
        "--num-attention-heads", str(width // 32), "--num-query-groups", str(width // 64)])
        for layers, width in ((4, 64), (4, 128), (8, 256), (8, 512), (12, 768))]),
    "parts": ("micro-batches of a row", [(str(parts), ["--ebft-blocks-per-microbatch", str(-(-BLOCKS // parts))])
                                         for parts in (1, 2, 4, 8)])}
GROWTH = Group("measurement", (
    Flag("--only", str, "some of the tables", default=list(CASES), choices=tuple(CASES), many=True),
    Flag("--repeats", int, "timed steps of each kind", default=3, valid=at_least(1))))


def line(label: str, flags: list[str], repeats: int) -> str:
    """One measurement as a line of a table."""
    args = benchmark.parse([*BASE, *flags, "--repeats", str(repeats)])
    result = benchmark.benchmark(args)
    seconds, gflops = result["seconds"], {name: sum(x.values()) for name, x in result["gflops"].items()}
    cells = [f"{seconds['sft']['step']:.3f}"]
    for name in ("ebft", benchmark.SEPARATE):
        cells += [f"{seconds[name]['step']:.2f}", f"{gflops[name]:.0f}", f"{result['ratio'][name]:.2f}",
                  f"{result['flops_ratio'][name]:.2f}"]
    return f"| {label} | " + " | ".join(cells) + " |"


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    args = Parser("tools/cost_growth.py", __doc__, own=(GROWTH,), reads=frozenset()).parse_args(argv)
    from megatron_ebft.parallel.groups import init_parallel, shut_down

    init_parallel(1, 1, seed=1)
    for name in args.only:
        what, cases = CASES[name]
        print(f"\n| {what} | SFT s | fused s | GFLOP | × SFT in time | in operations | separate s | GFLOP | × SFT in "
              "time | in operations |\n|---" + "|--:" * 9 + "|")
        for label, flags in cases:
            print(line(label, flags, args.repeats), flush=True)
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
