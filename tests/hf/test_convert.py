"""Conversion from and to Hugging Face, against transformers and the safetensors library.

1. Round trips of every family, tied and not, in bf16 and float32: the same tensors to the last bit.
2. Logits of the converted model at four layouts of TP × PP, on one start of 4 ranks, against transformers: with rotary
   scaling, at positions past its original range. A checkpoint saved at TP 2 × PP 2 goes back to the same tensors.
3. Training from a converted checkpoint, by --use-checkpoint-args alone, and back to a model transformers loads.
4. What a conversion may hold in memory; what it leaves behind when it is stopped; what it refuses, by name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import hf_to_megatron
import megatron_to_hf
import pytest
import torch
import transformers
import verify
from megatron.core import parallel_state
from preprocess_data import main as preprocess
from ranks import enter_world, run_ranks, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import Run
from test_rows import hugging_face_folder, sentences  # noqa: F401

from megatron_ebft.checkpointing.checkpoint import Saver, TrainState, load_weights
from megatron_ebft.checkpointing.files import latest_iteration, read_metadata, seal
from megatron_ebft.checkpointing.reader import CheckpointReader
from megatron_ebft.common.device import device, init_device
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.data.micro_batches import GoldBatch, GoldMicroBatches
from megatron_ebft.hf import files
from megatron_ebft.hf.families import FAMILIES, Entry, describe, parse_config, read_model, write_config
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.decoder import ModelArgs, unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.run.build import build_run
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.training import train_step

TOOLS = Path(hf_to_megatron.__file__).parent
VOCAB, ORIGINAL, LENGTH = 67, 32, 56  # positions go beyond ORIGINAL; with it, all three kinds of frequencies occur
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=ORIGINAL)
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=256)
MODELS = {  # its class, what its configuration has beyond SHAPE
    "llama 2": ("Llama", dict(num_key_value_heads=4)),
    "llama 3.1": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama 3.2": ("Llama", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "qwen2.5": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_parameters=LLAMA3)),
}


def random_model(kind: str, seed: int = 0, **changes):
    """A transformers model in which no parameter is what a wrong conversion could make it by chance."""
    name, special = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SHAPE | special | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def hugging_face(folder: Path, kind: str, dtype=torch.float32, shard="15kB", **changes) -> Path:
    """Its folder, in several shards."""
    random_model(kind, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """As the safetensors library reads them; each in one file."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    found = {name: tensor for file in files for name, tensor in file.items()}
    assert len(found) == sum(map(len, files))
    return found


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in expected.items())


def reseal(folder: Path) -> None:
    """Make a manifest for what is in a checkpoint's folder now."""
    (folder / "manifest.json").unlink()
    seal(str(folder))


def there(source: Path, output: Path, *flags: str) -> Path:
    hf_to_megatron.main(["--hf-model", str(source), "--output", str(output), *flags])
    return output


