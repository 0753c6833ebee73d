"""How a flag is declared: one `Flag` per flag, in a `Group` with its neighbours."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The numbers a flag accepts. Infinity and NaN are in no range."""

    text: str
    """How help and errors name it, such as "at least 1"."""
    includes: Callable[[float], bool]

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.includes(value)


FINITE = Range("a finite number", lambda value: True)


def at_least(low: float, below: float = math.inf) -> Range:
    """low ≤ value < below."""
    return Range(f"at least {low}" + (f" and below {below}" if below < math.inf else ""),
                 lambda value: low <= value < below)


def above(low: float, at_most: float = math.inf) -> Range:
    """low < value ≤ at_most."""
    return Range(f"above {low}" + (f" and at most {at_most}" if at_most < math.inf else ""),
                 lambda value: low < value <= at_most)


def dest(name: str) -> str:
    """The attribute that holds a flag's value: seq_length for --seq-length."""
    return name.removeprefix("--").replace("-", "_")


def spelled(dest: str) -> str:
    """The inverse of `dest`: --seq-length for seq_length."""
    return f"--{dest.replace('_', '-')}"


@dataclass(frozen=True)
class Flag:
    """One flag of a command line. A switch (`type` bool) --x also has --no-x."""

    name: str
    """With the dashes: --seq-length."""
    type: type
    """int, float, str or bool."""
    help: str
    default: object = None
    default_text: str = ""
    """What None stands for, as help says it."""
    choices: tuple[str, ...] = ()
    valid: Range | None = None
    """Range of the number, or of each number of the list."""
    many: bool = False
    """Takes one value or more; the value is a list."""
    metavar: str = ""
    required: bool = False

    @property
    def dest(self) -> str:
        return dest(self.name)

    def out_of_range(self, value) -> float | None:
        """The first number of the value that is not in the range; None if there is none."""
        if self.valid is None or value is None:
            return None
        return next((number for number in (value if self.many else [value]) if number not in self.valid), None)

    def check(self, value) -> None:
        """Raise ValueError, naming the flag and the number, if the value is out of range."""
        number = self.out_of_range(value)
        if number is not None:
            raise ValueError(f"{self.name} {number}: must be {self.valid.text}")


@dataclass(frozen=True)
class Group:
    """Flags that help lists under one title."""

    title: str
    flags: tuple[Flag, ...]

    @property
    def dests(self) -> tuple[str, ...]:
        return tuple(flag.dest for flag in self.flags)
