"""Runs inside the sandbox: the program that an answer makes, then the question's tests in the same process.

A verdict is right if the program's process repeats a random word. It can read this word after the last test.

1. Tests and word arrive only after the program has run to its end. Before, there is nothing to find, and a program
   that exits is wrong, whatever it prints or registers for its exit.
2. Tests have Python's own builtins, as they were before. They see the program's names, but none that hides a builtin
   unless it is what they test. They are compiled outside.
3. Trace functions end before the tests. This file keeps the functions it needs where patches do not reach them.

A function under test shares the tests' process. It can search that process for the word, or patch a module of the
standard library that the tests use, or return an object that equals everything. Nothing here prevents that.
"""

import ast
import builtins
import json
import marshal
import os
import re
import socket
import sys
import types

from megatron_ebft.verifiers.verdict import LONGEST_REASON

READY = b"ready\n"
WORD = 32
"""Bytes of the random word."""
CANDIDATE = "_candidate_"
"""The tests' name of the function at the question's entry point."""
FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
"""Language and content. The last fence may be open."""
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign,
               ast.AnnAssign)


def run(talk: socket.socket) -> None:
    """Run the program and the tests that arrive. Never returns."""
    receive, send, leave, execute, load = talk.recv, talk.sendall, os._exit, exec, marshal.loads
    length, untrace, unprofile, whole = int.from_bytes, sys.settrace, sys.setprofile, socket.MSG_WAITALL
    own = dict(vars(builtins))
    for name in [x for x in sys.modules if x.startswith("megatron_ebft")]:
        del sys.modules[name]
    module = sys.modules["answer"] = types.ModuleType("answer")
    try:
        source = program(**json.loads(receive(length(receive(4, whole), "big"), whole)))
        execute(compile(source, "answer", "exec", dont_inherit=True, optimize=0), module.__dict__)
        send(READY)
        entry_point, shown, tests = load(receive(length(receive(4, whole), "big"), whole))
        untrace(None)
        unprofile(None)
        names = {name: x for name, x in module.__dict__.items() if name not in own or name in shown}
        if entry_point:
            if entry_point not in names:
                raise NameError(f"name {entry_point!r} is not defined")
            names[CANDIDATE] = names[entry_point]
        names["__builtins__"] = own
        for test in tests:
            execute(test, names)
    except BaseException as error:  # SystemExit, too
        send(described(error).encode("utf-8", "replace"))
        leave(0)
    send(receive(WORD, whole))
    leave(0)


def described(error: BaseException) -> str:
    """An exception in one line."""
    message = str(error)
    if isinstance(error, AssertionError) and message:
        return message[:LONGEST_REASON]
    return f"{type(error).__name__}: {message}"[:LONGEST_REASON]


def program(prompt: str, entry_point: str, completion: str) -> str:
    """The program that a completion makes.

    Without an entry point it is the completion. With one, a completion that defines this function itself comes after
    what the prompt defines before it, and any other completion continues the prompt.
    """
    code = unfenced(completion, prompt if entry_point else "")
    if not entry_point:
        return parsable(code)
    definition = re.compile(rf"^(async[ \t]+)?def[ \t]+{entry_point}\b", re.MULTILINE)
    if not definition.search(code):
        return parsable(prompt + code)
    begin = definition.search(prompt)
    before = prompt[:begin.start()] if begin else ""
    return parsable((before if _defines(before) else "") + code)


def unfenced(completion: str, prompt: str = "") -> str:
    """The code in a completion: its first fence without another language than Python, or all of it.

    A completion may begin inside a fence that the prompt opened. Its code then ends at the first fence.
    """
    blocks = FENCE.findall(completion)
    begin = completion.partition("```")[0]
    is_code = _defines(begin) or begin.lstrip("\n")[:1].isspace() and _parsed(prompt + begin) is not None
    if is_code and begin.strip() and not (blocks and blocks[0][0]):
        return begin
    return next((code for language, code in blocks if language.lower() in ("", "python", "python3", "py")), completion)


def parsable(source: str) -> str:
    """The source without its last lines, as far as they keep it from being parsed. All of it if nothing would be left.

    Answers are cut at their last token, or go on with text.
    """
    lines = source.split("\n")
    end = len(lines)
    while end > 0:
        try:
            ast.parse("\n".join(lines[:end]))
        except SyntaxError as error:
            end = min(end, error.lineno or end) - 1
            continue
        return "\n".join(lines[:end]) + "\n"
    return source


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def _defines(source: str) -> bool:
    """Whether a text is Python that defines names and does nothing else. A word of English is Python, too."""
    tree = _parsed(source)
    return tree is not None and bool(tree.body) and all(isinstance(x, DEFINITIONS) or isinstance(x, ast.Expr)
                                    and isinstance(x.value, ast.Constant) for x in tree.body)
