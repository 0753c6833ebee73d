"""Tables and figure of the findings, from the recorded scalars alone.

    python examples/findings/report.py [--results DIR] [--readme FILE] [--figure PNG]

Prints the tables. With --readme, they replace what stands between the two marks in that file, and findings.png is drawn
beside it. ± is the half-width of a 95 % t-interval over seeds; differences are taken seed by seed.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import ways
from compare_runs import table

from megatron_ebft.common.disk import aside

T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""0.975 quantiles of Student's t with 1, 2, … degrees of freedom."""
MARK = "<!-- report.py writes below and above this line -->"
MATCHES = 0.05
"""Half-width of the band of pass@1 within which EBFT matches RLVR."""
EBFT, SFT, MORE_SFT, RLVR = "EBFT γ = 0.1", "SFT", "SFT, compute of EBFT", "RLVR"
COLUMNS = {"pass@1": "pass@1", "pass@4": "pass@4", "greedy": "greedy", "greedy chrF": "chrF", "ce_loss": "CE",
           "cfm_length/08": "CFM", "L_FM/08": "L_FM", "entropy": "entropy", "different answers": "different",
           "different right answers": "diff. right"}
"""Scores of the main table."""
COMPARED = {"pass@1": "pass@1", "pass@4": "pass@4", "ce_loss": "CE", "cfm_length/08": "CFM", "L_FM/08": "L_FM"}
"""Scores of the tables of differences."""
LENGTHS = ("01", "02", "04", "08")
PANELS = {"pass@1": "pass@1: higher is better", "ce_loss": "cross entropy: lower is better",
          "cfm_length/08": "CFM, 8 tokens: lower is better"}
COLORS = {"sft": "tab:orange", "ebft": "tab:blue", "rlvr": "tab:red"}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with the half-width of its 95 % t-interval; infinite for one seed."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        n = len(values)
        half = T_975[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(statistics.mean(values), half, n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, sign: str = "") -> str:
        digits = 2 if abs(self.mean) >= 10 else 4 if abs(self.mean) < 0.1 else 3
        half = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{sign}.{digits}f}{half}"


class Results:
    """The records of a task."""

    def __init__(self, folder: Path, task: str):
        records = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))
        self.task, self.start = task, next(record for record in records if record["way"] == "start")
        self.choice = [record for record in records if record["seed"] == ways.CHOICE_SEED]
        self.by_way: dict[str, dict[int, dict]] = {}
        for record in records:
            if record["seed"] in ways.SEEDS:
                self.by_way.setdefault(record["way"], {})[record["seed"]] = record

    def scores(self, way: str, score: str) -> dict[int, float]:
        """By seed; empty if the way was not run, or does not have the score."""
        return {seed: record["scores"][score] for seed, record in sorted(self.by_way.get(way, {}).items())
                if score in record["scores"]}

    def interval(self, way: str, score: str) -> Interval | None:
        values = list(self.scores(way, score).values())
        return Interval.of(values) if values else None

    def difference(self, way: str, other: str, score: str) -> Interval | None:
        """way − other, over the seeds that both have."""
        ours, theirs = self.scores(way, score), self.scores(other, score)
        values = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        return Interval.of(values) if values else None

    def seconds(self, way: str) -> float:
        return statistics.mean(record["seconds"] for record in self.by_way[way].values())


