"""The paper's findings in miniature: trains and measures everything that report.py shows.

    python examples/findings/run.py [--output DIR] [--tasks code dates text] [--jobs 2]

Run it again to continue where it stopped: a run that has its record.json is done. Records are collected in
DIR/results. README.md tells what was expected, and what came out.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

sys.path.extend(map(str, (Path(__file__).parents[2], Path(__file__).parents[2] / "tools")))

import tasks
import ways
from ways import Run, Way

from megatron_ebft.common.disk import aside

MODULES = ["megatron_ebft.run.loop", "megatron_ebft.run.build", "torch.utils.tensorboard", "sacrebleu"]
"""Imported once, by the process that all runs are forked from."""


class Pool:
    """Calls functions in processes of their own, several at a time."""

    def __init__(self, jobs: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self.executor = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
        self.calls: list[Future] = []

    def submit(self, log: Path, function, *arguments) -> Future:
        """Call the function when its turn comes; what it prints goes to a file, the line it returns to the console."""
        call = self.executor.submit(logged, log, function, *arguments)
        call.add_done_callback(say)
        self.calls.append(call)
        return call

    def wait(self) -> None:
        """Wait for all calls.

        Raises:
            Exception: the first that failed; those that have not begun are given up.
        """
        try:
            for call in self.calls:
                call.result()
        except BaseException:
            self.executor.shutdown(cancel_futures=True)
            raise
        self.calls = []


def say(call: Future) -> None:
    if not call.cancelled() and call.exception() is None:
        print(f"{time.strftime('%H:%M:%S')} {call.result()}", flush=True)


def logged(log: Path, function, *arguments) -> str:
    """Call the function; what it prints goes to a file. It ends when the driver is killed."""
    from megatron_ebft.common.signals import end_with_parent

    end_with_parent()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    return function(*arguments)


def preprocess(task: str, folder: Path) -> str:
    """Text, tokenizer and datasets of a task."""
    import preprocess_data

    tasks.make(task, folder)
    for split in tasks.SPLITS:
        if not (folder / f"{split}_text_document.idx").exists():  # written last
            code = preprocess_data.main([
                "--input", str(folder / f"{split}.jsonl"), "--output-prefix", str(folder / split),
                *(["--question-key", "prompt", "--answer-key", "completion"] if task in ways.ASKING else []),
                *ways.tokenizer(folder)])
            assert code == 0, split
    return f"data of {task}"


def train(folder: Path, task: str, output: Path, split: str, flags: tuple) -> float:
    """Train, or continue, on a split of the task.

    Returns:
        processor seconds, about two of them for the models and the folders.
    """
    from megatron_ebft import train as training

    begin, files = time.process_time(), output / task / "data"
    code = training.main([*map(str, (
        *ways.tokenizer(files), *ways.rows(task), "--train-data-path", files / f"{split}_text_document",
        "--data-cache-path", files / "cache", "--save", folder, "--load", folder, *flags))])
    assert code == 0, folder
    return time.process_time() - begin


def train_start(task: str, output: Path) -> str:
    """The start, and its record: what the comparison measures of it."""
    from measure import VALID, measure

    folder, start = output / task, output / task / "start"
    seconds = train(start, task, output, "start", ways.START)
    scores = measure(task, start, folder / "data", start, VALID, cold=task == "code")
    write_record(start, {"task": task, "way": "start", "lr": 0, "seed": 0, "steps": 0, "seconds": seconds}, scores)
    return f"{task}: start, {seconds:.0f} s"


def train_run(run: Run, before: Path | None, encoder: Path, output: Path) -> str:
    """Train and measure.

    Args:
        before: the model it starts from; None: the start.
        encoder: the model that computes the features.
    """
    from measure import CHOICE, VALID, measure

    folder, start = output / run.task, output / run.task / "start"
    own = run.folder(output)
    flags = (*ways.TRAINING, *run.way.flags, "--training-mode", run.way.mode, "--train-iters", run.way.steps,
             "--lr", run.lr, "--seed", run.seed, "--pretrained-checkpoint", before or start)
    if run.way.mode == "ebft":
        flags += ("--ebft-encoder-load", encoder)
    if run.way.mode == "rlvr":
        flags += ("--ebft-questions", folder / "data" / f"{run.way.data}.jsonl")
    seconds = train(own, run.task, output, run.way.data, flags)
    cold = run.way.name in ways.COLD and run.task == "code" and run.seed in ways.QUESTION_SEEDS
    split = CHOICE if run.seed == ways.CHOICE_SEED else VALID
    scores = measure(run.task, own, folder / "data", start, split, cold)
    write_record(own, {"task": run.task, "way": run.way.name, "lr": run.lr, "seed": run.seed, "steps": run.way.steps,
                       "seconds": seconds}, scores)
    accuracy = f"pass@1 {scores['pass@1']:.3f}, " if "pass@1" in scores else ""
    return f"{own.name}: {seconds:.0f} s, {accuracy}CE {scores['ce_loss']:.4f}"


def write_record(folder: Path, fields: dict, scores: dict[str, float]) -> None:
    rounded = {name: float(f"{value:.6g}") for name, value in scores.items()}
    record = fields | {"seconds": round(fields["seconds"], 1), "scores": rounded}
    with aside(folder / "record.json") as file:
        file.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def read_record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


class Experiment:
    """All runs of a task."""

    def __init__(self, task: str, output: Path, pool: Pool):
        self.task, self.output, self.pool = task, output, pool
        self.start = output / task / "start"
        self.compared = [way for way in ways.COMPARED if task in way.tasks]

    def prepare(self) -> None:
        """Data and start."""
        folder = self.output / self.task
        self.pool.submit(folder / "data.log", preprocess, self.task, folder / "data").result()
        if not (self.start / "record.json").exists():
            self.pool.submit(folder / "start.log", train_start, self.task, self.output)
        self.pool.wait()

    def train(self, runs: list[Run]) -> None:
        """Those runs that are not done."""
        calls = {}
        for run in runs:
            own, before = run.folder(self.output), self.of_way(run.way.after, run.seed)
            if before in calls:
                calls[before].result()  # this run continues it
            if not (own / "record.json").exists():
                encoder = self.of_way(run.way.encoder, ways.SEEDS[0]) or self.start
                calls[own] = self.pool.submit(own / "log.txt", train_run, run, before, encoder, self.output)
        self.pool.wait()

    def of_way(self, name: str, seed: int) -> Path | None:
        """The folder of another way, at its learning rate."""
        if not name:
            return None
        way = next(way for way in ways.COMPARED if way.name == name)
        return Run(self.task, way, self.rate(way), seed).folder(self.output)

    def rate(self, way: Way) -> float:
        """The learning rate whose run on the choice seed has the highest pass@1; the lowest cross entropy decides
        between equals, and where nothing is asked."""
        chosen = next(other for other in ways.COMPARED if other.name == (way.lr_of or way.name))

        def quality(lr: float) -> tuple[float, float]:
            scores = read_record(Run(self.task, chosen, lr, ways.CHOICE_SEED).folder(self.output))["scores"]
            return scores["pass@1"] if self.task in ways.ASKING else 0.0, -scores["ce_loss"]

        return max(ways.LEARNING_RATES, key=quality)

    def choose(self) -> None:
        """Try the learning rates."""
        self.train([Run(self.task, way, lr, ways.CHOICE_SEED) for way in self.compared if not way.lr_of
                    for lr in ways.LEARNING_RATES])

    def compare(self) -> None:
        """The ways of the main table, all with one seed before the next."""
        self.train([Run(self.task, way, self.rate(way), seed) for seed in ways.SEEDS for way in self.compared])

    def ask(self) -> None:
        """The open questions, likewise."""
        asked = [way for group in ways.QUESTIONS.values() for way in group if self.task in way.tasks]
        self.train([Run(self.task, way, self.rate(way), seed) for seed in ways.QUESTION_SEEDS for way in asked])


def collect(output: Path) -> None:
    """Write the records of all complete runs to results/TASK.json, one a line."""
    (output / "results").mkdir(exist_ok=True)
    for task in ways.TASKS:
        records = [read_record(path.parent) for path in sorted((output / task).rglob("record.json"))]
        if records:
            lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
            with aside(output / "results" / f"{task}.json") as file:
                file.write_text(f"[{lines}]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "outputs" / "findings",
                        metavar="DIR", help="for data, runs and results (default: outputs/findings)")
    parser.add_argument("--tasks", nargs="+", choices=ways.TASKS, default=ways.TASKS)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side (default: 2)")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    pool = Pool(options.jobs)
    experiments = [Experiment(task, options.output.resolve(), pool) for task in options.tasks]
    for experiment in experiments:
        experiment.prepare()
    for experiment in experiments:
        experiment.choose()
        experiment.compare()
        collect(experiment.output)
    for experiment in experiments:
        experiment.ask()
        collect(experiment.output)


if __name__ == "__main__":
    main()