def back(source: Path, output: Path, *flags: str) -> Path:
    megatron_to_hf.main(["--load", str(source), "--output", str(output), *flags])
    return output


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(tmp_path, kind, tied, dtype):
    source = hugging_face(tmp_path / "source", kind, dtype, tie_word_embeddings=tied)
    assert (source / files.INDEX).exists()
    checkpoint = there(source, tmp_path / "checkpoint")
    found = back(checkpoint, tmp_path / "found", "--max-shard-size", "15e-6")
    assert same(tensors(found), tensors(source)) and len(tensors(source)) == len(json.loads(
        (found / files.INDEX).read_text())["weight_map"])
    for name in ("config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (source / name).read_bytes()
    assert max(path.stat().st_size for path in found.glob("*.safetensors")) < 20_000
    loaded = transformers.AutoModelForCausalLM.from_pretrained(found, dtype=dtype)
    expected = random_model(kind, tie_word_embeddings=tied).to(dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_made_from_the_architecture_alone(tmp_path, kind):
    source = hugging_face(tmp_path / "source", kind)
    checkpoint = there(source, tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / "iter_0000000/hugging_face")
    reseal(checkpoint / "iter_0000000")
    found = back(checkpoint, tmp_path / "found", "--verify")
    assert same(tensors(found), tensors(source)) and (found / "generation_config.json").exists()
    mine, known = read_model(str(found), "--x"), read_model(str(source), "--x")
    assert mine.architecture == known.architecture and mine.entries == known.entries
    tokens = torch.arange(LENGTH)[None] % VOCAB
    models = [transformers.AutoModelForCausalLM.from_pretrained(x) for x in (source, found)]
    assert torch.equal(*(model(tokens).logits for model in models))
    templated = back(checkpoint, tmp_path / "templated", "--hf-template", str(source))
    assert (templated / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_dtype_is_what_is_asked_for(tmp_path):
    source = hugging_face(tmp_path / "source", "llama 3.1")
    rounded = back(there(source, tmp_path / "a", "--dtype", "bf16", "--verify"), tmp_path / "b", "--verify")
    assert same(tensors(rounded), {name: x.bfloat16() for name, x in tensors(source).items()})
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    halves = hugging_face(tmp_path / "halves", "llama 2", torch.float16)
    with pytest.raises(ValueError, match=r"the weights are float16 \(.*give --dtype bf16 .* or --dtype fp32"):
        there(halves, tmp_path / "c")
    exact = back(there(halves, tmp_path / "c", "--dtype", "fp32"), tmp_path / "d")
    assert same(tensors(exact), {name: x.float() for name, x in tensors(halves).items()})


def test_leftovers_of_older_versions(tmp_path):
    """Rotary frequencies and a tied head in the file are let through when they say nothing new."""
    source = hugging_face(tmp_path / "source", "llama 2", shard="1GB", tie_word_embeddings=True)
    path, clean = source / "model.safetensors", tensors(source)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies,
            "lm_head.weight": clean["model.embed_tokens.weight"].clone()}
    save_file(clean | more, path, {"format": "pt"})
    assert same(tensors(back(there(source, tmp_path / "a"), tmp_path / "b")), clean)
    for name, value in more.items():
        save_file(clean | more | {name: value + 0.5}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"the tensor {name} has no place in LlamaForCausalLM"):
            there(source, tmp_path / "c")


# ---------------------------------------------------------------- layouts


def logits(policy: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """[B, S, V] of the whole vocabulary; on the last stage."""
    found = []

    def forward_step(iterator, model):
        mb = next(iterator)

        def collect(out_SBV):
            shards = [torch.empty_like(out_SBV) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
            torch.distributed.all_gather(shards, out_SBV.contiguous(), group=groups.tp_group())
            found.append(torch.cat(shards, -1)[..., :VOCAB].transpose(0, 1))
            return out_SBV.sum(), {}

        mask, readout = as_mask(CausalPattern(None)), lambda hidden, model: model.head(hidden)
        return model(mb.tokens, mb.positions, mask, labels=readout), collect

    rows = GoldBatch(tokens.to(device()), torch.arange(len(tokens)))
    with torch.no_grad():
        run_schedule(forward_step, GoldMicroBatches(rows, 1), policy, forward_only=True)
    return torch.cat(found).cpu() if found else None


def four_ranks(folder: str) -> dict:
    """Largest difference of a logit by model and layout; None where this rank is no last stage."""
    init_device()
    tokens, found = torch.load(f"{folder}/tokens.pt"), {}
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        enter_world(4)
        groups.init_parallel(tp, pp, seed=1)
        for kind in MODELS:
            checkpoint = f"{folder}/{kind}.checkpoint"
            args = ModelArgs(**read_metadata(checkpoint)["architecture"])
            args.padded_vocab_size = 2 * VOCAB
            sizes = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32)
            run = Run(args=args, **sizes)
            load_weights(checkpoint, run.model)
            out, expected = logits(run.model, tokens), torch.load(f"{folder}/{kind}.logits")
            found[f"{kind} {tp} {pp}"] = None if out is None else (out - expected).abs().max().item()
            if (tp, pp) == (2, 2):
                Saver(f"{checkpoint} 2 2").save(TrainState(3, 6), *run.parts,
                                {"architecture": asdict(args), "tokenizer": None})
        del run
        groups.shut_down()
    return found


@pytest.fixture(scope="module")
def by_layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, folder / "tokens.pt")
    for kind in MODELS:
        model = random_model(kind)
        model.save_pretrained(folder / kind)
        there(folder / kind, folder / f"{kind}.checkpoint")
        torch.save(model(tokens).logits.detach(), folder / f"{kind}.logits")
    ranks = run_ranks(4, "test_convert:four_ranks", str(folder))
    return folder, {name: [rank[name] for rank in ranks if rank[name] is not None] for name in ranks[0]}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["1 1", "2 1", "1 2", "2 2"])
def test_logits_are_those_of_transformers(by_layout, kind, layout):
    folder, differences = by_layout
    tp, pp = map(int, layout.split())
    found = differences[f"{kind} {layout}"]
    assert len(found) == 4 // pp and max(found) <= 1e-4  # on every rank of a last stage
    assert tp == 1 or max(found) > 0  # unsplit sums may round as theirs do, split ones do not
    assert torch.load(folder / f"{kind}.logits").std() > 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_back_from_tp2_pp2(by_layout, tmp_path, kind):
    folder, _ = by_layout
    assert same(tensors(back(folder / f"{kind}.checkpoint 2 2", tmp_path / "found")), tensors(folder / kind))


# ---------------------------------------------------------------- training


@pytest.fixture
def learner(tmp_path, hugging_face_folder):  # noqa: F811
    """A Hugging Face model with a tokenizer, data for it, and the flags of a short run but for where it starts."""
    source = hugging_face(tmp_path / "source", "llama 3.2")
    for path in hugging_face_folder(eos_token="<eos>").iterdir():
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
    checkpoint = there(source, tmp_path / "checkpoint", "--verify")
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

    found = back(tmp_path / "trained", tmp_path / "found", "--verify")
    before, after = tensors(source), tensors(found)
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in source.iterdir() if "model" not in path.name} <= set(os.listdir(found))
    known, mine = (transformers.AutoTokenizer.from_pretrained(x) for x in (source, found))
    text = "the lazy fox"
    assert mine(text) == known(text) and mine.eos_token == known.eos_token


