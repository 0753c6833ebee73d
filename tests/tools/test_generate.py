"""tools/generate.py: its files, its console and its refusals."""

import gzip
import io
import json
import re
from pathlib import Path

import generate
import pytest
import torch
from hf_models import save_byte_model, to_megatron
from ranks import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    ('{"prompt": ""}\n', [], "prompt 1: is empty"),
    ('{"prompt": "abc"}\n', ["--max-new-tokens", "254"], "--max-new-tokens 254: prompt 1 has 3 tokens, and .* 256"),
    ('{"prompt": "a"}\n', ["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
    ('{"prompt": "a"}\n', ["--output", "/nowhere/out"], "--output /nowhere/out: /nowhere is no folder"),
    ('{"prompt": "a"}\n', ["--load", "x"], "--hf-model, --load: give one of the two"),
])
def test_refusals(folder, tmp_path, content, flags, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    script = Path(generate.__file__)
    code, output = run_script(script, "--hf-model", str(folder), "--prompts", str(path), *flags)
    assert code == 64 and "Traceback" not in output
    assert re.search(f"error: .*{message}", output), output
