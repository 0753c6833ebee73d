"""Sampling of block-parallel rollouts from the policy."""
