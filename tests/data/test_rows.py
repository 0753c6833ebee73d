"""The data pipeline: text to indexed datasets to rows, against tokenising and packing by hand."""

import json
import multiprocessing
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch

from megatron_ebft.common.device import init_device

init_device()  # before the first import of Megatron-Core

from megatron_ebft.data import rows as data  # noqa: E402
from megatron_ebft.data.rows import build_datasets, check_dataset, document_ids, rows_for_step  # noqa: E402
from megatron_ebft.data.tokenizer import build_tokenizer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import preprocess_data  # noqa: E402

WORDS = "the quick brown fox jumps over a lazy dog while energy based fine tuning matches features not tokens".split()
VOCAB = 200  # of the NullTokenizer
T = 8


def sentences(count, seed=0):
    rng = numpy.random.RandomState(seed)
    return [" ".join(rng.choice(WORDS, rng.randint(1, 20))) for _ in range(count)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def preprocess(*flags, code=0):
    """Run the tool; the prefix of its text dataset."""
    flags = [str(flag) for flag in flags]
    assert preprocess_data.main(flags) == code
    return flags[flags.index("--output-prefix") + 1] + "_text_document"


def null_dataset(folder, name, documents, *flags):
    """A dataset of lists of ids, or of (question ids, answer ids); its prefix."""
    text = [tuple(" ".join(map(str, part)) for part in (d if isinstance(d, tuple) else (d,))) for d in documents]
    keys = ("q", "a") if len(text[0]) == 2 else ("text",)
    source = write_lines(folder / f"{name}.jsonl", [dict(zip(keys, parts, strict=True)) for parts in text])
    if len(keys) == 2:
        flags = ("--question-key", "q", "--answer-key", "a", *flags)
    return preprocess("--input", source, "--output-prefix", folder / name, "--tokenizer-type", "NullTokenizer",
                      "--vocab-size", VOCAB, *flags)


def null_tokenizer(vocab_size=VOCAB):
    return build_tokenizer("NullTokenizer", None, vocab_size)


def build(folder, sizes, **kwargs):
    """build_datasets with this file's usual settings."""
    settings = dict(seq_length=T, seed=1234, tokenizer=null_tokenizer(), data_cache_path=str(folder / "cache"))
    return build_datasets(sizes=sizes, **(settings | kwargs))


def all_rows(dataset):
    return torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    def train(name, **options):
        path = tmp_path_factory.mktemp("sp") / name
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences(300)), model_writer=file, vocab_size=60, hard_vocab_limit=False,
                minloglevel=2, **options)
        return path

    return train


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    import tokenizers
    import transformers

    def train(vocab_size=60, **special):
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.train_from_iterator(sentences(300), tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<eos>"], show_progress=False))
        path = tmp_path_factory.mktemp("hf")
        transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(path)
        return path

    return train


@pytest.fixture(params=["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def real_tokenizer(request):
    """(type, model path) of a trained tokenizer."""
    if request.param == "SentencePieceTokenizer":
        return request.param, request.getfixturevalue("sentencepiece_model")("small.model")
    return request.param, request.getfixturevalue("hugging_face_folder")(eos_token="<eos>")


def test_tokenizer(real_tokenizer, tmp_path, sentencepiece_model, hugging_face_folder):
    kind, path = real_tokenizer
    tokenizer = build_tokenizer(kind, str(path))
    text = "the lazy fox"
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids and max(ids) < tokenizer.vocab_size
    assert tokenizer.detokenize([-1, *ids, tokenizer.eod, tokenizer.vocab_size, 10**9]) == text

    padded = build_tokenizer(kind, str(path), 1000)
    assert padded.vocab_size == 1000 and padded.detokenize([*ids, 999]) == text
    with pytest.raises(ValueError, match="--vocab-size 10: "):
        build_tokenizer(kind, str(path), 10)

    # The fingerprint goes with what the tokenizer does, not with where it lies.
    copy = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    assert build_tokenizer(kind, str(copy)).fingerprint == tokenizer.fingerprint == padded.fingerprint
    other = sentencepiece_model("other.model", model_type="bpe") if path.is_file() else hugging_face_folder(
        50, eos_token="<eos>")
    assert build_tokenizer(kind, str(other)).fingerprint != tokenizer.fingerprint


def test_tokenizer_errors(tmp_path, sentencepiece_model, hugging_face_folder, monkeypatch):
    def refuses(message, *args):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(*args)

    refuses("--tokenizer-type Word: choose from SentencePieceTokenizer", "Word", None)
    refuses("--tokenizer-model: SentencePieceTokenizer needs one", "SentencePieceTokenizer", None)
    refuses("--tokenizer-model .*no such file", "SentencePieceTokenizer", str(tmp_path / "none.model"))
    (tmp_path / "junk.model").write_bytes(b"junk")
    refuses("not a sentencepiece model", "SentencePieceTokenizer", str(tmp_path / "junk.model"))
    refuses("no eos id.*--eos_id=2", "SentencePieceTokenizer", str(sentencepiece_model("no_eos.model", eos_id=-1)))
    refuses("--tokenizer-model .*no such folder", "HuggingFaceTokenizer", str(tmp_path / "none"))
    refuses("finds no tokenizer there", "HuggingFaceTokenizer", str(tmp_path))
    refuses("no eos token.*tokenizer_config.json", "HuggingFaceTokenizer", str(hugging_face_folder()))
    refuses("--vocab-size: NullTokenizer needs one", "NullTokenizer", None)
    refuses("leave the flag out", "NullTokenizer", "model", 10)
    with pytest.raises(ValueError, match="--vocab-size 10: the text holds ids from 3 to 10"):
        null_tokenizer(10).tokenize("3 10")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses("pip install transformers", "HuggingFaceTokenizer", str(tmp_path))


def test_rows_are_the_documents_end_to_end(real_tokenizer, tmp_path):
    kind, path = real_tokenizer
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


def question_answers(count, seed=0):
    """Questions of ids below 100, answers of ids from 100 on: the right mask can be read off the tokens."""
    rng = numpy.random.RandomState(seed)
    return [(rng.randint(0, 100, rng.randint(0, 12)), rng.randint(100, VOCAB - 1, rng.randint(1, 12)))
            for _ in range(count)]


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
    text, mask = data.IndexedDataset(prefix), data.IndexedDataset(prefix + "_answer_mask")
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


def test_output_does_not_depend_on_workers(sentencepiece_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preprocess_data, "BATCH_BYTES", 300)  # many batches
    texts = sentences(400)
    inputs = [write_lines(tmp_path / f"{i}.jsonl", [dict(q=q, a=a) for q, a in zip(texts[i::4], texts[i + 2::4])])
              for i in range(2)]
    outputs = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        preprocess("--input", *inputs, "--output-prefix", folder / "out", "--question-key", "q", "--answer-key", "a",
                   "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model("m.model"),
                   "--workers", workers, "--log-interval", 50)
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert outputs[0] == outputs[1]
    name = "out_text_document"  # these files, and no temporary one
    assert set(outputs[0]) == {name + end for end in (".bin", ".idx", ".json", "_answer_mask.bin", "_answer_mask.idx")}
    assert "documents/s" in capsys.readouterr().out


BAD_INPUT = {
    "missing": (None, "--input .*in.jsonl: no such file"),
    "empty": (b"", "--input .*in.jsonl: the file is empty"),
    "JSON": (b'{"text": "1"}\n\n{"text": \n', r"in.jsonl:3: Expecting value"),
    "UTF-8": (b'{"text": "1"}\n{"text": "\xff"}\n', r"in.jsonl:2: 'utf-8' codec"),
    "surrogate": (b'{"text": "\\ud800"}\n', r"in.jsonl:1: 'utf-8' codec.*surrogates"),
    "key": (b'{"text": "1"}\n{"body": "1"}\n', r"in.jsonl:2: no key 'text'; the line has 'body'"),
    "type": (b'{"text": 1}\n', r"in.jsonl:1: 'text' is not a text"),
    "list": (b'["text"]\n', r"in.jsonl:1: not a JSON object"),
    "id": (b'{"text": "200"}\n', r"in.jsonl:1: --vocab-size 200"),
    "texts": (b'{"text": ""}\n', r"no documents for .*out_text_document \(1 empty texts\)"),
}


@pytest.mark.parametrize("content, message", BAD_INPUT.values(), ids=BAD_INPUT)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_refused(tmp_path, capsys, monkeypatch, content, message, workers):
    monkeypatch.setattr(preprocess_data, "BATCH_BYTES", 1)  # a line is a batch
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type",
               "NullTokenizer", "--vocab-size", VOCAB, "--workers", workers, code=2)
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["in.jsonl"])  # nothing half made


def test_bad_options_are_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [dict(text="1", q="1", a="2")])
    common = ("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer",
              "--vocab-size", VOCAB)
    for flags, message in [(("--question-key", "q"), "--question-key and --answer-key: give both or neither"),
                           (("--question-key", "q", "--answer-key", "a", "--json-keys", "text"), "--json-keys: give"),
                           (("--workers", 0), "--workers 0: must be at least 1"),
                           (("--tokenizer-model", "x"), "--tokenizer-model: NullTokenizer has no model")]:
        preprocess(*common, *flags, code=2)
        assert message in capsys.readouterr().err


