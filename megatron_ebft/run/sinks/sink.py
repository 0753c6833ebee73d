"""What a run records, and where it goes: TensorBoard, JSON Lines and Weights & Biases are sinks."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Values:
    """Values of one step, by name. A sink takes the kinds that it can show."""

    iteration: int
    """The step, counted from 1; 0: before the first."""
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Markdown."""
    histograms: dict[str, Tensor] = field(default_factory=dict)
    """1-D, of any length."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """uint8 [height, width, 3]."""


class Sink:
    """A place for values, on rank 0. Where a call raises OSError its values are lost, and a later one tries again."""

    where: str
    """Flag and place, for warnings."""

    def write(self, values: Values) -> None:
        """Take some values of a step. A step may come in several portions; steps come in order."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make sure that no value is lost if the process is killed."""

    def close(self) -> None:
        """The run has ended."""
