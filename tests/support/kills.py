"""A run that is interrupted again and again, against one that is not.

    python tests/support/kills.py --kills 20 --seed 1

Starts the training command on two ranks, kills one of them with SIGKILL at a random moment (saves included: they are
asynchronous and frequent), clears the others away as a cluster would, and starts the same command again, until the run
is done. USR1 and TERM are sent as well, which must end in exit code 75. Then every TensorBoard value must be there
exactly once and equal to those of an uninterrupted run, and so must the final weights.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TIMED = ("seconds/", "run/", "train/tokens_per_second", "train/distance_to_start")
"""Scalars that differ between equal runs, and the one that is measured at the first step of each process."""
STEPS_BETWEEN = 8
"""Steps that a process makes, at the most, before it is interrupted."""


def dataset(folder: Path) -> list[str]:
    """Flags of a dataset of documents that count in steps of 3."""
    from preprocess_data import main as preprocess

    generator = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(40):
            first = generator.randrange(63)
            file.write(json.dumps({"text": " ".join(str((first + 3 * i) % 63) for i in range(60))}) + "\n")
    preprocess(["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "set"), "--tokenizer-type",
                "NullTokenizer", "--vocab-size", "64"])
    return ["--data-path", str(folder / "set_text_document"), "--split", "80,20,0"]


def flags(folder: Path, data: list[str], steps: int) -> list[str]:
    from test_training import MODEL, SMALL

    return [*data, *MODEL, *SMALL, "--train-iters", str(steps), "--save", str(folder), "--load", str(folder),
            "--save-interval", "2", "--eval-interval", "5", "--async-save", "--ebft-keep-checkpoints", "3"]


def interrupted_run(folder: Path, data: list[str], steps: int, kinds: list[int], seed: int) -> list[str]:
    """Train to the end in spite of these signals, one a process; returns a line about each process."""
    from test_training import start_ranks

    generator, told = random.Random(seed), []
    for kind in [*kinds, None]:
        ranks = start_ranks(flags(folder, data, steps))
        wanted, seen, first = generator.randrange(STEPS_BETWEEN), 0, None
        for line in ranks[0].stdout:
            if line.startswith("step"):
                first = first or line.split()[1]
                seen += 1
                if kind is not None and seen > wanted:
                    time.sleep(generator.random() * 0.3)
                    generator.choice(ranks).send_signal(kind)
                    break
        rest = ranks[0].stdout.read() if kind != signal.SIGKILL else ""
        if kind == signal.SIGKILL:  # as srun --kill-on-bad-exit does
            time.sleep(generator.random() * 0.2)
            for rank in ranks:
                rank.kill()
        codes = [rank.wait(timeout=120) for rank in ranks]
        expected = {None: 0, signal.SIGKILL: -signal.SIGKILL}.get(kind, 75)
        assert codes == [expected] * len(ranks), (kind, codes, rest)
        told.append(f"{signal.Signals(kind).name if kind else 'to the end'}: from step {first}, {seen} steps seen")
    return told


def compare(whole: Path, broken: Path) -> int:
    """Number of TensorBoard values that are equal, each there once; AssertionError where anything differs."""
    from test_training import scalars

    from megatron_ebft.checkpointing.reader import CheckpointReader

    expected, found = (scalars(folder / "tensorboard") for folder in (whole, broken))
    tags = [tag for tag in expected if not tag.startswith(TIMED)]
    for tag in tags:
        assert found[tag] == expected[tag], (tag, found[tag], expected[tag])
    readers = [CheckpointReader(str(folder), "--load") for folder in (whole, broken)]
    assert readers[0].shapes == readers[1].shapes
    for key in readers[0].shapes:
        assert readers[0].read(key).equal(readers[1].read(key)), key
    return sum(len(expected[tag]) for tag in tags)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs; one USR1 and one TERM come on top")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    kinds = [signal.SIGKILL] * args.kills + [signal.SIGUSR1, signal.SIGTERM]
    random.Random(args.seed).shuffle(kinds)
    steps = 5 * (args.kills + 2)
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
    sys.path[:0] = [str(here), str(root), str(root / "tools"), str(root / "tests" / "run")]
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sys.argv[1:])
