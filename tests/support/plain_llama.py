"""A plain Llama (or Qwen2) under Hugging Face names: the model of the brute-force oracle.

Ordinary causal attention over whole sequences, no cache and no packing. Nothing here imports the package under test.

Shape suffixes: B sequences, T and P positions, H hidden, V vocabulary.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

# With a head dimension of 8, one frequency is kept, one is blended and two are divided by the factor.
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)


def load_llama(folder) -> tuple[dict, dict]:
    """A Hugging Face Llama folder (config.json, model.safetensors) as (config, weights)."""
    folder = Path(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def random_llama(
    seed, *, layers, hidden, ffn, heads, kv_heads, vocab, rope_scaling=None, tied=False, dtype=torch.float32,
    qkv_bias=False
) -> tuple[dict, dict]:
    """A random model as (config, weights): matrices N(0, 1/fan_in), norms about 1 but not 1, biases N(0, 0.1^2).

    `qkv_bias` adds the biases Qwen2 has. Drawn in float64, so one seed is one model whatever the dtype.
    """
    config = dict(
        architectures=["Qwen2ForCausalLM" if qkv_bias else "LlamaForCausalLM"],
        model_type="qwen2" if qkv_bias else "llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=rope_scaling,
        max_position_embeddings=512, tie_word_embeddings=tied, dtype=str(dtype).removeprefix("torch."))
    if not qkv_bias:
        config.update(attention_bias=False, mlp_bias=False)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(rows, columns):
        return normal(rows, columns) / math.sqrt(columns)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": 1 + 0.1 * normal(hidden)}
    if not tied:
        weights["lm_head.weight"] = matrix(vocab, hidden)
    key_width = kv_heads * (hidden // heads)
    for i in range(layers):
        layer = f"model.layers.{i}."
        weights[layer + "input_layernorm.weight"] = 1 + 0.1 * normal(hidden)
        weights[layer + "post_attention_layernorm.weight"] = 1 + 0.1 * normal(hidden)
        for name, width in (("q", hidden), ("k", key_width), ("v", key_width)):
            weights[layer + f"self_attn.{name}_proj.weight"] = matrix(width, hidden)
            if qkv_bias:
                weights[layer + f"self_attn.{name}_proj.bias"] = 0.1 * normal(width)
        weights[layer + "self_attn.o_proj.weight"] = matrix(hidden, hidden)
        weights[layer + "mlp.gate_proj.weight"] = matrix(ffn, hidden)
        weights[layer + "mlp.up_proj.weight"] = matrix(ffn, hidden)
        weights[layer + "mlp.down_proj.weight"] = matrix(hidden, ffn)
    return config, {name: weight.to(dtype) for name, weight in weights.items()}


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(weights, name, x):
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def rms_norm(x, weight, eps):
    wide = at_least_float32(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_frequencies(config):
    """Angle per position of head_dim/2 planes, float32 as in transformers; rescaled as in Llama 3 if so configured."""
    frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
    scaling = config.get("rope_scaling")
    if scaling is None:
        return frequencies
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_type {scaling['rope_type']!r}: only llama3 is known here")
    rescaled = []
    for frequency in frequencies:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
        if turns < scaling["low_freq_factor"]:
            rescaled.append(frequency / scaling["factor"])
        elif turns > scaling["high_freq_factor"]:
            rescaled.append(frequency)
        else:
            kept = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            rescaled.append((1 - kept) * frequency / scaling["factor"] + kept * frequency)
    return torch.stack(rescaled)


def rotate(x, cos, sin):
    """Plane i of a head is made of its elements i and i + head_dim/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(weights, name, config, x, cos, sin):
    """Causal grouped-query attention on x [B, P, H]; query head h reads key head h // (heads / kv_heads)."""
    B, P, _ = x.shape

    def split(projection):
        heads = linear(weights, f"{name}.{projection}", x).view(B, P, -1, config["head_dim"])
        return heads.transpose(1, 2)  # [B, heads, P, head_dim]

    group = config["num_attention_heads"] // config["num_key_value_heads"]
    query = rotate(split("q_proj"), cos, sin)
    key = rotate(split("k_proj"), cos, sin).repeat_interleave(group, dim=1)
    value = split("v_proj").repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(config["head_dim"])
    future = torch.ones(P, P, dtype=torch.bool).triu(1)
    attended = at_least_float32(scores.masked_fill(future, -math.inf)).softmax(-1).to(x.dtype) @ value
    return linear(weights, f"{name}.o_proj", attended.transpose(1, 2).reshape(B, P, -1))


def forward(weights, config, tokens_BT, positions_BT=None):
    """(hidden_states, logits_BTV) of a plain causal Llama, in the weights' dtype, differentiable.

    hidden_states[i] [B, T, H] is the residual stream after decoder layer i (0: the embeddings). None is passed through
    the final norm, the last one included (transformers' last hidden state is). positions default to 0..T-1.
    """
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens_BT]
    angles = positions_BT[:, None, :, None].float() * rope_frequencies(config)  # [B, 1, T, head_dim/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    hidden_states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], eps)
        x = x + attention(weights, layer + "self_attn", config, normed, cos, sin)
        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], eps)
        gate, up = linear(weights, layer + "mlp.gate_proj", normed), linear(weights, layer + "mlp.up_proj", normed)
        x = x + linear(weights, layer + "mlp.down_proj", F.silu(gate) * up)
        hidden_states.append(x)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return hidden_states, F.linear(rms_norm(x, weights["model.norm.weight"], eps), weights[head])


def forward_sequences(weights, config, sequences):
    """Each 1-D token sequence by itself: a list of (hidden_states, logits) with the batch dimension taken off."""
    by_length = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    outputs = [None] * len(sequences)
    for indices in by_length.values():
        hidden_states, logits = forward(weights, config, torch.stack([sequences[i] for i in indices]))
        for row, index in enumerate(indices):
            outputs[index] = [h[row] for h in hidden_states], logits[row]
    return outputs
