"""Changes to a checkpoint by someone who also makes its checksums right."""

import contextlib
import io
import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_ebft.checkpointing.folders import MANIFEST
from megatron_ebft.checkpointing.manifest import seal


class Marker:
    """Whatever unpickles this without restrictions makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@contextlib.contextmanager
def resealed(folder: Path):
    """Files of a checkpoint folder may be changed inside; the manifest then agrees with them."""
    yield
    (folder / MANIFEST).unlink(missing_ok=True)
    seal(str(folder))


def edit_metadata(folder: Path, edit) -> None:
    """Call `edit` on the content of `.metadata` and write it back."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def mark_metadata(folder: Path, marker: Path) -> str:
    """Put a marker into `.metadata`; returns what the refusal must name."""
    edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Marker(marker)))
    return r"\.metadata asks for posix\.mkdir"


def mark_random_states(folder: Path, marker: Path) -> str:
    """Put one where format 3 kept the random states of the only rank."""
    content = io.BytesIO()
    torch.save([Marker(marker)], content)
    (folder / "__7_0.distcp").write_bytes(content.getvalue())
    key = "rng_state/shard_0_1"

    def edit(metadata) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__7_0.distcp", 0, len(content.getvalue()))

    edit_metadata(folder, edit)
    return f"{key} asks for posix.mkdir"


def mark_common(folder: Path, marker: Path) -> str:
    """Put one where Megatron-Core before 0.18 kept everything that is no tensor."""
    torch.save({"args": Marker(marker)}, folder / "common.pt")
    return r"common\.pt asks for posix\.mkdir"
