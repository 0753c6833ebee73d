"""A standard output that cannot end a run: what it does not take is lost, with a warning on the other one."""

import io
import os
import sys


def keep_going() -> None:
    """From now on, writing to a full disk or to a pipe that nobody reads any more raises nothing in this process."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}  # None where the process began without it
    for name, other in (("stdout", 2), ("stderr", 1)):
        if (stream := streams[name]) is not None:
            stream.flush()
            raw = _Lossy(name, stream.fileno(), other if all(streams.values()) else None)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                                                line_buffering=True))


class _Lossy(io.FileIO):
    """A file that takes whatever is written.

    Args:
        other: file descriptor for warnings.
    """

    def __init__(self, name: str, descriptor: int, other: int | None):
        super().__init__(descriptor, "w", closefd=False)
        self.label, self.other, self.is_losing = name, other, False

    def write(self, data) -> int:
        try:
            written = super().write(data)
            self.is_losing = False
        except OSError as error:
            self._warn(error.strerror)
            return len(data)
        return len(data) if written is None else written  # None: the reader of a non-blocking pipe is too slow

    def _warn(self, why: str) -> None:
        if not self.is_losing and self.other is not None:
            try:
                os.write(self.other, f"warning: {self.label} cannot be written ({why}); lines are lost. The run goes "
                                     "on\n".encode())
            except OSError:
                self.other = None  # neither can
        self.is_losing = True