def test_several_keys_make_several_datasets(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [dict(text="1 2", more="3"), dict(text="4", more="")])
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--json-keys", "text", "more",
               "--tokenizer-type", "NullTokenizer", "--vocab-size", 70000, "--no-append-eod")
    text, more = (data.IndexedDataset(str(tmp_path / f"out_{key}_document")) for key in ("text", "more"))
    assert [list(text[i]) for i in range(len(text))] == [[1, 2], [4]] and [list(more[0])] == [[3]] and len(more) == 1
    assert text.index.dtype == numpy.int32  # more ids than 16 bits hold


def test_damaged_datasets_are_refused(tmp_path):
    prefix = null_dataset(tmp_path, "qa", question_answers(20))

    def refuses(message, ending, change):
        path = Path(prefix + ending)
        whole = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(whole))
        with pytest.raises(ValueError, match=message):
            build(tmp_path, [5, 0, 0], data_path=[prefix])
        path.write_bytes(whole)

    for mask in ("", "_answer_mask"):
        refuses(rf"--data-path .*{mask}.bin does not exist", mask + ".bin", None)
        refuses(rf"--data-path .*{mask}.idx does not exist", mask + ".idx", None)
        refuses(r".bin has \d+ bytes and its index counts \d+: it is cut off", mask + ".bin", lambda whole: whole[:-2])
        refuses(r".idx has \d+ bytes and should have \d+: it is cut off", mask + ".idx", lambda whole: whole[:-8])
        refuses(r".idx is cut off or no Megatron index", mask + ".idx", lambda whole: whole[:20])
        refuses(r".idx is cut off or no Megatron index", mask + ".idx", lambda whole: b"x" + whole[1:])
    refuses(r"not what tools/preprocess_data.py writes", ".json", lambda whole: whole[:20])
    assert len(check_dataset(prefix)) == 20

    other = null_dataset(tmp_path, "other", question_answers(20, seed=1))
    for ending in (".bin", ".idx"):
        shutil.copy(other + "_answer_mask" + ending, prefix + "_answer_mask" + ending)
    with pytest.raises(ValueError, match="its answer mask .* has documents of other lengths"):
        check_dataset(prefix)
    preprocess_data.IndexedDatasetBuilder(str(tmp_path / "none.bin"), numpy.uint16).finalize(str(tmp_path / "none.idx"))
    with pytest.raises(ValueError, match="--train-data-path .*none: the dataset is empty"):
        build(tmp_path, [5, 0, 0], train_data_path=[str(tmp_path / "none")])


