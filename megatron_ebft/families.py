"""Model families of transformers: what config.json and its tensors are in Megatron-Core's terms, and the way back.

1. A family is declared, not programmed: the tensors that make up each Megatron-Core tensor, with their shapes, and
   what its config.json may say. To add one: a `Family` in FAMILIES with its class in transformers, its tensors (LAYER
   and what differs from it), the architecture flags it has by nature (`sets`), keys of config.json that are its own
   with the values we can compute (`only`), and keys whose absence means something else there than here (`required`).
   tests/test_convert.py then needs a line in MODELS.
2. config.json is read strictly. A key that is neither understood nor known to be without effect stops the conversion
   by its name, and so does a value we do not compute: nothing is lost silently.
3. Megatron-Core keeps Q, K and V of a layer in one matrix, ordered by key head: the query heads that share the key
   head, the key head, the value head. Gate and up projection are one matrix as well, one after the other.
4. Both spellings of rotary settings are read: `rope_theta` and `rope_scaling`, and transformers 5's `rope_parameters`.
   The older one is written, which every version reads.
"""

import json
import os
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_ebft.model import ModelArgs

CONFIG = "config.json"


@dataclass(frozen=True)
class Parts:
    """The Hugging Face tensors in one Megatron-Core tensor, joined along the first dimension."""

    tensors: tuple[tuple[str, str], ...]
    """(name, shape): a letter a dimension. V vocabulary, H hidden, F FFN, Q all query heads, K all key heads, D one
    head."""
    by_key_head: bool = False
    """Interleaved, key head by key head; else one after the other."""


def one(name: str, shape: str) -> Parts:
    return Parts(((name, shape),))


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, HEAD)
"""Megatron-Core tensors whose rows are ids, of which a layout may pad some on."""
TOP = {
    EMBEDDING: one("model.embed_tokens.weight", "VH"),
    "decoder.final_layernorm.weight": one("model.norm.weight", "H"),
    HEAD: one("lm_head.weight", "VH"),
}
"""Outside of the layers; HEAD only where it is not tied to the embedding."""
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": one("input_layernorm.weight", "H"),
    "self_attention.linear_qkv.weight": Parts((("self_attn.q_proj.weight", "QH"), ("self_attn.k_proj.weight", "KH"),
                                               ("self_attn.v_proj.weight", "KH")), by_key_head=True),
    "self_attention.linear_proj.weight": one("self_attn.o_proj.weight", "HQ"),
    "mlp.linear_fc1.layer_norm_weight": one("post_attention_layernorm.weight", "H"),
    "mlp.linear_fc1.weight": Parts((("mlp.gate_proj.weight", "FH"), ("mlp.up_proj.weight", "FH"))),
    "mlp.linear_fc2.weight": one("mlp.down_proj.weight", "HF"),
}
"""Of decoder layer i: decoder.layers.i.… in Megatron-Core, model.layers.i.… in transformers."""
QKV_BIAS = {"self_attention.linear_qkv.bias": Parts((("self_attn.q_proj.bias", "Q"), ("self_attn.k_proj.bias", "K"),
                                                     ("self_attn.v_proj.bias", "K")), by_key_head=True)}
QK_NORM = {"self_attention.q_layernorm.weight": one("self_attn.q_norm.weight", "D"),
           "self_attention.k_layernorm.weight": one("self_attn.k_norm.weight", "D")}

COMMON = {"hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size", "num_hidden_layers": "num_layers",
          "num_attention_heads": "num_attention_heads", "vocab_size": "vocab_size", "rms_norm_eps": "norm_epsilon",
          "max_position_embeddings": "max_position_embeddings"}
"""Keys every config.json must have, and our names for them."""
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "initializer_range", "rope_theta", "rope_scaling",
            "rope_parameters")
"""Keys understood everywhere; transformers fills in those that are absent (see `_architecture`)."""
ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, None), "partial_rotary_factor": (1,),
        "is_decoder": (False, True), "add_cross_attention": (False,), "is_encoder_decoder": (False,)}
"""Keys every family may have, and the values we compute."""
NO_EFFECT = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
             "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "max_window_layers", "_name_or_path",
             "_from_model_config", "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation",
             "id2label", "label2id", "chunk_size_feed_forward"}
