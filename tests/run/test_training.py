"""The training command: resumes bit for bit after SIGKILL, logs what it should, refuses what cannot work."""

import math
import os
import signal
import time

import pytest
import torch
from paced import Pace
from small_run import MODEL, SMALL, TIMED, VOCAB, empty_charts, finish, save, scalars, start, start_ranks, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.method.evaluation import evaluate
from megatron_ebft.method.means import Means
from megatron_ebft.method.sft import cross_entropy_pass
from megatron_ebft.method.update import update
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.rollout import sampler
from megatron_ebft.run.build import build_run
from megatron_ebft.run.describe import describe
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import gold_batch, train, train_step

EVERY_STEP = {"loss", "rl_loss", "ce_loss", "reward", "alignment", "diversity", "reward_std", "zero_spread", "cfm",
              "cfm_biased", "entropy", "mismatch", "mismatch_ratio", "grad_norm", "lr", "tokens_per_second"}
EVALUATED = {"ce_loss", "cfm", "cfm_biased", "alignment", "kl_to_start", "cfm_length/01", "cfm_length/08"}


def test_killed_run_continues_bit_for_bit(data, tmp_path, one_rank):
    def flags(folder):
        return [*data, *MODEL, *SMALL, "--train-iters", "6", "--save-interval", "3", "--eval-interval", "3",
                "--save", str(folder), "--load", str(folder)]

    whole, killed, pace = tmp_path / "whole", tmp_path / "killed", Pace(tmp_path / "pace")
    finish(start_ranks(flags(whole)))
    pace.allow(4)
    ranks = start_ranks(flags(killed), pace=pace.file)
    for line in ranks[0].output:
        if line.startswith("saved"):  # iteration 3 is whole; step 4 has begun, or waits at its end
            time.sleep(0.05)
            for rank in ranks:
                os.killpg(rank.pid, signal.SIGKILL)  # with the processes that Megatron-Core saves with
            break
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    output = finish(start_ranks(flags(killed)))
    assert "step 3/6" not in output and "step 4/6" in output

    expected, logged = scalars(whole / "tensorboard"), scalars(killed / "tensorboard")
    for tag in (tag for tag in expected if not tag.startswith(TIMED)):
        assert logged[tag] == expected[tag], tag
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(killed)[name]), name


def test_the_same_run_on_one_rank_and_on_four(arguments, data, tmp_path, one_rank):
    """One rank against TP 2 × PP 2 with sequence parallelism, which then continues as PP 2 × 2 sample ranks."""
    run, _ = start(arguments("--tensorboard-dir", str(tmp_path / "x"), "--training-mode", "sft"))
    save(run, tmp_path / "start")
    common = ["--pretrained-checkpoint", str(tmp_path / "start"), "--train-iters", "4", "--eval-interval", "2",
              "--save-interval", "2", "--ebft-kl-coef", "0.1", "--lr", "1e-3"]
    run, log = start(arguments(*common, "--save", str(tmp_path / "one")))
    train(run, log)
    log.close(0.0)

    folder = tmp_path / "four"
    flags = [*data, *MODEL, *SMALL, *common, "--save", str(folder), "--load", str(folder),
             "--pipeline-model-parallel-size", "2"]
    first = finish(start_ranks([*flags, "--tensor-model-parallel-size", "2", "--sequence-parallel"], 4))
    assert "tensor 2 with sequence × pipeline 2 × data 1" in first and "2 groups of rows over 2 stages" in first
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    second = finish(start_ranks([*flags, "--ebft-sample-parallel-size", "2"], 4))
    assert "step 2/4" not in second and "step 3/4" in second and "--tensor-model-parallel-size 2 → 1" in second
    expected, logged = scalars(tmp_path / "one" / "tensorboard"), scalars(folder / "tensorboard")
    # Not what differs with the layout: tokens a second, and tokens that a fused step or sample ranks leave out.
    for tag in (tag for tag in expected if tag.startswith(("train/", "eval/")) and "tokens_" not in tag):
        steps = [step for step, _ in expected[tag]]
        if tag != "train/distance_to_start":  # measured at the first step of each process
            assert [step for step, _ in logged[tag]] == steps, tag
        for (_, value), (_, wanted) in zip(logged[tag], expected[tag]):
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-5), tag
    for name, value in weights(tmp_path / "one").items():
        assert (value - weights(folder)[name])[:VOCAB].abs().max() <= 1e-5, name


