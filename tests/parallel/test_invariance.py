"""The result of a step does not depend on how its batch is split over ranks, micro-batches and parts of rows.

One start of 8 ranks trains the same model on the same global batch of 4 rows, whose documents and answer masks give the
ranks different numbers of valid tokens, once for every way to split it over tensor, sequence, pipeline, data and sample
ranks. Two of them also hold half of a vocabulary each, to compare the vocabulary-parallel functions with the same
functions on one rank.
"""

import os
from itertools import product
from types import SimpleNamespace

import models
import plain_llama
import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import get_megatron_optimizer
from models import largest_difference, relative_error
from ranks import enter_world, run_ranks

from megatron_ebft.common.device import device, init_device
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.method.step import ebft_step
from megatron_ebft.model import log_probabilities
from megatron_ebft.parallel import groups
from megatron_ebft.rollout import token_sampling
from megatron_ebft.run import loop
from megatron_ebft.run.configs import ebft_config, model_args, optimizer_config, parallel_sizes
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import train_step
from megatron_ebft.run.models import build_models
from megatron_ebft.run.state import Run

ROWS, T, VOCAB, EOD, STEPS = 4, 20, 24, 0, 3
FLAGS = """--train-iters 3 --global-batch-size 4 --seq-length 20 --num-layers 4 --hidden-size 16 --ffn-hidden-size 24
    --num-attention-heads 8 --num-query-groups 4 --lr 1e-3 --clip-grad 0.5 --untie-embeddings-and-output-weights
    --ebft-rollout-length 3 --ebft-stride 2 --ebft-context-length 4 --ebft-num-samples 4 --ebft-ce-coef 0.3
    --ebft-kl-coef 0.1 --ebft-document-mask --ebft-answer-only --make-vocab-size-divisible-by 5
    --ebft-top-p 0.95 --ebft-top-k 2""".split()
"""Of 2 ** 3 rollouts that a block can have, 4 are drawn: some of them twice."""
OTHER = """--no-untie-embeddings-and-output-weights --qk-layernorm --add-bias-linear --add-qkv-bias --no-swiglu
    --normalization LayerNorm --position-embedding-type learned_absolute --recompute-granularity full
    --ebft-feature-norm layer --ebft-feature-pooling mean --ebft-whitening paper --ebft-top-p 0.53
    --ebft-kl-coef 0""".split()
"""Another architecture and method, against one rank of their own; without KL, rollouts without advantage are left out.
"""
SAVED = ("encoder_tokens_saved", "training_tokens_saved")
"""Metrics of the split: room in rows is rounded up, and sample ranks do not know each other's rollouts."""
TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
SAMPLES, BLOCKS, VIRTUAL = "--ebft-sample-parallel-size", "--ebft-blocks-per-microbatch", \
    "--num-virtual-stages-per-pipeline-rank"


def grid() -> dict[str, tuple[int, list[str]]]:
    """Number of ranks and flags by name: each way to share the work out by itself, every two of them together, all of
    them (of 8 ranks, where a step takes longest, with sequence parallelism alone), and a few more. Two pairs are in
    these: sequence parallelism with stages in "virtual stages", and with sample ranks in "4 sample ranks"."""
    splits = {}
    for tp, pp, dp, sp, samples in product((1, 2), (1, 2), (1, 2), (False, True), (1, 2)):
        if (sp and tp == 1) or samples > dp or (tp * pp * dp == 8 and not (sp and samples == 2)):
            continue
        if (sp, tp * pp * dp) == (True, 4) and (pp == 2 or samples == 2):
            continue
        name = f"tp{tp}{' sp' * sp} pp{pp} dp{dp}{' samples' * (samples > 1)}"
        splits[name] = tp * pp * dp, [TP, str(tp), PP, str(pp), SAMPLES, str(samples)] + [SP] * sp
    alone, two = splits["tp1 pp1 dp1"][1], splits["tp1 pp1 dp2"][1]
    splits |= {
        "2 rows": (1, [*alone, "--micro-batch-size", "2"]),
        "3 blocks": (1, [*alone, BLOCKS, "3"]),
        "2 rows, 3 blocks": (2, [*two, "--micro-batch-size", "2", BLOCKS, "3", "--ebft-rollout-rows", "1"]),
        "overlapped": (2, [*two, "--overlap-grad-reduce"]),
        "tp4 sp": (4, [TP, "4", SP, BLOCKS, "5"]),
        "pp4": (4, [PP, "4", "--ebft-rollout-rows", "1"]),
        "virtual stages": (4, [TP, "2", SP, PP, "2", VIRTUAL, "2"]),
        "uneven stages": (2, [PP, "2", "--decoder-first-pipeline-num-layers", "1", BLOCKS, "3"]),
        "dp2, 2 sample ranks": (4, [SAMPLES, "2"]),
        "tp2, dp2, 2 sample ranks": (8, [TP, "2", SAMPLES, "2"]),
        "4 sample ranks": (8, [TP, "2", SP, SAMPLES, "4", "--micro-batch-size", "2"]),  # rows and steps are padded
        "separate passes": (1, [*alone, "--ebft-step", "separate"]),
        "separate passes, 3 blocks": (2, [*two, BLOCKS, "3", "--ebft-step", "separate"]),
        "nothing left out": (1, [*alone, "--no-ebft-skip-duplicates"]),
        "other alone": (1, []),
        "other, nothing left out": (1, ["--no-ebft-skip-duplicates"]),
        "other tp2 sp pp2": (4, [TP, "2", SP, PP, "2"]),
        "other pp2 samples": (4, [PP, "2", SAMPLES, "2", "--overlap-grad-reduce"]),
    }
    return splits


