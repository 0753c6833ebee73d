"""The RLVR step against brute force and exact enumeration, in float64. Each sequence is a row of its own there.

Enumeration: with V tokens of which one ends a completion, and at most two tokens, a question has 1 + (V − 1) V
completions. All tuples of n of them go in as the questions of one batch, each advantage times the probability of its
tuple, so that the sum over questions is the expectation over groups. L_RL is a mean over all tokens, and the n samples
of a tuple contribute alike: tokens / n · ∇L_RL = −1/n Σ_j E[A_j ∇log p(ŷ_j)] = −∇E[R].
"""

import random
from contextlib import nullcontext
from itertools import product

import models
import plain_llama
import pytest
import torch
from models import relative_error

from megatron_ebft.data.questions import Question
from megatron_ebft.method import rlvr
from megatron_ebft.method.config import RLVRConfig
from megatron_ebft.method.energy import GROUP_NORM_EPS
from megatron_ebft.rollout.generation import Completion, GenerationConfig
from megatron_ebft.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("one_rank", "float64")

V, END, TEMPERATURE, T = 3, 2, 0.7, 16
"""Vocabulary, the token that ends a completion, temperature of the completions, tokens of a row."""
OPTIONS = dict(layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=V, dtype=torch.float64)
MODEL, WEIGHTS = plain_llama.random_llama(3, **OPTIONS)
START = plain_llama.random_llama(4, **OPTIONS)[1]


def config(**changes) -> RLVRConfig:
    generation = GenerationConfig(max_new_tokens=7, temperature=TEMPERATURE, num_samples=3, end_ids=(END,))
    return RLVRConfig(**dict(generation=generation, advantage="rloo", rl_coef=1.0, kl_coef=0.0, kl_estimator="k2",
                             importance_cap=0.0, row_length=T, micro_batch_size=1) | changes)


def step(monkeypatch, prompts: list, groups: list, score_QN, settings: RLVRConfig) -> tuple[dict, dict]:
    """Metrics and gradient of a step that draws these groups of completions and scores them so."""
    policy = models.build_policy(MODEL, WEIGHTS)
    monkeypatch.setattr(rlvr, "generate", lambda policy, given, generation, iteration, occurrence: groups * (
        (given, generation, iteration, occurrence) == (prompts, settings.generation, 7, [0] * len(prompts))))
    monkeypatch.setattr(rlvr, "clear_gradients", lambda policy, optimizer: None)
    monkeypatch.setattr(rlvr, "update", lambda optimizer, loss: 0.0)
    verdicts = [Verdict(score=score, is_right=score == 1) for group in score_QN.tolist() for score in group]
    metrics = rlvr.rlvr_step(
        policy=policy, start=models.build_start(MODEL, START) if settings.kl_coef else None, optimizer=None,
        questions=[Question({}, prompt) for prompt in prompts], verify=lambda answers: verdicts, config=settings,
        iteration=7, phase=lambda name: nullcontext())
    return metrics, models.gradients(policy, MODEL)


def log_probs(weights, prompts: list, groups: list) -> list[list[torch.Tensor]]:
    """log p of every token of every completion."""
    flat = [(prompt, completion.tokens) for prompt, group in zip(prompts, groups) for completion in group]
    outputs = plain_llama.forward_sequences(weights, MODEL, [torch.tensor(prompt + tokens) for prompt, tokens in flat])
    rows = iter([(logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1).gather(
        1, torch.tensor(tokens)[:, None]).squeeze(1) for (prompt, tokens), (_, logits) in zip(flat, outputs)])
    return [[next(rows) for _ in group] for group in groups]


def advantages(score_QN, kind: str):
    """By definition, one after the other."""
    rows = []
    for scores in score_QN.tolist():
        others = [[x for i, x in enumerate(scores) if i != j] for j in range(len(scores))]
        mean = sum(scores) / len(scores)
        deviation = (sum((x - mean) ** 2 for x in scores) / len(scores)) ** 0.5
        rows.append([{"reinforce": x, "rloo": x - sum(rest) / len(rest),
                      "group_norm": (x - mean) / (deviation + GROUP_NORM_EPS)}[kind]
                     for x, rest in zip(scores, others)])
    return torch.tensor(rows)


def gradient(loss, leaves: dict) -> dict:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def parameters() -> dict:
    return {name: x.clone().requires_grad_() for name, x in WEIGHTS.items()}


