"""Mutations: deliberate mistakes in the package, each of which one quick test must catch.

    python tests/mutations.py                    # all of them, a few minutes
    python tests/mutations.py --only clipping    # some of them
    python tests/mutations.py --list

Prints the table of tests/README.md. A mutation replaces a text that occurs exactly once in a file. It is applied to a
temporary copy of the repository, never to the working tree. Its test must fail there, and pass without the mutation.

Every test runs in a process forked from one that has imported torch and Megatron-Core but nothing of the package. The
table has the processor seconds of that process, whatever else the machine does; those of ranks that it starts are not
among them.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("megatron_ebft", "tests", "tools", "pyproject.toml")
"""What the tests of the table read."""
IMPORTED = ("torch", "torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator", "pytest",
            "hypothesis", "transformers", "megatron.core.dist_checkpointing", "megatron.core.optimizer",
            "megatron.core.models.common.language_module.language_module", "megatron.core.datasets.gpt_dataset")
"""Slow to import, and not ours."""
TIMEOUT = 300
"""Seconds after which a test hangs."""


@dataclass(frozen=True)
class Mutation:
    """One mistake, and the quickest test that catches it."""

    name: str
    """For --only."""
    what: str
    """The mistake in words."""
    file: str
    """Below megatron_ebft/."""
    text: str
    """Occurs exactly once in the file."""
    replacement: str
    test: str
    """A pytest node below tests/."""


TABLE = (
    # rollout
    Mutation("number-step", "the random numbers of a rollout ignore the step", "rollout/token_sampling.py",
             "document, block, sample, step):\n        state", "document, block, sample, 0 * step):\n        state",
             "rollout/test_sampling.py::test_uniform_numbers_depend_on_every_argument"),
    Mutation("number-block", "the random numbers of a rollout ignore the block", "rollout/token_sampling.py",
             "document, block, sample, step):\n        state", "document, 0 * block, sample, step):\n        state",
             "rollout/test_sampling.py::test_uniform_numbers_depend_on_every_argument"),
    Mutation("number-iteration", "the sampler passes on no iteration", "rollout/sampler.py",
             "uniform(self.config.seed, self.iteration,", "uniform(self.config.seed, 0,",
             "rollout/test_sampling.py::test_rollouts_depend_on_seed_and_iteration"),
    Mutation("number-row", "rows are numbered within the rank's batch", "rollout/sampler.py",
             "self.gold.index_B[:, None, None, None],",
             "torch.arange(len(self.gold.index_B), device=device)[:, None, None, None],",
             "rollout/test_sampling.py::test_rollouts_do_not_depend_on_the_batch[False]"),
    Mutation("top-p", "top-p drops the token that reaches p", "rollout/token_sampling.py",
             "p.where(bits >= low, 0.0)", "p.where(bits > low, 0.0)",
             "rollout/test_sampling.py::test_filtered_sets_are_those_of_a_sort[0.9-0]"),
    Mutation("filtered-log-prob", "log-probabilities are taken after the filter", "rollout/token_sampling.py",
             "log_p.gather(-1, local), owner", "(kept / _sum(kept, group)).log().gather(-1, local), owner",
             "rollout/test_sampling.py::test_tokens_stay_in_the_set_with_the_frequencies_left[0.5-0]"),
    # layout
    Mutation("predictor", "step 0 is predicted by the token at the anchor", "layout/packed_row.py",
             "return self.anchors - 1", "return self.anchors",
             "model/test_learned_positions.py::test_log_probabilities_of_rollouts"),
    Mutation("next-token", "a rollout token sees the next one of its rollout", "layout/visible_keys.py",
             "own_start + row.rollout_step + 1]", "own_start + row.rollout_step + 2]",
             "model/test_learned_positions.py::test_log_probabilities_of_rollouts"),
    Mutation("empty-slot", "a decoding step sees a slot that is still empty", "layout/visible_keys.py",
             "own_end=(self.own_end + step)", "own_end=(self.own_end + step + 1)",
             "model/test_learned_positions.py::test_log_probabilities_of_rollouts"),
    Mutation("foreign-block", "a block counts whose context is in another document", "layout/strided.py",
             "document_BT[:, anchors - 1] ==", "document_BT[:, anchors] ==",
             "layout/test_strided.py::test_blocks_that_count[False-True]"),
    Mutation("long-completion", "a block counts whose completion ends in another document", "layout/strided.py",
             "document_BT[:, anchors + self.rollout_length - 1]", "document_BT[:, anchors]",
             "layout/test_strided.py::test_blocks_that_count[False-True]"),
    Mutation("positions", "positions do not restart at documents", "layout/packed_row.py",
             " - torch.cat([starts_BT, starts_BT.gather(1, before_anchor)], dim=1)", "",
             "model/test_learned_positions.py::test_log_probabilities_of_rollouts"),
    # method
    Mutation("rloo", "RLOO divides by n", "method/energy.py",
             "(alignment.sum(-1, keepdim=True) - alignment) / (n - 1)",
             "(alignment.sum(-1, keepdim=True) - alignment) / n",
             "method/test_energy.py::test_rewards_and_advantages_of_the_golden_groups[none-case0]"),
    Mutation("diversity", "diversity divides by n", "method/energy.py", "2 / max(n - 1, 1) *", "2 / n *",
             "method/test_energy.py::test_rewards_and_advantages_of_the_golden_groups[none-case0]"),
    Mutation("whitening", "Eq. 8 without its n", "method/energy.py", "            inner = n * inner\n", "",
             "method/test_energy.py::test_rewards_and_advantages_of_the_golden_groups[paper-case0]"),
    Mutation("cfm", "the unbiased CFM counts pairs of a rollout with itself", "method/energy.py",
             "(total - own) / (n * (n - 1))", "total / (n * n)",
             "method/test_energy.py::test_cfm_of_the_golden_groups[case0]"),
    Mutation("token-count", "means divide by the tokens of the rank, not of the global batch", "method/batches.py",
             "return dp_sum(torch.stack([rollout_tokens, gold.gold_valid().sum()]).float())",
             "return torch.stack([rollout_tokens, gold.gold_valid().sum()]).float()",
             "parallel/test_two_ranks.py::test_gradient[data]"),
    Mutation("gram-tensor", "Gram matrices are not summed over tensor ranks", "method/features.py",
             "for group in (tp_group(), sample_group()):", "for group in (sample_group(),):",
             "parallel/test_two_ranks.py::test_gram_matrices[tensor]"),
    Mutation("gram-pipeline", "Gram matrices are not summed over pipeline stages", "method/features.py",
             "        if stages > 1:\n            dist.all_reduce(gram, group=pp_group())\n", "",
             "parallel/test_two_ranks.py::test_gram_matrices[pipeline]"),
    Mutation("importance-cap", "importance weights have no cap", "method/losses.py", ".exp().clamp(max=cap)", ".exp()",
             "method/test_importance.py::test_two_tokens_by_hand"),
    Mutation("kl-sign", "the log ratio of the KL estimators has the other sign", "method/losses.py",
             "d = log_probs - start_log_probs", "d = start_log_probs - log_probs",
             "model/test_strided_attention.py::test_the_kl_term_is_brute_force[k3]"),
    Mutation("kl-needed", "the KL term skips rollouts without an advantage", "method/gradient.py",
             "    if start_BKNG is None:\n        needed_BKN", "    if True:\n        needed_BKN",
             "method/test_savings.py::test_every_result_is_the_same[options4]"),
    Mutation("clipping", "gradients are not clipped", "method/update.py", "config.clip_grad > 0:",
             "config.clip_grad > 1:", "run/test_training.py::test_optimizer_step_is_megatrons[0.05]"),
    # generation and evaluation
    Mutation("generation-position", "a completion's last token stands one place later", "rollout/generation.py",
             "+ len(self.completion.tokens) - 1", "+ len(self.completion.tokens)",
             "rollout/test_generation.py::test_greedy_is_what_transformers_generates[llama 3.1]"),
    Mutation("generation-move", "no completion's keys move to the place of one that has ended",
             "model/completion_cache.py", "order[row] = last", "order[row] = row",
             "rollout/test_generation.py::test_greedy_is_what_transformers_generates[llama 3.1]"),
    Mutation("generation-numbers", "samples of a prompt draw the same numbers", "rollout/generation.py",
             "key_R, 0, sample_R, step_R)", "key_R, 0, 0 * sample_R, step_R)",
             "rollout/test_generation.py::test_samples_depend_on_prompt_seed_and_iteration_alone"),
    Mutation("pass-at-k", "pass@k is estimated with replacement", "method/answers.py",
             "1 - math.comb(samples - right, k) / math.comb(samples, k)", "1 - (1 - right / samples) ** k",
             "method/test_answers.py::test_pass_at_k_counts_the_sets_with_a_right_sample[5]"),
    # RLVR
    Mutation("rlvr-place", "the token after it predicts a completion token", "data/packing.py",
             "number_BT[row, answer - 1 : end - 1]", "number_BT[row, answer : end]",
             "data/test_packing.py::test_every_completion_token_is_found_after_its_prompt"),
    Mutation("rlvr-document", "a sequence sees those before it in its row", "data/packing.py",
             "upload(document_BT))", "None)", "method/test_rlvr.py::test_a_step_is_brute_force"),
    Mutation("rlvr-denominator", "completions that are left out do not count", "method/completions.py",
             "return total / num_tokens", "return total / max(batch.packed.num_tokens, 1)",
             "method/test_rlvr.py::test_a_step_is_brute_force"),
    Mutation("rlvr-left-out", "negative advantages are left out", "method/rlvr.py",
             "else advantage_QN != 0", "else advantage_QN > 0",
             "method/test_rlvr.py::test_the_gradient_is_that_of_the_expected_reward"),
    Mutation("rlvr-temperature", "log-probabilities of completions are taken at temperature 1", "method/passes.py",
             "gold_section(mb.tokens, temperature)", "gold_section(mb.tokens, 1.0)",
             "method/test_rlvr.py::test_a_step_is_brute_force"),
    Mutation("rlvr-iteration", "completions are drawn with the same numbers in every step", "method/rlvr.py",
             "iteration=iteration, occurrence", "iteration=0, occurrence",
             "method/test_rlvr.py::test_a_step_is_brute_force"),
    Mutation("rlvr-share", "every data-parallel rank takes the same questions", "data/questions.py",
             "position >= rank * count", "position < count",
             "data/test_questions.py::test_every_epoch_has_every_question_in_another_order"),
    Mutation("rlvr-epoch", "every epoch has the same order", "data/questions.py",
             "default_rng((self.seed, epoch))", "default_rng(self.seed)",
             "data/test_questions.py::test_every_epoch_has_every_question_in_another_order"),
    # model
    Mutation("temperature", "the gradient of a log-probability lacks 1/τ", "model/log_probabilities.py",
             "grad_PBM = grad[here] if section.temperature == 1 else grad[here] / section.temperature",
             "grad_PBM = grad[here]",
             "rollout/test_sampling.py::test_padding_of_the_vocabulary_costs_the_backward_pass_nothing"),
    Mutation("rotation", "the backward pass rotates by the same angle", "model/rotary.py",
             "*ctx.saved_tensors, -1)", "*ctx.saved_tensors, 1)",
             "model/test_rotary.py::test_rotation_is_a_product_of_complex_numbers[8]"),
    Mutation("rope-scaling", "Llama 3's rope scaling is ignored", "model/decoder.py",
             "if args.use_rope_scaling:", "if args.use_rope_scaling and args.rope_scaling_factor < 1:",
             "hf/test_round_trip.py::test_a_configuration_made_from_the_architecture_alone[llama 3.1]"),
    Mutation("tied-embedding", "the gradients of tied embeddings are not summed over stages", "model/build.py",
             "lambda models, num_tokens, **kwargs: finalize_model_grads(models, None, **kwargs)",
             "lambda models, num_tokens, **kwargs: [chunk.finish_grad_sync() for chunk in models]",
             "parallel/test_two_ranks.py::test_gradient[pipeline]"),
    Mutation("fp8-weights", "FP8 weights are kept after a rollout", "model/fp8.py", "workspaces.clear()", "pass",
             "model/test_fp8.py::test_cached_weights_are_forgotten"),
    # data
    Mutation("answer-mask", "the answer mask is one token late", "data/rows.py",
             "numpy.concatenate([self.answer_mask.get(*span) for span in spans]) != 0",
             "numpy.roll(numpy.concatenate([self.answer_mask.get(*span) for span in spans]), 1) != 0",
             "data/test_rows.py::test_answer_mask_follows_the_tokens[True]"),
    Mutation("answer-predictor", "cross entropy counts where the predictor is an answer", "data/micro_batches.py",
             "valid &= self.answer_BT[:, 1:]", "valid &= self.answer_BT[:, :-1]",
             "data/test_micro_batches.py::test_gold_tokens_that_count"),
    Mutation("document-start", "cross entropy counts the first token of a document", "data/micro_batches.py",
             "            valid &= self.document_BT[:, 1:] == self.document_BT[:, :-1]\n", "            pass\n",
             "data/test_micro_batches.py::test_gold_tokens_that_count"),
    Mutation("documents", "a document ends one token early", "data/rows.py", "dtype=numpy.int32).repeat(lengths)",
             "dtype=numpy.int32).repeat(lengths)[numpy.arange(1, len(tokens_T) + 1).clip(max=len(tokens_T) - 1)]",
             "data/test_rows.py::test_documents_are_those_of_the_index"),
    Mutation("turn-end", "the token that ends a turn is no answer", "data/chat.py",
             "answer_L |= (begin_L < end)", "answer_L |= (end_L < end)",
             "data/test_chat.py::test_masks_token_by_token[ChatML]"),
    Mutation("rewritten-turns", "a chat template may rewrite earlier turns", "data/chat.py",
             "if not text.startswith(after):", "if False:",
             "data/test_chat.py::test_refused[reasoning of earlier turns]"),
    # checkpointing
    Mutation("checksum", "a file of the right size is believed", "checkpointing/manifest.py",
             "if patiently(_crc32, os.path.join(folder, name)) != crc32:",
             "if os.path.getsize(os.path.join(folder, name)) != size:",
             "checkpointing/test_damage.py::test_any_flipped_byte_or_cut_is_noticed"),
    Mutation("in-place", "a checkpoint appears file by file", "checkpointing/folders.py",
             "os.rename(temporary, folder)", "shutil.copytree(temporary, folder)",
             "checkpointing/test_saving.py::test_a_killed_save_leaves_the_older_checkpoint"),
    Mutation("removed-first", "a save over an iteration removes the old one first", "checkpointing/folders.py",
             'os.rename(folder, folder + ".old")', "shutil.rmtree(folder)",
             "checkpointing/test_saving.py::test_a_save_over_an_iteration_is_safe"),
    Mutation("consumed-samples", "a load forgets the consumed samples", "checkpointing/loader.py",
             'return TrainState(**record["train_state"]),',
             'return TrainState(iteration=record["train_state"]["iteration"]),',
             "checkpointing/test_loading.py::test_training_continues_bit_for_bit[{}]"),
    Mutation("random-states", "a load forgets torch's random state", "checkpointing/random_states.py",
             "    torch.set_rng_state(cpu)\n", "",
             "checkpointing/test_loading.py::test_training_continues_bit_for_bit[{}]"),
    Mutation("adam-step", "a load forgets Adam's step count", "checkpointing/optimizer_state.py",
             'state["step"] = torch.tensor(step)', 'state["step"] = torch.tensor(1.0)',
             "checkpointing/test_loading.py::test_training_continues_bit_for_bit[{}]"),
    # hf
    Mutation("gate-up", "gate and up projection are swapped", "hf/families.py",
             '("mlp.gate_proj.weight", "FH"), ("mlp.up_proj.weight", "FH")',
             '("mlp.up_proj.weight", "FH"), ("mlp.gate_proj.weight", "FH")',
             "hf/test_round_trip.py::test_a_configuration_made_from_the_architecture_alone[llama 2]"),
    Mutation("key-heads", "Q, K and V follow one another", "hf/families.py",
             "key_heads if parts.by_key_head else 1", "1",
             "hf/test_round_trip.py::test_a_configuration_made_from_the_architecture_alone[llama 2]"),
    # run
    Mutation("schedule", "the schedule counts steps, not rows", "run/loop.py",
             "run.scheduler.step(increment=run.args.global_batch_size)", "run.scheduler.step(increment=1)",
             "run/test_learning_rate.py::test_warm_up_and_decay[linear]"),
    Mutation("horizon", "a resumed run counts all steps at the present batch", "run/learning_rate.py",
             "return done.consumed_samples + (args.train_iters - done.iteration) * args.global_batch_size",
             "return args.train_iters * args.global_batch_size",
             "run/test_learning_rate.py::test_the_decay_ends_at_the_last_step_whatever_the_batch[8]"),
    Mutation("stop", "a request to stop is seen by one rank only", "run/stopping.py",
             "        dist.all_reduce(asked, op=dist.ReduceOp.MAX)\n", "",
             "parallel/test_two_ranks.py::test_a_request_to_one_rank_stops_both[1]"),
    Mutation("ranges", "the ranges of flags are not checked", "run/flags/checks.py",
             "    for name, flag in FLAGS.items():\n        flag.check(vars(args)[name])\n", "",
             "run/test_flags.py::test_values_outside_a_range_are_refused_by_name[ebft_top_p]"),
    Mutation("infinity", "infinity is in open ranges", "run/flags/flag.py",
             "if not (math.isfinite(value) and self.includes(value)):", "if not self.includes(value):",
             "run/test_flags.py::test_values_outside_a_range_are_refused_by_name[ebft_temperature]"),
    Mutation("config-wins", "--config wins over the command line", "run/flags/parser.py",
             "self._from_file(values) | values", "values | self._from_file(values)",
             "run/test_flags.py::test_the_command_line_wins"),
    # the fused step
    Mutation("fused-prefix", "no gradient reaches the gold keys that rollouts see", "model/decoding.py",
             "= (k_BJSD, v_BJSD), []", "= (k_BJSD.detach(), v_BJSD), []",
             "method/test_golden.py::test_a_fused_step[split0-step]"),
    Mutation("fused-own", "no gradient reaches the keys of a rollout's own tokens", "model/decoding.py",
             "cache.own[layer_number].append(new)",
             "cache.own[layer_number].append((new[0].detach(), new[1]))",
             "method/test_golden.py::test_a_fused_step[split0-step]"),
    Mutation("fused-parts", "rollouts count in every part of their row's blocks", "method/fused.py",
             "valid_BK & decoded_BK", "valid_BK",
             "method/test_fused.py::test_the_kl_term_is_brute_force[k2]"),
    Mutation("fused-gold", "gold tokens count in every part of their row's blocks", "method/fused.py",
             "part.gold.gold_valid() if part.is_first else None", "part.gold.gold_valid()",
             "method/test_golden.py::test_a_fused_step[split1-step]"),
    Mutation("fused-scale", "the own part of attention is merged with the gold part's normaliser alone",
             "model/prefix_attention.py", "lse_BJQ = torch.logaddexp(gold_lse_BJQ, own_lse_BJQ.to(gold_lse_BJQ.dtype))",
             "lse_BJQ = gold_lse_BJQ.clone()", "method/test_golden.py::test_a_fused_step[split0-step]"),
)


def mutated(mutation: Mutation) -> str:
    """The file with the mistake.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    source = (ROOT / "megatron_ebft" / mutation.file).read_text()
    if source.count(mutation.text) != 1:
        raise ValueError(f"{mutation.file} has {source.count(mutation.text)} times {mutation.text!r}")
    return source.replace(mutation.text, mutation.replacement)


