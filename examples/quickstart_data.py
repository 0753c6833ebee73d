"""Make the quickstart's text and tokenizer: dates as programs write them in twenty languages.

    python examples/quickstart_data.py DIR

1. A document is a date in English, and the same in another language: "Tuesday, May 7, 1985 = martedì 7 maggio 1985".
   Words and their order are those of Unicode's CLDR, from which most programs take them; the days are drawn at random.
2. `start.jsonl` has twenty languages, and nothing in the English part tells which one comes. A model trained on it
   knows twenty ways to answer. `finetune.jsonl` has one of them: Italian.
3. `valid.jsonl` has other days, in Italian. A hash of the day decides where it belongs, so the same version of Babel
   makes the same files on every machine.
4. `tokenizer.model` is a SentencePiece BPE model, trained on `start.jsonl` only.
"""

import hashlib
import io
import json
import random
import sys
from datetime import date, timedelta
from pathlib import Path

import sentencepiece
from babel.dates import format_date

from megatron_ebft.common.disk import aside

LANGUAGES = ("af", "ca", "cs", "da", "de", "es", "fi", "fr", "gl", "hr",
             "hu", "it", "nb", "nl", "pl", "pt", "ro", "sl", "sv", "tr")
TARGET = "it"
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
DRAWN = 1200
"""Days that are drawn for each language."""
VALID_PERCENT = 20
"""Percentage of the days that are held out."""
VOCAB_SIZE = 512


def is_held_out(day: date) -> bool:
    return int(hashlib.sha256(day.isoformat().encode()).hexdigest(), 16) % 100 < VALID_PERCENT


def documents() -> dict[str, list[dict[str, str]]]:
    """The documents of each split. Languages are mixed."""
    generator = random.Random(1)
    splits = {"start": [], "finetune": [], "valid": []}
    for number in generator.sample(range((LAST - FIRST).days + 1), DRAWN * len(LANGUAGES)):
        day, language = FIRST + timedelta(days=number), generator.choice(LANGUAGES)
        document = {"prompt": f"{format_date(day, 'full', 'en')} = ", "answer": format_date(day, "full", language)}
        if not is_held_out(day):
            splits["start"].append(document)
        if language == TARGET:
            splits["valid" if is_held_out(day) else "finetune"].append(document)
    return splits


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model that normalises nothing."""
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
    splits = documents()
    for split, lines in splits.items():
        with aside(folder / f"{split}.jsonl") as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        print(f"{split}: {len(lines)} documents, {sum(len(''.join(line.values())) for line in lines)} characters")
    with aside(folder / "tokenizer.model") as unfinished:  # the model appears last: it marks the data as complete
        unfinished.write_bytes(train_tokenizer(["".join(line.values()) for line in splits["start"]], VOCAB_SIZE))
    print(f"tokenizer: {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
