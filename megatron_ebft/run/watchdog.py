"""Names the rank that hangs. The timeout of a collective alone says only that some rank waited.

1. A thread of every rank reports into a store that rank 0 keeps: number and name of its phase, the time of its last
   move (a phase began, a model was called), and the line where its main thread is.
2. A rank hangs if it has not moved for nine tenths of --distributed-timeout-minutes. While starting or saving the limit
   is PATIENCE times as long, since some ranks read or write large files alone. A rank that is alive then prints which
   ranks are to blame, and all ranks exit before the collectives time out.
3. To blame are the ranks whose thread is silent too (stopped, swapped out, their node lost). If there are none, those
   in the earliest phase; then those in no collective while others are in one; then the one that stood still first.
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

from megatron_ebft.run.stopping import EXIT_HUNG

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
    moved: float
    """Unix time of its last move."""
    reported: float
    """Unix time of this report."""


class Watchdog(threading.Thread):
    """Watches this rank once `watch` is called. In a run of one rank it does nothing.

    Args:
        timeout: seconds without a move, within a step, after which a rank counts as hanging.
    """

    def __init__(self, timeout: float = math.inf):
        super().__init__(name="watchdog", daemon=True)
        self.timeout, self.period = timeout, min(5.0, timeout / 8)
        self._number, self._phase, self._moved, self._limit = 0, "start", time.time(), PATIENCE * timeout
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
        self._number, self._phase, self._moved = self._number + 1, phase, time.time()
        self._limit = patience * self.timeout

    def move(self, *_) -> None:
        """Note that this rank is moving. The signature fits a forward hook."""
        self._moved = time.time()

    def run(self) -> None:
        while not self._is_over.wait(self.period):
            try:
                self._report()
            except (RuntimeError, dist.DistError):  # the store is gone, or its rank hangs
                pass
            if time.time() - self._moved > self._limit:
                self._give_up()

    def stop(self) -> None:
        """Stop watching: an interpreter that ends while a thread uses torch's store aborts."""
        self._is_over.set()
        if self.is_alive():
            self.join(timeout=1.0)  # the thread may be waiting for a store that is gone

    def _report(self) -> None:
        place, is_waiting = _main_thread()
        report = Report(self._number, self._phase, socket.gethostname(), place, is_waiting, self._moved, time.time())
        self.store.set(f"ebft/{self.rank}", json.dumps(vars(report)))

    def _give_up(self) -> None:
        try:
            reports = {rank: Report(**json.loads(self.store.get(f"ebft/{rank}"))) for rank in range(self.world_size)}
            text, speaker = diagnose(reports, time.time(), 3 * self.period)
        except (RuntimeError, dist.DistError) as error:
            text, speaker = f"rank 0, which keeps the store of all ranks, does not answer ({error})", self.rank
        if self.rank == speaker:
            print(f"error: no progress for {self._limit:.0f} s: {text}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.period)  # the speaker prints first
        os._exit(EXIT_HUNG)


def _main_thread() -> tuple[str, bool]:
    """Innermost line of the main thread outside of libraries, and whether it waits in torch.distributed."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    own = [frame for frame in stack if "site-packages" not in frame.filename] or stack
    where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} {own[-1].name}"
    return where, any(os.path.join("torch", "distributed") in frame.filename for frame in stack)


def diagnose(reports: dict[int, Report], now: float, silence: float) -> tuple[str, int]:
    """Who is to blame, in words, and the rank that prints it.

    Args:
        now: Unix time.
        silence: seconds without a report after which a rank counts as silent.
    """
    silent = [rank for rank, report in reports.items() if now - report.reported > silence]
    earliest = min(report.number for report in reports.values())
    behind = [rank for rank, report in reports.items() if report.number == earliest]
    if silent:
        blamed, why = silent, "does not answer (stopped, or its node is lost)"
    elif len(behind) < len(reports):
        blamed, why = behind, "is behind the others"
    elif 0 < sum(report.is_waiting for report in reports.values()) < len(reports):
        blamed = [rank for rank, report in reports.items() if not report.is_waiting]
        why = "does not come to meet the others"
    else:
        blamed, why = [min(reports, key=lambda rank: reports[rank].moved)], "was the first to stand still"
    said = "; ".join(f"rank {rank} on {reports[rank].host} {why}: in {reports[rank].phase}, at {reports[rank].place}, "
                     f"last moved {now - reports[rank].moved:.0f} s ago" for rank in blamed)
    waiting = sorted({report.phase for rank, report in reports.items() if rank not in blamed})
    speaker = min(rank for rank in reports if rank not in silent) if len(silent) < len(reports) else min(reports)
    return f"{said}. The others wait in {', '.join(waiting) or 'the same place'}", speaker
