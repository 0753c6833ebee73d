"""The result of a step does not depend on how its batch is split over ranks, micro-batches and parts of rows.

One start of one rank and one of two: each trains the same model on the same global batch of 4 rows, whose documents and
answer masks give the ranks different numbers of valid tokens, once for every way to split. The two ranks also hold half
of a vocabulary each, to compare the vocabulary-parallel functions with the same functions on one rank.
"""

import brute_force as bf
import models
import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import get_megatron_optimizer
from models import largest_difference
from ranks import run_ranks

from megatron_ebft import model, parallel, readout, rollout, sampling, training
from megatron_ebft.arguments import (
    ddp_config,
    ebft_config,
    model_args,
    optimizer_config,
    parse_args,
    transformer_overrides,
)
from megatron_ebft.checkpoint import TrainState
from megatron_ebft.device import device
from megatron_ebft.metrics import PhaseTimer

ROWS, T, VOCAB, EOD, STEPS = 4, 18, 24, 0, 3
FLAGS = """--train-iters 3 --global-batch-size 4 --seq-length 18 --num-layers 4 --hidden-size 16 --ffn-hidden-size 24
    --num-attention-heads 4 --num-query-groups 2 --lr 1e-3 --clip-grad 0.5 --untie-embeddings-and-output-weights
    --ebft-rollout-length 3 --ebft-stride 2 --ebft-context-length 3 --ebft-num-samples 3 --ebft-ce-coef 0.3
    --ebft-kl-coef 0.1 --ebft-document-mask --ebft-answer-only""".split()
SPLITS = {  # each also bounds the rows that decode together
    "1 row": ["--micro-batch-size", "1"],
    "2 rows": ["--micro-batch-size", "2"],
    "1 row, 3 blocks": ["--micro-batch-size", "1", "--ebft-blocks-per-microbatch", "3"],
    "2 rows, 3 blocks": ["--micro-batch-size", "2", "--ebft-blocks-per-microbatch", "3", "--ebft-rollout-rows", "1"],
    "overlapped": ["--micro-batch-size", "1", "--overlap-grad-reduce"],
}


# ---------------------------------------------------------------- what the ranks do


def gold_rows():
    """This rank's rows of the global batch: rows 2 and 3 have less to train on than rows 0 and 1."""
    tokens = torch.randint(1, VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(0))
    answers = torch.ones(ROWS, T, dtype=torch.bool)
    tokens[1, 9] = tokens[2, 4] = tokens[2, 10] = EOD
    answers[2, :6] = answers[3, :12] = False
    size = ROWS // parallel.dp_size()
    first = parallel.dp_rank() * size
    here = slice(first, first + size)
    return models.gold_batch(tokens[here], EOD, answers[here], first)


class Schedule:
    """A learning rate that stays as it is."""

    def step(self, increment: int) -> None:
        pass


def build_run(flags: list[str]) -> training.Run:
    args = parse_args(FLAGS + flags)
    architecture, overrides = model_args(args, VOCAB), transformer_overrides(args)
    config, weights = bf.random_llama(0, layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=VOCAB)
    method = ebft_config(args, args.num_layers)
    policy = model.build_policy(architecture, ddp_config(args), **overrides)
    encoder = model.build_encoder(architecture, max(method.feature_map.layers), **overrides)
    reference = model.build_frozen(architecture, **overrides)
    for target in (policy[0], encoder, reference):
        models.load(target, config, weights)
    return training.Run("ebft", policy, encoder, reference, get_megatron_optimizer(optimizer_config(args), policy),
                        Schedule(), method, None, None, None, args, {}, TrainState())


