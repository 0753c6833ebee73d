"""The page of charts that TensorBoard shows first (its tab Custom Scalars), for each training mode.

A chart takes the tags that its patterns match from their beginning. `tests/run/test_sinks.py` checks that each chart
finds values in a run.
"""

Charts = dict[str, list[str]]
"""Patterns of tags by a chart's title."""


def page_of(args) -> dict[str, Charts]:
    """The charts of a run with these flags, by section."""
    method = {"ebft": _ebft, "sft": _sft, "rlvr": _rlvr}[args.training_mode](args)
    if args.ebft_eval_questions:
        method["answers to held-out questions"] = [r"eval/answers/accuracy$", r"eval/answers/pass@\d+$"]
    return {"method": method, "health": _health(args), "throughput": _throughput(args)}


def results_of(args) -> list[str]:
    """The tags by which the HParams tab compares runs."""
    tags = ["eval/ce_loss"] if args.eval_interval else []
    if args.eval_interval and (args.training_mode == "ebft" or args.ebft_encoder_load):
        tags += ["eval/cfm", "eval/alignment"]
    if args.ebft_eval_questions:
        tags.append("eval/answers/accuracy")
    return tags + {"ebft": ["train/reward", "train/cfm"], "sft": ["train/loss"], "rlvr": ["train/success"]}[
        args.training_mode] + ["train/tokens_per_second"]


def _held_out_features(args) -> Charts:
    if not args.eval_interval:
        return {}
    return {"CFM on held-out rows (lower is better)": [r"eval/cfm$"],
            "CFM on held-out rows, by completion length": [r"eval/cfm_length/\d+$"],
            "CFM on held-out rows, by eighth of the row": [r"eval/cfm_position/\d$"],
            "alignment on held-out rows": [r"eval/alignment$"]}


def _ebft(args) -> Charts:
    return {**_held_out_features(args),
            "reward and its parts": [r"train/reward$", r"train/alignment$", r"train/diversity$"],
            "CFM of training rows": [r"train/cfm$", r"train/cfm_biased$"],
            "CFM of training rows, by eighth of the row": [r"train/cfm_position/\d$"],
            "cross entropy": [r"train/ce_loss$", r"eval/ce_loss$"],
            "loss": [r"train/loss$", r"train/rl_loss$", r"train/kl_loss$"]}


def _sft(args) -> Charts:
    features = _held_out_features(args) if args.ebft_encoder_load else {}
    return {"cross entropy": [r"train/loss$", r"eval/ce_loss$"], **features}


def _rlvr(args) -> Charts:
    features = _held_out_features(args) if args.ebft_encoder_load else {}
    return {"reward, and share of right completions": [r"train/reward$", r"train/success$"],
            "tokens of a completion": [r"train/length$"], "share of completions that end": [r"train/finished$"],
            "loss": [r"train/loss$", r"train/kl_loss$"], **features}


def _health(args) -> Charts:
    charts = {"gradient norm, before clipping": [r"train/grad_norm$"], "learning rate": [r"train/lr$"]}
    if args.training_mode == "sft":
        return charts
    charts = {"entropy (nats a token)": [r"train/entropy$", r"eval/entropy$"], **charts,
              "groups whose rewards are all equal": [r"train/zero_spread$"],
              "standard deviation of rewards in a group": [r"train/reward_std$"],
              "sampler against training pass": [r"train/mismatch$", r"train/mismatch_kl$"],
              "tokens left out as duplicates or without advantage": [r"train/(encoder|training)_tokens_saved$"]}
    if args.training_mode == "ebft":
        charts["blocks that count"] = [r"train/valid_blocks$"]
        charts["distance to the start"] = [r"eval/kl_to_start$", r"train/distance_to_start$"]
    else:
        charts["completions that the verifier could not judge"] = [r"train/verifier_failed$"]
    return charts


def _throughput(args) -> Charts:
    return {"tokens a second": [r"train/tokens_per_second$"],
            "seconds of a step": [r"seconds/step$"], "seconds by phase": [r"seconds/(?!step$)\w+$"],
            "seconds lost to saves and restarts": [r"run/lost_to_\w+$"], "restarts": [r"run/restarts$"]}