def test_a_note_where_one_side_alone_runs_in_fp8(arguments, tmp_path, one_rank):
    plain = ("--tensorboard-dir", str(tmp_path), "--seq-length", "32")
    rollouts = (*plain, "--ebft-rollout-fp8", "blockwise", "--ebft-fp8-emulate")
    for flags, is_noted in ((plain, False), (rollouts, True)):
        run = build_run(arguments(*flags))
        assert ("rollouts run in FP8 and the training pass does not" in describe(run)) == is_noted
    run.args.fp8_format = "hybrid"
    assert "FP8" not in describe(run)


@pytest.mark.parametrize("clip", ["0.05", "0"])
def test_optimizer_step_is_megatrons(arguments, tmp_path, one_rank, clip):
    """Clipping included: the same weights as from the optimizer's own step on the same gradients."""
    after = []
    for steps in (lambda run: update(run.optimizer, 0.0), lambda run: run.optimizer.step()[1]):
        groups.set_seed(1)
        run = build_run(arguments("--training-mode", "sft", "--clip-grad", clip, "--tensorboard-dir", str(tmp_path)))
        for chunk in run.policy:
            chunk.zero_grad_buffer()
        cross_entropy_pass(run.policy, gold_batch(run, run.train_data, 0), 1, Means(), forward_only=False)
        assert (norm := float(steps(run))) > 0.1
        after.append((norm, [p.clone() for chunk in run.policy for p in chunk.parameters()]))
    (ours, our_weights), (megatrons, weights) = after
    assert ours == megatrons and all(map(torch.equal, our_weights, weights))


def test_every_metric_is_logged(arguments, tmp_path, one_rank, capsys):
    run, log = start(arguments("--tensorboard-dir", str(tmp_path), "--ebft-kl-coef", "0.1", "--ebft-document-mask"))
    train(run, log)
    log.close(0.0)
    logged = scalars(tmp_path)
    assert {f"train/{name}" for name in EVERY_STEP | {"kl_loss"}} <= logged.keys()
    assert {f"eval/{name}" for name in EVALUATED} <= logged.keys()
    assert {f"seconds/{name}" for name in ("rollout", "features", "train", "optimizer", "step")} <= logged.keys()
    assert abs(logged["eval/kl_to_start"][0][1]) < 1e-7 and logged["eval/kl_to_start"][-1][1] > 1e-5
    assert logged["train/distance_to_start"][0][1] < 1e-6
    assert all(value < 1e-5 for _, value in logged["train/mismatch"])
    console = capsys.readouterr().out
    assert "step 4/4" in console and "left" in console and "rollout" in console
    texts = EventAccumulator(str(tmp_path)).Reload().Tensors("rollouts/text_summary")
    shown = texts[0].tensor_proto.string_val[0].decode()
    assert shown.count("**gold**") == shown.count("**context**") > 0 and shown.count("**rollout**") >= 4


def test_sft_then_ebft_from_its_checkpoint(arguments, tmp_path, one_rank):
    sft = arguments("--training-mode", "sft", "--save", str(tmp_path / "sft"), "--train-iters", "8", "--lr", "3e-2")
    run, log = start(sft)
    train(run, log)
    losses = [value for _, value in scalars(tmp_path / "sft" / "tensorboard")["eval/ce_loss"]]
    assert losses[-1] < losses[0] and empty_charts(sft) == []
    flags = ["--use-checkpoint-args", "--pretrained-checkpoint", str(tmp_path / "sft"),
             "--save", str(tmp_path / "ebft"), "--load", str(tmp_path / "ebft")]
    args = arguments(*flags)
    args.num_layers = args.hidden_size = args.num_attention_heads = None  # must come from the checkpoint
    run, _ = start(args)
    trained = weights(tmp_path / "sft")
    assert all(torch.equal(p, trained[name]) for name, p in unwrap(run.encoder).named_parameters())
    save(run, args.save)
    with pytest.raises(ValueError, match="--ebft-encoder-load: the encoder's weights are not those"):
        build_run(arguments("--load", str(tmp_path / "ebft"), "--seed", "7"))
    with pytest.raises(ValueError, match="was saved by --training-mode sft"):
        build_run(arguments("--load", str(tmp_path / "sft")))


