"""What a conversion may hold in memory, and what it leaves behind when it is stopped or finds no room."""

import os
import shutil
from pathlib import Path

import hf_to_megatron
import pytest
import torch
from hf_models import equal_tensors, read_tensors, save_model, to_hf, to_megatron
from ranks import run_script

from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.checkpointing.reader import CheckpointReader
from megatron_ebft.hf.weights import HFWeights

TOOLS = Path(hf_to_megatron.__file__).parent


MEMORY = """
import sys
from pathlib import Path
from megatron_ebft.hf.convert import hf_to_megatron, megatron_to_hf

def kilobytes(name):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)).split()[1])

folder = sys.argv[1]
for convert, source, target in ((hf_to_megatron, "", ".c"), (megatron_to_hf, ".c", ".h")):
    convert(f"{folder}/small{source}", f"{folder}/small{target}")  # what is imported and cached on the way
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    convert(f"{folder}/large{source}", f"{folder}/large{target}")
    print("added", kilobytes("VmHWM") - before)
"""


FREED_AT_ONCE = "import ctypes; ctypes.CDLL(None).mallopt(-3, 65536)"
"""M_MMAP_THRESHOLD: memory that is not kept by malloc, as it is with large models."""


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """Converting a model of 200 MB adds no more than three of its largest tensors, and a little."""
    save_model(tmp_path / "small", "llama 3.1")
    large = save_model(tmp_path / "large", "llama 3.1", torch.bfloat16, "70MB", vocab_size=8192, hidden_size=768,
                       intermediate_size=2048, num_hidden_layers=14)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    largest = max(x.nbytes for x in read_tensors(large).values())
    assert size > 195e6 and len(list(large.glob("*.safetensors"))) == 4 and largest < size / 14
    (tmp_path / "memory.py").write_text(MEMORY)
    _, said = run_script(tmp_path / "memory.py", str(tmp_path), before=FREED_AT_ONCE)
    added = [int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("added")]
    assert len(added) == 2, said
    assert max(added) <= 3 * largest + 10e6, added
    assert equal_tensors(read_tensors(tmp_path / "large.h"), read_tensors(large))


SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
KILLED = """
import os
from megatron_ebft.checkpointing.reader import CheckpointReader
from megatron_ebft.hf.weights import HFWeights
for cls in (HFWeights, CheckpointReader):
    def read(self, name, read=cls.read, calls=[]):
        calls.append(name)
        return read(self, name) if len(calls) < 10 else os.kill(os.getpid(), 9)
    cls.read = read
"""
"""SIGKILL at the tenth tensor."""


@pytest.mark.parametrize("tool", ["hf_to_megatron.py", "megatron_to_hf.py"])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, tool):
    source = save_model(tmp_path / "source", "llama 2", vocab_size=4096)
    output = tmp_path / "output"
    flags = ["--hf-model", str(source)] if tool.startswith("hf") else [
        "--load", str(to_megatron(source, tmp_path / "checkpoint"))]

    code, text = run_script(TOOLS / tool, *flags, "--output", str(output), before=SMALL_FILES)
    assert code == 1 and f"error: --output {output}: cannot write there" in text, text
    assert "Traceback" not in text and "Nothing was left there" in text.splitlines()[-1]
    assert not output.exists() or os.listdir(output) == []
    assert run_script(TOOLS / tool, *flags, "--output", str(output))[0] == 0


def test_too_little_space_is_found_before(tmp_path, monkeypatch):
    source = save_model(tmp_path / "source", "llama 2")
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    for convert_it in (lambda: to_megatron(source, tmp_path / "x/y"), lambda: to_hf(checkpoint, tmp_path / "x/y")):
        with pytest.raises(ValueError, match="--output .*y: needs 0.000158 GB, and 1e-06 GB are free"):
            convert_it()
    assert not (tmp_path / "x").exists()


def test_an_interrupted_conversion_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    source = save_model(tmp_path / "source", "llama 2")
    checkpoint, converted = tmp_path / "checkpoint", tmp_path / "converted"

    def interrupted(cls):
        read, calls = cls.read, []

        def stops(self, name):
            calls.append(name)
            if len(calls) == 10:
                raise KeyboardInterrupt
            return read(self, name)

        monkeypatch.setattr(cls, "read", stops)

    interrupted(HFWeights)
    with pytest.raises(KeyboardInterrupt):
        to_megatron(source, checkpoint)
    monkeypatch.undo()
    assert os.listdir(checkpoint) == []
    to_megatron(source, checkpoint)
    assert sorted(os.listdir(checkpoint)) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    interrupted(CheckpointReader)
    with pytest.raises(KeyboardInterrupt):
        to_hf(checkpoint, converted)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "source"]
    assert equal_tensors(read_tensors(to_hf(checkpoint, converted)), read_tensors(source))
    for tool, flags in (("hf_to_megatron.py", ["--hf-model", str(source)]),
                        ("megatron_to_hf.py", ["--load", str(checkpoint)])):
        assert run_script(TOOLS / tool, *flags, "--output", str(tmp_path / tool), before=KILLED)[0] == -9
        assert not (tmp_path / tool / "config.json").exists()
        assert not (tmp_path / tool).exists() or latest_iteration(str(tmp_path / tool)) is None
        assert run_script(TOOLS / tool, *flags, "--output", str(tmp_path / tool))[0] == 0