"""Keys that change nothing in what is computed here."""
LLAMA3_ROPE = {"factor": "rope_scaling_factor", "low_freq_factor": "rope_low_freq_factor",
               "high_freq_factor": "rope_high_freq_factor",
               "original_max_position_embeddings": "rope_original_max_position_embeddings"}


@dataclass(frozen=True)
class Family:
    """An architecture of transformers."""

    architecture: str
    """Its class there, as `architectures` in config.json names it."""
    model_type: str
    layer: dict[str, Parts]
    sets: dict[str, bool] = field(default_factory=dict)
    """Fields of ModelArgs that it has by nature."""
    only: dict[str, tuple] = field(default_factory=dict)
    """Keys of its config.json beyond the common ones, and the values we compute."""
    required: tuple[str, ...] = ()
    """Keys that may not be absent, as transformers then assumes what we do not."""


NO_WINDOW = {"use_sliding_window": (False,), "sliding_window": None, "layer_types": ("full_attention",),
             "use_mrope": (False,)}
"""None: any value (there is no window unless `use_sliding_window`). A list must have these values only."""
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
    """Of the Hugging Face tensors."""
    key_heads: int
    """By which parts are interleaved; 1: one after the other."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron-Core tensor."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, parts: list[Tensor]) -> Tensor:
        """The Megatron-Core tensor of Hugging Face ones; a lone part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.key_heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `join`; rows past `shape` (a padded vocabulary) are left out."""
        heads = tensor[:self.shape[0]].unflatten(0, (self.key_heads, -1))
        return [part.flatten(0, 1) for part in heads.split([shape[0] // self.key_heads for shape in self.shapes], 1)]


@dataclass(frozen=True)
class HFModel:
    """A model of a family."""

    family: Family
    architecture: ModelArgs
    """Its vocabulary not padded."""
    entries: dict[str, Entry]
    """By Megatron-Core's name, in the order of the layers; between them, every tensor of both sides exactly once."""


def read_model(folder: str, flag: str) -> HFModel:
    """The model that a Hugging Face folder's config.json describes.

    Raises:
        ValueError: naming `flag` and the key of config.json that is missing or that we do not compute.
    """
    return parse_config(read_config(folder, flag), f"{flag} {folder}: {CONFIG}")


def read_config(folder: str, flag: str) -> dict:
    """config.json of a Hugging Face folder; ValueError where there is none."""
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {folder}: no {CONFIG} there; name the local folder of a Hugging Face model (nothing "
                         "is downloaded)")
    try:
        with open(path) as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {CONFIG} is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{flag} {folder}: {CONFIG} is not a JSON object; copy it again")
    return config


def parse_config(config: dict, where: str) -> HFModel:
    """The model a config.json describes; ValueErrors begin with `where`."""
    classes = config.get("architectures") or []
    family = next((family for family in FAMILIES if classes == [family.architecture]), None)
    if family is None:
        raise ValueError(f"{where} names the architecture {', '.join(map(str, classes)) or '(none)'}; supported are "
                         f"{', '.join(family.architecture for family in FAMILIES)}")
    allowed = {**ONLY, **family.only}
    known = {*COMMON, *OPTIONAL, *NO_EFFECT, *allowed}
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"{where} has {key} = {_short(value)}, which is not understood for {family.architecture}, "
                             "so the converted model might compute something else; remove the key if it has no effect")
        values = value if isinstance(value, list) else [value]
        if allowed.get(key) is not None and not all(x in allowed[key] for x in values):
            raise ValueError(f"{where} has {key} = {_short(value)}; supported is {_short(allowed[key][0])} only")
    for key in (*COMMON, *family.required):
        if key not in config:
            raise ValueError(f"{where} has no {key}, which {family.architecture} needs")
    try:
        return _model(family, _architecture(family, config, where))
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} has a value of the wrong type ({error})") from error