def copy_repository(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _pytest(folder: Path, test: str, log: Path) -> None:
    """Run a test of the copy. Its process ends with pytest's exit code."""
    os.setsid()  # a process group, so that a test that hangs can be killed with its ranks
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if not path or Path(path) not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(folder)
    import pytest

    # Not sys.exit: it would wait for the ranks that the test has started.
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={folder}", f"tests/{test}"])))


def run_test(folder: Path, test: str) -> tuple[int | None, float, str]:
    """Exit code of pytest (None: it hangs), its processor seconds, and what it wrote."""
    before, log = _seconds_of_children(), folder / "log"
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, test, log))
    process.start()
    process.join(TIMEOUT)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):  # what it has left: ranks, or itself
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return code, _seconds_of_children() - before, log.read_text() if log.exists() else ""


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judge(mutation: Mutation, folder: Path, passing: dict[str, bool]) -> tuple[str, float]:
    """What is wrong with a mutation ("": its test catches it), and the processor seconds in which its test fails.

    Args:
        passing: by test, whether it passes without a mutation; is added to.
    """
    try:
        changed = mutated(mutation)
    except ValueError as error:
        return str(error), 0.0
    if mutation.test not in passing:
        code, _, said = run_test(folder, mutation.test)
        passing[mutation.test] = code == 0
        if code != 0:
            print(said[-3000:], file=sys.stderr)
    if not passing[mutation.test]:
        return f"{mutation.test} fails without the mutation", 0.0
    path = folder / "megatron_ebft" / mutation.file
    original = path.rename(folder / "original")
    path.write_text(changed)
    code, seconds, said = run_test(folder, mutation.test)
    original.replace(path)  # with its old time, by which Python knows which bytecode is up to date
    if code == 1:
        print(*[line[:150] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))][:1], file=sys.stderr)
        return "", seconds
    return {0: f"{mutation.test} passes", None: f"{mutation.test} hangs"}.get(
        code, f"pytest ends with {code}:\n{said[-3000:]}"), seconds


