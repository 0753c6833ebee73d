"""config.json of transformers, read as ModelArgs and written from them.

1. config.json is read strictly. An unknown key, or a value that this project does not compute, stops the conversion;
   the error names the key. Keys that begin with an underscore are private and ignored.
2. Both spellings of rotary settings are read: `rope_theta` with `rope_scaling`, and transformers 5's
   `rope_parameters`. The older spelling is written, since every version reads it.
"""

import json
import os
from dataclasses import replace

import torch

from megatron_ebft.checkpointing.companions import CONFIG
from megatron_ebft.common.disk import is_regular, read_json
from megatron_ebft.hf.families import FAMILIES, Family, HFModel
from megatron_ebft.model.architecture import LARGEST_NUMBER, LARGEST_SIZE, MOST_LAYERS, ModelArgs

COMMON = {"hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size", "num_hidden_layers": "num_layers",
          "num_attention_heads": "num_attention_heads", "vocab_size": "vocab_size", "rms_norm_eps": "norm_epsilon",
          "max_position_embeddings": "max_position_embeddings"}
"""Keys that every config.json must have, and the fields of ModelArgs that they set."""
OPTIONAL = ("architectures", "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings",
            "initializer_range", "rope_theta", "rope_scaling", "rope_parameters")
"""Keys that every family may have. Absent ones get transformers' defaults (see `_architecture`)."""
ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, None), "partial_rotary_factor": (1,),
        "add_cross_attention": (False,), "is_encoder_decoder": (False,)}
"""Keys that every family may have, and the values that this project computes."""
NO_EFFECT = set(
    # About the file, the tokenizer, how transformers runs the model, and training that this project does not do.
    "transformers_version torch_dtype dtype use_cache pretraining_tp max_window_layers attn_implementation "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class "
    "is_decoder return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss id2label "
    "label2id problem_type finetuning_task task_specific_params prefix chunk_size_feed_forward "
    # About generation, written here by transformers before 4.50.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens".split())
"""Keys without effect on what this project computes."""
HINTS = {"sliding_window": "; rows of no more tokens than the window never notice it: for these, set it to null"}
LLAMA3_ROPE = {"factor": "rope_scaling_factor", "low_freq_factor": "rope_low_freq_factor",
               "high_freq_factor": "rope_high_freq_factor",
               "original_max_position_embeddings": "rope_original_max_position_embeddings"}


def read_model(folder: str, flag: str) -> HFModel:
    """The model that a Hugging Face folder's config.json describes.

    Raises:
        ValueError: a key of config.json is missing, unknown or has an unsupported value; names `flag` and the key.
    """
    return parse_config(read_config(folder, flag), f"{flag} {folder}: {CONFIG}")


def read_config(folder: str, flag: str) -> dict:
    """config.json of a Hugging Face folder.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = os.path.join(folder, CONFIG)
    if not is_regular(path):
        raise ValueError(f"{flag} {folder}: no {CONFIG} there; name the local folder of a Hugging Face model (nothing "
                         "is downloaded)")
    return read_json(path, f"{flag} {folder}: {CONFIG}")


def parse_config(config: dict, where: str) -> HFModel:
    """The model that a config.json describes.

    Raises:
        ValueError: beginning with `where`: an unsupported architecture, or a key that is missing, unknown or has an
            unsupported value.
    """
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
        if key.startswith("_"):  # private to the program that wrote the file: no model depends on it
            continue
        if key not in known:
            raise ValueError(f"{where} has {key} = {_short(value)}, which is not understood for {family.architecture}, "
                             "so the converted model might compute something else; remove the key if it has no effect")
        values = value if key == "layer_types" and value and isinstance(value, list) else [value]
        if allowed.get(key) is not None and not all(_is_one_of(x, allowed[key]) for x in values):
            raise ValueError(f"{where} has {key} = {_short(value)}; supported is {_short(allowed[key][0])} only"
                             f"{HINTS.get(key, '')}")
    for key in (*COMMON, *family.required):
        if key not in config:
            raise ValueError(f"{where} has no {key}, which {family.architecture} needs")
    return family.model(_architecture(family, config, where))


def describe(architecture: ModelArgs, where: str) -> HFModel:
    """A model of the first family with this architecture.

    Raises:
        ValueError: beginning with `where`: no family has it.
    """
    always = dict(position_embedding_type="rope", rotary_percent=1.0, normalization="RMSNorm", swiglu=True,
                  add_bias_linear=False)
    for family in FAMILIES:
        needed = always | {"add_qkv_bias": False, "qk_layernorm": False} | family.sets
        if all(vars(architecture)[name] == value for name, value in needed.items()):
            return family.model(replace(architecture, padded_vocab_size=architecture.vocab_size))
    names = (*always, "add_qkv_bias", "qk_layernorm")
    raise ValueError(f"{where}: no supported family has this architecture "
                     f"({', '.join(f'{name} {vars(architecture)[name]}' for name in names)})")


def write_config(model: HFModel, dtype: torch.dtype, eos: int | None) -> dict:
    """A config.json from the architecture alone. `parse_config` gives the model back.

    Args:
        dtype: of the weights.
        eos: id that ends a document. Special ids are always written, as null if unknown: transformers has defaults for
            absent ones.
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
    """Whether a value equals an allowed one. A bool equals only a bool (Python has True == 1)."""
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed)


def _number(config: dict, key: str, where: str, kind: type = float, otherwise=None):
    """A number above 0 from a configuration; `otherwise` if it is absent or null."""
    value, most = config.get(key), LARGEST_SIZE if kind is int else LARGEST_NUMBER
    most = MOST_LAYERS if key == "num_hidden_layers" else most
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not 0 < value <= most:
        raise ValueError(f"{where} has {key} = {_short(value)}; it must be a{' whole' * (kind is int)} number above 0 "
                         f"and at most {most}")
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
    """Fields of ModelArgs for the rotary embedding."""
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
    known = {"default": {}, "llama3": LLAMA3_ROPE}
    kind = kinds.pop()
    if kinds or kind not in known:
        raise ValueError(f"{where} has the rope type {', '.join(sorted({kind, *kinds}))}; supported are default and "
                         "llama3")
    if rope.keys() != known[kind].keys():
        differing = ", ".join(sorted(rope.keys() ^ known[kind].keys()))
        raise ValueError(f"{where} has a rope type {kind} that is not understood: its keys should be "
                         f"{', '.join(known[kind]) or 'none'}; missing or unknown are {differing}")
    numbers = {name: _number(rope, key, where, int if "original" in key else float)
               for key, name in known[kind].items()}
    return dict(rotary_base=base, use_rope_scaling=kind == "llama3", **numbers)
