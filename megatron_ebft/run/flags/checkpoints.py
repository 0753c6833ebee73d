"""Flags of saving, resuming and starting points."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

CHECKPOINTS = Group("checkpoints", (
    Flag("--save", str, "folder for checkpoints. A run that has saved there continues from it, bit for bit",
         metavar="DIR"),
    Flag("--save-interval", int, "steps between checkpoints; the last step is always saved", default=100,
         valid=at_least(1)),
    Flag("--async-save", bool, "keep training while a checkpoint is written", default=False),
    Flag("--ebft-keep-checkpoints", int, "keep the N newest checkpoints (0: all). Checkpoints ahead of a run that "
         "resumed from an earlier step are removed, too", default=0, valid=at_least(0)),
    Flag("--save-retain-interval", int, "with --ebft-keep-checkpoints, also keep the checkpoints of every Nth step "
         "(0: none)", default=0, valid=at_least(0)),
    Flag("--ebft-save-hf-interval", int, "also write every checkpoint whose step is a multiple of N as a Hugging Face "
         "model, to hf/iter_0000100 in --save, while training goes on (0: none)", default=0, valid=at_least(0)),
    Flag("--load", str, "checkpoint folder to resume from, until --save has a checkpoint. If it is also --save and "
         "holds no checkpoint, the run starts afresh. If it holds only weights (from tools/convert), the run starts "
         "from them", metavar="DIR"),
    Flag("--pretrained-checkpoint", str, "folder with the weights to start from, of a run or a converted model. The "
         "encoder gets the same weights unless --ebft-encoder-load is given", metavar="DIR"),
    Flag("--ebft-encoder-load", str, "folder with the encoder's weights, if they differ from the start (for a run that "
         "starts from SFT: the base model)", metavar="DIR"),
    Flag("--override-opt-param-scheduler", bool, "on resume, use the learning-rate schedule of the flags. Without "
         "this flag, a schedule that differs from the checkpoint's is refused, except for its end, --train-iters",
         default=False),
    Flag("--use-checkpoint-opt-param-scheduler", bool, "on resume, use the learning-rate schedule of the checkpoint, "
         "up to --train-iters", default=False),
    Flag("--ebft-allow-changed-data", bool, "on resume, accept datasets whose content is not what it was; without this "
         "flag they are refused", default=False),
    Flag("--use-checkpoint-args", bool, "take the architecture from --load or --pretrained-checkpoint, and also the "
         "tokenizer unless --tokenizer-model is given", default=False),
))
