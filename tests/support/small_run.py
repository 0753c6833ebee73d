"""A training run of seconds: its data, its flags, its ranks as processes, and what it leaves in its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from preprocess_data import main as preprocess
from ranks import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ebft.checkpointing.loader import load_weights
from megatron_ebft.checkpointing.record import read_metadata
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.build import build_start
from megatron_ebft.model.weights import unwrap
from megatron_ebft.run.build import build_run
from megatron_ebft.run.logger import Logger

VOCAB = 64
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB)]
MODEL = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2"]
SMALL = ["--seq-length", "24", "--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "1e-2", "--eval-iters",
         "1", "--ebft-rollout-length", "4", "--ebft-stride", "4", "--ebft-context-length", "4", "--ebft-eval-length",
         "8", *TOKENIZER]
TIMED = ("seconds/", "run/", "train/tokens_per_second", "train/distance_to_start")
"""Scalars that differ between equal runs, and the one that is measured at the first step of each process."""
PATIENCE = 600
"""Seconds after which a process hangs. A step takes a tenth of a second; a machine may be a hundred times slower."""


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
    """A run and its logger."""
    run = build_run(args)
    return run, Logger(args.tensorboard_dir, run.state.iteration, args.train_iters, 48, args.ebft_rollout_length,
                       run.tokenizer)


def save(run, folder) -> None:
    """A checkpoint of the run as it is."""
    Saver(str(folder)).save(run.state, run.policy, run.optimizer, run.scheduler, run.metadata)


def start_ranks(flags: list[str], ranks: int = 2, pace: Path | None = None) -> list[subprocess.Popen]:
    """`python -m megatron_ebft.train` on each rank, at the pace of a file (paced.py); rank 0's output is piped."""
    environment = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1",
                                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "megatron_ebft.train", *flags]
    if pace is not None:
        environment["EBFT_PACE"] = str(pace)
        command = [str(Path(__file__).parent / "paced.py"), *command]
    return [subprocess.Popen([sys.executable, *command], text=True, stderr=subprocess.STDOUT, start_new_session=True,
                             stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                             env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)]


def finish(processes: list[subprocess.Popen]) -> str:
    """Wait for the ranks to end with 0; rank 0's output."""
    output = processes[0].communicate(timeout=PATIENCE)[0]
    assert [process.wait(timeout=PATIENCE) for process in processes] == [0] * len(processes), output
    return output


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard scalar."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(folder) -> dict[str, torch.Tensor]:
    """Weights of the latest checkpoint."""
    model = build_start(ModelArgs(**read_metadata(str(folder))["architecture"]))
    load_weights(str(folder), model)
    return dict(unwrap(model).named_parameters())
