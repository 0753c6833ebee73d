"""The verifier `code` for tests, which are skipped where the kernel forbids its sandbox."""

import contextlib

import pytest

from megatron_ebft.verifiers.build import build_verifier


@contextlib.contextmanager
def code_verifier(timeout: float):
    """The verifier, until the context ends."""
    try:
        verifier = build_verifier("code", timeout=timeout, workers=2)
    except ValueError as error:
        pytest.skip(str(error))
    yield verifier
    verifier.close()
