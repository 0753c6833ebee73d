"""The log of a run: one console line per step, values for the sinks, and samples of rollouts beside gold text.

Rank 0 writes; on other ranks every call does nothing.
"""

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.progress import Progress, clock
from megatron_ebft.method.evaluation import EvaluationRollouts
from megatron_ebft.run.sinks.sink import Sink, Values

CONSOLE = {"loss": "loss {:.4f}", "ce_loss": "ce {:.4f}", "reward": "reward {:+.4f}", "alignment": "align {:.4f}",
           "diversity": "div {:.4f}", "cfm": "cfm {:.4f}", "entropy": "H {:.2f}", "grad_norm": "grad {:.3f}",
           "lr": "lr {:.2e}"}
RLVR_CONSOLE = {"loss": "loss {:.4f}", "reward": "reward {:.4f}", "success": "right {:.1%}",
                "zero_spread": "no spread {:.1%}", "length": "length {:.1f}", "finished": "finished {:.1%}",
                "kl_loss": "kl {:.4f}", "entropy": "H {:.2f}", "grad_norm": "grad {:.3f}", "lr": "lr {:.2e}"}
EVALUATION = {"ce_loss": "ce {:.4f}", "cfm": "cfm {:.4f}", "alignment": "align {:.4f}", "kl_to_start": "kl {:.4f}",
              "entropy": "H {:.2f}", "answers/accuracy": "right {:.1%}", "answers/score": "score {:.4f}"}
SHOWN_BLOCKS, SHOWN_CONTEXT = 3, 32
"""Blocks shown at an evaluation, and tokens of context before each."""


