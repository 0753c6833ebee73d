"""Writes indexed datasets under temporary names, which are replaced at the end."""

import json
import os
from collections import Counter

import numpy
from documents import Document
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ebft.data.rows import ANSWER_MASK_SUFFIX


class DatasetWriter:
    """Writes an indexed dataset, its answer mask and its metadata, and counts what is in it."""

    def __init__(self, prefix: str, dtype: type[numpy.number], with_answers: bool):
        self.prefix, self.with_answers = prefix, with_answers
        self.documents = self.tokens = self.answer_tokens = self.longest = self.changed = 0
        self.first_change = ""
        self.notes, self.left_out = Counter(), Counter()
        """Notes of documents; why records made none."""
        self._temporary = f"{prefix}.{os.getpid()}.tmp"
        self._text = IndexedDatasetBuilder(self._temporary + ".bin", dtype)
        self._mask = None
        if with_answers:
            self._mask = IndexedDatasetBuilder(self._temporary + ANSWER_MASK_SUFFIX + ".bin", numpy.uint8)

    def add(self, document: Document | str) -> None:
        """Add a document, or count why there is none."""
        if isinstance(document, str):
            self.left_out[document] += 1
            return
        length = len(document.ids)
        self._text.add_document(document.ids, [length])
        if self._mask is not None:
            self._mask.add_document(document.answer_L, [length])
        self.documents += 1
        self.tokens += length
        self.answer_tokens += int(document.answer_L.sum())
        self.longest = max(self.longest, length)
        self.changed += bool(document.change)
        self.first_change = self.first_change or document.change
        self.notes.update(document.notes)

    def counts(self) -> dict:
        """What is in the dataset, and what was left out of it."""
        answers = {} if self._mask is None else {"answer_tokens": self.answer_tokens}
        return dict(documents=self.documents, tokens=self.tokens, **answers, longest=self.longest,
                    left_out=dict(self.left_out))

    def finish(self, metadata: dict) -> None:
        """Write the indices and the metadata, and rename everything. Replaces an older dataset."""
        endings = [".bin", ".json", ".idx"]
        self._text.finalize(self._temporary + ".idx")
        if self._mask is not None:
            endings = [ANSWER_MASK_SUFFIX + ".bin", ANSWER_MASK_SUFFIX + ".idx", *endings]
            self._mask.finalize(self._temporary + ANSWER_MASK_SUFFIX + ".idx")
        with open(self._temporary + ".json", "w", encoding="utf-8") as file:
            json.dump(metadata | self.counts(), file, indent=2)
            file.write("\n")
        for stale in (".idx", ANSWER_MASK_SUFFIX + ".idx", ANSWER_MASK_SUFFIX + ".bin"):
            _remove(self.prefix + stale)
        for ending in endings:
            os.replace(self._temporary + ending, self.prefix + ending)

    def discard(self) -> None:
        """Remove the temporary files. After `finish` there are none."""
        for builder in filter(None, (self._text, self._mask)):
            builder.data_file.close()
        for ending in (".bin", ".json", ".idx", ANSWER_MASK_SUFFIX + ".bin", ANSWER_MASK_SUFFIX + ".idx"):
            _remove(self._temporary + ending)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
