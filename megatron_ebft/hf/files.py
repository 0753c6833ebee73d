"""Files of a Hugging Face model folder: weights read and written one tensor at a time, and what travels beside them.

1. A tensor is read by opening its file anew: a mapped file counts as resident memory for as long as it is open.
2. The safetensors library writes a file from tensors that are all in memory; a shard here is written as its tensors
   come, which is all that `SafetensorsWriter` adds (the format: a length, a JSON header, the bytes).
3. Companions are the small files that a checkpoint carries with it, so that a model trained here can go back:
   configuration, generation settings, tokenizer. They lie in COMPANIONS inside a checkpoint's folder.
"""

import contextlib
import json
import os
import struct

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ebft.checkpointing.files import sync
from megatron_ebft.hf.families import CONFIG, HFModel
from megatron_ebft.model.decoder import PositionRotary

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", SENTENCEPIECE, "tokenizer.model.v3", "spiece.model",
                   "chat_template.jinja", "chat_template.json", "tekken.json")
COMPANIONS = "hugging_face"
"""Folder of the companions in a checkpoint."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes that weights may have."""


class HFWeights:
    """The tensors of a Hugging Face folder's safetensors files.

    Raises:
        ValueError: naming `flag`: no safetensors files, a shard that is missing or truncated, a tensor that the index
            and the files do not agree on, a dtype that is not one of DTYPES.
    """

    def __init__(self, folder: str, flag: str):
        self.where = f"{flag} {folder}"
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, str] = {}
        if not os.path.isdir(folder):
            raise ValueError(f"{self.where}: no such folder; name the local folder of a Hugging Face model (nothing is "
                             "downloaded)")
        promised = self._index(folder)
        for file in sorted(set(promised.values())) or [SINGLE]:
            self._scan(folder, file)
        for name, file in promised.items():
            if self._paths.get(name) != os.path.join(folder, file):
                raise ValueError(f"{self.where}: {INDEX} says that {name} is in {file}, where it is not; copy both "
                                 "again")

    def _index(self, folder: str) -> dict[str, str]:
        """File of each tensor as the index says; nothing where one file holds them all."""
        if os.path.exists(os.path.join(folder, SINGLE)):
            return {}
        path = os.path.join(folder, INDEX)
        if not os.path.exists(path):
            old = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))]
            advice = (f"; {old[0]} is in torch's pickle format, which is not read: load it with transformers' "
                      "from_pretrained and write it with save_pretrained, which makes safetensors files" if old else "")
            raise ValueError(f"{self.where}: neither {SINGLE} nor {INDEX} there{advice}")
        try:
            with open(path) as file:
                files = json.load(file)["weight_map"]
            return {name: os.path.normpath(file) for name, file in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.where}: {INDEX} is damaged ({error!r}); copy it again") from error

    def _scan(self, folder: str, name: str) -> None:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise ValueError(f"{self.where}: the shard {name} is missing; copy it again")
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
            raise ValueError(f"{self.where}: {os.path.basename(path)} is no whole safetensors file ({error}); copy it "
                             "again") from error

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        with self._open(self._paths[name]) as file:
            return file.get_tensor(name).clone()

    def check(self, model: HFModel) -> None:
        """Every tensor of the files is one of the model's, in its shape, and the other way round.

        Two kinds of leftovers of older versions of transformers are let through if they say nothing new: rotary
        frequencies, and an output head equal to the embedding that it is tied to.

        Raises:
            ValueError: naming the tensor.
        """
        wanted = {name: shape for entry in model.entries.values() for name, shape in zip(entry.names, entry.shapes)}
        for name, shape in wanted.items():
            if name not in self.shapes:
                raise ValueError(f"{self.where}: the tensor {name} is missing; {CONFIG} asks for it")
            if self.shapes[name] != shape:
                raise ValueError(f"{self.where}: {name} has the shape {self.shapes[name]}, but {CONFIG} says {shape}")
        for name in self.shapes.keys() - wanted.keys():
            if not self._says_nothing_new(name, model):
                raise ValueError(f"{self.where}: the tensor {name} has no place in {model.family.architecture} as "
                                 f"{CONFIG} describes it; the conversion would lose it")

    def _says_nothing_new(self, name: str, model: HFModel) -> bool:
        if name.endswith(".rotary_emb.inv_freq"):
            known, found = PositionRotary(model.architecture).inv_freq.cpu(), self.read(name)
            return known.shape == found.shape and torch.allclose(known.to(found.dtype), found, rtol=1e-2, atol=0.0)
        if name == "lm_head.weight":  # not wanted: tied
            return torch.equal(self.read(name), self.read("model.embed_tokens.weight"))
        return False


class SafetensorsWriter:
    """Writes a safetensors file as its tensors come; whole at a clean exit of its context, else not there.

    Args:
        tensors: dtype (one of DTYPES, or int64) and shape by name, in the order in which `write` will be called.
        metadata: the header's strings.
    """

    def __init__(self, path: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]):
        self.path, self.tensors = path, tensors
        names = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}
        header, end = {"__metadata__": metadata}, 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + tensor_bytes(dtype, shape)
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin = struct.pack("<Q", len(text)) + text

    def __enter__(self):
        self._left = iter(self.tensors.items())
        self._file = open(self.path + ".tmp", "wb")
        self._file.write(self._begin)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        assert (name, (tensor.dtype, tuple(tensor.shape))) == next(self._left), name
        self._file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def __exit__(self, kind, *exc):
        is_whole = False
        try:
            if kind is None:
                assert next(self._left, None) is None
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self.path + ".tmp", self.path)
                is_whole = True
        finally:
            with contextlib.suppress(OSError):  # of closing: what could not be written was reported
                self._file.close()
            if not is_whole:
                os.remove(self.path + ".tmp")
        sync(os.path.dirname(os.path.abspath(self.path)))


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data."""
    return torch.Size(shape).numel() * dtype.itemsize


def read_companions(folder: str, names: tuple[str, ...] = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)) -> dict:
    """Contents of those of the files that are there, by name; nothing where there is no such folder."""
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                found[name] = file.read()
    return found


def write_companions(folder: str, companions: dict[str, bytes]) -> None:
    """Write the files into a folder, which is made."""
    os.makedirs(folder, exist_ok=True)
    for name, content in companions.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