def test_an_encoder_of_its_own(arguments, tmp_path, one_rank):
    """An SFT start with the base model as encoder: recorded, found again on resume, refused when it is another."""
    for name, seed in (("base", "1"), ("start", "2")):
        run = build_run(arguments("--training-mode", "sft", "--seed", seed, "--save", str(tmp_path / name)))
        save(run, tmp_path / name)
    flags = ["--pretrained-checkpoint", str(tmp_path / "start"), "--save", str(tmp_path), "--load", str(tmp_path)]
    run = build_run(arguments(*flags, "--ebft-encoder-load", str(tmp_path / "base")))
    base, begun = weights(tmp_path / "base"), weights(tmp_path / "start")
    assert all(torch.equal(p, base[name]) for name, p in unwrap(run.encoder).named_parameters())
    assert all(torch.equal(p, begun[name]) for name, p in unwrap(run.policy[0]).named_parameters())
    save(run, tmp_path)
    build_run(arguments(*flags, "--ebft-encoder-load", str(tmp_path / "base")))
    build_run(arguments("--pretrained-checkpoint", "", "--ebft-encoder-load", ""))  # a script's empty variables
    with pytest.raises(ValueError, match="--ebft-encoder-load: the encoder's weights are not those"):
        build_run(arguments(*flags))


def test_longer_rows_than_the_checkpoint_was_trained_on(arguments, tmp_path, one_rank):
    run = build_run(arguments("--training-mode", "sft", "--save", str(tmp_path)))
    save(run, tmp_path)
    flags = ["--pretrained-checkpoint", str(tmp_path), "--use-checkpoint-args", "--seq-length", "48"]
    with pytest.raises(ValueError, match="--seq-length 48: longer than --max-position-embeddings 24; raise it"):
        build_run(arguments(*flags))
    args = arguments(*flags, "--max-position-embeddings", "48")
    args.vocab_size = args.num_layers = None
    assert build_run(args).metadata["architecture"]["max_position_embeddings"] == 48


@pytest.mark.parametrize("flags", [
    ["--bf16"], ["--bf16", "--recompute-granularity", "full", "--ebft-document-mask"], ["--ebft-whitening", "released"],
    ["--normalization", "LayerNorm", "--no-swiglu", "--add-bias-linear"],
    ["--position-embedding-type", "learned_absolute"],
    ["--qk-layernorm", "--add-qkv-bias", "--rotary-percent", "0.5", "--untie-embeddings-and-output-weights"],
    ["--ebft-num-samples", "1", "--ebft-advantage", "reinforce", "--ebft-feature-norm", "layer"],
    ["--ebft-top-p", "0.9", "--ebft-top-k", "5", "--ebft-feature-pooling", "mean", "--ebft-whitening", "paper"]])
def test_every_kind_of_model_and_method_trains(arguments, tmp_path, one_rank, flags):
    """The first step checks itself: sampler = trainer = start, rewards finite."""
    run, log = start(arguments("--tensorboard-dir", str(tmp_path), "--train-iters", "2", *flags))
    train(run, log)
    logged = scalars(tmp_path)
    assert len(logged["train/loss"]) == 2 and all(math.isfinite(v) for points in logged.values() for _, v in points)


