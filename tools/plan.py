"""Tells, without a GPU, whether a run fits into memory, what its ranks send, and how long a step takes.

    python tools/plan.py --world-size 32 --gpu h100 <model, method and parallelism flags of the run>

    Llama 3.1  --num-layers --hidden-size --ffn-hidden-size --num-attention-heads  and for all
    8B                   32          4096             14336                    32  --num-query-groups 8 --bf16
    70B                  80          8192             28672                    64  --vocab-size 128256
    405B                126         16384             53248                   128  --untie-embeddings-and-output-weights

1. The first, a middle and the last pipeline stage each run as one rank of the real code: one `train_step` on tensors
   without data, among ranks that do not exist (megatron_ebft/run/plan). There is no second model of the code, so
   memory, operations and messages are those of the code.
2. The plan skips no rollouts (--ebft-skip-duplicates is off), since savings depend on the policy. A fused step copies
   keys where rollouts part; if they share little, this may take a little more memory than sharing saves. It plans
   nothing in FP8, which needs a GPU. FP8 pads rows a little; the weights of a rollout or encoder pass in FP8 take half
   as much again during the pass, and with --fp8-format the policy's weights take twice as much all the time.
3. The plan leaves out CUDA's context, NCCL's buffers and fragmentation, for which it sets aside UNUSABLE of the memory,
   and temporaries inside operations. Evaluation needs less than training: its rows are cut to the length of training's,
   without a backward pass.
4. Times are an estimate. An operation takes the longer of computing and of moving its bytes, at EFFICIENCY of the
   peaks. A collective takes its ring's bytes over the slowest link. Nothing overlaps. Pipeline stages idle as in the
   schedules of Megatron (training) and of rollout/schedule.py (sampling).
5. If the run does not fit, the tool plans single changes of flags and names the one that fits and takes the least time.
6. The run's flags can come from its --config file; what the plan does not read (data, checkpoints, logging) is ignored
   there.
"""

import argparse
import math
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from megatron_ebft.common.disk import aside, write_json
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import Flag, Group, above, at_least, spelled
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import STEP

GIB, KINDS = 2**30, ("weights", "gradients", "optimizer", "encoder", "start", "caches", "logits", "activations",
                     "data")
EFFICIENCY = {"compute": 0.6, "memory": 0.7, "links": 0.7}
"""Fractions of the peaks that large matrix products, streaming kernels and large messages reach."""
LAUNCH, LATENCY = 5e-6, 2e-5
"""Shortest time of an operation and of a collective, in seconds."""
UNUSABLE = 0.08
CLUSTER = Group("cluster", (
    Flag("--world-size", int, "total number of GPUs", valid=at_least(1), required=True),
    Flag("--gpu", str, "kind of GPU; custom needs the next five flags", default="h100",
         choices=("h100", "h200", "custom")),
    Flag("--gpu-memory-gib", float, "memory of a GPU", valid=above(0), default_text="the GPU's"),
    Flag("--peak-tflops", float, "dense bfloat16 peak of a GPU", valid=above(0), default_text="the GPU's"),
    Flag("--memory-bandwidth-gbs", float, "memory bandwidth of a GPU, in GB/s", valid=above(0),
         default_text="the GPU's"),
    Flag("--intra-node-gbs", float, "bandwidth of a GPU inside a node, in GB/s in each direction", valid=above(0),
         default_text="the GPU's"),
    Flag("--inter-node-gbs", float, "bandwidth of a GPU between nodes, in GB/s in each direction", valid=above(0),
         default_text="the GPU's"),
    Flag("--gpus-per-node", int, "GPUs that NVLink connects", valid=at_least(1), default_text="8"),
    Flag("--json", str, "write all figures to this file", metavar="FILE")))
READS = STEP | {"training_mode", "ebft_document_mask", "ebft_answer_only", "ebft_track_kl"}


