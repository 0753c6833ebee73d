"""RLVR as a training run: it learns, continues bit for bit, and refuses what cannot work."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from paced import Pace
from small_run import MODEL, TIMED, TOKENIZER, empty_charts, finish, save, scalars, start, start_ranks, weights

from megatron_ebft.method import rlvr
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.parallel import groups
from megatron_ebft.rollout import generation
from megatron_ebft.run.build import build_run
from megatron_ebft.run.describe import describe
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import next_batch, train
from megatron_ebft.run.stopping import CannotGoOn

LINES = [{"prompt": str(i), "answer": str(8 + i % 2)} for i in range(8)]
"""Of even numbers the answer is 8, of odd ones 9; then a completion must end, with the id 10."""


def flags_of(folder: Path, *more: str, lines: list[dict] = LINES) -> list[str]:
    """Flags of an RLVR run of seconds."""
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*MODEL, *TOKENIZER, "--vocab-size", "11", "--num-layers", "2", "--init-method-std", "0.1",
            "--training-mode", "rlvr", "--ebft-questions", str(folder / "questions.jsonl"), "--ebft-verifier", "exact",
            "--ebft-verifier-workers", "1", "--seq-length", "24", "--ebft-max-new-tokens", "2", "--global-batch-size",
            "8", "--ebft-rlvr-num-samples", "16", "--lr", "1e-2", "--train-iters", "6", "--tensorboard-dir",
            str(folder / "tensorboard"), *more]


@pytest.fixture
def built(tmp_path, one_rank):
    """Flags → the run. Its verifier ends with the test."""
    runs = []

    def build(*more: str, **options):
        args = parse_args(flags_of(tmp_path, *more, **options))
        groups.set_seed(args.seed)
        runs.append(start(args))
        return runs[-1]

    yield build
    for run, _ in runs:
        run.rlvr.verification.close()
        if run.eval_questions is not None:
            run.eval_questions.verification.close()


def test_a_run_learns_to_answer(built, tmp_path, capsys):
    run, log = built("--train-iters", "35", "--num-layers", "1", "--log-throughput")
    described = describe(run)
    assert run.rlvr.config.generation.rows == 64 < 8 * 16  # of the step's 128 completions
    assert "8 questions of" in described and "× 16 completions of up to 2 tokens | rewards by exact" in described
    assert train(run, log)
    log.close(0.0)
    logged = scalars(tmp_path / "tensorboard")
    assert empty_charts(run.args) == []
    success = [value for _, value in logged["train/success"]]
    assert success[0] < 0.3 and min(success[-3:]) > 0.9, success
    assert [value for _, value in logged["train/reward"]] == success
    assert logged["train/finished"][-1][1] > 0.9 and logged["train/zero_spread"][-1][1] > 0.5
    assert all(value < 1e-4 for _, value in logged["train/mismatch"])
    assert {f"seconds/{name}" for name in ("rollout", "verify", "train", "optimizer")} <= logged.keys()
    assert all(own < step - verify for (_, own), (_, step), (_, verify) in zip(
        logged["ranks/own_seconds_max"], logged["seconds/step"], logged["seconds/verify"], strict=True))
    assert "throughput/gold_tokens_per_second_per_gpu" not in logged
    console = capsys.readouterr().out
    assert all(word in console for word in ("| loss ", " right ", " no spread ", " length ", " finished "))


def test_a_killed_run_continues_bit_for_bit(data, tmp_path):
    """With a KL term to the start, and evaluation of held-out rows."""
    def flags(folder: Path) -> list[str]:
        folder.mkdir(exist_ok=True)
        return flags_of(folder, *data, "--ebft-kl-coef", "0.1", "--eval-interval", "3", "--eval-iters", "1",
                        "--save-interval", "3", "--save", str(folder), "--load", str(folder), "--vocab-size", "64")

    whole, killed, pace = tmp_path / "whole", tmp_path / "killed", Pace(tmp_path / "pace")
    finish(start_ranks(flags(whole), 1))
    pace.allow(4)
    rank, = start_ranks(flags(killed), 1, pace=pace.file)
    for line in rank.output:
        if line.startswith("saved"):  # iteration 3 is whole; step 4 has begun, or waits at its end
            time.sleep(0.05)
            os.killpg(rank.pid, signal.SIGKILL)
            break
    assert rank.wait() == -signal.SIGKILL
    output = finish(start_ranks(flags(killed), 1))
    assert "step 3/6" not in output and "step 4/6" in output
    expected, logged = scalars(whole / "tensorboard"), scalars(killed / "tensorboard")
    for tag in (tag for tag in expected if not tag.startswith(TIMED)):
        assert logged[tag] == expected[tag], tag
    assert len(logged["train/kl_loss"]) == 6 and len(logged["eval/ce_loss"]) == 3
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(killed)[name]), name


def test_other_questions_and_another_start_are_refused_on_resume(built, tmp_path):
    folder = str(tmp_path / "run")
    run, _ = built("--save", folder, "--ebft-kl-coef", "0.1")
    save(run, folder)
    with pytest.raises(ValueError, match="questions.jsonl: are not the data that --load .*--ebft-allow-changed-data"):
        built("--save", folder, "--ebft-kl-coef", "0.1", lines=LINES[1:])
    run, _ = built("--save", folder, "--ebft-kl-coef", "0.1", "--ebft-allow-changed-data", lines=LINES[1:])
    assert f"content of {tmp_path}/questions.jsonl" in run.metadata["changed"]
    with pytest.raises(ValueError, match="--seed 7: --load .* was trained with --seed 1234: the initial weights"):
        built("--save", folder, "--ebft-kl-coef", "0.1", "--seed", "7")
    built("--save", folder, "--seed", "7")  # nothing asks for the start
    with pytest.raises(ValueError, match="was saved by --training-mode rlvr"):
        built("--save", folder, "--training-mode", "sft", "--ebft-questions", "", "--ebft-verifier", "")


def test_a_step_takes_the_questions_after_those_consumed(built):
    run, _ = built("--global-batch-size", "3")
    drawn = []
    for run.state.consumed_samples in (0, 3, 6):
        drawn += [question.fields["prompt"] for question in next_batch(run)[0]]
    assert sorted(drawn[:8]) == sorted(line["prompt"] for line in LINES)


def test_a_question_draws_other_completions_when_it_comes_again(built, monkeypatch):
    """Two questions, four times in a batch."""
    run, log = built("--global-batch-size", "8", "--train-iters", "1", lines=LINES[:2])
    drawn = []
    monkeypatch.setattr(rlvr, "generate", lambda *args, **options: drawn.extend(
        groups := generation.generate(*args, **options)) or groups)
    assert train(run, log)
    assert len({str([completion.tokens for completion in group]) for group in drawn}) == len(drawn) == 8


def test_the_first_step_notices_a_sampler_that_is_not_the_trainer(built, monkeypatch):
    run, log = built("--train-iters", "40", "--lr", "0")
    sample = generation.sample
    monkeypatch.setattr(generation, "sample", lambda logits, real, numbers, temperature, *rest: sample(
        logits, real, numbers, 1.1 * temperature, *rest))
    with pytest.raises(RuntimeError, match="sampler's log-probabilities differ"):
        train(run, log)


def test_fp8_is_measured_apart(built, capsys):
    """What FP8 adds passes the check of the first step, and is logged."""
    run, log = built("--ebft-rollout-fp8", "blockwise", "--ebft-fp8-emulate", "--seq-length", "32", "--train-iters",
                     "1")
    assert run.rlvr.config.generation.fp8 == FP8("blockwise", True, 0, 0, "--ebft-rollout-fp8")
    assert "rollouts run in FP8 and the training pass does not" in describe(run)
    assert train(run, log)


def test_a_warning_where_nothing_is_learnt(built, capsys):
    run, log = built("--train-iters", "2", lines=[{"prompt": "1", "answer": "no number"}])
    assert train(run, log)
    console = capsys.readouterr().out
    assert console.count("have equal rewards, so nothing is learnt; 0% are right") == 1
    assert console.count("no spread 100.0%") == 2


USERS = """
def judge(question, completion):
    if question["prompt"] in "1357"[:question["wrong"]]:
        raise KeyError("field")
    return completion == "8"
