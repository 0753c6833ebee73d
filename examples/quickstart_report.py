"""Report on the quickstart's EBFT runs: a table of before and after, curves, and rollouts beside gold text.

    python examples/quickstart_report.py OUTPUT/ebft-seed1 OUTPUT/ebft-seed2 ... --output OUTPUT

Writes report.txt and curves.png. All numbers come from the runs' TensorBoard files. "Before" is the evaluation at
step 0, "after" the last one; both use the same held-out rows and the same random numbers.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

BEFORE, AFTER = "tab:gray", "tab:blue"
SHOWN_BLOCKS, SHOWN_ROLLOUTS = 3, 2
ROLLOUTS = "rollouts/text_summary"
SECTION = re.compile(r"\*\*(context|gold|rollout)\*\* …?\n```\n(.*?)\n```", re.DOTALL)


@dataclass
class Run:
    """The curves of one run, each a list of (step, value)."""

    name: str
    scalars: dict[str, list[tuple[int, float]]]
    texts: dict[int, str]
    """Rollouts as Markdown, by step."""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run that saved to `folder`.

        Raises:
            ValueError: the run has no evaluations, or a value that is not finite.
        """
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
        tags = events.Tags()
        scalars = {tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items()) for tag in tags[SCALARS]}
        for tag in ("eval/cfm", "eval/ce_loss", "eval/alignment", "eval/kl_to_start", "train/reward"):
            if len(scalars.get(tag, [])) < 2:
                raise ValueError(f"{folder}: {tag} is missing from its TensorBoard files; is the run complete?")
        for tag, points in scalars.items():
            if not all(math.isfinite(value) for _, value in points):
                raise ValueError(f"{folder}: {tag} is not finite everywhere")
        if ROLLOUTS not in tags[TENSORS]:
            raise ValueError(f"{folder}: its TensorBoard files hold no rollouts; is the run complete?")
        texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(ROLLOUTS)}
        return cls(folder.name.removeprefix("ebft-").replace("seed", "seed "), scalars, texts)

    def before(self, tag: str) -> float:
        return self.scalars[tag][0][1]

    def after(self, tag: str) -> float:
        return self.scalars[tag][-1][1]

    def lengths(self) -> list[int]:
        """Completion lengths at which CFM was evaluated."""
        return sorted(int(tag.rsplit("/", 1)[1]) for tag in self.scalars if tag.startswith("eval/cfm_length/"))

    def at_lengths(self, which, name: str = "cfm") -> list[float]:
        """CFM (or alignment) at each of `lengths`. which: Run.before or Run.after."""
        return [which(self, f"eval/{name}_length/{length:02d}") for length in self.lengths()]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Text table with aligned columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))) for row in (header, *rows)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def change(before: float, after: float) -> str:
    return f"{before:.4f} → {after:.4f} ({100 * (after / before - 1):+.1f} %)"


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def summary(runs: list[Run]) -> str:
    """Both tables, and one sentence that sums them up."""
    tags = {"validation CE": "eval/ce_loss", "CFM": "eval/cfm", "alignment": "eval/alignment"}
    rows = [[run.name, *(change(run.before(tag), run.after(tag)) for tag in tags.values()),
             f"{run.after('eval/kl_to_start'):.4f}"] for run in runs]
    lengths = runs[0].lengths()
    by_length = [[f"{length} token{'s' * (length > 1)}", *(change(b, a) for b, a in zip(befores, afters))]
                 for length, befores, afters in zip(lengths, zip(*(run.at_lengths(Run.before) for run in runs)),
                                                    zip(*(run.at_lengths(Run.after) for run in runs)))]
    fell = sum(run.after("eval/cfm") < run.before("eval/cfm") for run in runs)
    ce_fell = sum(run.after("eval/ce_loss") < run.before("eval/ce_loss") for run in runs)
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    return "\n".join([
        "Held-out text, before → after EBFT (CE and KL in nats per token; lower CFM is better)", "",
        table(["", *tags, "KL to start"], rows), "",
        "CFM by completion length", "", table(["", *(run.name for run in runs)], by_length), "",
        f"CFM fell on {fell} of {seeds}; validation CE fell on {ce_fell} of {seeds}."])


def samples(run: Run) -> str:
    """A few rollouts from the same held-out contexts, before and after."""
    first, last = min(run.texts), max(run.texts)
    before, after = _blocks(run.texts[first]), _blocks(run.texts[last])
    parts = []
    for old, new in list(zip(before, after))[:SHOWN_BLOCKS]:
        parts.append(f"{'=' * 30} context …\n{old['context'][0]}\n{'-' * 30} gold\n{old['gold'][0]}")
        for label, block in (("before", old), ("after", new)):
            parts += [f"{'-' * 30} rollout {label}\n{text}" for text in block["rollout"][:SHOWN_ROLLOUTS]]
    title = f"Rollouts of {run.name} on held-out text, at temperature 1 (steps {first} and {last})"
    return title + "\n\n" + "\n".join(parts)


def _blocks(markdown: str) -> list[dict[str, list[str]]]:
    blocks = []
    for kind, text in SECTION.findall(markdown):
        if kind == "context":
            blocks.append({"context": [], "gold": [], "rollout": []})
        blocks[-1][kind].append(text)
    return blocks


def smooth(points: list[tuple[int, float]], window: int) -> tuple[list[int], list[float]]:
    """The steps, and at each step the mean of the last `window` values."""
    steps, values = zip(*points)
    return list(steps), [mean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def plot(runs: list[Run], path: Path) -> None:
    """Draw curves over steps, and CFM by completion length."""
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.2), constrained_layout=True)
    panels = [(axes[0, 0], "eval/cfm", "CFM, held-out", "CFM (lower is better)"),
              (axes[0, 1], "eval/ce_loss", "Cross entropy, held-out", "nats per token"),
              (axes[0, 2], "train/reward", "Reward, training (mean of 10 steps)", "alignment − α · diversity"),
              (axes[1, 0], "eval/alignment", "Alignment, held-out", "2 · cosine similarity"),
              (axes[1, 1], "eval/kl_to_start", "KL to the starting model, held-out", "nats per token")]
    for axis, tag, title, unit in panels:
        for i, run in enumerate(runs):
            points, color = run.scalars[tag], f"C{i}"
            if tag.startswith("train/"):
                axis.plot(*zip(*points), color=color, alpha=0.25, linewidth=0.8)
                axis.plot(*smooth(points, 10), color=color, label=run.name)
            else:
                axis.plot(*zip(*points), color=color, marker="o", markersize=4, label=run.name)
                axis.axhline(points[0][1], color=color, linestyle=":", linewidth=0.8)
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
    axis = axes[1, 2]
    for which, label, color in ((Run.before, "before", BEFORE), (Run.after, "after", AFTER)):
        curves = [run.at_lengths(which) for run in runs]
        axis.plot(runs[0].lengths(), [mean(values) for values in zip(*curves)], color=color, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(runs[0].lengths(), [str(length) for length in runs[0].lengths()])
    axis.set(title=f"CFM by completion length{', mean of seeds' if len(runs) > 1 else ''}",
             xlabel="completion length (tokens)", ylabel="CFM (lower is better)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Table, curves and samples of EBFT runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="the --save folder of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for report.txt and curves.png")
    options = parser.parse_args()
    runs = [Run.read(folder) for folder in options.runs]
    text = samples(runs[0]) + "\n\n" + summary(runs) + "\n"
    (options.output / "report.txt").write_text(text, encoding="utf-8")
    plot(runs, options.output / "curves.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
