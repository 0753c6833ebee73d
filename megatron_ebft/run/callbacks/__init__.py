"""Extras of a run, each a small file that the loop does not know."""
