"""examples/findings: data, what is measured, and the tables, which are those of the README."""

import itertools
import json
import math
import statistics
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import measure
import plain_llama
import pytest
import report
import run as driver
import tasks
import torch
import variances
import ways
from models import build_encoder

FINDINGS = Path(report.__file__).parent


@pytest.mark.parametrize("task", ways.TASKS)
def test_nothing_trains_on_held_out_texts(task, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MODULES", 2)  # of each package but NumPy, to be quick
    tasks.make(task, tmp_path)
    lines = {split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
             for split in tasks.SPLITS}
    key = "prompt" if task in ways.ASKING else "text"
    texts = {split: {line[key] for line in of_split} for split, of_split in lines.items()}
    for split, other in itertools.product(("choice", "valid"), texts):
        assert split == other or not texts[split] & texts[other], (split, other)
    assert texts["few"] <= texts["train"] and len(lines["few"]) == min(tasks.FEW, len(lines["train"]))
    if task not in ways.ASKING:
        assert all(lines.values()) and not texts["start"] & texts["train"]
        return
    assert len(lines["choice"]) == tasks.CHOICE
    for split in ("train", "few", "choice", "valid"):
        assert all(line["completion"] in line["answer"] for line in lines[split])
    assert len(lines["valid"]) >= ways.ASKED


def test_squared_distance_is_unbiased():
    """Its mean over all draws of three rollouts from a known distribution is the distance of the means."""
    generator = torch.Generator().manual_seed(0)
    values_ND = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    weights_N = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    right_ND = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    expected = (weights_N @ values_ND - right_ND.mean(0)).square().sum().item()
    found = sum(math.prod(weights_N[i].item() for i in drawn)
                * measure.squared_distance([values_ND[i] for i in drawn], list(right_ND))
                for drawn in itertools.product(range(4), repeat=3))
    assert found == pytest.approx(expected, rel=1e-12)


def test_features_are_those_of_a_plain_model(one_rank):
    """Of answers of different lengths in one batch; an answer that is too short has the feature of its end."""
    config, weights = plain_llama.random_llama(1, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=64)
    encoder = SimpleNamespace(
        model=build_encoder(config, weights, (0.25, 0.5, 0.75)), architecture=SimpleNamespace(num_layers=4),
        tokenizer=SimpleNamespace(tokenize=lambda text: [ord(x) % 64 for x in text], eod=1))
    texts = [("what?", "a" * 3), ("why is that?", "the answer to it is this"), ("x", "twelve tokens")]
    for (prompt, answer), (text, features_ND) in zip(texts, measure.features_of(encoder, texts), strict=True):
        row = [ord(x) % 64 for x in prompt + answer] + [1]
        hidden, _ = plain_llama.forward(weights, config, torch.tensor([row]))
        assert text == (prompt, answer) and len(features_ND) == 2
        for tokens, feature_D in zip((8, 16), features_ND):
            place = min(len(prompt) + tokens, len(row)) - 1
            expected_D = torch.cat([hidden[layer][0, place] for layer in (1, 2, 3)]).double()
            torch.testing.assert_close(feature_D, expected_D / expected_D.norm(), rtol=1e-4, atol=1e-6)


def test_scores_of_answers():
    lines = [{"answer": ["x > 1", "1 < x"], "completions": [
        {"text": text, "is_right": text in ("x > 1", "1 < x")} for text in ("x > 1", "x > 1", "1 < x", "x", "x > 1")]}]
    scores = measure.answer_scores({"answers": {"means": {"accuracy": {"value": 1.0}, "pass@1": {"value": 0.75},
                                                          "length": {"value": 3.0}}}}, lines)
    assert scores == {"greedy": 1.0, "greedy chrF": pytest.approx(100), "pass@1": 0.75, "different answers": 3,
                      "different right answers": 2}


@pytest.mark.parametrize("n", (2, 4))
def test_variances_are_those_of_loops(n):
    generator = torch.Generator().manual_seed(1)
    features_BMD = torch.nn.functional.normalize(torch.randn(3, 5, 6, generator=generator, dtype=torch.float64), dim=-1)
    found, columns = variances.variances(features_BMD @ features_BMD.mT, n), {name: [] for name in (
        "alignment", "diversity", "noise", "advantage")}
    for x_MD in features_BMD:
        align = [2 * (x_MD[j] @ x_MD[4]).item() for j in range(4)]
        diverse, advantage = [], []
        for j in range(4):
            group = range(j // n * n, j // n * n + n)
            pairs = {(a, b): 2 * (x_MD[a] @ x_MD[b]).item() for a in group for b in group}
            diverse.append(statistics.mean(pairs[j, i] for i in group if i != j))
            others = [i for i in group if i != j]
            without = [statistics.mean(pairs[i, k] for k in others if k != i) for i in others] if n > 2 else [0.0]
            advantage.append(align[j] - statistics.mean(align[i] for i in others)
                             - diverse[j] + statistics.mean(without))
        noise = statistics.mean(statistics.variance([2 * (x_MD[j] @ x_MD[i]).item() for i in range(4) if i != j])
                                for j in range(4)) / (n - 1)
        for name, value in zip(columns, (statistics.variance(align), statistics.variance(diverse), noise,
                                         statistics.variance(advantage))):
            columns[name].append(value)
    assert found == {name: pytest.approx(statistics.mean(values)) for name, values in columns.items()}


def test_t_quantiles():
    """Student's density, integrated by Simpson's rule up to each quantile."""
    for degrees, quantile in enumerate(report.T_975, 1):
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        width = quantile / 2000
        values = [scale * (1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(2001)]
        area = width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
        assert 0.5 + area == pytest.approx(0.975, abs=2e-6), degrees


class Calls:
    """Stands in for the pool: what is submitted is done at once."""

    def __init__(self):
        self.runs, self.before = [], {}

    def submit(self, log: Path, function, run: ways.Run, before: Path | None, encoder: Path, output: Path) -> Future:
        self.runs.append(run)
        self.before[run] = before
        call = Future()
        call.set_result("done")
        return call

    def wait(self) -> None:
        pass


def test_the_driver_chooses_rates_and_skips_what_is_done(tmp_path):
    """Of equal pass@1, the lower cross entropy wins. EBFT after SFT continues SFT of its seed."""
    calls = Calls()
    experiment = driver.Experiment("dates", tmp_path, calls)
    experiment.choose()
    tried = {(run.way.name, run.lr, run.seed) for run in calls.runs}
    own = [way.name for way in ways.COMPARED if not way.lr_of]
    assert tried == set(itertools.product(own, ways.LEARNING_RATES, [ways.CHOICE_SEED])) and len(own) == 6
    for run in calls.runs:
        best = 2 if run.way.name == "SFT" else 1
        scores = {"pass@1": 0.5 if run.lr >= ways.LEARNING_RATES[1] else 0.4,
                  "ce_loss": abs(ways.LEARNING_RATES.index(run.lr) - best)}
        run.folder(tmp_path).mkdir(parents=True)
        driver.write_record(run.folder(tmp_path), {"seconds": 1.0}, scores)
    calls.runs.clear()
    experiment.choose()
    assert not calls.runs
    experiment.compare()
    assert len(calls.runs) == len(ways.COMPARED) * len(ways.SEEDS)
    for run in calls.runs:
        assert run.lr == ways.LEARNING_RATES[2 if run.way.mode == "sft" and run.way.name == "SFT" else 1]
        before = calls.before[run]
        if run.way.after:
            sft = next(other for other in calls.runs if other.way.name == "SFT" and other.seed == run.seed)
            assert before == sft.folder(tmp_path) and calls.runs.index(sft) < calls.runs.index(run)
        else:
            assert before is None
    assert len({run.folder(tmp_path) for run in calls.runs}) == len(calls.runs)


def test_a_task_without_questions_has_no_verifier(tmp_path, monkeypatch):
    """The lowest cross entropy chooses the rate; no question is asked; RLVR is not run."""
    calls = Calls()
    experiment = driver.Experiment("text", tmp_path, calls)
    experiment.choose()
    assert calls.runs and all(run.way.mode != "rlvr" for run in calls.runs)
    for run in calls.runs:
        run.folder(tmp_path).mkdir(parents=True)
        driver.write_record(run.folder(tmp_path), {"seconds": 1.0},
                            {"ce_loss": abs(ways.LEARNING_RATES.index(run.lr) - 2)})
    assert {experiment.rate(way) for way in experiment.compared} == {ways.LEARNING_RATES[2]}
    asked = []
    monkeypatch.setattr(measure, "run_evaluate", lambda folder, name, flags: asked.append(flags) or {
        "text": {"rows": 7, "ce_loss": 2.5, "entropy": 1.5}})
    scores = measure.measure("text", tmp_path, tmp_path, tmp_path, measure.VALID)
    flags, = asked
    assert scores == {"ce_loss": 2.5, "entropy": 1.5}
    assert "--text-data" in flags and not {"--questions", "--verifier", "--ebft-answer-only"} & set(flags)


def record(way: str, seed: int, **scores: float) -> dict:
    return {"task": "dates", "way": way, "lr": 0.001, "seed": seed, "steps": 25, "seconds": 10.0 + seed, "scores": {
        "pass@4": 0.9, "cfm_length/08": 0.4, **scores}}


def test_tables_of_known_records(tmp_path):
    """Differences are by seed: 0.1 and 0.3 have the mean 0.2 and the half-width 12.7062 · 0.1."""
    records = [record("start", 0, **{"pass@1": 0.1, "ce_loss": 0.5}),
               *(record("SFT", seed, **{"pass@1": value, "ce_loss": 0.2})
                 for seed, value in ((1, 0.4), (2, 0.2), (101, 0.9))),
               *(record("EBFT γ = 0.1", seed, **{"pass@1": value, "ce_loss": ce})
                 for seed, value, ce in ((1, 0.5, 0.31), (2, 0.5, 0.32), (3, 0.9, 0.3)))]
    (tmp_path / "dates.json").write_text(json.dumps(records))
    results = report.Results(tmp_path, "dates")
    difference = results.difference("EBFT γ = 0.1", "SFT", "pass@1")
    assert (difference.mean, difference.half, difference.seeds) == pytest.approx((0.2, 1.27062, 2), rel=1e-5)
    assert results.interval("SFT", "pass@1").half == pytest.approx(12.7062 * 0.1, rel=1e-5)
    lines = [line.split(" | ") for line in report.main_table(results).splitlines()]
    sft = next(line for line in lines if "SFT" in line[0])
    assert [cell.strip() for cell in sft[1:6]] == ["2", "0.001", "25", "12", "0.300 ± 1.271"]
    assert "[-1.0706, +1.4706] | not confirmed" in " ".join(report.verdicts(results).split())
    assert "0.900 (0.200)" in report.choice_table(results)


def test_verdicts_follow_the_rules():
    def interval(low: float, high: float) -> report.Interval:
        return report.Interval((low + high) / 2, (high - low) / 2, 5)

    for low, high, verdict in ((-0.04, 0.04, "confirmed"), (0.01, 0.2, "confirmed"), (-0.2, -0.06, "contrary"),
                               (-0.06, 0.04, "not confirmed"), (-0.01, 0.06, "not confirmed")):
        assert report.matches(interval(low, high)) == verdict
    assert [report.higher(interval(*x)) for x in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "confirmed", "contrary", "not confirmed"]
    below, above, across = interval(-0.2, -0.1), interval(0.1, 0.2), interval(-0.1, 0.1)
    assert [report.lowest(*x) for x in ((below, below), (below, above), (below, across))] == [
        "confirmed", "contrary", "not confirmed"]


def test_the_readme_has_the_tables_of_the_records(tmp_path):
    text, readme = report.report(FINDINGS / "results"), (FINDINGS / "README.md").read_text(encoding="utf-8")
    assert f"{report.MARK}\n\n{text}\n{report.MARK}" in readme
    assert report.written_into(text, readme) == readme
    report.plot(FINDINGS / "results", tmp_path / "findings.png")
    assert (tmp_path / "findings.png").read_bytes().startswith(b"\x89PNG")
