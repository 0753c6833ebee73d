"""The texts of each task, from the makers of the other examples.

`code`: questions of three_ways_data.py. Their answers are Python expressions in many spellings; of those that the start
is trained on, 60 % are wrong in one part. `dates`: days of quickstart_data.py, in twenty languages for the start, in
Italian afterwards. `text`: docstrings of installed packages for the start, those of NumPy afterwards, whole and without
questions.

A task has four sets: `start` trains the start, `train` the runs, `choice` chooses learning rates, `valid` is for the
comparison. Lines of questions have `prompt`, `completion` and `answer` (all right answers), others `text`. No training
sees a question or text of `choice` or `valid`.
"""

import ast
import hashlib
import json
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import quickstart_data
import smollm2_data
import three_ways_data

from megatron_ebft.common.disk import aside

SPLITS = ("start", "train", "choice", "valid", "few")
CHOICE = 80
"""Questions of `choice`."""
FEW = 150
"""Questions of `few`, the first ones of `train`: the limited data of a question below."""
SHORTEST, LONGEST = 150, 2000
"""Characters of a text."""
MODULES, NUMPY_MODULES, MOST_TEXTS = 150, 150, 6000
"""Modules that are read of a package and of NumPy, and texts of the start, at most."""


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


def text(folder: Path) -> dict[str, list[dict]]:
    """Docstrings; also writes the tokenizer into the folder, trained on those of the start."""
    site = Path(sysconfig.get_paths()["purelib"])
    texts, random_numbers = {"NumPy": [], "others": []}, random.Random(1)
    seen: set[str] = set()
    for package, modules in smollm2_data.packages([site]).items():
        most = NUMPY_MODULES if package == "numpy" else MODULES
        for docstring in docstrings(random_numbers.sample(modules, min(len(modules), most))):
            if docstring not in seen:
                seen.add(docstring)
                texts["NumPy" if package == "numpy" else "others"].append({"text": docstring})
    # In the order of hashes, so that what is held out does not depend on the order of files.
    numpy, start = (sorted(lines, key=lambda line: hashlib.sha256(line["text"].encode()).digest())
                    for lines in texts.values())
    start = start[:MOST_TEXTS]
    tokenizer = quickstart_data.train_tokenizer([line["text"] for line in start], quickstart_data.VOCAB_SIZE)
    with aside(folder / "tokenizer.model") as file:
        file.write_bytes(tokenizer)
    held_out = len(numpy) // 4
    return {"start": start, "train": numpy[2 * held_out:], "choice": numpy[:held_out],
            "valid": numpy[held_out:2 * held_out]}


def docstrings(modules: list[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions that are neither short nor long."""
    for path in modules:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in texts
                module = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if SHORTEST <= len(docstring) <= LONGEST:
                    yield docstring


def read(folder: Path, *splits: str) -> dict[str, list[dict]]:
    """The lines of each split."""
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
            for split in splits}


def make(task: str, folder: Path) -> None:
    """Write the sets of a task, unless they are there. `few.jsonl` is written last."""
    if (folder / "few.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"code": code, "dates": dates, "text": text}[task](folder)
    for split, lines in (*splits.items(), ("few", splits["train"][:FEW])):
        with aside(folder / f"{split}.jsonl") as file:
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
