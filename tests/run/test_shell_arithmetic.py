"""Shell functions of the scripts: numbers from files, and nothing that arithmetic would run; the exit code of a job."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POINTER = "latest_checkpointed_iteration.txt"


def run(script: str, function: str, folder: Path, call: str) -> str:
    """What a call of a shell function prints; the function's text is cut out of the script."""
    text = (ROOT / script).read_text()
    bodies = [re.search(rf"^{name}\(\) {{.*?(\n| )}}$", text, re.DOTALL | re.MULTILINE)[0]
              for name in {function, "newest_step"} if script == "slurm/lib.sh" or name == function]
    return subprocess.run(["bash", "-Eeuo", "pipefail", "-c", "\n".join([*bodies, call])], text=True, timeout=60,
                          check=True, cwd=folder, stdout=subprocess.PIPE, env={"save": ".", "job": "7"}).stdout.strip()


@pytest.mark.parametrize("content, number", [
    ("12", "12"), ("0009\n", "9"), ("", "0"), ("release", "0"), ("-3", "0"), ("1 2", "0"), ("9" * 40, "0"),
    ("SECONDS[$(>marker)]", "0"), ("SECONDS[$(>marker)]\n3", "0")])
def test_numbers_in_files(tmp_path, content, number):
    (tmp_path / "logs").mkdir()
    (tmp_path / POINTER).write_text(content)
    assert run("examples/lib.sh", "steps_done", tmp_path, "(($(steps_done .) >= 0)); steps_done .") == number
    assert run("slurm/lib.sh", "newest_step", tmp_path, "newest_step") == number
    (tmp_path / POINTER).write_text(number)
    (tmp_path / "logs/7.crashes").write_text(f"{content.strip()} {number}\n")
    count = run("slurm/lib.sh", "in_a_row", tmp_path, "in_a_row crashes; in_a_row crashes").split()
    assert count == [str(int(number) + 1), str(int(number) + 2)] if content.strip() != "1 2" else count == ["1", "2"]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("codes, code", [(["74", "1"], "74"), (["74", "0"], "74"), (["74", "64"], "64"), (["1"], "1")])
def test_a_filesystem_that_did_not_answer_decides(tmp_path, codes, code):
    for rank, ended in enumerate(codes):
        (tmp_path / f"exit-{rank}").write_text(f"{ended}\n")
    constants = re.search("^readonly (FINISHED=.*)$", (ROOT / "slurm/lib.sh").read_text(), re.MULTILINE)[1]
    assert run("slurm/lib.sh", "outcome", tmp_path, f"LOGS=. {constants}; outcome") == code
