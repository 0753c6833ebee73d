"""Data that cannot be trained on: ids of another vocabulary, and rows in which nothing counts."""

import json
from pathlib import Path

import numpy
import preflight
import pytest
from ranks import run_ranks
from small_run import MODEL, SMALL, TOKENIZER, VOCAB, save, scalars, start

from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.data import dataset_files
from megatron_ebft.run.build import build_run
from megatron_ebft.run.describe import describe
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import FLAGS as FLAGS_OF_TRAINING
from megatron_ebft.run.loop import train

FLAGS = [*MODEL, *SMALL, "--train-iters", "6", "--eval-interval", "0"]


def make(folder: Path, documents) -> list[str]:
    """Flags of a dataset of lists of ids, or of pairs of lists (question and answer)."""
    from preprocess_data import main as preprocess

    keys = ["q", "a"] if isinstance(documents[0], tuple) else ["text"]
    lines = [dict(zip(keys, (" ".join(map(str, part)) for part in (d if len(keys) > 1 else [d])))) for d in documents]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--question-key", "q", "--answer-key", "a"] if len(keys) > 1 else []
    assert preprocess(["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "set"), *TOKENIZER,
                       *flags]) == 0
    return ["--data-path", str(folder / "set_text_document"), "--split", "1", "--tensorboard-dir", str(folder)]


def ids(count: int) -> list[int]:
    return numpy.random.RandomState(count).randint(0, VOCAB - 1, count).tolist()


def set_id(prefix: str, document: int, value: int) -> None:
    """Replace the first id of a document."""
    data = numpy.memmap(prefix + ".bin", dtype=numpy.uint16, mode="r+")
    data[dataset_files.check_dataset(prefix)[:document].sum()] = value


# ---------------------------------------------------------------- ids


@pytest.fixture
def foreign(tmp_path) -> list[str]:
    """Flags of a dataset without a sidecar, as of Megatron's tool."""
    flags = make(tmp_path, [ids(30 + i) for i in range(40)])
    Path(flags[1] + ".json").unlink()
    return flags


def test_ids_beyond_the_vocabulary_are_refused_at_the_start(foreign, one_rank, capsys):
    set_id(foreign[1], 17, VOCAB + 3)  # below the padded vocabulary of 128
    message = (f"--data-path {foreign[1]}: document 17 (counted from 0) has the id {VOCAB + 3}, and this NullTokenizer "
               f"has {VOCAB} ids")
    with pytest.raises(ValueError) as error:
        build_run(parse_args([*foreign, *FLAGS]))
    assert str(error.value).startswith(message)


def test_an_id_that_is_met_later_ends_the_run_after_a_save(foreign, tmp_path, one_rank, monkeypatch):
    monkeypatch.setattr(dataset_files, "CHUNKS", 0)  # the sample of a large dataset does not see it
    run, log = start(parse_args([*foreign, *FLAGS, "--save", str(tmp_path / "save")]))
    document, *_ = next(run.train_data._spans(7))  # of the fourth step
    set_id(foreign[1], document, VOCAB)
    set_id(foreign[1], document + 1, VOCAB - 1)  # the last id that is known
    with pytest.raises(ValueError, match=rf"{foreign[1]}: document \d+ .counted from 0. has the id {VOCAB}, and this"):
        train(run, log)
    assert 0 < latest_iteration(str(tmp_path / "save")) == run.state.iteration <= 3


# ---------------------------------------------------------------- nothing counts