GRID = grid()


# ---------------------------------------------------------------- what the ranks do


def gold_rows():
    """This rank's rows of the global batch: rows 2 and 3 have less to train on than rows 0 and 1."""
    tokens = torch.randint(1, VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(0))
    answers = torch.ones(ROWS, T, dtype=torch.bool)
    tokens[1, 9] = tokens[2, 4] = tokens[2, 10] = EOD
    answers[2, :6] = answers[3, :12] = False
    size = ROWS // groups.document_size()
    first = groups.document_rank() * size
    here = slice(first, first + size)
    return models.gold_batch(tokens[here], EOD, answers[here], first)


class Schedule:
    """A learning rate that stays as it is."""

    def step(self, increment: int) -> None:
        pass


def build_run(args, other: str | None) -> Run:
    """A run on the weights of one random model.

    Args:
        other: where the weights of the other architecture are, or are to be left by the first world that needs them.
    """
    config, weights = plain_llama.random_llama(0, layers=4, hidden=16, ffn=24, heads=8, kv_heads=4, vocab=VOCAB)
    method = ebft_config(args, args.num_layers)

    def load_llama(target) -> None:
        models.load(target, config, weights)

    def load_other(policy) -> None:
        if not os.path.exists(other):
            torch.save(models.whole_tensors(policy, of_gradients=False), other)
        models.load_whole(policy, torch.load(other), VOCAB)

    sources = dict(policy_from=load_other) if other else dict.fromkeys(
        ("policy_from", "encoder_from", "start_from"), load_llama)
    built = build_models(args, model_args(args, VOCAB), method, has_start=True, **sources)
    return Run(mode="ebft", policy=built.policy, encoder=built.encoder, start=built.start,
               optimizer=get_megatron_optimizer(optimizer_config(args), built.policy), scheduler=Schedule(),
               config=method, args=args)


