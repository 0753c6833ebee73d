"""The command line: the flag tables, what they refuse, --config files, and the help of training and of tools."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ebft.run.configs import transformer_overrides
from megatron_ebft.run.flags import build_parser, method_flags, parse_args
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import FINITE, Flag, above, at_least
from megatron_ebft.run.flags.method import METHOD
from megatron_ebft.run.flags.parser import Parser, as_argv
from megatron_ebft.run.flags.refused import REFUSED
from megatron_ebft.run.flags.table import ESSENTIALS, FLAGS, STEP

REPO = Path(__file__).parents[2]
ITERS = ["--train-iters", "1"]
SWITCHES_AT_FIRST = {
    "use_rope_scaling": False, "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False,
    "untie_embeddings_and_output_weights": False, "ebft_document_mask": False, "ebft_answer_only": False,
    "sequence_parallel": False, "bf16": False, "deterministic_mode": False, "overlap_grad_reduce": False,
    "async_save": False, "override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False,
    "use_checkpoint_args": False, "ebft_track_kl": True, "ebft_fp8_emulate": False, "first_last_layers_bf16": False,
    "ebft_skip_duplicates": True, "ebft_allow_changed_data": False, "ebft_unsafe_code": False,
    "log_throughput": False, "profile": False, "use_pytorch_profiler": False, "record_memory_history": False,
    "ebft_json_lines": True}
VALUES_AT_FIRST = {
    "train_iters": None, "micro_batch_size": 1, "global_batch_size": 16, "seed": 1234, "rotary_base": 10000.0,
    "rotary_percent": 1.0, "rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192, "norm_epsilon": 1e-05, "make_vocab_size_divisible_by": 128,
    "init_method_std": 0.02, "seq_length": 1024, "lr": 1e-06, "min_lr": 0.0, "lr_warmup_fraction": 0.03,
    "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-08, "clip_grad": 1.0,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "num_virtual_stages_per_pipeline_rank": 1,
    "ebft_sample_parallel_size": 1, "ebft_blocks_per_microbatch": 0, "ebft_rollout_rows": 0,
    "distributed_timeout_minutes": 10, "save_interval": 100, "ebft_keep_checkpoints": 0, "save_retain_interval": 0,
    "eval_interval": 100, "eval_iters": 4, "log_interval": 1, "ebft_eval_length": 64, "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1, "ebft_rollout_length": 8, "ebft_stride": 8, "ebft_context_length": 8,
    "ebft_num_samples": 4, "ebft_temperature": 0.6, "ebft_top_p": 1.0, "ebft_top_k": 0,
    "ebft_feature_layers": [0.25, 0.5, 0.75], "ebft_alignment_coef": 1.0, "ebft_diversity_coef": 1.0,
    "ebft_rl_coef": 1.0, "ebft_ce_coef": 0.03, "ebft_kl_coef": 0.0, "ebft_importance_cap": 2.0, "ebft_dump_interval": 1,
    "ebft_rlvr_num_samples": 8, "ebft_rlvr_temperature": 1.0, "ebft_max_new_tokens": 1024,
    "ebft_eval_samples": 0, "ebft_eval_temperature": 1.0, "ebft_eval_top_p": 1.0, "ebft_eval_top_k": 0,
    "ebft_verifier_timeout": 10.0, "ebft_verifier_workers": 4, "profile_step_start": 10, "profile_step_end": 12,
    "profile_ranks": [0], "ebft_histogram_interval": 10, "ebft_save_hf_interval": 0}
CHOICES_AT_FIRST = {
    "training_mode": ("ebft", ("ebft", "sft", "rlvr")),
    "position_embedding_type": ("rope", ("rope", "learned_absolute", "none")),
    "normalization": ("RMSNorm", ("RMSNorm", "LayerNorm")),
    "tokenizer_type": ("HuggingFaceTokenizer", ("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")),
    "lr_decay_style": ("constant", ("constant", "linear", "cosine")),
    "transformer_impl": ("auto", ("auto", "transformer_engine", "local")),
    "ebft_attention": ("auto", ("auto", "flex", "sdpa")), "ebft_step": ("auto", ("auto", "fused", "separate")),
    "recompute_granularity": (None, ("full", "selective", "none")),
    "ebft_rollout_fp8": ("off", ("off", "blockwise", "tensorwise")),
    "ebft_encoder_fp8": ("off", ("off", "blockwise", "tensorwise")), "fp8_format": (None, ("e4m3", "hybrid")),
    "fp8_recipe": ("blockwise", ("blockwise", "tensorwise")), "ebft_feature_norm": ("joint", ("joint", "layer")),
    "ebft_feature_pooling": ("last_token", ("last_token", "mean")),
    "ebft_whitening": ("none", ("none", "paper", "released")),
    "ebft_advantage": ("rloo", ("rloo", "reinforce", "group_norm")), "ebft_kl_estimator": ("k2", ("k1", "k2", "k3")),
    "ebft_stop_on_warning": (None, ("mismatch", "nothing-counts", "reward-flat", "entropy", "zero-spread",
                                    "gradient-spikes", "overoptimised", "duplicates"))}
NONE_AT_FIRST = {
    "exit_duration_in_mins", "ebft_stop_file", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
    "num_query_groups", "kv_channels", "max_position_embeddings", "data_path", "split", "train_data_path",
    "valid_data_path", "data_cache_path", "tokenizer_model", "vocab_size", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "save", "load", "pretrained_checkpoint", "ebft_encoder_load",
    "tensorboard_dir", "ebft_dump_steps", "ebft_replay_steps", "ebft_questions", "ebft_verifier", "ebft_stop",
    "ebft_eval_questions", "ebft_pass_at", "ebft_peak_tflops", "wandb_project",
    "wandb_exp_name", "wandb_save_dir"}
REFUSED_AT_FIRST = {
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts",
    "multi_latent_attention", "mtp_num_layers", "use_megatron_fsdp", "use_torch_fsdp2",
    "pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage", "fp16", "fp8_param_gather"}
"""Flags of the first version. A name, default or choice that changes breaks saved commands and checkpoints' records."""


