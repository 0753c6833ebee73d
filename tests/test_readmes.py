"""READMEs name files that exist and flags that exist."""

import re
from pathlib import Path

import pytest

from megatron_ebft.run.flags.table import FLAGS

ROOT = Path(__file__).parents[1]
READMES = sorted(path for path in ROOT.rglob("README.md") if not {".git", "node_modules"} & set(path.parts)
                 and not any(part.startswith(".venv") for part in path.parts))
SUFFIXES = r"\.(?:py|sh|md|svg|json|safetensors)"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_exist(readme):
    """Links, and names with a folder: relative to the README, to the repository or to the package."""
    text = readme.read_text()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    spans = re.findall(r"`([^`\n]+)`", text)
    code = {name for span in spans for name in re.findall(rf"[\w./-]+/[\w-]+{SUFFIXES}", span)}
    places = (readme.parent, ROOT, ROOT / "megatron_ebft")
    missing = [name for name in sorted(links - {""} | code)
               if not any((place / name).exists() for place in places)]
    assert not missing, missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_of_ebft_exist(readme):
    named = {flag.rstrip("-") for flag in re.findall(r"--ebft-[a-z0-9-]+", readme.read_text())}
    known = {flag.name for flag in FLAGS.values()}
    assert named <= known, named - known


def test_every_module_is_in_the_code_map():
    code_map = (ROOT / "megatron_ebft/README.md").read_text()
    modules = {path.name for path in (ROOT / "megatron_ebft").glob("*/*.py")} - {"__init__.py"}
    assert not {name for name in modules if name not in code_map}
