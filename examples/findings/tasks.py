"""The questions of each task, from the makers of the other examples.

`code`: questions of three_ways_data.py. Their answers are Python expressions in many spellings; of those that the start
is trained on, 60 % are wrong in one part. `dates`: days of quickstart_data.py, in twenty languages for the start, in
Italian afterwards.

A task has four sets of lines with `prompt`, `completion` and `answer` (all right answers): `start` trains the start,
`train` the runs, `choice` chooses learning rates, `valid` is for the comparison. No training sees a question of
`choice` or `valid`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import quickstart_data
import three_ways_data

SPLITS = ("start", "train", "choice", "valid", "few")
CHOICE = 80
"""Questions of `choice`."""
FEW = 150
"""Questions of `few`, the first ones of `train`: the limited data of a question below."""


def code(folder: Path) -> dict[str, list[dict]]:
    """The questions of three_ways_data.py, which also writes the tokenizer into the folder."""
    three_ways_data.main(folder)
    lines = read(folder, "pretrain", "train", "valid")
    return {"start": lines["pretrain"], "train": lines["train"][:-CHOICE], "choice": lines["train"][-CHOICE:],
            "valid": lines["valid"]}


def dates(folder: Path) -> dict[str, list[dict]]:
    """The days of quickstart_data.py, which also writes the tokenizer into the folder."""
    quickstart_data.main(folder)
    lines = {split: [{"prompt": document["prompt"], "completion": document["answer"], "answer": [document["answer"]]}
                     for document in documents]
             for split, documents in read(folder, "start", "finetune", "valid").items()}
    return {"start": lines["start"], "train": lines["finetune"], "choice": lines["valid"][:CHOICE],
            "valid": lines["valid"][CHOICE:]}


def read(folder: Path, *splits: str) -> dict[str, list[dict]]:
    """The lines of each split."""
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
            for split in splits}


def make(task: str, folder: Path) -> None:
    """Write the sets of a task, unless they are there. `few.jsonl` is written last."""
    if (folder / "few.jsonl").exists():
        return
    splits = {"code": code, "dates": dates}[task](folder)
    for split, lines in (*splits.items(), ("few", splits["train"][:FEW])):
        unfinished = folder / f"{split}.tmp"
        unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        unfinished.replace(folder / f"{split}.jsonl")
