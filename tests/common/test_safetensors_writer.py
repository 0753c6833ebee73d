"""Files of SafetensorsWriter, read by the safetensors library."""

import os

import pytest
import torch
from hf_models import equal_tensors
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ebft.common.safetensors_writer import SafetensorsWriter


def test_files_are_those_of_the_library(tmp_path):
    """What SafetensorsWriter makes, read by safetensors; nothing is left of a file that was not finished."""
    made = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(()), "c": torch.arange(7), "d": torch.zeros(0, 4)}
    kinds = {name: (x.dtype, tuple(x.shape)) for name, x in made.items()}
    with SafetensorsWriter(str(tmp_path / "x"), kinds, {"format": "pt", "key": "välue"}) as writer:
        for name, x in made.items():
            writer.write(name, x)
    assert equal_tensors(load_file(tmp_path / "x"), made)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "välue"}
    with pytest.raises(AssertionError), SafetensorsWriter(str(tmp_path / "y"), kinds, {}) as writer:
        writer.write("b", made["b"])
    assert os.listdir(tmp_path) == ["x"]