def test_short_answers_are_evaluated_at_the_lengths_they_have(arguments, one_rank):
    """Nothing measured is left out, not reported as 0; each length counts the blocks whose completion it can hold."""
    run = build_run(arguments("--eval-interval", "0"))
    gold = gold_batch(run, run.train_data, 0)
    answers = torch.zeros_like(gold.tokens_BT, dtype=torch.bool)
    answers[:, 4:6] = answers[:, 12:15] = True  # the anchors of evaluation are 4 and 12, its completions up to 8 long
    gold.answer_BT = answers
    metrics, _ = evaluate(run.policy, run.encoder, run.start, [gold], run.config, 8, 1)
    assert {name for name in metrics if name.startswith("cfm_length")} == {"cfm_length/01", "cfm_length/02"}
    assert abs(metrics["kl_to_start"]) < 1e-7 and metrics["entropy"] > 1

    gold.answer_BT = answers & False
    metrics, _ = evaluate(run.policy, run.encoder, run.start, [gold], run.config, 8, 1)
    assert metrics == {}


def test_a_checkpoint_of_another_tokenizer_is_refused(arguments, tmp_path, one_rank):
    run, _ = start(arguments("--save", str(tmp_path)))
    run.metadata["tokenizer"]["fingerprint"] = "another"
    save(run, tmp_path)
    for flag in ("--load", "--ebft-encoder-load", "--pretrained-checkpoint"):
        with pytest.raises(ValueError, match=f"--tokenizer-model: {flag} was trained with another"):
            build_run(arguments(flag, str(tmp_path)))


@pytest.mark.parametrize("where", ["policy", "encoder"])
@pytest.mark.parametrize("check, message", [(True, "self-check failed.*not finite"),
                                            (False, "not finite, stopped before")])
@pytest.mark.parametrize("whitening", ["none", "paper"])
def test_a_number_that_is_not_finite_stops_before_the_step(arguments, one_rank, where, check, message, whitening):
    run = build_run(arguments("--eval-interval", "0", "--ebft-whitening", whitening))
    broken = unwrap(run.policy[0] if where == "policy" else run.encoder)
    with torch.no_grad():
        broken.decoder.layers[0].mlp.linear_fc1.weight[0, 0] = torch.nan
    before = [p.detach().clone() for p in run.policy[0].parameters()]
    with pytest.raises(RuntimeError, match=message):
        train_step(run, gold_batch(run, run.train_data, 0), PhaseTimer(), check)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, run.policy[0].parameters()))


def test_the_first_step_notices_a_sampler_that_is_not_the_trainer(arguments, tmp_path, one_rank, monkeypatch):
    run, log = start(arguments("--tensorboard-dir", str(tmp_path), "--eval-interval", "0"))
    draws = sampler.Draws
    monkeypatch.setattr(sampler, "Draws", lambda rows, u, temperature, *rest: draws(rows, u, 1.1 * temperature, *rest))
    with pytest.raises(RuntimeError, match="sampler's log-probabilities differ"):
        train(run, log)


