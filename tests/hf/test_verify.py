"""--verify notices a wrong conversion in both directions and names the layer; a wrong output does not stay."""

import os
import shutil

import pytest
import verify
from hf_models import read_tensors, save_model, to_hf, to_megatron
from safetensors.torch import save_file

from megatron_ebft.checkpointing.reader import CheckpointReader
from megatron_ebft.hf.families import Entry
from megatron_ebft.hf.weights import HFWeights


def test_verification_notices_and_names_the_layer(tmp_path, monkeypatch, capsys):
    """In both directions; what was wrong is not left behind."""
    source = save_model(tmp_path / "source", "qwen3")
    checkpoint = to_megatron(source, tmp_path / "good", "--verify")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("verified"))
    assert "64 tokens" in line and "logits differ by at most" in line and "bound" in line
    join, split = Entry.join, Entry.split

    def swapped(entry) -> bool:
        """Gate and up projection of the third layer, the other way round."""
        return "model.layers.2.mlp.gate_proj.weight" in entry.names

    monkeypatch.setattr(Entry, "join", lambda entry, parts: join(entry, parts[::-1] if swapped(entry) else parts))
    with pytest.raises(ValueError, match="differ by .*the first to differ is decoder layer 3 of 4"):
        to_megatron(source, tmp_path / "wrong", "--verify")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "wrong") == []
    monkeypatch.setattr(Entry, "split", lambda entry, x: split(entry, x)[::-1 if swapped(entry) else 1])
    with pytest.raises(ValueError, match="differ by .*the first to differ is decoder layer 3 of 4"):
        to_hf(checkpoint, tmp_path / "converted", "--verify")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["good", "source", "wrong"]
    scaled = {name: x * (1 + 1e-2 * (name == "lm_head.weight")) for name, x in read_tensors(source).items()}
    save_file(scaled, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ValueError, match="the first to differ is the output head"):
        verify.verify(str(tmp_path), HFWeights(str(tmp_path), "--x"), CheckpointReader(str(checkpoint), "--x"),
                      1e-4)
