"""Finds the rank that others wait for, when one hangs: a collective's timeout alone says only that somebody waited.

1. Every rank reports into a store that rank 0 keeps, from a thread of its own: the number and name of its phase, when
   it last moved (a phase began, a model was called), and where its main thread is.
2. When a rank has not moved for nine tenths of --distributed-timeout-minutes (while starting or saving, PATIENCE times
   as long: large files are read and written there, by some ranks alone), a rank that is alive prints who is to blame,
   and all exit; the collectives' own timeout comes later. To blame are ranks whose thread is silent as well (stopped,
   swapped out, their node lost), else those in the earliest phase, else those that are in no collective while others
   are, else the one that stood still first.
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
"""Times as long as in a step that a rank may stand still while it starts or saves."""


@dataclass
class Report:
    """Where a rank is."""

    number: int
    """Phases begun."""
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
    """Watches this rank from `watch` on; does nothing in a run of one.

    Args:
        timeout: seconds without a move after which a rank hangs, in a step.
    """

    def __init__(self, timeout: float = math.inf):
        super().__init__(name="watchdog", daemon=True)
        self.timeout, self.period = timeout, min(5.0, timeout / 8)
        self._number, self._phase, self._moved, self._limit = 0, "start", time.time(), PATIENCE * timeout
        self._is_over = threading.Event()

    def watch(self) -> None:
        """Begin, on all ranks, once the process groups have started."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size > 1:
            # A store of its own: the main thread may be waiting on that of the process groups.
            host, usual = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
            if self.rank == 0:
                self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=usual)
            port = [self.store.port if self.rank == 0 else None]
            dist.broadcast_object_list(port)
            if self.rank > 0:
                self.store = dist.TCPStore(host, port[0], is_master=False, timeout=usual)
            dist.barrier()  # a rank 0 that ends at once would leave the others looking for its store
            self.store.set_timeout(timedelta(seconds=self.period))
            self._report()
            self.start()

    def enter(self, phase: str, patience: int = 1) -> None:
        """A phase begins, on every rank in the same order.

        Args:
            patience: times the timeout that a rank may stand still in it.
        """
        self._number, self._phase, self._moved = self._number + 1, phase, time.time()
        self._limit = patience * self.timeout

    def move(self, *_) -> None:
        """Something happened; a forward hook of models."""
        self._moved = time.time()

    def run(self) -> None:
        while not self._is_over.wait(self.period):
            try:
                self._report()
            except (RuntimeError, dist.DistError):  # the store has gone, or its rank hangs
                pass
            if time.time() - self._moved > self._limit:
                self._give_up()

    def stop(self) -> None:
        """No more watching: an interpreter that ends while a thread is in torch's store aborts."""
        self._is_over.set()
        if self.is_alive():
            self.join(timeout=1.0)  # it may be waiting for a store that is gone

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
            time.sleep(2 * self.period)  # the speaker first
        os._exit(EXIT_HUNG)


def _main_thread() -> tuple[str, bool]:
    """Where it is, outside of libraries where that is known, and whether it waits in torch.distributed."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    own = [frame for frame in stack if "site-packages" not in frame.filename] or stack
    where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} {own[-1].name}"
    return where, any(os.path.join("torch", "distributed") in frame.filename for frame in stack)


def diagnose(reports: dict[int, Report], now: float, silence: float) -> tuple[str, int]:
    """Who is to blame, in words, and the rank that is to say it.

    Args:
        silence: seconds without a report after which a rank does not answer.
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
