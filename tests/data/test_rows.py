"""Rows against tokenising and packing by hand; their order, masks, and the same rows on two ranks."""

import json
import multiprocessing
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_data import (
    VOCAB,
    T,
    all_rows,
    build,
    null_dataset,
    preprocess,
    question_answers,
    sentences,
    train_tokenizer,
    write_lines,
)

from megatron_ebft.data.rows import rows_for_step
from megatron_ebft.data.tokenizer import build_tokenizer


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_rows_are_the_documents_end_to_end(kind, tmp_path):
    path = train_tokenizer(kind, tmp_path)
    tokenizer = build_tokenizer(kind, str(path))
    texts = sentences(60)
    source = write_lines(tmp_path / "in.jsonl", [dict(text=text) for text in texts])
    prefix = preprocess("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", kind,
                        "--tokenizer-model", path)
    by_hand = [tokenizer.tokenize(text) + [tokenizer.eod] for text in texts]
    dataset, valid, test = build(tmp_path, [None, 0, 0], data_path=[prefix], split="1,0,0", tokenizer=tokenizer)
    assert valid is None and test is None

    assert sorted(dataset.document_index) == list(range(len(texts)))
    stream = [token for document in dataset.document_index for token in by_hand[document]]
    assert len(dataset) == len(stream) // T
    rows = torch.tensor(stream[:len(dataset) * T]).view(-1, T)[torch.from_numpy(dataset.shuffle_index.astype("int64"))]
    assert torch.equal(all_rows(dataset), rows)
    assert dataset[3]["index"] == 3 and dataset[3]["answer_mask"].all()
    assert list(dataset.shuffle_index) != sorted(dataset.shuffle_index)

    # Further epochs: the same rows, each once, in other orders; the first steps do not depend on how many there are.
    longer = build(tmp_path, [3 * len(rows), 0, 0], data_path=[prefix], split="1,0,0", tokenizer=tokenizer)[0]
    epochs = all_rows(longer).view(3, len(rows), T)
    assert torch.equal(epochs[0], rows) and not torch.equal(epochs[1], rows) and not torch.equal(epochs[1], epochs[2])
    assert all(sorted(epoch.tolist()) == sorted(rows.tolist()) for epoch in epochs)

    made = json.loads(Path(prefix + ".json").read_text())
    assert made["documents"] == 60 and made["tokens"] == sum(map(len, by_hand)) and made["eod"] == tokenizer.eod
    assert made["tokenizer_type"] == kind and made["tokenizer_fingerprint"] == tokenizer.fingerprint


@pytest.mark.parametrize("eod", [True, False])
def test_answer_mask_follows_the_tokens(tmp_path, eod):
    flags = () if eod else ("--no-append-eod",)
    prefix = null_dataset(tmp_path, "qa", [*question_answers(50), ([], range(100, 100 + T)), ([5], [])], *flags)
    dataset = build(tmp_path, [120, 0, 0], data_path=[prefix], split="1,0,0")[0]
    for row in map(dataset.__getitem__, range(len(dataset))):
        assert torch.equal(row["answer_mask"], row["tokens"] >= 100)
    rows = all_rows(dataset)
    assert (rows == VOCAB - 1).any() == eod and (rows < 100).any()
    made = json.loads(Path(prefix + ".json").read_text())
    assert made["documents"] == 51 and made["append_eod"] == eod  # the empty answer is left out
    text, mask = IndexedDataset(prefix), IndexedDataset(prefix + "_answer_mask")
    assert numpy.array_equal(text.document_indices, mask.document_indices)
    assert made["answer_tokens"] == sum((mask[i] == 1).sum() for i in range(51))

    # The same name without answers: the old mask must not be read with the new text.
    null_dataset(tmp_path, "qa", [range(20)] * 51)
    assert build(tmp_path, [1, 0, 0], data_path=[prefix], split="1,0,0")[0][0]["answer_mask"].all()


