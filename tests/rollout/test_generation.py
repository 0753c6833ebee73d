"""Completions: greedy ones against transformers, samples against the distribution; both on every layout of ranks."""

from types import SimpleNamespace

import pytest
import torch
from hf_models import MODELS, VOCAB, random_model, save_model
from ranks import enter_world, run_ranks
from transformers import AutoModelForCausalLM

from megatron_ebft.common.device import init_device
from megatron_ebft.hf.config import read_model
from megatron_ebft.hf.load import load_hf_weights
from megatron_ebft.hf.weights import HFWeights
from megatron_ebft.model.build import build_start
from megatron_ebft.parallel import groups
from megatron_ebft.rollout.generation import GenerationConfig, generate
from megatron_ebft.rollout.stop_strings import StopStrings

PROMPTS = [[5, 17, 3], [60], [8, 9, 10, 11, 12, 13, 14, 15, 16], [44, 2, 44, 2], [1, 66, 0, 31, 7, 7]]
ENDS = (4, 11, 19, 26, 33, 40, 52)
LAYOUTS = {"tensor": dict(tp=2, sequence_parallel=True), "pipeline": dict(pp=2), "pipeline of four": dict(pp=4),
           "both": dict(tp=2, pp=2), "data": {}}


def model_of(folder: str, tp: int = 1, pp: int = 1, sequence_parallel: bool = False):
    """The model of a Hugging Face folder, split over ranks."""
    hf, weights = read_model(folder, "--hf-model"), HFWeights(folder, "--hf-model")
    hf.architecture.padded_vocab_size = 2 * VOCAB
    model = build_start(hf.architecture, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                        params_dtype=torch.float32, pipeline_dtype=torch.float32, sequence_parallel=sequence_parallel)
    load_hf_weights(model, hf, weights)
    return model


def config(**changes) -> GenerationConfig:
    return GenerationConfig(**dict(max_new_tokens=24, temperature=0.0, end_ids=ENDS) | changes)


