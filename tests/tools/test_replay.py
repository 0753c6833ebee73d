"""Steps in files: the golden ones recomputed by tools/replay.py, and those of a training run dumped and replayed.

One start of 4 ranks forms one world after another, in which the entry points of tools/replay.py and of training run as
they are (`rank_work`); the tests look at the files they leave.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from golden import GOLDEN, STEPS, by_sample
from models import largest_difference, relative_error
from preprocess_data import main as preprocess
from ranks import enter_world, run_ranks
from safetensors.torch import load_file
from small_run import MODEL, SMALL, VOCAB, scalars, weights
from step_files import metadata, put, tampered

from megatron_ebft import train
from megatron_ebft.common.device import init_device
from megatron_ebft.common.errors import StepFailed
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.layout.step_major import from_step_major
from megatron_ebft.method import energy
from megatron_ebft.model.weights import unwrap
from megatron_ebft.run.build import build_run
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import gold_batch, train_step
from megatron_ebft.run.step_file import INPUTS, read_step

TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
LAYOUTS = {  # ranks, flags
    "1x1": (1, []), "tp2 pp2": (4, TP2_PP2), "dp2": (2, []),
    "tp2 sp samples2": (4, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--ebft-sample-parallel-size",
                            "2", "--ebft-blocks-per-microbatch", "3"]),
    "pp2 vp2": (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"])}
REPLAYED = [*((name, layout) for name in STEPS for layout in ("1x1", "tp2 pp2")),
            ("step", "dp2"), ("step_whitened", "tp2 sp samples2"), ("step_translation", "pp2 vp2")]
TOLERANCE = {"log_probs": 2e-5}
RUNS = {  # ranks, flags, the run whose steps are replayed
    "one": (1, ["--ebft-step", "separate"], None), "one again": (1, [], "one"),
    "four": (4, [*TP2_PP2, "--sequence-parallel"], None),
    "samples": (4, ["--ebft-sample-parallel-size", "2"], "one"),
    "samples again": (4, ["--ebft-sample-parallel-size", "2"], "samples")}
METHOD = ["--train-iters", "3", "--lr", "1e-3", "--eval-interval", "0", "--ebft-kl-coef", "0.1", "--ebft-document-mask",
          "--ebft-answer-only", "--ebft-whitening", "paper", "--ebft-feature-norm", "layer", "--ebft-num-samples", "6"]


# ---------------------------------------------------------------- what the ranks do


def rank_work(folder: str, data: list[str]) -> None:
    """Replays of golden steps, training runs that dump or replay, and replays of their third step."""
    import replay

    init_device()

    def run(main, world: int, argv: list[str]) -> None:
        """An entry point on the first `world` ranks; it leaves the process groups itself."""
        if enter_world(world):
            main(argv)

    llama = ["--hf-model", str(GOLDEN / "llama")]
    for name, layout in REPLAYED:
        world, flags = LAYOUTS[layout]
        run(replay.main, world, [*llama, "--batch", str(GOLDEN / f"{name}.safetensors"), "--output",
                                 f"{folder}/{name} {layout}.safetensors", *flags])
    common = [*data, *MODEL, *SMALL]
    run(train.main, 1, [*common, "--training-mode", "sft", "--train-iters", "1", "--eval-interval", "0", "--save",
                        f"{folder}/start"])
    for name, (world, flags, replayed) in RUNS.items():
        # Another seed: other rows and rollouts, if they were not taken from the steps.
        source = ["--ebft-replay-steps", f"{folder}/{replayed}/steps", "--seed", "7"] if replayed else []
        run(train.main, world, [*common, *METHOD, *flags, *source, "--pretrained-checkpoint", f"{folder}/start",
                                "--save", f"{folder}/{name}", "--save-interval", "2" if name == "one" else "3",
                                "--ebft-dump-steps", f"{folder}/{name}/steps"])
    for layout in ("1x1", "tp2 pp2"):
        world, flags = LAYOUTS[layout]
        run(replay.main, world, ["--load", f"{folder}/one/iter_0000002", "--pretrained-checkpoint", f"{folder}/start",
                                 "--batch", str(dumped(folder, "one", 3)), "--output", f"{folder}/{layout}.safetensors",
                                 *flags])


def dumped(folder, run: str, iteration: int) -> Path:
    return Path(folder, run, "steps", f"step_{iteration:07d}.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a dataset of questions and answers, whose ids count in steps of 3."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    with open(folder / "qa.jsonl", "w") as file:
        for _ in range(60):
            first, length = torch.randint(0, VOCAB - 1, (2,), generator=generator).tolist()
            ids = [str((first + 3 * i) % (VOCAB - 1)) for i in range(12 + length % 16)]
            file.write(json.dumps({"q": " ".join(ids[:5]), "a": " ".join(ids[5:])}) + "\n")
    preprocess(["--input", str(folder / "qa.jsonl"), "--output-prefix", str(folder / "set"), "--tokenizer-type",
                "NullTokenizer", "--vocab-size", str(VOCAB), "--question-key", "q", "--answer-key", "a"])
    return ["--data-path", str(folder / "set_text_document"), "--split", "80,20,0"]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Where the ranks left their files."""
    folder = tmp_path_factory.mktemp("replay")
    run_ranks(4, "test_replay:rank_work", str(folder), data)
    return folder


