"""Input files for programs of this package, and copies of them with one mistake each."""

import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random

import hf_models
import small_data
from small_run import MODEL, SMALL, dataset

NASTY = [None, True, -1, 0, 1, 0.5, 1e39, 10**12, 2**64, float("nan"), "", "x", [], {}, [1], {"a": 1}, [[]], "../../x"]
DEEP = 100_000
INT64 = (0, 1, -1, 2**31, 2**40, 2**63 - 1, -(2**63))
STEP = "steps/step_0000002.safetensors"


@dataclass(frozen=True)
class Kind:
    """One kind of input file, and the program that reads it."""

    file: str
    """Below the trial's folder."""
    program: str
    """`train`, or a tool below tools/."""
    flags: tuple[str, ...]
    """`{}` stands for the folder."""
    copied: tuple[str, ...]
    """What the program reads, below the workspace."""
    format: str
    """json, lines, index, tensors or bytes."""
    sealed: str = ""
    """A checkpoint folder whose manifest is made again, as whoever writes the file can do."""


_TEXT = ("--data-path", "{}/set_text_document", "--split", "80,20,0", "--eval-interval", "0", *MODEL, *SMALL,
         "--train-iters", "2", "--tensorboard-dir", "{}/tensorboard")
_SFT = (*_TEXT, "--training-mode", "sft")
_RESUME = (*_SFT, "--train-iters", "3", "--load", "{}/run")
_DATA = ("set_text_document.bin", "set_text_document.idx", "set_text_document.json")
_PREPROCESS = ("--input", "{}/text.jsonl", "--output-prefix", "{}/new", "--append-eod")
_HF = (*_PREPROCESS, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{}/tokenizer")
_STEP = (*_TEXT, "--ebft-replay-steps", "{}/steps")
KINDS = {
    "config.json": Kind("model/config.json", "convert/hf_to_megatron.py",
                        ("--hf-model", "{}/model", "--output", "{}/out"), ("model",), "json"),
    "index of weights": Kind("model/model.safetensors.index.json", "convert/hf_to_megatron.py",
                             ("--hf-model", "{}/model", "--output", "{}/out"), ("model",), "json"),
    "tokenizer.json": Kind("tokenizer/tokenizer.json", "preprocess_data.py", _HF, ("tokenizer", "text.jsonl"), "json"),
    "tokenizer_config.json": Kind("tokenizer/tokenizer_config.json", "preprocess_data.py", _HF,
                                  ("tokenizer", "text.jsonl"), "json"),
    "SentencePiece model": Kind("small.model", "preprocess_data.py", (
        *_PREPROCESS, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "{}/small.model"),
        ("small.model", "text.jsonl"), "bytes"),
    "index of data": Kind("set_text_document.idx", "train", _SFT, _DATA, "index"),
    "metadata of data": Kind("set_text_document.json", "train", _SFT, _DATA, "json"),
    "JSON lines": Kind("text.jsonl", "preprocess_data.py", (
        *_PREPROCESS, "--tokenizer-type", "NullTokenizer", "--vocab-size", "64"), ("text.jsonl",), "lines"),
    "record": Kind("run/iter_0000002/ebft.json", "train", _RESUME, (*_DATA, "run"), "json"),
    "sealed record": Kind("run/iter_0000002/ebft.json", "train", _RESUME, (*_DATA, "run"), "json",
                          sealed="run/iter_0000002"),
    "manifest": Kind("run/iter_0000002/manifest.json", "train", _RESUME, (*_DATA, "run"), "json"),
    "pointer": Kind("run/latest_checkpointed_iteration.txt", "train", _RESUME, (*_DATA, "run"), "bytes"),
    "step file": Kind(STEP, "train", _STEP, (*_DATA, "steps"), "tensors"),
    "--config file": Kind("run.yaml", "train", (*_SFT, "--config", "{}/run.yaml"), (*_DATA, "run.yaml"), "bytes"),
}


def make_workspace(folder: Path) -> list[str]:
    """Make every file that the kinds copy; returns the flags of a run that makes the rest (checkpoint and steps)."""
    dataset(folder)
    hf_models.save_model(folder / "model", "llama 3.1")
    small_data.train_hugging_face(folder / "tokenizer", eos_token="<eos>")
    small_data.train_sentencepiece(folder / "small.model")
    (folder / "run.yaml").write_text("lr: 1e-3\nseed: 7\nebft-feature-layers: [0.5, 1]\nsplit: 90,10,0\nbf16: false\n")
    return [word.format(folder) for word in _TEXT]


def make_case(kind: Kind, workspace: Path, folder: Path, draw: Random) -> list[str]:
    """Copy what the program reads, make one mistake in the file, and return the program's flags."""
    for name in kind.copied:
        source, target = workspace / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    path = folder / kind.file
    path.write_bytes(mutated(path.read_bytes(), kind.format, draw))
    if kind.sealed:
        hf_models.reseal(folder / kind.sealed)
    return [word.format(folder) for word in kind.flags]


def mutated(data: bytes, format: str, draw: Random) -> bytes:
    """The contents of a file with one mistake."""
    if draw.random() < (1.0 if format == "bytes" else 0.25):
        return _bytes(data, draw)
    if format == "json":
        return _json(data, draw)
    if format == "lines":
        lines = data.splitlines()
        place = draw.randrange(len(lines))
        lines[place] = _json(lines[place], draw).replace(b"\n", b" ")
        return b"\n".join(lines) + b"\n"
    if format == "index":
        return _number(data, draw, first=9)
    size, = struct.unpack("<Q", data[:8])
    header = _json(data[8:8 + size], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + size:]


def _bytes(data: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data))
    return draw.choice([
        lambda: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1:],
        lambda: data[:place],
        lambda: b"",
        lambda: data + b"\xff\x00{",
        lambda: data[:place] + random.Random(place).randbytes(20) + data[place:],
        lambda: b"\x1f\x8b\x08\x00" + data,
        lambda: b"[" * DEEP,
    ])()


def _number(data: bytes, draw: Random, first: int) -> bytes:
    """A 32- or 64-bit integer of a binary file replaced; every other time one of its header."""
    place = draw.randrange(first, 42 if draw.random() < 0.5 else len(data) - 8)
    value = struct.pack("<q", draw.choice(INT64))[:draw.choice([1, 4, 8])]
    return data[:place] + value + data[place + len(value):]


def _json(data: bytes, draw: Random) -> bytes:
    """A JSON value with one part replaced, removed, added or nested too deeply."""
    root = [json.loads(data)]
    parent, key = _place(draw, root)
    how = draw.choice(["replace", "replace", "replace", "remove", "add", "deep"])
    if how == "deep":
        parent[key] = "DEEP"
        text = json.dumps(root[0]) if root else ""
        return text.replace('"DEEP"', "[" * DEEP + "]" * DEEP).encode()
    if how == "remove" and parent is not root:
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent["unheard_of"] = draw.choice(NASTY)
    else:
        parent[key] = draw.choice(NASTY)
    return json.dumps(root[0]).encode()


def _place(draw: Random, parent) -> tuple:
    """(container, key) of a value at any depth below `parent`, which is not empty."""
    key = draw.choice(range(len(parent)) if isinstance(parent, list) else sorted(parent))
    if isinstance(parent[key], list | dict) and parent[key] and draw.random() < 0.7:
        return _place(draw, parent[key])
    return parent, key
