"""Mutations: deliberate mistakes in the package, each of which one quick test must catch.

    python tests/mutations.py                    # all of them, a few minutes
    python tests/mutations.py --only clipping    # some of them
    python tests/mutations.py --list

Prints the table of tests/README.md. A mutation replaces a text that occurs exactly once in a file. It is applied to a
temporary copy of the repository, never to the working tree. Its test must fail there, and pass without the mutation.

Every test runs in a process forked from one that has imported torch and Megatron-Core but nothing of the package. The
table has the processor seconds of that process, whatever else the machine does; those of ranks that it starts are not
among them.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from mutation_table import TABLE, Mutation

ROOT = Path(__file__).parents[1]
COPIED = ("megatron_ebft", "tests", "tools", "pyproject.toml")
"""What the tests of the table read."""
IMPORTED = ("torch", "torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator", "pytest",
            "hypothesis", "transformers", "megatron.core.dist_checkpointing", "megatron.core.optimizer",
            "megatron.core.models.common.language_module.language_module", "megatron.core.datasets.gpt_dataset")
"""Slow to import, and not ours."""
TIMEOUT = 300
"""Seconds after which a test hangs."""


def mutated(mutation: Mutation) -> str:
    """The file with the mistake.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    source = (ROOT / "megatron_ebft" / mutation.file).read_text()
    if source.count(mutation.text) != 1:
        raise ValueError(f"{mutation.file} has {source.count(mutation.text)} times {mutation.text!r}")
    return source.replace(mutation.text, mutation.replacement)


def copy_repository(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _pytest(folder: Path, test: str, log: Path) -> None:
    """Run a test of the copy. Its process ends with pytest's exit code."""
    os.setsid()  # a process group, so that a test that hangs can be killed with its ranks
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if not path or Path(path) not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(folder)
    vars(sys.modules["__main__"]).pop("__file__", None)  # or each rank of a test would run this file
    import pytest

    # Not sys.exit: it would wait for the ranks that the test has started.
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={folder}", f"tests/{test}"])))


def run_test(folder: Path, test: str) -> tuple[int | None, float, str]:
    """Exit code of pytest (None: it hangs), its processor seconds, and what it wrote."""
    before, log = _seconds_of_children(), folder / "log"
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, test, log))
    process.start()
    process.join(TIMEOUT)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):  # what it has left: ranks, or itself
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return code, _seconds_of_children() - before, log.read_text() if log.exists() else ""


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judge(mutation: Mutation, folder: Path, passing: dict[str, bool]) -> tuple[str, float]:
    """What is wrong with a mutation ("": its test catches it), and the processor seconds in which its test fails.

    Args:
        passing: by test, whether it passes without a mutation; is added to.
    """
    try:
        changed = mutated(mutation)
    except ValueError as error:
        return str(error), 0.0
    if mutation.test not in passing:
        code, _, said = run_test(folder, mutation.test)
        passing[mutation.test] = code == 0
        if code != 0:
            print(said[-3000:], file=sys.stderr)
    if not passing[mutation.test]:
        return f"{mutation.test} fails without the mutation", 0.0
    path = folder / "megatron_ebft" / mutation.file
    original = path.rename(folder / "original")
    path.write_text(changed)
    code, seconds, said = run_test(folder, mutation.test)
    original.replace(path)  # with its old time, by which Python knows which bytecode is up to date
    if code == 1:
        print(*[line[:150] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))][:1], file=sys.stderr)
        return "", seconds
    return {0: f"{mutation.test} passes", None: f"{mutation.test} hangs"}.get(
        code, f"pytest ends with {code}:\n{said[-3000:]}"), seconds


def main() -> int:
    """Exit code: 0 if every mutation is caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[x.name for x in TABLE], default=[],
                        help="these mutations")
    parser.add_argument("--list", action="store_true", help="names and mistakes, without running anything")
    args = parser.parse_args()
    chosen = [x for x in TABLE if x.name in args.only or not args.only]
    if args.list:
        print("\n".join(f"{x.name:18} {x.file:32} {x.what}" for x in chosen))
        return 0
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    for module in IMPORTED:
        importlib.import_module(module)
    passing, rows, wrong, begun = {}, [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        for done, mutation in enumerate(chosen, 1):
            problem, seconds = judge(mutation, Path(folder), passing)
            if problem:
                wrong.append(f"{mutation.name}: {problem}")
            else:
                rows.append(f"| {mutation.what} | `{mutation.file}` | `{mutation.test}` | {seconds:.1f} |")
            left = (time.monotonic() - begun) / done * (len(chosen) - done)
            print(f"{done}/{len(chosen)} {mutation.name}: {problem or f'caught in {seconds:.1f} s'}; about "
                  f"{left / 60:.0f} min left", file=sys.stderr, flush=True)
    print("\n".join(["| mutation | file | caught by | processor seconds |", "|---|---|---|--:|", *rows]))
    for line in wrong:
        print(f"not caught: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
