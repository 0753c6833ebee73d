"""The verifier `code`: runs the program that an answer makes, and the question's tests.

The tests are one of

- `test` with `entry_point`, as in HumanEval: Python that defines check(candidate);
- `test_list`, as in MBPP: assertions, after `test_imports` and `test_setup_code` if there are any;
- `tests`: Python.
"""

import ast
import builtins
import json
import marshal
import os
import secrets
import select
import socket
import struct
import time

from megatron_ebft.verifiers import answer_program
from megatron_ebft.verifiers.programs import Unsandboxed
from megatron_ebft.verifiers.questions import texts
from megatron_ebft.verifiers.sandbox import Sandbox
from megatron_ebft.verifiers.verdict import RIGHT, Verdict, wrong

LONGEST_MESSAGE = 4096
"""Bytes of a message from a program."""


def check(question: dict) -> None:
    """Raise ValueError unless the question has tests of one kind that are Python."""
    kinds = [x for x in ("test", "test_list", "tests") if x in question]
    if len(kinds) != 1:
        raise ValueError(f"has {' and '.join(kinds) or 'none'} of the fields test (with entry_point), test_list and "
                         "tests; give one of them")
    if kinds == ["test"]:
        texts(question, "prompt", is_single=True)
        entry_point, = texts(question, "entry_point", is_single=True)
        if not entry_point.isidentifier():
            raise ValueError(f"entry_point {entry_point!r} is not the name of a function")
    try:
        sources(question)
    except SyntaxError as error:
        raise ValueError(f"{kinds[0]} is not Python ({error}); copy it again") from error


def sources(question: dict) -> list[ast.Module]:
    """The question's tests, in the order in which they run."""
    if "test" in question:
        test, = texts(question, "test", is_single=True)
        tests = [f"{test}\ncheck({answer_program.CANDIDATE})"]
    elif "tests" in question:
        tests = texts(question, "tests", is_single=True)
    else:
        imports = texts(question, "test_imports") if question.get("test_imports") else []
        set_up = texts(question, "test_setup_code", is_single=True) if "test_setup_code" in question else []
        tests = [*imports, *set_up, *texts(question, "test_list")]
    return [ast.parse(test) for test in tests]


def compiled(question: dict) -> bytes:
    """What the program's process needs for the tests: entry point, builtins that they mean as the program's, code.

    The program's `sum` counts if it is the entry point, or if the tests call builtins alone: then they test it. Where
    they call another function, as in sum(f(x)), they mean Python's.
    """
    trees = sources(question)
    calls = {x.func.id for tree in trees for x in ast.walk(tree)
             if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}
    entry_point = question["entry_point"] if "test" in question else ""
    shown = {entry_point} if entry_point else calls if calls <= vars(builtins).keys() else set()
    code = [compile(ast.fix_missing_locations(_Explained().visit(tree)), "test", "exec", dont_inherit=True, optimize=0)
            for tree in trees]
    return marshal.dumps((entry_point, shown, code))


class _Explained(ast.NodeTransformer):
    """Gives assertions a message: what was expected, or the assertion itself."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        text = ast.unparse(ast.Assert(node.test))
        test, message = node.test, repr(f"failed: {text}")
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            sides = [ast.NamedExpr(ast.Name(name, ast.Store()), side)
                     for name, side in (("_got_", test.left), ("_expected_", test.comparators[0]))]
            test = ast.Compare(sides[0], test.ops, sides[1:])
            message = "f'expected {_expected_!r}, got {_got_!r}'"
        return ast.Assert(test, ast.parse(message, mode="eval").body)


class Judge:
    """Judges one answer after another.

    Args:
        programs: where they run.
    """

    def __init__(self, programs: Sandbox | Unsandboxed):
        self.programs = programs

    def __call__(self, question: dict, completion: str) -> Verdict:
        tests = compiled(question)
        entry_point = question["entry_point"] if "test" in question else ""
        job = {"prompt": question["prompt"] if entry_point else "", "entry_point": entry_point,
               "completion": completion}
        talk, theirs = socket.socketpair()
        report, reporting = (open(x, mode) for x, mode in zip(os.pipe(), ("rb", "wb")))
        until = time.monotonic() + self.programs.seconds
        with talk, theirs, report, reporting:
            self.programs.start(lambda: answer_program.run(theirs), theirs.fileno(), reporting.fileno())
            try:
                theirs.close()
                reporting.close()
                if verdict := self._converse(talk, json.dumps(job).encode(), tests, until):
                    return verdict
                if not select.select([report], [], [], _left(until))[0]:
                    raise TimeoutError
                return wrong(report.read().decode() or "it could not be started")
            except TimeoutError:
                return wrong(f"timeout after {self.programs.seconds:g} s")
            finally:
                self.programs.stop()

    def _converse(self, talk: socket.socket, job: bytes, tests: bytes, until: float) -> Verdict | None:
        """Give a program its job and its tests. None if it ends without a word.

        Raises:
            TimeoutError: at the time `until`.
        """
        word = secrets.token_bytes(answer_program.WORD)
        try:
            for message, wanted in ((_framed(job), answer_program.READY), (_framed(tests) + word, word)):
                talk.settimeout(_left(until))
                talk.sendall(message)
                if (got := _received(talk, len(wanted), until)) != wanted:
                    got += _received(talk, LONGEST_MESSAGE, until)
                    return wrong(got.decode("utf-8", "replace")) if got else None
        except BrokenPipeError:
            return None
        return RIGHT


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0.001)


def _framed(message: bytes) -> bytes:
    return struct.pack(">I", len(message)) + message


def _received(talk: socket.socket, most: int, until: float) -> bytes:
    """What a program sends until it has sent so many bytes, or ends."""
    got = b""
    while len(got) < most:
        talk.settimeout(_left(until))
        try:
            part = talk.recv(most - len(got))
        except ConnectionResetError:  # instead of an end, if it has not read all
            break
        if not part:
            break
        got += part
    return got
