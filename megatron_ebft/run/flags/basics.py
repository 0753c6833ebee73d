"""Flags of the run as a whole: what is trained, how long, and when it stops."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

RUN = Group("run", (
    Flag("--training-mode", str, "ebft: energy-based fine-tuning. sft: next-token training on the same rows, which can "
         "also train a model from scratch. rlvr: policy gradient with a verifier's reward on completions of questions "
         "(--ebft-questions)", default="ebft", choices=("ebft", "sft", "rlvr")),
    Flag("--train-iters", int, "total optimizer steps, including those before a resume", valid=at_least(1),
         required=True),
    Flag("--micro-batch-size", int, "rows of a micro-batch on one rank; a smaller value saves memory", default=1,
         valid=at_least(1)),
    Flag("--global-batch-size", int, "rows of a step over all ranks; in rlvr, questions", default=16,
         valid=at_least(1)),
    Flag("--seed", int, "seed of the initial weights, the data order, rollouts and completions", default=1234,
         valid=at_least(0)),
    Flag("--exit-duration-in-mins", float, "save and stop (exit code 75) before the process has run this many minutes. "
         "SIGUSR1, SIGTERM, SIGHUP and Ctrl-C stop a run in the same way", valid=above(0), default_text="no limit"),
    Flag("--ebft-stop-file", str, "save and stop (exit code 75) when this file exists", metavar="FILE"),
))
