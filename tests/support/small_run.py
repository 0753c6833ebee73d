"""A training run of seconds: its data, its flags, its ranks as processes, and what it leaves in its folder."""

import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import torch
from paced import hold_before_steps
from preprocess_data import main as preprocess
from ranks import ENVIRONMENT, free_port, server, spare_the_collector
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ebft.checkpointing.loader import load_weights
from megatron_ebft.checkpointing.record import read_metadata
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.signals import end_with_parent
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.build import build_start
from megatron_ebft.model.weights import unwrap
from megatron_ebft.run.build import build_run
from megatron_ebft.run.logger import Logger
from megatron_ebft.run.sinks.build import build_sinks
from megatron_ebft.run.sinks.page import page_of

VOCAB = 64
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB)]
MODEL = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2"]
SMALL = ["--seq-length", "24", "--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "1e-2", "--eval-iters",
         "1", "--ebft-rollout-length", "4", "--ebft-stride", "4", "--ebft-context-length", "4", "--ebft-eval-length",
         "8", *TOKENIZER]
TIMED = ("seconds/", "run/", "throughput/", "ranks/", "memory/", "train/tokens_per_second", "train/distance_to_start")
"""Scalars that differ between equal runs, and the one that is measured at the first step of each process."""
PATIENCE = 600
"""Seconds after which a process hangs. A step takes a tenth of a second; some machines are much slower."""


def dataset(folder: Path) -> list[str]:
    """Flags of a dataset of 40 documents that count in steps of 3 from a random start."""
    generator = torch.Generator().manual_seed(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(40):
            first = int(torch.randint(0, VOCAB - 1, (), generator=generator))
            ids = [(first + 3 * i) % (VOCAB - 1) for i in range(60)]
            file.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")
    preprocess(["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "set"), *TOKENIZER])
    return ["--data-path", str(folder / "set_text_document"), "--split", "80,20,0"]


def start(args) -> tuple:
    """A run and its logger.

    TensorBoard reads files in the order of their names: second, process, and a number as text, in which 10 comes before
    9. Two loggers of one process must not begin in the same second.
    """
    run = build_run(args)
    while any(f".{int(time.time())}." in file.name for file in Path(args.tensorboard_dir).glob("events*")):
        time.sleep(0.05)
    return run, Logger(build_sinks(args, run.state.iteration), args.train_iters, 48, args.ebft_rollout_length,
                       run.tokenizer)


def save(run, folder) -> None:
    """A checkpoint of the run as it is."""
    Saver(str(folder)).save(run.state, run.policy, run.optimizer, run.scheduler, run.metadata)


class TrainingRank:
    """`python -m megatron_ebft.train FLAGS`, forked from a process that has already imported the package.

    Args:
        pace: see paced.py.
        stdout: file for its standard output; None: the same as for its errors, `output`.
        has_launcher: the process is one that has started it and waits, as torchrun does.
    """

    def __init__(self, flags: list[str], variables: dict[str, str], pace: Path | None, stdout: str | None = None,
                 has_launcher: bool = False):
        self._reader, writer = server().Pipe(duplex=False)
        self._process = server().Process(target=_launch if has_launcher else _train,
                                         args=(flags, variables, pace and str(pace), writer, stdout))
        self._process.start()
        writer.close()  # so that the end of the process is the end of the pipe
        self.pid = self._process.pid
        self.output = open(self._reader.fileno(), closefd=False)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"process {self.pid} hangs"
        return self._process.exitcode

    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()


def _launch(flags: list[str], variables: dict[str, str], pace: str | None, writer, stdout: str | None) -> None:
    if os.fork() == 0:
        _train(flags, variables | {"TORCHELASTIC_RUN_ID": "test"}, pace, writer, stdout)
    writer.close()
    os.wait()


def _train(flags: list[str], variables: dict[str, str], pace: str | None, writer, stdout: str | None) -> None:
    end_with_parent()
    spare_the_collector()
    os.setsid()  # a process group of its own, so that a test can kill it with the processes that it has started
    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    if stdout:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(variables)
    if pace:
        hold_before_steps(pace)
    sys.argv[1:] = flags
    runpy.run_module("megatron_ebft.train", run_name="__main__", alter_sys=True)


def start_ranks(flags: list[str], ranks: int = 2, pace: Path | None = None) -> list[TrainingRank]:
    """The training command on each rank."""
    world = ENVIRONMENT | {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    return [TrainingRank(flags, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, pace) for rank in range(ranks)]


def finish(ranks: list[TrainingRank]) -> str:
    """Wait for the ranks to end with 0; rank 0's output."""
    output = ranks[0].output.read()
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), output
    return output


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard scalar."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(folder) -> list[dict]:
    """Of `metrics.jsonl`, one for each step."""
    with open(f"{folder}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert all(a["iteration"] < b["iteration"] for a, b in zip(rows, rows[1:]))
    return rows


def by_tag(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar in lines."""
    values: dict[str, list] = {}
    for row in rows:
        for name in row.keys() - {"iteration", "time"}:
            values.setdefault(name, []).append((row["iteration"], row[name]))
    return values


def empty_charts(args) -> list[str]:
    """Charts of the run's page that find no values."""
    tags = scalars(args.tensorboard_dir)
    return [title for charts in page_of(args).values() for title, patterns in charts.items()
            if not patterns or not all(any(re.match(pattern, tag) for tag in tags) for pattern in patterns)]


def weights(folder) -> dict[str, torch.Tensor]:
    """Weights of the latest checkpoint."""
    model = build_start(ModelArgs(**read_metadata(str(folder))["architecture"]))
    load_weights(str(folder), model)
    return dict(unwrap(model).named_parameters())
