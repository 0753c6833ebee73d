"""Every verifier but `code`: right and wrong answers, hangs and crashes, what is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest
import sacrebleu

from megatron_ebft.run.flags.verifiers import VERIFIERS
from megatron_ebft.verifiers import build, pool
from megatron_ebft.verifiers.build import NAMES, build_verifier

PATIENCE = 300
"""Seconds for answers that take milliseconds: machines may be busy."""
USERS = """
import os, sys, time
def judge(question, completion):
    print("a word on standard output")
    if completion == "hang": time.sleep(60)
    if completion == "crash": os.abort()
    if completion == "exit": sys.exit(3)
    if completion == "raise": raise KeyError("x")
    return {"right": True, "half": 0.5, "two": 2, "none": None, "nan": float("nan")}.get(completion, question["value"])
"""
REFERENCES = (["The cat sat on the mat.", "A cat was sitting on the mat."],
              ["Über allen Gipfeln ist Ruh'.", "Über den Gipfeln ist Ruhe."],
              ["It costs 3.50 euros, doesn't it?", "It costs 3,50 euros - doesn't it, really?"])
HYPOTHESES = ("The cat is on the mat.", "Über allen Wipfeln ist Ruhe.", "It costs 3,50 euros - doesn't it?")


@pytest.fixture
def made():
    """Makes verifiers, and closes them."""
    verifiers = []
    yield lambda *args, **options: verifiers.append(build_verifier(*args, **options)) or verifiers[-1]
    for verifier in verifiers:
        verifier.close()


def test_exact(made):
    verdicts = made("exact", workers=1).verify([
        ({"answer": "Paris "}, "\nParis"), ({"answer": ["4", "four"]}, "four"), ({"answer": "Paris"}, "paris"),
        ({"answer": ["4", "four"]}, "5\n" + "x" * 1000)])
    assert [x.is_right for x in verdicts] == [True, True, False, False]
    assert verdicts[2].reason == "expected Paris, got paris"
    assert verdicts[3].reason.startswith("expected 4 or four, got 5 xxx") and len(verdicts[3].reason) == 200


def test_regex(made):
    """A pattern that takes exponential time costs its answer alone."""
    found = {"prompt": "", "pattern": r"#### (-?\d+)"}
    verdicts = made("regex", timeout=PATIENCE, workers=2).verify([
        (found, "so #### 12"), (found | {"answer": ["12", "13"]}, "so #### 12"), (found, "12"),
        (found | {"answer": "13"}, "so #### 12"), ({"pattern": "x|(y)", "answer": "y"}, "x")])
    assert [x.is_right for x in verdicts] == [True, True, False, False, False]
    assert [x.reason for x in verdicts[2:]] == [r"#### (-?\d+) is not found", "expected 13, got 12", "expected y, got"]
    verdict, = made("regex", timeout=1, workers=1).verify([({"pattern": "^(a+)+$"}, "a" * 40 + "b")])
    assert not verdict.is_right and verdict.reason == "timeout after 1 s"


def test_math(made):
    """By value. A number too large to write costs its answer alone."""
    answers = [("1/2", r"The result is $\frac{2}{4}$.", True), (r"\frac{1}{2}", "0.5", True),
               (["3", "4"], "It is 4.", True), ("x^2 - 1", r"\boxed{(x - 1)(x + 1)}", True), ("$x = 3$", "$3$", True),
               ("4", "It is 5.", False), ("4", "I do not know.", False),
               (r"\boxed{2}", r"$\boxed{2}$", True)]
    verifier = made("math", timeout=PATIENCE, workers=2)
    verdicts = verifier.verify([({"answer": gold}, text) for gold, text, _ in answers])
    assert [x.is_right for x in verdicts] == [is_right for _, _, is_right in answers]
    assert [x.reason for x in verdicts[5:7]] == ["expected 4, got 5", "expected 4, got no expression"]
    assert not any(verdict.failed for verdict in verdicts)
    verdict, = made("math", timeout=1, workers=1).verify([({"answer": "5"}, "$9^{9^{9^{9}}}$")])
    assert verdict.failed and verdict.reason == "timeout after 1 s"
    for gold in ("1/2", ["3", r"\text{Monday}"]):
        verifier.check_question({"answer": gold})
    with pytest.raises(ValueError, match="^answer ' ' has no expression that math-verify can read; .*exact$"):
        verifier.check_question({"answer": ["3", " "]})


def test_a_function_of_the_users(made, tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    verifier = made("users:judge", timeout=PATIENCE, workers=2)
    verifier.check_question({})
    completions = ("right", "half", "crash", "exit", "raise", "two", "none", "nan", "other")
    verdicts = verifier.verify([({"value": 1.0}, x) for x in completions])
    assert [x.is_right for x in verdicts] == [True] + 7 * [False] + [True]
    assert [x.failed for x in verdicts] == [False, False] + 6 * [True] + [False]
    assert [x.score for x in verdicts] == [1, 0.5] + 6 * [0] + [1]
    reasons = ["users:judge returned 0.5", "killed by SIGABRT", "SystemExit: 3", "KeyError: 'x'",
               "ValueError: users:judge returned 2", "TypeError: float() argument",
               "ValueError: users:judge returned nan"]
    for verdict, reason in zip(verdicts[1:8], reasons, strict=True):
        assert verdict.reason.startswith(reason)
    hang, right = made("users:judge", timeout=1, workers=1).verify([({}, "hang"), ({"value": 1.0}, "right")])
    assert hang.failed and hang.reason == "timeout after 1 s" and not right.reason.startswith("killed")
    for name, words in (("users:no", "has no attribute 'no'"), ("nowhere:judge", "No module named 'nowhere'"),
                        ("users:os", "os is no function")):
        with pytest.raises(ValueError, match=f"--verifier {name}: cannot be used .*{words}"):
            build_verifier(name, flag="--verifier")


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_translation(made, name):
    """Scores of sentences are sacrebleu's functions', scores of corpora those of its command."""
    verifier = made(name, workers=1)
    several = [({"references": x}, y) for x, y in zip(REFERENCES, HYPOTHESES, strict=True)]
    several += [({"references": ["Good morning"]}, "Good day")]
    function = sacrebleu.sentence_bleu if name == "bleu" else sacrebleu.sentence_chrf
    same = ({"reference": HYPOTHESES[2]}, f"\n{HYPOTHESES[2]} ")
    for (question, completion), verdict in zip(several, verifier.verify([*several, same]), strict=False):
        assert verdict.score == function(completion, question["references"]).score / 100
        assert not verdict.is_right and verdict.reason == f"{name} {verdict.score:.3f}"
    assert verifier.verify([same])[0].is_right
    assert verifier.corpus_score([]) == {}


def test_corpus_scores_are_those_of_sacrebleus_command(made, tmp_path):
    """With two references for each line. Where one is missing, it is as if the other one stood there twice."""
    paths = [tmp_path / name for name in ("first", "second", "hypotheses")]
    for path, lines in zip(paths, (*zip(*REFERENCES), HYPOTHESES)):
        path.write_text("".join(f"{x}\n" for x in lines))
    run = subprocess.run([sys.executable, "-m", "sacrebleu", *paths[:2], "-i", paths[2], "-m", "bleu", "chrf",
                          "-w", "12"], capture_output=True, text=True, check=True)
    answers = [({"references": x}, y) for x, y in zip(REFERENCES, HYPOTHESES)]
    for name, expected in zip(("bleu", "chrf"), json.loads(run.stdout), strict=True):
        verifier = made(name, workers=1)
        assert verifier.corpus_score(answers) == {name: pytest.approx(expected["score"], abs=1e-11)}
        assert verifier.signature == expected["signature"] and "nrefs:2" in verifier.signature
        fewer, copied = (answers[:2] + [({"references": REFERENCES[2][:1] * count}, HYPOTHESES[2])] for count in (1, 2))
        assert verifier.corpus_score(fewer) == verifier.corpus_score(copied) != verifier.corpus_score(answers)


def test_children_are_replaced(made):
    """One is killed between two calls. More answers than children keep their order."""
    verifier = made("exact", workers=2)
    answers = [({"answer": str(i)}, str(i % 7)) for i in range(50)]
    for _ in range(2):
        assert [x.is_right for x in verifier.verify(answers)] == [i < 7 for i in range(50)]
        child = next(x.process for x in verifier._pool._children if x.is_ready)
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert verifier.verify([]) == []


@pytest.mark.parametrize("name, question, words", [
    ("exact", {}, "has no field answer"), ("exact", {"answer": 4}, "answer is not a text or a list of texts, but 4"),
    ("math", {"answer": []}, r"answer is not a text or a list of texts, but \[\]"),
    ("regex", {"answer": "4"}, "has no field pattern"), ("regex", {"pattern": "("}, "is no regular expression"),
    ("regex", {"pattern": "x", "answer": "4"}, "has no group to compare"),
    ("bleu", {"answer": "x"}, "has no field reference or references"),
    ("chrf", {"references": [3]}, "references is not a text or a list of texts"),
])
def test_malformed_questions_are_refused(name, question, words):
    with pytest.raises(ValueError, match=words):
        build._CHECKS[name](question)


def test_unknown_verifiers_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(ValueError, match="--ebft-verifier rouge: there is no such verifier; choose one of exact, "):
        build_verifier("rouge")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    for name, package in (("math", "math-verify"), ("bleu", "sacrebleu"), ("chrf", "sacrebleu")):
        with pytest.raises(ValueError, match=f"--ebft-verifier {name}: .* {package} is missing; pip install {package}"):
            build_verifier(name)


def test_a_verifier_that_does_not_start(monkeypatch):
    monkeypatch.setattr(pool, "START", 0.001)
    with pytest.raises(ValueError, match=r"--ebft-verifier exact: cannot be used \(not ready after 0.001 s\)"):
        build_verifier("exact")


def test_children_start_without_torch():
    script = "import sys; import megatron_ebft.verifiers.build; assert not {'torch', 'numpy'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_flags_have_the_defaults_of_the_function():
    flags = {flag.dest: flag for flag in VERIFIERS.flags}
    assert flags["ebft_verifier"].default is None and all(name in flags["ebft_verifier"].help for name in NAMES)
    assert flags["ebft_verifier_timeout"].default == build_verifier.__kwdefaults__["timeout"]
    assert flags["ebft_verifier_workers"].default == build_verifier.__kwdefaults__["workers"]
    assert flags["ebft_unsafe_code"].default == build_verifier.__kwdefaults__["unsafe_code"]
