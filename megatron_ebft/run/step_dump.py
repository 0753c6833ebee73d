"""Dumps steps of a training run to files and replays them (the format: step_file.py).

1. `--ebft-dump-steps` dumps every `--ebft-dump-interval`-th step, and every step that fails after its gradient was
   computed.
2. `--ebft-replay-steps` takes rows and rollouts from dumped steps. On the same layout of ranks the run is then the same
   to the last bit, if it dumped separate passes (--ebft-step): replayed rollouts are not sampled, so their steps are
   never fused. On another layout all differences come from the layout.
"""

import os

import torch.distributed as dist

from megatron_ebft.common.errors import StepFailed
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.means import Means
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.run.flags.flag import spelled
from megatron_ebft.run.step_file import Step, gather_results, gather_step, read_step, step_writer

DUMP, REPLAY = "--ebft-dump-steps", "--ebft-replay-steps"
FAILED = "failed_steps"
"""Folder in --save for failed steps, if --ebft-dump-steps names no other."""
MUST_AGREE = ("seq_length", "global_batch_size", "ebft_num_samples", "ebft_stride", "ebft_context_length",
              "ebft_rollout_length", "ebft_temperature", "ebft_document_mask", "ebft_answer_only")
"""Flags that decide what the rollouts are. Other flags may differ, for example to try another whitening."""


class StepDump:
    """A context manager around one step. At its end it dumps the step if it is due or has failed.

    A file that cannot be written costs a warning: dumps only record a run.

    Args:
        iteration: number of the step, counted from 1.
    """

    def __init__(self, args, iteration: int):
        self.args, self.iteration, self.held = args, iteration, None

    def hold(self, gold: GoldBatch, computed: Computed, means: Means) -> None:
        """Keep this rank's part of the step for the dump."""
        if self.args.ebft_dump_steps or self.args.save:
            self.held = gold, computed, means

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if not self.held:
            return
        folder = self.args.ebft_dump_steps
        is_due = kind is None and folder and self.iteration % self.args.ebft_dump_interval == 0
        if (kind is not None and issubclass(kind, StepFailed)) or is_due:
            try:
                self._write(folder or os.path.join(self.args.save, FAILED))
            except ValueError as error:
                if dist.get_rank() == 0:
                    print(f"warning: {error}", flush=True)

    def _write(self, folder: str) -> None:
        gold, computed, means = self.held
        step = gather_step(self.args, self.iteration, gold, computed.rollouts)
        results = gather_results(step, computed.rewards, computed.advantage_BKN, computed.scores, means.reduce())
        with collective_errors():
            if dist.get_rank() == 0:
                with step_writer(step_path(folder, self.iteration), DUMP, step, results, {}):
                    pass  # no gradients: they are spread over the ranks


def step_path(folder: str, iteration: int) -> str:
    """The file of a step in a folder of dumped steps."""
    return os.path.join(folder, f"step_{iteration:07d}.safetensors")


def replayed_step(args, iteration: int, vocab_size: int) -> Step:
    """Read a step from --ebft-replay-steps.

    Raises:
        ValueError: the file is missing or damaged, or does not fit a run with these flags; names the file.
    """
    path = step_path(args.ebft_replay_steps, iteration)
    step = read_step(path, REPLAY, vocab_size)
    if step.iteration != iteration:
        raise ValueError(f"{REPLAY} {path}: is step {step.iteration}, not {iteration}")
    for name in MUST_AGREE:
        if vars(step.args)[name] != vars(args)[name]:
            raise ValueError(f"{REPLAY} {path}: was made with {spelled(name)} {vars(step.args)[name]}, and "
                             f"this run has {vars(args)[name]}")
    if step.rollouts.log_probs_BKNG is None or step.rollouts.entropy_BKNG is None:
        raise ValueError(f"{REPLAY} {path}: has no sampler_log_probs and entropy, which training compares with; it "
                         f"replays what {DUMP} wrote")
    return step


def check_replay(args, done: int, vocab_size: int) -> None:
    """Check every step that a run will replay after `done` steps: rank 0 reads, all raise as `replayed_step`."""
    with collective_errors():
        if dist.get_rank() == 0:
            for iteration in range(done + 1, args.train_iters + 1):
                replayed_step(args, iteration, vocab_size)
