"""Compare the quickstart's runs: a table, curves, and answers before and after, side by side.

    python examples/quickstart_report.py OUTPUT/sft-seed1 OUTPUT/ebft-0-seed1 ... --questions FILE --output OUTPUT

Writes report.txt, results.json and curves.png. All numbers come from the runs' TensorBoard files. "Before" is the
evaluation at step 0, which measures the start; "after" is the last one. Both use the same held-out days and, for the
same seed, the same random numbers.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from compare_runs import table
from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

from megatron_ebft.common.disk import aside, write_json

FOLDER = re.compile(r"(sft|ebft)(?:-([0-9.]+))?-seed([0-9]+)")
MEASURES = {"cfm": "eval/cfm", "ce": "eval/ce_loss", "score": "eval/answers/pass@1"}
ANSWERS = "answers/text_summary"
SECTION = re.compile(r"\*\*(.+?)\*\*\n```\n(.*?)\n```", re.DOTALL)
SHOWN_QUESTIONS, SHOWN_SAMPLES = 4, 3
COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple")
"""Of the ways to train, in their order; the start is gray."""

EXPLANATION = """\
CFM: squared distance between the mean features of sampled answers and those of the right one; EBFT lowers it.
CE: cross entropy of the right answer, in nats per token; SFT lowers it.
Right: share of answers, sampled at temperature 1, that are the right one to the letter.
Seconds: all training steps, without evaluations.
CFM and CE are better if lower, right if higher. All three are measured on days that no training has seen. ± is the
standard deviation over seeds. The start is one model: its ± is the noise of the evaluation, whose random numbers depend
on the seed."""


@dataclass
class Run:
    """The log of one fine-tuning run."""

    method: str
    """sft or ebft."""
    ce_coef: float | None
    """γ of EBFT."""
    seed: int
    scalars: dict[str, list[tuple[int, float]]]
    """Curves, each a list of (step, value)."""
    before: dict[str, list[str]]
    """Answers of the start to a few questions, the most likely one first."""
    after: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run that saved to `folder`.

        Raises:
            ValueError: the folder's name is not of the quickstart, the run is incomplete, or a value is not finite.
        """
        named = FOLDER.fullmatch(folder.name)
        if not named:
            raise ValueError(f"{folder}: must be named like sft-seed1 or ebft-0.1-seed1")
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
        tags = events.Tags()
        scalars = {tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items()) for tag in tags[SCALARS]}
        for tag in MEASURES.values():
            if len(scalars.get(tag, [])) < 2:
                raise ValueError(f"{folder}: {tag} is missing from its TensorBoard files; is the run complete?")
        for tag, points in scalars.items():
            if not all(math.isfinite(value) for _, value in points):
                raise ValueError(f"{folder}: {tag} is not finite everywhere")
        texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(ANSWERS)}
        method, ce_coef, seed = named.groups()
        return cls(method, float(ce_coef) if ce_coef else None, int(seed), scalars,
                   answers(texts[min(texts)]), answers(texts[max(texts)]))

    @property
    def label(self) -> str:
        return "SFT" if self.method == "sft" else f"EBFT γ = {self.ce_coef:g}"

    def record(self) -> dict:
        """The run as results.json holds it."""
        steps = self.scalars["seconds/step"]
        values = {name: self.scalars[tag] for name, tag in MEASURES.items()}
        return {"method": self.method, "seed": self.seed, "ce_coef": self.ce_coef, "steps": steps[-1][0],
                "seconds": sum(seconds for _, seconds in steps),
                **{f"{name}_before": points[0][1] for name, points in values.items()},
                **{f"{name}_after": points[-1][1] for name, points in values.items()}}


def answers(markdown: str) -> dict[str, list[str]]:
    """The answers to each question in an evaluation's Markdown."""
    by_question = {}
    for kind, text in SECTION.findall(markdown):
        if kind == "question":
            question = by_question.setdefault(text, [])
        else:
            question.append(text.replace("\n", " "))
    return by_question


def records(runs: list[Run]) -> list[dict]:
    """All runs, and before them the start as each seed's evaluation sees it: a run of 0 steps."""
    trained = [run.record() for run in runs]
    starts = {}
    for record in trained:
        before = {f"{name}_after": record[f"{name}_before"] for name in MEASURES}
        starts.setdefault(record["seed"], record | before | {
            "method": "start", "ce_coef": None, "steps": 0, "seconds": 0.0})
    return [*starts.values(), *trained]


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each way to train, one for each seed."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def mean_and_deviation(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def overview(runs: list[Run]) -> str:
    """One line for the start and one for each way to train."""
    forms = {"cfm": "{:.4f}", "ce": "{:.4f}", "score": "{:.1%}", "seconds": "{:.0f}"}
    rows = [["", "CFM", "CE", "right", "seconds"]]
    groups = {label: [run.record() for run in group] for label, group in by_label(runs).items()}
    first = next(iter(groups.values()))
    rows.append(["start", *(mean_and_deviation([record[f"{name}_before"] for record in first], forms[name])
                            for name in MEASURES), ""])
    for label, group in groups.items():
        columns = {name: [record[f"{name}_after"] for record in group] for name in MEASURES}
        columns["seconds"] = [record["seconds"] for record in group]
        rows.append([label, *(mean_and_deviation(values, forms[name]) for name, values in columns.items())])
    return table(rows, "text")


