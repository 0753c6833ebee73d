"""The transformer on Megatron-Core: decoder, attention, kernels, FP8, log-probabilities, weights."""
