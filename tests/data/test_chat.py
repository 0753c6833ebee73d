"""Conversations: which tokens are answers, token by token, and what is refused or left out.

Tokens are characters and special tokens, so that a text with brackets around its answers says everything.
"""

import json
import re

import pytest
import transformers
from chats import (
    CHATML,
    CHATML_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    PLAIN,
    PLAIN_TOKENS,
    QWEN3,
    R1,
    SMOLLM2,
    chat_dataset,
    marked,
    say,
)
from small_data import build, preprocess, read_documents

from megatron_ebft.data.tokenizer import build_tokenizer

TURNS = [dict(role="system", content="be brief"), *say("hi", "hello", "1+1?", "2", "ok [sic]", "  bye ")]
SMOLLM_SAYS = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MASKS = {  # template, tokens, flags, messages, the document
    "ChatML": (CHATML, CHATML_TOKENS, [], TURNS,
               "<|im_start|>system\nbe brief<|im_end|>\n"
               "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n"
               "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n"
               "<|im_start|>user\nok [sic]<|im_end|>\n<|im_start|>assistant\n[  bye <|im_end|>]\n"),
    "Llama 3": (LLAMA3, LLAMA3_TOKENS, [], TURNS,
                "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[hello<|eot_id|>]"
                "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[2<|eot_id|>]"
                "<|start_header_id|>user<|end_header_id|>\n\nok [sic]<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[bye<|eot_id|><eod>]"),
    "Llama 3 that ends documents itself": (
        LLAMA3, LLAMA3_TOKENS | {"eos_token": "<|eot_id|>"}, ["--prepend-bos"], say("hi", "hello"),
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[hello<|eot_id|>]"),
    "SmolLM2": (SMOLLM2, CHATML_TOKENS, [], say("hi", "hé 🙂", "more", ""),
                f"<|im_start|>system\n{SMOLLM_SAYS}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                "<|im_start|>assistant\n[hé 🙂<|im_end|>]\n"
                "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"),
    "no special tokens": (PLAIN, PLAIN_TOKENS, [], say("hi", "hello", "1+1?", "2"),
                          "U: hi\nA:[ hello\n]U: 1+1?\nA:[ 2\n<eod>]"),
    "the user has the last word": (PLAIN, PLAIN_TOKENS, [], say("hi", "hello", "bye"),
                                   "U: hi\nA:[ hello\n]U: bye\n<eod>"),
    "a token of prompt and answer": (PLAIN, PLAIN_TOKENS | {"merges": [(":", "Ġ")]}, [], say("hi", "hello"),
                                     "U: hi\nA[: hello\n<eod>]"),
    "the last turn": (CHATML, CHATML_TOKENS, ["--last-turn-only"], say("hi", "hello", "1+1?", "2"),
                      "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
                      "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n"),
    "the last turn of a template that rewrites others": (
        QWEN3, CHATML_TOKENS, ["--last-turn-only"], say("hi", "<think>hm</think>hello", "1+1?", "<think>add</think>2"),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[<think>add</think>2<|im_end|>]\n"),
    "tools": (CHATML, CHATML_TOKENS, [], [
        dict(role="user", content="time?"), dict(role="assistant", content="look()"), dict(role="tool", content="9:00"),
        dict(role="assistant", content="nine")],
        "<|im_start|>user\ntime?<|im_end|>\n<|im_start|>assistant\n[look()<|im_end|>]\n"
        "<|im_start|>tool\n9:00<|im_end|>\n<|im_start|>assistant\n[nine<|im_end|>]\n"),
    "ShareGPT": (CHATML, CHATML_TOKENS, [], [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
                 "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_token_by_token(kind, tmp_path):
    template, tokens, flags, messages, document = MASKS[kind]
    prefix, tokenizer = chat_dataset(tmp_path, template, tokens, [dict(messages=messages)], *flags)
    assert marked(prefix, tokenizer) == [document]
    if kind != "ShareGPT":  # the ids are those of inference
        (ids,), model = read_documents(prefix), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
        expected = model.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert ids == expected + [tokenizer.eod] * ("eod>" in document)


def test_what_a_mask_leaves_out_is_said(tmp_path, capsys):
    records = [dict(messages=messages) for messages in (
        say("hi", "hello", "more", ""), say("hi"), say("hi", " "), say("hello", "hi", first="assistant"),
        say("hi", "hello" * 20))]
    prefix, tokenizer = chat_dataset(tmp_path, PLAIN, PLAIN_TOKENS | {"merges": [(":", "Ġ")]}, records,
                                     "--max-document-length", 60, "--report", tmp_path / "report.json")
    assert marked(prefix, tokenizer) == ["U: hi\nA[: hello\n]U: more\nA: \n<eod>"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{prefix}: 1 documents, 24 tokens, 29.17% of them answer; the longest document has 24",
        "1 conversations that begin with an answer left out", "2 conversations without an answer left out",
        "1 documents of more than 60 tokens left out",
        "1 answers begin inside a token, which is an answer's then; a prompt that ends there has other tokens",
        "1 empty turns of the assistant are not trained on", "it fills no row of --seq-length 1024"]
    report, = json.loads((tmp_path / "report.json").read_text()).values()
    assert report["answer_tokens"] == 7 and report["left_out"]["conversations without an answer"] == 2


REFUSED = {
    "reasoning of earlier turns": (
        QWEN3, CHATML_TOKENS, say("hi", "<think>hm</think>hello", "1+1?", "2"),
        r"in.jsonl:2: message 2: the chat template writes it otherwise once other messages follow \('"
        r"assistant\\n<think>hm.*' becomes 'assistant\\nhello.*'\): .*--last-turn-only.*--chat-template"),
    "a prompt that no turn begins with": (
        R1, CHATML_TOKENS, say("hi", "hello"),
        r"in.jsonl:2: message 2: the chat template does not begin .*<think>.* becomes .*--chat-template"),
    "a failing template": ("{{ raise_exception('roles must alternate') }}", CHATML_TOKENS, say("hi", "hello"),
                           r"in.jsonl:2: the chat template fails \(TemplateError: roles must alternate"),
    "a template that writes nothing": ("{% for message in messages %}{% endfor %}", CHATML_TOKENS, say("hi", "hello"),
                                       "in.jsonl:2: the chat template writes nothing of the assistant's messages"),
    "no template": (None, CHATML_TOKENS, say("hi", "hello"), "--tokenizer-model: .* no chat template; give .*--chat-t"),
    "no list": (CHATML, CHATML_TOKENS, "hi", "in.jsonl:2: 'messages': not a list of messages"),
    "no object": (CHATML, CHATML_TOKENS, ["hi"], "in.jsonl:2: 'messages': message 1 is not an object"),
    "no content": (CHATML, CHATML_TOKENS, [dict(role="user")], "message 1 needs a role and a content; it has 'role'"),
    "another role": (CHATML, CHATML_TOKENS, [{"from": "alien", "value": "hi"}], "message 1 is from 'alien'; known are"),
    "half a surrogate pair": (CHATML, CHATML_TOKENS, say("hi", "\ud800"), "in.jsonl:2: 'utf-8' codec"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, tmp_path, capsys):
    template, tokens, messages, message = REFUSED[kind]
    records = [dict(messages=say("no", "answer")[:1]), dict(messages=messages)]
    chat_dataset(tmp_path, template, tokens, records, code=2)
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "model"}


PAIRS = {  # flags, the document
    "joined": (["--no-append-eod"], "add\n\n1 1[2]"),
    "chat": (["--apply-chat-template"],
             "<|im_start|>user\nadd\n\n1 1<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n"),
    "another template": (["--apply-chat-template", "--chat-template", "FILE"], "U: add\n\n1 1\nA:[ 2\n<|im_end|>]"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_instruction_input_and_output(kind, tmp_path):
    flags, document = PAIRS[kind]
    (tmp_path / "plain.jinja").write_text(PLAIN)
    flags = [str(tmp_path / "plain.jinja") if flag == "FILE" else flag for flag in flags]
    records = [dict(instruction="add", input="1 1", output="2"), dict(instruction="say", input="", output="x"),
               dict(instruction="say", input=None, output="x"), dict(instruction="say", input="", output="")]
    prefix, tokenizer = chat_dataset(tmp_path, CHATML, CHATML_TOKENS, records, "--question-key", "instruction", "input",
                                     "--answer-key", "output", *flags)
    first, second, third = marked(prefix, tokenizer)
    assert first == document and second == third == document.replace("add\n\n1 1", "say").replace("2", "x")


def test_questions_are_kept_beside_the_tokens(tmp_path):
    """Their prompts begin the documents, and their other fields are the data's."""
    turns = [say("hi", "hello"), say("silence"), say("hi", "hello", "1+1?", "2")]
    records = [dict(messages=messages, tests=[f"assert {i}"], answer="data's") for i, messages in enumerate(turns)]
    questions = tmp_path / "more" / "questions.jsonl"
    flags = ["--questions-output", questions, "--keep-keys", "tests"]
    prefix, tokenizer = chat_dataset(tmp_path, LLAMA3, LLAMA3_TOKENS, records, *flags)
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["hello", "2"]
    assert [line["tests"] for line in lines] == [["assert 0"], ["assert 2"]]
    masks = read_documents(prefix + "_answer_mask")
    for document, mask, line in zip(read_documents(prefix), masks, lines, strict=True):
        prompt = tokenizer.tokenize(line["prompt"])
        assert document[:len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]
        assert document[len(prompt):] == tokenizer.tokenize(line["answer"] + "<|eot_id|><eod>")
    chat_dataset(tmp_path, LLAMA3, LLAMA3_TOKENS, records, *flags, "answer")
    assert {json.loads(line)["answer"] for line in questions.read_text().splitlines()} == {"data's"}


def test_a_tokenizer_that_puts_bos_before_texts_puts_one_before_prompts(tmp_path):
    """The reader of a question adds it. The document has the template's."""
    records = [dict(messages=say("hi", "hello"))]
    chat_dataset(tmp_path, LLAMA3, LLAMA3_TOKENS, records)
    path = tmp_path / "model" / "tokenizer.json"
    sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": {
        "type": "TemplateProcessing", "single": sequence, "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}}}))
    prefix = preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "adds", "--messages-key",
                        "messages", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "model",
                        "--questions-output", tmp_path / "questions.jsonl")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "model"))
    prompt = json.loads((tmp_path / "questions.jsonl").read_text())["prompt"]
    ids = [tokenizer.bos, *tokenizer.tokenize(prompt)]
    assert tokenizer.adds_bos and read_documents(prefix)[0][:len(ids)] == ids and ids.count(tokenizer.bos) == 1


def test_bad_options_are_refused(tmp_path, capsys):
    for flags, message in [
            (["--question-key", "q", "--answer-key", "a"], "--messages-key: give either this, or --question-key"),
            (["--apply-chat-template"], "--apply-chat-template: is for --question-key"),
            (["--keep-keys", "x"], "--keep-keys: needs --questions-output"),
            (["--questions-output", "q", "--keep-keys", "prompt"], "--keep-keys prompt: the prompt is written anyway"),
            (["--chat-template", str(tmp_path / "none")], "--chat-template .*none: cannot be read"),
            (["--json-keys", "text"], "--json-keys: give either this"),
            (["--seq-length", "8"], "--seq-length 8 is too short for one block")]:
        chat_dataset(tmp_path, CHATML, CHATML_TOKENS, [dict(messages=say("hi", "hello"))], "--messages-key", "messages",
                     *flags, code=2)
        assert re.search(message, capsys.readouterr().err)
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--messages-key", "messages",
               "--tokenizer-type", "NullTokenizer", "--vocab-size", 9, code=2)
    assert "--tokenizer-type NullTokenizer: chat templates need" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [("--messages-key", "messages"), ("--json-keys", "text")])
def test_blocks_that_will_count(kind, tmp_path, capsys):
    """The report against a loop over the tokens of the rows."""
    records = [dict(messages=say("hi", "a" * (i % 7), "more", "b" * (i % 13)), text="x" * (20 + i)) for i in range(80)]
    G, s, c, T = 4, 3, 5, 64
    flags = ["--seq-length", T, "--ebft-rollout-length", G, "--ebft-stride", s, "--ebft-context-length", c]
    prefix, tokenizer = chat_dataset(tmp_path, CHATML, CHATML_TOKENS, records, *kind, *flags)
    rows = build(tmp_path, [None, 0, 0], data_path=[prefix], split="1", tokenizer=tokenizer, seq_length=T)[0]
    counting, blocks, tokens = 0, 0, 0
    for row in (rows[i] for i in range(len(rows))):
        documents, answers = row["documents"].tolist(), row["answer_mask"].tolist()
        anchors = range(c, T - G + 1, s)
        blocks += len(anchors)
        counting += sum(all(answers[a:a + G]) and len(set(documents[a - 1:a + G])) == 1 for a in anchors)
        tokens += sum(answers[t] and documents[t] == documents[t - 1] for t in range(1, T))
    assert 0 < counting < blocks and len(rows) > 20
    tokens /= len(rows) * (T - 1)
    assert (f"{counting / blocks:.2%} of the blocks (G = 4, s = 3, c = 5) and {tokens:.2%} of the gold tokens count, "
            f"in {len(rows)} rows of 64 tokens") in capsys.readouterr().out
