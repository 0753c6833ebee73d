"""TensorBoard: all values of a run, the page that they are arranged on, and the flags for comparing runs."""

import contextlib

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_ebft.run.sinks.sink import Sink, Values


class TensorBoard(Sink):
    """TensorBoard's event files.

    Args:
        iteration: the step that the run resumes after; 0: it starts. Values that an interrupted run wrote after it are
            dropped.
        page: charts by title, each with patterns of tags, by the title of their section (page.py).
        flags: what the HParams tab compares runs by.
        results: tags that it compares.
    """

    def __init__(self, folder: str, iteration: int, page: dict[str, dict[str, list[str]]], flags: dict,
                 results: list[str]):
        self.folder, self.page, self.flags, self.results = folder, page, flags, results
        self.where = f"--tensorboard-dir {folder}"
        self._writer, self._purge_step = None, iteration + 1 if iteration else 0

    def write(self, values: Values) -> None:
        with self._opened() as writer:
            for name, value in values.scalars.items():
                writer.add_scalar(name, value, values.iteration)
            for name, text in values.texts.items():
                writer.add_text(name, text, values.iteration)
            for name, tensor in values.histograms.items():
                writer.add_histogram(name, tensor.float().cpu().numpy(), values.iteration)
            for name, image in values.images.items():
                writer.add_image(name, image.numpy(), values.iteration, dataformats="HWC")

    def flush(self) -> None:
        with self._opened() as writer:
            writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextlib.contextmanager
    def _opened(self):
        """The writer. After an error a new file is begun."""
        try:
            if self._writer is None:
                self._writer = SummaryWriter(self.folder, purge_step=self._purge_step)
                self._purge_step = None  # of the first file alone
                self._writer.add_custom_scalars({section: {title: ["Multiline", tags] for title, tags in charts.items()}
                                                 for section, charts in self.page.items()})
                # As SummaryWriter.add_hparams, which would write them into a folder, and so a run, of their own.
                for summary in hparams(self.flags, dict.fromkeys(self.results, 0)):
                    self._writer.file_writer.add_summary(summary)
            yield self._writer
        except OSError:
            self._writer = None
            raise
