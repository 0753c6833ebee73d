"""Profiles a few steps (--profile), by Megatron's flags.

1. Ranges name the step, its phases and the layers of each model, in whichever profiler runs.
2. For Nsight Systems (`nsys profile --capture-range=cudaProfilerApi …`) the profiled steps are the captured range, and
   ranges are NVTX's. With --use-pytorch-profiler each rank of --profile-ranks writes a Chrome trace.
3. --record-memory-history records every allocation on a GPU from the start on, and writes a snapshot after the last
   profiled step, and where memory runs out.
"""

import os

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ebft.common.device import have_gpu, synchronize
from megatron_ebft.common.disk import aside
from megatron_ebft.model.weights import local_layers
from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.state import Run


class Ranges:
    """Ranges of this thread's time, each inside the one before it."""

    def __init__(self, for_nsys: bool):
        self.for_nsys = for_nsys
        self.open: list[record_function | str] = []

    def push(self, name: str) -> None:
        if self.for_nsys:
            torch.cuda.nvtx.range_push(name)
            self.open.append(name)
        else:
            self.open.append(record_function(name))
            self.open[-1].__enter__()

    def pop(self) -> None:
        last = self.open.pop()
        if self.for_nsys:
            torch.cuda.nvtx.range_pop()
        else:
            last.__exit__(None, None, None)


class Profile(Callback):
    """Profiles the steps from --profile-step-start to --profile-step-end on this rank.

    Args:
        args: the run's flags.
        folder: for traces and snapshots.

    Raises:
        ValueError: --profile-ranks names a rank that there is not.
    """

    def __init__(self, args, folder: str):
        if max(args.profile_ranks) >= dist.get_world_size():
            raise ValueError(f"--profile-ranks {max(args.profile_ranks)}: there are {dist.get_world_size()} ranks, "
                             "counted from 0")
        self.folder, self.steps = folder, range(args.profile_step_start + 1, args.profile_step_end + 1)
        self.by_torch, self.with_memory = args.use_pytorch_profiler, args.record_memory_history
        self.is_here = dist.get_rank() in args.profile_ranks
        self.ranges, self.profiler = Ranges(for_nsys=not self.by_torch), None
        self.is_running = self.is_in_phase = False
        self.hooks: list = []

    def train_start(self, run, log):
        if self.with_memory and not have_gpu():
            log.print("note: --record-memory-history: there is no GPU whose memory it could record")
            self.with_memory = False
        if not self.by_torch and not have_gpu():
            log.print("note: --profile: there is no GPU for Nsight Systems; --use-pytorch-profiler also profiles a CPU")
            self.is_here = False
        first, last = run.state.iteration + 1, run.args.train_iters
        if first <= last and (first > self.steps[-1] or last < self.steps[0]):
            log.print(f"note: --profile-step-start {self.steps[0] - 1} --profile-step-end {self.steps[-1]}: this run "
                      f"has steps {first} to {last}, so none is profiled")
        if self.with_memory and self.is_here:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            torch._C._cuda_attach_out_of_memory_observer(lambda *_: self._write_memory())

    def step_start(self, run, log, iteration):
        if not self.is_here or iteration not in self.steps:
            return
        if not self.is_running:
            self.is_running = True
            self._begin(run)
        self.ranges.push(f"step {iteration}")

    def phase(self, name):
        if not self.is_running:
            return
        self._end_phase()
        if name:
            self.ranges.push(name)
            self.is_in_phase = True

    def step_end(self, run, log, step):
        if not self.is_running:
            return
        self._end_phase()
        self.ranges.pop()
        if step.iteration >= self.steps[-1]:
            self._end(step.iteration)

    def train_end(self, run, log, is_done):
        if self.is_running:  # the run stops within a step or between two
            self._end(run.state.iteration)

    def _end_phase(self) -> None:
        if self.is_in_phase:
            self.ranges.pop()
            self.is_in_phase = False

    def _begin(self, run: Run) -> None:
        models = {"policy": run.policy, "encoder": [run.encoder], "start": [run.start]}
        for name, chunks in models.items():
            for chunk in filter(None, chunks):
                for number, layer in local_layers(chunk).items():
                    self._name(layer, f"{name} layer {number}")
        synchronize()
        if self.by_torch:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if have_gpu() else [])]
            self.profiler = profile(activities=kinds)
            self.profiler.start()
        else:
            torch.cuda.profiler.start()

    def _name(self, layer: torch.nn.Module, name: str) -> None:
        """Put a range around the forward pass of a layer."""
        self.hooks += [layer.register_forward_pre_hook(lambda *_: self.ranges.push(name)),
                       layer.register_forward_hook(lambda *_: self.ranges.pop(), always_call=True)]

    def _end(self, iteration: int) -> None:
        self.is_running = False
        for hook in self.hooks:
            hook.remove()
        while self.ranges.open:
            self.ranges.pop()
        synchronize()
        if self.profiler is None:
            torch.cuda.profiler.stop()
        else:
            self.profiler.stop()
            self._write(self.profiler.export_chrome_trace, f"steps-{self.steps[0]}-{iteration}", "trace.json.gz")
        if self.with_memory:
            self._write_memory()

    def _write_memory(self) -> None:
        self._write(torch.cuda.memory._dump_snapshot, "memory", "pickle")

    def _write(self, write, name: str, suffix: str) -> None:
        """Let `write` make a file of this rank. A full disk costs a warning."""
        path = os.path.join(self.folder, f"{name}-rank-{dist.get_rank()}.{suffix}")
        try:
            os.makedirs(self.folder, exist_ok=True)
            with aside(path) as file:
                write(f"{file}")
            print(f"profile: {path}", flush=True)  # of any rank
        except OSError as error:
            print(f"warning: {path} could not be written ({error}). Training goes on", flush=True)


def profile_folder(args) -> str:
    """Where a run puts its traces and snapshots."""
    return os.path.join(args.save or ".", "profiles")
