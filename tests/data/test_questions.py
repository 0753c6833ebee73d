"""Questions of RLVR: their order, and what is refused."""

import gzip
import json

import pytest
from small_data import null_tokenizer, write_lines

from megatron_ebft.data.questions import Questions


def questions(path, lines: list | None = None, seed: int = 1) -> Questions:
    if lines is not None:
        write_lines(path, lines)
    return Questions(str(path), null_tokenizer(), seed)


def test_every_epoch_has_every_question_in_another_order(tmp_path):
    made = questions(tmp_path / "q.jsonl", [{"prompt": f"{i} {i}", "answer": i} for i in range(10)])
    whole = [question.fields["answer"] for first in (0, 6, 12, 18, 24) for question in made.of_step(first, 6, 0, 1)]
    epochs = [whole[:10], whole[10:20], whole[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    ranks = [made.of_step(18, 6, rank, 3) for rank in (2, 0, 1)]  # not in order: an order is cached
    assert [q.fields["answer"] for rank in (1, 2, 0) for q in ranks[rank]] == whole[18:24]
    assert ranks[0][0].prompt == [ranks[0][0].fields["answer"]] * 2
    again = questions(tmp_path / "q.jsonl").of_step(0, 10, 0, 1)
    assert [q.fields["answer"] for q in again] == epochs[0]
    other = questions(tmp_path / "q.jsonl", seed=2).of_step(0, 10, 0, 1)
    assert [q.fields["answer"] for q in other] != epochs[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_prompt_that_comes_again_in_a_batch_is_counted(tmp_path, ranks):
    """On all ranks together. Two lines may have the same prompt, and a batch several epochs."""
    made = questions(tmp_path / "q.jsonl", [{"prompt": x, "answer": i} for i, x in enumerate("121")])
    for first in (0, 8, 16):
        drawn = [question for rank in range(ranks) for question in made.of_step(first, 8, rank, ranks)]
        for i, question in enumerate(drawn):
            assert question.occurrence == sum(other.prompt == question.prompt for other in drawn[:i])
        assert {question.occurrence for question in drawn} >= {0, 1, 2, 3}


def test_a_hash_of_what_the_lines_say(tmp_path):
    lines = [{"prompt": "1", "answer": "2"}, {"prompt": "3"}]
    plain = questions(tmp_path / "q.jsonl", lines).content_hash
    (tmp_path / "q.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(x, indent=None).encode() for x in lines)))
    assert questions(tmp_path / "q.gz").content_hash == plain
    assert questions(tmp_path / "q.jsonl", [{"prompt": "1", "answer": "3"}, {"prompt": "3"}]).content_hash != plain


@pytest.mark.parametrize("content, message", [
    (None, "q.jsonl: no such file"), ("\n", "q.jsonl: has no lines"), ('{"prompt": "1"}\n[2]', "q.jsonl:2: not a JSON"),
    ('{"prompt": "1", "pattern": ""}\n\n{"prompt": 2}', "q.jsonl:3: has no text `prompt`"),
    ('{"prompt": ""}', "q.jsonl:1: `prompt` has no tokens"), ('{"prompt": "999"}', "q.jsonl:1: --vocab-size"),
    ('{"prompt": "1 2 3 4 5 6"}', "q.jsonl:1: its prompt has 6 tokens, and --seq-length less --ebft-max-new-tokens "
     "leaves room for 5"),
    ('{"prompt": "1 2 3 4 5", "answer": 1}', "q.jsonl:1: has no `pattern`")])
def test_wrong_lines_are_named(tmp_path, content, message):
    def check_fields(fields: dict) -> None:
        if "pattern" not in fields:
            raise ValueError("has no `pattern`")

    if content is not None:
        (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"^--ebft-questions .*{message}"):
        made = questions(tmp_path / "q.jsonl")
        made.check(range(len(made)), check_fields, 5, "--seq-length less --ebft-max-new-tokens")
