"""Entry point: torchrun --nproc-per-node N -m megatron_ebft.train --help

The exit code says what to do next (run/stopping.py): 0 finished, 75 stopped after saving (start again), 64 wrong flags
or files, 65 a step that was not finite, 70 a rank that hangs, 74 a filesystem that does not answer, 1 anything else.
Imports wait until `main`: a signal that arrives while torch is imported must not kill, and wrong flags answer at once.
"""

import contextlib
import os
import signal
import sys
import time
import warnings

from megatron_ebft.common import signals
from megatron_ebft.common.console import keep_going
from megatron_ebft.run.ending import exit_code, fail, is_under_torchrun


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, close; returns the exit code."""
    from megatron_ebft.run.flags import parse_args

    args = parse_args(argv)  # before torch is imported: --help and wrong flags answer at once
    # Megatron-Core's own: no Transformer Engine or apex, deprecations, and a probe of .grad by its optimizer.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run import flight_recorder
    from megatron_ebft.run.build import build_run
    from megatron_ebft.run.configs import parallel_sizes
    from megatron_ebft.run.describe import describe
    from megatron_ebft.run.folders import claim_folders
    from megatron_ebft.run.logger import Logger
    from megatron_ebft.run.loop import train
    from megatron_ebft.run.sinks.build import build_sinks
    from megatron_ebft.run.watchdog import PATIENCE, Watchdog

    start = time.perf_counter()
    watchdog = Watchdog(0.9 * 60 * args.distributed_timeout_minutes, os.path.join(args.save or ".", "hang"))
    flight_recorder.keep()
    init_parallel(**{**parallel_sizes(args), "timeout_minutes": PATIENCE * args.distributed_timeout_minutes})
    with contextlib.ExitStack() as at_end:  # finished, stopped or failed
        watchdog.watch()
        at_end.callback(watchdog.stop)
        lock = claim_folders(args)
        if lock is not None:
            at_end.callback(lock.release)
        run = build_run(args)
        run.watchdog, run.lock = watchdog, lock
        for judged in filter(None, (run.rlvr, run.eval_questions)):
            at_end.callback(judged.verification.close)
        for model in filter(None, (*run.policy, run.encoder, run.start)):
            model.register_forward_pre_hook(watchdog.move)
        log = Logger(build_sinks(args, run.state.iteration), args.train_iters,
                     args.global_batch_size * args.seq_length, args.ebft_rollout_length, run.tokenizer)
        at_end.callback(log.flush)
        log.print(describe(run))
        is_done = train(run, log)
    signals.ignore_signals()
    log.close(start, is_done)
    shut_down()
    return exit_code(is_done)


if __name__ == "__main__":
    signals.install_handlers()
    if is_under_torchrun():
        signals.end_with_parent(signal.SIGTERM)  # save and stop: torchrun itself dies of some signals
    keep_going()
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        fail(error)
