"""What is measured of a trained model on held-out questions. Everything but L_FM comes from tools/evaluate.py.

L_FM is the squared distance between the mean feature of the model's answers and that of the right ones. CFM compares
with one right answer, so it also has the variance of the right answers in it. In `code` all right answers of a question
are known, and equally likely. So L_FM is measured: without bias, from the samples, in the features of the start.

Suffixes: N texts, S sequence, H hidden size, D features.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import evaluate
import trained_model
import ways

from megatron_ebft.common.disk import aside

PREFIXES = (8, 16)
"""L_FM is measured in the feature of the answer's token of this number, or of its end token if it is shorter."""
BATCH = 256
CHOICE, VALID = "choice", "valid"


def measure(task: str, folder: Path, data: Path, start: Path, split: str, cold: bool = False) -> dict[str, float]:
    """All scores of the checkpoint in `folder`, which also gets a file of its answers, if there are questions.

    Args:
        split: `choice`: without CFM and L_FM.
        cold: also sample answers at temperature 0.6.
    """
    model = [*ways.tokenizer(data), "--load", folder]
    text = [*ways.rows(task), *ways.LAYOUT, "--text-data", data / f"{split}_text_document", "--text-rows", ways.ROWS,
            "--data-cache-path", data / "cache", "--micro-batch-size", 16]
    if split == VALID:
        text += ["--ebft-encoder-load", start, "--ebft-eval-length", 8]
    if task not in ways.ASKING:
        return text_scores(run_evaluate(folder, split, [*model, *text]))
    flags = [*model, "--verifier", "exact", "--ebft-verifier-workers", 1, "--num-samples", ways.SAMPLES, "--pass-at",
             *range(1, ways.SAMPLES + 1), "--max-new-tokens", ways.LONGEST, "--rows", BATCH, "--questions",
             asked(data, split), "--samples-output", folder / f"{split}-answers.jsonl"]
    results = run_evaluate(folder, split, [*flags, *text])
    lines = answers(folder, split)
    scores = answer_scores(results, lines) | text_scores(results)
    if task == "code" and split == VALID:
        scores |= {f"L_FM/{tokens:02d}": value for tokens, value in feature_matching(data, start, lines).items()}
    if cold:
        flags[-1] = folder / "cold-answers.jsonl"
        results = run_evaluate(folder, "cold", [*flags, "--temperature", 0.6])
        scores |= {f"{name} at τ = 0.6": value
                   for name, value in answer_scores(results, answers(folder, "cold")).items() if "greedy" not in name}
    return scores


def asked(data: Path, split: str) -> Path:
    """A file of the first questions of a split."""
    path = data / f"{split}-asked.jsonl"
    if not path.exists():
        lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[: ways.ASKED]
        with aside(path) as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_evaluate(folder: Path, name: str, flags: list) -> dict:
    evaluate.main([*map(str, flags), "--json", str(folder / f"{name}.json")])
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def text_scores(results: dict) -> dict[str, float]:
    """Cross entropy, CFM and entropy on held-out rows."""
    return {name: value for name, value in results["text"].items() if name != "rows"}


def answers(folder: Path, name: str) -> list[dict]:
    """Questions with their completions, the greedy one first."""
    return [json.loads(line) for line in (folder / f"{name}-answers.jsonl").read_text(encoding="utf-8").splitlines()]


def answer_scores(results: dict, lines: list[dict]) -> dict[str, float]:
    """Shares of right answers, chrF, and how many different answers the samples of a question are."""
    import sacrebleu

    means = results["answers"]["means"]
    greedy = [line["completions"][0]["text"] for line in lines]
    most = max(len(line["answer"]) for line in lines)
    references = [[line["answer"][i] if i < len(line["answer"]) else None for line in lines] for i in range(most)]
    samples = [line["completions"][1:] for line in lines]
    return {"greedy": means["accuracy"]["value"],
            "greedy chrF": sacrebleu.CHRF().corpus_score(greedy, references).score,
            **{name: mean["value"] for name, mean in means.items() if name.startswith("pass@")},
            "different answers": mean([len({x["text"] for x in each}) for each in samples]),
            "different right answers": mean([len({x["text"] for x in each if x["is_right"]}) for each in samples])}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def feature_matching(data: Path, start: Path, lines: list[dict]) -> dict[int, float]:
    """L_FM of the sampled answers, for each of PREFIXES."""
    args = trained_model.parser("evaluate", __doc__, ()).parse_args(
        [*map(str, ways.tokenizer(data)), "--load", str(start)])
    with trained_model.on_ranks(args) as encoder:
        encoder.build()
        texts = {(line["prompt"], text) for line in lines
                 for text in (*line["answer"], *(x["text"] for x in line["completions"][1:]))}
        features = dict(features_of(encoder, sorted(texts)))
    losses = {tokens: [] for tokens in PREFIXES}
    for line in lines:
        for i, tokens in enumerate(PREFIXES):
            drawn, right = ([features[line["prompt"], text][i] for text in each]
                            for each in ([x["text"] for x in line["completions"][1:]], line["answer"]))
            losses[tokens].append(squared_distance(drawn, right))
    return {tokens: mean(values) for tokens, values in losses.items()}


def squared_distance(drawn: list, right: list) -> float:
    """‖E x − mean of right‖² without bias, from independent draws of x: vectors [D]."""
    import torch

    x_ND, mean_D = torch.stack(drawn), torch.stack(right).mean(0)
    total_D, n = x_ND.sum(0), len(drawn)
    pairs = (total_D @ total_D - x_ND.square().sum()) / (n * (n - 1))
    return (pairs - 2 * total_D @ mean_D / n + mean_D @ mean_D).item()


def features_of(encoder, texts: list[tuple[str, str]]) -> Iterator[tuple]:
    """Each question with an answer, and the feature of the answer up to each of PREFIXES, as the encoder computes it in
    training: hidden states of three layers at one token, normalised together."""
    import torch

    from megatron_ebft.method.features import Catch
    from megatron_ebft.model.attention import CausalPattern, as_mask

    tokenizer, depth = encoder.tokenizer, encoder.architecture.num_layers
    layers = [int(share * depth) for share in (0.25, 0.5, 0.75)]
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        prompts = [tokenizer.tokenize(prompt) for prompt, _ in batch]
        rows = [prompt + tokenizer.tokenize(answer) + [tokenizer.eod] for prompt, (_, answer) in zip(prompts, batch)]
        length = max(map(len, rows))
        tokens_NS = torch.tensor([row + [tokenizer.eod] * (length - len(row)) for row in rows])
        with torch.no_grad(), Catch(encoder.model, layers) as catch:
            encoder.model(tokens_NS, torch.arange(length).expand_as(tokens_NS), as_mask(CausalPattern()),
                          readout=lambda hidden_SBH, _: hidden_SBH)
        hidden_NSD = torch.cat(catch.caught, dim=-1).transpose(0, 1).double()
        for text, prompt, row, hidden_SD in zip(batch, prompts, rows, hidden_NSD):
            places = [min(len(prompt) + tokens, len(row)) - 1 for tokens in PREFIXES]
            yield text, torch.nn.functional.normalize(hidden_SD[places], dim=-1)
