"""Sizes that FP8 matrix products need. Apart from fp8.py, so that flags are checked before torch is imported."""

BLOCK = 128
"""Values that share a scale in blockwise quantisation: 1 × BLOCK of activations, BLOCK × BLOCK of weights."""
ROWS = 16
"""The number of tokens on a rank is a multiple of this: FP8 matrix products need 8, Megatron-Core pads to 16. With the
blockwise recipe it is a multiple of BLOCK in training, which quantises activations along tokens as well, and where
kernels.gathers_whole_blocks."""