def shown(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else interval.text(sign)


def main_table(results: Results) -> str:
    """A line for the start and for each way."""
    columns = [score for score in COLUMNS if score in results.start["scores"]
               and not (score == "greedy chrF" and results.task == "code")]
    rows = [["", "seeds", "lr", "steps", "seconds", *(COLUMNS[score] for score in columns)],
            ["start", "", "", "", "", *(Interval.of([results.start["scores"][score]]).text() for score in columns)]]
    for way in ways.COMPARED:
        if way.name in results.by_way:
            record = next(iter(results.by_way[way.name].values()))
            rows.append([way.name, str(len(results.by_way[way.name])), f"{record['lr']:g}", str(record["steps"]),
                         f"{results.seconds(way.name):.0f}",
                         *(shown(results.interval(way.name, score)) for score in columns)])
    return table(rows, "markdown")


def lengths_table(results: Results) -> str:
    """CFM by completion length."""
    rows = [["CFM by tokens of the completion", *(str(int(length)) for length in LENGTHS)],
            ["start", *(Interval.of([results.start["scores"][f"cfm_length/{length}"]]).text() for length in LENGTHS)]]
    rows += [[way.name, *(shown(results.interval(way.name, f"cfm_length/{length}")) for length in LENGTHS)]
             for way in ways.COMPARED if way.name in results.by_way]
    return table(rows, "markdown")


def differences_table(results: Results, pairs: list[tuple[str, str]]) -> str:
    """way − other, seed by seed."""
    scores = [score for score in COMPARED if score in results.start["scores"]]
    rows = [["difference", "seeds", *(COMPARED[score] for score in scores)]]
    for way, other in pairs:
        found = [results.difference(way, other, score) for score in scores]
        if found[0] is not None:
            rows.append([f"{way} − {other}", str(found[0].seeds), *(shown(interval, "+") for interval in found)])
    return table(rows, "markdown")


def verdicts(results: Results) -> str:
    """The three findings, by the rules that the README states."""
    rows = [["finding", "difference", "interval", "verdict"]]

    def add(finding: str, others: tuple[str, ...], score: str, judge) -> None:
        found = [results.difference(EBFT, other, score) for other in others]
        if all(interval is not None and interval.seeds > 1 for interval in found):
            rows.append([finding, ", ".join(f"{EBFT} − {other}" for other in others),
                         ", ".join(f"[{x.low:+.4f}, {x.high:+.4f}]" for x in found), judge(*found)])

    add("1. matches RLVR on accuracy", (RLVR,), "pass@1", matches)
    add("2. beats SFT on accuracy, equal steps", (SFT,), "pass@1", higher)
    add("2. beats SFT on accuracy, equal compute", (MORE_SFT,), "pass@1", higher)
    others = (RLVR,) if results.task in ways.ASKING else ()
    add("3. lowest cross entropy, equal steps", (SFT, *others), "ce_loss", lowest)
    add("3. lowest cross entropy, equal compute", (MORE_SFT, *others), "ce_loss", lowest)
    return table(rows, "markdown")


def matches(difference: Interval) -> str:
    if difference.low > 0 or difference.low >= -MATCHES and difference.high <= MATCHES:
        return "confirmed"
    return "contrary" if difference.high < -MATCHES else "not confirmed"


def higher(difference: Interval) -> str:
    return "confirmed" if difference.low > 0 else "contrary" if difference.high < 0 else "not confirmed"


def lowest(*differences: Interval) -> str:
    if all(difference.high < 0 for difference in differences):
        return "confirmed"
    return "contrary" if any(difference.low > 0 for difference in differences) else "not confirmed"


def choice_table(results: Results) -> str:
    """pass@1 and cross entropy of each learning rate that was tried, on the split that chooses."""
    tried = {(record["way"], record["lr"]): record["scores"] for record in results.choice}
    asks = results.task in ways.ASKING

    def cell(scores: dict[str, float] | None) -> str:
        return "" if scores is None else f"{scores['pass@1']:.3f} ({scores['ce_loss']:.3f})" if asks else (
            f"{scores['ce_loss']:.3f}")

    rows = [["pass@1 (CE), seed 101" if asks else "CE, seed 101", *(f"{lr:g}" for lr in ways.LEARNING_RATES)]]
    for way in ways.COMPARED:
        scores = [tried.get((way.name, lr)) for lr in ways.LEARNING_RATES]
        if any(scores):
            rows.append([way.name, *map(cell, scores)])
    return table(rows, "markdown")


def noise_table(folder: Path) -> str:
    """variances.json: how noisy the parts of the reward are."""
    recorded = json.loads((folder / "variances.json").read_text(encoding="utf-8"))["variances"]
    rows = [["n", "alignment", "diversity", "noise in it", "alignment / diversity", "alignment / noise", "advantage"]]
    for n, x in recorded.items():
        rows.append([n, f"{x['alignment']:.3f}", f"{x['diversity']:.3f}", f"{x['noise']:.3f}",
                     f"{x['alignment'] / x['diversity']:.1f}", f"{x['alignment'] / x['noise']:.1f}",
                     f"{x['advantage']:.3f}"])
    return table(rows, "markdown")


def report(folder: Path) -> str:
    """All tables as Markdown."""
    parts = []
    for task in ways.TASKS:
        if not (folder / f"{task}.json").exists():
            continue
        results = Results(folder, task)
        variants = [way.name for way in ways.COMPARED if way.mode == "ebft" and way.name != EBFT]
        others = [(EBFT, way.name) for way in ways.COMPARED if way.mode != "ebft"]
        more = [(variant, other) for other in (SFT, MORE_SFT) for variant in variants]
        parts += [f"### {task}: the findings", verdicts(results), f"### {task}: all ways", main_table(results),
                  differences_table(results, others + more), lengths_table(results)]
        asked = [(way.name, EBFT) for group in ways.QUESTIONS.values() for way in group if task in way.tasks]
        if any(name in results.by_way for name, _ in asked):
            parts += [f"### {task}: one setting changed", differences_table(results, asked), cold_table(results)]
        parts += [f"### {task}: learning rates tried", choice_table(results)]
    if (folder / "variances.json").exists():
        parts += ["### code: variances of the parts of the reward, by the number of rollouts", noise_table(folder)]
    return "\n\n".join(parts) + "\n"


def cold_table(results: Results) -> str:
    """Answers sampled at temperature 1 and at 0.6."""
    scores = [f"pass@{k}{at}" for k in (1, ways.SAMPLES) for at in ("", " at τ = 0.6")]
    rows = [["", "seeds", *(score if "τ" in score else f"{score} at τ = 1" for score in scores)],
            ["start", "", *(f"{results.start['scores'][score]:.3f}" for score in scores)]]
    for name in ways.COLD:
        found = {seed: record for seed, record in results.by_way.get(name, {}).items() if scores[1] in record["scores"]}
        if found:
            rows.append([name, str(len(found)), *(
                Interval.of([record["scores"][score] for record in found.values()]).text() for score in scores)])
    return table(rows, "markdown")


def plot(folder: Path, path: Path) -> None:
    """Draw each way of each task: a dot for each seed, the mean, and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in ways.TASKS if (folder / f"{task}.json").exists()]
    figure, axes = plt.subplots(len(tasks), len(PANELS), figsize=(13, 3.2 * len(tasks)), layout="constrained",
                                squeeze=False)
    for task, line in zip(tasks, axes):
        results = Results(folder, task)
        there = [way for way in ways.COMPARED if way.name in results.by_way][::-1]
        for axis in line:
            axis.set_yticks(range(len(there)), [way.name for way in there] if axis is line[0] else [])
        for axis, (score, title) in zip(line, PANELS.items()):
            if score not in results.start["scores"]:  # nothing is asked
                axis.text(0.5, 0.5, "no questions", transform=axis.transAxes, ha="center", color="gray")
                axis.set_xticks([])
                axis.set_ylim(-0.5, len(there) - 0.5)
                axis.spines[:].set_visible(False)
                continue
            axis.axvline(results.start["scores"][score], color="gray", linestyle=":", label="start")
            for place, way in enumerate(there):
                interval, color = results.interval(way.name, score), COLORS[way.mode]
                axis.plot(list(results.scores(way.name, score).values()), [place] * interval.seeds, "o", color=color,
                          alpha=0.35, markersize=4)
                axis.errorbar(interval.mean, place, xerr=interval.half if interval.seeds > 1 else 0, fmt="D",
                              color=color, capsize=4)
            axis.set_title(f"{task}, {title}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", alpha=0.25)
    axes[0][-1].legend(frameon=False, fontsize=8)
    with aside(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def written_into(text: str, readme: str) -> str:
    """The README with the tables between its two marks."""
    before, _, after = readme.split(MARK)
    return f"{before}{MARK}\n\n{text}\n{MARK}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
                        help="records of the runs (default: those kept beside this file)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="README to write the tables into")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="file for the figure (default: findings.png beside "
                        "the file of --readme; without it, none is drawn)")
    options = parser.parse_args()
    text = report(options.results)
    print(text, end="")
    figure = options.figure or (options.readme and options.readme.parent / "findings.png")
    if figure:
        plot(options.results, figure)
    if options.readme:
        with aside(options.readme) as file:
            file.write_text(written_into(text, options.readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
