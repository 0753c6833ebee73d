"""Flags of Megatron that are refused by name, each with the reason or what to use instead."""

NO_EXPERTS = "mixture-of-experts models are not supported"
NO_FSDP = "use the distributed optimizer with tensor and pipeline parallelism"
REFUSED = {
    "--context-parallel-size": "the strided attention needs whole rows; split long rows by --sequence-parallel, "
                               "--ebft-blocks-per-microbatch or --ebft-sample-parallel-size",
    "--expert-model-parallel-size": NO_EXPERTS,
    "--expert-tensor-parallel-size": NO_EXPERTS,
    "--num-experts": NO_EXPERTS,
    "--multi-latent-attention": "the strided attention has no latent form",
    "--mtp-num-layers": "multi-token prediction is not part of the method",
    "--use-megatron-fsdp": NO_FSDP,
    "--use-torch-fsdp2": NO_FSDP,
    "--pipeline-model-parallel-layout": "use --decoder-first-pipeline-num-layers and "
                                        "--decoder-last-pipeline-num-layers",
    "--num-layers-per-virtual-pipeline-stage": "use --num-virtual-stages-per-pipeline-rank",
    "--fp16": "use --bf16",
    "--fp8-param-gather": "weights stay in bf16, which rollouts and checkpoints read",
}
"""Parallel sizes of 1 pass, so that a Megatron command line works unchanged."""