def greedy(model, prompts: list[list[int]], ends: tuple[int, ...]) -> list[list[int]]:
    """What transformers generates, up to and with an end token."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=list(ends),
                         pad_token_id=0)[:, longest:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in out]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_what_transformers_generates(one_rank, kind, tmp_path):
    save_model(tmp_path, kind)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = greedy(reference, PROMPTS, ())
    ends = whole[0][3], whole[2][11]
    expected = greedy(reference, PROMPTS, ends)
    model = model_of(str(tmp_path))
    for rows in (64, 2):  # in one go, and with others that take the places of those that ended
        completions = generate([model], PROMPTS, config(rows=rows, end_ids=ends))
        assert [completion.tokens for completion, in completions] == expected
    assert [completion.finished for completion, in completions] == [tokens[-1] in ends for tokens in expected]
    assert len({len(tokens) for tokens in expected}) > 1 or kind == "qwen2.5"  # which repeats one token


def test_log_probabilities_are_those_of_the_whole_sequence(one_rank, tmp_path):
    reference = random_model("llama 3.1")
    save_model(tmp_path, "llama 3.1")
    for temperature in (0.0, 0.7):
        completions = generate([model_of(str(tmp_path))], PROMPTS,
                               config(temperature=temperature, num_samples=3, top_k=20, rows=4))
        for prompt, samples in zip(PROMPTS, completions):
            for completion in samples:
                with torch.no_grad():
                    logits = reference(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
                log_probs = (logits / (temperature or 1)).log_softmax(-1)
                expected = log_probs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=2e-5, rtol=0)


def test_frequencies_are_the_softmax(one_rank, tmp_path):
    save_model(tmp_path, "qwen2.5")
    drawn = generate([model_of(str(tmp_path))], PROMPTS[:2], config(
        max_new_tokens=1, temperature=2.0, num_samples=4000, rows=3000))
    for prompt, samples in zip(PROMPTS, drawn):
        counts = torch.bincount(torch.tensor([completion.tokens[0] for completion in samples]), minlength=VOCAB)
        with torch.no_grad():
            expected = 4000 * (random_model("qwen2.5")(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
        often = expected > 5
        chi_square = ((counts - expected) ** 2 / expected)[often].sum()
        assert often.sum() > 10 and chi_square < often.sum() + 4 * (2 * often.sum()) ** 0.5


def test_samples_depend_on_prompt_seed_and_iteration_alone(one_rank, tmp_path):
    save_model(tmp_path, "llama 3.2")
    model, settings = model_of(str(tmp_path)), dict(temperature=1.0, num_samples=3)

    def tokens(prompts, iteration=0, occurrence=None, **changes):
        drawn = generate([model], prompts, config(**settings | changes), iteration=iteration, occurrence=occurrence)
        return [[completion.tokens for completion in samples] for samples in drawn]

    whole = tokens(PROMPTS)
    assert tokens(PROMPTS[::-1], rows=4) == whole[::-1]
    assert tokens(PROMPTS[2:3], num_samples=2) == [whole[2][:2]]
    assert tokens(PROMPTS, top_p=0.999999) == whole
    assert all(a != b for a, b in zip(tokens(PROMPTS, seed=7), whole))
    assert all(a != b for a, b in zip(tokens(PROMPTS, iteration=1), whole))
    assert all(len({tuple(x) for x in samples}) == 3 for samples in whole)
    assert tokens([]) == []
    later, = tokens(PROMPTS[:1], num_samples=6)
    assert tokens(PROMPTS[:1] * 2, occurrence=[0, 1]) == [later[:3], later[3:]] and len(set(map(tuple, later))) == 6


def on_layouts(folder: str) -> dict[str, list]:
    """Completions by layout, on four ranks: greedy ones, and samples."""
    init_device()
    by_layout = {}
    for name, sizes in LAYOUTS.items():
        enter_world(4)
        groups.init_parallel(sizes.get("tp", 1), sizes.get("pp", 1), seed=1)
        model, drawn = model_of(folder, **sizes), []
        for settings in (dict(), dict(temperature=1.0, num_samples=3, top_p=0.9)):
            mine = generate([model], groups.dealt(PROMPTS), config(rows=5, pad_to=sizes.get("tp", 1), **settings))
            drawn += groups.collected([[completion.tokens for completion in samples] for samples in mine])
        by_layout[name] = drawn
        del model
        groups.shut_down()
    return by_layout


def test_layouts_agree(one_rank, tmp_path):
    save_model(tmp_path, "llama 3.1")
    model, expected = model_of(str(tmp_path)), []
    for settings in (dict(), dict(temperature=1.0, num_samples=3, top_p=0.9)):
        drawn = generate([model], PROMPTS, config(**settings))
        expected += [[completion.tokens for completion in samples] for samples in drawn]
    for rank in run_ranks(4, "test_generation:on_layouts", str(tmp_path)):
        assert rank == dict.fromkeys(LAYOUTS, expected)


def test_stop_strings():
    tokenizer = SimpleNamespace(completion_text=lambda ids: bytes(ids).decode(errors="replace"))
    stops = StopStrings(["\n\n", "é"], tokenizer)
    tokens = list("a\nb\n\nc é".encode())
    ended = [stops.has_come(tokens[:end]) for end in range(1, len(tokens) + 1)]
    assert ended.index(True) == 4
    assert not stops.has_come(list("cé".encode())[:-1]) and stops.has_come(list("cé".encode()))
    shown = SimpleNamespace(completion_text=lambda ids: "".join(chr(i) for i in ids if i))  # 0 has no text
    assert StopStrings(["AB"], shown).has_come([65, *[0] * 30, 66])
    assert stops.cut("a\nb\n\ncé") == "a\nb" and stops.cut("é") == "" and stops.cut("abc") == "abc"


def test_ends_by_a_stop(one_rank, tmp_path):
    """A completion ends with the token that completes a stop, and transformers' rule is the same."""
    save_model(tmp_path, "llama 2")
    model = model_of(str(tmp_path))
    whole = generate([model], PROMPTS, config(end_ids=()))
    stop = whole[0][0].tokens[9:11]
    stops = SimpleNamespace(has_come=lambda tokens: tokens[-2:] == stop)
    cut = generate([model], PROMPTS, config(end_ids=(), stops=stops))
    for (before,), (after,) in zip(whole, cut):
        place = next((i for i in range(1, 24) if before.tokens[i - 1 : i + 1] == stop), None)
        assert after.tokens == before.tokens[: None if place is None else place + 1]
        assert after.finished == (place is not None)
    assert cut[0][0].finished