def test_a_start_is_named_once(learner, tmp_path, one_rank):
    source, flags = learner
    checkpoint = str(there(source, tmp_path / "checkpoint"))
    for more in (["--pretrained-checkpoint", checkpoint], ["--save", checkpoint]):
        with pytest.raises(ValueError, match=f"--load .*holds weights alone.*does not go with {more[0]}"):
            build_run(parse_args([*flags, "--load", checkpoint, *more]))


# ---------------------------------------------------------------- verification


def test_verification_notices_and_names_the_layer(tmp_path, monkeypatch, capsys):
    """In both directions; what was wrong is not left behind."""
    source = hugging_face(tmp_path / "source", "qwen3")
    checkpoint = there(source, tmp_path / "good", "--verify")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("verified"))
    assert "64 tokens" in line and "logits differ by at most" in line and "bound" in line
    join, split = Entry.join, Entry.split

    def swapped(entry) -> bool:
        """Gate and up projection of the third layer, the other way round."""
        return "model.layers.2.mlp.gate_proj.weight" in entry.names

    monkeypatch.setattr(Entry, "join", lambda entry, parts: join(entry, parts[::-1] if swapped(entry) else parts))
    with pytest.raises(ValueError, match="differ by .*the first to differ is decoder layer 3 of 4"):
        there(source, tmp_path / "wrong", "--verify")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "wrong") == []
    monkeypatch.setattr(Entry, "split", lambda entry, x: split(entry, x)[::-1 if swapped(entry) else 1])
    with pytest.raises(ValueError, match="differ by .*the first to differ is decoder layer 3 of 4"):
        back(checkpoint, tmp_path / "found", "--verify")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["good", "source", "wrong"]
    scaled = {name: x * (1 + 1e-2 * (name == "lm_head.weight")) for name, x in tensors(source).items()}
    save_file(scaled, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ValueError, match="the first to differ is the output head"):
        verify.verify(str(tmp_path), files.HFWeights(str(tmp_path), "--x"), CheckpointReader(str(checkpoint), "--x"),
                      1e-4)


