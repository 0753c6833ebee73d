"""A run that is interrupted again and again, against one that is not.

    python tests/support/kills.py --kills 20 --seed 1

Starts the training command on two ranks, kills one of them with SIGKILL at a random moment of a given step (saves are
asynchronous and frequent, so some moments lie in them), clears the others away as a cluster would, and starts the same
command again, until the run is done. USR1 and TERM are sent as well, and must end in exit code 75. Then every
TensorBoard value must be there exactly once and equal to those of an uninterrupted run, and so must the final weights.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

STEPS_BETWEEN = 4
"""Steps from one interruption to the next."""


def flags(folder: Path, data: list[str], steps: int) -> list[str]:
    from small_run import MODEL, SMALL

    return [*data, *MODEL, *SMALL, "--train-iters", str(steps), "--save", str(folder), "--load", str(folder),
            "--save-interval", "2", "--eval-interval", "5", "--async-save", "--ebft-keep-checkpoints", "3"]


def interrupted_run(folder: Path, data: list[str], steps: int, kinds: list[int], seed: int) -> list[str]:
    """Train to the end in spite of these signals, one a process; returns a line about each process.

    Process i is interrupted after a random step between i · STEPS_BETWEEN and (i + 1) · STEPS_BETWEEN, while it is in
    the next step or waits at its end: it may go no further (paced.py).
    """
    from paced import Pace
    from small_run import start_ranks

    assert steps > len(kinds) * STEPS_BETWEEN, "a process would end before its signal"
    generator, lines, pace = random.Random(seed), [], Pace(folder.with_suffix(".pace"))
    for number, kind in enumerate([*kinds, None]):
        if kind is None:
            pace.free()
            ranks = start_ranks(flags(folder, data, steps))
        else:
            last = number * STEPS_BETWEEN + generator.randrange(1, STEPS_BETWEEN)
            pace.allow(last)
            ranks = start_ranks(flags(folder, data, steps), pace=pace.file)
        seen = interrupt(ranks, kind, last, pace, generator) if kind else []
        rest = ranks[0].output.read() if kind != signal.SIGKILL else ""
        if kind == signal.SIGKILL:  # as srun --kill-on-bad-exit does
            time.sleep(generator.random() * 0.2)
            for rank in ranks:
                rank.kill()
        codes = [rank.wait() for rank in ranks]
        # Of two ranks the one that was not killed may have noticed that the other is gone, and ended with 1.
        expected = {None: {0}, signal.SIGKILL: {-signal.SIGKILL, 1}}.get(kind, {75})
        assert set(codes) <= expected and codes != [1, 1], (kind, codes, seen, rest)
        lines.append(f"{signal.Signals(kind).name if kind else 'to the end'}: {', '.join(seen)}")
    return lines


def interrupt(ranks: list, kind: int, last: int, pace, generator: random.Random) -> list[str]:
    """Send a signal to one rank in the step after `last`; the steps that were seen before."""
    seen = []
    for line in ranks[0].output:
        if line.startswith("step"):
            seen.append(line.split()[1])
            if seen[-1].split("/")[0] == str(last):
                break
    pace.allow(last + 1)
    time.sleep(generator.random() * 0.3)
    os.kill(generator.choice(ranks).pid, kind)
    if kind != signal.SIGKILL:
        pace.free()
    return seen


def compare(whole: Path, broken: Path) -> int:
    """Number of TensorBoard values that are equal, each there once, as in JSON Lines; AssertionError where anything
    differs."""
    from small_run import TIMED, by_tag, lines, scalars

    from megatron_ebft.checkpointing.reader import CheckpointReader

    expected, actual = (scalars(folder / "tensorboard") for folder in (whole, broken))
    tags = [tag for tag in expected if not tag.startswith(TIMED)]
    for tag in tags:
        assert actual[tag] == expected[tag], (tag, actual[tag], expected[tag])
    expected_lines, actual_lines = (by_tag(lines(folder / "tensorboard")) for folder in (whole, broken))
    assert {tag: actual_lines[tag] for tag in tags} == {tag: expected_lines[tag] for tag in tags}
    readers = [CheckpointReader(str(folder), "--load") for folder in (whole, broken)]
    assert readers[0].shapes == readers[1].shapes
    for key in readers[0].shapes:
        assert readers[0].read(key).equal(readers[1].read(key)), key
    return sum(len(expected[tag]) for tag in tags)


def main(argv: list[str]) -> None:
    from small_run import dataset

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs; one USR1 and one TERM come on top")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args(argv)
    kinds = [signal.SIGKILL] * args.kills + [signal.SIGUSR1, signal.SIGTERM]
    random.Random(args.seed).shuffle(kinds)
    steps = STEPS_BETWEEN * (len(kinds) + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = dataset(folder)
        for line in interrupted_run(folder / "broken", data, steps, kinds, args.seed):
            print(line, flush=True)
        interrupted_run(folder / "whole", data, steps, [], args.seed)
        count = compare(folder / "whole", folder / "broken")
    print(f"{len(kinds)} interruptions, {steps} steps: {count} TensorBoard values equal, none twice or lost; weights "
          "equal")


if __name__ == "__main__":
    here = Path(__file__).parent
    root = here.parents[1]
    sys.path[:0] = [str(here), str(root), str(root / "tools")]
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sys.argv[1:])