# ---------------------------------------------------------------- the tables


def test_names_defaults_and_choices_stay():
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    choices = {name: (flag.default, flag.choices) for name, flag in FLAGS.items() if flag.choices}
    assert choices == CHOICES_AT_FIRST
    assert defaults == {**SWITCHES_AT_FIRST, **VALUES_AT_FIRST, **dict.fromkeys(NONE_AT_FIRST),
                        **{name: default for name, (default, _) in CHOICES_AT_FIRST.items()}}
    args = vars(parse_args(ITERS))
    assert args == {**defaults, **dict.fromkeys(REFUSED_AT_FIRST), "train_iters": 1}
    assert {name for name, flag in FLAGS.items() if flag.type is bool} == SWITCHES_AT_FIRST.keys()
    for name, value in args.items():  # 1.0 == 1, and checkpoints record which it is
        assert value is None or name == "train_iters" or type(value) is type(defaults[name]), name


def test_every_flag_is_well_made():
    assert sum(len(flags) for flags in (SWITCHES_AT_FIRST, VALUES_AT_FIRST, CHOICES_AT_FIRST, NONE_AT_FIRST)) == 147
    for name, flag in FLAGS.items():
        assert flag.name == f"--{name.replace('_', '-')}" and flag.help and not flag.help.endswith((".", " ")), name
        assert flag.type in (int, float, str, bool) and (not flag.choices or flag.type is str), name
        assert flag.type is not float or flag.valid, f"{name}: NaN and infinity would pass"
        assert flag.default is None or not flag.choices or flag.default in flag.choices, name
        flag.check(flag.default)


def outside(flag: Flag) -> list[str]:
    """Values just outside a flag's range, in float32 as well."""
    steps = {"at least 0": "-1", "at least 1": "0", "above 0": "0", "at least 0 and below 1": "1",
             "above 0 and at most 1": "1.5", "a finite number": "inf"}
    return [steps[flag.valid.text], *(["nan", "inf", "-inf"] if flag.type is float else [])]


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.valid])
def test_values_outside_a_range_are_refused_by_name(name):
    flag = FLAGS[name]
    for value in outside(flag):
        with pytest.raises(ValueError) as error:
            parse_args([*ITERS, f"{flag.name}={value}"])
        assert str(error.value) == f"{flag.name} {flag.type(value)}: must be {flag.valid.text}"


def test_ranges():
    inside = {at_least(1): (1, 2), above(0): (1e-9,), at_least(0, below=1): (0, 0.99), above(0, at_most=1): (0.1, 1),
              FINITE: (-1e38,)}
    for valid, values in inside.items():
        assert all(value in valid for value in values), valid.text


