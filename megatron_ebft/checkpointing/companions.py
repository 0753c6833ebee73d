"""Companions: the small Hugging Face files that a checkpoint carries so that a trained model can be converted back.

They are the configuration, the generation settings and the tokenizer.
"""

import os

from megatron_ebft.common.disk import is_regular, parse_json, read_bytes

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", SENTENCEPIECE, "tokenizer.model.v3", "spiece.model",
                   "chat_template.jinja", "chat_template.json", "tekken.json")
COMPANIONS = "hugging_face"
"""Folder of the companions inside a checkpoint folder."""


def read_companions(folder: str, names: tuple[str, ...] = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
                    ) -> dict[str, bytes]:
    """Contents by name of those files that exist; empty if the folder does not exist."""
    companions = {}
    for name in names:
        path = os.path.join(folder, name)
        if is_regular(path):
            companions[name] = read_bytes(path)
    return companions


def write_companions(folder: str, companions: dict[str, bytes]) -> None:
    """Write the files into a folder, which is created if it is missing."""
    os.makedirs(folder, exist_ok=True)
    for name, content in companions.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


def end_ids(companions: dict[str, bytes], eod: int) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's end of documents, and those that the generation settings name, as
    those of chat models do; without settings, those of the model's configuration.

    Raises:
        ValueError: the settings are damaged.
    """
    name = GENERATION_CONFIG if GENERATION_CONFIG in companions else CONFIG
    settings = parse_json(companions.get(name, b"{}"), name)
    named = settings.get("eos_token_id") or []
    named = named if isinstance(named, list) else [named]
    if not all(isinstance(token, int) for token in named):
        raise ValueError(f"{name}: eos_token_id is {named}; it must be a number, or a list of numbers")
    return tuple(sorted({eod, *named}))
