"""The questions of examples/three_ways.sh: what their answers compute."""

import json
import math

import pytest
import three_ways_data

NUMBERS = list(range(-40, 90))


def meaning(question: str):
    """What a question asks for, read word by word."""
    words = question.split()
    side, bound = words[-2], int(words[-1])
    kept = [x for x in NUMBERS if (x > bound if side == "above" else x < bound)]
    for kind, divisor, rest in (("even", 2, 0), ("odd", 2, 1), ("multiples", 3, 0)):
        if kind in words:
            kept = [x for x in kept if x % divisor == rest]
    for name, value in (("squares", lambda x: x**2), ("cubes", lambda x: x**3), ("doubles", lambda x: 2 * x),
                        ("opposites", lambda x: -x)):
        if name in words:
            kept = list(map(value, kept))
    return {"sum": sum, "product": math.prod, "largest": max, "smallest": min}[words[1]](kept)


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("data")
    three_ways_data.main(folder)
    return {split: [json.loads(line) for line in open(folder / f"{split}.jsonl")]
            for split in ("pretrain", "train", "valid")}


def compute(expression: str):
    return eval(expression, {"numbers": NUMBERS, "prod": math.prod})


def test_answers_are_right_and_of_the_kind_of_their_split(splits):
    for split, lines in splits.items():
        wrong = [fields for fields in lines if fields["completion"] not in fields["answer"]]
        assert len(wrong) / len(lines) == pytest.approx(three_ways_data.WRONG if split == "pretrain" else 0, abs=0.02)
        for fields in lines[:200]:
            expected = meaning(fields["prompt"])
            assert all(compute(answer) == expected for answer in fields["answer"]), fields
        differ = [compute(fields["completion"]) != meaning(fields["prompt"]) for fields in wrong[:200]]
        assert not differ or sum(differ) > 0.8 * len(differ)  # the maximum of even numbers below 8 and below 7 is one


def test_no_question_is_in_two_splits(splits):
    prompts = {split: {fields["prompt"] for fields in lines} for split, lines in splits.items()}
    assert len(set.union(*prompts.values())) == sum(map(len, prompts.values()))
    assert len(prompts["valid"]) == three_ways_data.VALID and len(prompts["train"]) == three_ways_data.TRAIN
