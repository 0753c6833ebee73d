"""Training from a converted checkpoint, back to a model that transformers loads, and the tokenizers that go along."""

import json
import os
import shutil

import pytest
import torch
import transformers
from hf_models import VOCAB, read_tensors, save_model, to_hf, to_megatron
from preprocess_data import main as preprocess
from small_data import sentences, train_hugging_face

from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.device import device
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.model.weights import unwrap
from megatron_ebft.run.build import build_run
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import train_step


@pytest.fixture
def learner(tmp_path):
    """A Hugging Face model with a tokenizer, data for it, and the flags of a short run but for where it starts."""
    source = save_model(tmp_path / "source", "llama 3.2")
    for path in train_hugging_face(tmp_path / "tokenizer", eos_token="<eos>").iterdir():
        shutil.copy(path, source)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(200)))
    preprocess(["--input", str(text), "--output-prefix", str(tmp_path / "set"), "--tokenizer-type",
                "HuggingFaceTokenizer", "--tokenizer-model", str(source),
                "--vocab-size", str(VOCAB)])
    return source, ["--use-checkpoint-args", "--data-path", str(tmp_path / "set_text_document"), "--split", "80,20,0",
                    "--train-iters", "2", "--seq-length", "24", "--global-batch-size", "2", "--eval-iters", "1",
                    "--lr", "1e-2", "--tensorboard-dir", str(tmp_path / "tensorboard")]


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_training_needs_nothing_but_the_checkpoint(learner, tmp_path, one_rank, flag):
    source, flags = learner
    checkpoint = to_megatron(source, tmp_path / "checkpoint", "--verify")
    args = parse_args([*flags, flag, str(checkpoint), "--ebft-encoder-load", str(checkpoint)])
    run = build_run(args)
    policy = dict(unwrap(run.policy[0]).named_parameters())
    assert run.state.iteration == 0 and all(torch.equal(x, policy[name].detach()) for name, x in unwrap(
        run.encoder).named_parameters())
    rows = torch.stack([run.train_data[i]["tokens"] for i in range(2)]).to(device())
    train_step(run, GoldBatch(rows, torch.arange(2, device=device())), PhaseTimer(), check=True)
    Saver(str(tmp_path / "trained")).save(TrainState(1, 2), run.policy, run.optimizer, run.scheduler, run.metadata,
                    run.companions)

    with pytest.raises(ValueError, match="--tokenizer-model: --pretrained-checkpoint was trained with another"):
        build_run(parse_args([*flags, "--pretrained-checkpoint", str(checkpoint), "--tokenizer-type",
                              "NullTokenizer", "--vocab-size", str(VOCAB)]))
    resumed = build_run(parse_args([*flags, "--load", str(tmp_path / "trained"), "--pretrained-checkpoint",
                                    str(checkpoint)]))
    assert resumed.state.iteration == 1 and resumed.companions == run.companions

    converted = to_hf(tmp_path / "trained", tmp_path / "converted", "--verify")
    before, after = read_tensors(source), read_tensors(converted)
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in source.iterdir() if "model" not in path.name} <= set(os.listdir(converted))
    known, mine = (transformers.AutoTokenizer.from_pretrained(x) for x in (source, converted))
    text = "the lazy fox"
    assert mine(text) == known(text) and mine.eos_token == known.eos_token


def test_a_start_is_named_once(learner, tmp_path, one_rank):
    source, flags = learner
    checkpoint = str(to_megatron(source, tmp_path / "checkpoint"))
    for more in (["--pretrained-checkpoint", checkpoint], ["--save", checkpoint]):
        with pytest.raises(ValueError, match=f"--load .*holds weights alone.*does not go with {more[0]}"):
            build_run(parse_args([*flags, "--load", checkpoint, *more]))


def test_the_template_has_its_own_tokenizer(learner, tmp_path):
    source, _ = learner
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    template = save_model(tmp_path / "template", "llama 3.2")
    (template / "tokenizer.model").write_text("another kind of tokenizer")
    (template / "generation_config.json").write_text('{"temperature": 0.5}')
    converted = to_hf(checkpoint, tmp_path / "converted", "--hf-template", str(template))
    assert (converted / "tokenizer.model").exists() and not (converted / "tokenizer.json").exists()
    assert json.loads((converted / "generation_config.json").read_text()) == {"temperature": 0.5}
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="--hf-model .*source: its tokenizer cannot be used"):
        to_megatron(source, tmp_path / "a")


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    source = save_model(tmp_path / "source", "llama 2", vocab_size=50)
    for path in train_hugging_face(tmp_path / "tokenizer", eos_token="<eos>").iterdir():
        shutil.copy(path, source)
    with pytest.raises(ValueError, match="--hf-model .*: its tokenizer has 60 ids, and the model knows 50; remove"):
        to_megatron(source, tmp_path / "checkpoint")