def main() -> int:
    """Exit code: 0 if every mutation is caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[x.name for x in TABLE], default=[],
                        help="these mutations")
    parser.add_argument("--list", action="store_true", help="names and mistakes, without running anything")
    args = parser.parse_args()
    chosen = [x for x in TABLE if x.name in args.only or not args.only]
    if args.list:
        print("\n".join(f"{x.name:18} {x.file:32} {x.what}" for x in chosen))
        return 0
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    for module in IMPORTED:
        importlib.import_module(module)
    passing, rows, wrong, begun = {}, [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        for done, mutation in enumerate(chosen, 1):
            problem, seconds = judge(mutation, Path(folder), passing)
            if problem:
                wrong.append(f"{mutation.name}: {problem}")
            else:
                rows.append(f"| {mutation.what} | `{mutation.file}` | `{mutation.test}` | {seconds:.1f} |")
            left = (time.monotonic() - begun) / done * (len(chosen) - done)
            print(f"{done}/{len(chosen)} {mutation.name}: {problem or f'caught in {seconds:.1f} s'}; about "
                  f"{left / 60:.0f} min left", file=sys.stderr, flush=True)
    print("\n".join(["| mutation | file | caught by | processor seconds |", "|---|---|---|--:|", *rows]))
    for line in wrong:
        print(f"not caught: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
