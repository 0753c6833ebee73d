"""Verifiers: whether an answer to a question is right. They judge in child processes. Imports common alone."""
