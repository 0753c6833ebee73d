"""What two ranks must tell each other: one step at TP 2, at PP 2, at DP 2 and with 2 sample ranks against this process
alone, and a request to stop. Takes seconds; test_invariance.py and test_parallel.py have every layout."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import brute_force as bf
import models
import plain_llama
import pytest
import torch
import torch.distributed as dist
from forced import force_tokens
from megatron.core.distributed import DistributedDataParallelConfig
from models import largest_difference, relative_error
from ranks import enter_world, run_ranks

from megatron_ebft.common import signals
from megatron_ebft.common.device import init_device
from megatron_ebft.method import gradient
from megatron_ebft.method.fused import fused_gradient
from megatron_ebft.method.means import Means
from megatron_ebft.model import build
from megatron_ebft.parallel import groups
from megatron_ebft.rollout import token_sampling
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.run.stopping import CannotGoOn, StopAsked, Stopper

LAYOUTS = {"tensor": (2, 1, 1), "pipeline": (1, 2, 1), "data": (1, 1, 1), "samples": (1, 1, 2)}
"""TP, PP and sample ranks on two ranks."""
SETTINGS = bf.Settings(bf.Geometry(context=3, stride=3, rollout_length=3, num_samples=2), temperature=0.8, ce_coef=0.3)
ROWS, T, BLOCKS, VOCAB = 2, 15, 4, 24


def one_step(tp: int, pp: int) -> dict:
    """Gram matrices of this rank's rows, 0 for blocks that do not count, and the gradient of the whole batch by Hugging
    Face name, in separate passes and, with one stage, by a fused step.

    Row 1 has fewer answers, so that data-parallel ranks have other numbers of valid tokens. Embeddings are tied.
    """
    sizes = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, params_dtype=torch.float32,
                 pipeline_dtype=torch.float32)
    config, weights = plain_llama.random_llama(0, layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=VOCAB,
                                               tied=True)
    generator = torch.Generator().manual_seed(1)
    gold_BT = torch.randint(VOCAB, (ROWS, T), generator=generator)
    tokens_BKNG = torch.randint(VOCAB, (ROWS, BLOCKS, 2, 3), generator=generator)
    tokens_BKNG[:, ::2, :, 0] = tokens_BKNG[:, ::2, :1, 0]  # half of the rollouts begin alike
    answer_BT = torch.arange(T) >= torch.tensor([[0], [8]])
    here = torch.arange(ROWS).chunk(groups.document_size())[groups.document_rank()]
    mine = tokens_BKNG[here].chunk(groups.sample_size(), dim=2)[groups.sample_rank()]
    gold, rollouts = models.gold_batch(gold_BT[here], None, answer_BT[here]), Rollouts(mine, None, None)
    method = models.ebft_config(SETTINGS, T, config["num_hidden_layers"])
    method = replace(method, layout=replace(method.layout, num_samples=mine.shape[2]))
    encoder = models.build_encoder(config, weights, **sizes)
    rewards = models.rewarded(encoder, gold, rollouts, method)
    policy = build.build_policy(models.architecture(config), DistributedDataParallelConfig(), **sizes)
    models.load(policy, config, weights)
    policy[0].zero_grad_buffer()
    gradient.policy_gradient(policy, gold, rollouts, rewards.advantage, method, Means())
    gradients = {"separate": models.gradients(policy, config)}
    if pp == 1:
        policy[0].zero_grad_buffer()
        with pytest.MonkeyPatch.context() as patch:
            force_tokens(patch, mine)
            fused_gradient(policy, encoder, None, gold, method, 0, Means(), lambda phase: nullcontext(), lambda: None)
        gradients["fused"] = models.gradients(policy, config)
    gram = rewards.gram * gold.valid_blocks(method.layout)[..., None, None]
    return {"rows": here, "gram": gram, "gradients": gradients}


def differences(expected_file: str) -> dict[str, dict[str, float]]:
    """By layout, what this rank has against the step on one rank."""
    init_device()
    by_layout, expected = {}, torch.load(expected_file)
    for name, (tp, pp, samples) in LAYOUTS.items():
        enter_world(2)
        groups.init_parallel(tp, pp, seed=1, sample_parallel_size=samples)
        step = one_step(tp, pp)
        by_layout[name] = {
            "gram": largest_difference(step["gram"], expected["gram"][step["rows"]]),
            "gradient": max(relative_error(gradients[key], x) for gradients in step["gradients"].values()
                            for key, x in expected["gradients"]["separate"].items())}
        groups.shut_down()
    return by_layout


@pytest.fixture(scope="module")
def by_rank(one_rank, tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("two_ranks") / "one.pt"
    torch.save(one_step(1, 1), path)
    return run_ranks(2, "test_two_ranks:differences", str(path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matrices(by_rank, layout):
    assert max(rank[layout]["gram"] for rank in by_rank) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(by_rank, layout):
    """Of separate passes and of a fused step, both against separate passes on one rank."""
    assert max(rank[layout]["gradient"] for rank in by_rank) <= 1e-5


def asked_on_one_rank(asking: int) -> list[str]:
    """What three checks say on this rank. Before the second one, a signal arrives at the rank `asking`; at the third
    one that rank has a problem."""
    enter_world(2)
    said = []
    for requests, problem in (([], None), (["SIGUSR1"], None), ([], ValueError("no rows"))):
        is_asking = dist.get_rank() == asking
        signals.received[:] = requests if is_asking else []
        try:
            Stopper().check(problem=problem if is_asking else None)
            said.append("")
        except (StopAsked, CannotGoOn) as reason:
            said.append(str(reason))
    signals.received.clear()
    dist.destroy_process_group()
    return said


def equal_groups() -> list:
    """Of two worlds after each other: how many groups of this rank alone there are after three calls, whether the group
    of both ranks is one of the world before, and a sum over it."""
    told, before = [], None
    init_device()
    for world in range(2):
        enter_world(2)
        alone = {id([dist.new_group([rank]) for rank in range(2)][dist.get_rank()]) for _ in range(3)}
        both = dist.new_group([0, 1])
        assert dist.new_group([0, 1]) is both
        dist.destroy_process_group(both)  # another user of the group goes on
        total = torch.tensor(world + 1)
        dist.all_reduce(total, group=both)
        told.append([len(alone), both is before, int(total)])
        before = both
        dist.destroy_process_group()
    return told


def test_groups_of_the_same_ranks_are_one():
    """On a CPU; and a new world makes new ones."""
    assert run_ranks(2, "test_two_ranks:equal_groups") == [[[1, False, 2], [1, False, 4]]] * 2


def draws_of_both(top_p: float, top_k: int) -> list[list[int]]:
    """Tokens drawn by two ranks, of which the second has fewer ids, in several chunks, some from the same row of
    logits; and by this rank alone."""
    enter_world(2)
    rank, shard, ids = dist.get_rank(), 600, 900
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(5, 2 * shard, generator=generator) * 3
    numbers_RM = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    source_R = torch.tensor([3, 0, 0, 4, 3])
    alone = [dist.new_group([rank]) for rank in range(2)][rank]
    with mock.patch.object(token_sampling, "temporary_elements", lambda: 1200):
        both, *_ = token_sampling.draw(logits_RV[:, rank * shard :][:, :shard], min(shard, ids - rank * shard),
                                       numbers_RM, 0.7, top_p, top_k, dist.group.WORLD, source_R)
    single, *_ = token_sampling.draw(logits_RV[source_R], ids, numbers_RM, 0.7, top_p, top_k, alone)
    dist.destroy_process_group()
    return [both.flatten().tolist(), single.flatten().tolist()]


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.9, 0), (1.0, 20)])
def test_ranks_with_fewer_ids_draw_in_the_same_chunks(top_p, top_k):
    # With other chunks they would wait for each other without end; normally this takes a second.
    for both, single in run_ranks(2, "test_two_ranks:draws_of_both", top_p, top_k, timeout=120):
        assert both == single


@pytest.mark.parametrize("asking", [0, 1])
def test_a_request_to_one_rank_stops_both(asking):
    assert run_ranks(2, "test_two_ranks:asked_on_one_rank", asking) == [["", "SIGUSR1", "no rows"]] * 2
