"""Models and checkpoints that cannot be converted are refused; the error names the key, the tensor or the file."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import LLAMA3, equal_tensors, read_tensors, reseal, save_model, to_hf, to_megatron
from safetensors.torch import save_file

from megatron_ebft.checkpointing import lock
from megatron_ebft.checkpointing.lock import FolderLock
from megatron_ebft.hf.weights import INDEX


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
    "layers without end": ("llama 2", lambda x: change(x, num_hidden_layers=10**12), "layers = 10{12}; .* at most"),
    "a size without end": ("llama 2", lambda x: change(x, max_position_embeddings=10**12), "embeddings = 10{12}; it"),
    "an infinite base": ("llama 2", lambda x: change(x, rope_parameters=None, rope_theta=1e999), "theta = Infinity;"),
    "a huge base": ("llama 2", lambda x: change(x, rope_parameters=None, rope_theta=10**400), "theta = 10+.*at most"),
    "nested size": ("llama 2", lambda x: change(x, hidden_size={"a": [1]}), "hidden_size = ..a.: .1.}; it must be"),
    "layer types of another type": ("mistral", lambda x: change(x, layer_types=5), "layer_types = 5; supported"),
    "nested config": ("llama 2", lambda x: (x / "config.json").write_text('{"a":' * 9999), "config.json is not JSON"),
    "deep config": ("llama 2", lambda x: (x / "config.json").write_text('{"a":' * 500 + "1" + "}" * 500), "too deeply"),
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
    "damaged index": ("llama 2", lambda x: (x / INDEX).write_text("[]"), "index.json is not a JSON object"),
    "index of numbers": ("llama 2", lambda x: (x / INDEX).write_text('{"weight_map": {"a": 3}}'), "damaged"),
    "index of other places": ("llama 2", lambda x: (x / INDEX).write_text(re.sub(
        r'("lm_head.weight": "model-)\d{5}', r"\g<1>00001", (x / INDEX).read_text())),
        "index.json says that lm_head.weight is in model-00001-of-.*, but it is not; copy both again"),
    "index outside": ("llama 2", lambda x: (x / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
                      "says that a is in '../x.safetensors', outside the model's folder"),
    "index of absolute paths": ("llama 2", lambda x: (x / INDEX).write_text('{"weight_map": {"a": "/x.safetensors"}}'),
                                "says that a is in '/x.safetensors', outside the model's folder"),
    "index that is a FIFO": ("llama 2", lambda x: ((x / INDEX).unlink(), os.mkfifo(x / INDEX)), "no regular file"),
    "nested index": ("llama 2", lambda x: (x / INDEX).write_text('{"a":' * 9999), "not JSON"),
    "a shard twice": ("llama 2", lambda x: shutil.copy(next(x.glob("model-00001*")), next(x.glob(SHARD + "*"))),
                      "is in model-00001.* and in model-00002.*; remove"),
    "pickles": ("llama 2", lambda x: [p.rename(p.with_suffix(".bin")) for p in x.glob("*.safetensors")] and
                (x / INDEX).unlink(), "neither .*; model-.*bin is in torch's pickle format.*save_pretrained"),
    "dtype": ("llama 2", lambda x: save_file({"x": torch.zeros(1, dtype=torch.int8)}, x / "model.safetensors"),
              r"x is I8 \(quantised weights\?\); supported are F32, BF16, F16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_models_are_refused(tmp_path, case):
    kind, damage, message = REFUSED[case]
    source = save_model(tmp_path / "source", kind)
    damage(source)
    with pytest.raises(ValueError, match=f"(?s)^--hf-model .*source.*{message}"):
        to_megatron(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_bad_checkpoints_are_refused(tmp_path):
    source = save_model(tmp_path / "source", "llama 2")
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    output = tmp_path / "output"

    def refused(message: str, *flags: str) -> None:
        with pytest.raises(ValueError, match=message):
            to_hf(checkpoint, output, *flags)
        assert not (output / "config.json").exists()

    with pytest.raises(ValueError, match="--output .*checkpoint: holds checkpoints already; name a new folder"):
        to_megatron(source, checkpoint)
    output.mkdir()
    (output / "file").write_text("")
    refused("--output .*output: is not empty; name a new folder")
    (output / "file").unlink()
    other = save_model(tmp_path / "other", "qwen2", intermediate_size=64)
    refused("--hf-template .*other: config.json does not describe the checkpoint's model: ffn_hidden_size 64 .che",
            "--hf-template", str(other))
    refused("--hf-template .*nothing: no config.json there", "--hf-template", str(tmp_path / "nothing"))
    (other / "config.json").write_text("{")
    refused("--hf-template .*other: config.json is not JSON", "--hf-template", str(other))
    with pytest.raises(ValueError, match="--output .*config.json: .*config.json is a file; name a folder"):
        to_hf(checkpoint, save_model(tmp_path / "third", "llama 2") / "config.json")
    foreign = tmp_path / "foreign"
    (foreign / "iter_0005000/mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="--output .*foreign: holds checkpoints already"):
        to_megatron(source, foreign)
    beside = tmp_path / "output.tmp"
    beside.mkdir()
    (beside / "precious").write_text("")
    (tmp_path / "link").symlink_to(output)
    to_hf(checkpoint, tmp_path / "link")
    assert (beside / "precious").exists() and equal_tensors(read_tensors(output), read_tensors(source))
    shutil.rmtree(output)
    output.mkdir()
    refused("--max-shard-size 0.0: must be above 0", "--max-shard-size", "0")
    refused("--verify-tolerance nan: must be above 0", "--verify-tolerance", "nan")
    record = checkpoint / "iter_0000000/ebft.json"
    text = record.read_text()
    for old, new, message in (('"num_layers": 4', '"num_layers": 5', "the checkpoint's model: num_layers 4"),
                              ('"format": 4', '"format": 1', "a checkpoint of format 1, and this version")):
        record.write_text(text.replace(old, new))
        reseal(checkpoint / "iter_0000000")
        refused(message)
    record.write_text(text)
    reseal(checkpoint / "iter_0000000")
    os.truncate(next((checkpoint / "iter_0000000").glob("*_5.distcp")), 100)
    refused(r"--load .*iter_0000000: the checkpoint is damaged \(__0_5.distcp has 100 bytes instead of")


def test_a_folder_that_another_process_writes_into(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    source, output = save_model(tmp_path / "model", "llama 2"), tmp_path / "output"
    output.mkdir()
    parent = os.getppid()
    owner = FolderLock(str(output)).owner | {"process": parent, "started": lock._start_of(parent)}
    (output / lock.NAME).write_text(json.dumps(owner))
    with pytest.raises(ValueError, match=f"--output {output}: process {parent} on .* writes its checkpoints there"):
        to_megatron(source, output)
    assert json.loads((output / lock.NAME).read_text()) == owner
    (output / lock.NAME).unlink()
    to_megatron(source, output)
    assert not (output / lock.NAME).exists()
