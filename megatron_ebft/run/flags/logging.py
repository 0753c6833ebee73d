"""Flags of what a run records."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

LOGGING = Group("logging", (
    Flag("--log-interval", int, "steps between lines on the console and in TensorBoard", default=1, valid=at_least(1)),
    Flag("--tensorboard-dir", str, "folder for TensorBoard logs", metavar="DIR",
         default_text="`tensorboard` in --save or in the working folder"),
    Flag("--ebft-json-lines", bool, "also write all scalars to `metrics.jsonl` in --tensorboard-dir, one line a step",
         default=True),
    Flag("--ebft-histogram-interval", int, "steps between histograms in TensorBoard: advantages, and CFM by block "
         "(0: none)", default=10, valid=at_least(0)),
    Flag("--wandb-project", str, "also log to this project of Weights & Biases. Needs the package wandb. With "
         "WANDB_MODE=offline in the environment, nothing is uploaded until `wandb sync`", metavar="NAME"),
    Flag("--wandb-exp-name", str, "name of the run at Weights & Biases", metavar="NAME",
         default_text="one that Weights & Biases makes up"),
    Flag("--wandb-save-dir", str, "folder for files of Weights & Biases", metavar="DIR",
         default_text="`wandb` in --save or in the working folder"),
))