def gather(value) -> list:
    """The value of every rank, in rank order."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def train(folder: str, names: list[str]) -> dict:
    """Metrics of each step by name; rollouts of each step and final weights go to the folder.

    The same processes form one world after another, in which all ways to share work out that need the same process
    groups follow each other. Ranks that a small world has no use for wait for the next one.
    """
    metrics, vocabulary = {}, None
    init_device()
    for world, sizes, members in worlds(names):
        if not enter_world(world):
            continue
        groups.init_parallel(**sizes)
        for name in members:
            groups.set_seed(sizes["seed"])
            metrics[name] = train_steps(folder, name)
        if "tp1 pp1 dp2" in members:
            vocabulary = vocabulary_parallel()
        groups.shut_down()
    return {"metrics": metrics, "vocabulary": vocabulary}


def worlds(names: list[str]) -> list[tuple[int, dict, list[str]]]:
    """Number of ranks, sizes of process groups, and the names that take them."""
    by_sizes = {}
    for name in names:
        sizes = parallel_sizes(parsed(name))
        by_sizes.setdefault((GRID[name][0], *sizes.items()), (sizes, []))[1].append(name)
    return [(world, sizes, members) for (world, *_), (sizes, members) in by_sizes.items()]


def parsed(name: str):
    return parse_args(FLAGS + (OTHER if name.startswith("other") else []) + GRID[name][1])


def train_steps(folder: str, name: str) -> list[dict[str, float]]:
    """Metrics of each step; rank 0 leaves rollouts and final weights in the folder."""
    gold, run = gold_rows(), build_run(parsed(name), f"{folder}/other.pt" if name.startswith("other") else None)
    assert run.config.fused == is_fused(name)
    metrics, state = [], {"rollouts": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "ebft_step", watched(state["rollouts"]))
        for _ in range(STEPS):
            metrics.append(train_step(run, gold, PhaseTimer(), check=run.state.iteration == 0))
            run.state.iteration += 1
    state["weights"] = models.whole_tensors(run.policy, of_gradients=False)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/{name}.pt")
    return metrics


def watched(tokens_by_step: list):
    """ebft_step that leaves the tokens of the whole global batch, [ROWS, K, n, G], 0 in blocks that do not count."""
    def watched_step(*, gold, config, inspect, **options):
        def look(computed, means) -> None:
            tokens = computed.rollouts.tokens_BKNG
            tokens = tokens.where(gold.valid_blocks(config.layout)[..., None, None], 0)
            samples = groups.sample_size() * tokens.shape[2]
            whole = torch.full((ROWS, tokens.shape[1], samples, tokens.shape[3]), -1)
            mine = slice(groups.sample_rank() * tokens.shape[2], (groups.sample_rank() + 1) * tokens.shape[2])
            for rows, columns, part in gather((gold.index_B.tolist(), mine, tokens.cpu())):
                whole[rows, :, columns] = part
            assert (whole >= 0).all()
            tokens_by_step.append(whole)
            inspect(computed, means)

        return ebft_step(gold=gold, config=config, inspect=look, **options)

    return watched_step


def vocabulary_parallel() -> dict[str, float]:
    """Largest differences between functions on logits split over this world's two ranks, and on whole ones: in halves,
    with padding on the second rank, and with nothing else there."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    return {f"{name}, width {width}": difference for width in (VOCAB // 2, VOCAB // 2 + 3, VOCAB + 1)
            for name, difference in _differences_of_shards(width, alone).items()}


