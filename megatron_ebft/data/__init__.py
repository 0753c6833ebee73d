"""Tokenizers, rows of gold tokens, and how rows are cut into micro-batches."""
