"""What parallel ranks exchange and hold, on one start of 4 ranks against this process alone.

1. The golden steps at TP 2 × PP 2, with and without sequence parallelism.
2. Gram matrices summed over shards, stages and sample ranks, against features formed whole; n = 64 over 4 ranks.
3. What a rank allocates in a step: no tensor over the whole vocabulary, no whole features of other ranks' samples.
4. The order in which pipeline stages decode, against the formula for their idle time.
"""

import collections
import weakref
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import brute_force as bf
import models
import plain_llama
import pytest
import torch
import torch.distributed as dist
from golden import GOLDEN, STEPS, by_sample, load_golden
from models import largest_difference, relative_error
from ranks import enter_world, run_ranks
from rollout_schedule import replay
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ebft.common.device import init_device
from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import energy, features, gradient
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.means import Means
from megatron_ebft.model.weights import local_layers
from megatron_ebft.parallel import groups
from megatron_ebft.rollout import sampler, schedule
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.run.plan.exchange import exchange_bytes

VOCAB, ROWS, T, BLOCKS, HIDDEN = 251, 2, 20, 5, 32
SETTINGS = bf.Settings(bf.Geometry(4, 3, 3, 6), temperature=0.8, norm="joint", pooling="last_token", ce_coef=0.3)
LAYOUTS = {  # TP, PP, sample ranks, sequence parallel
    "tp2 pp2": (2, 2, 1, False), "tp2 sp samples": (2, 1, 2, True), "pp2 samples": (1, 2, 2, False),
    "tp2 sp pp2": (2, 2, 1, True), "pp4": (1, 4, 1, False)}
GRAM_CASES = {f"{layout} {norm} {pooling}": (*sizes, norm, pooling)  # every two of layout, norm and pooling meet
              for number, (layout, sizes) in enumerate(LAYOUTS.items())
              for norm, pooling in zip(("joint", "layer"), ("last_token", "mean", "last_token")[number % 2:])}


def settings(norm: str, pooling: str, n: int = 6) -> bf.Settings:
    return bf.Settings(bf.Geometry(4, 3, 3, n), temperature=0.8, norm=norm, pooling=pooling, ce_coef=0.3)


def llama():
    return plain_llama.random_llama(3, layers=4, hidden=HIDDEN, ffn=44, heads=4, kv_heads=2, vocab=VOCAB)


def gold_tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(1))


def rollout_tokens(n: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, BLOCKS, n, 3), generator=torch.Generator().manual_seed(2))


def local_rollouts(n: int) -> Rollouts:
    """This rank's samples of fixed rollouts."""
    tokens = rollout_tokens(n).chunk(groups.sample_size(), dim=2)[groups.sample_rank()].contiguous()
    return Rollouts(tokens, torch.zeros(tokens.shape), torch.zeros(tokens.shape))


def method(chosen: bf.Settings, samples: int = 1, pad_to: int = 1, **sizes) -> EBFTConfig:
    """`chosen` with a block's samples shared out and rows padded."""
    config = models.ebft_config(chosen, T, 4, **sizes)
    per_rank = chosen.geometry.num_samples // samples
    return replace(config, layout=replace(config.layout, num_samples=per_rank, pad_to=pad_to))


# ---------------------------------------------------------------- what the ranks do


def rank_work(folder: str) -> dict:
    """Results by name. Whatever needs the same process groups is done in one world."""
    init_device()
    results = {}
    for (tp, pp, samples, virtual), tasks in tasks_by_world(folder).items():
        enter_world(4)
        groups.init_parallel(tp, pp, seed=1, sample_parallel_size=samples, virtual_pipeline_model_parallel_size=virtual)
        results |= {name: task() for name, task in tasks.items()}
        groups.shut_down()
    return results