class Logger:
    """Console and sinks of one run.

    Args:
        sinks: where values go (sinks/build.py); none on other ranks than 0.
        tokens_per_step: gold tokens of a global batch. In rlvr, a step says how many tokens it has drawn.
        rollout_length: G. Evaluations report CFM and alignment at this completion length.
    """

    def __init__(self, sinks: list[Sink], train_iters: int, tokens_per_step: int, rollout_length: int, tokenizer):
        self.is_main = dist.get_rank() == 0
        self.sinks, self.failing = sinks, set()
        self.train_iters, self.tokens_per_step = train_iters, tokens_per_step
        self.rollout_length, self.tokenizer = rollout_length, tokenizer
        self.durations: list[float] = []
        self.flush()  # opens their files

    def print(self, line: str) -> None:
        """Print a line on rank 0's console."""
        if self.is_main:
            print(line, flush=True)

    def record(self, iteration: int, scalars: dict[str, float] | None = None,
               texts: dict[str, str | None] | None = None, histograms: dict[str, Tensor] | None = None,
               images: dict[str, Tensor] | None = None, flush: bool = False) -> None:
        """Give values to every sink. Values of a sink that cannot be written are lost with a warning, and the run goes
        on.

        Args:
            iteration: of these values, at least that of the last ones.
            texts, histograms, images: as in `Values`; a text of None is none.
        """
        if not (scalars or texts or histograms or images):
            return
        texts = {name: text for name, text in (texts or {}).items() if text is not None}
        values = Values(iteration=iteration, scalars=scalars or {}, texts=texts, histograms=histograms or {},
                        images=images or {})
        for sink in self.sinks:
            with self._going_on(sink):
                sink.write(values)
                if flush:
                    sink.flush()
                self.failing.discard(sink)

    def flush(self) -> None:
        """Write all values to disk: those before a checkpoint must not be lost with the process."""
        for sink in self.sinks:
            with self._going_on(sink):
                sink.flush()

    @contextlib.contextmanager
    def _going_on(self, sink: Sink):
        """Warn, once, where a sink cannot be written."""
        try:
            yield
        except OSError as error:
            if sink not in self.failing:
                self.print(f"warning: {sink.where}: cannot be written ({error}); values are lost until that is "
                           "possible again. Training goes on")
            self.failing.add(sink)

    def progress(self, what: str, items: list) -> Iterator:
        """Iterate over the items, and print a line with the time left every 10 seconds."""
        progress = Progress(what, len(items), self.print)
        for item in items:
            yield item
            progress.tick()

    def step(self, iteration: int, metrics: dict[str, float], seconds: dict[str, float], duration: float,
             totals: dict[str, float]) -> None:
        """Log one training step.

        Args:
            seconds: by phase.
            duration: seconds of the whole step.
            totals: of the run so far.
        """
        if not self.is_main:
            return
        self.durations = [*self.durations[-19:], duration]
        left = (self.train_iters - iteration) * sum(self.durations) / len(self.durations)
        tokens = metrics.get("tokens", self.tokens_per_step)
        self.record(iteration, {
            **{f"train/{name}": value for name, value in metrics.items()},
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **{f"run/{name}": value for name, value in totals.items()},
            "seconds/step": duration, "train/tokens_per_second": tokens / duration})
        console = RLVR_CONSOLE if "success" in metrics else CONSOLE
        numbers = " ".join(form.format(metrics[name]) for name, form in console.items() if name in metrics)
        if not metrics.get("valid_blocks", "loss" in metrics):
            numbers = f"no {'block' if 'valid_blocks' in metrics else 'token'} counts | {numbers}"
        phases = " ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value >= 0.005)
        self.print(f"step {iteration}/{self.train_iters} | {numbers} | {phases} | {duration:.2f}s "
                   f"{tokens / duration:.0f} tok/s | left {clock(left)}")

    def evaluation(self, iteration: int, metrics: dict[str, float], shown: EvaluationRollouts | None,
                   seconds: float, answers: str | None = None) -> None:
        """Log one evaluation, which took `seconds`.

        Args:
            shown: rollouts to print beside the gold text, or None.
            answers: Markdown of answers to questions, or None.
        """
        if not self.is_main:
            return
        texts = {"rollouts": None if shown is None else self._rollout_text(shown), "answers": answers}
        self.record(iteration, {f"eval/{name}": value for name, value in metrics.items()}, texts, flush=True)
        numbers = " ".join(form.format(metrics[name]) for name, form in EVALUATION.items() if name in metrics)
        numbers += "".join(f" {name.removeprefix('answers/')} {value:.4g}" for name, value in metrics.items()
                           if name.startswith(("answers/pass@", "answers/bleu", "answers/chrf")))
        if shown is not None and "alignment" not in metrics:
            numbers = f"no block counts at {self.rollout_length} tokens | {numbers}"
        self.print(f"eval {iteration}/{self.train_iters} | {numbers} | {clock(seconds)}")

    def _rollout_text(self, shown: EvaluationRollouts) -> str:
        """Markdown of context, gold completion and rollouts with their rewards, for a few blocks of the first row."""
        layout, tokens = shown.layout, shown.gold.tokens_BT[0]
        blocks = range(0, layout.num_blocks, max(1, layout.num_blocks // SHOWN_BLOCKS))
        completions = layout.completion_index()
        sections = []
        for block in list(blocks)[:SHOWN_BLOCKS]:
            anchor, rewards = int(completions[block, 0]), shown.reward_BKN[0, block].tolist()
            counts = "" if shown.valid_BK[0, block] else f" (at {self.rollout_length} tokens it does not count)"
            sections.append(f"### Block {block}, from token {anchor} on{counts}")
            sections.append(f"**context** …{self._code(tokens[max(0, anchor - SHOWN_CONTEXT):anchor])}")
            sections.append(f"**gold**{self._code(tokens[completions[block].to(tokens.device)])}")
            for reward, sample in zip(rewards, shown.rollouts.tokens_BKNG[0, block], strict=True):
                sections.append(f"**rollout**, reward {reward:+.4f} at {self.rollout_length} tokens"
                                f"{self._code(sample)}")
        return "\n\n".join(sections)

    def _code(self, ids) -> str:
        return "\n```\n" + self.tokenizer.detokenize(ids.tolist()) + "\n```"

    def close(self, start: float, is_done: bool = True) -> None:
        """Print the last line and close the files. A run that fails calls `flush` instead.

        Args:
            start: time.perf_counter() at the start of the run.
        """
        for sink in self.sinks:
            with self._going_on(sink):
                sink.close()
        self.print(f"{'done' if is_done else 'stopped'} in {clock(time.perf_counter() - start)}")
