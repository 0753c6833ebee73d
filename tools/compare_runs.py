"""Compares runs by their TensorBoard logs: a table, and their curves as a PNG.

    python tools/compare_runs.py checkpoints/sweep --output sweep.png --format markdown

Each LOGDIR is a run (its --save or --tensorboard-dir) or a folder of runs, such as a sweep. Runs may still be in
progress. The table shows the last and the best value of evaluations, the best with its step; the reward is the mean of
the last 20 steps, tokens/s the median of all steps; seconds are those of all training steps, without evaluations and
saves. Runs that answer questions (--ebft-eval-questions) have columns for accuracy, pass@k, BLEU and chrF. A restart is
another log file of the same run.
"""

import argparse
import csv
import io
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from megatron_ebft.common.disk import aside

LOGS = "events.out.tfevents.*"
LAST_STEPS = 20
PANELS = (("eval/cfm", "CFM, held-out"), ("eval/ce_loss", "cross entropy, held-out"),
          ("train/reward", "reward, training"), ("eval/kl_to_start", "KL to the start, held-out"),
          ("eval/alignment", "alignment, held-out"), ("train/grad_norm", "gradient norm, training"))
ANSWERS = re.compile(r"eval/answers/(accuracy|bleu|chrf|pass@\d+)")


@dataclass
class Run:
    """The curves of one run, each a list of (step, value)."""

    name: str
    scalars: dict[str, list[tuple[int, float]]]
    restarts: int

    @classmethod
    def read(cls, folder: Path, name: str) -> "Run":
        """The run that logged to `folder`. If a restart repeated a step, the last value counts."""
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        scalars = {tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items())
                   for tag in events.Tags()[SCALARS]}
        return cls(name, scalars, len(list(folder.glob(LOGS))) - 1)

    def last(self, tag: str) -> str:
        return f"{self.scalars[tag][-1][1]:.4f}" if tag in self.scalars else ""

    def best(self, tag: str, which: Callable = min) -> str:
        """The lowest value and its step; the highest with `max`."""
        if tag not in self.scalars:
            return ""
        step, value = which(self.scalars[tag], key=lambda point: point[1])
        return f"{value:.4f} @{step}"

    def values(self, tag: str) -> list[float]:
        return [value for _, value in self.scalars.get(tag, [])]

    def steps(self) -> int:
        return self.scalars.get("train/loss", [(0, 0.0)])[-1][0]

    def reward(self) -> str:
        values = self.values("train/reward")[-LAST_STEPS:]
        return f"{statistics.mean(values):+.4f}" if values else ""

    def speed(self) -> str:
        values = self.values("train/tokens_per_second")
        return f"{statistics.median(values):.0f}" if values else ""

    def seconds(self) -> str:
        """Of all steps, those that --log-interval leaves out included: they take as long as the others."""
        values = self.values("seconds/step")
        return f"{statistics.mean(values) * self.steps():.0f}" if values else ""


COLUMNS: dict[str, Callable[[Run], str]] = {
    "run": lambda run: run.name,
    "steps": lambda run: str(run.steps()),
    "restarts": lambda run: str(run.restarts),
    "CFM": lambda run: run.last("eval/cfm"),
    "best CFM": lambda run: run.best("eval/cfm"),
    "CE": lambda run: run.last("eval/ce_loss"),
    "best CE": lambda run: run.best("eval/ce_loss"),
    "reward": Run.reward,
    "KL to start": lambda run: run.last("eval/kl_to_start"),
    "tokens/s": Run.speed,
    "seconds": Run.seconds}
"""Title and cell of each column."""


def answer_tags(runs: list[Run]) -> list[str]:
    """Tags of what the runs say of their answers: accuracy, BLEU, chrF, then pass@k by k."""
    tags = {tag for run in runs for tag in run.scalars if ANSWERS.fullmatch(tag)}
    return sorted(tags, key=lambda tag: (int(tag.partition("@")[2] or 0), tag))


def columns(runs: list[Run]) -> dict[str, Callable[[Run], str]]:
    """COLUMNS, and after the held-out text those of answers, where a run has any."""
    answers: dict[str, Callable[[Run], str]] = {}
    for tag in answer_tags(runs):
        name = ANSWERS.fullmatch(tag)[1]
        answers[name] = lambda run, tag=tag: run.last(tag)
        if name == "accuracy":
            answers["best accuracy"] = lambda run, tag=tag: run.best(tag, max)
    titles = list(COLUMNS)
    first = titles.index("best CE") + 1
    return {title: (COLUMNS | answers)[title] for title in [*titles[:first], *answers, *titles[first:]]}


def find_runs(folders: list[Path]) -> list[Run]:
    """All runs in and below the folders, by name.

    Raises:
        ValueError: a folder is missing or holds no logs.
    """
    names = {}
    for folder in folders:
        logs = sorted({file.parent for file in folder.rglob(LOGS)})
        if not logs:
            raise ValueError(f"{folder}: {'no TensorBoard logs there' if folder.is_dir() else 'no such folder'}; name "
                             "a run's --save or --tensorboard-dir, or a folder of runs")
        for log in logs:
            run = log.parent if log.name == "tensorboard" else log
            names[log.resolve()] = run.name if run == folder else str(run.relative_to(folder))
    return sorted((Run.read(log, name) for log, name in names.items()), key=lambda run: run.name)


def table(rows: list[list[str]], form: str) -> str:
    """The rows as text, markdown or csv. The first row is the head."""
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(rows)
        return out.getvalue().rstrip("\n")
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
             for row in rows]
    if form == "markdown":
        rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
        lines = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([lines[0], rule, *lines[1:]])
    return "\n".join(["  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]]])


def plot(runs: list[Run], path: Path) -> None:
    """Draw all PANELS, and one for each answer_tags, with a curve for every run."""
    panels = [*PANELS, *((tag, f"{ANSWERS.fullmatch(tag)[1]}, questions") for tag in answer_tags(runs))]
    across = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(2, across, figsize=(4.5 * across, 7.2), layout="constrained")
    colors = plt.get_cmap("turbo" if len(runs) > 10 else "tab10")
    for axis, (tag, title) in zip(axes.flat, panels):
        for i, run in enumerate(runs):
            if tag in run.scalars:
                axis.plot(*zip(*run.scalars[tag]), color=colors(i / len(runs) if len(runs) > 10 else i), label=run.name,
                          linewidth=1.0, marker="o" if tag.startswith("eval/") else None, markersize=3)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda entries: len(entries[1]))
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=5)
    with aside(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tools/compare_runs.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOGDIR", help="runs, or folders of runs")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="format of the table "
                        "(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("compare_runs.png"), metavar="PNG", help="file for the "
                        "curves (default: %(default)s)")
    options = parser.parse_args(argv)
    runs = find_runs(options.folders)
    plot(runs, options.output)
    shown = columns(runs)
    print(table([[*shown], *([cell(run) for cell in shown.values()] for run in runs)], options.format))
    print(f"curves: {options.output}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
