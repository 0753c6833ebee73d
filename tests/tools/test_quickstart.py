"""The quickstart's data and its report; CI runs the quickstart itself."""

import json

import pytest
import quickstart_data
import quickstart_report
from torch.utils.tensorboard import SummaryWriter

BEFORE = {"eval/cfm": 0.75, "eval/ce_loss": 2.0, "eval/answers/pass@1": 0.25}
ANSWERS = ("**question**\n```\nMonday = \n```\n\n**wrong: not the answer**\n```\nmåndag\n```\n\n"
           "**right**\n```\nlunedì\n```")
KEYS = {"method", "seed", "ce_coef", "steps", "seconds", "cfm_before", "cfm_after", "ce_before", "ce_after",
        "score_before", "score_after"}


def test_nothing_trains_on_held_out_days():
    splits = quickstart_data.documents()
    days = {split: [line["prompt"] for line in lines] for split, lines in splits.items()}
    assert not set(days["valid"]) & {*days["start"], *days["finetune"]}
    assert all(len(set(prompts)) == len(prompts) > 150 for prompts in days.values())
    italian = {"lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"}
    assert {line["answer"].split()[0] for split in ("finetune", "valid") for line in splits[split]} == italian
    share = sum(line["answer"].split()[0] in italian for line in splits["start"]) / len(splits["start"])
    assert 0.04 < share < 0.06  # one of twenty languages


def write_run(folder, after: dict[str, float]) -> None:
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, values in ((0, BEFORE), (2, after)):
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            writer.add_text("answers", ANSWERS if step else ANSWERS.replace("lunedì", "maandag"), step)
        for step in (1, 2):
            writer.add_scalar("seconds/step", 1.5, step)


def test_the_report_of_known_curves(tmp_path):
    """CFM falls by 0.25 and 0.5, 0.375 on average; the standard deviation of these is 0.125 · √2."""
    folders = [tmp_path / f"ebft-0.3-seed{seed}" for seed in (1, 2)] + [tmp_path / f"sft-seed{seed}" for seed in (1, 2)]
    for folder, cfm in zip(folders, (0.5, 0.25, 0.75, 0.5)):
        write_run(folder, {"eval/cfm": cfm, "eval/ce_loss": 1.0 + cfm, "eval/answers/pass@1": 0.5})
    runs = [quickstart_report.Run.read(folder) for folder in folders]
    records = quickstart_report.records(runs)
    assert all(record.keys() == KEYS for record in records)
    assert [(record["method"], record["seed"], record["ce_coef"], record["steps"], record["seconds"])
            for record in records] == [("start", 1, None, 0, 0.0), ("start", 2, None, 0, 0.0), ("ebft", 1, 0.3, 2, 3.0),
                                       ("ebft", 2, 0.3, 2, 3.0), ("sft", 1, None, 2, 3.0), ("sft", 2, None, 2, 3.0)]
    assert [record["cfm_after"] for record in records] == [0.75, 0.75, 0.5, 0.25, 0.75, 0.5]
    assert all(record["score_before"] == 0.25 for record in records) and records[0]["ce_after"] == 2.0
    text = quickstart_report.report(runs, {"Monday =": "lunedì"})
    assert "EBFT γ = 0.3 lowers CFM by 0.3750, 2.1 standard deviations of its 2 seeds (0.1768)." in text
    assert "EBFT γ = 0.3 0.3750 ± 0.1768 1.3750 ± 0.1768 50.0% ± 0.0% 3 ± 0" in " ".join(text.split())
    assert "lowest CFM: EBFT γ = 0.3; lowest CE: EBFT γ = 0.3" in text
    assert "Monday = lunedì\n  start         maandag\n  EBFT γ = 0.3  lunedì" in text
    quickstart_report.plot(runs, {"Monday =": "lunedì"}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("cfm, message", [(float("nan"), "eval/cfm is not finite"), (None, "eval/cfm is missing")])
def test_incomplete_runs_are_refused(tmp_path, cfm, message):
    write_run(tmp_path / "sft-seed1", {"eval/ce_loss": 1.0, "eval/answers/pass@1": 0.5} | (
        {} if cfm is None else {"eval/cfm": cfm}))
    with pytest.raises(ValueError, match=message):
        quickstart_report.Run.read(tmp_path / "sft-seed1")
