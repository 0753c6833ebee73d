"""config.json of published models, written ones, and architectures that no family has."""

import pytest
import torch
from hf_models import MODELS, save_model

from megatron_ebft.hf.config import describe, parse_config, read_model, write_config
from megatron_ebft.hf.families import FAMILIES
from megatron_ebft.model.architecture import ModelArgs

COMMON = dict(attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, rms_norm_eps=1e-5, use_cache=True)
PUBLISHED = {  # config.json as on the hub, less what is in COMMON; then what must come of it
    "Llama-2-7b-hf": (dict(
        _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", vocab_size=32000),
        dict(num_query_groups=32, kv_channels=128, rotary_base=10000.0, use_rope_scaling=False)),
    "Llama-3.1-8B": (dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=128000, eos_token_id=[128001, 128008],
        hidden_size=4096, intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                          original_max_position_embeddings=8192), tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.46.0", vocab_size=128256, _attn_implementation_autoset=True),
        dict(num_query_groups=8, rotary_base=500000.0, use_rope_scaling=True, rope_scaling_factor=8.0)),
    "Llama-3.2-1B": (dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=128000, eos_token_id=128001, head_dim=64,
        hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling=dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                          original_max_position_embeddings=8192), tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0", vocab_size=128256),
        dict(kv_channels=64, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=False)),
    "Qwen2.5-1.5B": (dict(
        architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151643, hidden_size=1536,
        intermediate_size=8960, max_position_embeddings=131072, max_window_layers=28, model_type="qwen2",
        num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2, rope_theta=1000000.0,
        sliding_window=131072, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.40.1",
        use_mrope=False, use_sliding_window=False, vocab_size=151936),
        dict(add_qkv_bias=True, num_query_groups=2, kv_channels=128, rotary_base=1000000.0)),
    "Qwen3-0.6B": (dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, bos_token_id=151643, eos_token_id=151645,
        head_dim=128, hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
        model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, _model_name_or_path="private", _commit_hash=None,
        tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.51.0", use_sliding_window=False, vocab_size=151936),
        dict(qk_layernorm=True, add_qkv_bias=False, kv_channels=128, num_query_groups=8)),
    "Mistral-7B-v0.3": (dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.42.0.dev0", vocab_size=32768),
        dict(num_query_groups=8, rotary_base=1000000.0, qk_layernorm=False, add_qkv_bias=False)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, expected = PUBLISHED[name]
    fields = vars(parse_config(COMMON | config, "x").architecture)
    assert {key: fields[key] for key in expected} == expected
    assert (fields["hidden_size"], fields["vocab_size"]) == (config["hidden_size"], config["vocab_size"])


def test_a_checkpoint_that_no_family_has(tmp_path):
    args = read_model(str(save_model(tmp_path, "llama 2")), "--x").architecture
    for name, value in (("normalization", "LayerNorm"), ("swiglu", False), ("add_bias_linear", True),
                        ("rotary_percent", 0.5), ("position_embedding_type", "learned_absolute")):
        with pytest.raises(ValueError, match=f"--load: no supported family has this architecture .*{name} {value}"):
            describe(ModelArgs(**{**vars(args), name: value}), "--load")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_written_configuration_is_read_back(tmp_path, family):
    kind = next(kind for kind, (name, _) in MODELS.items() if family.architecture.startswith(name))
    model = read_model(str(save_model(tmp_path, kind)), "--x")
    config = write_config(model, torch.bfloat16, 7)
    assert parse_config(config, "x") == model and config["eos_token_id"] == 7
