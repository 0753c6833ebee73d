"""The job scripts of slurm/ on a real SLURM of two pretended nodes: bash tests/slurm/run.sh [pytest arguments]

1. Jobs whose ranks are played (stub.py) take seconds and go through every ending, signal and error, at the same time.
2. Jobs that train (a model of 70 thousand parameters, over gloo) are interrupted in each way, and must end with the
   weights of a job that was not, to the last bit. Their ranks wait before each step for the test (paced.py), so that a
   signal comes in the step it is meant for.
"""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare_runs import COLUMNS
from paced import Pace
from small_run import MODEL, SMALL, TIMED, TOKENIZER, dataset, scalars

from megatron_ebft.checkpointing.reader import CheckpointReader

REPO = Path(__file__).parents[2]
SCRIPT, STUB = REPO / "slurm/ebft_8b.sh", REPO / "tests/slurm/stub.py"
PACED = REPO / "tests/support/paced.py"
STEPS = 10
RUN = [*SMALL, "--split", "80,20,0", "--train-iters", str(STEPS), "--save-interval", "4", "--eval-interval", "5",
       "--distributed-timeout-minutes", "10"]
UNDER_WAY = ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING", "PREEMPTED")
NODES = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
ONE_RANK_EACH, UNPLANNED = ["--nodes=2", "--ntasks-per-node=1", *NODES[2:]], [*RUN, "--no-log-throughput"]
"""Of the jobs that are interrupted: each start of a rank costs 10 s of a processor, and as much to plan its step.
test_sweep has two ranks a node, and plans."""


class Cluster:
    """Two nodes in namespaces of their own."""

    def __init__(self, folder: Path):
        self.folder, self.control = folder, folder / "slurm"
        self.base, self.data = folder / "base", folder / "set_text_document"

    def manage(self, command: str, *arguments: str, **options) -> str:
        return subprocess.run(["bash", str(REPO / "tests/slurm/cluster.sh"), command, str(self.control), *arguments],
                              check=True, text=True, stdout=subprocess.PIPE, **options).stdout.strip()

    def run(self, *command: str, **options) -> str:
        return self.manage("run", *command, **options)

    def submit(self, name: str, *flags: str, script: Path = SCRIPT, options: list[str] = NODES, time: str = "30",
               cwd: Path = REPO, **environment: str) -> "Job":
        """sbatch with the settings and flags of a small run. environment: over these settings."""
        run = self.folder / name
        settings = dict(BASE=str(self.base), DATA=str(self.data), RUN=str(run), PYTHON=sys.executable, RETRY_PAUSE="1")
        output = self.folder / f"{name}-%a.out" if any("--array" in option for option in options) else f"{run}.out"
        number = self.run("sbatch", "--parsable", f"--output={output}", f"--time={time}", *options, str(script), *flags,
                          cwd=cwd, env=os.environ | settings | environment)
        return Job(self, number, Path(output), run)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, output: Path, run: Path):
        self.cluster, self.number, self.output, self.run = cluster, number, output, run

    def show(self, name: str) -> str:
        """A field of scontrol's; of an array, the one of its first task."""
        field = re.search(rf"\b{name}=(\S*)", self.cluster.run("scontrol", "show", "-o", "job", self.number))
        return field[1]

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def until(self, pattern: str, timeout: float = 600) -> None:
        """Wait for a line of the output. Generous, since machines are slow: a job that ends without it fails at
        once."""
        end, state = time.monotonic() + timeout, "PENDING"
        while not re.search(pattern, self.text()):
            assert time.monotonic() < end and state not in ("FAILED", "TIMEOUT", "CANCELLED", "COMPLETED"), (
                f"no {pattern!r}; the job is {state}:\n{self.text()}")
            time.sleep(0.1)
            state = self.show("JobState")  # before the text is looked at again: it may end with the job

    def ends(self, timeout: float = 600) -> str:
        """Wait until the job has ended for good; its state and exit code. A message that SLURM loses when much happens
        at once keeps a job COMPLETING for minutes."""
        end = time.monotonic() + timeout
        while (state := self.show("JobState")) in UNDER_WAY:
            assert time.monotonic() < end, f"still {state}:\n{self.text()}"
            time.sleep(0.2)
        return f"{state} {self.show('ExitCode').split(':')[0]}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.folder.chmod(0o755)
    cluster.manage("up")
    yield cluster
    cluster.manage("down")


