"""The learning rate of every step: Megatron's schedule of warm-up and decay, which counts rows.

1. The decay ends at --train-iters. A run may continue with another --train-iters or --global-batch-size: its rows are
   then those consumed and a global batch for each step to come.
2. A warm-up keeps the rows that it began with, so that a longer run does not begin another one.
"""

import argparse

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ebft.checkpointing.record import TrainState


def rows_of_run(args: argparse.Namespace, done: TrainState) -> int:
    """Rows that the run will have consumed after --train-iters steps."""
    return done.consumed_samples + (args.train_iters - done.iteration) * args.global_batch_size


class Schedule(OptimizerParamScheduler):
    """The schedule that the flags describe, for a run that has come to `done`."""

    def __init__(self, optimizer, args: argparse.Namespace, done: TrainState):
        rows = rows_of_run(args, done)
        super().__init__(
            optimizer, init_lr=0.0, max_lr=args.lr, min_lr=args.min_lr,
            lr_warmup_steps=int(args.lr_warmup_fraction * rows), lr_decay_steps=rows,
            lr_decay_style=args.lr_decay_style, start_wd=args.weight_decay, end_wd=args.weight_decay,
            wd_incr_steps=rows, wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
            override_opt_param_scheduler=args.override_opt_param_scheduler)

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint's position. The end of the decay is this run's, the warm-up the checkpoint's.

        With --override-opt-param-scheduler the warm-up is that of the flags, too.
        """
        if not self.override_opt_param_scheduler:
            self.lr_warmup_steps = state_dict["lr_warmup_steps"]
        super().load_state_dict({**state_dict, "lr_warmup_steps": self.lr_warmup_steps,
                                 "lr_decay_steps": self.lr_decay_steps, "wd_incr_steps": self.wd_incr_steps})