def test_tensors_keep_a_dtype_of_their_own(tmp_path):
    """Norms in float32 beside weights in bf16: nothing is rounded, and verification does not think so."""
    source = hugging_face(tmp_path / "source", "llama 2", shard="1GB")
    mixed = {name: x if x.dim() == 1 else x.bfloat16() for name, x in tensors(source).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    assert same(tensors(back(there(source, tmp_path / "a", "--verify"), tmp_path / "b", "--verify")), mixed)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(mixed | {name: mixed[name].float()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}, .* have several dtypes, and become one tensor; give --dtype"):
        there(source, tmp_path / "c")


# ---------------------------------------------------------------- memory, interruptions


MEMORY = """
import sys
from pathlib import Path
from megatron_ebft.convert import hf_to_megatron, megatron_to_hf

def kilobytes(name):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)).split()[1])

folder = sys.argv[1]
for convert, source, target in ((hf_to_megatron, "", ".c"), (megatron_to_hf, ".c", ".h")):
    convert(f"{folder}/small{source}", f"{folder}/small{target}")  # what is imported and cached on the way
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    convert(f"{folder}/large{source}", f"{folder}/large{target}")
    print("added", kilobytes("VmHWM") - before)
"""


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """Converting a model of 200 MB adds no more than three of its largest tensors, and a little."""
    hugging_face(tmp_path / "small", "llama 3.1")
    large = hugging_face(tmp_path / "large", "llama 3.1", torch.bfloat16, "70MB", vocab_size=8192, hidden_size=768,
                         intermediate_size=2048, num_hidden_layers=14)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    largest = max(x.nbytes for x in tensors(large).values())
    assert size > 195e6 and len(list(large.glob("*.safetensors"))) == 4 and largest < size / 14
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # not kept by malloc: that is how it is with large models
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env=os.environ | freed_at_once)
    added = [int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("added")]
    assert len(added) == 2, done.stderr
    assert max(added) <= 3 * largest + 10e6, added
    assert same(tensors(tmp_path / "large.h"), tensors(large))


SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"


@pytest.mark.parametrize("tool", ["hf_to_megatron.py", "megatron_to_hf.py"])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, tool):
    source = hugging_face(tmp_path / "source", "llama 2", vocab_size=4096)
    output = tmp_path / "output"
    flags = ["--hf-model", str(source)] if tool.startswith("hf") else [
        "--load", str(there(source, tmp_path / "checkpoint"))]

    code, text = run_script(TOOLS / tool, *flags, "--output", str(output), before=SMALL_FILES)
    assert code == 1 and f"error: --output {output}: cannot write there" in text, text
    assert "Traceback" not in text and "Nothing was left there" in text.splitlines()[-1]
    assert not output.exists() or os.listdir(output) == []
    subprocess.run([sys.executable, TOOLS / tool, *flags, "--output", output], check=True, timeout=300)


def test_too_little_space_is_found_before(tmp_path, monkeypatch):
    source = hugging_face(tmp_path / "source", "llama 2")
    checkpoint = there(source, tmp_path / "checkpoint")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    for convert_it in (lambda: there(source, tmp_path / "x/y"), lambda: back(checkpoint, tmp_path / "x/y")):
        with pytest.raises(ValueError, match="--output .*y: needs 0.000158 GB, and 1e-06 GB are free"):
            convert_it()
    assert not (tmp_path / "x").exists()


def test_an_interrupted_conversion_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    source = hugging_face(tmp_path / "source", "llama 2")
    checkpoint, found = tmp_path / "checkpoint", tmp_path / "found"

    def interrupted(cls):
        read, calls = cls.read, []

        def stops(self, name):
            calls.append(name)
            if len(calls) == 10:
                raise KeyboardInterrupt
            return read(self, name)

        monkeypatch.setattr(cls, "read", stops)

    interrupted(files.HFWeights)
    with pytest.raises(KeyboardInterrupt):
        there(source, checkpoint)
    monkeypatch.undo()
    assert os.listdir(checkpoint) == []
    there(source, checkpoint)
    assert sorted(os.listdir(checkpoint)) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    interrupted(CheckpointReader)
    with pytest.raises(KeyboardInterrupt):
        back(checkpoint, found)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "source"]
    assert same(tensors(back(checkpoint, found)), tensors(source))
    for tool, flags in (("hf_to_megatron.py", ["--hf-model", str(source)]),
                        ("megatron_to_hf.py", ["--load", str(checkpoint)])):
        assert run_script(TOOLS / tool, *flags, "--output", str(tmp_path / tool), before=KILLED)[0] == -9
        assert not (tmp_path / tool / "config.json").exists()
        assert not (tmp_path / tool).exists() or latest_iteration(str(tmp_path / tool)) is None
        assert run_script(TOOLS / tool, *flags, "--output", str(tmp_path / tool))[0] == 0


