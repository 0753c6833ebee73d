"""From a verifier's name to the verifier."""

import importlib.util
import re
from collections.abc import Callable

from megatron_ebft.verifiers import code, mathematics, text, translation
from megatron_ebft.verifiers.pool import CannotStart, Pool
from megatron_ebft.verifiers.sandbox import mend, visible_folders
from megatron_ebft.verifiers.verifier import Verifier

NAMES = ("exact", "regex", "math", "code", "bleu", "chrf")
TIMEOUT = 10.0
"""Seconds of an answer."""
WORKERS = 4
"""Child processes. Every rank has its own."""
PACKAGES = {"math": "math_verify", "bleu": "sacrebleu", "chrf": "sacrebleu"}
"""Modules that verifiers need; PyPI has them under the same names, with dashes."""
TRIAL = ({"tests": "assert sorted(x) == [1, 2]"}, "x = {2, 1}")


def build_verifier(name: str, *, timeout: float = TIMEOUT, workers: int = WORKERS, unsafe_code: bool = False,
                   flag: str = "--ebft-verifier") -> Verifier:
    """Make a verifier, and find out whether it works here.

    Args:
        name: one of NAMES, or `module:function` of the user's.
        timeout: seconds of an answer.
        workers: most child processes at a time.
        unsafe_code: whether `code` may run without a sandbox where the kernel forbids one.
        flag: what names the verifier in errors.

    Raises:
        ValueError: there is no such verifier, its package is missing, or the kernel forbids the sandbox.
    """
    is_users = re.fullmatch(r"[\w.]+:\w+", name) is not None
    if name not in NAMES and not is_users:
        raise ValueError(f"{flag} {name}: there is no such verifier; choose one of {', '.join(NAMES)}, or name a "
                         "function of yours as module:function")
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        package = PACKAGES[name].replace("_", "-")
        raise ValueError(f"{flag} {name}: the package {package} is missing; pip install {package}")
    judge = {"name": name, "seconds": timeout, "folders": visible_folders(), "is_sandboxed": True}
    pool = Pool(judge, workers)
    try:
        pool.start()
        if name == "code":
            _try_sandbox(pool)
    except CannotStart as error:
        if name != "code":
            raise ValueError(f"{flag} {name}: cannot be used ({error}); mend it, or choose another verifier") from error
        if not unsafe_code:
            raise ValueError(f"{flag} code: there is no sandbox for the programs of answers ({error}); {mend()}, or "
                             f"run them without one with {flag.removesuffix('verifier')}unsafe-code") from error
        print(f"warning: {flag} code: there is no sandbox ({error}). The programs of answers can do what you can do: "
              "delete files, read keys, use the network", flush=True)
        pool = Pool(judge | {"is_sandboxed": False}, workers)
        pool.start()
    return Verifier(name, _no_fields if is_users else _CHECKS[name], pool)


def _try_sandbox(pool: Pool) -> None:
    """Raise CannotStart unless a right program is found right."""
    verdict, = pool.run([TRIAL])
    if not verdict.is_right:
        pool.close()
        raise CannotStart(verdict.reason)


def _no_fields(question: dict) -> None:
    """A function of the user's may need any field or none."""


_CHECKS: dict[str, Callable[[dict], None]] = {
    "exact": text.check_exact, "regex": text.check_regex, "math": mathematics.check, "code": code.check,
    "bleu": translation.check, "chrf": translation.check}
