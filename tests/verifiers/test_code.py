"""The verifier `code`: which program an answer makes, which answers are right, and answers that claim to be."""

import socket
import time

import pytest
from code_verifier import code_verifier

from megatron_ebft.verifiers import answer_program
from megatron_ebft.verifiers.code import _received

PROMPT = 'from math import pi\n\n\ndef helper(x):\n    return 2 * x\n\n\ndef double(x):\n    """Twice x."""\n'
HUMAN_EVAL = {
    "prompt": PROMPT, "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4, 'of no use'\n"
            "    assert abs(candidate(1.5) - 3) < 1e-6\n"}
MBPP = {"prompt": "Write a function that doubles.", "test_setup_code": "three = 3",
        "test_list": ["assert double(2) == 4", "assert set(double([1])) == {1}", "assert double(three) == 6"]}
SUM = {"prompt": "Sum of the common divisors.", "test_list": ["assert sum(10, 15) == 6"]}
WHOLE = "def double(x):\n    return 2 * x\n"
TWICE_OR_SAME = "def double(x): return 2 * x if type(x) is int else x\n"
ANSWERS = [
    (HUMAN_EVAL, "    return 2 * x\n", ""),
    (HUMAN_EVAL, "    return helper(x)\n\nAnd this is how it works: it doubles.\n", ""),
    (HUMAN_EVAL, "    return 2 * x\n```\nIt doubles.\n```python\nprint(double(1))\n```\n", ""),
    (HUMAN_EVAL, f"Here is the code:\n```python\n{WHOLE}```\nIt doubles.", ""),
    (HUMAN_EVAL, "```\ndef double(x):\n    return x * pi / pi + x\n", ""),
    (HUMAN_EVAL, "    return 3 * x\n", "expected 4, got 6"),
    (HUMAN_EVAL, "    return x * x\n", "failed: assert abs(candidate(1.5) - 3) < 1e-06"),
    (HUMAN_EVAL, "    return y\n", "NameError: name 'y' is not defined"),
    (HUMAN_EVAL, "    return (2 * x", "expected 4, got None"),
    (HUMAN_EVAL, "def double(x) return", "NameError: name 'double' is not defined"),
    (HUMAN_EVAL | {"entry_point": "triple"}, WHOLE, "NameError: name 'triple' is not defined"),
    (MBPP, f"```bash\npip install x\n```\n```python\n{TWICE_OR_SAME}```\n", ""),
    (MBPP, "def double(x): return 4", "TypeError: 'int' object is not iterable"),
    (MBPP, "double", "NameError: name 'double' is not defined"),
    (SUM, "def sum(a, b):\n    return len([i for i in range(1, 99) if a % i == b % i == 0]) + 4", ""),
    (SUM, "", "TypeError: 'int' object is not iterable"),
    ({"prompt": "", "tests": "import math\nfor x in range(3):\n    assert math.isclose(double(x), 2 * x)"}, WHOLE, ""),
]
"""Question, completion, beginning of the reason."""
CLAIMS = [
    "import os\nos._exit(0)",
    "import sys\nsys.exit(0)",
    "raise SystemExit",
    "def double(x):\n    import os\n    os._exit(0)",
    "def double(x): raise SystemExit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "import os\nfor file in range(1, 99):\n    try: os.write(file, b'ready\\n' + bytes(32))\n    except OSError: pass\n"
    "os._exit(0)",
    "import os, threading\nthreading.Thread(target=os._exit, args=[0]).start()\ndef double(x): input()",
    "import builtins\nbuiltins.exec = builtins.compile = builtins.abs = lambda *a, **k: 0\ndef double(x): return 4",
    "import builtins\nbuiltins.AssertionError = builtins.BaseException = builtins.NameError = KeyError",
    "def abs(x): return 0\ndef check(candidate): pass\ndef double(x): return 4",
    "__builtins__ = {}\ncheck = candidate = _candidate_ = print\ndef double(x): return 4",
    "import sys\ndef trace(frame, event, argument):\n    if frame.f_code.co_name == 'check' and frame.f_lineno == 2:\n"
    "        frame.f_lineno = 3\n    return trace\nsys.settrace(trace)\ndef double(x): return 3",
    "import sys, marshal\nmarshal.loads = lambda x: ('', [], [])\nfor name, module in list(sys.modules.items()):\n"
    "    if 'answer_program' in name: module.run = module.exec = print\ndef double(x): return 3",
    "import os, sys\nif os.fork(): os._exit(0)\ndef double(x): return 3",
    "import signal, sys\nsignal.signal(signal.SIGALRM, lambda *_: sys.exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef double(x):\n    while True: pass",
]
"""Programs that a runner of exit codes, printed words or one namespace would take for right."""


@pytest.fixture(scope="module")
def code():
    with code_verifier(timeout=120) as verifier:
        yield verifier


def test_right_and_wrong_answers(code):
    for (question, _, _) in ANSWERS:
        code.check_question(question)
    verdicts = code.verify([(question, completion) for question, completion, _ in ANSWERS])
    for (_, completion, reason), verdict in zip(ANSWERS, verdicts, strict=True):
        assert verdict.is_right == (not reason) and verdict.score == verdict.is_right, (completion, verdict)
        assert verdict.reason.startswith(reason), (completion, verdict)


def test_claims_are_wrong(code):
    for question in (HUMAN_EVAL, {"tests": HUMAN_EVAL["test"] + "check(double)"}):
        for claim, verdict in zip(CLAIMS, code.verify([(question, claim) for claim in CLAIMS]), strict=True):
            assert not verdict.is_right and verdict.reason, (claim, verdict)


@pytest.mark.parametrize("change, words", [
    ({"test_list": ["pass"]}, "has test and test_list of the fields"),
    ({"test": None}, "test is not a text, but None"),
    ({"test": "def check(:"}, "test is not Python"),
    ({"entry_point": "a b"}, "entry_point 'a b' is not the name of a function"),
    ({"entry_point": 3}, "entry_point is not a text"),
    ({"prompt": ["x"]}, "prompt is not a text"),
])
def test_malformed_questions_are_refused(code, change, words):
    with pytest.raises(ValueError, match=words):
        code.check_question(HUMAN_EVAL | change)


def test_questions_without_tests_are_refused(code):
    for question, words in (
            ({}, "has none of the fields"), ({"test": "pass", "prompt": ""}, "no field entry_point"),
            ({"test_list": []}, "test_list is not"), ({"test_list": ["a b"]}, "test_list is not Python"),
            ({"tests": ["pass"]}, "tests is not a text")):
        with pytest.raises(ValueError, match=words):
            code.check_question(question)


def test_the_program_ends_where_python_does():
    cut = answer_program.parsable
    assert cut("x = 1\ny = 2\n") == "x = 1\ny = 2\n\n"
    assert cut("def f():\n    return 1\n\ndef g(x):\n    return (x") == "def f():\n    return 1\n\n"
    assert cut("x = 1\n'''open\ny = 2\n") == "x = 1\n"
    assert cut("No Python at all.") == "No Python at all."


def test_words_of_a_program_that_reads_nothing_arrive():
    """Linux then reports an error at their end."""
    ours, theirs = socket.socketpair()
    ours.sendall(b"tests")
    theirs.sendall(b"reason")
    theirs.close()
    assert _received(ours, 100, time.monotonic() + 300) == b"reason"
    ours.close()
