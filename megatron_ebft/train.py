"""Entry point: torchrun --nproc-per-node N -m megatron_ebft.train --help

Imports wait until `main`: saving a checkpoint starts a process that imports this file again.
"""

import sys
import time
import warnings


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, close."""
    # Megatron-Core's own: no Transformer Engine or apex, deprecations, and a probe of .grad by its optimizer.
    warnings.filterwarnings("ignore", module="megatron|torch")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from megatron_ebft.arguments import parallel_sizes, parse_args
    from megatron_ebft.build import build_run, describe
    from megatron_ebft.logger import Logger
    from megatron_ebft.parallel import init_parallel, shut_down
    from megatron_ebft.training import train

    start = time.perf_counter()
    args = parse_args(argv)
    init_parallel(**parallel_sizes(args))
    run = build_run(args)
    log = Logger(args.tensorboard_dir, run.state.iteration, args.train_iters, args.global_batch_size * args.seq_length,
                 args.ebft_rollout_length, run.tokenizer)
    log.print(describe(run))
    train(run, log)
    log.close(start)
    shut_down()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