KILLED = """
import os
from megatron_ebft import checkpoint_reader, hf_files
for cls in (files.HFWeights, checkpoint_reader.CheckpointReader):
    def read(self, name, read=cls.read, calls=[]):
        calls.append(name)
        return read(self, name) if len(calls) < 10 else os.kill(os.getpid(), 9)
    cls.read = read
"""
"""SIGKILL at the tenth tensor."""


# ---------------------------------------------------------------- refusals


def change(folder: Path, **changes) -> None:
    """Keys of config.json set, or (None) removed."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


SHARD = "model-00002-of-"
REFUSED = {  # by name: a family, what is done to its folder, what is said
    "no folder": ("llama 2", shutil.rmtree, "no config.json there"),
    "no config": ("llama 2", lambda x: (x / "config.json").unlink(), "no config.json there; name the local folder"),
    "config is no JSON": ("llama 2", lambda x: (x / "config.json").write_text("{"), "config.json is not JSON"),
    "architecture": ("llama 2", lambda x: change(x, architectures=["GemmaForCausalLM"]),
                     "names the architecture ..GemmaForCausalLM..; supported are LlamaForCausalLM, Qwen2"),
    "two architectures": ("llama 2", lambda x: change(x, architectures=["A", "B"]), "architecture ..A., .B..; supp"),
    "architecture of another type": ("llama 2", lambda x: change(x, architectures=3), "the architecture 3; supported"),
    "another model type": ("llama 2", lambda x: change(x, model_type="mistral"), "model_type = .mistral., and Llama"),
    "unknown key": ("llama 2", lambda x: change(x, logit_scale=2.0), "logit_scale = 2.0, which is not understood"),
    "sliding window": ("mistral", lambda x: change(x, sliding_window=4096),
                       "sliding_window = 4096; supported is null only; rows of no more tokens than the window never"),
    "default window": ("mistral", lambda x: change(x, sliding_window=...), "has no sliding_window, which Mistral"),
    "used window": ("qwen2", lambda x: change(x, use_sliding_window=True), "use_sliding_window = true; supported is f"),
    "window layers": ("qwen3", lambda x: change(x, layer_types=["full_attention", "sliding_attention"]),
                      "layer_types = .*; supported is .full_attention. only"),
    "rope type": ("llama 2", lambda x: change(x, rope_parameters=dict(rope_type="yarn", factor=4.0)),
                  "the rope type yarn; supported are default and llama3"),
    "older rope type": ("llama 2", lambda x: change(x, rope_parameters=dict(type="linear", factor=4.0)),
                        "the rope type linear; supported are"),
    "two rope types": ("llama 2", lambda x: change(x, rope_parameters=dict(rope_type="default", type="llama3")),
                       "the rope type default, llama3; supported are"),
    "two spellings of rope": ("llama 3.1", lambda x: change(x, rope_scaling=LLAMA3 | {"factor": 4.0}),
                              "there must be one of them"),
    "two bases": ("llama 3.1", lambda x: change(x, rope_theta=5.0), "two values of rope_theta, 5.0 and 10000.0"),
    "base": ("llama 2", lambda x: change(x, rope_parameters=None, rope_theta=0), "rope_theta = 0; it must be a number"),
    "rope number": ("llama 3.1", lambda x: change(x, rope_parameters=LLAMA3 | {"factor": "8"}), 'factor = "8"; it mus'),
    "rope keys": ("llama 3.1", lambda x: change(x, rope_parameters=LLAMA3 | {"beta": 1}),
                  "a rope type llama3 that is not understood.*are beta"),
    "partial rope": ("llama 2", lambda x: change(x, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "biases": ("llama 2", lambda x: change(x, attention_bias=True), "attention_bias = true; supported is false only"),
    "biases of Qwen3": ("qwen3", lambda x: change(x, attention_bias=True), "attention_bias = true; supported is f"),
    "MLP biases": ("llama 2", lambda x: change(x, mlp_bias=True), "mlp_bias = true; supported is false only"),
    "activation": ("llama 2", lambda x: change(x, hidden_act="gelu"), 'hidden_act = "gelu"; supported is "silu" only'),
    "quantised": ("llama 2", lambda x: change(x, quantization_config={"bits": 4}), "quantization_config = ..bits.: 4}"),
    "experts": ("qwen3", lambda x: change(x, num_experts=8), "num_experts = 8, which is not understood for Qwen3"),
    "no size": ("llama 2", lambda x: change(x, hidden_size=...), "has no hidden_size, which LlamaForCausalLM needs"),
    "size of another type": ("llama 2", lambda x: change(x, hidden_size="32"), 'size = "32"; it must be a whole'),
    "layers of another type": ("llama 2", lambda x: change(x, num_hidden_layers=True), "layers = true; it must be a"),
    "head groups of another type": ("llama 2", lambda x: change(x, num_key_value_heads=2.0), "heads = 2.0; it must be"),
    "tied by a word": ("llama 2", lambda x: change(x, tie_word_embeddings="false"), "= .false.; it must be true or fa"),
    "empty list": ("llama 2", lambda x: change(x, hidden_act=[]), r"hidden_act = \[\]; supported is .silu. only"),
    "empty window": ("mistral", lambda x: change(x, sliding_window=[]), r"sliding_window = \[\]; supported is null"),
    "no heads of Qwen2": ("qwen2", lambda x: change(x, num_key_value_heads=...), "has no num_key_value_heads, which Q"),
    "no heads of Mistral": ("mistral", lambda x: change(x, num_key_value_heads=...), "has no num_key_value_heads, wh"),
    "no head size of Qwen3": ("qwen3", lambda x: change(x, head_dim=...), "has no head_dim, which Qwen3ForCausalLM n"),
    "mrope": ("qwen2", lambda x: change(x, use_mrope=True), "use_mrope = true; supported is false only"),
    "cross attention": ("llama 2", lambda x: change(x, add_cross_attention=True), "add_cross_attention = true; supp"),
    "heads": ("llama 2", lambda x: change(x, num_key_value_heads=3), "4, not a multiple of num_key_value_heads 3"),
    "shape": ("llama 2", lambda x: change(x, intermediate_size=40),
              r"gate_proj.weight has the shape \(48, 32\), but config.json says \(40, 32\)"),
    "more layers": ("llama 2", lambda x: change(x, num_hidden_layers=5), r"tensor model.layers.4.*weight is missing"),
    "fewer layers": ("llama 2", lambda x: change(x, num_hidden_layers=3), r"tensor model.layers.3.*has no place in"),
    "a head that should be tied": ("llama 2", lambda x: change(x, tie_word_embeddings=True),
                                   "the tensor lm_head.weight has no place"),
    "missing shard": ("llama 2", lambda x: next(x.glob(SHARD + "*")).unlink(), "the shard model-00002-of-.*missing"),
    "truncated shard": ("llama 2", lambda x: os.truncate(next(x.glob(SHARD + "*")), 5000),
                        "model-00002-of-.* is no whole safetensors file .*copy it again"),
    "empty shard": ("llama 2", lambda x: next(x.glob(SHARD + "*")).write_bytes(b""), "is no whole safetensors file"),
    "damaged index": ("llama 2", lambda x: (x / files.INDEX).write_text("[]"), "index.json is damaged"),
    "index of numbers": ("llama 2", lambda x: (x / files.INDEX).write_text('{"weight_map": {"a": 3}}'), "damaged"),
    "index of other places": ("llama 2", lambda x: (x / files.INDEX).write_text(re.sub(
        r'("lm_head.weight": "model-)\d{5}', r"\g<1>00001", (x / files.INDEX).read_text())),
        "index.json says that lm_head.weight is in model-00001-of-.*, where it is not; copy both again"),
    "a shard twice": ("llama 2", lambda x: shutil.copy(next(x.glob("model-00001*")), next(x.glob(SHARD + "*"))),
                      "is in model-00001.* and in model-00002.*; remove"),
    "pickles": ("llama 2", lambda x: [p.rename(p.with_suffix(".bin")) for p in x.glob("*.safetensors")] and
                (x / files.INDEX).unlink(), "neither .*; model-.*bin is in torch's pickle format.*save_pretrained"),
    "dtype": ("llama 2", lambda x: save_file({"x": torch.zeros(1, dtype=torch.int8)}, x / "model.safetensors"),
              r"x is I8 \(quantised weights\?\); supported are F32, BF16, F16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_models_are_refused(tmp_path, case):
    kind, damage, message = REFUSED[case]
    source = hugging_face(tmp_path / "source", kind)
    damage(source)
    with pytest.raises(ValueError, match=f"(?s)^--hf-model .*source.*{message}"):
        there(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_bad_checkpoints_are_refused(tmp_path):
    source = hugging_face(tmp_path / "source", "llama 2")
    checkpoint = there(source, tmp_path / "checkpoint")
    output = tmp_path / "output"

    def refused(message: str, *flags: str) -> None:
        with pytest.raises(ValueError, match=message):
            back(checkpoint, output, *flags)
        assert not (output / "config.json").exists()

    with pytest.raises(ValueError, match="--output .*checkpoint: holds checkpoints already; name a new folder"):
        there(source, checkpoint)
    output.mkdir()
    (output / "file").write_text("")
    refused("--output .*output: is not empty; name a new folder")
    (output / "file").unlink()
    other = hugging_face(tmp_path / "other", "qwen2", intermediate_size=64)
    refused("--hf-template .*other: config.json describes another model.*ffn_hidden_size 64 .checkpoint 48.",
            "--hf-template", str(other))
    refused("--hf-template .*nothing: no config.json there", "--hf-template", str(tmp_path / "nothing"))
    (other / "config.json").write_text("{")
    refused("--hf-template .*other: config.json is not JSON", "--hf-template", str(other))
    with pytest.raises(ValueError, match="--output .*config.json: .*config.json is a file; name a folder"):
        back(checkpoint, hugging_face(tmp_path / "third", "llama 2") / "config.json")
    foreign = tmp_path / "foreign"
    (foreign / "iter_0005000/mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="--output .*foreign: holds checkpoints already"):
        there(source, foreign)
    beside = tmp_path / "output.tmp"
    beside.mkdir()
    (beside / "precious").write_text("")
    (tmp_path / "link").symlink_to(output)
    back(checkpoint, tmp_path / "link")
    assert (beside / "precious").exists() and same(tensors(output), tensors(source))
    shutil.rmtree(output)
    output.mkdir()
    refused("--max-shard-size 0.0: must be above 0", "--max-shard-size", "0")
    refused("--verify-tolerance nan: must be above 0", "--verify-tolerance", "nan")
    record = checkpoint / "iter_0000000/ebft.json"
    text = record.read_text()
    for old, new, message in (('"num_layers": 4', '"num_layers": 5', "another model than the checkpoint: num_layers 4"),
                              ('"format": 3', '"format": 1', "a checkpoint of format 1, and this version")):
        record.write_text(text.replace(old, new))
        reseal(checkpoint / "iter_0000000")
        refused(message)
    record.write_text(text)
    reseal(checkpoint / "iter_0000000")
    os.truncate(next((checkpoint / "iter_0000000").glob("*_5.distcp")), 100)
    refused(r"--load .*iter_0000000: the checkpoint is damaged \(__0_5.distcp has 100 bytes instead of")


def test_the_template_has_its_own_tokenizer(learner, tmp_path):
    source, _ = learner
    checkpoint = there(source, tmp_path / "checkpoint")
    template = hugging_face(tmp_path / "template", "llama 3.2")
    (template / "tokenizer.model").write_text("another kind of tokenizer")
    (template / "generation_config.json").write_text('{"temperature": 0.5}')
    found = back(checkpoint, tmp_path / "found", "--hf-template", str(template))
    assert (found / "tokenizer.model").exists() and not (found / "tokenizer.json").exists()
    assert json.loads((found / "generation_config.json").read_text()) == {"temperature": 0.5}
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="--hf-model .*source: its tokenizer cannot be used"):
        there(source, tmp_path / "a")


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path, hugging_face_folder):  # noqa: F811
    source = hugging_face(tmp_path / "source", "llama 2", vocab_size=50)
    for path in hugging_face_folder(eos_token="<eos>").iterdir():
        shutil.copy(path, source)
    with pytest.raises(ValueError, match="--hf-model .*: its tokenizer has 60 ids, and the model knows 50; remove"):
        there(source, tmp_path / "checkpoint")


COMMON = dict(attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, rms_norm_eps=1e-5, use_cache=True)
PUBLISHED = {  # config.json as on the hub, less what is in COMMON; then what must come of it
    "Llama-2-7b-hf": (dict(
        _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", vocab_size=32000),
        dict(num_query_groups=32, kv_channels=128, rotary_base=10000.0, use_rope_scaling=False)),
    "Llama-3.1-8B": (dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=128000, eos_token_id=[128001, 128008],
        hidden_size=4096, intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                          original_max_position_embeddings=8192), tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.46.0", vocab_size=128256, _attn_implementation_autoset=True),
        dict(num_query_groups=8, rotary_base=500000.0, use_rope_scaling=True, rope_scaling_factor=8.0)),
    "Llama-3.2-1B": (dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=128000, eos_token_id=128001, head_dim=64,
        hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling=dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                          original_max_position_embeddings=8192), tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0", vocab_size=128256),
        dict(kv_channels=64, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=False)),
    "Qwen2.5-1.5B": (dict(
        architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151643, hidden_size=1536,
        intermediate_size=8960, max_position_embeddings=131072, max_window_layers=28, model_type="qwen2",
        num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2, rope_theta=1000000.0,
        sliding_window=131072, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.40.1",
        use_mrope=False, use_sliding_window=False, vocab_size=151936),
        dict(add_qkv_bias=True, num_query_groups=2, kv_channels=128, rotary_base=1000000.0)),
    "Qwen3-0.6B": (dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, bos_token_id=151643, eos_token_id=151645,
        head_dim=128, hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
        model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.51.0", use_sliding_window=False, vocab_size=151936),
        dict(qk_layernorm=True, add_qkv_bias=False, kv_channels=128, num_query_groups=8)),
    "Mistral-7B-v0.3": (dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.42.0.dev0", vocab_size=32768),
        dict(num_query_groups=8, rotary_base=1000000.0, qk_layernorm=False, add_qkv_bias=False)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, expected = PUBLISHED[name]
    found = vars(parse_config(COMMON | config, "x").architecture)
    assert {key: found[key] for key in expected} == expected
    assert (found["hidden_size"], found["vocab_size"]) == (config["hidden_size"], config["vocab_size"])


def test_a_checkpoint_that_no_family_has(tmp_path):
    args = read_model(str(hugging_face(tmp_path, "llama 2")), "--x").architecture
    for name, value in (("normalization", "LayerNorm"), ("swiglu", False), ("add_bias_linear", True),
                        ("rotary_percent", 0.5), ("position_embedding_type", "learned_absolute")):
        with pytest.raises(ValueError, match=f"--load: no supported family has this architecture .*{name} {value}"):
            describe(ModelArgs(**{**vars(args), name: value}), "--load")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_written_configuration_is_read_back(tmp_path, family):
    kind = next(kind for kind, (name, _) in MODELS.items() if family.architecture.startswith(name))
    model = read_model(str(hugging_face(tmp_path, kind)), "--x")
    config = write_config(model, torch.bfloat16, 7)
    assert parse_config(config, "x") == model and config["eos_token_id"] == 7


def test_files_are_those_of_the_library(tmp_path):
    """What SafetensorsWriter makes, read by safetensors; nothing is left of a file that was not finished."""
    made = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(()), "c": torch.arange(7), "d": torch.zeros(0, 4)}
    kinds = {name: (x.dtype, tuple(x.shape)) for name, x in made.items()}
    with files.SafetensorsWriter(str(tmp_path / "x"), kinds, {"format": "pt", "key": "välue"}) as writer:
        for name, x in made.items():
            writer.write(name, x)
    assert same(load_file(tmp_path / "x"), made)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "välue"}
    with pytest.raises(AssertionError), files.SafetensorsWriter(str(tmp_path / "y"), kinds, {}) as writer:
        writer.write("b", made["b"])
    assert os.listdir(tmp_path) == ["x"]
