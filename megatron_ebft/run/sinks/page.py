"""The page of charts that TensorBoard shows first (its tab Custom Scalars), for each training mode.

A chart takes the tags that its patterns match from their beginning. Patterns that can find nothing in a run are left
out.
"""

from megatron_ebft.run.flags.checks import reads_rows

Charts = dict[str, list[str]]
"""Patterns of tags by a chart's title."""


def page_of(args) -> dict[str, Charts]:
    """The charts of a run with these flags, by section."""
    method = _held_out_features(args) | {"ebft": _ebft, "sft": _sft, "rlvr": _rlvr}[args.training_mode](args)
    if args.ebft_eval_questions:
        method["answers to held-out questions"] = [r"eval/answers/accuracy$",
                                                   *_if(args.ebft_eval_samples, r"eval/answers/pass@\d+$")]
    page = {"method": method, "health": _health(args), "throughput": _throughput(args)}
    return {section: {title: patterns for title, patterns in charts.items() if patterns}
            for section, charts in page.items()}


def results_of(args) -> list[str]:
    """The tags by which the HParams tab compares runs."""
    held_out, trained = (_if(args.ebft_num_samples > 1, f"{when}/cfm") for when in ("eval", "train"))
    of_mode = {"ebft": ("train/reward", *trained), "sft": ("train/loss",), "rlvr": ("train/success",)}
    return [*_if(_evaluates_features(args), *held_out, "eval/alignment"),
            *_if(_evaluates_rows(args), "eval/ce_loss"), *_if(args.ebft_eval_questions, "eval/answers/accuracy"),
            *of_mode[args.training_mode], "train/tokens_per_second"]


def _if(condition, *patterns: str) -> tuple[str, ...]:
    return patterns if condition else ()


def _evaluates_rows(args) -> bool:
    return bool(args.eval_interval) and reads_rows(args)


def _evaluates_features(args) -> bool:
    return _evaluates_rows(args) and (args.training_mode == "ebft" or args.ebft_encoder_load is not None)


def _held_out_features(args) -> Charts:
    if not _evaluates_features(args):
        return {}
    several = args.ebft_num_samples > 1
    return {"CFM on held-out rows (lower is better)": [r"eval/cfm$" if several else r"eval/cfm_biased$"],
            "CFM on held-out rows, by completion length": [*_if(several, r"eval/cfm_length/\d+$")],
            "CFM on held-out rows, by eighth of the row": [*_if(several, r"eval/cfm_position/\d$")],
            "alignment on held-out rows": [r"eval/alignment$"]}


def _ebft(args) -> Charts:
    return {"reward": [r"train/reward$"], "its parts: alignment and diversity": [r"train/alignment$",
                                                                                 r"train/diversity$"],
            "CFM of training rows": [*_if(args.ebft_num_samples > 1, r"train/cfm$"), r"train/cfm_biased$"],
            "CFM of training rows, by eighth of the row": [*_if(args.ebft_num_samples > 1,
                                                                r"train/cfm_position/\d$")],
            "cross entropy": [*_if(args.ebft_ce_coef, r"train/ce_loss$"), *_if(args.eval_interval, r"eval/ce_loss$")],
            "loss": [r"train/loss$", *_if(args.ebft_kl_coef, r"train/kl_loss$")]}


def _sft(args) -> Charts:
    return {"cross entropy": [r"train/loss$", *_if(args.eval_interval, r"eval/ce_loss$")]}


def _rlvr(args) -> Charts:
    return {"reward, and share of right completions": [r"train/reward$", r"train/success$"],
            "tokens of a completion": [r"train/length$"], "share of completions that end": [r"train/finished$"],
            "loss": [r"train/loss$", *_if(args.ebft_kl_coef, r"train/kl_loss$")]}


def _health(args) -> Charts:
    charts = {"gradient norm, before clipping": [r"train/grad_norm$"], "learning rate": [r"train/lr$"]}
    if args.training_mode == "sft":
        return charts
    charts = {"entropy (nats a token)": [r"train/entropy$", *_if(_evaluates_features(args), r"eval/entropy$")],
              **charts, "groups whose rewards are all equal": [r"train/zero_spread$"],
              "standard deviation of rewards in a group": [r"train/reward_std$"],
              "sampler against training pass": [r"train/mismatch$", r"train/mismatch_kl$"],
              "share of tokens left out": [r"train/(encoder|training)_tokens_saved$"]}
    if args.training_mode == "rlvr":
        charts["completions that the verifier could not judge"] = [r"train/verifier_failed$"]
    else:
        charts["blocks that count"] = [r"train/valid_blocks$"]
    if _evaluates_features(args) and args.ebft_track_kl:
        charts["KL to the start, on held-out rows"] = [r"eval/kl_to_start$"]
    return charts


def _throughput(args) -> Charts:
    charts = {"tokens a second": [r"train/tokens_per_second$"],
            "seconds of a step": [r"seconds/step$"], "seconds by phase": [r"seconds/(?!step$)\w+$"],
            "seconds lost to saves, restarts and evaluations": [r"run/lost_to_\w+$"], "restarts": [r"run/restarts$"]}
    if args.log_throughput:
        if args.training_mode != "rlvr":
            charts |= {"TFLOP/s of a GPU": [r"throughput/tflops_per_gpu$"], "MFU": [r"throughput/mfu$"],
                       "GB over the network, by phase": [r"throughput/network_gb_\w+$"]}
        charts |= {"tokens a second of a GPU": [r"throughput/(gold_)?tokens_per_second_per_gpu$"],
                   "share of a step by phase": [r"throughput/share_\w+$"],
                   "GiB at the peak, of the rank with the most": [r"memory/\w+_gib$"],
                   "own seconds of the slowest and the fastest rank": [r"ranks/own_seconds_(max|min)$"],
                   "slowest rank, over the others of its stage": [r"ranks/slowest_ratio$"]}
    return charts
