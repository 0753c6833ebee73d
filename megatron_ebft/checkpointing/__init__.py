"""Checkpoints on disk. A save appears whole or not at all, and every file is checked before it is loaded."""
