"""Reads the weights of a Hugging Face folder (safetensors files) one tensor at a time.

Each read opens the file anew: a mapped file counts as resident memory for as long as it is open.
"""

import contextlib
import os

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ebft.checkpointing.companions import CONFIG
from megatron_ebft.common.disk import file_mode, is_folder, is_inside, is_regular, read_json, unreadable
from megatron_ebft.common.safetensors_writer import DTYPES
from megatron_ebft.hf.families import HFModel
from megatron_ebft.model.decoder import PositionRotary

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFWeights:
    """The tensors of a Hugging Face folder's safetensors files.

    Raises:
        ValueError: no safetensors files, a missing or truncated shard, a tensor on which the index and the files
            disagree, or a dtype that is not one of DTYPES. The message begins with `flag`.
    """

    def __init__(self, folder: str, flag: str):
        self.where = f"{flag} {folder}"
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, str] = {}
        if not is_folder(folder):
            raise ValueError(f"{self.where}: no such folder; name the local folder of a Hugging Face model (nothing is "
                             "downloaded)")
        promised = self._index(folder)
        for file in sorted(set(promised.values())) or [SINGLE]:
            self._scan(folder, file)
        for name, file in promised.items():
            if self._paths.get(name) != os.path.join(folder, file):
                raise ValueError(f"{self.where}: {INDEX} says that {name} is in {file}, but it is not; copy both "
                                 "again")

    def _index(self, folder: str) -> dict[str, str]:
        """File of each tensor according to the index; empty if a single file holds all tensors."""
        if file_mode(os.path.join(folder, SINGLE)):
            return {}
        path = os.path.join(folder, INDEX)
        if not file_mode(path):
            old = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))]
            advice = (f"; {old[0]} is in torch's pickle format, which is not supported: load it with transformers' "
                      "from_pretrained and write it with save_pretrained, which makes safetensors files" if old else "")
            raise ValueError(f"{self.where}: neither {SINGLE} nor {INDEX} there{advice}")
        files = read_json(path, f"{self.where}: {INDEX}").get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{self.where}: {INDEX} is damaged: it has no weight_map of tensors and files; copy it "
                             "again")
        files = {name: os.path.normpath(file) for name, file in files.items()}
        for name, file in files.items():
            if not is_inside(file):
                raise ValueError(f"{self.where}: {INDEX} says that {name} is in {file!r}, outside the model's folder; "
                                 "copy it again")
        return files

    def _scan(self, folder: str, name: str) -> None:
        path = os.path.join(folder, name)
        if not is_regular(path):
            raise ValueError(f"{self.where}: the shard {name} is missing, or no regular file; copy it again")
        with self._open(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                if key in self._paths:
                    raise ValueError(f"{self.where}: {key} is in {os.path.basename(self._paths[key])} and in {name}; "
                                     "remove the files that are not the model's")
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{self.where}: {key} is {part.get_dtype()} (quantised weights?); supported are "
                                     f"{', '.join(DTYPES)}")
                self._paths[key] = path
                self.dtypes[key], self.shapes[key] = DTYPES[part.get_dtype()], tuple(part.get_shape())

    @contextlib.contextmanager
    def _open(self, path: str):
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            where = f"{self.where}: {os.path.basename(path)}"
            raise unreadable(error, where, "is no whole safetensors file") from error

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        with self._open(self._paths[name]) as file:
            return file.get_tensor(name).clone()

    def check(self, model: HFModel) -> None:
        """Compare names and shapes of the tensors with those of the model.

        Older versions of transformers also wrote rotary frequencies, and output heads that are tied to the embedding.
        Both are ignored if they agree with the model.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; names the tensor.
        """
        expected = {name: shape for entry in model.entries.values() for name, shape in zip(entry.names, entry.shapes)}
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(f"{self.where}: the tensor {name} is missing; {CONFIG} asks for it")
            if self.shapes[name] != shape:
                raise ValueError(f"{self.where}: {name} has the shape {self.shapes[name]}, but {CONFIG} says {shape}")
        for name in self.shapes.keys() - expected.keys():
            if not self._is_redundant(name, model):
                raise ValueError(f"{self.where}: the tensor {name} has no place in {model.family.architecture} as "
                                 f"{CONFIG} describes it; the conversion would lose it")

    def _is_redundant(self, name: str, model: HFModel) -> bool:
        if name.endswith(".rotary_emb.inv_freq"):
            if self.shapes[name] != (model.architecture.kv_channels // 2,):
                return False
            expected, stored = PositionRotary(model.architecture).inv_freq.cpu(), self.read(name)
            return torch.allclose(expected.to(stored.dtype), stored, rtol=1e-2, atol=0.0)
        if name == "lm_head.weight":  # not expected: it is tied
            return torch.equal(self.read(name), self.read("model.embed_tokens.weight"))
        return False