def tasks_by_world(folder: str) -> dict[tuple, dict]:
    """(TP, PP, sample ranks, virtual stages) → name → what to do there."""
    tasks = collections.defaultdict(dict)
    for name, sp in product(STEPS, (False, True)):
        tasks[2, 2, 1, None][f"golden {name} {'sp' * sp}"] = partial(golden_step, name, sp)
    for name, (tp, pp, samples, sp, norm, pooling) in GRAM_CASES.items():
        tasks[tp, pp, samples, None][name] = partial(
            gram_differences, folder, settings(norm, pooling), tp, pp, samples, sp)
    for sp in (False, True):
        tasks[2, 1, 2, None][f"watched {'sp' * sp}"] = partial(watched_step, sp)
    tasks[1, 1, 4, None]["64 samples"] = partial(step_of_64_samples, folder)
    tasks[1, 4, 1, None]["timeline 1"] = partial(rollout_timelines, None)
    tasks[1, 2, 1, 2]["timeline 2"] = partial(rollout_timelines, 2)
    return tasks


def overrides(tp: int, pp: int, sp: bool = False) -> dict:
    return dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp,
                pipeline_dtype=torch.float32)


def golden_step(name: str, sp: bool) -> dict[str, float]:
    """Largest differences from the golden step; of gradients the largest relative one."""
    golden, chosen, docs, tokens = load_golden(name)
    config, weights = plain_llama.load_llama(GOLDEN / "llama")
    multiple = 2 * 17
    policy = models.build_policy(config, weights, multiple, **overrides(2, 2, sp))
    encoder = models.build_encoder(config, weights, vocab_multiple=multiple, **overrides(2, 2, sp))
    run = models.ebft_config(chosen, docs.shape[1], config["num_hidden_layers"], blocks_per_microbatch=3)
    run = replace(run, layout=replace(run.layout, pad_to=2 if sp else 1))
    gold, means = models.gold_batch(docs), Means()
    rollouts = Rollouts(tokens, torch.zeros(tokens.shape), None)
    rewards = models.rewarded(encoder, gold, rollouts, run)
    scores = gradient.policy_gradient(policy, gold, rollouts, rewards.advantage, run, means)
    reward = rewards.alignment - run.diversity_coef * rewards.diversity
    differences = {key: largest_difference(value, by_sample(golden[key], docs)) for key, value in (
        ("alignment", rewards.alignment), ("diversity", rewards.diversity), ("reward", reward),
        ("advantage", rewards.advantage))}
    B, T = docs.shape
    log_probs = golden["log_probs"].unflatten(0, (B, -1))
    _, K, n, G = tokens.shape
    differences["gold log_probs"] = largest_difference(scores.gold_BT, log_probs[:, 0, : T - 1]) / 2
    step_major = log_probs[:, :, T - 1 :].view(B, n, G, K)
    differences["rollout log_probs"] = largest_difference(scores.rollout_BKNG, step_major.permute(0, 3, 1, 2)) / 2
    losses = means.reduce()
    for key in ("rl_loss", "ce_loss"):
        differences[key] = abs(losses[key] - golden[key].item())
    grads = models.gradients(policy, config)
    assert {"grad." + key for key in grads} == {key for key in golden if key.startswith("grad.")}
    differences["gradient"] = max(relative_error(grad, golden["grad." + key]) for key, grad in grads.items())
    return differences


def gram_differences(folder: str, chosen: bf.Settings, tp: int, pp: int, samples: int, sp: bool) -> dict:
    """Largest difference of this rank's Gram matrices from those of features formed whole; bytes moved for them,
    counted and predicted."""
    config, weights = llama()
    encoder = models.build_encoder(config, weights, vocab_multiple=2, **overrides(tp, pp, sp))
    run = method(chosen, samples, pad_to=tp if sp else 1, blocks_per_microbatch=3)
    per_group = ROWS // groups.document_size()
    mine = slice(groups.document_rank() * per_group, (groups.document_rank() + 1) * per_group)
    gold, rollouts = models.gold_batch(gold_tokens()[mine]), local_rollouts(6)
    with pytest.MonkeyPatch.context() as patch:
        counted = count_received(patch)
        gram = models.rewarded(encoder, gold, Rollouts(rollouts.tokens_BKNG[mine], None, None), run).gram
    expected = torch.load(f"{folder}/{chosen.norm} {chosen.pooling}.pt")
    here = sum(layer in local_layers(encoder) for layer in run.feature_map.layers)
    predicted = exchange_bytes(run.feature_map, run.layout, per_group, 3, HIDDEN, 4, here, tensor=tp,
                                        is_sequence_parallel=sp, pipeline=pp, samples=samples)
    return {"difference": largest_difference(gram, expected[mine]), "counted": sum(counted),
            "predicted": predicted.gram, "as features": predicted.features}