# ---------------------------------------------------------------- tools/replay.py


@pytest.mark.parametrize(("name", "layout"), REPLAYED)
def test_golden_steps(folder, name, layout):
    golden, replayed = load_file(GOLDEN / f"{name}.safetensors"), load_file(folder / f"{name} {layout}.safetensors")
    assert replayed.keys() - golden.keys() == {"index"} and not golden.keys() - replayed.keys()
    for key, expected in golden.items():
        assert replayed[key].dtype == expected.dtype
        if key.startswith("grad."):
            assert relative_error(replayed[key], expected) <= 1e-5, key
        elif key in INPUTS:
            assert torch.equal(replayed[key], expected), key
        else:
            assert largest_difference(replayed[key], expected) <= TOLERANCE.get(key, 1e-5), key
    before = metadata(GOLDEN / f"{name}.safetensors")
    assert before.items() <= metadata(folder / f"{name} {layout}.safetensors").items()


@pytest.mark.parametrize("layout", ["1x1", "tp2 pp2"])
def test_a_step_of_a_run(folder, layout):
    """Masks, whitening, layer norm of features and the KL term are taken from the file; weights from checkpoints."""
    expected, replayed = load_file(dumped(folder, "one", 3)), load_file(folder / f"{layout}.safetensors")
    assert {key for key in replayed.keys() - expected.keys() if not key.startswith("grad.")} == {
        "features_gold", "features_rollout"}
    for key, value in expected.items():
        assert largest_difference(replayed[key], value) <= (0 if key in INPUTS else TOLERANCE.get(key, 1e-5)), key
    assert replayed["kl_loss"] > 1e-6
    assert json.loads(metadata(folder / f"{layout}.safetensors")["flags"])["iteration"] == 3
    norm = sum(value.square().sum() for key, value in replayed.items() if key.startswith("grad.")).sqrt()
    assert norm.item() == pytest.approx(scalars(folder / "one" / "tensorboard")["train/grad_norm"][2][1], rel=1e-4)


def test_an_encoder_in_fp8(tmp_path):
    """The flags are the run's, and the file's rewards are those of the file's features."""
    import replay

    output = tmp_path / "out.safetensors"
    replay.main(["--hf-model", str(GOLDEN / "llama"), "--batch", str(GOLDEN / "step.safetensors"), "--output",
                 str(output), "--tolerance", "10", "--ebft-encoder-fp8", "blockwise", "--ebft-fp8-emulate"])
    golden, replayed = load_file(GOLDEN / "step.safetensors"), load_file(output)
    assert 1e-3 < relative_error(replayed["features_rollout"], golden["features_rollout"]) < 0.3
    features = torch.cat([replayed["features_rollout"], replayed["features_gold"][:, None]], dim=1).transpose(1, 2)
    alignment, _ = energy.rewards(features @ features.mT, "none")
    assert largest_difference(alignment, by_sample(replayed["alignment"], replayed["docs"])) <= 1e-5


# ---------------------------------------------------------------- training


def test_a_dump_holds_the_step(folder):
    """The masks are there and matter, and what the sampler said is what the training pass says."""
    step = read_step(str(dumped(folder, "one", 2)), "--batch", VOCAB)
    tensors, valid = load_file(dumped(folder, "one", 2)), step.gold.valid_blocks(step.layout)
    assert tensors.keys() == {*INPUTS, "alignment", "diversity", "reward", "advantage", "log_probs", "rl_loss",
                              "ce_loss", "kl_loss"}
    assert step.iteration == 2 and step.gold.index_B.tolist() == [2, 3] and 0 < valid.sum() < valid.numel()
    assert step.gold.document_BT.max() > 0 and not step.gold.answer_BT.all()
    of_rollouts = tensors["log_probs"][:, step.layout.seq_length - 1:]
    assert largest_difference(tensors["sampler_log_probs"], of_rollouts) <= 2e-5
    logged = scalars(folder / "one" / "tensorboard")
    for key in ("rl_loss", "ce_loss", "kl_loss"):
        assert tensors[key].item() == pytest.approx(logged[f"train/{key}"][1][1], abs=1e-7)
    reward = from_step_major(step.layout, tensors["reward"]).squeeze(-1)[valid].mean().item()
    assert reward == pytest.approx(logged["train/reward"][1][1], abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [("one", "one again"), ("samples", "samples again")])
def test_a_replayed_run_is_the_same_to_the_last_bit(folder, one_rank, first, second):
    expected, actual = scalars(folder / first / "tensorboard"), scalars(folder / second / "tensorboard")
    assert expected.keys() == actual.keys() and len(expected["train/loss"]) == 3
    for tag in expected:
        if not tag.startswith(("seconds/", "run/")) and tag != "train/tokens_per_second":
            assert actual[tag] == expected[tag], tag
    trained, again = weights(folder / first), weights(folder / second)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())
    for iteration in (1, 2, 3):
        a, b = (load_file(dumped(folder, run, iteration)) for run in (first, second))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("other", ["four", "samples"])
