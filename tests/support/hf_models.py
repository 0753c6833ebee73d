"""Random Hugging Face models of every family, and their conversion by the tools."""

from pathlib import Path

import hf_to_megatron
import megatron_to_hf
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_ebft.checkpointing.manifest import seal

VOCAB, ORIGINAL, LENGTH = 67, 32, 56  # positions go beyond ORIGINAL; with it, all three kinds of frequencies occur
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=ORIGINAL)
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=256)
MODELS = {  # class in transformers, configuration beyond SHAPE
    "llama 2": ("Llama", dict(num_key_value_heads=4)),
    "llama 3.1": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama 3.2": ("Llama", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "qwen2.5": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_parameters=LLAMA3)),
}


def random_model(kind: str, seed: int = 0, **changes):
    """A transformers model with random parameters, so that no wrong conversion gives the right result by chance."""
    name, special = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SHAPE | special | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def save_model(folder: Path, kind: str, dtype=torch.float32, shard="15kB", **changes) -> Path:
    """Save a random model into a folder, in several shards; returns the folder."""
    random_model(kind, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_byte_model(folder: Path) -> Path:
    """Save a random Llama with a tokenizer of bytes, whose generation settings name two end tokens, 256 and 9."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    model = random_model("llama 3.1", vocab_size=257)
    model.generation_config.eos_token_id = [256, 9]
    model.save_pretrained(folder)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder by name, as the safetensors library reads them. Each must be in one file only."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    merged = {name: tensor for file in files for name, tensor in file.items()}
    assert len(merged) == sum(map(len, files))
    return merged


def reseal(folder: Path) -> None:
    """Write a manifest for the present files of a checkpoint folder."""
    (folder / "manifest.json").unlink()
    seal(str(folder))


def to_megatron(source: Path, output: Path, *flags: str) -> Path:
    """Run tools/convert/hf_to_megatron.py; returns the output."""
    hf_to_megatron.main(["--hf-model", str(source), "--output", str(output), *flags])
    return output


def to_hf(source: Path, output: Path, *flags: str) -> Path:
    """Run tools/convert/megatron_to_hf.py; returns the output."""
    megatron_to_hf.main(["--load", str(source), "--output", str(output), *flags])
    return output


def equal_tensors(a: dict, b: dict) -> bool:
    """Whether two dicts hold the same tensors, in the same dtypes, bit for bit."""
    return a.keys() == b.keys() and all(a[name].dtype == x.dtype and torch.equal(a[name], x) for name, x in b.items())