def count_received(patch) -> list[int]:
    """Bytes received by the collectives that features.py calls, one number a call."""
    counted = []

    def counting(function):
        def call(tensor, *args, **kwargs):
            counted.append(tensor.numel() * tensor.element_size())
            return function(tensor, *args, **kwargs)
        return call

    functions = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}
    others = {name: getattr(dist, name) for name in ("get_world_size", "get_rank")}
    patch.setattr(features, "dist", SimpleNamespace(**others, **{k: counting(f) for k, f in functions.items()}))
    return counted


def step_of_64_samples(folder: str) -> dict[str, float]:
    """Advantages and gradient of 64 samples a block, 16 on each rank."""
    config, weights = llama()
    run, gold, rollouts = method(settings("joint", "last_token", 64), 4), models.gold_batch(gold_tokens()), \
        local_rollouts(64)
    expected, means = torch.load(f"{folder}/64.pt"), Means()
    policy = models.build_policy(config, weights)
    rewards = models.rewarded(models.build_encoder(config, weights), gold, rollouts, run)
    gradient.policy_gradient(policy, gold, rollouts, rewards.advantage, run, means)
    part = expected["advantage"].chunk(4, dim=2)[groups.sample_rank()]
    differences = {"advantage": largest_difference(rewards.advantage, part)}
    differences |= {key: abs(value - expected["losses"][key]) for key, value in means.reduce().items()}
    for (name, p), (other, grad) in zip(policy[0].module.named_parameters(), expected["gradient"].items(), strict=True):
        assert name == other
        summed = p.main_grad.clone()
        if policy[0].ddp_config.use_distributed_optimizer:  # reduced where this rank's shard is, nowhere else
            policy_owned = shard_of(policy[0], p)
            summed, grad = summed.flatten()[policy_owned], grad.flatten()[policy_owned]
        if summed.numel():
            difference = largest_difference(summed, grad) / expected["scale"]
            differences["gradient"] = max(differences.get("gradient", 0.0), difference)
    return differences


def shard_of(chunk, parameter) -> slice:
    """Elements of a parameter whose reduced gradient this data-parallel rank holds."""
    buffer, = chunk.buffers
    bucket = buffer.param_to_bucket[parameter]
    size = bucket.grad_data.numel() // dist.get_world_size()
    begin = bucket.offset + dist.get_rank() * size
    first, last, _ = buffer.param_index_map[parameter]
    return slice(max(0, begin - first), max(0, min(last, begin + size) - first))


class Cache(sampler.RolloutCache):
    __hash__ = object.__hash__