def test_order_is_a_function_of_consumed_samples(tmp_path):
    prefix = null_dataset(tmp_path, "qa", question_answers(60))
    dataset = build(tmp_path, [48, 0, 0], data_path=[prefix], split="1,0,0")[0]
    fields = ("tokens", "answer_mask", "index")
    whole = rows_for_step(dataset, 0, 48, 0, 1)
    assert torch.equal(whole.index, torch.arange(48)) and torch.equal(whole.tokens, all_rows(dataset)[:48])
    assert (whole.tokens.dtype, whole.answer_mask.dtype, whole.index.dtype) == (torch.int64, torch.bool, torch.int64)
    for consumed, batch_size, dp_size in [(0, 12, 1), (12, 12, 2), (24, 12, 4), (36, 12, 3), (20, 4, 4)]:
        ranks = [rows_for_step(dataset, consumed, batch_size, rank, dp_size) for rank in range(dp_size)]
        for field in fields:
            joined = torch.cat([getattr(rank, field) for rank in ranks])
            assert torch.equal(joined, getattr(whole, field)[consumed:consumed + batch_size]), (consumed, field)

    with pytest.raises(ValueError, match=f"--train-iters: the dataset has {len(dataset)} rows"):
        rows_for_step(dataset, len(dataset) - 3, 4, 0, 1)
    with pytest.raises(ValueError, match="--global-batch-size 10: .*4 data-parallel"):
        rows_for_step(dataset, 0, 10, 0, 4)


def test_data_made_again_are_not_read_by_old_indices(tmp_path):
    prefix = null_dataset(tmp_path, "text", [[7] * 30] * 4)
    assert all_rows(build(tmp_path, [4, 0, 0], data_path=[prefix])[0]).eq(7).any()
    null_dataset(tmp_path, "text", [[8] * 5] * 20)
    rows = all_rows(build(tmp_path, [4, 0, 0], data_path=[prefix])[0])
    assert ((rows == 8) | (rows == VOCAB - 1)).all() and (rows == VOCAB - 1).sum() >= len(rows)


def _build_on_rank(rank, folder, blend, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dataset = build(folder, [40, 0, 0], data_path=blend, data_cache_path=str(folder / "ranks"))[0]
    queue.put((rank, rows_for_step(dataset, 8, 16, rank, 2).tokens.numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weights", [(), ("1", "2")], ids=["single", "blend"])
def test_two_ranks_read_what_one_reads(tmp_path, weights):
    prefixes = [null_dataset(tmp_path, str(i), question_answers(60, seed=i)) for i in range(2)]
    blend = [part for pair in zip(weights, prefixes) for part in pair] or prefixes[:1]
    alone = rows_for_step(build(tmp_path, [40, 0, 0], data_path=blend)[0], 8, 16, 0, 1).tokens
    context = multiprocessing.get_context("fork")  # starting afresh would import Megatron-Core again
    queue = context.Queue()
    ranks = [context.Process(target=_build_on_rank, args=(rank, tmp_path, blend, queue), daemon=True)
             for rank in range(2)]
    for process in ranks:
        process.start()
    rows = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(numpy.concatenate([rows[0], rows[1]])), alone)


def test_documents_are_those_of_the_index(tmp_path):
    """Of data whose end tokens are anywhere but at the ends of documents."""
    documents = [[VOCAB - 1 if i % 2 else i] * (i % 11 + 1) + [i] for i in range(100)]
    prefix = null_dataset(tmp_path, "text", documents, "--no-append-eod")
    dataset = build(tmp_path, [80, 0, 0], data_path=[prefix], split="1")[0]
    owner = torch.tensor([i for i in dataset.document_index for _ in documents[i]])
    rows = owner[:len(owner) // T * T].view(-1, T)[torch.from_numpy(dataset.shuffle_index.astype("int64"))]
    expected = (rows[:, 1:] != rows[:, :-1]).cumsum(1, dtype=torch.int32)
    numbers = rows_for_step(dataset, 0, len(expected), 0, 1).documents
    assert torch.equal(numbers[:, 1:], expected) and not numbers[:, 0].any() and numbers.dtype == torch.int32
