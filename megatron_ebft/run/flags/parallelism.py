"""Flags that split the work over ranks."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

PARALLELISM = Group("parallelism", (
    Flag("--tensor-model-parallel-size", int, "number of ranks that share each layer", default=1, valid=at_least(1)),
    Flag("--sequence-parallel", bool, "tensor ranks also split the tokens between layers: less memory for the same "
         "communication. Without effect at --tensor-model-parallel-size 1", default=False),
    Flag("--pipeline-model-parallel-size", int, "number of pipeline stages", default=1, valid=at_least(1)),
    Flag("--num-virtual-stages-per-pipeline-rank", int, "how often a micro-batch passes through each pipeline rank in "
         "training (interleaved schedule); more than 1 shortens the pipeline bubble", default=1, valid=at_least(1)),
    Flag("--decoder-first-pipeline-num-layers", int, "number of layers on the first stage", valid=at_least(1),
         default_text="an equal share"),
    Flag("--decoder-last-pipeline-num-layers", int, "number of layers on the last stage", valid=at_least(1),
         default_text="an equal share"),
    Flag("--ebft-sample-parallel-size", int, "number of data-parallel ranks that take the same rows and split their "
         "rollouts, for when one rank cannot hold all samples", default=1, valid=at_least(1)),
    Flag("--overlap-grad-reduce", bool, "reduce gradients during the backward pass", default=False),
    Flag("--distributed-timeout-minutes", int, "end the run, naming the rank, when a rank makes no progress in a step "
         "for this long. Starting and saving may take six times as long", default=10, valid=at_least(1)),
))
