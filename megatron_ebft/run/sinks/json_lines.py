"""All scalars of a run in a file that scripts read: one line a step.

    {"iteration": 12, "time": 1764229000.125, "train/loss": 0.7431, "seconds/step": 0.84}

1. Values of a step that come later (an evaluation, say) are added to the end of its line.
2. A line is on disk, and complete, as soon as its values are recorded.
3. A run that resumes drops the lines after its checkpoint: their steps come again. A run that starts afresh keeps the
   file that it finds as `metrics.jsonl.before1`, or with the next number that is free.
"""

import itertools
import json
import math
import os
import re
import time

from megatron_ebft.run.sinks.sink import Sink, Values

NAME = "metrics.jsonl"
LINE = re.compile(rb'\{"iteration": (\d+), .*\}\n')


class JsonLines(Sink):
    """`metrics.jsonl` in the folder of TensorBoard.

    Args:
        iteration: the step that the run resumes after; 0: it starts.
    """

    def __init__(self, folder: str, iteration: int):
        self.path = os.path.join(folder, NAME)
        self.where = f"--tensorboard-dir {self.path}"
        self._resumed: int | None = iteration
        """Where lines of an interrupted run end; None: they have been dropped."""
        self._file: int | None = None
        self._end = 0
        self._last: int | None = None
        """The step of the last line."""

    def write(self, values: Values) -> None:
        if not values.scalars:
            return
        try:
            self._open()
            scalars = {name: float(value) for name, value in values.scalars.items()}
            scalars = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            if values.iteration == self._last:
                self._put(", " + json.dumps(scalars)[1:], at=self._end - len("}\n"))
            else:
                head = {"iteration": values.iteration, "time": round(time.time(), 3)}
                self._put(json.dumps(head | scalars), at=self._end)
                self._last = values.iteration
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _open(self) -> None:
        if self._file is not None:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if self._resumed == 0 and os.path.exists(self.path):
            number = next(number for number in itertools.count(1) if not os.path.exists(f"{self.path}.before{number}"))
            os.replace(self.path, f"{self.path}.before{number}")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._end, self._last = 0, None
        with open(self.path, "rb") as lines:
            for line in lines:
                match = LINE.fullmatch(line)
                if match is None or self._resumed is not None and int(match[1]) > self._resumed:
                    break
                self._end, self._last = self._end + len(line), int(match[1])
        os.ftruncate(self._file, self._end)
        self._resumed = None

    def _put(self, text: str, at: int) -> None:
        """Write to the end of the file, from a place on that may lie before it."""
        left, there = (text + "\n").encode(), at
        try:
            while left:
                written = os.pwrite(self._file, left, there)
                left, there = left[written:], there + written
        except OSError:
            os.ftruncate(self._file, self._end)
            os.pwrite(self._file, b"}\n"[:self._end - at], at)  # what the line had there
            raise
        self._end = there