@dataclass
class Cluster:
    """GPUs and links, in the units of the flags (CLUSTER)."""

    gpu_memory_gib: float
    peak_tflops: float
    memory_bandwidth_gbs: float
    intra_node_gbs: float
    inter_node_gbs: float
    gpus_per_node: int = 8

    def operation(self, flops: int, size: int) -> float:
        """Seconds of an operation that reads and writes `size` bytes."""
        return max(flops / (self.peak_tflops * 1e12 * EFFICIENCY["compute"]),
                   size / (self.memory_bandwidth_gbs * 1e9 * EFFICIENCY["memory"]), LAUNCH)

    def collective(self, operation: str, calls: int, size: int, ranks: list[int]) -> float:
        """Seconds of `calls` collectives of `size` bytes in all."""
        one_node = min(ranks) // self.gpus_per_node == max(ranks) // self.gpus_per_node
        link = (self.intra_node_gbs if one_node else self.inter_node_gbs) * 1e9 * EFFICIENCY["links"]
        share = {"all-reduce": 2 * (len(ranks) - 1) / len(ranks), "broadcast": 1, "send": 1, "receive": 1}
        return calls * LATENCY + size * share.get(operation, (len(ranks) - 1) / len(ranks)) / link


GPUS = {"h100": Cluster(79.0, 989.0, 3350.0, 450.0, 50.0), "h200": Cluster(139.0, 989.0, 4800.0, 450.0, 50.0)}


def measure_rank(argv: list[str], rank: int, like_gpu: bool = True) -> dict:
    """`measure.measure_rank` for these flags, in its own process. The last figure of each flow becomes its seconds."""
    warnings.filterwarnings("ignore")
    args, cluster = parse(argv)
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.run.plan import measure

    figures = measure.measure_rank(args, rank, args.world_size, cluster.operation, like_gpu)
    for phase in figures["phases"].values():
        phase["flows"] = [[operation, group, calls, size, cluster.collective(operation, calls, size, ranks)]
                          for operation, group, calls, size, ranks in phase["flows"]]
    return figures


def stage_ranks(args) -> dict[str, int]:
    """The ranks to plan, by the name of their pipeline stage."""
    from megatron_ebft.run.plan import measure

    return measure.stage_ranks(args.world_size, args.pipeline_model_parallel_size)


def plan(argv: list[str], ranks: dict[str, int], pool) -> dict[str, dict]:
    """Figures of each of the ranks, by name."""
    waiting = {name: pool.submit(measure_rank, argv, rank) for name, rank in ranks.items()}
    stages = {}
    for name, future in waiting.items():
        stages[name] = future.result()
        print(f"planned rank {stages[name]['rank']} ({name}) in {stages[name]['took']:.0f} s", flush=True)
    return stages


def peak(stage: dict) -> tuple[str, dict[str, int]]:
    """The phase that needs the most memory, and its bytes by kind."""
    name = max(stage["phases"], key=lambda name: sum(stage["phases"][name]["peak"].values()))
    return name, stage["phases"][name]["peak"]


def peak_gib(stage: dict) -> float:
    return sum(peak(stage)[1].values()) / GIB


def phase_seconds(stage: dict, name: str) -> tuple[float, float, float]:
    """Seconds of computing, of collectives and of waiting for other stages."""
    phase = stage["phases"][name]
    links, share = sum(flow[-1] for flow in phase["flows"]), stage["idle"].get(name, 0.0)
    return phase["seconds"], links, (phase["seconds"] + links) * share / (1 - share)