@pytest.mark.parametrize("flags, message", [
    (["--ebft-num-samples", "1"], "--ebft-num-samples 1 with --ebft-advantage rloo: needs at least 2"),
    (["--seq-length", "7"], "--seq-length 7 is too short for one block"),
    (["--ebft-stride", "0"], "--ebft-stride 0: must be at least 1"),
    (["--ebft-temperature", "0"], "--ebft-temperature 0.0: must be above 0"),
    (["--ebft-top-p", "1.5"], "--ebft-top-p 1.5: must be above 0 and at most 1"),
    (["--ebft-feature-layers", "0.1", "0.5"], "--ebft-feature-layers 0.1 0.5: with --num-layers 4 these are layers"),
    (["--global-batch-size", "3", "--micro-batch-size", "2"], "--global-batch-size 3: must be a multiple"),
    (["--lr", "nan"], "--lr nan"),
    (["--ebft-diversity-coef", "nan"], "--ebft-diversity-coef nan"),
    (["--num-attention-heads", "0"], "--num-attention-heads 0: must be at least 1"),
    (["--num-query-groups", "3"], "must be a multiple of --num-query-groups 3"),
    (["--tensor-model-parallel-size", "3"], "--num-attention-heads 4: must be a multiple of --tensor-model-parallel"),
    (["--kv-channels", "7"], r"--rotary-percent 1.0: rotates 7 of the 7 dimensions of a head \(--kv-channels\)"),
    (["--num-layers", "2147483647"], "--num-layers 2147483647 --hidden-size 32 .* on each rank, which has"),
    (["--ebft-num-samples", "2147483647"], "--ebft-num-samples 2147483647: the .* rollouts of a row take"),
    (["--rotary-percent", "0.2"], "--rotary-percent 0.2: rotates 1 of the 8 dimensions of a head"),
    (["--tensor-model-parallel-size", "16", "--sequence-parallel"], "--seq-length 24: with --sequence-parallel"),
    (["--pipeline-model-parallel-size", "3"], "--num-layers 4: cannot be split evenly"),
    (["--num-virtual-stages-per-pipeline-rank", "2"], "--num-virtual-stages-per-pipeline-rank: needs --pipeline-model"),
    (["--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"],
     "needs a multiple of --pipeline-model-parallel-size 4"),
    (["--ebft-sample-parallel-size", "3"], "--ebft-sample-parallel-size 3: must divide --ebft-num-samples"),
    (["--context-parallel-size", "2"], "--context-parallel-size 2: the strided attention needs whole rows"),
    (["--num-experts", "8"], "--num-experts 8: mixture-of-experts models are not supported"),
    (["--num-layers-per-virtual-pipeline-stage", "1"], "stage 1: use --num-virtual-stages-per-pipeline-rank"),
    (["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "9"], "--num-layers 4: fewer than"),
    (["--moe-router-topk", "2"], "unrecognized arguments: --moe-router-topk"),
    (["--use-megatron-fsdp"], "--use-megatron-fsdp: use the distributed optimizer"),
    (["--fp8-param-gather"], "--fp8-param-gather: weights stay in bf16"),
    (["--fp8-format", "hybrid"], "--seq-length 24: with --fp8-format it must be a multiple of 128"),
    (["--fp8-format", "hybrid", "--fp8-recipe", "delayed"], "--fp8-recipe: invalid choice: 'delayed'"),
    (["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--seq-length", "32"],
     "--fp8-format hybrid: no CUDA device. The training pass has no FP8 without Transformer Engine"),
    (["--ebft-rollout-fp8", "blockwise", "--sequence-parallel", "--tensor-model-parallel-size", "2", "--seq-length",
      "48"], r"--seq-length 48: with --ebft-rollout-fp8 .* a multiple of 32 \(16 on each tensor rank\)"),
    (["--ebft-rollout-fp8", "blockwise"], "--seq-length 24: with --ebft-rollout-fp8 .* a multiple of 16"),
    (["--ebft-encoder-fp8", "tensorwise", "--seq-length", "32"], "--ebft-encoder-fp8 tensorwise: no CUDA device.*"
     "--ebft-fp8-emulate computes the same"),
    (["--load", "/nowhere"], "--load /nowhere"),
    (["--pretrained-checkpoint", "/nowhere"], "--pretrained-checkpoint /nowhere: no such directory"),
    (["--use-checkpoint-args"], "--use-checkpoint-args: needs --load or --pretrained-checkpoint"),
    (["--data-path", "/nowhere/set"], "--data-path /nowhere/set"),
    (["--vocab-size", "63"], "--tokenizer-model: .* was made with another tokenizer"),
    (["--ebft-answer-only"], "--ebft-answer-only: --data-path .* has no answer mask"),
    (["--max-position-embeddings", "16"], "--seq-length 24: longer than --max-position-embeddings 16"),
])
def test_bad_flags_are_named(arguments, tmp_path, one_rank, flags, message):
    with pytest.raises(ValueError, match=message):
        build_run(arguments("--tensorboard-dir", str(tmp_path), *flags))


def test_unknown_values_name_their_flag():
    with pytest.raises(ValueError, match="--ebft-whitening: invalid choice: 'zca'"):
        parse_args(["--train-iters", "1", "--ebft-whitening", "zca"])


def test_a_world_that_does_not_fit_is_refused(data):
    ranks = start_ranks([*data, *MODEL, *SMALL, "--train-iters", "1", "--global-batch-size", "3"])
    output = ranks[0].output.read()
    assert [rank.wait() for rank in ranks] == [64, 64] and "Traceback" not in output
    assert "error: --global-batch-size 3: must be a multiple of --micro-batch-size 1 × 2 ranks" in output