class Watch(TorchDispatchMode):
    """Shapes of all floating-point tensors that operations produce."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves((out, args))
                        if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return out


def watched_step(sp: bool) -> dict[str, list]:
    """Shapes seen in sampling, rewards and training at TP 2 × 2 sample ranks."""
    config, weights = llama()
    policy = models.build_policy(config, weights, 4, **overrides(2, 1, sp))
    encoder = models.build_encoder(config, weights, vocab_multiple=4, **overrides(2, 1, sp))
    run, gold, shapes = method(SETTINGS, 2, pad_to=2 if sp else 1), models.gold_batch(gold_tokens()), {}
    with Watch() as watch:
        rollouts = sampler.sample_rollouts(policy, gold, run.layout, run.sampling, 0)
    shapes["sampling"] = sorted(watch.shapes)
    with Watch() as watch:
        rewards = models.rewarded(encoder, gold, rollouts, run)
    shapes["features"] = sorted(watch.shapes)
    with Watch() as watch:
        gradient.policy_gradient(policy, gold, rollouts, rewards.advantage, run, Means())
    shapes["training"] = sorted(watch.shapes)
    return shapes


def rollout_timelines(virtual: int | None) -> list:
    """Of every stage, what it did in which order: 8 rows, each a group of its own."""
    config, weights = llama()
    sizes = overrides(1, groups.pp_group().size())
    if virtual:
        sizes |= dict(virtual_pipeline_model_parallel_size=virtual)
    policy = models.build_policy(config, weights, **sizes)
    run, timeline = method(settings("joint", "last_token")), []
    gold = models.gold_batch(torch.cat([gold_tokens()] * 4))
    with pytest.MonkeyPatch.context() as patch:
        caches, most = weakref.WeakSet(), []

        def cache(*args):
            made = Cache(*args)
            caches.add(made)
            most.append(len(caches))
            return made

        patch.setattr(sampler, "RolloutCache", cache)
        sampler.sample_rollouts(policy, gold, run.layout, run.sampling, 0, 1, timeline)
    assert max(most) <= groups.pp_group().size()  # those of a wave
    timelines = [None] * groups.pp_group().size()
    dist.all_gather_object(timelines, timeline, group=groups.pp_group())
    return timelines


# ---------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def by_rank(one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    config, weights = llama()
    encoder, gold = models.build_encoder(config, weights), models.gold_batch(gold_tokens())
    for norm, pooling in product(("joint", "layer"), ("last_token", "mean")):
        run = method(settings(norm, pooling))
        rows = MicroBatches(gold, rollout_tokens(6), run.layout, 3, 1, 0)
        with torch.no_grad():
            pairs = [models.block_features(encoder, run.feature_map, mb, [3])[0] for mb in rows]
        X, y = (rows.join_blocks(list(x)) for x in zip(*pairs))
        torch.save(energy.gram(torch.cat([X, y.unsqueeze(-2)], dim=-2)), folder / f"{norm} {pooling}.pt")
    run, means, policy = method(settings("joint", "last_token", 64)), Means(), models.build_policy(config, weights)
    rewards = models.rewarded(encoder, gold, local_rollouts(64), run)
    gradient.policy_gradient(policy, gold, local_rollouts(64), rewards.advantage, run, means)
    grads = {name: p.main_grad.clone() for name, p in policy[0].module.named_parameters()}
    torch.save({"advantage": rewards.advantage, "losses": means.reduce(), "gradient": grads,
                "scale": max(x.abs().max().item() for x in grads.values())}, folder / "64.pt")
    return run_ranks(4, "test_parallel:rank_work", str(folder))


@pytest.mark.parametrize("sp", ["", "sp"])
@pytest.mark.parametrize("name", STEPS)
def test_golden_steps_at_tp2_pp2(by_rank, name, sp):
    for rank in by_rank:
        for key, difference in rank[f"golden {name} {sp}"].items():
            assert difference <= 1e-5, key


@pytest.mark.parametrize("name", GRAM_CASES)
def test_gram_matrices_are_those_of_whole_features(by_rank, name):
    for rank in by_rank:
        assert rank[name]["difference"] <= 1e-5
        assert rank[name]["counted"] == rank[name]["predicted"] > 0


def test_64_samples_over_4_ranks(by_rank):
    for rank in by_rank:
        assert {"advantage", "gradient", "rl_loss", "ce_loss"} <= rank["64 samples"].keys()
        for key, difference in rank["64 samples"].items():
            assert difference <= 1e-5, key


@pytest.mark.parametrize("sp", ["", "sp"])
def test_no_rank_holds_the_vocabulary(by_rank, sp):
    padded = -(-VOCAB // 4) * 4
    for rank in by_rank:
        for phase, shapes in rank[f"watched {sp}"].items():
            assert not [s for s in shapes if VOCAB in s or padded in s], phase
        for phase in ("sampling", "training"):  # it does hold its half
            assert any(s[-1] == padded // 2 for s in rank[f"watched {sp}"][phase] if len(s) > 1), phase


@pytest.mark.parametrize("sp", ["", "sp"])
def test_no_rank_holds_features_of_other_samples(by_rank, sp):
    n, width = SETTINGS.geometry.num_samples, HIDDEN // (2 * 2)  # TP 2 × 2 sample ranks
    places = BLOCKS * (n // 2 + 1)  # pooled tokens of a row: blocks, own samples and reference
    for rank in by_rank:
        shapes = [tuple(s) for s in rank[f"watched {sp}"]["features"]]
        assert not [s for s in shapes if places in s[:-1] and s[-1] == HIDDEN]
        assert [s for s in shapes if places in s[:-1] and s[-1] == HIDDEN // 2]
        whole_groups = [s for s in shapes if len(s) >= 3 and (n in s[:-1] or n + 1 in s[:-1])]
        assert any(s[-1] == width for s in whole_groups)
        assert all(s[-1] in (width, n + 1) or s[-1] * s[-2] <= (n + 1) ** 2 for s in whole_groups), whole_groups


@pytest.mark.parametrize(("virtual", "stages"), [(1, 4), (2, 2)])
def test_idle_stages_as_the_formula_says(by_rank, virtual, stages):
    tasks = 8 * 3 * virtual  # groups, steps
    for rank in by_rank:
        timelines = rank[f"timeline {virtual}"]
        assert len(timelines) == stages and all(len(timeline) == tasks for timeline in timelines)
        assert all(seconds > 0 for timeline in timelines for *_, seconds in timeline)
        unit = [[(*task[:3], 1.0) for task in timeline] for timeline in timelines]
        expected = (stages - 1) / (tasks + stages - 1)
        assert replay(unit) == pytest.approx(expected, abs=1e-12)
        assert schedule.idle_fraction(8, stages, 3, virtual) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("groups", range(1, 10))
@pytest.mark.parametrize(("stages", "steps", "virtual"), [(1, 3, 1), (2, 4, 1), (3, 2, 2), (4, 5, 1), (4, 2, 3)])
def test_idle_fraction_of_any_number_of_groups(groups, stages, steps, virtual):
    """The formula against the schedule, played through with tasks of equal length."""
    timeline = [(*task, 1.0) for task in schedule.tasks(groups, stages, steps, virtual)]
    assert len(set(timeline)) == len(timeline) == groups * steps * virtual
    idle = schedule.idle_fraction(groups, stages, steps, virtual)
    assert idle == pytest.approx(replay([timeline] * stages), abs=1e-12)


@pytest.mark.parametrize("stages", range(1, 9))
def test_groups_and_waves_keep_stages_busy_and_links_free(stages):
    for rows in range(1, 40):
        parts = schedule.row_groups(rows, stages, 0)
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert len(parts) >= min(rows, stages) and (stages > 1 or len(parts) == 1)
        waves = schedule.waves(len(parts), stages)
        assert [group for wave in waves for group in wave] == list(range(len(parts)))
        assert max(map(len, waves)) <= 2 * stages - 1
        assert min(map(len, waves)) >= min(stages, len(parts))


def test_features_travel_while_the_encoder_works(one_rank, monkeypatch):
    config, weights = llama()
    encoder, gold, order = models.build_encoder(config, weights), models.gold_batch(gold_tokens()), []

    class Recorded(features.PendingGrams):
        def __init__(self, *args):
            order.append("begin")
            super().__init__(*args)

        def finish(self):
            order.append("finish")
            return super().finish()

    monkeypatch.setattr(features, "PendingGrams", Recorded)
    encoder.register_forward_hook(lambda *_: order.append("encoder"))
    models.rewarded(encoder, gold, local_rollouts(6), method(SETTINGS, blocks_per_microbatch=2))
    assert order == ["encoder", "begin"] + ["encoder", "finish", "begin"] * (len(order) // 3 - 1) + ["finish"]
    assert len(order) > 6
