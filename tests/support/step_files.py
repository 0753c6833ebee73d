"""Step files, changed on purpose."""

from pathlib import Path

from golden import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def tampered(folder: Path, change, source: Path = GOLDEN / "step.safetensors") -> Path:
    """A copy of a step's file after change(tensors, metadata)."""
    tensors, entries = load_file(source), metadata(source)
    change(tensors, entries)
    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / source.name, entries)
    return folder / source.name


def put(where: int, **values):
    """A change of tensors (0) or metadata (1)."""
    return lambda *both: both[where].update(values)
