"""What a checkpoint costs a step: written while training waits, and while it goes on (--async-save).

    torchrun --nproc-per-node 2 tools/save_cost.py --save FOLDER [training flags]

Takes the training flags of model, optimizer, memory and method (see `python -m megatron_ebft.train --help`); random
weights and rows, as tools/benchmark.py. Steps without a save, steps with one, and steps with an asynchronous one take
turns; medians are reported. An asynchronous save adds what training waits for it, and what slows down the steps until
it is whole.
"""

import statistics
import sys
import time
import warnings

import torch


def measure(run, gold, saver) -> tuple[float, float, float]:
    """Seconds of a step, of the wait for a save after it, and those that steps take longer until it is whole."""
    from benchmark import measure_step

    alone = measure_step(run, gold)[0]["step"]
    start = time.perf_counter()
    saver.save(run.state, run.policy, run.optimizer, run.scheduler, {"architecture": {}})
    waited, slower = time.perf_counter() - start, 0.0
    while saver.finished() is None:
        slower += measure_step(run, gold)[0]["step"] - alone
    run.state.iteration += 1
    return alone, waited, max(slower, 0.0)


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from benchmark import SHAPE, build

    from megatron_ebft.checkpointing.saver import Saver
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.arguments import build_parser, check_args, parallel_sizes

    parser = build_parser()
    parser.prog, parser.description = "tools/save_cost.py", __doc__.splitlines()[0]
    parser.set_defaults(**SHAPE)
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    args = check_args(parser.parse_args(["--train-iters", "1", *argv]))
    if not args.save:
        raise ValueError("--save: name a folder for the checkpoints")
    init_parallel(**parallel_sizes(args))
    run, (gold, *_) = build(args)
    savers = {"waiting": Saver(args.save, keep=1), "--async-save": Saver(args.save, is_async=True, keep=1)}
    measure(run, gold, savers["waiting"])  # warms up
    found = {kind: [] for kind in savers}
    for _ in range(args.repeats):
        for kind, saver in savers.items():
            found[kind].append(measure(run, gold, saver))
    if torch.distributed.get_rank() == 0:
        parameters = sum(p.numel() for chunk in run.policy for p in chunk.parameters())
        print(f"{parameters / 1e6:.3g} M parameters on a rank")
        for kind, rows in found.items():
            step, waited, slower = map(statistics.median, zip(*rows))
            print(f"{kind}: step {step:.2f} s, waits {waited:.2f} s for the save, later steps {slower:.2f} s longer in "
                  f"all: adds {(waited + slower) / step:.0%} of a step")
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
