"""Files of steps: the order of their tokens; which files and flags tools/replay.py refuses."""

import json

import brute_force as bf
import pytest
import replay
import torch
from golden import GOLDEN, STEPS, load_golden
from step_files import put, tampered

from megatron_ebft.layout.step_major import from_step_major, step_major_positions, to_step_major
from megatron_ebft.layout.strided import StridedLayout, document_starts


@pytest.mark.parametrize("name", STEPS)
def test_a_file_is_step_major(name):
    golden, settings, docs, tokens = load_golden(name)
    g, (rows, length) = settings.geometry, docs.shape
    layout = StridedLayout(length, g.context, g.stride, g.rollout_length, g.num_samples)
    assert torch.equal(from_step_major(layout, golden["sequences"][:, length:]), tokens)
    assert torch.equal(to_step_major(layout, tokens, docs), golden["sequences"])
    assert torch.equal(step_major_positions(layout, None, rows), golden["position_ids"])


def test_positions_in_a_file_restart_at_documents():
    eod, geometry = 0, bf.Geometry(3, 2, 4, 2)
    tokens = torch.randint(0, 4, (3, 20), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([bf.document_ids(row, eod) for row in tokens])
    layout = StridedLayout(20, geometry.context, geometry.stride, geometry.rollout_length, geometry.num_samples)
    positions = step_major_positions(layout, document_starts(documents), len(tokens))
    by_rollout_positions = bf.sequences_to_rollouts(positions, 20, geometry.num_samples, geometry.rollout_length)
    for b, row in enumerate(tokens):
        ids = documents[b].tolist()
        assert positions[2 * b, :20].tolist() == [i - ids.index(document) for i, document in enumerate(ids)]
        for k, anchor in enumerate(geometry.anchors(20)):
            first = len(bf.context_tokens(row, anchor, eod))
            assert by_rollout_positions[b, k].tolist() == 2 * [list(range(first, first + geometry.rollout_length))]


def test_what_differs_is_named(tmp_path, capsys):
    def change(tensors, _):
        tensors["reward"][3, 2] += 1e-3
        tensors["grad.model.norm.weight"] *= 1.01
        tensors["advantage"][0, 0] = torch.nan
        tensors["log_probs"][0, -1] = torch.nan  # of a rollout left out: no difference
        tensors["grad.model.elsewhere"] = torch.ones(1)

    argv = ["--hf-model", str(GOLDEN / "llama"), "--batch", str(tampered(tmp_path, change)), "--output",
            str(tmp_path / "out")]
    with pytest.raises(ValueError, match="4 of its results differ by more than --tolerance 1e-04: advantage, grad."
                                         "model.elsewhere, grad.model.norm.weight, reward"):
        replay.main(argv)
    output = capsys.readouterr().out
    assert "reward: 1.0e-03\n" in output and "grad.model.norm.weight: 9.9e-03 of its norm" in output
    assert "45 of 49 results" in output


def edit(key: str, function):
    """A change of one tensor."""
    return lambda tensors, _: tensors.update({key: function(tensors[key])})


def set_token(tokens: torch.Tensor) -> torch.Tensor:
    tokens[1, 70] = 128
    return tokens


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, _: tensors.pop("docs"), "the tensor docs is missing"),
    (edit("docs", lambda x: x[:1]), r"docs is torch.int64 \(1, 64\); by the metadata it must be torch.int64 \(2, 64\)"),
    (edit("docs", torch.Tensor.int), "docs is torch.int32"),
    (edit("sequences", set_token), "sequences has token ids from . to 128, and the model knows 0 to 127"),
    (edit("sequences", lambda x: x.roll(1, 0)), "sequences do not begin with docs"),
    (edit("position_ids", lambda x: x + 1), "position_ids are not those of 7 blocks"),
    (put(0, document_ids=torch.arange(64).expand(2, 64) // 20), "position_ids are not .* that restart at documents"),
    (put(0, document_ids=torch.arange(64).expand(2, 64).flip(1)), "document_ids decrease along a row"),
    (put(0, sampler_log_probs=torch.zeros(8, 55)), r"sampler_log_probs is torch.float32 \(8, 55\)"),
    (put(0, answer_mask=torch.ones(2, 64)), "answer_mask is torch.float32"),
    (lambda _, entries: entries.pop("stride"), "the metadata have no stride; is it a step's file"),
    (lambda _, entries: entries.clear(), "the metadata have no prompt_len, docs, samples"),
    (put(1, stride="x"), "its metadata cannot be right: .*--ebft-stride: invalid int value: 'x'"),
    (put(1, temperature="0"), "its metadata cannot be right: --ebft-temperature 0.0: must be above 0"),
    (put(1, prompt_len="15"), "its metadata cannot be right: --seq-length 15 is too short"),
    (put(1, blocks="8"), "contradict themselves: blocks is 8, but there are 7"),
    (put(1, whitening="maybe"), "whitening = maybe; it must be one of False, True, paper"),
    (put(1, flags="{"), "its metadata cannot be right"),
    (put(1, flags="[1]"), "its metadata cannot be right"),
    (put(1, flags='{"ebft_stride": 4}'), "contradict themselves: stride is 8, and flags say --ebft-stride 4"),
    (put(1, flags='{"ebft_magic": 4}'), "its metadata cannot be right: ebft_magic is no flag of the method"),
    (put(1, flags='{"help": true}'), "its metadata cannot be right: help is no flag of the method"),
    (put(1, flags='{"config": "/dev/zero"}'), "its metadata cannot be right: config is no flag of the method"),
    (put(1, flags='{"ebft_feature_layers": ["--help"]}'), "--ebft-feature-layers: must be a number, not '--help'"),
    (put(1, flags='{"iteration": "1"}'), "the iteration is '1'"),
    (put(1, flags='{"a":' * 9999), "its metadata cannot be right: flags is not JSON"),
])
def test_what_is_wrong_with_a_file_is_named(tmp_path, change, message):
    path = tampered(tmp_path, change)
    with pytest.raises(ValueError, match=f"--batch {path}: .*{message}"):
        replay.parse(["--hf-model", str(GOLDEN / "llama"), "--batch", str(path), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(("flags", "message"), [
    (["--batch", "/nowhere"], "--batch /nowhere: no such file"),
    (["--batch", "cut"], "--batch .*cut: this is no whole safetensors file"),
    (["--output", str(GOLDEN / "step.safetensors")], "--output .*: is the --batch"),
    (["--load", "/nowhere"], "--hf-model, --load: give one of the two"),
    (["--hf-model", ""], "--hf-model, --load: give one of the two"),
    (["--hf-model", "", "--load", "/nowhere"], "--load /nowhere: no such directory"),
    (["--ebft-stride", "4"], "--ebft-stride: tools/replay.py does not read this training flag"),
    (["--micro-batch-size", "3"], "--micro-batch-size 3: does not divide the 2 documents of --batch"),
    (["--output", "/nowhere/out"], "--output /nowhere/out: /nowhere is no folder"),
    (["--tolerance", "x"], "--tolerance: invalid float value"),
    (["--hf-model", "short"], "has rows of 64 tokens, and the model is for 32"),
    (["--hf-model", "deep"], "--hf-model .*deep: the tensor model.layers.4.* is missing"),
])
def test_wrong_flags_are_named(tmp_path, flags, message):
    whole = (GOLDEN / "step.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    for name, change in (("short", {"max_position_embeddings": 32}), ("deep", {"num_hidden_layers": 5})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        (tmp_path / name / "model.safetensors").symlink_to(GOLDEN / "llama" / "model.safetensors")
    flags = [str(tmp_path / flag) if flag in ("cut", "short", "deep") else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        replay.parse(["--hf-model", str(GOLDEN / "llama"), "--batch", str(GOLDEN / "step.safetensors"), "--output",
                      str(tmp_path / "out"), *flags])


