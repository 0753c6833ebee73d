"""The one way out of a process that fails: what it says, once for all ranks, and its exit code.

Imports no torch: wrong flags answer at once.
"""

import hashlib
import json
import os
import sys
import time
import traceback

from megatron_ebft.common.disk import is_passing
from megatron_ebft.common.errors import SaveFailed, StepFailed
from megatron_ebft.run.stopping import EXIT_CRASHED, EXIT_RESUME, EXIT_STEP_FAILED, EXIT_UNREACHABLE, EXIT_USAGE

CODES = {ValueError: EXIT_USAGE, StepFailed: EXIT_STEP_FAILED, SaveFailed: EXIT_CRASHED, KeyboardInterrupt: 130}
"""Exit codes of errors that need no traceback. 130 is a shell's for Ctrl-C."""


def exit_code(is_done: bool) -> int:
    """The exit code of a run that ends as it should: finished, or stopped on request."""
    if not is_done:
        tell_torchrun("stopped on request, after a save; the same command continues the run")
    return 0 if is_done else EXIT_RESUME


def is_under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def fail(error: BaseException) -> None:
    """Say what went wrong and end at once: threads of torch, and Python's own way out, may wait for ranks that are
    gone. Processes that write a checkpoint end with this one."""
    code = EXIT_UNREACHABLE if is_passing(error) else next(
        (code for kind, code in CODES.items() if isinstance(error, kind)), None)
    if code is None:
        traceback.print_exception(error)
    else:
        text = f"{error}" or "interrupted"
        if is_first_to_say(text):
            print(f"error: {text}", file=sys.stderr)
            tell_torchrun(f"error: {text}")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(EXIT_CRASHED if code is None else code)


def is_first_to_say(text: str) -> bool:
    """Under torchrun, which mixes the output of all ranks, whether no other rank has said the same."""
    if not is_under_torchrun():
        return True
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():  # flags: the same on all ranks of this machine
        return os.environ["LOCAL_RANK"] == "0"
    try:
        key = f"ebft/said/{hashlib.sha256(text.encode()).hexdigest()}"
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except (RuntimeError, dist.DistError):  # the store is gone, and with it the rank or machine that kept it
        return True


def tell_torchrun(text: str) -> None:
    """Put a line into torchrun's report on ranks that end with another code than 0. It would advise how to enable
    tracebacks there."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        report = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        try:
            with open(path, "w") as file:
                json.dump({"message": report}, file)
        except OSError:  # it has been printed
            return
