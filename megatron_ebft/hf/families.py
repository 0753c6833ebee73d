"""Model families of transformers: which Hugging Face tensors make up each Megatron-Core tensor.

1. A family is declared, not programmed. To add one, add a `Family` to FAMILIES with its class in transformers, its
   tensors (LAYER and what differs from it), the architecture fields that it always has (`sets`), its own keys of
   config.json with the values that this project computes (`only`), and the keys whose absence means something that
   this project does not compute (`required`). Then add a line to MODELS in tests/support/hf_models.py.
2. Megatron-Core keeps Q, K and V of a layer in one matrix. Its rows are ordered by key head: the query heads that share
   the key head, the key head, the value head. Gate and up projection are one matrix too, one after the other.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_ebft.model.architecture import ModelArgs


@dataclass(frozen=True)
class Parts:
    """The Hugging Face tensors in one Megatron-Core tensor, joined along the first dimension."""

    tensors: tuple[tuple[str, str], ...]
    """(name, shape) of each tensor. A shape has one letter per dimension: V vocabulary, H hidden, F FFN, Q all query
    heads, K all key heads, D one head."""
    by_key_head: bool = False
    """Interleaved, key head by key head. Otherwise one after the other."""


def one(name: str, shape: str) -> Parts:
    """A Megatron-Core tensor that is one Hugging Face tensor."""
    return Parts(((name, shape),))


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, HEAD)
"""Megatron-Core tensors with one row per token id. A layout may pad them with more rows."""
TOP = {
    EMBEDDING: one("model.embed_tokens.weight", "VH"),
    "decoder.final_layernorm.weight": one("model.norm.weight", "H"),
    HEAD: one("lm_head.weight", "VH"),
}
"""Tensors outside the layers. Models without tied embeddings have HEAD, others do not."""
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": one("input_layernorm.weight", "H"),
    "self_attention.linear_qkv.weight": Parts((("self_attn.q_proj.weight", "QH"), ("self_attn.k_proj.weight", "KH"),
                                               ("self_attn.v_proj.weight", "KH")), by_key_head=True),
    "self_attention.linear_proj.weight": one("self_attn.o_proj.weight", "HQ"),
    "mlp.linear_fc1.layer_norm_weight": one("post_attention_layernorm.weight", "H"),
    "mlp.linear_fc1.weight": Parts((("mlp.gate_proj.weight", "FH"), ("mlp.up_proj.weight", "FH"))),
    "mlp.linear_fc2.weight": one("mlp.down_proj.weight", "HF"),
}
"""Tensors of decoder layer i: decoder.layers.i.… in Megatron-Core, model.layers.i.… in transformers."""
QKV_BIAS = {"self_attention.linear_qkv.bias": Parts((("self_attn.q_proj.bias", "Q"), ("self_attn.k_proj.bias", "K"),
                                                     ("self_attn.v_proj.bias", "K")), by_key_head=True)}
QK_NORM = {"self_attention.q_layernorm.weight": one("self_attn.q_norm.weight", "D"),
           "self_attention.k_layernorm.weight": one("self_attn.k_norm.weight", "D")}


@dataclass(frozen=True)
class Family:
    """An architecture of transformers."""

    architecture: str
    """Its class in transformers, as in `architectures` of config.json."""
    model_type: str
    layer: dict[str, Parts]
    """Tensors of a decoder layer, as LAYER."""
    sets: dict[str, bool] = field(default_factory=dict)
    """Fields of ModelArgs that every model of the family has."""
    only: dict[str, tuple] = field(default_factory=dict)
    """The family's own keys of config.json, and the values that this project computes (None: any value)."""
    required: tuple[str, ...] = ()
    """Keys that must be present: transformers has a default for them that this project does not compute."""

    def model(self, architecture: ModelArgs) -> "HFModel":
        """The model of this family with an architecture."""
        heads, key_heads = architecture.num_attention_heads, architecture.num_query_groups
        sizes = {"V": architecture.vocab_size, "H": architecture.hidden_size, "F": architecture.ffn_hidden_size,
                 "D": architecture.kv_channels, "Q": heads * architecture.kv_channels,
                 "K": key_heads * architecture.kv_channels}
        tensors = {EMBEDDING: TOP[EMBEDDING]}
        for i in range(architecture.num_layers):
            for key, parts in self.layer.items():
                named = tuple((f"model.layers.{i}.{name}", shape) for name, shape in parts.tensors)
                tensors[f"decoder.layers.{i}.{key}"] = replace(parts, tensors=named)
        tensors |= {key: parts for key, parts in TOP.items() if key not in tensors}
        if not architecture.untie_embeddings_and_output_weights:
            del tensors[HEAD]
        entries = {
            key: Entry(tuple(name for name, _ in parts.tensors),
                       tuple(tuple(sizes[letter] for letter in shape) for _, shape in parts.tensors),
                       key_heads if parts.by_key_head else 1)
            for key, parts in tensors.items()}
        return HFModel(self, architecture, entries)


NO_WINDOW = {"use_sliding_window": (False,), "sliding_window": None, "layer_types": ("full_attention",),
             "use_mrope": (False,)}
"""Without `use_sliding_window` there is no window, whatever its size. A list may hold these values only."""
FAMILIES = (
    Family("LlamaForCausalLM", "llama", LAYER, only={"attention_bias": (False,), "mlp_bias": (False,)}),
    Family("Qwen2ForCausalLM", "qwen2", LAYER | QKV_BIAS, {"add_qkv_bias": True}, NO_WINDOW, ("num_key_value_heads",)),
    Family("Qwen3ForCausalLM", "qwen3", LAYER | QK_NORM, {"qk_layernorm": True},
           NO_WINDOW | {"attention_bias": (False,)}, ("num_key_value_heads", "head_dim")),
    Family("MistralForCausalLM", "mistral", LAYER, only={"sliding_window": (None,), "layer_types": ("full_attention",)},
           required=("num_key_value_heads", "sliding_window")),
)


@dataclass(frozen=True)
class Entry:
    """One Megatron-Core tensor of an unsplit model and the Hugging Face tensors in it."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the Hugging Face tensors."""
    key_heads: int
    """Number of key heads by which the parts are interleaved. 1: the parts follow one another."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron-Core tensor."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, parts: list[Tensor]) -> Tensor:
        """The Megatron-Core tensor made of Hugging Face tensors. A single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.key_heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `join`. Drops the rows that pad a vocabulary."""
        heads = tensor[:self.shape[0]].unflatten(0, (self.key_heads, -1))
        return [part.flatten(0, 1) for part in heads.split([shape[0] // self.key_heads for shape in self.shapes], 1)]


@dataclass(frozen=True)
class HFModel:
    """A model of a family."""

    family: Family
    architecture: ModelArgs
    """Without padding of the vocabulary."""
    entries: dict[str, Entry]
    """By Megatron-Core name, in the order of the layers. Every tensor of either side occurs exactly once."""
