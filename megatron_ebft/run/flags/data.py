"""Flags of datasets, rows and the tokenizer."""

from megatron_ebft.data.tokenizer import TOKENIZER_TYPES
from megatron_ebft.run.flags.flag import Flag, Group, at_least

DATA = Group("data", (
    Flag("--data-path", str, "datasets made by tools/preprocess_data.py: one, several, or a weight before each",
         many=True, metavar="PREFIX"),
    Flag("--split", str, "weights of the training, validation and test split of --data-path", metavar="WEIGHTS",
         default_text="969,30,1"),
    Flag("--train-data-path", str, "datasets of the training split, instead of --data-path", many=True,
         metavar="PREFIX"),
    Flag("--valid-data-path", str, "datasets of the validation split, instead of --data-path", many=True,
         metavar="PREFIX"),
    Flag("--data-cache-path", str, "folder for dataset indices", metavar="DIR", default_text="beside each dataset"),
    Flag("--seq-length", int, "T, gold tokens of a row", default=1024, valid=at_least(1)),
    Flag("--tokenizer-type", str, "kind of tokenizer", default="HuggingFaceTokenizer", choices=TOKENIZER_TYPES),
    Flag("--tokenizer-model", str, "SentencePiece model file, or folder of a Hugging Face tokenizer", metavar="PATH"),
    Flag("--vocab-size", int, "number of ids of a NullTokenizer; for other tokenizers a number larger than their own",
         valid=at_least(1), default_text="the tokenizer's"),
    Flag("--ebft-document-mask", bool, "separate the documents of a row: attention and positions restart at each "
         "document, and blocks stay within one", default=False),
    Flag("--ebft-answer-only", bool, "train on answers only: blocks whose whole completion is answer, and cross "
         "entropy of answer tokens", default=False),
))
