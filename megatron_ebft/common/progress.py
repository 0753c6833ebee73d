"""Progress lines of long operations, with the time left."""

import time


def clock(seconds: float) -> str:
    """1h02m, 3m20s or 12.3s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s" if seconds >= 60 else f"{seconds:.1f}s"


def gigabytes(size: float) -> str:
    """A number of bytes in GB (10⁹)."""
    return f"{size / 1e9:.3g} GB"


class Progress:
    """Prints every 10 seconds how much of an operation is done and how long the rest will take.

    Args:
        what: the operation, as a past participle ("checked").
        total: amount of work, in the unit of `add`.
        say: receives each line.
        form: turns an amount into words.
    """

    def __init__(self, what: str, total: float, say, form=str):
        self.what, self.total, self.say, self.form, self.done = what, total, say, form, 0
        self.start = self.last = time.perf_counter()

    def tick(self, *unused) -> None:
        """Count one unit of work. The signature fits a forward hook."""
        self.add(1)

    def add(self, amount: float) -> None:
        """Count an amount of work."""
        self.done += amount
        now = time.perf_counter()
        if now - self.last > 10 and self.done < self.total:
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            self.say(f"{self.what} {self.form(self.done)} of {self.form(self.total)} | left {clock(left)}")

    def close(self) -> None:
        """Print the total and the time it took."""
        self.say(f"{self.what} {self.form(self.total)} in {clock(time.perf_counter() - self.start)}")
