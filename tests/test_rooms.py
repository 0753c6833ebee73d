"""The rooms of the package, and which of them may import which."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_ebft"
BELOW = {
    "run": {"hf", "method", "rollout", "verifiers", "checkpointing", "data", "model", "layout", "parallel", "common"},
    "hf": {"checkpointing", "data", "model", "parallel", "common"},
    "method": {"rollout", "verifiers", "data", "model", "layout", "parallel", "common"},
    "rollout": {"data", "model", "layout", "parallel", "common"},
    "verifiers": {"common"},
    "checkpointing": {"model", "parallel", "common"},
    "data": {"layout", "parallel", "common"},
    "model": {"layout", "parallel", "common"},
    "layout": {"common"},
    "parallel": {"common"},
    "common": set(),
}
"""What each room may import besides itself."""


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megatron_ebft":
            modules |= {node.module} if node.module.count(".") > 1 else {f"{node.module}.{x.name}" for x in node.names}
        elif isinstance(node, ast.Import):
            modules |= {x.name for x in node.names if x.name.split(".")[0] == "megatron_ebft"}
    return modules


def test_every_file_is_in_a_room():
    assert {x.name for x in PACKAGE.iterdir() if x.is_dir() and x.name != "__pycache__"} == BELOW.keys()
    assert {x.name for x in PACKAGE.glob("*.py")} == {"__init__.py", "train.py", "environment.py"}


def test_imports_go_one_way():
    wrong = []
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        for module in sorted(imports(path)):
            there = module.split(".")[1]
            if there != room and there not in BELOW[room] and there != "__version__":
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong, wrong


def test_files_are_short():
    """400 lines a file, 60 a function, tests and tools as well."""
    root = PACKAGE.parent
    files = [x for folder in ("megatron_ebft", "tools", "tests", "examples") for x in (root / folder).rglob("*.py")]
    long = [f"{x.relative_to(root)}: {count} lines" for x in files if (count := len(x.read_text().splitlines())) > 400]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(root)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, long
