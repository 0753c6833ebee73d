"""How a flag is declared: one `Flag` per flag, in a `Group` with its neighbours."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

LARGEST_INT = 2**31 - 1
"""Sizes and counts are 32-bit integers in Megatron-Core's indices and in kernels."""
SMALLEST_FLOAT32 = 2.0**-126
"""GPUs take smaller numbers for zero."""


@dataclass(frozen=True)
class Range:
    """The numbers a flag accepts: integers of 32 bits, and floats that are in the range in float32, too.

    Infinity and NaN are in no range.
    """

    text: str
    """How help and errors name it, such as "at least 1"."""
    includes: Callable[[float], bool]

    def wanted(self, value: float) -> str:
        """What the value must be; "" if it is that."""
        if isinstance(value, int):
            if abs(value) > LARGEST_INT:
                return f"at most {LARGEST_INT}" if value > 0 else self.text
            return "" if self.includes(value) else self.text
        if not (math.isfinite(value) and self.includes(value)):
            return self.text
        rounded = in_float32(value)
        is_inside = math.isfinite(rounded) and self.includes(rounded)
        return "" if is_inside else f"{self.text} in float32, which makes it {rounded:g}"

    def __contains__(self, value: float) -> bool:
        return not self.wanted(value)


def in_float32(value: float) -> float:
    """A finite number as kernels in float32 get it."""
    try:
        rounded, = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= SMALLEST_FLOAT32 else 0.0


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

    def out_of_range(self, value) -> tuple[float, str] | None:
        """The first number of the value that is not in the range, and what it must be; None if there is none."""
        if self.valid is None or value is None:
            return None
        numbers = value if self.many else [value]
        return next(((number, self.valid.wanted(number)) for number in numbers if number not in self.valid), None)

    def check(self, value) -> None:
        """Raise ValueError, naming the flag and the number, if the value is out of range."""
        wrong = self.out_of_range(value)
        if wrong is not None:
            raise ValueError(f"{self.name} {wrong[0]}: must be {wrong[1]}")


@dataclass(frozen=True)
class Group:
    """Flags that help lists under one title."""

    title: str
    flags: tuple[Flag, ...]

    @property
    def dests(self) -> tuple[str, ...]:
        return tuple(flag.dest for flag in self.flags)
