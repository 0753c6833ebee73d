"""Names the rank that hangs. The timeout of a collective alone says only that some rank waited.

1. A thread of every rank reports into a store that rank 0 keeps: number and name of its phase, for how long it has not
   moved (begun a phase, or called a model), and the line where its main thread is. No rank reads another's clock.
2. A rank hangs if it has not moved for nine tenths of --distributed-timeout-minutes. While starting or saving the limit
   is PATIENCE times as long, since some ranks read or write large files alone. A rank that is alive then prints which
   ranks are to blame, and all ranks exit before the collectives time out.
3. To blame are the ranks whose thread is silent too (stopped, swapped out, their node lost): a second look at the store
   finds their reports unchanged. If there are none, those in the earliest phase; then those in no collective while
   others are in one; then the one that stood still first.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_ebft.parallel import waiting
from megatron_ebft.run import flight_recorder
from megatron_ebft.run.stopping import EXIT_HUNG

CLOCK = waiting.__file__
"""Its functions stand around collectives."""
PATIENCE = 6
"""How many times longer than in a step a rank may stand still while it starts or saves."""


@dataclass
class Report:
    """Where a rank is."""

    number: int
    """Number of phases begun."""
    phase: str
    host: str
    place: str
    """Innermost line of the main thread's own code."""
    is_waiting: bool
    """Whether the main thread is in a collective."""
    still: float
    """Seconds since its last move."""
    count: int
    """Number of this report."""


class Watchdog(threading.Thread):
    """Watches this rank once `watch` is called. In a run of one rank it does nothing.

    Args:
        timeout: seconds without a move, within a step, after which a rank counts as hanging.
        folder: for what NCCL has recorded, if a rank hangs.
    """

    def __init__(self, timeout: float = math.inf, folder: str = "hang"):
        super().__init__(name="watchdog", daemon=True)
        self.timeout, self.period, self.folder = timeout, min(5.0, timeout / 8), folder
        self._number, self._phase, self._moved, self._limit = 0, "start", time.monotonic(), PATIENCE * timeout
        self._reports = 0
        self._is_over = threading.Event()

    def watch(self) -> None:
        """Start watching. All ranks call this once the process groups have started."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size > 1:
            # A separate store: the main thread may be waiting on the one of the process groups.
            host, usual = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
            if self.rank == 0:
                self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=usual)
            port = [self.store.port if self.rank == 0 else None]
            dist.broadcast_object_list(port)
            if self.rank > 0:
                self.store = dist.TCPStore(host, port[0], is_master=False, timeout=usual)
            dist.barrier()  # if rank 0 ended at once, the others would look for its store in vain
            self.store.set_timeout(timedelta(seconds=self.period))
            self._report()
            self.start()

    def enter(self, phase: str, patience: int = 1) -> None:
        """Begin a phase. Every rank enters the same phases in the same order.

        Args:
            patience: factor on the timeout during this phase.
        """
        self._number, self._phase, self._moved = self._number + 1, phase, time.monotonic()
        self._limit = patience * self.timeout

    def move(self, *_) -> None:
        """Note that this rank is moving. The signature fits a forward hook."""
        self._moved = time.monotonic()

    def run(self) -> None:
        while not self._is_over.wait(self.period):
            try:
                self._report()
            except (RuntimeError, dist.DistError):  # the store is gone, or its rank hangs
                pass
            if time.monotonic() - self._moved > self._limit:
                self._give_up()

    def stop(self) -> None:
        """Stop watching: an interpreter that ends while a thread uses torch's store aborts."""
        self._is_over.set()
        if self.is_alive():
            self.join(timeout=1.0)  # the thread may be waiting for a store that is gone

    def _report(self) -> None:
        place, is_waiting = _main_thread()
        self._reports += 1
        report = Report(self._number, self._phase, socket.gethostname(), place, is_waiting,
                        time.monotonic() - self._moved, self._reports)
        self.store.set(f"ebft/{self.rank}", json.dumps(vars(report)))

    def _read(self) -> dict[int, Report]:
        return {rank: Report(**json.loads(self.store.get(f"ebft/{rank}"))) for rank in range(self.world_size)}

    def _give_up(self) -> None:
        limit, moved = self._limit, self._moved
        try:
            before = self._read()
            for _ in range(3):
                time.sleep(self.period)
                self._report()
            text, speaker = diagnose(before, self._read())
        except (RuntimeError, dist.DistError) as error:
            text, speaker = f"rank 0, which keeps the store of all ranks, does not answer ({error})", self.rank
        if self._moved != moved:  # the whole job had been suspended, and goes on
            return
        threading.Thread(target=flight_recorder.write, args=[self.folder], daemon=True).start()  # a disk may hang, too
        if self.rank == speaker:
            print(f"error: no progress for {limit:.0f} s: {text}", file=sys.stderr, flush=True)
        time.sleep(2 * self.period)  # the speaker prints first, and rank 0 keeps the store for those who look later
        os._exit(EXIT_HUNG)


def _main_thread() -> tuple[str, bool]:
    """Innermost line of the main thread outside of libraries and clocks, and whether it waits in torch.distributed."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    own = [frame for frame in stack if "site-packages" not in frame.filename and frame.filename != CLOCK] or stack
    where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} {own[-1].name}"
    return where, any(os.path.join("torch", "distributed") in frame.filename for frame in stack)


def diagnose(before: dict[int, Report], after: dict[int, Report]) -> tuple[str, int]:
    """Who is to blame, in words, and the rank that prints it, from two looks at the reports of all ranks."""
    silent = [rank for rank, report in after.items() if report.count == before[rank].count]
    earliest = min(report.number for report in after.values())
    behind = [rank for rank, report in after.items() if report.number == earliest]
    if silent:
        blamed, why = silent, "does not answer (stopped, or its node is lost)"
    elif len(behind) < len(after):
        blamed, why = behind, "is behind the others"
    elif 0 < sum(report.is_waiting for report in after.values()) < len(after):
        blamed = [rank for rank, report in after.items() if not report.is_waiting]
        why = "does not come to meet the others"
    else:
        blamed, why = [max(after, key=lambda rank: after[rank].still)], "was the first to stand still"
    said = "; ".join(f"rank {rank} on {after[rank].host} {why}: in {after[rank].phase}, at {after[rank].place}, not "
                     f"moving for {after[rank].still:.0f} s" + (" when last heard of" if rank in silent else "")
                     for rank in blamed)
    waiting = sorted({report.phase for rank, report in after.items() if rank not in blamed})
    speaker = min(rank for rank in after if rank not in silent) if len(silent) < len(after) else min(after)
    return f"{said}. The others wait in {', '.join(waiting) or 'the same place'}", speaker
