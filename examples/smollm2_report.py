"""Compare the runs of smollm2.sh: a table, results.json and curves.

    python examples/smollm2_report.py OUTPUT

Prints the table and writes results.json and curves.png into OUTPUT. Cross entropy, CFM and edit similarity come from
the runs' TensorBoard files, HumanEval of the start and of the last checkpoints from `humaneval/*.json`, where
tools/evaluate.py wrote it.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from compare_runs import Run, table
from quickstart_report import FOLDER, mean_and_deviation

from megatron_ebft.common.disk import aside, write_json

HELD_OUT = {"CE": "eval/ce_loss", "CFM": "eval/cfm", "edit similarity": "eval/answers/score"}
"""Measures of held-out functions, by their names here."""
GREEDY = "HumanEval greedy"
BETTER = {"CE": "lower", "CFM": "lower"}
"""Of the other measures, more is better."""
COLORS = {"sft": "tab:orange", "ebft": "tab:blue"}


def humaneval(output: Path, name: str) -> dict[str, dict]:
    """Value, low and high of each measure of HumanEval: greedy, pass@k.

    Raises:
        ValueError: the file is missing.
    """
    path = output / "humaneval" / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{path}: is missing; run smollm2.sh again")
    means = json.loads(path.read_text())["answers"]["means"]
    return {GREEDY: means["accuracy"]} | {name: mean for name, mean in means.items() if name.startswith("pass@")}


def record(output: Path, folder: Path) -> dict:
    """A run and its points, from the start on, as results.json has it.

    Raises:
        ValueError: the run is incomplete.
    """
    method, _, seed = FOLDER.fullmatch(folder.name).groups()
    run = Run.read(folder / "tensorboard", folder.name)
    curves = {name: dict(run.scalars.get(tag, [])) for name, tag in HELD_OUT.items()}
    if len({tuple(curve) for curve in curves.values()}) > 1 or run.steps() not in curves["CE"]:
        raise ValueError(f"{folder}: has not evaluated everything at every step; run smollm2.sh again")
    points = [{"step": step} | {name: curve[step] for name, curve in curves.items()} for step in curves["CE"]]
    points[0] |= humaneval(output, "start")
    points[-1] |= humaneval(output, folder.name)
    seconds = [value for _, value in run.scalars["seconds/step"]]
    return {"method": method, "seed": int(seed), "steps": run.steps(), "seconds": sum(seconds), "points": points}


def measures(records: list[dict]) -> list[str]:
    return [name for name in records[0]["points"][0] if name != "step"]


def cell(name: str, points: list[dict]) -> str:
    """Mean and standard deviation over seeds; of a single seed, HumanEval with its 95 % interval over problems."""
    values = [point[name] for point in points if name in point]
    if not values:
        return ""
    if name in HELD_OUT:
        return mean_and_deviation(values, "{:.4f}")
    text = mean_and_deviation([value["value"] for value in values], "{:.3f}")
    return text if len(values) > 1 else f"{text} [{values[0]['low']:.2f}, {values[0]['high']:.2f}]"


def rows(records: list[dict]) -> list[list[str]]:
    """Head; the start; a row for each method and step."""
    names = measures(records)
    lines = [["", "steps", "seconds", *names],
             ["start", "0", "0", *(cell(name, [records[0]["points"][0]]) for name in names)]]
    for method in dict.fromkeys(record["method"] for record in records):
        group = [record for record in records if record["method"] == method]
        for points in list(zip(*(record["points"] for record in group), strict=True))[1:]:
            step = points[0]["step"]
            seconds = [record["seconds"] * step / record["steps"] for record in group]
            lines.append([method.upper(), str(step), mean_and_deviation(seconds, "{:.0f}"),
                          *(cell(name, points) for name in names)])
    return lines


def plot(records: list[dict], path: Path) -> None:
    """Draw a panel for each measure over seconds of training, a curve for each run."""
    names = measures(records)
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.2), layout="constrained")
    for axis, name in zip(axes.flat, names):
        for entry in records:
            points = [point for point in entry["points"] if name in point]
            seconds = [entry["seconds"] * point["step"] / entry["steps"] for point in points]
            values = [point[name] if name in HELD_OUT else point[name]["value"] for point in points]
            axis.plot(seconds, values, color=COLORS[entry["method"]], marker="o", label=entry["method"].upper())
        axis.set(title=f"{name}: {BETTER.get(name, 'higher')} is better", xlabel="seconds of training")
        axis.grid(alpha=0.3)
    labels = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels())))
    axes.flat[0].legend(labels.values(), labels.keys(), frameon=False)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.suptitle("SmolLM2-135M-Instruct: functions of held-out packages, and HumanEval")
    with aside(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Table, results.json and curves of smollm2.sh.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder of smollm2.sh")
    output = parser.parse_args().output
    folders = [folder for method in COLORS for folder in sorted(output.glob(f"{method}*-seed*"))
               if FOLDER.fullmatch(folder.name)]
    if not folders:
        raise ValueError(f"{output}: has no runs; run smollm2.sh first")
    records = [record(output, folder) for folder in folders]
    with aside(output / "results.json") as file:
        write_json(file, {"runs": records})
    plot(records, output / "curves.png")
    print(table(rows(records), "text"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
