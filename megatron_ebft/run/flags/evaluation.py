"""Flags of evaluation and logging."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

EVALUATION = Group("evaluation and logging", (
    Flag("--eval-interval", int, "steps between evaluations (0: no evaluation); one runs before the first step",
         default=100, valid=at_least(0)),
    Flag("--eval-iters", int, "global batches of an evaluation, always the same rows", default=4, valid=at_least(1)),
    Flag("--log-interval", int, "steps between lines on the console and in TensorBoard", default=1,
         valid=at_least(1)),
    Flag("--tensorboard-dir", str, "folder for TensorBoard logs", metavar="DIR",
         default_text="`tensorboard` in --save or in the working folder"),
    Flag("--ebft-eval-length", int, "evaluate CFM for completions of 1, 2, 4, … tokens, up to this many", default=64,
         valid=at_least(1)),
    Flag("--ebft-track-kl", bool, "measure KL to the start at evaluation. Keeps a frozen copy of the start in memory, "
         "as --ebft-kl-coef does", default=True),
))