def close(actual: dict, expected: dict, scale: float = 1.0) -> float:
    assert actual.keys() == expected.keys()
    return max(relative_error(scale * actual[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- brute force


def random_case(seed: int) -> tuple[list, list, torch.Tensor]:
    """Prompts, groups of completions, and their scores: two of the five groups have no spread."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(V) for _ in range(draw.randint(1, 6))] for _ in range(5)]
    groups = [[Completion([draw.randrange(V) for _ in range(draw.randint(1, 7))]) for _ in range(3)] for _ in prompts]
    scores = torch.tensor([[0.0, 0.3, 1.0], [0.1, 0.1, 0.1], [0.3, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.3, 1.0]])
    for group, of_group in zip(groups, log_probs(WEIGHTS, prompts, groups)):
        for completion, row in zip(group, of_group):
            completion.log_probs = [x + draw.gauss(0, 0.3) for x in row.tolist()]  # a sampler of other numerics
    return prompts, groups, scores


@pytest.mark.parametrize("settings", [
    dict(), dict(importance_cap=1.2, advantage="group_norm", micro_batch_size=2), dict(advantage="reinforce"),
    *(dict(kl_coef=0.3, kl_estimator=estimator, rl_coef=0.5, rows_multiple=2) for estimator in ("k1", "k2", "k3"))],
    ids=str)
def test_a_step_is_brute_force(monkeypatch, settings):
    prompts, groups, score_QN = random_case(len(settings))
    settings = config(**settings)
    metrics, actual = step(monkeypatch, prompts, groups, score_QN, settings)

    leaves, advantage_QN = parameters(), advantages(score_QN, settings.advantage)
    rl = kl = torch.zeros(())
    policy, start = log_probs(leaves, prompts, groups), log_probs(START, prompts, groups)
    for q, n in product(range(5), range(3)):
        d, now = policy[q][n] - start[q][n], policy[q][n].detach()
        weight = torch.ones_like(d)
        if settings.importance_cap:
            weight = (now - torch.tensor(groups[q][n].log_probs)).exp().clamp(max=settings.importance_cap)
        rl = rl - (advantage_QN[q, n] * weight * (policy[q][n] - now).exp()).sum()
        kl = kl + {"k1": d.detach() * (policy[q][n] - now).exp(), "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[
            settings.kl_estimator].sum()
    tokens = sum(len(completion.tokens) for group in groups for completion in group)
    loss = (settings.rl_coef * rl + settings.kl_coef * kl) / tokens
    assert close(actual, gradient(loss, leaves)) <= 1e-10
    assert metrics["rl_loss"] == pytest.approx(rl.item() / tokens, abs=1e-10)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-10) and metrics["tokens"] == tokens
    if settings.kl_coef:
        assert metrics["kl_loss"] == pytest.approx(kl.item() / tokens, abs=1e-12)
    check_metrics(metrics, groups, score_QN, settings)


def check_metrics(metrics: dict, groups: list, score_QN, settings: RLVRConfig) -> None:
    completions = [completion for group in groups for completion in group]
    surprise = [-x for completion in completions for x in completion.log_probs]
    expected = {"reward": score_QN.mean().item(), "success": (score_QN == 1).double().mean().item(),
                "reward_std": score_QN.std(-1, unbiased=False).mean().item(), "zero_spread": 2 / 5,
                "length": metrics["tokens"] / 15, "finished": 0, "entropy": sum(surprise) / len(surprise)}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name
    leaves_out = not settings.kl_coef
    assert 0.1 < metrics["mismatch"] < 0.5 and (metrics["training_tokens_saved"] > 0.2) == leaves_out


def test_a_step_in_which_all_rewards_are_equal(monkeypatch):
    prompts, groups, _ = random_case(0)
    metrics, actual = step(monkeypatch, prompts, groups, torch.full((5, 3), 0.1), config())
    assert all(not x.any() for x in actual.values())
    assert metrics["zero_spread"] == metrics["training_tokens_saved"] == 1 and metrics["loss"] == 0
    assert "mismatch" not in metrics  # nothing went through the training pass


# ---------------------------------------------------------------- enumeration

OUTCOMES = [[END], *([a, b] for a in range(V) if a != END for b in range(V))]
PROMPT = [1, 0, 2]
REWARD = torch.rand(len(OUTCOMES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected_gradient(monkeypatch, n: int, kind: str) -> dict:
    """tokens · E[∇L_RL] of one question, by the step."""
    tuples_RN = torch.tensor(list(product(range(len(OUTCOMES)), repeat=n)))
    outcomes = [[Completion(tokens, [0.0] * len(tokens), tokens[-1] == END) for tokens in OUTCOMES]]
    log_p = torch.stack([x.sum() for x in log_probs(WEIGHTS, [PROMPT], outcomes)[0]])
    probability_R = log_p[tuples_RN].sum(1).exp()
    assert abs(probability_R.sum() - 1) < 1e-12
    exact = rlvr.energy.advantages
    monkeypatch.setattr(rlvr.energy, "advantages", lambda *args: exact(*args) * probability_R[:, None])
    groups = [[outcomes[0][o] for o in members] for members in tuples_RN.tolist()]
    metrics, actual = step(monkeypatch, [PROMPT] * len(groups), groups, REWARD[tuples_RN], config(
        advantage=kind, row_length=60, micro_batch_size=8))
    return {name: metrics["tokens"] * x for name, x in actual.items()}


@pytest.mark.parametrize("n, kind", [(2, "rloo"), (2, "reinforce"), (3, "rloo")])
def test_the_gradient_is_that_of_the_expected_reward(monkeypatch, n, kind):
    leaves = parameters()
    log_p = torch.stack([x.sum() for x in log_probs(leaves, [PROMPT], [[Completion(x) for x in OUTCOMES]])[0]])
    expected = gradient(-(log_p.exp() * REWARD).sum(), leaves)
    assert all(x.norm() > 1e-6 for x in expected.values())
    assert close(expected_gradient(monkeypatch, n, kind), expected, 1 / n) <= 1e-10


def test_the_gradient_with_the_advantages_of_grpo(monkeypatch):
    """Against its own formula: dividing by the deviation of the group makes it the gradient of something else."""
    leaves = parameters()
    log_p = torch.stack([x.sum() for x in log_probs(leaves, [PROMPT], [[Completion(x) for x in OUTCOMES]])[0]])
    tuples_RN = torch.tensor(list(product(range(len(OUTCOMES)), repeat=2)))
    probability_R = log_p.detach()[tuples_RN].sum(1).exp()
    advantage_RN = advantages(REWARD[tuples_RN], "group_norm")
    loss = -(probability_R[:, None] * advantage_RN * log_p[tuples_RN]).sum()
    assert close(expected_gradient(monkeypatch, 2, "group_norm"), gradient(loss, leaves)) <= 1e-10