def _differences_of_shards(width: int, alone) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(10, 3, VOCAB, generator=generator)).to(device())
    logits[2] = logits[2].round()  # ties
    real = min(max(VOCAB - width * dist.get_rank(), 0), width)
    differences = {}

    def shard(x):
        padded = torch.nn.functional.pad(x, (0, 2 * width - VOCAB), value=torch.nan)
        return padded[..., width * dist.get_rank() :][..., :width]

    targets = torch.randint(VOCAB, (10, 3, 2), generator=generator).to(device())
    Section = log_probabilities.Section
    sections = [Section(slice(0, 4), targets[:4, :, :1], 1.0), Section(slice(5, 9), targets[5:9], 0.6),
                Section(torch.tensor([1, 3, 1]).to(device()), targets[:3], 0.6)]
    results = []
    for x, columns, group in ((logits, VOCAB, alone), (shard(logits), real, dist.group.WORLD)):
        x = x.clone().requires_grad_()
        model = SimpleNamespace(head=lambda hidden: hidden, num_real_ids=columns,
                                pg_collection=SimpleNamespace(tp=group))
        values = log_probabilities.LogProbs(sections)(x, model)
        weights = [torch.arange(value.numel()).view_as(value).to(device()).cos() for value in values]
        sum((value * weight).sum() for value, weight in zip(values, weights)).backward()
        results.append((values, x.grad))
    (values, grad), (values_2, grad_2) = results
    expected = [(logits[s.rows] / s.temperature).log_softmax(-1).gather(-1, s.targets_PBM) for s in sections]
    differences["log_probs"] = max(largest_difference(a, b.cpu()) for a, b in zip(values_2, values))
    differences["log_softmax"] = max(largest_difference(a.detach(), b.cpu()) for a, b in zip(values, expected))
    differences["gradient"] = largest_difference(grad_2, shard(grad).nan_to_num().cpu())

    zero = torch.zeros((), dtype=torch.int64)
    u = token_sampling.uniform(1, 0, torch.arange(30).view(-1, 1), zero, torch.arange(200), 0)
    u[..., 0], u[..., 1] = 0.0, 1 - 2.0**-53  # with top-k 1, one shard is empty: neither may fall there
    x = logits.flatten(0, 1)
    x[0, : VOCAB // 2] = x[1, VOCAB // 2 :] = -torch.inf
    x[3, VOCAB // 2] = -torch.inf  # the first id of the second half
    for top_p, top_k in ((1.0, 0), (0.7, 0), (0.2, 0), (1.0, 1), (1.0, 5), (0.8, 6)):
        whole = token_sampling.sample(x, VOCAB, u.to(device()), 0.8, top_p, top_k, alone)
        split = token_sampling.sample(shard(x), real, u.to(device()), 0.8, top_p, top_k, dist.group.WORLD)
        for name, a, b in zip(("tokens", "log_probs", "entropy"), split, whole):
            differences[f"sampled {name} {top_p} {top_k}"] = largest_difference(a.double(), b.double().cpu())
    return differences


# ---------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name: metrics of each step, rollouts and weights; and the vocabulary comparison."""
    folder = tmp_path_factory.mktemp("invariance")
    by_rank = run_ranks(8, "test_invariance:train", str(folder), list(GRID))
    by_name = {}
    for name, (world, _) in GRID.items():
        metrics = [rank["metrics"][name] for rank in by_rank[:world]]
        assert all(x == metrics[0] for x in metrics), name  # every rank reports the global batch
        by_name[name] = metrics[0], torch.load(folder / f"{name}.pt")
    return by_name, [rank["vocabulary"] for rank in by_rank[:2]]


@pytest.mark.parametrize("name", GRID)
def test_steps_are_the_same(results, name):
    alone = "other alone" if name.startswith("other") else "tp1 pp1 dp1"
    (metrics, state), (expected, expected_state) = results[0][name], results[0][alone]
    for actual, wanted in zip(metrics, expected, strict=True):
        assert actual.keys() == wanted.keys()
        assert actual["mismatch"] == 0 or not is_fused(name)  # then the sampler is the training pass
        for key in actual.keys() - set(SAVED):
            assert actual[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key
    for actual, wanted in zip(state["rollouts"], expected_state["rollouts"], strict=True):
        assert torch.equal(actual, wanted)
    assert state["weights"].keys() == expected_state["weights"].keys()
    for key, wanted in expected_state["weights"].items():
        if key.endswith(("linear_qkv.bias", "k_layernorm.bias")):
            continue  # without rotation a bias of keys has no gradient but rounding, of which Adam makes whole steps
        rows = VOCAB if "word_embeddings" in key or "output_layer" in key else None
        assert largest_difference(state["weights"][key][:rows], wanted[:rows]) <= 1e-5, key
        assert relative_error(state["weights"][key][:rows], wanted[:rows]) <= 1e-5, key


def is_fused(name: str) -> bool:
    """Whether `auto` fuses: one stage, nothing recomputed."""
    flags = GRID[name][1]
    stages = flags[flags.index(PP) + 1] if PP in flags else "1"
    return stages == "1" and not name.startswith(("other", "separate"))


def test_the_steps_moved_something(results):
    metrics, state = results[0]["tp1 pp1 dp1"]
    assert len(metrics) == STEPS and metrics[0]["grad_norm"] > 0.5  # clipping had something to do
    assert 0 < metrics[0]["valid_blocks"] < 0.9 and metrics[-1]["kl_loss"] > 0
    saved = {name: [x[key] for x in results[0][name][0] for key in SAVED] for name in GRID}
    assert {name for name, shares in saved.items() if max(shares) == 0} >= {
        "nothing left out", "other, nothing left out"}
    assert sum(min(shares) > 0.1 for shares in saved.values()) > len(GRID) / 2  # few samples a rank: few duplicates
    assert results[0]["other alone"][0][0]["zero_spread"] > 0.2
    before, *_, after = state["rollouts"]
    assert (before != after).any()


def test_vocabulary_split_over_two_ranks(results):
    for rank in results[1]:
        assert len(rank) == 3 * (3 + 3 * 6)
        for name, difference in rank.items():
            assert difference <= (0 if "tokens" in name else 1e-5), name
