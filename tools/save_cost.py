"""Measures what a checkpoint costs: saved while training waits, and saved in the background (--async-save).

    torchrun --nproc-per-node 2 tools/save_cost.py --save FOLDER [training flags]

Weights and rows are random, as in tools/benchmark.py. Steps without a save, with a save and with an asynchronous save
take turns; the tool prints medians. The cost of an asynchronous save is the time that training waits for it plus the
time by which steps are slower until it is whole.
"""

import statistics
import sys
import time
import warnings

import torch
from benchmark import SHAPE, build, measure_step

from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import STEP

SAVE_COST = Group("measurement", (
    Flag("--save", str, "folder for the checkpoints", metavar="DIR", required=True),
    Flag("--repeats", int, "saves of each kind", default=5, valid=at_least(1))))


def measure(run, gold, saver) -> tuple[float, float, float]:
    """Seconds of a step, of the wait for a save after it, and by which steps take longer until the save is whole."""
    alone = measure_step(run, gold)[0]["step"]
    start = time.perf_counter()
    saver.save(run.state, run.policy, run.optimizer, run.scheduler, {"architecture": {}})
    waited, slower = time.perf_counter() - start, 0.0
    while saver.finished() is None:
        slower += measure_step(run, gold)[0]["step"] - alone
    saver.drop_old()
    run.state.iteration += 1
    return alone, waited, max(slower, 0.0)


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from megatron_ebft.checkpointing.folders import complete_iterations
    from megatron_ebft.checkpointing.saver import Saver
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.configs import parallel_sizes

    parser = Parser("tools/save_cost.py", __doc__, own=(SAVE_COST,), reads=STEP, defaults={"train_iters": 1, **SHAPE})
    args = check_args(parser.parse_args(argv))
    if complete_iterations(args.save):
        raise ValueError(f"--save {args.save}: holds checkpoints, which this measurement would remove; name a new "
                         "folder")
    init_parallel(**parallel_sizes(args))
    run, (gold, *_) = build(args)
    savers = {"waiting": Saver(args.save, keep=1), "--async-save": Saver(args.save, is_async=True, keep=1)}
    measure(run, gold, savers["waiting"])  # warms up
    seconds = {kind: [] for kind in savers}
    for _ in range(args.repeats):
        for kind, saver in savers.items():
            seconds[kind].append(measure(run, gold, saver))
    if torch.distributed.get_rank() == 0:
        parameters = sum(p.numel() for chunk in run.policy for p in chunk.parameters())
        print(f"{parameters / 1e6:.3g} M parameters on a rank")
        for kind, repeats in seconds.items():
            step, waited, slower = map(statistics.median, zip(*repeats))
            print(f"{kind}: step {step:.2f} s, waits {waited:.2f} s for the save, later steps {slower:.2f} s longer in "
                  f"all: adds {(waited + slower) / step:.0%} of a step")
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