REFUSED = {
    "answers shorter than G": ([(ids(9), ids(2))] * 40, ["--ebft-answer-only"],
                               "--ebft-answer-only: no block of the data counts, in 12 rows.* Lower "
                               "--ebft-rollout-length"),
    "documents shorter than a block": ([ids(3)] * 200, ["--ebft-document-mask"], "--ebft-document-mask: no block"),
    "no answers": ([(ids(9), ids(12))] * 40, ["--ebft-answer-only", "--training-mode", "sft"], "no token of the data"),
    "no answers in an evaluation": ([(ids(9), ids(12))] * 40, [
        "--ebft-answer-only", "--eval-interval", "2", "--split", "50,50"], "no token counts in the 2 rows of an eval"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_data_in_which_nothing_counts_are_refused(kind, tmp_path, one_rank):
    documents, flags, message = REFUSED[kind]
    data = make(tmp_path, documents)
    mask = Path(data[1] + "_answer_mask.bin")
    if "no answers" in kind:
        mask.write_bytes(mask.read_bytes()[:22 * 20 if "evaluation" in kind else 0].ljust(22 * 40, b"\0"))
    with pytest.raises(ValueError, match=message):
        build_run(parse_args([*data, *FLAGS, *flags]))


def test_steps_in_which_nothing_counts(tmp_path, one_rank, capsys):
    data = make(tmp_path, [(ids(12), ids(20 if i % 5 == 0 else 2)) for i in range(40)])
    run, log = start(parse_args([*data, *FLAGS, "--ebft-answer-only", "--ebft-ce-coef", "0"]))
    blocks, tokens = run.counted.blocks, run.counted.tokens
    assert f"{blocks:.2%} of the blocks and {tokens:.2%} of the gold tokens count, in 12 rows" in describe(run)
    train(run, log)
    log.close(0.0)
    logged, console = scalars(tmp_path), capsys.readouterr().out
    counted = dict(logged["train/valid_blocks"])
    assert sum(counted.values()) / 6 == pytest.approx(blocks) and 0 in counted.values()
    assert [step for step, _ in logged["train/loss"]] == [step for step, share in counted.items() if share]
    for line in console.splitlines():
        if line.startswith("step"):
            step = int(line.split()[1].split("/")[0])
            assert ("no block counts" in line) != (" loss " in line) == (counted[step] > 0), line
    first = min(step for step, share in counted.items() if not share)
    assert f"warning: step {first}: no block of its rows counts" in console


# ---------------------------------------------------------------- replaced data


def test_data_replaced_under_a_run_are_refused(tmp_path, one_rank):
    """Of the same sizes; an answer mask belongs to the content."""
    data = make(tmp_path, [(ids(9), ids(12))] * 40)
    flags = [*data, *FLAGS, "--training-mode", "sft", "--save", str(tmp_path), "--load", str(tmp_path)]
    run = build_run(parse_args(flags))
    save(run, tmp_path)
    build_run(parse_args(flags))
    for name in (data[1] + ".bin", data[1] + "_answer_mask.bin"):
        whole = Path(name).read_bytes()
        Path(name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(ValueError, match=f"^{data[1]}.bin and .idx: are not the data that --load {tmp_path} was"):
            build_run(parse_args(flags))
        allowed = build_run(parse_args([*flags, "--ebft-allow-changed-data"]))
        assert f"content of {data[1]}" in allowed.metadata["changed"]
        Path(name).write_bytes(whole)
    problem, = run_ranks(1, "test_data:preflight_problems_of_changed_data", data[1], *flags)[0]
    assert "are not the data that --load" in problem
    del run.metadata["data"]  # as of an earlier version
    save(run, tmp_path)
    build_run(parse_args(flags))


def preflight_problems_of_changed_data(prefix: str, *flags) -> list[str]:
    set_id(prefix, 3, 5)
    return preflight_problems(*flags)


# ---------------------------------------------------------------- preflight


def preflight_problems(*flags) -> list[str]:
    """In a process without process groups."""
    problems, parser = preflight.Problems(), Parser("", "", own=(preflight.JOB,), reads=frozenset(FLAGS_OF_TRAINING))
    preflight.check_run(parser.parse_args(["--world-size", "1", "--ranks-per-node", "1", *FLAGS, *flags]), problems)
    return problems


def test_preflight_says_it(tmp_path, foreign):
    set_id(foreign[1], 17, VOCAB + 3)
    problem, = run_ranks(1, "test_data:preflight_problems", *foreign, "--save", str(tmp_path))[0]
    assert "document 17 (counted from 0) has the id" in problem
    data = make(tmp_path, [ids(3)] * 200)
    problem, = run_ranks(1, "test_data:preflight_problems", *data, "--save", str(tmp_path), "--ebft-document-mask")[0]
    assert "no block of the data counts" in problem


def test_preflight_checks_questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "1 2", "answer": "3"}\n{"prompt": "4"}\n')
    flags = ["--training-mode", "rlvr", "--ebft-questions", str(file), "--ebft-verifier", "exact",
             "--ebft-max-new-tokens", "20", "--save", str(tmp_path / "run")]
    problem, = run_ranks(1, "test_data:preflight_problems", *flags)[0]
    assert problem.startswith(f"--ebft-questions {file}:2: ") and "answer" in problem
    asked = ["--ebft-eval-questions", str(file), "--eval-interval", "5", *flags[4:]]
    data = [*make(tmp_path, [ids(30)] * 200)[:2], "--split", "80,20,0", "--training-mode", "sft"]
    problem, = run_ranks(1, "test_data:preflight_problems", *data, *asked)[0]
    assert problem.startswith(f"--ebft-eval-questions {file}:2: ") and "answer" in problem
    file.write_text('{"prompt": "1 2", "answer": "3"}\n')
    assert run_ranks(1, "test_data:preflight_problems", *flags, *asked)[0] == []
