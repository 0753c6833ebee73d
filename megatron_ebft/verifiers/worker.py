"""A child process that judges answers, one after another."""

import dataclasses
import json
import resource
import signal
import socket
import sys

from megatron_ebft.common.signals import end_with_parent
from megatron_ebft.verifiers.verdict import Verdict, failure

MEMORY = 4 << 30
"""Bytes of address space for verifiers of this package: an answer such as 9^9^9 asks for more than there is."""


def main() -> None:
    """Judge the answers that arrive on a socket: its descriptor, and settings in JSON, are on the command line."""
    descriptor, settings = int(sys.argv[2]), json.loads(sys.argv[3])
    end_with_parent(signal.SIGKILL, settings["parent"])
    talk = socket.socket(fileno=descriptor)
    try:
        judge = _judge(**settings["judge"])
    except Exception as error:
        talk.sendall(_line({"error": f"{type(error).__name__}: {error}"}))
        return
    talk.sendall(_line({"error": ""}))
    with talk.makefile("rb") as jobs:
        for job in jobs:
            talk.sendall(_line(dataclasses.asdict(_verdict(judge, *json.loads(job)))))


def _judge(name: str, seconds: float, folders: list[str], is_sandboxed: bool):
    """The function that judges, for the name of a verifier."""
    if ":" in name:
        from megatron_ebft.verifiers import user_function

        return user_function.load(name)
    if name == "code":
        from megatron_ebft.verifiers import code
        from megatron_ebft.verifiers.programs import Unsandboxed
        from megatron_ebft.verifiers.sandbox import Sandbox

        return code.Judge(Sandbox(folders, seconds) if is_sandboxed else Unsandboxed(seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if name == "math":
        from megatron_ebft.verifiers import mathematics

        return mathematics.load()
    if name in ("bleu", "chrf"):
        from megatron_ebft.verifiers import translation

        return translation.load(name)
    from megatron_ebft.verifiers import text

    return {"exact": text.judge_exact, "regex": text.judge_regex}[name]


def _verdict(judge, question: dict, completion: str) -> Verdict:
    try:
        return judge(question, completion)
    except (Exception, SystemExit) as error:
        return failure(f"{type(error).__name__}: {error}")


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"
