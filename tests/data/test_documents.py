"""Documents end where the index says. Their cross entropy in packed rows is that of `transformers` on each alone.

Three kinds of data on which end tokens tell something else: a chat model whose end token also ends each turn, random
ids that contain the end token, and data without end tokens. Of conversations, the answers alone are trained on.
"""

from types import SimpleNamespace

import numpy
import plain_llama
import pytest
import tokenizers
import torch
import transformers
from chats import CHATML, CHATML_TOKENS, chat_dataset, say
from models import build_policy
from small_data import VOCAB, build, null_dataset, null_tokenizer, preprocess, sentences, write_lines

from megatron_ebft.data.tokenizer import build_tokenizer
from megatron_ebft.method.means import Means
from megatron_ebft.method.sft import cross_entropy_pass
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.log_probabilities import LogProbs, gold_section
from megatron_ebft.run.loop import gold_batch

LENGTH, END = 64, "<|im_end|>"


def chat_data(folder):
    """Chats of two turns, with a tokenizer whose eos ends each turn; prefix, tokenizer, documents as ids."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    model.train_from_iterator(sentences(300), tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<|im_start|>", END], show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END).save_pretrained(folder / "chat")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder / "chat"))
    questions, answer = sentences(60), "the lazy dog"
    texts = [f"<|im_start|>{question}{END}<|im_start|>{answer}{END}" for question in questions]
    source = write_lines(folder / "in.jsonl", [dict(text=text) for text in texts])
    prefix = preprocess("--input", source, "--output-prefix", folder / "out", "--tokenizer-type",
                        "HuggingFaceTokenizer", "--tokenizer-model", folder / "chat")
    documents = [tokenizer.tokenize(text) + [tokenizer.eod] for text in texts]
    assert all(ids.count(tokenizer.eod) == 3 for ids in documents)
    return prefix, tokenizer, documents


def random_data(folder, *flags):
    """400 documents of 32 random ids, the end token among them."""
    rng, tokenizer = numpy.random.RandomState(0), null_tokenizer()
    documents = [rng.randint(0, VOCAB, 32 - (not flags)).tolist() for _ in range(400)]
    assert any(tokenizer.eod in ids for ids in documents)
    prefix = null_dataset(folder, "random", documents, *flags)
    return prefix, tokenizer, documents if flags else [[*ids, tokenizer.eod] for ids in documents]


DATA = {"chat": chat_data, "spelled end tokens": random_data,
        "no end tokens": lambda folder: random_data(folder, "--no-append-eod")}


def pieces_by_hand(dataset, documents) -> list[list[list[int]]]:
    """The documents, whole or cut, of each row."""
    rows, ends = [], numpy.cumsum([0] + [len(documents[i]) for i in dataset.document_index])
    for row in dataset.shuffle_index:
        first, last = int(row) * LENGTH, (int(row) + 1) * LENGTH
        cuts = [(max(begin, first) - begin, min(end, last) - begin, documents[i])
                for i, begin, end in zip(dataset.document_index, ends, ends[1:])]
        rows.append([ids[begin:end] for begin, end, ids in cuts if begin < end])
    return rows


@pytest.mark.parametrize("kind", DATA)
def test_each_document_has_the_cross_entropy_of_transformers(kind, tmp_path, one_rank, float64):
    prefix, tokenizer, documents = DATA[kind](tmp_path)
    dataset = build(tmp_path, [None, 0, 0], data_path=[prefix], split="1", tokenizer=tokenizer, seq_length=LENGTH)[0]
    config, weights = plain_llama.random_llama(0, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1,
                                               vocab=tokenizer.vocab_size, dtype=torch.float64)
    policy, theirs = build_policy(config, weights), transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.double().load_state_dict(weights)

    args = SimpleNamespace(global_batch_size=len(dataset), ebft_document_mask=True, ebft_answer_only=False)
    gold, means = gold_batch(SimpleNamespace(args=args), dataset, 0), Means()
    with torch.no_grad():
        out = policy[0](gold.tokens_BT, torch.cat([torch.arange(len(piece)) for row in pieces_by_hand(
            dataset, documents) for piece in row]).view(len(dataset), -1), as_mask(CausalPattern(gold.document_BT)),
            readout=LogProbs([gold_section(gold.tokens_BT)]))
        ours_BT, total = -out[0].squeeze(-1).t(), []
        for row, pieces in enumerate(pieces_by_hand(dataset, documents)):
            start = 0
            for piece in pieces:
                ids, end = torch.tensor([piece]), start + len(piece)
                assert torch.equal(gold.tokens_BT[row, start:end], ids[0])
                if len(piece) > 1:
                    expected = torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:])
                    assert ours_BT[row, start:end - 1].mean().item() == pytest.approx(expected.item(), abs=1e-6)
                    total.append((expected * (len(piece) - 1), len(piece) - 1))
                start = end
        cross_entropy_pass(policy, gold, 1, means, forward_only=True)
    expected, tokens = map(sum, zip(*total))
    assert means.reduce()["ce_loss"] == pytest.approx(expected.item() / tokens, abs=1e-6)


def answers_by_hand(ids: list[int], header: list[int], end: int) -> list[bool]:
    """Which tokens follow the assistant's header, up to the end of its turn."""
    answers, inside = [], False
    for place, token in enumerate(ids, 1):
        answers.append(inside)
        inside = token != end if inside else ids[max(place - len(header), 0):place] == header
    return answers


def test_sft_on_chats_has_the_cross_entropy_of_transformers(tmp_path, one_rank, float64):
    """Over the assistant's tokens of each conversation, or of the piece of it in a row."""
    texts = sentences(90)
    records = [dict(messages=say(*texts[i:i + 2 + 2 * (i % 3)])) for i in range(60)]
    prefix, tokenizer = chat_dataset(tmp_path, CHATML, CHATML_TOKENS, records)
    model = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    documents = [model.apply_chat_template(record["messages"])["input_ids"] for record in records]
    header = tokenizer.tokenize("<|im_start|>assistant\n")
    answers = [answers_by_hand(ids, header, tokenizer.eod) for ids in documents]
    dataset = build(tmp_path, [None, 0, 0], data_path=[prefix], split="1", tokenizer=tokenizer, seq_length=LENGTH)[0]
    config, weights = plain_llama.random_llama(0, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1,
                                               vocab=tokenizer.vocab_size, dtype=torch.float64)
    policy, theirs = build_policy(config, weights), transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.double().load_state_dict(weights)

    total, count, means = 0.0, 0, Means()
    for pieces, masks in zip(pieces_by_hand(dataset, documents), pieces_by_hand(dataset, answers), strict=True):
        for ids, mask in zip(pieces, masks, strict=True):
            labels = torch.tensor(ids).masked_fill(~torch.tensor(mask), -100)[1:]
            with torch.no_grad():
                total += torch.nn.functional.cross_entropy(theirs(torch.tensor([ids])).logits[0, :-1], labels,
                                                           reduction="sum")
            count += int((labels != -100).sum())
    args = SimpleNamespace(global_batch_size=len(dataset), ebft_document_mask=True, ebft_answer_only=True)
    cross_entropy_pass(policy, gold_batch(SimpleNamespace(args=args), dataset, 0), 1, means, forward_only=True)
    assert count > 1000 and means.reduce()["ce_loss"] == pytest.approx(total.item() / count, abs=1e-6)
