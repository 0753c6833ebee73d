"""Layers of Transformer Engine against Megatron-Core's: for a process in which fake_te.py is installed."""

import dataclasses
import json

import fake_te
import models
import plain_llama
import torch
from checkpoint_runs import ARGS, META, SmallRun, seed_all
from golden import GOLDEN, Case
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint
from megatron_ebft.checkpointing.sharded_weights import sharded_tensors, sharded_weights
from megatron_ebft.common.device import init_device
from megatron_ebft.method import gradient
from megatron_ebft.method.means import Means
from megatron_ebft.method.sft import cross_entropy_pass
from megatron_ebft.model import kernels
from megatron_ebft.model.build import build_start
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.model.weights import copy_weights, local_layers, unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.rollout.sampler import sample_rollouts

KINDS = ("local", "transformer_engine")
CHANGES = {"llama": {}, "other": dict(
    qk_layernorm=True, add_bias_linear=True, add_qkv_bias=True, swiglu=False, normalization="LayerNorm",
    position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False)}


def compare(folder: str) -> None:
    """Write what both kinds of layers compute, and what checkpoints of one are to the other, to folder/results.json."""
    init_device()
    groups.init_parallel(1, 1, seed=1)
    kernels.available = lambda: kernels.Available(no_transformer_engine="")
    kernels.no_transformer_engine = lambda dtype: ""  # the stand-in computes in float32
    results = {name: compare_architecture(f"{folder}/{name}", changes) for name, changes in CHANGES.items()}
    case = Case("step", 2, 3, transformer_impl="transformer_engine")
    case.gradient()
    case.check_gradient(1e-5)
    results["fp8"] = rollouts_in_fp8() | training_in_fp8()
    with open(f"{folder}/results.json", "w") as file:
        json.dump(results, file)


def compare_architecture(folder: str, changes: dict) -> dict:
    """Sharded tensors and hashes of policies of both kinds; how far they are apart after two steps."""
    args = dataclasses.replace(ARGS, **changes)
    local, te = (SmallRun(args=args, transformer_impl=kind) for kind in KINDS)
    layer = unwrap(te.model[0]).decoder.layers[0]
    assert isinstance(layer.self_attention.linear_qkv, TELayerNormColumnParallelLinear)
    assert all(x.fuse_wgrad_accumulation for x in te.model[0].modules() if hasattr(x, "fuse_wgrad_accumulation"))
    shapes = {kind: {x.key: list(x.global_shape) for x in sharded_tensors(sharded_weights(run.model))}
              for kind, run in zip(KINDS, (local, te))}
    local.train(2).save(folder, 2)
    load_checkpoint(folder, *te.parts, architecture=META["architecture"])
    frozen = build_start(args, transformer_impl="transformer_engine")
    copy_weights(te.model, frozen)
    fingerprints = [weights_fingerprint(x) for x in (local.model, te.model, frozen)]
    for module in te.model[0].modules():  # which the stand-in cannot do
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False
    for run in (local, te):
        seed_all(2)
        run.train(2)
    a, b, start = (models.whole_tensors(x, of_gradients=False) for x in (local.model, te.model, [frozen]))
    return {"shapes": shapes, "fingerprints": fingerprints,
            "difference": max(models.largest_difference(a[key], b[key]) for key in a),
            "moved": min(models.largest_difference(a[key], start[key]) for key in a)}


def rollouts_in_fp8() -> dict:
    """Log-probabilities by Transformer Engine's autocast and by emulation, before and after an optimizer step whose
    training pass, in FP8 as well, remembers the weights before it; and whether a rollout leaves weights behind."""
    def draw(case, fp8):
        sampling = dataclasses.replace(case.config.sampling, fp8=fp8)
        return sample_rollouts(case.policy, case.gold, case.config.layout, sampling, 0).log_probs_BKNG

    te, local = (Case("step", 1, 3, transformer_impl=kind) for kind in ("transformer_engine", "local"))
    te.policy = models.build_policy(*plain_llama.load_llama(GOLDEN / "llama"), transformer_impl="transformer_engine",
                                    fp8="e4m3", fp8_recipe="blockwise")
    differences = []
    for step in range(2):
        for recipe in ("blockwise", "tensorwise"):
            emulated = draw(local, FP8(recipe, emulate=True, at_end=1))
            differences.append(float((draw(te, FP8(recipe, at_end=1)) - emulated).abs().max()))
        if step == 0:
            left = any(getattr(module, "_fp8_workspaces", None) for module in te.policy[0].modules())
        te.gradient()
        for case in (te, local):
            scale_weights(case.policy)
    return {"difference": max(differences), "moved": float((emulated - draw(local, FP8())).abs().max()), "left": left}


def training_in_fp8() -> dict:
    """Of two steps: recipes outside the training pass; layer, recipe and quantising in it; error of the gradient."""
    passes = fake_te.Linear.passes
    te = dict(transformer_impl="transformer_engine")
    case = Case("step", 1, 3, **te)
    case.policy = models.build_policy(*plain_llama.load_llama(GOLDEN / "llama"), **te, fp8="e4m3",
                                      fp8_recipe="blockwise", first_last_layers_bf16=True,
                                      num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=0)
    numbers = {part: number for number, layer in local_layers(case.policy[0]).items() for part in layer.modules()}
    training = []
    passes.clear()
    for step in range(2):
        rewards = case.rewards()
        sample_rollouts(case.policy, case.gold, case.config.layout, case.config.sampling, 0)
        cross_entropy_pass(case.policy, case.gold, 1, Means(), forward_only=True)
        gradient.score(case.policy, case.gold, case.rollouts, case.config)
        others, _ = {recipe for _, recipe, _ in passes}, passes.clear()
        case.policy[0].zero_grad_buffer()
        gradient.policy_gradient(case.policy, case.gold, case.rollouts, rewards.advantage, case.config, Means())
        training.append([(numbers[layer], recipe, is_new) for layer, recipe, is_new in passes])
        passes.clear()
        if step == 0:
            error = max(models.relative_error(grad, case.golden["grad." + name])
                        for name, grad in models.gradients(case.policy, case.model).items())
        scale_weights(case.policy)
    return {"others": sorted(others), "training": training, "error": error}


def scale_weights(policy: list) -> None:
    """As an optimizer step: in place."""
    with torch.no_grad():
        for p in policy[0].parameters():
            p.mul_(1.25)
