"""Random command lines and damaged input files: each must end well, or in an error that names a flag or a file.

    python tests/fuzz.py --flags 400 --files 200 --seed 0      # the whole, about 20 minutes on one core
    python tests/fuzz.py --only files:17 --seed 0              # one trial, with all that it prints

A flags trial runs the training command on a tiny model for two steps, with up to four flags drawn from the flag table.
A files trial makes one mistake in one input file and runs the program that reads it. A trial passes if its program ends
with 0 and finite metrics, stops as it was asked to, or prints `error:` with a flag or a path. It fails with a traceback
of any kind, with an error that names nothing, with metrics that are not finite, and if it hangs.

Every trial is a process forked from one that has imported the package. It may use a minute of processor time and a few
gigabytes. The seed and the trial's number decide everything about it.
"""

import argparse
import collections
import importlib
import math
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("tests/support", "tools", "tools/convert"))]
IMPORTED = ("torch", "torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator",
            "transformers.models.auto.tokenization_auto", "megatron_ebft.run.loop", "megatron_ebft.run.build",
            "megatron_ebft.hf.convert", "small_run", "fuzz_files", "fuzz_flags", "verify")
SECONDS, WAIT = 60, 600
"""Processor seconds of a trial, and wall-clock seconds after which it hangs without using any."""
MEMORY = 6 << 30
"""Bytes that a trial may use beyond its imports, so that a size that is refused too late does no harm."""
ENDS = {0: "passed", 64: "refused", 65: "step failed", 75: "stopped"}
"""Exit codes of training. Tools end with 1 or 2 where they print an error."""


class Outcome(collections.namedtuple("Outcome", "verdict said")):
    """How a trial ended. A verdict that is not in GOOD is a fault."""


GOOD = {"passed", "refused", "step failed", "stopped"}


def run(program: str, flags: list[str], log: Path) -> int | None:
    """Run a program in a process of its own; the exit code, None if it hangs. `log` gets what it prints."""
    process = multiprocessing.get_context("fork").Process(target=_program, args=(program, flags, log))
    process.start()
    process.join(WAIT)
    code = process.exitcode
    try:
        os.killpg(process.pid, signal.SIGKILL)  # itself, or what it has left
    except ProcessLookupError:
        code = process.exitcode
    process.join()
    return None if code == -signal.SIGXCPU else code


def _program(program: str, flags: list[str], log: Path) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    os.chdir(log.parent)
    warnings.simplefilter("ignore")
    sys.argv = [program, *flags]
    if program == "train":
        runpy.run_module("megatron_ebft.train", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / "tools" / program), run_name="__main__")


def judge(code: int | None, said: str, folder: Path) -> str:
    """The verdict on a program that ended with `code`, said this, and may have logged metrics below `folder`."""
    if code is None:
        return "hangs"
    if "Traceback (most recent call last)" in said or code < 0:
        return "foreign error"
    if code == 0:
        return "passed" if _is_finite(folder) else "not finite"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 75:
        return "stopped"
    if not errors:
        return "says nothing"
    is_named = re.search(r"--[a-z]{2}", errors[-1]) or str(folder) in errors[-1]
    return (ENDS.get(code, "refused") if is_named else "names nothing")


def _is_finite(folder: Path) -> bool:
    from small_run import scalars

    return all(math.isfinite(value) for logs in {file.parent for file in folder.rglob("events*")}
               for values in scalars(logs).values() for _, value in values)


class Fuzz:
    """The trials of one seed. `workspace` has the files that they start from."""

    def __init__(self, seed: int, workspace: Path):
        self.seed, self.workspace = seed, workspace

    def prepare(self) -> None:
        """Make the workspace, in a process of its own: torch's threads do not survive a fork."""
        process = multiprocessing.get_context("fork").Process(target=self._prepare)
        process.start()
        process.join()
        log = self.workspace / "log"
        flags = [*(self.workspace / "flags").read_text().split("\n"), "--save", str(self.workspace / "run")]
        for more in (["--training-mode", "sft"], ["--ebft-dump-steps", str(self.workspace / "steps"), "--save", ""]):
            assert run("train", [*flags, *more], log) == 0, log.read_text()

    def _prepare(self) -> None:
        from fuzz_files import make_workspace

        (self.workspace / "flags").write_text("\n".join(make_workspace(self.workspace)))

    def trial(self, what: str, number: int) -> tuple[str, str, Outcome]:
        """Run a trial of `flags` or `files`; its kind, its command line and its outcome."""
        from fuzz_files import KINDS, make_case
        from fuzz_flags import random_flags

        draw = Random(f"{self.seed} {what} {number}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if what == "flags":
                kind, program = "flags", "train"
                words = (self.workspace / "flags").read_text().split("\n")
                words[words.index("--tensorboard-dir") + 1] = f"{folder}/tensorboard"
                flags = [*words, *random_flags(draw, self.workspace)]
                shown = flags[len(words):]
            else:
                kind = list(KINDS)[number % len(KINDS)]
                program, flags = KINDS[kind].program, make_case(KINDS[kind], self.workspace, folder, draw)
                shown = []
            code = run(program, flags, folder / "log")
            said = (folder / "log").read_text(errors="replace").replace("\0", "")
            return kind, " ".join(shown), Outcome(judge(code, said, folder), said)


def main() -> int:
    """Exit code: 0 if every trial ended well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flags", type=int, default=0, metavar="N", help="trials with random flags")
    parser.add_argument("--files", type=int, default=0, metavar="N", help="trials with damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="WHAT:N", help="these trials, such as files:17")
    args = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"})
    warnings.simplefilter("ignore")
    for module in IMPORTED:
        importlib.import_module(module)
    trials = [(what, int(number)) for what, number in (name.split(":") for name in args.only)] or [
        (what, number) for what in ("flags", "files") for number in range(vars(args)[what])]
    counts, faults, begun = collections.defaultdict(collections.Counter), [], time.monotonic()
    with tempfile.TemporaryDirectory() as workspace:
        fuzz = Fuzz(args.seed, Path(workspace))
        fuzz.prepare()
        for done, (what, number) in enumerate(trials, 1):
            kind, shown, outcome = fuzz.trial(what, number)
            counts[kind][outcome.verdict] += 1
            if outcome.verdict not in GOOD or args.only:
                lines = outcome.said.strip().splitlines()
                faults += [f"{what}:{number}"] if outcome.verdict not in GOOD else []
                print(f"{what}:{number} ({kind}): {outcome.verdict}: {shown}", *(lines if args.only else lines[-1:]),
                      sep="\n  ", flush=True)
            if done % 20 == 0:
                left = (time.monotonic() - begun) / done * (len(trials) - done)
                print(f"{done}/{len(trials)}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    print_table(counts)
    if faults:
        print(f"faults: {' '.join(faults)}; again with --seed {args.seed} --only {faults[0]}")
    return 1 if faults else 0


def print_table(counts: dict[str, collections.Counter]) -> None:
    """Trials by kind and verdict."""
    verdicts = sorted({verdict for row in counts.values() for verdict in row}, key=lambda x: (x not in GOOD, x))
    print("\n".join(["| kind | " + " | ".join(verdicts) + " |", "|---|" + "--:|" * len(verdicts),
                     *(f"| {kind} | " + " | ".join(str(row[x]) for x in verdicts) + " |"
                       for kind, row in counts.items())]))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(map(lambda x: x.total(), counts.values()))} trials, "
          f"{sum(x.ru_utime + x.ru_stime for x in usage):.0f} processor seconds")


if __name__ == "__main__":
    sys.exit(main())
