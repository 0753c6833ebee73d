"""The only door to the pickles in a checkpoint: reading a file never runs code from it.

1. torch unpickles `.metadata`, and Megatron-Core the objects among the tensors, both without restrictions. Whoever
   wrote such a file could run code in every process that reads it. Checksums do not help: they have the same author.
2. Here `.metadata` is unpickled with a list of the classes it needs, and its entries are checked. Objects are read as
   tensors and plain values (torch's weights_only) and given to Megatron-Core as bytes that this process has written.
3. Everything that reads a checkpoint does it through `CheckpointFiles`.
"""

import contextlib
import io
import os
import pickle
import re

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ebft.checkpointing.errors import distrusted
from megatron_ebft.checkpointing.folders import METADATA
from megatron_ebft.common.disk import is_regular, patiently, read_bytes, read_json

COMMON, CONFIG = "common.pt", "metadata.json"
CLASSES = (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties,
           TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo)
"""Classes of which `.metadata` consists."""


class CheckpointFiles(FileSystemReader):
    """torch's reader of a checkpoint folder, without its unrestricted pickles.

    `read_metadata` and `read_data` raise Distrusted, or one of errors.UNREADABLE.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """The description of all tensors; `.metadata` is read once."""
        if self._metadata is None:
            self._metadata = read_metadata(os.path.join(self.folder, METADATA))
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan, planner):
        """Read what a plan asks for."""
        for name in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            if not is_regular(os.path.join(self.folder, name)):
                raise ValueError(f"{name} is missing, or no regular file")
        return patiently(super().read_data, plan, _PlainObjects(planner, self.folder))

    def load(self, template: dict) -> dict:
        """Megatron-Core's load of a sharded state dict from this folder. All ranks must call."""
        config = read_json(os.path.join(self.folder, CONFIG))
        if (config.get("sharded_backend"), config.get("common_backend", "torch")) != ("torch_dist", "torch"):
            raise ValueError(f"{CONFIG}: {config} is not the format torch_dist")
        common = os.path.join(self.folder, COMMON)
        if os.path.lexists(common):  # by Megatron-Core before 0.18; it reads the file itself
            plain_value(read_bytes(common), common)
        with self._for_megatron():
            # The save validated the sharding. Validating again would fail on rank 0 alone while the others wait.
            return dist_checkpointing.load(template, self.folder, validate_access_integrity=False)

    @contextlib.contextmanager
    def _for_megatron(self):
        """Megatron-Core reads through this object."""
        name = "_get_filesystem_reader"
        before = {module: vars(module)[name] for module in (torch_strategies, serialization) if name in vars(module)}
        for module in before:
            setattr(module, name, lambda *_, **__: self)
        try:
            yield
        finally:
            for module, function in before.items():
                setattr(module, name, function)


class _PlainObjects:
    """A planner that gets bytes of objects from this process instead of those in the file."""

    def __init__(self, planner, folder: str):
        self._planner, self._folder = planner, folder
        self.resolve_tensor, self.commit_tensor = planner.resolve_tensor, planner.commit_tensor

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        where = f"{self._folder}: the object {read_item.storage_index.fqn}"
        own = io.BytesIO()
        torch.save(plain_value(value.getvalue(), where), own)
        own.seek(0)
        self._planner.load_bytes(read_item, own)


def plain_value(content: bytes, where: str):
    """The tensors, numbers, strings and containers that torch.save wrote.

    Raises:
        Distrusted: there is something else; begins with `where`.
        pickle.UnpicklingError: the content is damaged.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text recommends loading without the check
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise distrusted(where, asked[1]) from error
        raise pickle.UnpicklingError(f"{where} is not what torch.save writes") from error


def read_metadata(path: str) -> Metadata:
    """A `.metadata` file.

    Raises:
        Distrusted: it asks for something that no checkpoint needs.
        ValueError, or whatever unpickling raises: the file is damaged.
    """
    value = _MetadataUnpickler(io.BytesIO(read_bytes(path)), path).load()
    try:
        _check_metadata(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{METADATA} is damaged: {error}") from error
    return value


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the values that describe tensors and their places.

    Classes are replaced by stand-ins that make their objects: a pickle can set attributes of whatever it finds here.
    """

    def __init__(self, file, path: str):
        super().__init__(file)
        self._path = path
        self._known = {(cls.__module__, cls.__name__): _maker(cls) for cls in CLASSES} | {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): _strided,
            ("pathlib", "PosixPath"): _joined, ("pathlib._local", "PosixPath"): _joined}

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module == "torch.distributed.checkpoint.planner":  # how it was written: unused
            return _Ignored
        if (module, name) not in self._known:
            raise distrusted(self._path, f"{module}.{name}")
        return self._known[module, name]


class _Ignored:
    """Takes any state and does nothing with it."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _maker(cls: type) -> type:
    """A class whose calls make objects of `cls`."""
    return type(cls.__name__, (), {"__new__": lambda _, *args: cls(*args) if args else cls.__new__(cls)})


def _joined(*parts: str) -> str:
    return "/".join(parts)


def _strided(name: str) -> torch.layout:
    if name != "torch.strided":
        raise ValueError(f"the layout {name}")
    return torch.strided


def _check_metadata(value) -> None:
    """ValueError, AttributeError or TypeError unless entries have the right types, and every file is in the folder."""
    if not (isinstance(value, Metadata) and isinstance(value.state_dict_metadata, dict)
            and isinstance(value.storage_data, dict)):
        raise ValueError("it does not describe a checkpoint")
    for key, entry in value.state_dict_metadata.items():
        if not (isinstance(key, str) and (isinstance(entry, BytesStorageMetadata) or _describes_tensor(entry))):
            raise ValueError(f"its entry {key!r} is {entry}")
    for index, place in value.storage_data.items():
        if not (isinstance(index, MetadataIndex) and isinstance(place, filesystem._StorageInfo)):
            raise ValueError(f"it says that {index} is in {place}")
        name = place.relative_path
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"it says that {index.fqn} is in {name!r}, outside the checkpoint's folder")
        if not (isinstance(place.offset, int) and isinstance(place.length, int) and min(place.offset, place.length) >= 0
                and not place.transform_descriptors):
            raise ValueError(f"it says that {index.fqn} is at {place}")


def _describes_tensor(entry) -> bool:
    return (isinstance(entry, TensorStorageMetadata) and isinstance(entry.size, torch.Size)
            and isinstance(entry.properties.dtype, torch.dtype)
            and all(isinstance(chunk.offsets, torch.Size) and isinstance(chunk.sizes, torch.Size)
                    for chunk in entry.chunks))
