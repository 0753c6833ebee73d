"""Measures how long pipeline stages idle while rollouts are sampled, and compares with the formula.

    torchrun --nproc-per-node 4 tools/rollout_schedule.py --pipeline-model-parallel-size 4 --ebft-rollout-rows 1

Weights and rows are random. Every stage times its own work on each task, without waiting. The schedule is then replayed
from these times: a task starts when the stage is free and its input is there, and messages take no time. So ranks may
share cores.
"""

import sys
import warnings

import torch

from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import STEP

SCHEDULE = Group("measurement", (
    Flag("--repeats", int, "timed passes; the shortest time of a task counts", default=3, valid=at_least(1)),))
SHAPE = dict(num_layers=8, hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, num_query_groups=4,
             seq_length=256, vocab_size=8192, micro_batch_size=1, global_batch_size=8, ebft_track_kl=False,
             untie_embeddings_and_output_weights=True)


def replay(timelines: list[list[tuple[int, int, int, float]]]) -> float:
    """Fraction of the time in which stages idle.

    Args:
        timelines: for each stage, what `sample_rollouts` recorded: (step, virtual stage, group, seconds) in order.
    """
    stages, virtual = len(timelines), 1 + max(task[1] for task in timelines[0])
    assert all([task[:3] for task in timeline] == [task[:3] for task in timelines[0]] for timeline in timelines)
    finished, free = {}, [0.0] * stages
    for number in range(len(timelines[0])):
        for stage, timeline in enumerate(timelines):
            step, chunk, group, seconds = timeline[number]
            if stage > 0:
                source = (stage - 1, step, chunk, group)
            elif chunk > 0:
                source = (stages - 1, step, chunk - 1, group)
            else:
                source = (stages - 1, step - 1, virtual - 1, group)
            free[stage] = max(free[stage], finished.get(source, 0.0)) + seconds
            finished[stage, step, chunk, group] = free[stage]
    busy = sum(task[3] for timeline in timelines for task in timeline)
    return 1 - busy / (stages * max(free))


def measure(args, repeats: int) -> list[list[tuple[int, int, int, float]]]:
    """Each stage's timeline of one sampling pass, with the shortest time of each task. The same on every rank."""
    from benchmark import build

    from megatron_ebft.parallel.groups import pp_group
    from megatron_ebft.rollout.sampler import sample_rollouts

    run, (gold, *_) = build(args)
    passes = []
    for _ in range(1 + repeats):  # the first warms up
        timeline = []
        sample_rollouts(run.policy, gold, run.config.layout, run.config.sampling, 0, run.config.rollout_rows, timeline)
        passes.append(timeline)
    mine = [(*tasks[0][:3], min(task[3] for task in tasks)) for tasks in zip(*passes[1:], strict=True)]
    timelines = [None] * torch.distributed.get_world_size(pp_group())
    torch.distributed.all_gather_object(timelines, mine, group=pp_group())
    return timelines


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from megatron_ebft.parallel.groups import document_size, init_parallel, shut_down
    from megatron_ebft.rollout.schedule import idle_fraction, row_groups
    from megatron_ebft.run.configs import parallel_sizes

    parser = Parser("tools/rollout_schedule.py", __doc__, own=(SCHEDULE,), reads=STEP,
                    defaults={"train_iters": 1, **SHAPE})
    args = check_args(parser.parse_args(argv))
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    init_parallel(**parallel_sizes(args))
    timelines = measure(args, args.repeats)
    groups = len(row_groups(args.global_batch_size // document_size(), stages, args.ebft_rollout_rows))
    formula = idle_fraction(groups, stages, args.ebft_rollout_length, virtual)
    if torch.distributed.get_rank() == 0:
        for stage, timeline in enumerate(timelines):
            prefill = [seconds for step, *_, seconds in timeline if step == 0]
            decode = [seconds for step, *_, seconds in timeline if step > 0] or [0.0]
            print(f"stage {stage}: {len(timeline)} tasks | prefill {sum(prefill) / len(prefill) * 1e3:.1f} ms, step "
                  f"{sum(decode) / len(decode) * 1e3:.1f} ms a group | {sum(prefill + decode):.3f} s of work")
        unit = [[(*task[:3], 1.0) for task in timeline] for timeline in timelines]
        print(f"{groups} groups of rows over {stages} stages: idle {replay(timelines):.1%} with the measured times, "
              f"{replay(unit):.1%} if all tasks took equally long, {formula:.1%} by the formula")
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
