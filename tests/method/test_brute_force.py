"""The oracle against what is outside it: numbers of the released code, transformers, and the paper's identities."""

import json
from copy import deepcopy
from dataclasses import replace

import brute_force as bf
import equations
import plain_llama
import pytest
import torch
from golden import GOLDEN, STEPS, by_rollout, by_sample, load_golden
from plain_llama import LLAMA3_ROPE

TINY = dict(layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=40)


def close(actual, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", STEPS)
def test_step_agrees_with_the_released_code(name):
    golden, settings, docs, rollouts = load_golden(name)
    config, weights = plain_llama.load_llama(GOLDEN / "llama")
    result = bf.step(weights, config, docs, rollouts, settings, encoder=weights)

    assert result["valid"].all()
    close(result["features_rollout"], golden["features_rollout"].transpose(1, 2), atol=2e-6)
    close(result["features_gold"], golden["features_gold"], atol=2e-6)
    for key in ("alignment", "diversity", "reward", "advantage"):
        close(result[key], by_sample(golden[key], docs), atol=1e-5)

    rows = settings.geometry.num_samples
    T = docs.shape[1]
    close(result["gold_log_probs"], golden["log_probs"][::rows, : T - 1], atol=2e-5)
    padded = torch.nn.functional.pad(golden["log_probs"], (1, 0))  # the first token has no log-probability
    close(result["log_probs"], by_rollout(padded, settings, docs), atol=2e-5)
    close(result["rl_loss"], golden["rl_loss"], atol=1e-5)
    close(result["ce_loss"], golden["ce_loss"], rtol=1e-5)

    assert {"grad." + key for key in result["grads"]} == {key for key in golden if key.startswith("grad.")}
    for key, grad in result["grads"].items():
        expected = golden["grad." + key]
        assert (grad - expected).norm() <= 1e-4 * expected.norm(), key


def test_rollouts_stand_where_the_released_code_puts_them():
    golden, settings, docs, rollouts = load_golden("step_translation")
    positions = by_rollout(golden["position_ids"], settings, docs)
    for k, anchor in enumerate(settings.geometry.anchors(docs.shape[1])):
        for t in range(settings.geometry.rollout_length):
            assert (positions[:, k, :, t] == anchor + t).all()


@pytest.mark.parametrize("case", json.loads((GOLDEN / "energy.json").read_text()))
@pytest.mark.parametrize("whitening", ["none", "paper", "released"])
def test_energy_agrees_in_float64(case, whitening):
    X, y = torch.tensor(case["rollouts"], dtype=torch.float64), torch.tensor(case["reference"], dtype=torch.float64)
    expected = {key: torch.tensor(value, dtype=torch.float64) for key, value in case[whitening].items()}
    for alpha in (1.0, 0.5, 0.0):
        alignment, diversity, reward = equations.rewards(X, y, alpha, whitening)
        close(alignment, expected["alignment"], atol=1e-9)
        close(diversity, expected["diversity"], atol=1e-9)
        close(reward, expected["alignment"] - alpha * expected["diversity"], atol=1e-9)
        close(equations.advantages(alignment, diversity, alpha), expected[f"advantage_alpha_{alpha}"], atol=1e-9)
    assert equations.cfm_biased(X, y).item() == pytest.approx(case["cfm_biased"], abs=1e-9)
    assert equations.cfm_unbiased(X, y).item() == pytest.approx(case["cfm_unbiased"], abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"rope_scaling": LLAMA3_ROPE}, {"tied": True}, {"qkv_bias": True}],
    ids=["plain", "llama3", "tied", "qwen2"],
)
def test_forward_agrees_with_transformers(options):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # no other test needs it

    config, weights = plain_llama.random_llama(0, **TINY, **options)
    qwen2 = "qkv_bias" in options
    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if qwen2 else (LlamaConfig, LlamaForCausalLM)
    model = model_class(config_class(**deepcopy(config), attn_implementation="eager")).eval()  # it edits rope_scaling
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    tokens = torch.randint(TINY["vocab"], (2, 48), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(48) + torch.tensor([[0], [30]])
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, output_hidden_states=True)
        hidden_states, logits = plain_llama.forward(weights, config, tokens, positions)
    for actual, wanted in zip(hidden_states[:-1], expected.hidden_states[:-1]):
        close(actual, wanted, atol=2e-5)
    final = plain_llama.rms_norm(hidden_states[-1], weights["model.norm.weight"], config["rms_norm_eps"])
    close(final, expected.hidden_states[-1], atol=2e-5)  # transformers' last one has been through the final norm
    close(logits, expected.logits, atol=2e-5)


