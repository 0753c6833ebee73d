"""Flags of verifiers."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least
from megatron_ebft.verifiers.build import NAMES, TIMEOUT, WORKERS

VERIFIERS = Group("verifiers", (
    Flag("--ebft-verifier", str, f"what judges the answers to questions: {', '.join(NAMES)}, or a function of yours as "
         "module:function", metavar="NAME", default_text="none"),
    Flag("--ebft-verifier-timeout", float, "seconds for judging an answer; a longer one counts as wrong",
         default=TIMEOUT, valid=above(0)),
    Flag("--ebft-verifier-workers", int, "processes of each rank that judge answers", default=WORKERS,
         valid=at_least(1)),
    Flag("--ebft-unsafe-code", bool, "where the kernel forbids the sandbox, let --ebft-verifier code run the programs "
         "of answers without one: they can do what you can do", default=False),
))