def gather(value) -> list:
    """The value of every rank, in rank order."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def train(folder: str) -> dict:
    """Metrics of each step by split; rollouts of the first step and final weights go to the folder."""
    parallel.init_parallel(1, 1, seed=1)
    gold, found = gold_rows(), {}
    for name, flags in SPLITS.items():
        run = build_run(flags)
        before = rollout.sample_rollouts(run.policy[0], gold, run.config.layout, run.config.sampling, 0,
                                         run.config.rollout_rows).tokens_BKNG
        metrics = []
        for _ in range(STEPS):
            metrics.append(training.train_step(run, gold, PhaseTimer(), check=run.state.iteration == 0))
            run.state.iteration += 1
        after = rollout.sample_rollouts(run.policy[0], gold, run.config.layout, run.config.sampling, STEPS,
                                        run.config.rollout_rows).tokens_BKNG
        tokens = [torch.cat(gather(x.cpu())) for x in (before, after)]
        weights = {key: x.cpu() for key, x in run.policy[0].module.state_dict().items() if isinstance(x, torch.Tensor)}
        if parallel.dp_rank() == 0:
            torch.save({"rollouts": tokens, "weights": weights}, f"{folder}/{name}.pt")
        found[name] = metrics
    vocabulary = vocabulary_parallel() if parallel.dp_size() > 1 else None
    parallel.shut_down()
    return {"metrics": found, "vocabulary": vocabulary}


def vocabulary_parallel() -> dict[str, float]:
    """Largest differences between functions on logits split over this world's ranks, and on whole ones."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(10, 3, VOCAB, generator=generator)).to(device())
    logits[2] = logits[2].round()  # ties
    shard = logits.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    differences = {}

    targets = torch.randint(VOCAB, (10, 3, 2), generator=generator).to(device())
    sections = [readout.Section(slice(0, 4), targets[:4, :, :1], 1.0), readout.Section(slice(5, 9), targets[5:9], 0.6),
                readout.Section(torch.tensor([1, 3, 1]).to(device()), targets[:3], 0.6)]
    results = []
    for x, group in ((logits, alone), (shard, dist.group.WORLD)):
        x = x.clone().requires_grad_()
        values = readout.LogProbs(sections)(x, lambda hidden: hidden, group)
        weights = [torch.arange(value.numel()).view_as(value).to(device()).cos() for value in values]
        sum((value * weight).sum() for value, weight in zip(values, weights)).backward()
        results.append((values, x.grad))
    (values, grad), (values_2, grad_2) = results
    expected = [(logits[s.rows] / s.temperature).log_softmax(-1).gather(-1, s.targets_PBM) for s in sections]
    differences["log_probs"] = max(largest_difference(a, b.cpu()) for a, b in zip(values_2, values))
    differences["log_softmax"] = max(largest_difference(a.detach(), b.cpu()) for a, b in zip(values, expected))
    differences["gradient"] = largest_difference(grad_2, grad.chunk(dist.get_world_size(), -1)[dist.get_rank()].cpu())

    u = sampling.uniform(1, 0, torch.arange(10).view(-1, 1, 1), torch.arange(3).view(-1, 1), torch.arange(200), 0)
    for top_p, top_k in ((1.0, 0), (0.7, 0), (0.2, 0), (1.0, 1), (1.0, 5), (0.8, 6)):
        whole, split = (sampling.sample(x, u.to(device()), 0.8, top_p, top_k, group)
                        for x, group in ((logits, alone), (shard, dist.group.WORLD)))
        for name, a, b in zip(("tokens", "log_probs", "entropy"), split, whole):
            differences[f"sampled {name} {top_p} {top_k}"] = largest_difference(a.double(), b.double().cpu())
    return differences


# ---------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of ranks and split: metrics of each step, rollouts and weights; and the vocabulary comparison."""
    found, vocabulary = {}, None
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        by_rank = run_ranks(world, "test_invariance:train", str(folder))
        assert all(x["metrics"] == by_rank[0]["metrics"] for x in by_rank)  # every rank reports the global batch
        vocabulary = [x["vocabulary"] for x in by_rank]
        for name, metrics in by_rank[0]["metrics"].items():
            found[world, name] = metrics, torch.load(folder / f"{name}.pt")
    return found, vocabulary


CASES = [(world, name) for world in (1, 2) for name in SPLITS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} rank(s), {case[1]}")
def test_steps_are_the_same(results, case):
    (metrics, state), (expected, expected_state) = results[0][case], results[0][1, "1 row"]
    for found, wanted in zip(metrics, expected):
        assert found.keys() == wanted.keys()
        for key in found:
            assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key
    for found, wanted in zip(state["rollouts"], expected_state["rollouts"]):
        assert torch.equal(found, wanted)
    assert state["weights"].keys() == expected_state["weights"].keys()
    for key, wanted in expected_state["weights"].items():
        assert largest_difference(state["weights"][key], wanted) <= 1e-5, key


def test_the_steps_moved_something(results):
    metrics, state = results[0][1, "1 row"]
    assert len(metrics) == STEPS and metrics[0]["grad_norm"] > 0.5  # clipping had something to do
    assert 0 < metrics[0]["valid_blocks"] < 0.9 and metrics[2]["kl_loss"] > 0
    before, after = state["rollouts"]
    assert (before != after).any()


def test_vocabulary_split_over_two_ranks(results):
    for rank in results[1]:
        assert len(rank) == 3 + 3 * 6
        for name, difference in rank.items():
            assert difference <= (0 if "tokens" in name else 1e-5), name
