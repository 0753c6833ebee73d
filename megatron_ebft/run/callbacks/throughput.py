"""Throughput, memory and stragglers (--log-throughput), from one reduction in each step that is logged.

1. Each rank contributes its own seconds by phase (what it did not spend waiting for others, parallel/waiting.py) and
   the peaks of its memory. All ranks get all of these few numbers.
2. Operations and messages of a step are planned (plan/of_run.py): torch's counter sees neither Transformer Engine's
   kernels nor compiled ones. Until the plan is made, a step has no TFLOP/s. Tokens that --ebft-skip-duplicates leaves
   out are deducted from the operations of their phase.
3. Ranks are compared within their pipeline stage, since stages do different work.
"""

import socket
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ebft.common.device import device, have_gpu, matmul_rate, peak_memory, peak_tflops
from megatron_ebft.parallel.waiting import Waiting
from megatron_ebft.run.callbacks.callback import Callback, StepEnd
from megatron_ebft.run.loop import is_due
from megatron_ebft.run.plan.of_run import Planned, Planning
from megatron_ebft.run.state import Run

STRAGGLES, IN_A_ROW = 1.2, 5
"""How many times as long as the others a rank computes, and in how many logged steps in a row, before its name is
printed."""


@dataclass
class Slowest:
    """The rank that computes longest, compared with the other ranks of its pipeline stage."""

    rank: int
    ratio: float
    """Its own time over the median of theirs; 1 for a stage of one rank."""
    phase: str
    """Where it loses the most."""


def slowest_rank(own: list[dict[str, float]], stages: int) -> Slowest:
    """Who is slowest.

    Args:
        own: by rank, its own seconds by phase.
        stages: pipeline stages, in the order of ranks.
    """
    size, totals, slowest = len(own) // stages, [sum(phases.values()) for phases in own], []
    for first in range(0, len(own), size):
        rank = max(range(first, first + size), key=totals.__getitem__)
        others = [x for x in range(first, first + size) if x != rank] or [rank]
        lost = {phase: own[rank][phase] - statistics.median(own[x][phase] for x in others) for phase in own[rank]}
        slowest.append(Slowest(rank, totals[rank] / statistics.median(totals[x] for x in others),
                               max(lost, key=lost.get)))
    return max(slowest, key=lambda candidate: candidate.ratio)


def computed_flops(planned: Planned, metrics: dict[str, float], is_fused: bool) -> float:
    """Operations of a step on a mean rank, without those of tokens that were left out."""
    trained, encoded = (1 - metrics.get(f"{name}_tokens_saved", 0.0) for name in ("training", "encoder"))
    # The start computes the rollouts that the encoder does, in whole rows.
    kept = {"features": encoded, "train": trained, "start_scores": encoded} | ({"rollout": trained} if is_fused else {})
    return sum(flops * kept.get(phase, 1.0) for phase, flops in planned.flops.items())


