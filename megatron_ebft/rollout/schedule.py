"""The order in which pipeline stages decode groups of rows.

Megatron's schedules run a fixed number of independent micro-batches; decoding goes round, each step of a group waiting
for the tokens the last stage drew in the step before. So several groups of rows are in flight:

1. Every stage works through the same list of tasks (step, virtual stage, group), groups innermost. While one group's
   step is on its way through the other stages, a stage works on the other groups.
2. With at least as many groups in flight as there are stages, a task's input is there when its turn comes: a stage
   idles only while the first task has not reached it, and after its last. Tasks of equal length take P − 1 + tasks
   slots on P stages: it idles (P − 1) / (P − 1 + tasks) of the time.
3. More groups than that decode in waves, one behind the other, so that caches are bounded; waves overlap at their ends.
   A wave has at most 2P − 1 groups: also where a GPU has one hardware queue, so that a send holds up what is launched
   after it until its receiver is there, the first stage gets back to its receives before every link is full.
"""


def row_groups(rows: int, stages: int, rows_per_group: int) -> list[slice]:
    """Rows that decode together. rows_per_group 0: all rows of a rank; at least a group for every pipeline stage."""
    size = rows_per_group or max(1, rows // stages)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def waves(groups: int, stages: int) -> list[range]:
    """Groups in flight together: as few as keep all stages busy, in numbers that differ by one at most."""
    count = max(1, groups // stages)
    bounds = [groups * i // count for i in range(count + 1)]
    return [range(*pair) for pair in zip(bounds, bounds[1:])]


def tasks(groups: int, stages: int, steps: int, virtual: int) -> list[tuple[int, int, int]]:
    """What every stage does, in order: (step, virtual stage, group)."""
    return [(step, chunk, group) for wave in waves(groups, stages) for step in range(steps) for chunk in range(virtual)
            for group in wave]


def idle_fraction(groups: int, stages: int, steps: int, virtual: int = 1) -> float:
    """Share of the time in which a stage has nothing to do, if all tasks take equally long."""
    slots = 0
    for wave in waves(groups, stages):
        slots += (steps * virtual - 1) * max(len(wave), stages) + len(wave)
    return 1 - groups * steps * virtual / (slots + stages - 1)
