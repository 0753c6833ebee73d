"""A 64-bit mixing function on int64 tensors, for the sampler's random numbers and the fingerprint of weights."""

from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
"""2⁶⁴ / golden ratio: an odd constant that spreads consecutive numbers."""
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of int64 in which every bit affects all others. Products wrap around.

    torch's >> is arithmetic, so copies of the sign bit are masked off.
    """
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _MIX1
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _MIX2
    return x ^ ((x >> 31) & (1 << 33) - 1)
