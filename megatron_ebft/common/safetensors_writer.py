"""Writes a safetensors file tensor by tensor.

The safetensors library needs all tensors of a file in memory at once; this writer needs one. The format is the length
of the header (uint64), the header (JSON) and the bytes of the tensors.
"""

import contextlib
import json
import os
import struct

import torch
from torch import Tensor

from megatron_ebft.common.disk import sync

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that weights may have, by their names in safetensors."""


class SafetensorsWriter:
    """Writes a safetensors file as a context manager. The file appears at a clean exit only.

    Args:
        tensors: dtype (one of DTYPES, or int64) and shape by name, in the order of the `write` calls.
        metadata: strings for the header.
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
        """Write the next tensor."""
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
            with contextlib.suppress(OSError):  # a failed write has raised already
                self._file.close()
            if not is_whole:
                os.remove(self.path + ".tmp")
        sync(os.path.dirname(os.path.abspath(self.path)))


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data."""
    return torch.Size(shape).numel() * dtype.itemsize
