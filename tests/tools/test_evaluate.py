"""tools/evaluate.py: the figures of a model, counted by other means; and the same figures in a training run."""

import json
from pathlib import Path

import evaluate
import preprocess_data
import pytest
import sacrebleu
import torch
from hf_models import save_byte_model
from small_run import MODEL, SMALL, finish, scalars, start_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ebft.data.datasets import build_datasets
from megatron_ebft.data.tokenizer import build_tokenizer
from megatron_ebft.parallel import groups

QUESTIONS = [{"prompt": prompt, "pattern": pattern, "reference": "some text of bytes, " + prompt}
             for prompt, pattern in (("Once", "[a-z]"), ("twice", "[A-Z]"), ("a b c", "[0-9]"), ("?", "$^"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


def run(*flags: str, folder: Path) -> dict:
    """What the tool writes."""
    evaluate.main([*flags, "--json", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text())


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_answers_are_counted(folder, tmp_path, capsys):
    path, answers = write(tmp_path / "questions.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    flags = ["--hf-model", str(folder), "--questions", path, "--max-new-tokens", "6"]
    result = run(*flags, "--verifier", "regex", "--num-samples", "5", "--pass-at", "1", "3", "5", "--samples-output",
                 str(answers), folder=tmp_path)["answers"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines, greedy, solved = [json.loads(line) for line in answers.read_text().splitlines()], [], {1: 0, 3: 0, 5: 0}
    for question, line in zip(QUESTIONS, lines, strict=True):
        ids = tokenizer(question["prompt"], return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:].tolist()
        greedy.append(tokenizer.decode([token for token in tokens if token not in (9, 256)]))
        assert {name: line[name] for name in question} == question and line["completions"][0]["text"] == greedy[-1]
        right = [answer["is_right"] for answer in line["completions"][1:]]
        assert len(right) == 5 and all(answer["is_right"] != bool(answer["reason"]) for answer in line["completions"])
        sets = {k: torch.combinations(torch.arange(5), k).tolist() for k in solved}
        for k in solved:
            solved[k] += sum(any(right[i] for i in each) for each in sets[k]) / len(sets[k])
    means = result["means"]
    assert means["accuracy"]["value"] == sum(line["completions"][0]["is_right"] for line in lines) / 4
    assert 0 < sum(any(answer["is_right"] for answer in line["completions"]) for line in lines) < 4
    for k, count in solved.items():
        assert means[f"pass@{k}"]["value"] == pytest.approx(count / 4, abs=1e-12)
        assert means[f"pass@{k}"]["low"] <= count / 4 <= means[f"pass@{k}"]["high"]
    assert f"pass@3  {solved[3] / 4:.4f}  [" in capsys.readouterr().out
    result = run(*flags, "--verifier", "bleu", folder=tmp_path)["answers"]
    expected = sacrebleu.corpus_bleu(greedy, [[question["reference"] for question in QUESTIONS]]).score
    assert result["corpus"]["bleu"] == pytest.approx(expected, abs=1e-9) and "pass@1" not in result["means"]
    assert result["signature"].startswith("nrefs:1|") and f"signature  {result['signature']}" in capsys.readouterr().out


def test_cross_entropy_is_that_of_transformers(folder, tmp_path):
    """Of rows whose number no micro-batch divides, and of documents apart."""
    text = write(tmp_path / "text.jsonl", [{"text": f"document {i}: " + "abc " * (3 + i % 5)} for i in range(19)])
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    assert preprocess_data.main(["--input", text, "--output-prefix", str(tmp_path / "set"), *tokenizer]) == 0
    prefix = str(tmp_path / "set_text_document")
    flags = ["--hf-model", str(folder), "--text-data", prefix, "--seq-length", "64", "--micro-batch-size", "2"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    _, rows, _ = build_datasets(seq_length=64, seed=1234, sizes=(0, None, 0), valid_data_path=[prefix],
                                tokenizer=build_tokenizer(tokenizer[1], str(folder)))
    assert len(rows) % 2 == 1
    whole, apart = [], []
    for row in map(rows.__getitem__, range(len(rows))):
        documents = row["tokens"].split(torch.unique_consecutive(row["documents"], return_counts=True)[1].tolist())
        for parts, losses in (([row["tokens"]], whole), (documents, apart)):
            for part in parts:
                with torch.no_grad():
                    log_probs = model(part[None]).logits[0, :-1].log_softmax(-1)
                losses += (-log_probs.gather(1, part[1:, None])).flatten().tolist()
    result = run(*flags, folder=tmp_path)["text"]
    assert result["rows"] == len(rows) and result["ce_loss"] == pytest.approx(sum(whole) / len(whole), abs=1e-5)
    result = run(*flags, "--ebft-document-mask", folder=tmp_path)["text"]
    assert result["ce_loss"] == pytest.approx(sum(apart) / len(apart), abs=1e-5)


@pytest.mark.parametrize("mode", ["sft", "ebft"])
def test_a_run_evaluates_as_the_tool_does(data, tmp_path, mode):
    """Accuracy, pass@k, cross entropy and CFM of the last checkpoint."""
    questions = write(tmp_path / "questions.jsonl", [
        {"prompt": f"{i} {i + 3} {i + 6}", "pattern": f"^{i + 9}"} for i in range(6)])
    flags = [*MODEL, *SMALL, *data, "--training-mode", mode, "--train-iters", "30", "--ebft-ce-coef", "1",
             "--eval-interval", "30", "--save", str(tmp_path / "run"),
             "--ebft-eval-questions", questions, "--ebft-verifier", "regex",
             "--ebft-eval-samples", "4", "--ebft-pass-at", "2", "--ebft-max-new-tokens", "3", "--eval-iters", "2",
             "--valid-data-path", data[1], "--train-data-path", data[1]]
    flags = [flag for i, flag in enumerate(flags) if "--data-path" not in flags[max(0, i - 1) : i + 1]
             and "--split" not in flags[max(0, i - 1) : i + 1]]
    finish(start_ranks(flags, 1))
    logged = {name.removeprefix("eval/"): values[-1][1]
              for name, values in scalars(tmp_path / "run/tensorboard").items() if name.startswith("eval/")}
    answers = run("--load", str(tmp_path / "run"), "--questions", questions, "--verifier", "regex", "--num-samples",
                  "4", "--pass-at", "2", "--max-new-tokens", "3", folder=tmp_path)["answers"]
    for name in ("accuracy", "pass@2", "length"):
        assert logged[f"answers/{name}"] == pytest.approx(answers["means"][name]["value"], abs=1e-6)
    assert logged["answers/pass@2"] > 0


@pytest.mark.parametrize("flags, message", [
    ([], "--questions, --text-data: give at least one"),
    (["--questions", "x"], "--questions and --verifier: give both"),
    (["--questions", "x", "--verifier", "exact", "--pass-at", "2"], "--pass-at 2: needs as many samples; .* is 0"),
    (["--questions", "x", "--verifier", "exact"], "--questions x: no such file"),
    (["--questions", "QUESTIONS", "--verifier", "exact"], "--questions .*questions.jsonl:1: .*answer"),
    (["--questions", "QUESTIONS", "--verifier", "wrong"], "--verifier wrong: "),
    (["--questions", "QUESTIONS", "--verifier", "regex", "--max-new-tokens", "254"],
     "--questions .*:1: its prompt has 4 tokens, and .*less --max-new-tokens, leaves room for 2"),
    (["--questions", "QUESTIONS", "--verifier", "regex", "--text-data", "nope", "--seq-length", "64"],
     "--text-data.*nope"),
    (["--questions", "x", "--verifier", "exact", "--num-samples", "2", "--temperature", "0"],
     "--num-samples 2 with --temperature 0: all would be"),
    (["--text-data", "x", "--seq-length", "300"], "--seq-length 300: --hf-model .* is for 256 tokens"),
    (["--questions", "x", "--verifier", "exact", "--ebft-encoder-load", "y"], "--ebft-encoder-load: CFM needs rows"),
])
def test_refusals(folder, tmp_path, flags, message):
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    flags = [questions if flag == "QUESTIONS" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--hf-model", str(folder), *([] if "--max-new-tokens" in flags else ["--max-new-tokens", "6"]),
                       *flags])
    if torch.distributed.is_initialized():
        groups.shut_down()