@pytest.mark.parametrize(("flag", "value", "message"), [
    ("--seed", str(2**64), "at most 2147483647"), ("--seed", "-1", "at least 0"),
    ("--train-iters", "1" + "0" * 400, "at most 2147483647"), ("--ebft-top-k", str(2**31), "at most 2147483647"),
    ("--ebft-rl-coef", "1e39", "at least 0 in float32, which makes it inf"),
    ("--ebft-alignment-coef", "-1e39", "a finite number in float32, which makes it -inf"),
    ("--ebft-temperature", "1e-39", "above 0 in float32, which makes it 0"),
    ("--adam-beta2", "0.99999999", "at least 0 and below 1 in float32, which makes it 1"),
    ("--adam-eps", "0", "above 0"),
])
def test_values_that_kernels_cannot_hold_are_refused_by_name(flag, value, message):
    with pytest.raises(ValueError, match=f"^{flag} .*: must be {message}$"):
        parse_args([*ITERS, f"{flag}={value}"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--lr", "1e-3", "--min-lr", "2e-3"], "--min-lr 0.002: must not be above --lr 0.001"),
    (["--lr", "1e38"], "--lr 1e[+]38: a step of AdamW, --lr / .1 − --adam-beta1., is beyond float32"),
    (["--lr", "1e30", "--weight-decay", "1e9"], "--lr 1e[+]30: a step of AdamW, --lr × --weight-decay"),
    (["--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"], "--override-opt.* one of the two"),
    (["--wandb-exp-name", "x"], "--wandb-exp-name x: needs --wandb-project"),
    (["--ebft-save-hf-interval", "100"], "--ebft-save-hf-interval 100: needs --save"),
    (["--ebft-save-hf-interval", "150", "--save", "x"], "--ebft-save-hf-interval 150: must be a multiple of"),
])
def test_contradictions_are_named(flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_args([*ITERS, *flags])


def test_a_job_scripts_flags_can_be_undone(capsys):
    """Without an effect at one tensor rank, sequence parallelism is off there, as in Megatron."""
    script = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "full"]
    assert parse_args([*ITERS, *script]).sequence_parallel and not capsys.readouterr().err
    args = parse_args([*ITERS, *script, "--tensor-model-parallel-size", "1", "--recompute-granularity", "none"])
    assert not args.sequence_parallel and "recompute_granularity" not in transformer_overrides(args)
    assert capsys.readouterr().err == "note: --sequence-parallel has no effect at --tensor-model-parallel-size 1\n"


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flags_say_why(flag):
    with pytest.raises(ValueError, match=f"^{flag}: .{{10}}"):
        parse_args([*ITERS, flag])
    with pytest.raises(ValueError, match=f"^{flag} 2: .{{10}}"):
        parse_args([*ITERS, flag, "2"])
    if flag.endswith("-parallel-size"):
        parse_args([*ITERS, flag, "1"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--ebft-strides", "4"], r"^unrecognized arguments: --ebft-strides 4 \(did you mean --ebft-stride\?\)"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"), (["--ebft-advantage", "gae"], "invalid choice: 'gae'"),
    (["--seq", "8"], "unrecognized arguments: --seq"), (["--data-path"], "--data-path: expected at least one argument"),
])
def test_wrong_command_lines(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args([*ITERS, *flags])


def test_a_missing_flag_is_named():
    with pytest.raises(ValueError, match="^the following arguments are required: --train-iters"):
        parse_args([])


def test_method_flags():
    """What files of dumped steps record: everything of the method, and T."""
    args = parse_args([*ITERS, "--ebft-top-k", "7"])
    assert [*method_flags(args)] == ["seq_length", *METHOD.dests] and method_flags(args)["ebft_top_k"] == 7
    assert "ebft_skip_duplicates" not in method_flags(args)


def test_as_argv():
    values = {"lr": -1e-3, "bf16": True, "swiglu": False, "ebft_feature_layers": [0.5, 1.0], "save": "a b"}
    assert {name: vars(build_parser().parse_args([*ITERS, *as_argv(values)]))[name] for name in values} == values


# ---------------------------------------------------------------- --config


@pytest.fixture
def config(tmp_path):
    """Text → flags that read it from a file."""

    def write(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml")]

    return write


def test_the_command_line_wins(config):
    flags = config("""
        train-iters: 7
        seq_length: 64          # underscores do, too
        lr: 1e-4                # text in YAML 1.1
        ebft-kl-coef: 1         # an integer is a number
        bf16: true
        swiglu: false
        ebft-rollout-fp8: off   # false in YAML 1.1
        ebft-whitening: none
        ebft-feature-layers: [0.5, 1]
        data-path: [0.3, a, 0.7, b]
        train-data-path: one
        split: 9,1,0
        context-parallel-size: 1
        expert-model-parallel-size:     # not given
        tokenizer-model: ~
        seed: 0123              # 83 in YAML 1.1
    """)
    args = parse_args([*flags, "--seq-length", "32", "--no-bf16", "--data-path", "c"])
    expected = {"train_iters": 7, "seq_length": 32, "lr": 1e-4, "ebft_kl_coef": 1.0, "bf16": False, "swiglu": False,
                "ebft_rollout_fp8": "off", "ebft_whitening": "none", "ebft_feature_layers": [0.5, 1.0],
                "data_path": ["c"], "train_data_path": ["one"], "split": "9,1,0", "context_parallel_size": "1",
                "tokenizer_model": None, "seed": 123}
    assert {name: vars(args)[name] for name in expected} == expected and isinstance(args.ebft_kl_coef, float)
    assert vars(args) == {**vars(parse_args(ITERS)), **expected}
    assert parse_args(flags).data_path == ["0.3", "a", "0.7", "b"]
    assert vars(parse_args([*ITERS, *config("")])) == vars(parse_args(ITERS))


@pytest.mark.parametrize(("text", "message"), [
    ("seq-lenght: 8", "line 1: there is no flag seq-lenght; the nearest is seq-length"),
    ("\n--lr: 1", "line 2: there is no flag --lr; the nearest is lr"),
    ("nothing_like_it: 8", "there is no flag nothing_like_it; the nearest is "),
    ("seq-length: long", "line 1: seq-length: must be an integer, not 'long'"),
    ("seq-length: 8.0", "seq-length: must be an integer, not 8.0"),
    ("seq-length: true", "seq-length: must be an integer, not True"),
    ("seq-length: [8, 16]", r"seq-length: must be an integer, not \[8, 16\]"),
    ("lr:", "lr: must be a number, not None"),
    ("lr: high", "lr: must be a number, not 'high'"), ("bf16: on", "bf16: must be true or false, not 'on'"),
    ("bf16: 1", "bf16: must be true or false, not 1"), ("save: {a: b}", "save: must be text"),
    ("data-path: []", "data-path: must have at least one value"),
    ("ebft-feature-layers: [0.5, deep]", "ebft-feature-layers: must be a number, not 'deep'"),
    ("ebft-advantage: gae", "ebft-advantage: must be one of rloo, reinforce, group_norm, not 'gae'"),
    ("seq-length: 0", "line 1: seq-length: must be at least 1, not 0"),
    ("lr: 1\nbf16: true\nlr: 2", "line 3: lr is on line 1 already"),
    ("seq-length: 8\nseq_length: 8", "line 2: seq_length is on line 1 already"),
    ("- seq-length", "must be a mapping, a line `flag: value`"), ("seq-length: [8", "not YAML"),
    ("lr: \x00", "not YAML"), ("lr: " + "[" * 2000, "not YAML"), ("seed: 1" + "0" * 5000, "not YAML"),
    ("lr: 1" + "0" * 400, "lr: must be at least 0, not inf"),
    ("config: other.yaml", "there is no flag config"),
])
def test_wrong_files_are_named(config, text, message):
    flags = config(text)
    with pytest.raises(ValueError, match=f"^--config {flags[1]}.*{message}"):
        parse_args([*ITERS, *flags])


def test_a_missing_file_and_a_refused_flag(config, tmp_path):
    with pytest.raises(ValueError, match=f"^--config {tmp_path}/none.yaml: cannot be read .No such file"):
        parse_args([*ITERS, "--config", f"{tmp_path}/none.yaml"])
    with pytest.raises(ValueError, match="^--fp8-param-gather: weights stay in bf16"):
        parse_args([*ITERS, *config("fp8-param-gather: true")])
    parse_args([*ITERS, *config("fp8-param-gather: false")])


# ---------------------------------------------------------------- programs


WITHOUT_TORCH = """
import runpy, sys
sys.argv = {argv}
try:
    runpy.run_module("megatron_ebft.train", run_name="__main__")
finally:
    print("imported:", *(name for name in ("torch", "megatron.core", "yaml") if name in sys.modules))
"""


def test_help_of_training_imports_no_torch():
    """Grouped, with every flag, its default and its range; the first lines are the flags to start with."""
    command = [sys.executable, "-c", WITHOUT_TORCH.format(argv=["train", "--help"])]
    done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, env={"PYTHONPATH": str(REPO)})
    assert done.returncode == 0 and done.stdout.endswith("imported:\n"), done.stdout[-500:] + done.stderr
    start, rest = done.stdout.split("All flags follow by group")
    assert "THE FLAGS TO START WITH" in start and start.count("\n  --") == 1 + len(ESSENTIALS.flags)
    assert "less" in rest.split("\n\n")[0]
    words = " ".join(rest.split())
    for name, flag in FLAGS.items():
        spelling = f"--[no-]{flag.name[2:]} " if flag.type is bool else f"{flag.name} "
        assert spelling in words, name
        for note in ("[required" if flag.required else f"[default: {flag.default}", flag.valid and flag.valid.text):
            if flag.default is not None and not flag.many and flag.type is not bool and note:
                assert note in words, name
    assert not any(flag in words for flag in REFUSED)


def test_wrong_flags_are_refused_before_torch_is_imported():
    code = ("import sys\nfrom megatron_ebft import train\ntry:\n    train.main(['--train-iters', '0'])\n"
            "except ValueError as error:\n    print(error, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True,
                          env={"PYTHONPATH": str(REPO)})
    assert done.stdout == "--train-iters 0: must be at least 1 False\n", done.stdout + done.stderr


TOOLS = {  # own flags; training flags that it reads; one that it does not read
    "plan.py": ({"--world-size", "--gpus-per-node"}, {"--num-layers", "--ebft-stride", "--ebft-track-kl"}, "--save"),
    "benchmark.py": ({"--shape", "--write-plan"}, {"--hidden-size", "--data-path", "--lr"}, "--ebft-kl-coef"),
    "replay.py": ({"--batch", "--tolerance"}, {"--sequence-parallel", "--ebft-encoder-fp8"}, "--ebft-stride"),
    "save_cost.py": ({"--save", "--repeats"}, {"--bf16", "--num-layers"}, "--load"),
    "rollout_schedule.py": ({"--repeats"}, {"--pipeline-model-parallel-size"}, "--data-path"),
    "preflight.py": ({"--ranks-per-node", "--node-only"}, set(), None),
    "preprocess_data.py": ({"--input", "--messages-key"}, {"--seq-length", "--ebft-stride"}, "--data-path"),
    "convert/hf_to_megatron.py": ({"--hf-model", "--verify"}, set(), "--seq-length"),
    "convert/megatron_to_hf.py": ({"--load", "--max-shard-size"}, set(), "--seq-length")}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_show_the_flags_they_read(tool, capsys, monkeypatch):
    own, read, unread = TOOLS[tool]
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "tools" / tool), run_name="__main__")
    assert end.value.code == 0
    shown = {word.replace("[no-]", "") for line in capsys.readouterr().out.splitlines()
             if line.startswith("  --") for word in line.split()[:1]}
    assert shown >= own | read and unread not in shown


