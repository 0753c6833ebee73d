"""The configuration of the method: everything an EBFT step, or an RLVR step, computes is decided by these fields."""

from dataclasses import dataclass

from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method.features import FeatureMap
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.parallel.groups import sample_size
from megatron_ebft.rollout.generation import GenerationConfig
from megatron_ebft.rollout.sampler import SamplingConfig


@dataclass(kw_only=True)
class EBFTConfig:
    """The method, and how to compute it: savings, sizes that bound its memory."""

    layout: StridedLayout
    """Blocks, anchors and rollouts of a row."""
    sampling: SamplingConfig
    feature_map: FeatureMap
    """φ."""
    whitening: str
    """`none`, `paper` or `released` (energy.whiten)."""
    advantage: str
    """`rloo`, `reinforce` or `group_norm` (energy.advantages)."""
    alignment_coef: float
    """Weight of the alignment in the reward."""
    diversity_coef: float
    """α, weight of the diversity term in the reward."""
    rl_coef: float
    """Weight of the REINFORCE loss."""
    ce_coef: float
    """γ, weight of the cross entropy."""
    kl_coef: float
    """β, weight of KL(policy ‖ start)."""
    kl_estimator: str
    """`k1`, `k2` or `k3` (losses.kl_estimate)."""
    importance_cap: float
    """C, cap of the importance weights; 0: no weights."""
    encoder_fp8: FP8
    """FP8 of the encoder in training."""
    skip_duplicates: bool
    """Leave out rollouts that cannot change the loss or its gradient (batches.py)."""
    micro_batch_size: int
    """Rows of a micro-batch on one rank."""
    blocks_per_microbatch: int
    """Blocks of a row in one micro-batch; 0: all."""
    rollout_rows: int
    """Rows that decode together; 0: all, or as many as keep the pipeline busy."""
    fused: bool = False
    """Whether the forward pass that samples the rollouts is the one that is differentiated (fused.py)."""

    @property
    def num_samples(self) -> int:
        """n, rollouts of a block over all ranks; `layout` has this rank's n/S."""
        return self.layout.num_samples * sample_size()


@dataclass(kw_only=True)
class RLVRConfig:
    """RLVR, and how to compute it."""

    generation: GenerationConfig
    """How completions are drawn: n of each question, τ, the longest."""
    advantage: str
    """`rloo`, `reinforce` or `group_norm` (energy.advantages)."""
    rl_coef: float
    """Weight of the REINFORCE loss."""
    kl_coef: float
    """β, weight of KL(policy ‖ start)."""
    kl_estimator: str
    """`k1`, `k2` or `k3` (losses.kl_estimate)."""
    importance_cap: float
    """C, cap of the importance weights; 0: no weights."""
    row_length: int
    """T, tokens of a row in which the training pass packs prompts with their completions."""
    micro_batch_size: int
    """Rows of a micro-batch on one rank."""
    rows_multiple: int = 1
    """The training pass has a multiple of so many micro-batches (virtual stages need one of the pipeline's)."""