def test_another_layout_dumps_the_same(folder, other):
    """Sampled there, or replayed from here."""
    for iteration in (1, 2, 3):
        expected, actual = (load_file(dumped(folder, run, iteration)) for run in ("one", other))
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            if not value.is_floating_point():
                assert torch.equal(actual[key], value), (key, iteration)
            else:
                assert largest_difference(actual[key], value) <= 2e-5, (key, iteration)


@pytest.fixture
def arguments(data, folder):
    """Flags → parsed arguments of a run like "one"."""
    return lambda *more: parse_args([*data, *MODEL, *SMALL, *METHOD, "--pretrained-checkpoint", str(folder / "start"),
                                     *more])


@pytest.mark.parametrize(("where", "check", "key"), [("policy", True, "log_probs"), ("encoder", False, "advantage")])
def test_a_step_that_fails_is_dumped(arguments, tmp_path, one_rank, where, check, key):
    """Whatever the interval; and the steps between are not."""
    run = build_run(arguments("--ebft-dump-steps", str(tmp_path), "--ebft-dump-interval", "2"))
    train_step(run, gold_batch(run, run.train_data, 0), PhaseTimer(), check=True)
    assert not list(tmp_path.iterdir())
    run.state.iteration = 2
    broken = unwrap(run.policy[0] if where == "policy" else run.encoder)
    with torch.no_grad():
        broken.decoder.layers[0].mlp.linear_fc1.weight[0, 0] = torch.nan
    with pytest.raises(StepFailed):
        train_step(run, gold_batch(run, run.train_data, 4), PhaseTimer(), check)
    path = tmp_path / "step_0000003.safetensors"
    assert list(tmp_path.iterdir()) == [path]
    assert load_file(path)[key].isnan().all() and load_file(path)["index"].tolist() == [4, 5]


# ---------------------------------------------------------------- steps that cannot be replayed


@pytest.mark.parametrize(("flags", "message"), [
    (["--train-iters", "4"], "step_0000004.safetensors: no such file"),
    (["--ebft-rollout-length", "3"], "was made with --ebft-rollout-length 4, and this run has 3"),
    (["--global-batch-size", "4"], "was made with --global-batch-size 2, and this run has 4"),
    (["--ebft-temperature", "1"], "was made with --ebft-temperature 0.6, and this run has 1.0"),
    (["--no-ebft-document-mask"], "was made with --ebft-document-mask True, and this run has False"),
    (["--no-ebft-answer-only"], "was made with --ebft-answer-only True, and this run has False"),
    (["--training-mode", "sft"], "--ebft-replay-steps: next-token training has no rollouts"),
])
def test_steps_that_are_not_the_runs_are_refused(arguments, folder, one_rank, flags, message):
    with pytest.raises(ValueError, match=message):
        build_run(arguments("--ebft-replay-steps", str(folder / "one" / "steps"), *flags))


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, _: tensors.pop("entropy"), "has no sampler_log_probs and entropy"),
    (put(1, flags=json.dumps({"iteration": 2})), "is step 2, not 1"),
])
def test_files_that_training_cannot_replay_are_refused(arguments, folder, tmp_path, one_rank, change, message):
    path = tampered(tmp_path, change, dumped(folder, "one", 1))
    with pytest.raises(ValueError, match=f"--ebft-replay-steps {path}: {message}"):
        build_run(arguments("--ebft-replay-steps", str(tmp_path), "--train-iters", "1"))


def test_a_folder_that_cannot_be_written_is_named(arguments, tmp_path, one_rank, capsys):
    """It neither ends the run nor hides why a step failed."""
    (tmp_path / "file").write_text("")
    message = "warning: --ebft-dump-steps .*step_0000001.safetensors: cannot be written"
    run = build_run(arguments("--ebft-dump-steps", str(tmp_path / "file")))
    train_step(run, gold_batch(run, run.train_data, 0), PhaseTimer(), check=False)
    assert re.search(message, capsys.readouterr().out)
    with torch.no_grad():
        unwrap(run.encoder).decoder.layers[0].mlp.linear_fc1.weight[0, 0] = torch.nan
    with pytest.raises(StepFailed, match="not finite, stopped before the optimizer step"):
        train_step(run, gold_batch(run, run.train_data, 0), PhaseTimer(), check=False)
    assert re.search(message, capsys.readouterr().out)


def test_methods_flags_travel(folder):
    """Through the file of a run, and of its replay on another layout: what is not in the golden entries as well."""
    for path in (dumped(folder, "one", 3), folder / "tp2 pp2.safetensors"):
        args = read_step(str(path), "--batch", VOCAB).args
        assert (args.ebft_whitening, args.ebft_feature_norm, args.ebft_kl_coef) == ("paper", "layer", 0.1)
