"""lm-eval on an exported model: its figures are those of transformers and of tools/evaluate.py."""

import json
from pathlib import Path

import evaluate
import pytest
import torch
from hf_models import save_byte_model, to_hf, to_megatron
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval; .ci/run installs it")

TASKS = Path(__file__).parents[2] / "examples/lm_eval_tasks"
END, ASTERISK, NEW_TOKENS = 256, 9, 8
"""Both ids end a text. Only the first is a special token, whose text is never shown: a task must name the other."""
IS_RIGHT = {"What?": True, "hello": True, "ny": True, "en": False, "1 2 3": True, "Why": False}
"""Prompts, and whether their answers will be right. In turn their greedy completions end with ASTERISK, are END alone,
begin with a space, end with white space and are cut, twice."""
CHOICES = {"task": "choices", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "choices.jsonl"}},
           "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_target": "label",
           "doc_to_choice": ["a", "bc", "def", "the last"], "target_delimiter": "",
           "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return to_megatron(save_byte_model(folder / "source"), folder / "checkpoint")


@pytest.fixture
def oracle(checkpoint, tmp_path):
    """Model and tokenizer of the export, by transformers alone; tmp_path/published is the export."""
    folder = to_hf(checkpoint, tmp_path / "published")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The working folder is tmp_path; caches lie there, and nothing asks the Hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(*tasks: str | dict) -> dict:
    """What lm-eval finds of tmp_path/published, with its own tasks left out (reading them takes a while)."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return lm_eval.simple_evaluate("hf", {"pretrained": "published"}, [*tasks], task_manager=manager, device="cpu",
                                   batch_size=4, bootstrap_iters=0,
                                   gen_kwargs={"max_gen_toks": NEW_TOKENS, "until": ["*"]})


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def completion(model, tokenizer, prompt: str) -> str:
    """The greedy completion without the token that ends it."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1]:].tolist()
    return tokenizer.decode([token for token in tokens if token not in (END, ASTERISK)])


def log_prob(model, tokenizer, prompt: str, choice: str) -> float:
    """Of the choice after the prompt."""
    ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return log_probs[-len(choice):].sum().item()


def test_exact_answers(checkpoint, oracle, offline, tmp_path):
    texts = [completion(*oracle, prompt) for prompt in IS_RIGHT]
    assert texts[1] == "" and all(text != text.strip() for text in texts[2:4])
    write(tmp_path / "questions.jsonl", [{"prompt": prompt, "answer": text.strip() + "x" * (not is_right)}
                                         for text, (prompt, is_right) in zip(texts, IS_RIGHT.items(), strict=True)])
    found = run("questions")
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == [[text.strip()] for text in texts]
    assert [bool(sample["exact_match"]) for sample in samples] == [*IS_RIGHT.values()]
    evaluate.main(["--load", str(checkpoint), "--questions", "questions.jsonl", "--verifier", "exact",
                   "--max-new-tokens", str(NEW_TOKENS), "--json", "results.json"])
    accuracy = json.loads((tmp_path / "results.json").read_text())["answers"]["means"]["accuracy"]["value"]
    assert found["results"]["questions"]["exact_match,stripped"] == pytest.approx(accuracy) == pytest.approx(4 / 6)


def test_choices(oracle, offline, tmp_path):
    expected = [[log_prob(*oracle, prompt, choice) for choice in CHOICES["doc_to_choice"]] for prompt in IS_RIGHT]
    best = torch.tensor(expected).argmax(-1).tolist()
    write(tmp_path / "choices.jsonl", [{"prompt": prompt, "label": (i + (not is_right)) % 4}
                                       for i, (prompt, is_right) in zip(best, IS_RIGHT.items(), strict=True)])
    found = run(CHOICES)
    samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
    got = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-4, rtol=0)
    assert found["results"]["choices"]["acc,none"] == pytest.approx(4 / 6)
