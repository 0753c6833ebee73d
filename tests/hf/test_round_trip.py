"""Conversion to Megatron-Core and back gives the same tensors to the last bit, in every family."""

import json
import shutil

import pytest
import torch
import transformers
from hf_models import (
    LENGTH,
    MODELS,
    VOCAB,
    equal_tensors,
    random_model,
    read_tensors,
    reseal,
    save_model,
    to_hf,
    to_megatron,
)
from safetensors.torch import save_file

from megatron_ebft.hf.config import read_model
from megatron_ebft.hf.weights import INDEX


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(tmp_path, kind, tied):
    """The dtype alternates: all pairs of family, tie and dtype occur, but not all triples."""
    dtype = (torch.bfloat16, torch.float32)[(list(MODELS).index(kind) + tied) % 2]
    source = save_model(tmp_path / "source", kind, dtype, tie_word_embeddings=tied)
    assert (source / INDEX).exists()
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    converted = to_hf(checkpoint, tmp_path / "converted", "--max-shard-size", "15e-6")
    assert equal_tensors(read_tensors(converted), read_tensors(source)) and len(read_tensors(source)) == len(json.loads(
        (converted / INDEX).read_text())["weight_map"])
    for name in ("config.json", "generation_config.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert max(path.stat().st_size for path in converted.glob("*.safetensors")) < 20_000
    loaded = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=dtype)
    expected = random_model(kind, tie_word_embeddings=tied).to(dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_made_from_the_architecture_alone(tmp_path, kind):
    source = save_model(tmp_path / "source", kind)
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / "iter_0000000/hugging_face")
    reseal(checkpoint / "iter_0000000")
    converted = to_hf(checkpoint, tmp_path / "converted", "--verify")
    assert equal_tensors(read_tensors(converted), read_tensors(source))
    assert (converted / "generation_config.json").exists()
    mine, known = read_model(str(converted), "--x"), read_model(str(source), "--x")
    assert mine.architecture == known.architecture and mine.entries == known.entries
    tokens = torch.arange(LENGTH)[None] % VOCAB
    models = [transformers.AutoModelForCausalLM.from_pretrained(x) for x in (source, converted)]
    assert torch.equal(*(model(tokens).logits for model in models))
    templated = to_hf(checkpoint, tmp_path / "templated", "--hf-template", str(source))
    assert (templated / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_dtype_is_what_is_asked_for(tmp_path):
    source = save_model(tmp_path / "source", "llama 3.1")
    rounded = to_hf(to_megatron(source, tmp_path / "a", "--dtype", "bf16", "--verify"), tmp_path / "b", "--verify")
    assert equal_tensors(read_tensors(rounded), {name: x.bfloat16() for name, x in read_tensors(source).items()})
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    halves = save_model(tmp_path / "halves", "llama 2", torch.float16)
    with pytest.raises(ValueError, match=r"the weights are float16 \(.*give --dtype bf16 .* or --dtype fp32"):
        to_megatron(halves, tmp_path / "c")
    exact = to_hf(to_megatron(halves, tmp_path / "c", "--dtype", "fp32"), tmp_path / "d")
    assert equal_tensors(read_tensors(exact), {name: x.float() for name, x in read_tensors(halves).items()})


def test_leftovers_of_older_versions(tmp_path):
    """Rotary frequencies and a tied head in the file are let through when they say nothing new."""
    source = save_model(tmp_path / "source", "llama 2", shard="1GB", tie_word_embeddings=True)
    path, clean = source / "model.safetensors", read_tensors(source)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies,
            "lm_head.weight": clean["model.embed_tokens.weight"].clone()}
    save_file(clean | more, path, {"format": "pt"})
    assert equal_tensors(read_tensors(to_hf(to_megatron(source, tmp_path / "a"), tmp_path / "b")), clean)
    for name, value in more.items():
        save_file(clean | more | {name: value + 0.5}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"the tensor {name} has no place in LlamaForCausalLM"):
            to_megatron(source, tmp_path / "c")


def test_tensors_keep_a_dtype_of_their_own(tmp_path):
    """Norms in float32 beside weights in bf16: nothing is rounded, and verification does not think so."""
    source = save_model(tmp_path / "source", "llama 2", shard="1GB")
    mixed = {name: x if x.dim() == 1 else x.bfloat16() for name, x in read_tensors(source).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    converted = to_hf(to_megatron(source, tmp_path / "a", "--verify"), tmp_path / "b", "--verify")
    assert equal_tensors(read_tensors(converted), mixed)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(mixed | {name: mixed[name].float()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}, .* have several dtypes, but become one tensor; give --dtype"):
        to_megatron(source, tmp_path / "c")
