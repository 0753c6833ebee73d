"""Chat templates in small, tokenizers for them, and chat datasets."""

from itertools import groupby
from pathlib import Path

from small_data import chat_tokenizer, preprocess, read_documents, write_lines

from megatron_ebft.data.tokenizer import build_tokenizer

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""SmolLM2-135M-Instruct's own."""
LLAMA3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
QWEN3 = """{% for message in messages %}{% set parts = message['content'].split('</think>') %}\
{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] if loop.last else parts[-1]) + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Drops the reasoning of earlier turns, as Qwen3's does."""
R1 = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
"""Its generation prompt writes what the turn itself does not, as that of DeepSeek-R1's distilled models."""
PLAIN = """{% for message in messages %}{{ message['role'][0] | upper + ':' }}\
{{ ' ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"""
"""Without special tokens."""

CHATML_TOKENS = dict(special=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
LLAMA3_TOKENS = dict(special=["<s>", "<eod>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                     bos_token="<s>", eos_token="<eod>")
PLAIN_TOKENS = dict(special=["<eod>"], eos_token="<eod>")


def say(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [dict(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def chat_dataset(folder: Path, template: str, tokens: dict, records: list[dict], *flags, code: int = 0):
    """A dataset of records, whose conversations are `messages` unless flags say otherwise; returns its prefix and the
    tokenizer."""
    model = chat_tokenizer(folder / "model", template, **tokens)
    source = write_lines(folder / "in.jsonl", records)
    has_kind = {"--question-key", "--json-keys"} & set(flags)
    kind = () if has_kind else ("--messages-key", "messages")
    prefix = preprocess("--input", source, "--output-prefix", folder / "out", *kind, "--tokenizer-type",
                        "HuggingFaceTokenizer", "--tokenizer-model", model, *flags, code=code)
    return prefix, build_tokenizer("HuggingFaceTokenizer", str(model))


def marked(prefix: str, tokenizer) -> list[str]:
    """The texts of a dataset's documents, with brackets around answers."""
    documents = []
    for ids, answers in zip(read_documents(prefix), read_documents(prefix + "_answer_mask"), strict=True):
        runs = groupby(zip(ids, answers, strict=True), key=lambda token: token[1])
        texts = ((tokenizer.decode([i for i, _ in run]), is_answer) for is_answer, run in runs)
        documents.append("".join(f"[{text}]" if is_answer else text for text, is_answer in texts))
    return documents
