"""tools/generate.py: its files, its console and its refusals."""

import gzip
import io
import json
import os
import re
import subprocess
from pathlib import Path

import generate
import pytest
import torch
from console import Stream
from hf_models import save_byte_model, to_megatron
from ranks import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ebft.checkpointing.companions import end_ids
from megatron_ebft.data.tokenizer import NullTokenizer
from megatron_ebft.parallel import groups

PROMPTS = ["Once upon", "A", "time and again, time"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_prompts(path: Path) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({"prompt": prompt, "id": i}) + "\n"
                                           for i, prompt in enumerate(PROMPTS)).encode()))
    return path


def test_completions_are_those_of_transformers(folder, tmp_path):
    """From the Hugging Face folder and from a converted checkpoint; log-probabilities, stop strings and end tokens."""
    prompts, output = write_prompts(tmp_path / "prompts.jsonl.gz"), tmp_path / "out.jsonl"
    common = ["--prompts", str(prompts), "--output", str(output), "--temperature", "0", "--max-new-tokens", "30"]
    generate.main(["--hf-model", str(folder), *common])
    written = lines(output)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for i, line in enumerate(written):
        assert (line["prompt"], line["id"]) == (PROMPTS[i], i)
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=30, do_sample=False)
        completion, = line["completions"]
        assert completion["tokens"] == whole[0, ids.shape[1]:].tolist()
        assert completion["text"] == tokenizer.decode(
            [token for token in completion["tokens"] if token not in (256, 9)], skip_special_tokens=True)
        log_probs = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        log_prob = log_probs.gather(1, whole[0, ids.shape[1]:, None]).sum()
        torch.testing.assert_close(completion["log_prob"], log_prob.item(), atol=1e-4, rtol=0)
        assert completion["finished"] == (completion["tokens"][-1] in (256, 9))
    stop = written[0]["completions"][0]["text"][5:7]
    generate.main(["--load", str(to_megatron(folder, tmp_path / "checkpoint")), *common, "--stop", stop, "~~~~"])
    for before, after in zip(written, lines(output)):
        before, after = before["completions"][0], after["completions"][0]
        assert after["text"] == before["text"].split(stop)[0]
        assert after["tokens"] == before["tokens"][:len(after["tokens"])]
        assert after["finished"] == (before["finished"] or stop in before["text"])
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_console_shows_the_same(folder, tmp_path, monkeypatch, capsys):
    flags = ["--hf-model", str(folder), "--max-new-tokens", "20", "--seed", "5", "--stop", "d7", "3\n"]
    generate.main([*flags, "--prompts", str(write_prompts(tmp_path / "prompts.gz"))])
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS) + "\n"))
    generate.main(flags)
    shown = capsys.readouterr().out
    assert shown == "".join(f"> {line['completions'][0]['text']}\n" for line in written) + "> "


@pytest.mark.parametrize("content, flags, message", [
    ('{"prompt": 3}\n', [], 'prompts.jsonl:1: has no text `prompt`'),
    ('{"prompt": "a"}\n[]\n', [], "prompts.jsonl:2: not a JSON object"),
    ("\n", [], "--prompts .*prompts.jsonl: has no lines"),
    ('{"prompt": ""}\n', [], "prompts.jsonl:1: is empty"),
    ('\n{"prompt": "abc"}\n', ["--max-new-tokens", "254"],
     "prompts.jsonl:2: has 3 tokens; with --max-new-tokens 254 .* 256"),
    ('{"prompt": "a\\ud800"}\n', [], "prompts.jsonl:1: 'utf-8' codec can't encode"),
    ('{"prompt": "a", "completions": 1}\n', [], "prompts.jsonl:1: has a field `completions`"),
    ('{"prompt": "a"}\n', ["--stop", "x", ""], "--stop: an empty text"),
    ('{"prompt": "a"}\n', ["--output", "/tmp"], "--output /tmp: is a folder"),
    ('{"prompt": "a"}\n', ["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
    ('{"prompt": "a"}\n', ["--output", "/nowhere/out"], "--output /nowhere/out: /nowhere is no folder"),
    ('{"prompt": "a"}\n', ["--load", "x"], "--hf-model, --load: give one of the two"),
])
def test_refusals(folder, tmp_path, content, flags, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        generate.main(["--hf-model", str(folder), "--prompts", str(path), *flags])
    if torch.distributed.is_initialized():
        groups.shut_down()


def test_an_error_is_one_line(folder, tmp_path):
    code, output = run_script(Path(generate.__file__), "--hf-model", str(folder), "--prompts", str(tmp_path / "none"))
    assert code == 64 and re.search("^error: --prompts .*none: no such file$", output, re.M)


def test_parts_are_written_as_they_come(folder, tmp_path, monkeypatch):
    """Into a pipe, with a lone surrogate and any other fields; the parts do not change the completions. At temperature
    0 all samples are one."""
    path, pipe = tmp_path / "prompts.jsonl", tmp_path / "pipe"
    path.write_text("".join(json.dumps({"prompt": prompt, "other": "\ud800é"}) + "\n" for prompt in PROMPTS * 3))
    flags = ["--hf-model", str(folder), "--prompts", str(path), "--max-new-tokens", "5"]
    generate.main([*flags, "--output", str(tmp_path / "whole")])
    monkeypatch.setattr(generate, "WAVES", 1)
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    generate.main([*flags, "--output", str(pipe), "--rows", "2"])
    parts, whole = map(json.loads, reader.communicate(timeout=60)[0].splitlines()), lines(tmp_path / "whole")
    assert pipe.is_fifo() and len(whole) == 9
    for part, line in zip(parts, whole, strict=True):
        (one,), (other,) = part.pop("completions"), line.pop("completions")
        assert part == line and one["tokens"] == other["tokens"] and one["text"] == other["text"]
    generate.main([*flags, "--output", str(tmp_path / "greedy"), "--temperature", "0", "--num-samples", "3"])
    for line in lines(tmp_path / "greedy"):
        assert line["other"] == "\ud800é" and line["completions"] == line["completions"][:1] * 3


def test_a_stream_shows_no_stop_string(capsys):
    stream = Stream(["```", "\n\n"])
    for text, is_whole in (("x", False), ("x = 1\n", False), ("x = 1\n``", False), ("x = 1\n`y", False),
                           ("x = 1\n`y", True)):
        stream.show(text, is_whole)
    assert capsys.readouterr().out == "x = 1\n`y"


def test_end_tokens_and_beginnings():
    """Of the generation settings; without these, of the configuration. A prompt has one beginning-of-text id."""
    settings, config = b'{"eos_token_id": [7, 9]}', b'{"eos_token_id": 5}'
    assert end_ids({"generation_config.json": settings, "config.json": config}, 1) == (1, 7, 9)
    assert end_ids({"config.json": config}, 1) == (1, 5) and end_ids({}, 1) == (1,)
    tokenizer = NullTokenizer(10)
    tokenizer.bos, tokenizer.adds_bos = 3, True
    assert tokenizer.prompt_ids("4 5") == tokenizer.prompt_ids("3 4 5") == [3, 4, 5]