def changes(args) -> list[list[str]]:
    """Single changes that save memory, cheapest first, each as flags to add."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    is_ebft, flags = args.training_mode == "ebft", []
    separate = ["--ebft-step", "separate"] if is_ebft and args.ebft_step == "fused" else []
    if tp > 1 and not args.sequence_parallel:
        flags.append(["--sequence-parallel"])
    if args.micro_batch_size > 1:
        flags.append(["--micro-batch-size", "1"])
    if is_ebft:
        blocks = (args.seq_length - args.ebft_rollout_length - args.ebft_context_length) // args.ebft_stride + 1
        if args.ebft_step != "fused":
            flags.append(["--ebft-rollout-rows", "1"])
        flags += [["--ebft-blocks-per-microbatch", str(math.ceil((args.ebft_blocks_per_microbatch or blocks) / part))]
                  for part in (2, 4)]
    if args.recompute_granularity != "full":
        flags.append(["--recompute-granularity", "full", *separate])
    if is_ebft and args.ebft_track_kl and not args.ebft_kl_coef:
        flags.append(["--no-ebft-track-kl"])
    flags.append(["--tensor-model-parallel-size", str(2 * tp), *([] if args.sequence_parallel else
                                                                  ["--sequence-parallel"])])
    flags.append(["--pipeline-model-parallel-size", str(2 * pp), *separate])
    return flags


def advise(argv: list[str], args, stages: dict[str, dict], limit: float, pool) -> str:
    """A sentence with the single change that makes the tightest rank fit at the least cost in time."""
    tightest = max(stages, key=lambda name: peak_gib(stages[name]))
    waiting, tried = [], []
    for change in changes(args):
        try:
            changed, _ = parse(argv + change)
        except ValueError:
            continue
        ranks = stage_ranks(changed)
        rank = ranks.get(tightest, next(iter(ranks.values())))
        waiting.append((change, pool.submit(measure_rank, argv + change, rank)))
    for change, result in waiting:
        try:
            figures = result.result()
        except ValueError:
            continue
        size = peak_gib(figures)
        seconds = sum(sum(phase_seconds(figures, name)) for name in figures["phases"])
        print(f"with {' '.join(change)}: {size:.1f} GiB, {seconds:.2f} s a step", flush=True)
        tried.append((size > limit, seconds if size <= limit else size, size, change))
    too_large, seconds, size, change = min(tried)
    if not too_large:
        return (f"It fits with {' '.join(change)}: {size:.1f} GiB and {seconds:.2f} s a step on the rank that needs "
                "the most now.")
    return (f"No single change of a flag makes it fit; {' '.join(change)} comes closest with {size:.1f} GiB. Combine "
            "several, or take more GPUs.")


def report(args, cluster: Cluster, stages: dict[str, dict]) -> str:
    """All figures, as Markdown."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    names = list(stages)
    lines = [f"{args.world_size} ranks: tensor {tp}{' with sequence' if args.sequence_parallel else ''} × pipeline "
             f"{pp} × data {args.world_size // (tp * pp)}; a GPU has {cluster.gpu_memory_gib:g} GiB and "
             f"{cluster.peak_tflops:g} TFLOP/s", ""]
    lines += _table(["GiB at the peak", *names], [
        ["million parameters", *(f"{s['parameters'] / 1e6:.1f}" for s in stages.values())],
        ["the peak is in", *(peak(s)[0] for s in stages.values())],
        *([kind, *(f"{peak(s)[1].get(kind, 0) / GIB:.2f}" for s in stages.values())] for kind in KINDS),
        ["in all", *(f"{peak_gib(s):.2f}" for s in stages.values())]])
    phases = [name for name in next(iter(stages.values()))["phases"]]
    lines += _table(["GiB by phase", *names], [
        [phase, *(f"{sum(s['phases'][phase]['peak'].values()) / GIB:.2f}" for s in stages.values())]
        for phase in phases])
    lines += _table(["TFLOP", *names], [
        *([phase, *(f"{s['phases'][phase]['flops'] / 1e12:.2f}" for s in stages.values())] for phase in phases),
        ["step", *(f"{sum(p['flops'] for p in s['phases'].values()) / 1e12:.2f}" for s in stages.values())]])
    for name, stage in stages.items():
        lines += _table([f"messages of a rank, {name}", "operation", "group", "calls", "MB", "seconds"], [
            [phase, operation, group, str(calls), f"{size / 1e6:.3f}", f"{seconds:.4f}"]
            for phase in phases for operation, group, calls, size, seconds in stage["phases"][phase]["flows"]])
    moved = next(iter(stages.values()))["rewards"]
    if any(moved.values()):
        lines += [f"For the rewards a rank receives up to {moved['gram'] / 1e6:.3g} MB a step as Gram matrices and "
                  f"slices; whole features would be {moved['features'] / 1e6:.3g} MB.", ""]
    rows, step = [], 0.0
    for phase in phases:
        each = {name: phase_seconds(s, phase) for name, s in stages.items()}
        slowest = max(each, key=lambda name: sum(each[name]))
        step += sum(each[slowest])
        rows.append([phase, *(f"{x:.3f}" for x in each[slowest]), f"{sum(each[slowest]):.3f}"])
    lines += _table(["estimated seconds, slowest stage", "computing", "collectives", "waiting", "in all"],
                    [*rows, ["step", "", "", "", f"{step:.2f}"]])
    flops = max(sum(p["flops"] for p in s["phases"].values()) for s in stages.values())
    tokens = args.global_batch_size * args.seq_length
    lines.append(f"A step of {tokens} gold tokens takes an estimated {step:.1f} s ({flops / step / 1e12:.0f} TFLOP/s "
                 "per GPU); --help lists the assumptions.")
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def parse(argv: list[str]) -> tuple[argparse.Namespace, Cluster]:
    """Training flags, without FP8 and skipped rollouts, and the cluster. ValueError, naming the flag."""
    parser = Parser("tools/plan.py", __doc__, own=(CLUSTER,), reads=READS, defaults={"train_iters": 1})
    args = parser.parse_args(argv)
    if args.training_mode == "rlvr":
        raise ValueError("--training-mode rlvr: its cost depends on how long completions become; the tool plans ebft "
                         "and sft alone")
    check_args(args)
    if args.ebft_step == "auto":
        args.ebft_step = "separate"  # as on a GPU
    if args.ebft_step == "fused" and args.ebft_blocks_per_microbatch:
        raise ValueError(f"--ebft-blocks-per-microbatch {args.ebft_blocks_per_microbatch}: with --ebft-step fused the "
                         "tool plans whole rows alone; leave it out, or plan --ebft-step separate")
    args.ebft_skip_duplicates, args.ebft_rollout_fp8, args.ebft_encoder_fp8, args.fp8_format = False, "off", "off", None
    for name in ("vocab_size", "num_layers", "hidden_size", "num_attention_heads"):
        if vars(args)[name] is None:
            raise ValueError(f"{spelled(name)}: give it; the plan reads neither tokenizer nor checkpoint")
    cluster = asdict(GPUS[args.gpu]) if args.gpu != "custom" else {"gpus_per_node": 8}
    cluster |= {name: vars(args)[name] for name in asdict(GPUS["h100"]) if vars(args)[name] is not None}
    for name in asdict(GPUS["h100"]):
        if name not in cluster:
            raise ValueError(f"{spelled(name)}: --gpu custom needs it")
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % model_parallel:
        raise ValueError(f"--world-size {args.world_size}: must be a multiple of --tensor-model-parallel-size × "
                         f"--pipeline-model-parallel-size, {model_parallel}")
    return args, Cluster(**cluster)


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the planning processes: a GPU's kernels take no fake tensors
    args, cluster = parse(argv)
    limit = cluster.gpu_memory_gib * (1 - UNUSABLE)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        stages = plan(argv, stage_ranks(args), pool)
        print("\n" + report(args, cluster, stages) + "\n")
        needed = max(map(peak_gib, stages.values()))
        words = (f"{needed:.1f} GiB on the rank that needs the most, of {limit:.1f} GiB usable ({1 - UNUSABLE:.0%} of "
                 "the GPU's)")
        if needed <= limit:
            print(f"FITS: {words}.")
        else:
            print(f"DOES NOT FIT: {words}. Looking for a flag that helps:", flush=True)
            print(advise(argv, args, stages, limit, pool))
    if args.json:
        with aside(args.json) as file:
            write_json(file, {"arguments": vars(args), "cluster": asdict(cluster), "stages": stages})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
