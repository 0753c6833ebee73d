"""Steps of a training run written to files, and taken from there again (the format: step_file.py).

1. `--ebft-dump-steps` writes a step when its turn has come, and whenever it fails after its gradient was computed: that
   is the step one wants to look at.
2. `--ebft-replay-steps` holds documents and rollouts fixed: on the same layout of ranks the run is the same to the last
   bit, on another one the difference is that of the layout.
"""

import os

import torch.distributed as dist

from megatron_ebft.common.errors import StepFailed
from megatron_ebft.method.step import EBFTStep
from megatron_ebft.parallel.errors import together
from megatron_ebft.run.step_file import Step, gather_results, gather_step, read_step, step_writer

DUMP, REPLAY = "--ebft-dump-steps", "--ebft-replay-steps"
FAILED = "failed_steps"
"""Folder in --save for steps that failed, where no other is named."""
MUST_AGREE = ("seq_length", "global_batch_size", "ebft_num_samples", "ebft_stride", "ebft_context_length",
              "ebft_rollout_length", "ebft_temperature", "ebft_document_mask", "ebft_answer_only")
"""Flags that rollouts were drawn by. Others may differ: what would another whitening have made of this step?"""


class StepDump:
    """At the end of its context, dumps the step that was held: if its turn has come, or it failed.

    Raises:
        ValueError: naming the flag, when the file cannot be written.
    """

    def __init__(self, args, iteration: int):
        self.args, self.iteration, self.held = args, iteration, None

    def hold(self, step: EBFTStep) -> None:
        """The step that may have to be written; this rank's part."""
        if self.args.ebft_dump_steps or self.args.save:
            self.held = step

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if not self.held:
            return
        folder = self.args.ebft_dump_steps
        if kind is StepFailed:
            try:
                self._write(folder or os.path.join(self.args.save, FAILED))
            except ValueError as error:  # must not hide why the step failed
                if dist.get_rank() == 0:
                    print(error, flush=True)
        elif kind is None and folder and self.iteration % self.args.ebft_dump_interval == 0:
            self._write(folder)

    def _write(self, folder: str) -> None:
        held = self.held
        step = gather_step(self.args, self.iteration, held.gold, held.rollouts)
        results = gather_results(step, held.rewards, held.advantage_BKN, held.scores, held.means.reduce())
        with together():
            if dist.get_rank() == 0:
                with step_writer(step_path(folder, self.iteration), DUMP, step, results, {}):
                    pass  # gradients are spread over the ranks


def step_path(folder: str, iteration: int) -> str:
    return os.path.join(folder, f"step_{iteration:07d}.safetensors")


def replayed_step(args, iteration: int, vocab_size: int) -> Step:
    """The step of that number in --ebft-replay-steps.

    Raises:
        ValueError: naming the file: it is missing or damaged, or does not belong to a run with these flags.
    """
    path = step_path(args.ebft_replay_steps, iteration)
    step = read_step(path, REPLAY, vocab_size)
    if step.iteration != iteration:
        raise ValueError(f"{REPLAY} {path}: is step {step.iteration}, not {iteration}")
    for name in MUST_AGREE:
        if vars(step.args)[name] != vars(args)[name]:
            raise ValueError(f"{REPLAY} {path}: was made with --{name.replace('_', '-')} {vars(step.args)[name]}, and "
                             f"this run has {vars(args)[name]}")
    if step.rollouts.log_probs_BKNG is None or step.rollouts.entropy_BKNG is None:
        raise ValueError(f"{REPLAY} {path}: has no sampler_log_probs and entropy, which training compares with; it "
                         f"replays what {DUMP} wrote")
    return step


def check_replay(args, done: int, vocab_size: int) -> None:
    """Read every step that a run will replay after `done` steps, on rank 0; raises as `replayed_step`, everywhere."""
    with together():
        if dist.get_rank() == 0:
            for iteration in range(done + 1, args.train_iters + 1):
                replayed_step(args, iteration, vocab_size)
