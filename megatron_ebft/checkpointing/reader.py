"""Reads the unsplit weights of a checkpoint one tensor at a time, without building a model."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ebft.checkpointing.errors import reading
from megatron_ebft.checkpointing.folders import resolve
from megatron_ebft.checkpointing.manifest import check_whole
from megatron_ebft.checkpointing.random_states import KEY
from megatron_ebft.checkpointing.record import architecture_of, read_record
from megatron_ebft.checkpointing.unpickling import CheckpointFiles
from megatron_ebft.model.architecture import read_architecture


class CheckpointReader:
    """The weights of a checkpoint that was saved at any layout.

    Args:
        directory: one with a pointer to the latest checkpoint, or an `iter_*` folder itself.
        is_whole: the files were just written, so their checksums are not compared.
        say: receives progress lines of that comparison.

    Raises:
        ValueError: nothing to load, a damaged file, or a checkpoint of another format.
    """

    def __init__(self, directory: str, flag: str, is_whole: bool = False, say=lambda line: None):
        self.flag, self.folder = flag, resolve(directory, flag)
        self.metadata: dict = read_record(self.folder, flag)["metadata"]
        """The caller's metadata, as it was saved."""
        self.architecture = read_architecture(self.metadata["architecture"], architecture_of(self.folder, flag))
        if not is_whole:
            check_whole(self.folder, flag, say=say)
        with reading(self.folder, flag):
            self._reader = CheckpointFiles(self.folder)
            self._stored = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._stored, is_coordinator=True)
        weights = {key: value for key, value in self._stored.state_dict_metadata.items()
                   if isinstance(value, TensorStorageMetadata) and not key.startswith(("optimizer.", f"{KEY}."))}
        self.dtypes = {key: value.properties.dtype for key, value in weights.items()}
        self.shapes = {key: tuple(value.size) for key, value in weights.items()}

    def read(self, key: str) -> Tensor:
        """An unsplit tensor, including the rows that pad the vocabulary."""
        tensors = {key: torch.empty(self.shapes[key], dtype=self.dtypes[key])}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(tensors, self._stored, is_coordinator=True)
        with reading(self.folder, self.flag):
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        return tensors[key]