def test_another_tokenizer_is_refused(tmp_path, caplog):
    prefix = null_dataset(tmp_path, "text", [range(20)] * 4)
    with pytest.raises(ValueError, match="--tokenizer-model: .* was made with another tokenizer .*NullTokenizer"):
        build(tmp_path, [1, 0, 0], data_path=[prefix], tokenizer=null_tokenizer(VOCAB + 1))
    Path(prefix + ".json").unlink()  # as Megatron's own tool leaves it
    assert build(tmp_path, [1, 0, 0], data_path=[prefix], tokenizer=null_tokenizer(VOCAB + 1))[0] is not None
    assert "cannot tell whether the data were made with this NullTokenizer" in caplog.text


def test_data_made_anew_are_not_read_by_old_indices(tmp_path):
    prefix = null_dataset(tmp_path, "text", [[7] * 30] * 4)
    assert all_rows(build(tmp_path, [4, 0, 0], data_path=[prefix])[0]).eq(7).any()
    null_dataset(tmp_path, "text", [[8] * 5] * 20)
    rows = all_rows(build(tmp_path, [4, 0, 0], data_path=[prefix])[0])
    assert ((rows == 8) | (rows == VOCAB - 1)).all() and (rows == VOCAB - 1).sum() >= len(rows)


def test_blend_and_split(tmp_path):
    # Dataset i holds ids 20i .. 20i+19, a document holds one id: rows tell where they come from.
    prefixes = [null_dataset(tmp_path, str(i), [[20 * i + j % 20] * 15 for j in range(20 * (i + 1))]) for i in range(3)]
    eod = VOCAB - 1

    def sources(dataset):
        """Rows by dataset."""
        rows = all_rows(dataset)
        return torch.bincount(rows.masked_fill(rows == eod, 0).amax(1) // 20, minlength=3)

    def ids(dataset):
        return set(all_rows(dataset).flatten().tolist()) - {eod}

    train, valid, test = build(tmp_path, [60, 4, 4], data_path=prefixes[:1], split="80,10,10")
    assert [len(ids(dataset)) for dataset in (train, valid, test)] == [16, 2, 2]
    assert ids(train) | ids(valid) | ids(test) == set(range(20))  # each document in one split

    blend = ["1", prefixes[0], "3", prefixes[2]]
    train, valid, test = build(tmp_path, [80, 8, 0], data_path=blend, split="90,10")
    assert sources(train).tolist() == [20, 0, 60] and len(valid) == 8 and test is None
    again = build(tmp_path, [80, 8, 0], data_path=blend, split="90,10")[0]
    assert torch.equal(all_rows(again), all_rows(train))
    assert not torch.equal(all_rows(build(tmp_path, [80, 8, 0], data_path=blend, split="90,10", seed=1)[0]),
                           all_rows(train))

    train, valid, test = build(tmp_path, [None, 0, 0], data_path=prefixes, split="100,0,1")  # each once
    assert valid is None and test is None  # whatever its share
    assert sources(train).tolist() == [20 * 16 // T, 40 * 16 // T, 59 * 16 // T]

    train, valid, test = build(tmp_path, [10, None, 0], train_data_path=prefixes[:1], valid_data_path=prefixes[1:])
    assert sources(train)[1:].tolist() == [0, 0] and sources(valid).tolist() == [0, 80, 120] and test is None

    def refuses(message, sizes, **kwargs):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, sizes, **kwargs)

    one = prefixes[:1]
    refuses("--data-path: no data", [1, 0, 0])
    refuses("--data-path: give either this or", [1, 0, 0], data_path=one, train_data_path=one)
    refuses("--split: shares out --data-path", [1, 0, 0], split="1", train_data_path=one)
    refuses("--valid-data-path: 2 rows of it are wanted", [1, 2, 0], train_data_path=one)
    refuses("--split 1,x: give up to three weights", [1, 0, 0], data_path=one, split="1,x")
    refuses("--split gives the valid split no share", [1, 2, 0], data_path=one, split="1")
    refuses("valid split has 0 of 20 documents and 0 tokens", [1, 2, 0], data_path=one, split="99,1")
    refuses("train split has 20 of 20 documents and 320 tokens, where at least 400", [None, 0, 0], data_path=one,
            split="1", seq_length=400)
    refuses("a weight before every prefix", [1, 0, 0], data_path=["1", prefixes[0], prefixes[1]])
    refuses("every weight must be above 0", [1, 0, 0], data_path=["1", prefixes[0], "0", prefixes[1]])
    refuses("weights need a number of train rows", [None, 0, 0], data_path=blend)
    refuses("500 rows of the train split are wanted; .* give 240", [500, 0, 0], data_path=prefixes, split="1")


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


def test_document_ids():
    tokens = torch.tensor([[5, 9, 9, 3, 4, 9], [9, 1, 2, 3, 4, 5]])
    ids = document_ids(tokens, eod=9)
    assert ids.tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1]] and ids.dtype == torch.int32
