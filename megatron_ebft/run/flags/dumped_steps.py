"""Flags that write steps to files, or train on steps from files."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

DUMPED_STEPS = Group("dumped steps", (
    Flag("--ebft-dump-steps", str, "write each step to DIR/step_0000012.safetensors: rows, rollouts, rewards, "
         "log-probabilities and losses. tools/replay.py adds features and gradients. A failed step is always written, "
         "to `failed_steps` in --save if this flag is not given", metavar="DIR"),
    Flag("--ebft-dump-interval", int, "steps between dumps", default=1, valid=at_least(1)),
    Flag("--ebft-replay-steps", str, "take rows and rollouts from the steps dumped in DIR instead of reading data and "
         "sampling. Evaluation still reads the data", metavar="DIR"),
))