# --- Played ranks

PLAYED = {  # name: (what the starts of the ranks do, the end, lines of the output)
    "finished": ("0", "COMPLETED 0", ["finished"]),
    "wrong": ("64", "FAILED 64", ["FAILED: wrong flags or files"]),
    "not_finite": ("65", "FAILED 65", ["FAILED: a loss or gradient is not finite"]),
    "crashing": ("1 1 1 0", "FAILED 1", ["crash 1 .* ended first, with 1", "FAILED: 3 crashes in a row"]),
    "recovering": ("1 1 save-1 1 0", "COMPLETED 0", ["crash 2 after the checkpoint of step 0", "crash 1 .* step 3",
                                                     "crash 2 .* step 3", "attempt 5"]),
    "killed": ("kill 0", "COMPLETED 0", ["crash 1 .* rank 3 ended first, with 137", "attempt 2"]),
    "stopped": ("75 0", "COMPLETED 0", ["requeued", "start 2, attempt 1"]),
    "circling": ("75 75 75 75", "FAILED 1", ["FAILED: the job requeued itself 2 times without a newer checkpoint"]),
    "signalled": ("signal-75 0", "COMPLETED 0", ["got SIGUSR1", "rank 0 got .*SIGUSR1", "start 2"]),
    "terminated": ("signal-75 0", "COMPLETED 0", ["rank 0 got .*SIGTERM", "start 2"]),
    "terminated_with_batch": ("signal-75 0", "COMPLETED 0", ["got SIGTERM", "rank 0 got .*SIGUSR1", "start 2"]),
    "time_limit": ("signal-75 0", "COMPLETED 0", ["got SIGUSR1", "start 2"]),
    "early": ("signal-75 0", "COMPLETED 0", ["got SIGUSR1", "start 2"]),
    "late": ("signal-0", "COMPLETED 0", ["got SIGUSR1", "rank 0 got .*SIGUSR1", "finished"]),
    "cancelled": ("signal-75 0", "CANCELLED 0", []),
    "requeued": ("signal-75 0", "COMPLETED 0", ["start 2"]),
}
PLAYED_OPTIONS = {"circling": dict(MAX_REQUEUES="2"), "early": dict(PREFLIGHT_SECONDS="4"),
                  "time_limit": dict(time="1", options=[*NODES, "--signal=B:USR1@20"], END_MARGIN="0")}
SIGNALS = {  # what is done once the text is in the output
    "signalled": ("rank 0 of", ["scancel", "--batch", "--signal=USR1"]),
    "terminated": ("rank 0 of", ["scancel", "--signal=TERM"]),
    "terminated_with_batch": ("rank 0 of", ["scancel", "--batch", "--signal=TERM"]),
    "early": ("job", ["scancel", "--batch", "--signal=USR1"]),
    "late": ("rank 0 of", ["scancel", "--batch", "--signal=USR1"]),
    "cancelled": ("rank 0 of", ["scancel"]),
    "requeued": ("rank 0 of", ["scontrol", "requeue"]),
}


@pytest.fixture(scope="module")
def played(cluster):
    """All of them, submitted at once and signalled."""
    jobs = {name: cluster.submit(name, PYTHON=str(STUB), ENDINGS=endings, **PLAYED_OPTIONS.get(name, {}))
            for name, (endings, _, _) in PLAYED.items()}
    for name, (text, command) in SIGNALS.items():
        jobs[name].until(text)
        cluster.run(*command, jobs[name].number)
    return jobs


@pytest.mark.parametrize("name", PLAYED)
def test_every_ending(played, name):
    job, (endings, end, lines) = played[name], PLAYED[name]
    assert job.ends() == end, job.text()
    for line in lines:
        assert re.search(line, job.text()), f"no {line!r} in\n{job.text()}"
    starts = {"cancelled": 1, "crashing": 3, "circling": 3}.get(name, len(endings.split()))
    assert job.text().count("attempt") >= starts and f"rank 0 of 4: {starts + 1}:" not in job.text()
    assert all((job.run / "logs").glob("*.*.*/rank-3.log"))


