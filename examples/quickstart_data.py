"""Make the quickstart's text and tokenizer from the standard library of the Python that runs this file.

    python examples/quickstart_data.py DIR

1. The text is split by file: `pretrain.jsonl`, `ebft.jsonl` and `valid.jsonl` hold whole documents, each in only one
   of them. So EBFT trains on text that pretraining has not seen, and nothing trains on the validation text.
2. EBFT and validation documents lose their comments and docstrings (`bare_code`). Fine-tuning then has something to
   learn that pretraining did not teach: bare code.
3. A hash of its path decides which split a file belongs to, so the split is the same on every machine with the same
   library.
4. `tokenizer.model` is a SentencePiece BPE model for code, trained on the pretraining text only.
"""

import ast
import hashlib
import io
import json
import sys
import sysconfig
from pathlib import Path

import sentencepiece

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
           "encodings", "pydoc_data", "__phello__"}
"""Folders outside the library's core, or with tables instead of code."""
SHARES = {"valid": 8, "ebft": 22, "pretrain": 70}
"""Percentage of the files in each split."""
MIN_CHARACTERS, MAX_CHARACTERS = 500, 200_000
"""Length of a document. Longer files are tables."""
MIN_CORPUS = 2_000_000
"""Least number of characters in all. With fewer, training would only memorise; some systems install only a part of
the library."""
VOCAB_SIZE = 2048


def documents() -> dict[str, str]:
    """Map each file's path within the library to its text, sorted by path, without duplicate texts.

    Raises:
        ValueError: the library has too little text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and text not in seen:
            seen.add(text)
            texts[name.as_posix()] = text
    total = sum(map(len, texts.values()))
    if total < MIN_CORPUS:
        raise ValueError(f"{root}: {len(texts)} source files with {total} characters; {MIN_CORPUS} are needed. "
                         "Install the whole standard library, or set PYTHON to an interpreter that has it")
    return texts


def split_of(name: str) -> str:
    """The split that a file belongs to, by a hash of its path."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % sum(SHARES.values())
    for split, share in SHARES.items():
        if number < share:
            return split
        number -= share
    raise AssertionError("unreachable")


def bare_code(text: str) -> str:
    """The same program without comments and docstrings, uniformly formatted."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model for code: it normalises nothing, and indentation takes a token or two."""
    model = io.BytesIO()  # a file name would become part of the model and change its fingerprint
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line), model_writer=model,
        model_type="bpe", vocab_size=vocab_size, unk_id=0, bos_id=-1, eos_id=1,
        character_coverage=1.0 - 1e-5, byte_fallback=True,  # rare letters become bytes
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        user_defined_symbols=["\n", "\t"], allow_whitespace_only_pieces=True, split_digits=True,
        max_sentence_length=20_000, num_threads=2, minloglevel=2)
    return model.getvalue()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {split: [] for split in SHARES}
    for name, text in documents().items():
        split = split_of(name)
        texts[split].append(text if split == "pretrain" else bare_code(text))
    for split in SHARES:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[split])
        print(f"{split}: {len(texts[split])} documents, {sum(map(len, texts[split])) / 1e6:.2f} million characters")
    unfinished = folder / "tokenizer.tmp"  # the model appears last: it marks the data as complete
    unfinished.write_bytes(train_tokenizer(texts["pretrain"], VOCAB_SIZE))
    unfinished.replace(folder / "tokenizer.model")
    print(f"tokenizer: {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
