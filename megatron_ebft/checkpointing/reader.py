"""Whole weights out of a checkpoint, one tensor at a time, without building a model."""

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ebft.checkpointing.files import check_whole, read_record, reading, resolve
from megatron_ebft.hf.families import VOCABULARY, HFModel
from megatron_ebft.model.architecture import ModelArgs


class CheckpointReader:
    """The weights of a checkpoint, whatever layout it was saved in.

    Args:
        directory: one with a latest pointer, or a folder with a checkpoint's files itself.
        is_whole: its files were just written; they are not read to compare checksums.
        say: is told how far that is.

    Raises:
        ValueError: as checkpoint.load_weights.
    """

    def __init__(self, directory: str, flag: str, is_whole: bool = False, say=lambda line: None):
        self.flag, self.folder = flag, resolve(directory, flag)
        self.metadata: dict = read_record(self.folder, flag)["metadata"]
        """The caller's, as it was saved."""
        self.architecture = ModelArgs(**self.metadata["architecture"])
        if not is_whole:
            check_whole(self.folder, flag, say=say)
        with reading(self.folder, flag):
            self._reader = FileSystemReader(self.folder)
            self._stored = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._stored, is_coordinator=True)
        weights = {key: value for key, value in self._stored.state_dict_metadata.items()
                   if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")}
        self.dtypes = {key: value.properties.dtype for key, value in weights.items()}
        self.shapes = {key: tuple(value.size) for key, value in weights.items()}

    def check(self, model: HFModel) -> None:
        """ValueError unless the weights are the model's, each once, in its shape (rows may pad the vocabulary)."""
        where = f"{self.flag} {self.folder}"
        differ = self.shapes.keys() ^ model.entries.keys()
        if differ:
            raise ValueError(f"{where}: {', '.join(sorted(differ)[:8])}: not both in the checkpoint and in "
                             f"{model.family.architecture}; the conversion would lose it")
        for key, entry in model.entries.items():
            rows, *rest = self.shapes[key]
            is_padded = key in VOCABULARY and rows > entry.shape[0]
            if rest != [*entry.shape[1:]] or not (rows == entry.shape[0] or is_padded):
                raise ValueError(f"{where}: {key} has the shape {self.shapes[key]}, but the architecture says "
                                 f"{entry.shape}")

    def read(self, key: str) -> Tensor:
        """A whole tensor, rows that pad the vocabulary included."""
        wanted = {key: torch.empty(self.shapes[key], dtype=self.dtypes[key])}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(wanted, self._stored, is_coordinator=True)
        with reading(self.folder, self.flag):
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        return wanted[key]