def test_valid_blocks_by_hand():
    eod = 9
    tokens = torch.tensor([[1, 2, 3, 9, 4, 5, 6, 9, 7, 8]])  # documents 0..3, 4..7, 8..9
    geometry = bf.Geometry(context=1, stride=1, rollout_length=2, num_samples=2)
    assert geometry.anchors(10) == [1, 2, 3, 4, 5, 6, 7, 8]
    #         completions:  12    23    34     45     56    67    78     89
    by_document = [[True, True, False, False, True, True, False, False]]
    assert bf.valid_blocks(tokens, geometry).all()
    assert bf.valid_blocks(tokens, geometry, eod).tolist() == by_document
    answers = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    both = [[False, True, False, False, True, False, False, False]]
    assert bf.valid_blocks(tokens, geometry, eod, answers).tolist() == both
    assert bf.context_tokens(tokens[0], 6, eod).tolist() == [4, 5]
    assert bf.ce_mask(tokens, eod, document_starts=False)[0].tolist() == [t not in (4, 8) for t in range(1, 10)]


def random_step(docs, geometry, seed=3, **options):
    """A float64 step with a policy, an encoder and a reference that differ; rollouts are random tokens."""
    config, weights = plain_llama.random_llama(seed, **TINY, dtype=torch.float64)
    _, encoder = plain_llama.random_llama(seed + 1, **TINY, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(docs), len(geometry.anchors(docs.shape[1])), geometry.num_samples, geometry.rollout_length)
    rollouts = torch.randint(TINY["vocab"], shape, generator=generator)
    settings = bf.Settings(geometry, **options)
    return config, weights, encoder, rollouts, settings


def test_a_document_in_a_row_is_the_document_alone():
    eod, geometry = 0, bf.Geometry(context=2, stride=2, rollout_length=2, num_samples=3)
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randint(1, TINY["vocab"], (1, 8), generator=generator) for _ in range(2))
    first[0, -1] = eod
    docs = torch.cat([first, second], dim=1)
    config, weights, encoder, rollouts, settings = random_step(docs, geometry, temperature=0.7, ce_coef=0.1, eod=eod)
    settings = replace(settings, ce_document_starts=False)
    packed = bf.step(weights, config, docs, rollouts, settings, encoder=encoder)
    kept = packed["valid"][0].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 4, 5, 6]  # anchors 2, 4, 6 of each; the block at 8 has its context in the first document
    alone_rollouts = torch.stack([rollouts[0, :3], rollouts[0, 4:7]])
    alone_docs, alone_settings = torch.cat([first, second]), replace(settings, eod=None)
    alone = bf.step(weights, config, alone_docs, alone_rollouts, alone_settings, encoder=encoder)
    for key in ("features_rollout", "features_gold", "advantage", "log_probs", "cfm_unbiased"):
        close(packed[key][0, kept], alone[key].flatten(0, 1), atol=1e-12)
    close(packed["loss"], alone["loss"], atol=1e-12)
    for key, grad in packed["grads"].items():
        close(grad, alone["grads"][key], atol=1e-12)


def test_rloo_baseline_is_the_reward_of_the_others_without_j():
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(5, 7, generator=generator).double(), torch.randn(7, generator=generator).double()
    alignment, diversity, reward = equations.rewards(X, y, 0.5)
    advantage = equations.advantages(alignment, diversity, 0.5)
    for j in range(5):
        others = torch.cat([X[:j], X[j + 1 :]])
        close(advantage[j], reward[j] - equations.rewards(others, y, 0.5)[2].mean(), atol=1e-12)