def test_preempted(cluster):
    """SLURM sends SIGTERM to the steps alone when another job takes the nodes, and grants a minute."""
    job = cluster.submit("preempted", options=[*NODES, "--exclusive"], PYTHON=str(STUB), ENDINGS="signal-75 0")
    job.until("rank 0 of")
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                         "--wrap=sleep 3")
    assert job.ends() == "COMPLETED 0" and re.search("rank 0 got .*SIGTERM", job.text()) and "start 2" in job.text()
    assert Job(cluster, urgent, Path(), Path()).show("JobState") == "COMPLETED"


def test_a_signal_for_one_of_an_array(cluster):
    """A task of an array has the array's own number: neither the signal nor the requeueing may reach the others."""
    array = cluster.submit("array", script=REPO / "slurm/sweep.sh", PYTHON=str(STUB), ENDINGS="signal-75 0",
                           SWEEP=str(cluster.folder / "array"), options=["--array=0,26", "--nodes=1", *NODES[1:]])
    outputs = {task: Path(str(array.output).replace("%a", task)) for task in ("0", "26")}
    tasks = {task: Job(cluster, f"{array.number}_{task}", output, cluster.folder) for task, output in outputs.items()}
    for job in tasks.values():
        job.until("rank 0 of")
    first, second = sorted(tasks.values(), key=lambda job: job.show("JobId") != array.number)
    assert first.show("JobId") == array.number
    cluster.run("scancel", "--batch", "--signal=USR1", first.number)
    assert first.ends() == "COMPLETED 0" and "start 2" in first.text()
    assert second.show("JobState") == "RUNNING" and "got" not in second.text()
    cluster.run("scancel", "--batch", "--signal=USR1", second.number)
    assert second.ends() == "COMPLETED 0" and "start 2" in second.text()
    assert {path.name for path in (cluster.folder / "array").iterdir()} == {"ce0-diversity0-none",
                                                                            "ce0.1-diversity1-released"}


def test_submitted_elsewhere(cluster):
    outside = cluster.submit("outside", cwd=cluster.folder)
    named = cluster.submit("named", cwd=cluster.folder, EBFT_REPO=str(REPO), PYTHON=str(STUB), ENDINGS="0")
    assert outside.ends() == "FAILED 64" and "submit from its root, or set EBFT_REPO" in outside.text()
    assert named.ends() == "COMPLETED 0"


def test_what_is_missing_is_said_at_once(cluster):
    job = cluster.submit("missing", *RUN, "--train-data-path", "/nowhere/a", "/nowhere/b", options=[*NODES[:-1],
                         "--gpus-per-node=2"], BASE="/nowhere/base", DATA="/nowhere/c")
    assert job.ends() == "FAILED 64", job.text()
    for missing in ("preflight on node1", "preflight on node2: 1 problem", "--ntasks-per-node 2: torch .* sees 0 GPUs",
                    "--pretrained-checkpoint /nowhere/base", "--ebft-encoder-load /nowhere/base", "/nowhere/a.idx",
                    "/nowhere/b.idx", "/nowhere/c.idx", "FAILED: the problems above; nothing was started"):
        assert re.search(missing, job.text()), f"no {missing!r} in\n{job.text()}"


# --- Ranks that train


@pytest.fixture(scope="module")
def start(cluster):
    """Data and the checkpoint that runs start from, at the places the settings name."""
    data = dataset(cluster.folder)
    subprocess.run([sys.executable, "-m", "megatron_ebft.train", "--training-mode", "sft", *data, *MODEL, *TOKENIZER,
                    "--train-iters", "1", "--save", str(cluster.base), "--seq-length", "24", "--global-batch-size", "2",
                    "--eval-interval", "0"], check=True, cwd=REPO)


@pytest.fixture(scope="module")
def whole(cluster, start):
    """A job that nothing interrupts; says how long the way to its first step took."""
    last, parts = time.monotonic(), []
    job = cluster.submit("whole", *UNPLANNED, options=ONE_RANK_EACH)
    for part, line in (("queue", "attempt 1"), ("checks", "starting the ranks"),
                       ("imports and build", "M parameters on a"), ("evaluation", "eval 0/"), ("step", "step 1/")):
        job.until(line)
        parts.append(f"{part} {time.monotonic() - last:.1f} s")
        last = time.monotonic()
    print(f"\nfrom sbatch to the first step: {', '.join(parts)}")
    assert job.ends() == "COMPLETED 0", job.text()
    return job


