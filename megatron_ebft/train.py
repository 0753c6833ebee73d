"""Entry point: torchrun --nproc-per-node N -m megatron_ebft.train --help

The exit code says what to do next (stopping.py): 0 finished, 75 stopped after saving (start again), 64 wrong flags or
files, 65 a step that was not finite, 70 a rank that hangs, 74 a filesystem that does not answer.
Imports wait until `main`: saving a checkpoint starts a process that imports this file again.
"""

import os
import sys
import time
import warnings

from megatron_ebft.common import signals
from megatron_ebft.common.disk import is_passing
from megatron_ebft.common.errors import StepFailed
from megatron_ebft.run import stopping


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, close; returns the exit code."""
    from megatron_ebft.run.flags import parse_args

    args = parse_args(argv)  # before torch is imported: --help and wrong flags answer at once
    # Megatron-Core's own: no Transformer Engine or apex, deprecations, and a probe of .grad by its optimizer.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.build import build_run
    from megatron_ebft.run.configs import parallel_sizes
    from megatron_ebft.run.describe import describe
    from megatron_ebft.run.logger import Logger
    from megatron_ebft.run.loop import train
    from megatron_ebft.run.watchdog import PATIENCE, Watchdog

    start = time.perf_counter()
    watchdog = Watchdog(0.9 * 60 * args.distributed_timeout_minutes)
    init_parallel(**{**parallel_sizes(args), "timeout_minutes": PATIENCE * args.distributed_timeout_minutes})
    watchdog.watch()
    try:
        run = build_run(args)
        run.watchdog = watchdog
        for model in filter(None, (*run.policy, run.encoder, run.start)):
            model.register_forward_pre_hook(watchdog.move)
        log = Logger(args.tensorboard_dir, run.state.iteration, args.train_iters,
                     args.global_batch_size * args.seq_length, args.ebft_rollout_length, run.tokenizer)
        log.print(describe(run))
        is_done = train(run, log)
    finally:
        watchdog.stop()
    signals.ignore_signals()
    log.close(start, is_done)
    shut_down()
    return 0 if is_done else stopping.EXIT_RESUME


def fail(error: Exception, code: int) -> None:
    """The last words of a run; at once, since threads of torch may wait for ranks that are gone."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    signals.install_handlers()
    try:
        sys.exit(main())
    except ValueError as error:
        fail(error, stopping.EXIT_USAGE)
    except StepFailed as error:
        fail(error, stopping.EXIT_STEP_FAILED)
    except OSError as error:
        if not is_passing(error):
            raise
        fail(error, stopping.EXIT_UNREACHABLE)
