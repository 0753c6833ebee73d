"""A verifier of the user's: `module:function`, called as function(question, completion)."""

import importlib
from collections.abc import Callable

from megatron_ebft.verifiers.verdict import RIGHT, Verdict, wrong


def load(name: str) -> Callable[[dict, str], Verdict]:
    """The judge that calls the function, which returns whether the answer is right, or a score from 0 to 1.

    Raises:
        AttributeError, ImportError: there is no such function.
        TypeError: it cannot be called.
    """
    module, function = name.split(":")
    call = getattr(importlib.import_module(module), function)
    if not callable(call):
        raise TypeError(f"{function} is no function, but {call!r:.60}")

    def judge(question: dict, completion: str) -> Verdict:
        score = float(call(question, completion))
        if not 0 <= score <= 1:
            raise ValueError(f"{name} returned {score:g}; it must return a bool or a number from 0 to 1")
        return RIGHT if score == 1 else wrong(f"{name} returned {score:g}", score)

    return judge
