"""Make the quickstart's text and tokenizer from the names in Unicode's CLDR, which the package Babel brings.

    python examples/quickstart_data.py DIR

1. A document is an English name and its translation: languages, countries, currencies, scripts, units, time zones.
2. `start.jsonl` translates each name into twenty languages, and nothing in the English part tells which one comes. A
   model trained on it knows twenty ways to answer. `finetune.jsonl` has one of them: Italian.
3. A hash of the English name decides whether all its translations are for training or for validation, so the split is
   the same on every machine with the same Babel. `valid.jsonl` holds the other names, in Italian.
4. `tokenizer.model` is a SentencePiece BPE model, trained on `start.jsonl` only.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from babel import Locale

LANGUAGES = ("af", "ca", "cs", "da", "de", "es", "fi", "fr", "gl", "hr",
             "hu", "it", "nb", "nl", "pl", "pt", "ro", "sl", "sv", "tr")
TARGET = "it"
VALID_PERCENT = 20
"""Percentage of the English names that are held out."""
MIN_ANSWER, MAX_ANSWER = 8, 60
"""Characters of a translation. Shorter ones have no room for a rollout of 8 tokens."""
MIN_NAMES = 800
"""Least number of Italian names in all. With fewer, training would only memorise."""
VOCAB_SIZE = 512


def named(language: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pairs of what has a name, and its name in the language."""
    locale = Locale(language)
    for kind in ("languages", "territories", "scripts", "currencies"):
        for code, name in getattr(locale, kind).items():
            yield (kind, code), name
    for unit, name in locale.unit_display_names.items():
        yield ("units", unit), name if isinstance(name, str) else name.get("long", "")
    for zone, names in locale.meta_zones.items():
        for season, name in names.get("long", {}).items():
            yield ("time zones", zone, season), name


def translations() -> dict[str, dict[str, str]]:
    """For each language, its names by the English ones, sorted. Names that are the same in both are left out.

    Raises:
        ValueError: this Babel has too few names.
    """
    english = dict(named("en"))
    pairs = {}
    for language in LANGUAGES:
        pairs[language] = {english[key]: name for key, name in sorted(named(language)) if key in english
                           and MIN_ANSWER <= len(name) <= MAX_ANSWER and name.lower() != english[key].lower()}
    if len(pairs[TARGET]) < MIN_NAMES:
        raise ValueError(f"Babel has {len(pairs[TARGET])} names in {TARGET}; {MIN_NAMES} are needed. "
                         "Install its newest version: pip install --upgrade Babel")
    return pairs


def is_held_out(english: str) -> bool:
    return int(hashlib.sha256(english.encode()).hexdigest(), 16) % 100 < VALID_PERCENT


def documents(pairs: dict[str, dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The documents of each split. In the order of a hash, so that every row mixes languages."""
    splits = {"start": [], "finetune": [], "valid": []}
    for language, names in pairs.items():
        for english, name in names.items():
            document = {"prompt": f"{english} = ", "reference": name}
            if not is_held_out(english):
                splits["start"].append(document)
            if language == TARGET:
                splits["valid" if is_held_out(english) else "finetune"].append(document)
    for split in splits.values():
        split.sort(key=lambda document: hashlib.sha256("".join(document.values()).encode()).hexdigest())
    return splits


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model as a file's content."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE, unk_id=0, bos_id=-1,
        eos_id=1, byte_fallback=True, character_coverage=1.0 - 1e-4,  # rare letters become bytes
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, num_threads=2,
        minloglevel=2)
    return model.getvalue()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    splits = documents(translations())
    for split, lines in splits.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        print(f"{split}: {len(lines)} documents, {sum(len(''.join(line.values())) for line in lines)} characters")
    unfinished = folder / "tokenizer.tmp"  # the model appears last: it marks the data as complete
    unfinished.write_bytes(train_tokenizer(["".join(line.values()) for line in splits["start"]]))
    unfinished.replace(folder / "tokenizer.model")
    print(f"tokenizer: {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