def test_what_a_tool_does_not_read(config):
    """An error on the command line, ignored in the file that describes the run; its values have training's defaults."""
    parser = Parser("tools/x.py", "", reads=STEP, defaults={"train_iters": 1, "seq_length": 64})
    with pytest.raises(ValueError, match="^--save, --load: tools/x.py does not read these training flags"):
        parser.parse_args(["--load", "there", "--lr", "1", "--save", "here"])
    args = parser.parse_args([*config("save: here\nlr: 1.5\nnum-layers: 3"), "--num-layers", "4"])
    assert (args.save, args.lr, args.num_layers, args.seq_length, args.eval_interval) == (None, 1.5, 4, 64, 100)
    assert check_args(args) is args
    with pytest.raises(ValueError, match="there is no flag sav; the nearest is save"):
        parser.parse_args(config("sav: here"))


def test_own_flags_of_a_tool():
    import plan

    with pytest.raises(ValueError, match="^--world-size 0: must be at least 1"):
        plan.parse(["--world-size", "0"])
    with pytest.raises(ValueError, match="^the following arguments are required: --world-size"):
        plan.parse(ITERS)
    with pytest.raises(ValueError, match="^--peak-tflops 0.0: must be above 0"):
        plan.parse(["--world-size", "1", "--peak-tflops", "0"])
    parser = Parser("tools/plan.py", "", own=(plan.CLUSTER,), reads=STEP)
    assert parser.parse_own(["--no-such-flag", "--lr", "x", "--world-size", "3"]).world_size == 3