class Throughput(Callback):
    """Logs throughput, memory and the slowest rank; names a straggler on the console."""

    def __init__(self):
        self.waiting = Waiting()
        self.planning: Planning | None = None
        self.planned: Planned | None = None
        self.is_measured = False
        self.slow_steps, self.suspect = 0, -1

    def train_start(self, run, log):
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        self.hosts, self.is_fused = hosts, run.config is not None and run.mode == "ebft" and run.config.fused
        if dist.get_rank() == 0:
            self.peak, origin = peak_of(run.args)
            log.print(f"MFU is relative to {self.peak:.3g} TFLOP/s of a rank: {origin}")
            if run.mode != "rlvr":
                vocab_size = run.metadata["architecture"]["vocab_size"]
                self.planning = Planning(run.args, vocab_size, dist.get_world_size(), self.is_fused)

    def step_start(self, run, log, iteration):
        self.is_measured = is_due(iteration, run.args.log_interval, run.args)
        if self.is_measured:
            self.waiting.begin()

    def phase(self, name):
        self.waiting.phase = name

    def step_end(self, run, log, step):
        if not self.is_measured:
            return
        self.waiting.end()
        own, memory = self._gather(step)
        if not log.is_main:
            return
        slowest = slowest_rank(own, run.args.pipeline_model_parallel_size)
        self._suspect(slowest, own, step.iteration, log)
        self._read_plan(log)
        log.record(step.iteration, self._of_step(run, step) | _of_ranks(own, memory, slowest))

    def train_end(self, run, log, is_done):
        self.waiting.end()
        if self.planning is not None:
            self.planning.close()
            self.planning = None

    def _gather(self, step: StepEnd) -> tuple[list[dict[str, float]], list[list[float]]]:
        """By rank: own seconds by phase; bytes in use and held, at the peak.

        Verifying is no phase here: one rank does it for its tensor-parallel peers, so it says nothing about the rank.
        """
        phases = [phase for phase in step.seconds if phase != "verify"]
        own = [step.seconds[phase] - self.waiting.seconds[phase] for phase in phases]
        mine = torch.tensor([*peak_memory(), *own], dtype=torch.float64, device=device())
        gathered = torch.empty(len(self.hosts), len(mine), dtype=torch.float64, device=device())
        dist.all_gather_into_tensor(gathered.view(-1), mine)
        rows = gathered.tolist()
        return [dict(zip(phases, row[2:])) for row in rows], [row[:2] for row in rows]

    def _of_step(self, run: Run, step: StepEnd) -> dict[str, float]:
        """Figures of a step as a whole."""
        args, ranks, seconds = run.args, len(self.hosts), step.duration
        gold = args.global_batch_size * args.seq_length if run.mode != "rlvr" else 0
        drawn = step.metrics.get("tokens", 0)  # of completions
        if run.mode == "ebft":
            layout = run.config.layout
            drawn = args.global_batch_size * layout.num_blocks * run.config.num_samples * layout.rollout_length
        values = {**({"gold_tokens_per_second_per_gpu": gold / seconds / ranks} if gold else {}),
                  "tokens_per_second_per_gpu": (gold + drawn) / seconds / ranks,
                  "share_waiting": sum(self.waiting.seconds.values()) / seconds}
        values |= {f"share_{phase}": value / seconds for phase, value in step.seconds.items()}
        if self.planned is not None:
            rate = computed_flops(self.planned, step.metrics, self.is_fused) / seconds / 1e12
            values |= {"tflops_per_gpu": rate, "mfu": rate / self.peak}
            values |= {f"network_gb_{phase}": sent / 1e9 for phase, sent in self.planned.sent.items() if sent}
        return {f"throughput/{name}": value for name, value in values.items()}

    def _read_plan(self, log) -> None:
        if self.planning is None or not self.planning.is_over():
            return
        try:
            self.planned = self.planning.result()
            log.print(f"a step computes {sum(self.planned.flops.values()) / 1e12:.3g} TFLOP on a rank, and sends "
                      f"{sum(self.planned.sent.values()) / 1e9:.3g} GB")
        except ValueError as error:
            log.print(f"warning: --log-throughput: the operations of a step could not be planned, so there are no "
                      f"TFLOP/s ({error})")
        self.planning.close()
        self.planning = None

    def _suspect(self, slowest: Slowest, own: list[dict[str, float]], iteration: int, log) -> None:
        """Print the name of a rank that has been slow for a while, once."""
        is_slow = slowest.ratio > STRAGGLES
        self.slow_steps = self.slow_steps + 1 if is_slow and slowest.rank == self.suspect else int(is_slow)
        self.suspect = slowest.rank
        if self.slow_steps == IN_A_ROW:
            log.print(f"warning: step {iteration}: rank {slowest.rank} on {self.hosts[slowest.rank]} computes "
                      f"{slowest.ratio:.2f} times as long as the other ranks of its pipeline stage "
                      f"({sum(own[slowest.rank].values()):.3g} s a step, most of the difference in {slowest.phase}), "
                      "and they wait for it: look for other processes there and at its GPU's clocks (nvidia-smi -q -d "
                      "PERFORMANCE,CLOCK), or leave the node out (sbatch --exclude)")


def _of_ranks(own: list[dict[str, float]], memory: list[list[float]], slowest: Slowest) -> dict[str, float]:
    """The ends of what ranks report, and which rank is there."""
    seconds = [sum(phases.values()) for phases in own]
    values = {"ranks/slowest": slowest.rank, "ranks/slowest_ratio": slowest.ratio,
              "ranks/own_seconds_max": max(seconds), "ranks/own_seconds_min": min(seconds)}
    for name, each in zip(("allocated", "reserved"), zip(*memory)):
        values |= {f"memory/{name}_gib": max(each) / 2**30, f"memory/{name}_rank": each.index(max(each))}
    return values


def peak_of(args) -> tuple[float, str]:
    """Peak of this rank's device in TFLOP/s, and where the figure comes from."""
    precision = "fp8" if args.fp8_format else "bf16" if args.bf16 else "fp32"
    if args.ebft_peak_tflops:
        return args.ebft_peak_tflops, "--ebft-peak-tflops"
    name = torch.cuda.get_device_name() if have_gpu() else "CPU"
    known = peak_tflops(name, precision)
    if known is not None:
        return known, f"the dense {precision} peak of {name}"
    rate = matmul_rate(torch.bfloat16 if args.bf16 else torch.float32, 8192 if have_gpu() else 1024)
    return rate / 1e12, f"a matrix product measured on {name}"