def assert_same(job: Job, whole: Job, steps: int = STEPS) -> None:
    """Every weight to the last bit, and every logged number, each step once."""
    expected, trained = (CheckpointReader(str(run), "--load") for run in (whole.run, job.run))
    assert trained.folder.endswith(f"{steps:07d}")
    for key in expected.shapes:
        assert torch.equal(expected.read(key), trained.read(key)), key
    logged, wanted = ({tag: values for tag, values in scalars(run / "tensorboard").items() if not tag.startswith(TIMED)}
                      for run in (job.run, whole.run))
    assert logged.keys() == wanted.keys()
    for tag in wanted:
        assert logged[tag] == wanted[tag], tag
    assert [step for step, _ in logged["train/loss"]] == [*range(1, steps + 1)]


def processes(cluster: Cluster, variable: str) -> list[str]:
    """Those with a variable of this value (a regular expression) in their environment, the oldest first."""
    return cluster.run("bash", "-c", f"grep -lzx '{variable}' /proc/[0-9]*/environ | cut -d / -f 3 | sort -n").split()


@pytest.fixture
def paced(cluster):
    """Settings of a job whose ranks wait before each step, and the steps that they may begin."""
    python, pace = cluster.folder / "python", Pace(cluster.folder / "pace")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {PACED} "$@"\n')
    python.chmod(0o755)
    return dict(PYTHON=str(python), EBFT_PACE=str(pace.file)), pace


def test_every_interruption(cluster, whole, paced):
    """Signals to the script and to the ranks, a killed rank, a lost node, requeued by hand, the time limit, and a
    signal at the very end."""
    environment, pace = paced
    pace.allow(2)
    job = cluster.submit("interrupted", *UNPLANNED, options=ONE_RANK_EACH, **environment)

    def come_to(step: int, start: str) -> None:
        job.until(start)  # earlier ones must not take the step
        pace.allow(step)
        job.until(rf"{start}(?s:.*)step {step}/{STEPS}")

    come_to(2, "start 1")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    come_to(3, "start 2")
    cluster.run("scancel", "--signal=TERM", job.number)
    come_to(5, "start 3")
    cluster.run("kill", "-KILL", processes(cluster, "RANK=1")[0])  # the others are its children
    pace.allow(6)  # in which rank 0 misses it
    come_to(6, "attempt 2")
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.run("bash", "-c", "scontrol update NodeName=node2 State=RESUME || "  # it may have come back by itself
                "! scontrol show node node2 | grep State=DOWN")
    come_to(8, "start 4")
    cluster.run("scontrol", "requeue", job.number)
    come_to(9, "start 5")  # the last step waits until SLURM looks at time limits, twice a minute
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")  # no more than SLURM is to signal before
    job.until("start 5(?s:.*)got SIGUSR1")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    come_to(STEPS, "start 6")
    cluster.run("bash", "-c", f"scancel --batch --signal=USR1 {job.number} || true")  # it may have ended
    assert job.ends() == "COMPLETED 0", job.text()
    assert job.text().count("attempt 1") >= 6 and job.text().count("crash 1") == 1
    assert_same(job, whole)
    for attempt in (job.run / "logs").glob("*.*.*"):
        assert [log.name for log in attempt.glob("rank-*.log")] == ["rank-1.log"], attempt


def test_sweep(cluster, start):
    """Three points of the grid as an array, then side by side."""
    sweep = cluster.folder / "sweep"
    flags = [flag if flag != str(STEPS) else "4" for flag in RUN]
    array = cluster.submit("point", *flags, script=REPO / "slurm/sweep.sh", SWEEP=str(sweep),
                           options=["--array=0,4,26", "--nodes=1", *NODES[1:]])
    for task in ("0", "4", "26"):
        job = Job(cluster, f"{array.number}_{task}", Path(str(array.output).replace("%a", task)), sweep)
        assert job.ends() == "COMPLETED 0", job.text()
    table = subprocess.run([sys.executable, "tools/compare_runs.py", str(sweep), "--format", "csv", "--output",
                            str(sweep / "curves.png")], check=True, cwd=REPO, text=True, stdout=subprocess.PIPE).stdout
    head, *rows = csv.reader(table.splitlines())
    assert head == [*COLUMNS] and (sweep / "curves.png").stat().st_size > 10_000
    assert [row[0] for row in rows] == ["ce0-diversity0-none", "ce0.03-diversity0.5-none", "ce0.1-diversity1-released"]
    assert all(row[1] == "4" and row[2] == "0" and "" not in row for row in rows)
