"""Our Decoder against GPTModel, as long as Megatron-Core has it: same names in checkpoints, same logits."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_ebft.checkpointing.sharded_weights import SHARDING
from megatron_ebft.common.device import device
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.build import build_encoder, build_start, transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")

LLAMA = ModelArgs(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                  kv_channels=8, vocab_size=64, padded_vocab_size=64, max_position_embeddings=32, init_method_std=0.1)
ARCHITECTURES = {
    "llama": LLAMA,
    "llama 3.1": replace(LLAMA, use_rope_scaling=True, rope_scaling_factor=8.0, rotary_base=500000.0,
                         rope_high_freq_factor=4.0),
    "tied": replace(LLAMA, untie_embeddings_and_output_weights=False, add_qkv_bias=True, qk_layernorm=True),
    "gpt": replace(LLAMA, position_embedding_type="learned_absolute", normalization="LayerNorm", swiglu=False,
                   add_bias_linear=True, add_qkv_bias=True, untie_embeddings_and_output_weights=False),
}
METADATA = {"a key for all layers": {}, "a key for each layer": SHARDING}
"""What Megatron passes to sharded_state_dict by default, and what we pass."""


def gpt_model(args: ModelArgs):
    """Megatron-Core's own model, on its own layers, with random weights."""
    model = pytest.importorskip("megatron.core.models.gpt.gpt_model", reason="this Megatron-Core has no GPTModel")
    specs = pytest.importorskip("megatron.core.models.gpt.gpt_layer_specs")
    config = transformer_config(args, transformer_impl="local", attention_kernel="sdpa", apply_rope_fusion=False)
    spec = specs.get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    return model.GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings, rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor).to(device()).eval()


def randomise(model) -> None:
    """Norms and biases as well, which begin as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("args", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_checkpoint_of_gpt_model_loads(tmp_path, args, metadata):
    gpt, decoder = gpt_model(args), build_start(args, transformer_impl="local", attention_kernel="sdpa")
    randomise(gpt)
    dist_checkpointing.save(gpt.sharded_state_dict(metadata=dict(metadata)), str(tmp_path))
    state = dist_checkpointing.load(decoder.sharded_state_dict(metadata=dict(metadata)), str(tmp_path))
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)

    tokens_BT = torch.randint(0, args.vocab_size, (2, 16), device=device())
    positions_BT = torch.arange(16, device=device()).expand(2, -1)
    with torch.no_grad():
        expected_BTV = gpt(tokens_BT, positions_BT, None)
        logits_TBV = decoder(tokens_BT, positions_BT, as_mask(CausalPattern()),
                             readout=lambda hidden, model: model.head(hidden))
    torch.testing.assert_close(logits_TBV.transpose(0, 1), expected_BTV, rtol=1e-5, atol=1e-5)
    assert expected_BTV.std() > 0.1  # not near 0 whatever the weights


@pytest.mark.parametrize("args", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_encoder_is_the_lower_part(args):
    """Its keys in checkpoints are the model's without those of the upper layers, the final norm and the head."""
    whole, encoder = (set(x.sharded_state_dict(metadata=dict(SHARDING)))
                      for x in (build_start(args, transformer_impl="local"),
                                build_encoder(args, 2, transformer_impl="local")))
    upper = ("decoder.layers.2.", "decoder.layers.3.", "decoder.final_layernorm.", "output_layer.")
    assert encoder == {key for key in whole if not key.startswith(upper)}


def test_the_gpt_family_may_go(tmp_path):
    """Models are built and run where Megatron-Core has no megatron.core.models.gpt."""
    program = tmp_path / "without_gpt.py"
    program.write_text("import sys\nsys.modules['megatron.core.models.gpt'] = None\n"
                       "import test_decoder\ntest_decoder.run_without_gpt()\n")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests / "model", tests / "support", tests.parent)))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DEPRECATED" not in done.stderr


def run_without_gpt() -> None:
    from megatron_ebft.common.device import init_device
    from megatron_ebft.parallel import groups

    init_device()
    groups.init_parallel(1, 1, seed=1)
    tokens_BT = torch.arange(8, device=device())[None]
    build_start(LLAMA)(tokens_BT, tokens_BT, as_mask(CausalPattern()),
                       readout=lambda hidden, model: model.head(hidden))
