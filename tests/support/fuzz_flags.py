"""Random command lines of training, drawn from the flag table."""

from pathlib import Path
from random import Random

from megatron_ebft.run.flags.flag import Flag
from megatron_ebft.run.flags.table import FLAGS

USUAL = {int: ("1", "2", "3", "4", "5", "6", "8", "12"), float: ("0.1", "0.25", "0.5", "0.9", "1", "2")}
NASTY = {int: ("0", "-1", "7", str(2**31), str(2**63), str(2**64), "1" + "0" * 12, "1" + "0" * 400, "1e3", ""),
         float: ("0", "-1", "-0.0", "1e39", "-1e39", "1e38", "1e-39", "1e-30", "1e-300", "nan", "inf", "0.9999999999",
                 "1e6", "x")}
HUGE_BUT_VALID = {"ffn_hidden_size", "hidden_size", "kv_channels", "num_layers", "vocab_size", "save_interval",
                  "make_vocab_size_divisible_by", "ebft_keep_checkpoints", "log_interval", "ebft_eval_length",
                  "rope_original_max_position_embeddings", "max_position_embeddings", "ebft_top_k",
                  "ebft_dump_interval", "seq_length", "ebft_stride", "ebft_context_length", "ebft_rollout_length",
                  "seed", "distributed_timeout_minutes", "ebft_blocks_per_microbatch", "ebft_rollout_rows"}
"""Flags that also get the largest integer. Of the others so many steps, rows or rollouts would simply take for ever."""
SELDOM = {"async_save": 0.1, "deterministic_mode": 0.3}
"""Slow flags, and how often they stay when drawn. --async-save starts a process, which imports the package again."""


def _text(draw: Random, flag: Flag, folder: Path) -> str:
    """A value of a flag that takes a path or a text: nothing there, a file, a folder, or no path at all."""
    return draw.choice([str(folder / "missing" / "there"), str(folder / "text.jsonl"), str(folder), "", "x" * 300,
                        "1,2,x", str(folder / "text.jsonl" / "below")])


def _value(draw: Random, flag: Flag, folder: Path) -> str:
    is_nasty = draw.random() < 0.25
    if flag.choices:
        return "other" if draw.random() < 0.05 else draw.choice(flag.choices)
    if flag.type is str:
        return _text(draw, flag, folder)
    if is_nasty and flag.dest in HUGE_BUT_VALID and draw.random() < 0.2:
        return str(2**31 - 1)
    return draw.choice((NASTY if is_nasty else USUAL)[flag.type])


def random_flags(draw: Random, folder: Path) -> list[str]:
    """One to four flags with random values, some of them nasty."""
    words = []
    for name in draw.sample(sorted(FLAGS), draw.randint(1, 4)):
        flag = FLAGS[name]
        if draw.random() >= SELDOM.get(name, 1.0):
            continue
        if flag.type is bool:
            words.append(draw.choice([flag.name, f"--no-{flag.name[2:]}"]))
        elif flag.many:
            words += [flag.name, *(_value(draw, flag, folder) for _ in range(draw.randint(1, 3)))]
        else:
            words.append(f"{flag.name}={_value(draw, flag, folder)}")
    return words