"""


@pytest.mark.parametrize("wrong", [2, 4])
def test_a_verifier_that_fails_is_told_from_wrong_answers(built, tmp_path, monkeypatch, capsys, wrong):
    """It warns once, and logs the share; where it can judge nothing, the run saves and ends, before or after."""
    (tmp_path / "failing.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    lines, asked = [{"prompt": x, "wrong": wrong} for x in "1357"], tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "1", "wrong": 0}) + "\n")
    run, log = built("--train-iters", "2", "--ebft-verifier", "failing:judge", "--ebft-eval-questions", str(asked),
                     "--ebft-eval-top-p", "0.5", "--ebft-eval-top-k", "3", lines=lines)
    generation = run.eval_questions.config.generation
    assert (generation.top_p, generation.top_k, generation.rows) == (0.5, 3, 64)
    name = "--ebft-verifier failing:judge"
    if wrong == 4:
        with pytest.raises(CannotGoOn, match=f"^{name}: could judge none of 128 answers. .*: KeyError: 'field'. Mend"):
            train(run, log)
        assert run.state.iteration == 0
        return
    assert train(run, log)
    log.close(0.0)
    assert scalars(tmp_path / "tensorboard")["train/verifier_failed"] == [(1, 0.5), (2, 0.5)]
    assert scalars(tmp_path / "tensorboard")["eval/answers/failed"] == [(0, 0.0), (2, 0.0)]
    console = capsys.readouterr().out
    assert console.count(f"warning: step 1: {name} could not judge 64 of 128 answers") == 1
    assert console.count("could not judge") == 1
    asked.write_text(json.dumps({"prompt": "1", "wrong": 4}) + "\n")
    run, log = built("--ebft-verifier", "failing:judge", "--ebft-eval-questions", str(asked), lines=lines)
    with pytest.raises(CannotGoOn, match=f"^{name}: could judge none of 1 answers"):
        train(run, log)


@pytest.mark.parametrize("flags, message", [
    (["--ebft-questions", ""], "--training-mode rlvr: needs --ebft-questions"),
    (["--ebft-verifier", ""], "--training-mode rlvr: needs --ebft-verifier"),
    (["--ebft-max-new-tokens", "24"], "--ebft-max-new-tokens 24: leaves no room for a prompt"),
    (["--ebft-rlvr-num-samples", "1"], "--ebft-rlvr-num-samples 1 with --ebft-advantage rloo: needs at least 2"),
    (["--ebft-sample-parallel-size", "2"], "--ebft-sample-parallel-size 2: RLVR has no rollouts of blocks to split"),
    (["--ebft-dump-steps", "x"], "--ebft-dump-steps: RLVR has no rollouts of blocks"),
    (["--training-mode", "sft"], "--ebft-questions .*: needs --training-mode rlvr"),
    (["--ebft-rlvr-temperature", "0"], "--ebft-rlvr-temperature 0.0: must be above 0"),
    (["--ebft-stop", "x", ""], "--ebft-stop '': an empty text is in every completion"),
    (["--ebft-verifier", "other"], "--ebft-verifier other: "),
    (["--ebft-max-new-tokens", "23"], None)])
def test_flags_that_cannot_work_are_named(tmp_path, one_rank, flags, message):
    flags = flags_of(tmp_path, *flags)
    if message is None:
        parse_args(flags)
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        build_run(parse_args(flags))


def test_a_question_that_cannot_be_verified_is_named(built):
    with pytest.raises(ValueError, match="--ebft-questions .*questions.jsonl:2: .*answer"):
        built(lines=[{"prompt": "1", "answer": "1"}, {"prompt": "2"}])