def effects(runs: list[Run]) -> list[str]:
    """A sentence for each way to train: how far CFM fell, in standard deviations over seeds. Then what is best."""
    lines, means = [], {}
    for label, group in by_label(runs).items():
        run_records = [run.record() for run in group]
        means[label] = {name: statistics.mean(record[f"{name}_after"] for record in run_records) for name in MEASURES}
        falls = [record["cfm_before"] - record["cfm_after"] for record in run_records]
        fall = statistics.mean(falls)
        line = f"{label} {'lowers' if fall > 0 else 'raises'} CFM by {abs(fall):.4f}"
        if len(falls) > 1:
            deviation = statistics.stdev(falls)
            line += f", {abs(fall) / deviation:.1f} standard deviations of its {len(falls)} seeds ({deviation:.4f})"
        lines.append(line + ".")
    best = [f"{title} {pick(means, key=lambda label: means[label][name])}" for title, name, pick in (
        ("lowest CFM:", "cfm", min), ("lowest CE:", "ce", min), ("most right answers:", "score", max))]
    return [*lines, f"On average, {'; '.join(best)}."]


def shown_answers(runs: list[Run], references: dict[str, str]) -> list[tuple[str, str, dict[str, list[str]]]]:
    """A few questions: prompt, right answer, and samples of the start and of the first run of each way to train."""
    firsts = {label: group[0] for label, group in by_label(runs).items()}
    start = next(iter(firsts.values())).before
    return [(prompt, references[prompt.strip()], {
        label: texts[prompt][1:][:SHOWN_SAMPLES]  # the first one is not sampled
        for label, texts in {"start": start, **{label: run.after for label, run in firsts.items()}}.items()})
        for prompt in list(start)[:SHOWN_QUESTIONS]]


def report(runs: list[Run], references: dict[str, str]) -> str:
    seeds = len({run.seed for run in runs})
    parts = [f"Held-out days in Italian after {runs[0].record()['steps']} steps, {seeds} seed{'s' * (seeds > 1)}",
             overview(runs), EXPLANATION, "\n".join(effects(runs)),
             f"Answers of seed {runs[0].seed}, sampled at temperature 1"]
    for prompt, reference, samples in shown_answers(runs, references):
        parts.append("\n".join([f"{prompt.strip()} {reference}", *(f"  {label:<12}  {' | '.join(texts)}"
                                                                   for label, texts in samples.items())]))
    return "\n\n".join(parts) + "\n"


def plot(runs: list[Run], references: dict[str, str], path: Path) -> None:
    """Draw the three measures over steps, a line for each seed, and samples below."""
    figure = plt.figure(figsize=(13.5, 7.6), layout="constrained")
    colors = {"start": "tab:gray", **dict(zip(by_label(runs), itertools.cycle(COLORS)))}
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    panels = (("eval/cfm", "Feature-matching loss (CFM): lower is better"),
              ("eval/ce_loss", "Cross entropy, nats per token: lower is better"),
              ("eval/answers/pass@1", "Right answers, sampled: higher is better"))
    for i, (tag, title) in enumerate(panels):
        axis = figure.add_subplot(grid[0, i])
        for label, group in by_label(runs).items():
            steps = [step for step, _ in group[0].scalars[tag]]
            for run in group:
                axis.plot(*zip(*run.scalars[tag]), color=colors[label], alpha=0.35, linewidth=1)
            means = [statistics.mean(values) for values in zip(*(
                [value for _, value in run.scalars[tag]] for run in group))]
            axis.plot(steps, means, color=colors[label], linewidth=2.5, marker="o", label=label)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.set_xticks(steps)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    axis = figure.add_subplot(grid[1, :])
    axis.axis("off")
    write_samples(axis, shown_answers(runs, references), colors)
    figure.suptitle("A start that writes dates in any of twenty languages learns to write them in Italian",
                    fontsize=13)
    with aside(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def write_samples(axis, shown: list[tuple[str, str, dict[str, list[str]]]], colors: dict[str, str]) -> None:
    """Write a column for each question, with a sample in a line each."""
    width = 1 / len(shown)
    axis.set_title("Answers, sampled before fine-tuning (gray) and after", fontsize=11)
    for i, (prompt, _, samples) in enumerate(shown):
        left, top = i * width, 0.97
        axis.text(left, top, textwrap.shorten(prompt, 32, placeholder=" …"), fontsize=10, weight="bold", va="top")
        for label, texts in samples.items():
            for text in texts:
                top -= 0.072
                axis.text(left, top, textwrap.shorten(text, 40, placeholder=" …"), fontsize=9, color=colors[label],
                          va="top", parse_math=False)
            top -= 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="Table, curves and answers of the quickstart's runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="the --save folder of a run")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="the held-out days")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER",
                        help="for report.txt, results.json and curves.png")
    options = parser.parse_args()
    runs = [Run.read(folder) for folder in options.runs]
    lines = map(json.loads, options.questions.read_text(encoding="utf-8").splitlines())
    references = {line["prompt"].strip(): line["answer"] for line in lines}
    text = report(runs, references)
    with aside(options.output / "report.txt") as file:
        file.write_text(text, encoding="utf-8")
    with aside(options.output / "results.json") as file:
        write_json(file, {"runs": records(runs)})
    plot(runs, references, options.output / "curves.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
