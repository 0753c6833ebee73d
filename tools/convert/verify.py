"""Compares the logits of a converted model with those of transformers, with one module's weights in memory at a time.

1. Both models are skeletons without weights. A module's weights are read when it is called and dropped afterwards. So a
   model of any size is verified in the memory of its largest tensor (in float32) and some activations.
2. Both compute in float32 from the weights that the checkpoint stores. If --dtype rounded them, transformers gets the
   rounded weights, too: the comparison covers the conversion, not the rounding.
3. The prompts are fixed: random ids, one row at positions 0, 1, 2, …, and one row spread over all positions that the
   model supports, which shows rotary scaling.
4. On failure, the error names the first layer whose output differs.
"""

import functools
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_ebft.common.device import device
from megatron_ebft.common.progress import Progress, clock
from megatron_ebft.run.flags.flag import Flag, Group, above

PROMPT_LENGTH, SEED = 32, 0
VERIFICATION = Group("verification", (
    Flag("--verify", bool, "compare the logits of both models on fixed prompts, in float32. If they differ, nothing is "
         "written. Needs the package transformers", default=False),
    Flag("--verify-tolerance", float, "largest difference of a logit that passes, relative to the largest logit if "
         "that is above 1", default=1e-4, valid=above(0))))


def check_flags(args) -> None:
    """ValueError, before anything is converted, if --verify cannot work here."""
    if args.verify:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ValueError("--verify needs the package transformers: pip install transformers") from error


def verifier(args, say):
    """The function that convert.py calls with both models, or None without --verify."""
    return functools.partial(verify, tolerance=args.verify_tolerance, say=say) if args.verify else None


def verify(hf_folder: str, weights, reader, tolerance: float, say=print) -> None:
    """Compare the logits and print how much they differ.

    Args:
        hf_folder: with the configuration of the Hugging Face model.
        weights: HFWeights of that model. reader: CheckpointReader of the other.

    Raises:
        ValueError: the largest difference is above `tolerance` × max(1, the largest logit), or is not finite.
    """
    vocab_size = reader.architecture.vocab_size
    tokens = torch.randint(0, vocab_size, (2, PROMPT_LENGTH), generator=torch.Generator().manual_seed(SEED))
    last = reader.architecture.max_position_embeddings - 1
    positions = torch.stack([torch.arange(PROMPT_LENGTH).clamp(max=last),
                             torch.linspace(0, last, PROMPT_LENGTH).long()])
    tokens, positions = tokens.to(device()), positions.to(device())
    progress = Progress("verified", 2 * reader.architecture.num_layers, say)
    with torch.no_grad():
        expected, expected_layers = _transformers(hf_folder, weights, reader, tokens, positions, progress)
        logits, layer_outputs = _megatron(reader, tokens, positions, progress)
    difference = (logits - expected).abs()
    largest, mean, scale = difference.max().item(), difference.mean().item(), expected.abs().max().item()
    bound = tolerance * max(1.0, scale)
    say(f"verified {tokens.numel()} tokens in {clock(time.perf_counter() - progress.start)}: logits differ by at most "
        f"{largest:.2e}, on average {mean:.2e} (largest logit {scale:.3g}, bound {bound:.1e})")
    if not largest <= bound:
        layers = [(a - b).abs().max().item() / b.abs().max().item() for a, b in zip(layer_outputs, expected_layers)]
        first = next((i for i, x in enumerate(layers, 1) if not x <= tolerance), None)
        where = "the output head" if first is None else f"decoder layer {first} of {len(layers)}"
        raise ValueError(f"--verify: logits differ by {largest:.2e}, more than {bound:.1e}, and the first to differ is "
                         f"{where}: a mistake in this program, or weights that are not what {hf_folder} says")


def stream(model: nn.Module, read, kept: tuple[str, ...] = ()) -> None:
    """Fill each module's own parameters when it is called, `read(name)` giving them, and empty it afterwards.

    Args:
        kept: names of modules that stay filled, as others use their parameters.
    """
    for path, module in model.named_modules():
        names = list(module._parameters)
        if not any(module._parameters[name] is not None for name in names):
            continue

        def fill(module, *_, path=path, names=names):
            for name in names:
                if module._parameters[name] is not None and module._parameters[name].is_meta:
                    tensor = read(f"{path}.{name}").to(device(), torch.float32)
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

        def empty(module, *_, names=names):
            for name in names:
                if module._parameters[name] is not None:
                    module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)

        module.register_forward_pre_hook(fill)
        if path not in kept:
            module.register_forward_hook(empty)


def _watch(layers, progress: Progress) -> list[Tensor]:
    """A list that collects the outputs of decoder layers."""
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        layer.register_forward_hook(progress.tick)
    return seen


def _transformers(folder: str, weights, reader, tokens: Tensor, positions: Tensor,
                  progress: Progress) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and the layers' outputs [B, S, H]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ebft.hf.config import parse_config, read_config

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device())  # its buffers are no weights
    entries = parse_config(read_config(folder, "--hf-model"), folder).entries
    stored = {name: reader.dtypes[key] for key, entry in entries.items() for name in entry.names}

    def read(name: str) -> Tensor:
        name = name if name in stored else "model.embed_tokens.weight"  # lm_head.weight, where it is tied
        return weights.read(name).to(stored[name])

    stream(model, read)
    layers = _watch(model.model.layers, progress)
    # With a mask, as jumps of positions would be taken for the starts of packed documents.
    logits = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits.float(), layers


def _megatron(reader, tokens: Tensor, positions: Tensor, progress: Progress) -> tuple[Tensor, list[Tensor]]:
    """The same, of the checkpoint."""
    from megatron.core import parallel_state

    from megatron_ebft.checkpointing.sharded_weights import SHARDING
    from megatron_ebft.hf.families import EMBEDDING, VOCABULARY
    from megatron_ebft.model.attention import CausalPattern, as_mask
    from megatron_ebft.model.build import build_skeleton
    from megatron_ebft.parallel.groups import init_parallel, shut_down

    is_alone = not parallel_state.is_initialized()
    if is_alone:
        init_parallel(1, 1, seed=1)
    args = replace(reader.architecture, padded_vocab_size=reader.architecture.vocab_size)
    model = build_skeleton(args)
    keys = {name: tensor.key for name, tensor in model.sharded_state_dict(metadata=dict(SHARDING)).items()}

    def read(name: str) -> Tensor:
        tensor = reader.read(keys[name])
        return tensor[:args.vocab_size] if keys[name] in VOCABULARY else tensor

    stream(model, read, kept=() if args.untie_embeddings_and_output_weights else (EMBEDDING.removesuffix(".weight"),))
    layers = _watch(model.decoder.layers, progress)
    logits = model(tokens, positions, as_mask(CausalPattern(None)), readout=lambda hidden, model: model.head(hidden))
    if is_alone:
        shut_down()
    return logits.transpose(0, 1), [layer.transpose(0, 1) for layer in layers]