def describe(architecture: ModelArgs, where: str) -> HFModel:
    """A model of the first family that has this architecture; ValueErrors begin with `where`."""
    always = dict(position_embedding_type="rope", rotary_percent=1.0, normalization="RMSNorm", swiglu=True,
                  add_bias_linear=False)
    for family in FAMILIES:
        needed = always | {"add_qkv_bias": False, "qk_layernorm": False} | family.sets
        if all(vars(architecture)[name] == value for name, value in needed.items()):
            return _model(family, replace(architecture, padded_vocab_size=architecture.vocab_size))
    names = (*always, "add_qkv_bias", "qk_layernorm")
    raise ValueError(f"{where}: no supported family has this architecture "
                     f"({', '.join(f'{name} {vars(architecture)[name]}' for name in names)})")


def write_config(model: HFModel, dtype: torch.dtype) -> dict:
    """config.json of a model whose own is not known: `parse_config` gives the model back."""
    args, family = model.architecture, model.family
    scaling = {"rope_type": "llama3", **{key: vars(args)[name] for key, name in LLAMA3_ROPE.items()}}
    return {
        "architectures": [family.architecture], "model_type": family.model_type,
        **{key: vars(args)[name] for key, name in COMMON.items()},
        "num_key_value_heads": args.num_query_groups, "head_dim": args.kv_channels, "hidden_act": "silu",
        "attention_dropout": 0.0, "initializer_range": args.init_method_std, "rope_theta": args.rotary_base,
        "rope_scaling": scaling if args.use_rope_scaling else None,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        **{key: values[0] for key, values in family.only.items() if values and key != "layer_types"},
        "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}


def _short(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _architecture(family: Family, config: dict, where: str) -> ModelArgs:
    heads = config["num_attention_heads"]
    fields = {name: config[key] for key, name in COMMON.items()}
    for key, name in COMMON.items():
        if not (isinstance(config[key], int) or name == "norm_epsilon") or not config[key] > 0:
            raise ValueError(f"{where} has {key} = {_short(config[key])}; it must be a number above 0")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ValueError(f"{where} has hidden_size {config['hidden_size']}, not a multiple of num_attention_heads "
                         f"{heads}, and no head_dim")
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"{where} has num_attention_heads {heads}, not a multiple of num_key_value_heads {groups}")
    return ModelArgs(
        **fields, num_query_groups=groups, kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        padded_vocab_size=config["vocab_size"], init_method_std=config.get("initializer_range", 0.02),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False), **family.sets,
        **_rope(config, where))


def _rope(config: dict, where: str) -> dict:
    """ModelArgs fields of the rotary embedding."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kinds = {rope.pop(key) for key in ("type", "rope_type") if key in rope} or {"default"}
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where} has a partial_rotary_factor; supported is 1 only")
    wanted = {"default": {}, "llama3": LLAMA3_ROPE}
    kind = kinds.pop()
    if kinds or kind not in wanted:
        raise ValueError(f"{where} has the rope type {', '.join(sorted({kind, *kinds}))}; supported are default and "
                         "llama3")
    if rope.keys() != wanted[kind].keys():
        differing = ", ".join(sorted(rope.keys() ^ wanted[kind].keys()))
        raise ValueError(f"{where} has a rope type {kind} that is not understood: its keys should be "
                         f"{', '.join(wanted[kind]) or 'none'}; missing or unknown are {differing}")
    return dict(rotary_base=float(base), use_rope_scaling=kind == "llama3",
                **{name: rope[key] for key, name in wanted[kind].items()})


def _model(family: Family, args: ModelArgs) -> HFModel:
    sizes = {"V": args.vocab_size, "H": args.hidden_size, "F": args.ffn_hidden_size, "D": args.kv_channels,
             "Q": args.num_attention_heads * args.kv_channels, "K": args.num_query_groups * args.kv_channels}
    parts = {EMBEDDING: TOP[EMBEDDING]}
    for i in range(args.num_layers):
        for key, here in family.layer.items():
            tensors = tuple((f"model.layers.{i}.{name}", shape) for name, shape in here.tensors)
            parts[f"decoder.layers.{i}.{key}"] = replace(here, tensors=tensors)
    parts |= {key: value for key, value in TOP.items() if key not in parts}
    if not args.untie_embeddings_and_output_weights:
        del parts[HEAD]
    entries = {
        key: Entry(tuple(name for name, _ in here.tensors),
                   tuple(tuple(sizes[letter] for letter in shape) for _, shape in here.tensors),
                   args.num_query_groups if here.by_key_head else 1)
        for key, here in parts.items()}
    return HFModel(family, args, entries)
