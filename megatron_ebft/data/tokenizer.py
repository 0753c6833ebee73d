"""Tokenizers: text to ids and back, behind one interface and under Megatron's flag names.

1. No ids are added around a text. The end-of-document id (eod) is appended to documents when a dataset is made.
2. The fingerprint of a tokenizer depends on what it does, not on where its files are. A dataset or a checkpoint that
   was made with another tokenizer is refused.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")

# The ids of this text are part of the fingerprint of a Hugging Face tokenizer: two tokenizers with the same id table
# may still split, merge or normalise differently.
_PROBE = "Energy-Based Fine-Tuning: naïve café, 1234 + 5.67 = ¾?\n\tdef f(x):\n\t\treturn {'Ω': x ** 2}  # 你好 🙂"


class Tokenizer(ABC):
    """Text to token ids and back.

    Args:
        name: Megatron's name of the type.
        num_ids: number of ids that the tokenizer defines.
        vocab_size: --vocab-size, or None.
        eod: end-of-document id.
        fingerprint: sha256, hexadecimal, of what defines the tokenizer.

    Raises:
        ValueError: --vocab-size is smaller than the number of ids.
    """

    def __init__(self, name: str, num_ids: int, vocab_size: int | None, eod: int, fingerprint: str):
        if vocab_size is not None and vocab_size < num_ids:
            raise ValueError(f"--vocab-size {vocab_size}: the {name} has {num_ids} ids; leave the flag out, or give "
                             f"at least {num_ids}")
        self.name = name
        self.num_ids = num_ids
        self.vocab_size: int = num_ids if vocab_size is None else vocab_size
        """Upper bound of the ids. --vocab-size may make it larger than `num_ids` (a model with a padded vocabulary)."""
        self.eod = eod
        """The id that ends a document."""
        self.fingerprint = fingerprint
        """sha256, hexadecimal. Equal for tokenizers that do the same."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The tokenizer's part of the key of Megatron-Core's dataset cache."""
        return {"class": self.name, "fingerprint": self.fingerprint}

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without special ids around it."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids. Ids that the tokenizer does not define (padding, a padded vocabulary) are left out."""
        return self._decode([int(i) for i in ids if 0 <= i < self.num_ids])

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of valid ids."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file; its eos ends documents."""

    def __init__(self, path: str, vocab_size: int | None):
        import sentencepiece

        if not Path(path).is_file():
            raise ValueError(f"--tokenizer-model {path}: no such file; give the .model file sentencepiece wrote")
        model = Path(path).read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"--tokenizer-model {path}: not a sentencepiece model ({error})") from error
        if self._model.eos_id() < 0:
            raise ValueError(f"--tokenizer-model {path}: the model has no eos id to end documents with; train it "
                             "with one (spm_train's default, --eos_id=2; -1 leaves it out)")
        super().__init__("SentencePieceTokenizer", self._model.get_piece_size(), vocab_size, self._model.eos_id(),
                         hashlib.sha256(model).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A local folder that transformers' AutoTokenizer reads; its eos token ends documents."""

    def __init__(self, path: str, vocab_size: int | None):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError("--tokenizer-type HuggingFaceTokenizer needs the transformers package: "
                             "pip install transformers") from error
        if not Path(path).is_dir():
            raise ValueError(f"--tokenizer-model {path}: no such folder; give a local folder that holds the "
                             "tokenizer's files (nothing is downloaded)")
        try:
            self._model = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer-model {path}: transformers finds no tokenizer there ({error})") from error
        eod = self._model.eos_token_id
        if eod is None:
            raise ValueError(f"--tokenizer-model {path}: the tokenizer has no eos token to end documents with; name "
                             'one as "eos_token" in its tokenizer_config.json')
        table = self._model.get_vocab()
        content = json.dumps([sorted(table.items()), eod, self.tokenize(_PROBE)])
        super().__init__("HuggingFaceTokenizer", max(table.values()) + 1, vocab_size, eod,
                         hashlib.sha256(content.encode()).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)


class NullTokenizer(Tokenizer):
    """For tests and benchmarks: the text is a list of decimal ids, separated by spaces. The last id ends documents."""

    def __init__(self, vocab_size: int):
        super().__init__("NullTokenizer", vocab_size, vocab_size, vocab_size - 1,
                         hashlib.sha256(f"NullTokenizer {vocab_size}".encode()).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        ids = [int(word) for word in text.split()]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"--vocab-size {self.vocab_size}: the text holds ids from {min(ids)} to {max(ids)}")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of --tokenizer-type, --tokenizer-model and --vocab-size.

    Args:
        tokenizer_type: SentencePieceTokenizer, HuggingFaceTokenizer or NullTokenizer.
        tokenizer_model: the .model file, or the local folder; None for NullTokenizer.
        vocab_size: number of ids. Required by NullTokenizer; for the others the model's, if it is larger than the
            tokenizer's.

    Raises:
        ValueError: a flag is missing or wrong; names the flag.
    """
    if tokenizer_type == "NullTokenizer":
        if tokenizer_model is not None:
            raise ValueError("--tokenizer-model: NullTokenizer has no model; leave the flag out")
        if vocab_size is None or vocab_size < 2:
            raise ValueError("--vocab-size: NullTokenizer needs one, of at least 2")
        return NullTokenizer(vocab_size)
    classes = {"SentencePieceTokenizer": SentencePieceTokenizer, "HuggingFaceTokenizer": HuggingFaceTokenizer}
    if tokenizer_type not in classes:
        raise ValueError(f"--tokenizer-type {tokenizer_type}: choose from {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_model is None:
        raise ValueError(f"--tokenizer-model: {tokenizer_type} needs one")
    return classes[tokenizer_type](tokenizer_model, vocab_size)
