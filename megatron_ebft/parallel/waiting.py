"""How long this rank waits in collectives: for the slower ranks, and for the messages themselves.

1. A rank's own time is that of a step less what it waits. It names a straggler: the others wait for it, so that the
   step takes equally long on every rank.
2. torch.distributed issues each collective through a method of ProcessGroup, and waits for it in Work.wait. While it
   measures, `Waiting` puts a clock around both.
3. On a CPU the clock is the wall clock. On a GPU the host does not wait: two events on the current stream tell for how
   long the stream stood still. A message that overlaps with computing counts for what is left of it.
"""

import time
from collections import defaultdict

import torch
import torch.distributed as dist

from megatron_ebft.common.device import have_gpu, synchronize

CALLS = ("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "gather", "scatter",
         "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "alltoall", "alltoall_base",
         "reduce_scatter_tensor_coalesced", "send", "recv", "barrier", "_end_coalescing",
         "all_gather_single", "reduce_scatter_single", "all_to_all_single")
"""Methods of ProcessGroup that may wait. Those of the last line are new in torch 2.14."""


class Waiting:
    """Measures between `begin` and `end`. One at a time measures in a process.

    Attributes:
        seconds: waited so far, by the value that `phase` had.
        phase: what the next waits are counted for.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase = ""
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._originals: list[tuple[type, str, object]] = []

    def begin(self) -> None:
        """Start from zero."""
        self.seconds.clear()
        clocked = self._clocked_on_gpu if have_gpu() else self._clocked
        for owner, names in ((dist.ProcessGroup, CALLS), (dist.Work, ("wait",))):
            for name in set(names) & vars(owner).keys():
                original = vars(owner)[name]
                self._originals.append((owner, name, original))
                setattr(owner, name, clocked(original))

    def end(self) -> None:
        """Stop measuring, if it does."""
        while self._originals:
            setattr(*self._originals.pop())
        if self._events:
            synchronize()
        for phase, *pair in self._events:
            self.seconds[phase] += pair[0].elapsed_time(pair[1]) / 1e3
            self._free.append(tuple(pair))
        self._events.clear()

    def _clocked(self, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[self.phase] += time.perf_counter() - start
        return call

    def _clocked_on_gpu(self, function):
        def call(*args, **kwargs):
            first, last = self._free.pop() if self._free else (torch.cuda.Event(enable_timing=True),
                                                               torch.cuda.Event(enable_timing=True))
            first.record()
            try:
                return function(*args, **kwargs)
            finally:
                last.record()
                self._events.append((self.phase, first, last))
        return call