def test_paper_whitening_makes_distinct_rollouts_orthogonal():
    X, y = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double().split([3, 1])
    alignment, diversity, _ = equations.rewards(X, y[0], whitening="paper")
    close(diversity, torch.zeros_like(diversity), atol=1e-12)
    close((alignment / 2).pow(2).sum(), torch.ones((), dtype=torch.float64), atol=1e-12)


def test_group_norm_and_reinforce():
    alignment, diversity = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 4.0])
    close(equations.advantages(alignment, diversity, 0.5, "reinforce"), torch.tensor([2.0, 0.0, -2.0]))
    normalised = torch.tensor([1.0, 0.0, -1.0]) * 1.5**0.5  # [2, 0, -2] over its population deviation sqrt(8/3)
    close(equations.advantages(alignment, diversity, 0.5, "group_norm"), normalised, atol=1e-5)


def test_rl_gradient_is_reinforce_with_truncated_importance():
    docs = torch.randint(TINY["vocab"], (2, 9), generator=torch.Generator().manual_seed(2))
    geometry = bf.Geometry(context=3, stride=2, rollout_length=2, num_samples=3)
    config, weights, encoder, rollouts, settings = random_step(docs, geometry, temperature=0.6, importance_cap=2.0)
    answers = torch.ones_like(docs).bool()
    answers[1, 4] = False
    log_probs = bf.rollout_log_probs(weights, config, docs, rollouts, geometry, 0.6)
    sampler = log_probs - torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs).double()
    result = bf.step(
        weights, config, docs, rollouts, settings, encoder=encoder, answer_mask=answers, sampler_log_probs=sampler
    )
    close(result["log_probs"], log_probs, atol=1e-12)
    assert result["valid"].tolist() == [[True, True, True], [False, True, True]]

    name = "model.layers.2.self_attn.k_proj.weight"
    leaf = weights[name].clone().requires_grad_()
    log_probs = bf.rollout_log_probs(dict(weights, **{name: leaf}), config, docs, rollouts, geometry, 0.6)
    ratio = (log_probs.detach() - sampler).exp().clamp_max(2.0)
    terms = (result["advantage"][..., None] * ratio * log_probs)[result["valid"]]
    (expected,) = torch.autograd.grad(-terms.mean(), leaf)
    close(result["grads"][name], expected, atol=1e-12)


def test_kl_is_zero_at_the_reference_and_its_estimators_agree():
    docs = torch.randint(TINY["vocab"], (1, 8), generator=torch.Generator().manual_seed(2))
    geometry = bf.Geometry(context=3, stride=2, rollout_length=2, num_samples=2)
    config, weights, other, rollouts, settings = random_step(docs, geometry, kl_coef=0.3, rl_coef=0.0)
    for estimator in ("exact", "k1", "k2", "k3"):
        chosen = replace(settings, kl_estimator=estimator)
        same = bf.step(weights, config, docs, rollouts, chosen, encoder=other, start=weights)
        assert same["kl"].abs() < 1e-12
    apart = bf.step(weights, config, docs, rollouts, settings, encoder=other, start=other)
    assert apart["kl"] > 0.1
    close(apart["loss"], 0.3 * apart["kl"], atol=1e-12)


def test_kl_estimators_in_expectation():
    """Averaged under the policy over every token: the values, and the gradients as losses, that `kl` claims."""
    V = 6
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 1, 1, V, generator=generator, dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(-1)
    reference = torch.randn(1, 1, 1, 1, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    valid = torch.ones(1, 1, dtype=torch.bool)

    def expected(estimator):
        total = 0
        for v in range(V):
            token = torch.full((1, 1, 1, 1), v)
            total += policy[..., v].exp().detach().sum() * equations.kl(policy, reference, token, valid, estimator)
        return total

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    exact = equations.kl(policy, reference, torch.zeros(1, 1, 1, 1, dtype=torch.long), valid)
    backward_kl = (reference.exp() * (reference - policy)).sum()
    for estimator in ("k1", "k3"):
        close(expected(estimator), exact, atol=1e-12)
    close(gradient(expected("k1")), torch.zeros_like(logits), atol=1e-12)
    close(gradient(expected("k2")), gradient(exact), atol=1e-12)
    close(gradient(expected("k3")), gradient(backward_kl), atol=1e-12)
