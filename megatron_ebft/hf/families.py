"""Model families of transformers: what config.json and its tensors are in Megatron-Core's terms, and the way back.

1. A family is declared, not programmed: the tensors that make up each Megatron-Core tensor, with their shapes, and
   what its config.json may say. To add one: a `Family` in FAMILIES with its class in transformers, its tensors (LAYER
   and what differs from it), the architecture flags it has by nature (`sets`), keys of config.json that are its own
   with the values we can compute (`only`), and keys whose absence means something else there than here (`required`).
   tests/hf/test_convert.py then needs a line in MODELS.
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

from megatron_ebft.model.architecture import ModelArgs

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
OPTIONAL = ("architectures", "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings",
            "initializer_range", "rope_theta", "rope_scaling", "rope_parameters")
"""Keys understood everywhere; transformers fills in those that are absent (see `_architecture`)."""
ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, None), "partial_rotary_factor": (1,),
        "add_cross_attention": (False,), "is_encoder_decoder": (False,)}
"""Keys every family may have, and the values we compute."""
NO_EFFECT = set(
    # Of the file, the tokenizer, the way transformers runs the model, and training that we do not do.
    "transformers_version torch_dtype dtype use_cache pretraining_tp max_window_layers _name_or_path "
    "_from_model_config _attn_implementation _attn_implementation_autoset attn_implementation bos_token_id "
    "eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class is_decoder "
    "return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss id2label label2id "
    "problem_type finetuning_task task_specific_params prefix chunk_size_feed_forward "
    # Of generation, as transformers before 4.50 wrote them here.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens".split())
"""Keys that change nothing in what is computed here."""
HINTS = {"sliding_window": "; rows of no more tokens than the window never notice it: for these, set it to null"}
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
    classes = config.get("architectures")
    family = next((family for family in FAMILIES if classes == [family.architecture]), None)
    if family is None:
        raise ValueError(f"{where} names the architecture {_short(classes)}; supported are "
                         f"{', '.join(family.architecture for family in FAMILIES)}")
    if config.get("model_type", family.model_type) != family.model_type:
        raise ValueError(f"{where} has model_type = {_short(config['model_type'])}, and {family.architecture} is of "
                         f"type {family.model_type}")
    allowed = {**ONLY, **family.only}
    known = {*COMMON, *OPTIONAL, *NO_EFFECT, *allowed}
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"{where} has {key} = {_short(value)}, which is not understood for {family.architecture}, "
                             "so the converted model might compute something else; remove the key if it has no effect")
        values = value if key == "layer_types" and value else [value]
        if allowed.get(key) is not None and not all(_is_one_of(x, allowed[key]) for x in values):
            raise ValueError(f"{where} has {key} = {_short(value)}; supported is {_short(allowed[key][0])} only"
                             f"{HINTS.get(key, '')}")
    for key in (*COMMON, *family.required):
        if key not in config:
            raise ValueError(f"{where} has no {key}, which {family.architecture} needs")
    return _model(family, _architecture(family, config, where))


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


def write_config(model: HFModel, dtype: torch.dtype, eos: int | None) -> dict:
    """config.json of a model whose own is not known: `parse_config` gives the model back.

    Args:
        eos: id that ends a document. Ids are always written, null if need be: transformers has values of its own for
            those that are absent.
    """
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
        "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}


def _short(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_one_of(value, allowed: tuple) -> bool:
    """Equal to one of them, and a bool or a list only where that one is (True == 1 otherwise)."""
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed)


def _number(config: dict, key: str, where: str, kind: type = float, otherwise=None):
    """A number above 0 out of a configuration; `otherwise` where it is absent or null."""
    value = config.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not value > 0:
        raise ValueError(f"{where} has {key} = {_short(value)}; it must be a{' whole' * (kind is int)} number above 0")
    return kind(value)


def _architecture(family: Family, config: dict, where: str) -> ModelArgs:
    fields = {name: _number(config, key, where, float if name == "norm_epsilon" else int)
              for key, name in COMMON.items()}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    head = _number(config, "head_dim", where, int, otherwise=-1)
    if head < 0 and hidden % heads:
        raise ValueError(f"{where} has hidden_size {hidden}, not a multiple of num_attention_heads {heads}, and no "
                         "head_dim")
    groups = _number(config, "num_key_value_heads", where, int, otherwise=heads)
    if heads % groups:
        raise ValueError(f"{where} has num_attention_heads {heads}, not a multiple of num_key_value_heads {groups}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{where} has tie_word_embeddings = {_short(tied)}; it must be true or false")
    return ModelArgs(
        **fields, num_query_groups=groups, kv_channels=head if head > 0 else hidden // heads,
        padded_vocab_size=fields["vocab_size"],
        init_method_std=_number(config, "initializer_range", where, otherwise=0.02),
        untie_embeddings_and_output_weights=not tied, **family.sets, **_rope(config, where))


def _rope(config: dict, where: str) -> dict:
    """ModelArgs fields of the rotary embedding."""
    spelled = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None}
    if len(spelled) > 1 or not all(isinstance(value, dict) for value in spelled.values()):
        raise ValueError(f"{where} has {' and '.join(f'{key} = {_short(value)}' for key, value in spelled.items())}; "
                         "there must be one of them, a JSON object")
    rope = dict(*spelled.values())
    if "rope_theta" in rope and config.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        raise ValueError(f"{where} has two values of rope_theta, {config['rope_theta']} and {rope['rope_theta']}")
    base = _number({"rope_theta": config.get("rope_theta")} | rope, "rope_theta", where, otherwise=10000.0)
    rope.pop("rope_theta", None)
    kinds = {str(rope.pop(key)) for key in ("type", "rope_type") if key in rope} or {"default"}
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
    numbers = {name: _number(rope, key, where, int if "original" in key else float)
               for key, name in wanted[kind].items()}
    return dict(rotary_base=base, use_rope_scaling=kind == "llama3", **numbers)


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
