"""An RLVR step does not depend on how its questions and its model are split over ranks.

Ranks have other numbers of completions to train on: with two data-parallel ranks and no KL term, one of them has none.
"""

from types import SimpleNamespace

import models
import plain_llama
import pytest
import torch
from models import largest_difference
from ranks import enter_world, run_ranks

from megatron_ebft.common.device import init_device
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.data.questions import Question
from megatron_ebft.parallel import groups
from megatron_ebft.run.configs import model_args, parallel_sizes, rlvr_config
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import train_step
from megatron_ebft.run.models import build_models, build_optimizer
from megatron_ebft.run.rlvr import RLVR
from megatron_ebft.run.state import Run
from megatron_ebft.verifiers.verdict import Verdict

VOCAB, STEPS = 24, 2
FLAGS = """--training-mode rlvr --train-iters 3 --global-batch-size 4 --seq-length 32 --num-layers 4 --hidden-size 16
    --ffn-hidden-size 24 --num-attention-heads 4 --num-query-groups 2 --untie-embeddings-and-output-weights --lr 1e-3
    --clip-grad 0.5 --make-vocab-size-divisible-by 5 --ebft-questions x --ebft-verifier x --ebft-rlvr-num-samples 4
    --ebft-max-new-tokens 6 --ebft-top-k 9""".split()
PP, TP = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
KL = ["--ebft-kl-coef", "0.2"]
LAYOUTS = {
    "one": (1, []), "one, KL": (1, KL), "two rows": (1, ["--micro-batch-size", "2", "--ebft-rollout-rows", "3"]),
    "tensor, KL": (2, [TP, "2", "--sequence-parallel", *KL]), "pipeline, KL": (2, [PP, "2", *KL]),
    "data": (2, ["--overlap-grad-reduce"]), "tensor and pipeline": (4, [TP, "2", PP, "2"]),
    "virtual": (4, [PP, "2", "--num-virtual-stages-per-pipeline-rank", "2"])}
"""Ranks and flags. Each is compared with "one" or "one, KL"."""
PROMPTS = [[3], [2, 7, 1], [5, 1, 4, 1, 5, 9], [2, 7, 1]]
"""All completions of the first and the third are equally good. The others are the same question."""


def verify(answers: list) -> list[Verdict]:
    """The share of even tokens."""
    scores = [1.0 if len(question.prompt) in (1, 6) else sum(token % 2 == 0 for token in completion.tokens) / 6
              for question, completion in answers]
    return [Verdict(score=score, is_right=score > 0.5) for score in scores]


def build_run(args) -> Run:
    config, weights = plain_llama.random_llama(0, layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=VOCAB)

    def load(target) -> None:
        models.load(target, config, weights)

    built = build_models(args, model_args(args, VOCAB), None, policy_from=load, start_from=load,
                         has_start=bool(args.ebft_kl_coef))
    optimizer, scheduler = build_optimizer(args, built.policy)
    rlvr = RLVR(config=rlvr_config(args, None, (0, 11)), questions=None,
                verification=SimpleNamespace(verify=verify, judged=lambda failures: None))
    return Run(mode="rlvr", policy=built.policy, start=built.start, optimizer=optimizer, scheduler=scheduler, rlvr=rlvr,
               args=args)


def train(folder: str) -> dict[str, list]:
    """Metrics of each step by layout; rank 0 leaves the weights in the folder."""
    metrics = {}
    init_device()
    for name, (world, flags) in LAYOUTS.items():
        if enter_world(world):
            args = parse_args([*FLAGS, *flags])
            groups.init_parallel(**parallel_sizes(args))
            metrics[name] = steps(build_run(args), f"{folder}/{name}.pt")
            groups.shut_down()
    return metrics


def steps(run: Run, file: str) -> list[dict]:
    questions = [Question({}, prompt, occurrence=int(i == 3)) for i, prompt in enumerate(PROMPTS)]
    count = len(questions) // groups.document_size()
    mine = questions[groups.document_rank() * count :][:count]
    metrics = []
    for _ in range(STEPS):
        metrics.append(train_step(run, mine, PhaseTimer(), check=run.state.iteration == 0))
        run.state.iteration += 1
    weights = models.whole_tensors(run.policy, of_gradients=False)
    if torch.distributed.get_rank() == 0:
        torch.save(weights, file)
    return metrics


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Metrics of each step and weights after them, by name."""
    folder = tmp_path_factory.mktemp("layouts")
    by_rank, by_name = run_ranks(4, "test_rlvr_layouts:train", str(folder)), {}
    for name, metrics in by_rank[0].items():
        everywhere = [rank[name] for rank in by_rank[: LAYOUTS[name][0]]]
        assert all(x == metrics for x in everywhere), name  # every rank reports the global batch
        by_name[name] = metrics, torch.load(folder / f"{name}.pt")
    return by_name


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("one")])
def test_steps_are_the_same(results, name):
    (metrics, weights), (expected, expected_weights) = results[name], results["one" + ", KL" * name.endswith("KL")]
    for actual, wanted in zip(metrics, expected, strict=True):
        assert actual.keys() == wanted.keys()
        for key in actual:
            assert actual[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key
    for key, wanted in expected_weights.items():
        rows = VOCAB if "word_embeddings" in key or "output_layer" in key else None
        assert largest_difference(weights[key][:rows], wanted[:rows]) <= 1e-5, key


def test_the_steps_moved_something(results):
    for name in ("one", "one, KL"):
        (first, second), _ = results[name]
        assert first["grad_norm"] > 0.01 and first["zero_spread"] == 0.5 and first["mismatch"] < 1e-5
        assert 0 < first["success"] < 1 and 0 < first["finished"] < 1 and first["length"] != second["length"]
        assert (first["training_tokens_saved"] > 0.3) == (name == "one")
    assert second["kl_loss"] > 1e-6 > abs(first["kl_loss"])
