"""Weights & Biases: the scalars and histograms of TensorBoard, by the optional package `wandb`."""

import contextlib
import os
import secrets

from megatron_ebft.common.disk import aside, file_mode, read_bytes
from megatron_ebft.common.signals import shielded
from megatron_ebft.run.sinks.sink import Sink, Values

RUN_ID = "run_id.txt"
"""In the folder: the run at Weights & Biases that a resumed run continues."""


def import_wandb(project: str):
    """The package; ValueError where it is missing or broken."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--wandb-project {project}: needs the package wandb ({error}): pip install wandb") from error
    return wandb


class WeightsAndBiases(Sink):
    """A run at Weights & Biases. With WANDB_MODE=offline it stays in the folder until `wandb sync`.

    A resumed run logs steps again that an interrupted one had logged after the checkpoint. They have the same values.

    Args:
        name: of the run; None: the service makes one up.
        iteration: the step that the run resumes after; 0: it starts, as a new run.
        flags: become the run's configuration.

    Raises:
        ValueError: it cannot start; names the flag.
    """

    def __init__(self, project: str, name: str | None, folder: str, iteration: int, flags: dict):
        wandb = import_wandb(project)
        self.where, self._histogram = f"--wandb-project {project}", wandb.Histogram
        try:
            os.makedirs(folder, exist_ok=True)
            settings = wandb.Settings(console="off")  # standard output stays as it is (common/console.py)
            with shielded():  # its process uploads until this one ends
                self._run = wandb.init(project=project, name=name, dir=folder, id=run_id(folder, iteration),
                                       resume="allow", config=flags, settings=settings)
        except (wandb.Error, OSError) as error:
            raise ValueError(f"{self.where}: Weights & Biases does not start ({error}); run `wandb login`, or set "
                             "WANDB_MODE=offline and upload later with `wandb sync`") from error

    def write(self, values: Values) -> None:
        histograms = {name: self._histogram(tensor.float().cpu().numpy()) for name, tensor in values.histograms.items()}
        logged = {**values.scalars, **histograms}
        if logged:
            with _as_os_errors():
                self._run.log(logged, step=values.iteration)

    def close(self) -> None:
        with _as_os_errors():
            self._run.finish()


def run_id(folder: str, iteration: int) -> str:
    """The run that a resumed run continues; else a new one, which is written down."""
    path = os.path.join(folder, RUN_ID)
    if iteration and file_mode(path) and (known := read_bytes(path).decode().strip()):
        return known
    new = secrets.token_hex(4)
    with aside(path) as unfinished:
        unfinished.write_text(new + "\n")
    return new


@contextlib.contextmanager
def _as_os_errors():
    try:
        yield
    except Exception as error:  # whatever happens in the package or its process, the run goes on
        raise OSError(f"{type(error).__name__}: {error}") from error
