"""Generation: completions of prompts, token by token, until they end.

1. A rank decodes up to `rows` completions together. When some end, the next prompts take their place. Their tokens do
   not depend on what else is decoded: a token is drawn by a random number that is a hash of (seed, iteration, prompt,
   sample, step), as in rollouts (token_sampling.py). Samples of a prompt that comes again go on counting.
2. Every rank that shares the model keeps the same books (which completions are where, which have ended), from the
   tokens alone.
3. With pipeline stages, there is a batch for each stage, and the stages work on one batch after the other. The last
   stage announces the tokens it has drawn to all.

Suffixes: B prompts, R completions, S padded length, H hidden size, V vocabulary shard.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import device, temporary_elements, upload
from megatron_ebft.common.hashing import GOLDEN, mix64
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.model.attention import as_mask
from megatron_ebft.model.completion_cache import CompletionCache, NextTokenPattern, PromptPattern
from megatron_ebft.model.fp8 import FP8, quantised
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel.groups import is_first_stage, is_last_stage, pp_group, tp_group
from megatron_ebft.rollout.pipeline_link import PipelineLink
from megatron_ebft.rollout.stop_strings import StopStrings
from megatron_ebft.rollout.token_sampling import HEAD_ROWS, most_likely, sample, uniform

PROMPT_TOKENS = 1 << 14
"""Prompts pass through the model together up to this many tokens with padding, or one by one if they are longer."""


@dataclass(kw_only=True)
class GenerationConfig:
    """How completions are drawn, and how many decode together."""

    max_new_tokens: int
    temperature: float
    """0: the most likely token each time."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    seed: int = 1234
    num_samples: int = 1
    """Completions of each prompt."""
    end_ids: tuple[int, ...] = ()
    """A completion ends with one of these, which belongs to it."""
    stops: StopStrings | None = None
    """Texts that also end a completion."""
    rows: int = 64
    """Completions that decode together on a rank. Bounds the memory of the cache, does not change the result."""
    pad_to: int = 1
    """Sequences have a multiple of this many tokens (sequence parallelism, FP8)."""
    fp8: FP8 = FP8()

    def __post_init__(self):
        assert min(self.max_new_tokens, self.num_samples, self.rows, self.pad_to) >= 1 and self.temperature >= 0, self

    def is_end(self, tokens: list[int]) -> bool:
        """Whether a completion ends with its last token so far."""
        return tokens[-1] in self.end_ids or self.stops is not None and self.stops.has_come(tokens)

    def text(self, tokens: list[int], tokenizer: Tokenizer) -> str:
        """The text of a completion, without what has ended it."""
        text = tokenizer.completion_text(tokens[:-1] if tokens[-1] in self.end_ids else tokens)
        return text if self.stops is None else self.stops.cut(text)


@dataclass
class Completion:
    """What follows a prompt."""

    tokens: list[int] = field(default_factory=list)
    """With the end token, if one has ended it."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token, under softmax(logits / temperature) before top-p and top-k; at temperature 1 where that is 0."""
    finished: bool = False
    """Whether it has ended by itself, not by `max_new_tokens`."""


@torch.no_grad()
def generate(policy: list, prompts: list[list[int]], config: GenerationConfig, *, iteration: int = 0,
             occurrence: list[int] | None = None,
             watch: Callable[[int, int, Completion], None] = lambda *token: None) -> list[list[Completion]]:
    """Completions of this rank's prompts, `[prompt][sample]`, the same on every rank that shares the model.

    Data-parallel ranks may have different prompts, or none.

    Args:
        policy: stages as `build_policy` makes them, or a frozen model; left in the mode (train or eval) they were in.
        prompts: token ids; none may be empty.
        iteration: names the step in the random numbers.
        occurrence: how often each prompt has come before; it then draws other samples. None: each has not.
        watch: is called after every token with the prompt, the sample and the completion so far.
    """
    assert all(prompts), "a prompt without tokens predicts nothing"
    was_training = policy[0].training
    for chunk in policy:
        chunk.eval()
    stages = dist.get_world_size(pp_group())
    link = PipelineLink() if stages > 1 else None
    completions = [[Completion() for _ in range(config.num_samples)] for _ in prompts]
    rows = max(1, config.rows // stages)
    before = [config.num_samples * times for times in occurrence or [0] * len(prompts)]
    requests = [_Request(prompt, number, range(first, min(first + rows, config.num_samples)), before[number])
                for number, prompt in enumerate(prompts) for first in range(0, config.num_samples, rows)]
    requests.sort(key=lambda request: -len(request.prompt))  # rows of about one length, and little padding
    batches = [_Batch(policy, requests[i::stages], completions, config, rows, iteration, link) for i in range(stages)]
    is_running = True
    with quantised(policy, config.fp8):
        while is_running:
            for virtual in range(len(policy)):
                for batch in batches:
                    if virtual == 0:
                        batch.settle(watch)
                    if batch.current is not None:
                        batch.work(virtual)
            is_running = any(batch.current is not None for batch in batches)
    if link is not None:
        link.finish()
    for chunk in policy:
        chunk.train(was_training)
    return completions


@dataclass
class _Request:
    """Some completions of a prompt, as many as fit into a batch."""

    prompt: list[int]
    number: int
    samples: range
    before: int
    """Samples of earlier occurrences of the prompt."""

    def __post_init__(self):
        self.key = prompt_key(self.prompt)


@dataclass
class _Row:
    """A completion under way."""

    request: _Request
    sample: int
    completion: Completion

    @property
    def position(self) -> int:
        """Where its last token stands."""
        return len(self.request.prompt) + len(self.completion.tokens) - 1


@dataclass
class _Pass:
    """One pass through the model: over prompts, or over the last token of every completion."""

    rows: list[_Row]
    """Those that get a token."""
    pattern: PromptPattern | NextTokenPattern
    tokens_BS: Tensor
    positions_BS: Tensor
    prompt_R: Tensor
    """The row of the batch, and below the place in it, after which each completion's token is drawn."""
    place_R: Tensor


class _Batch:
    """Completions that decode together, and the requests that wait for a place."""

    def __init__(self, policy: list, requests: list[_Request], completions: list[list[Completion]],
                 config: GenerationConfig, rows: int, iteration: int, link: PipelineLink | None):
        self.policy, self.config, self.iteration, self.link = policy, config, iteration, link
        self.waiting, self.completions = deque(requests), completions
        self.rows = min(rows, sum(len(request.samples) for request in requests))
        self.active: list[_Row] = []
        """In the order of the cache's rows."""
        self.is_filling = True
        self.cache = CompletionCache(self.rows)
        self.current: _Pass | None = None
        self.drawn: Tensor | None = None

    # ------------------------------------------------------------ the books

    def settle(self, watch: Callable) -> None:
        """Write down what the current pass has drawn, and choose the next pass; None if all is done."""
        if self.current is not None:
            count = len(self.current.rows)
            drawn = self.drawn if is_last_stage() else self.link.hear((2, count), torch.float64)
            self._write_down(*drawn.tolist(), watch)
        self.current = self._enter(self._next_requests()) or self._next_tokens()

    def _write_down(self, tokens: list[float], log_probs: list[float], watch: Callable) -> None:
        first = len(self.active) - len(tokens)  # rows that have just entered are the last
        ended = []
        for i, (row, token, log_prob) in enumerate(zip(self.active[first:], tokens, log_probs, strict=True), first):
            completion = row.completion
            completion.tokens.append(int(token))
            completion.log_probs.append(log_prob)
            completion.finished = self.config.is_end(completion.tokens)
            watch(row.request.number, row.sample, completion)
            if completion.finished or len(completion.tokens) == self.config.max_new_tokens:
                ended.append(i)
        self.cache.remove(ended)
        for i in reversed(ended):
            last = self.active.pop()
            if i < len(self.active):
                self.active[i] = last

    def _next_requests(self) -> list[_Request]:
        """Requests to enter now. A pass over prompts holds the others up, so they enter when a quarter is free."""
        free = self.rows - len(self.active)
        self.is_filling = self.is_filling or 4 * free >= self.rows
        entering: list[_Request] = []
        while self.is_filling and self.waiting and len(self.waiting[0].samples) <= free:
            longest = len((entering or self.waiting)[0].prompt)  # they are sorted
            if entering and (len(entering) + 1) * longest > PROMPT_TOKENS:
                return entering
            entering.append(self.waiting.popleft())
            free -= len(entering[-1].samples)
        self.is_filling = False
        return entering

    # ------------------------------------------------------------ the passes

    def _enter(self, requests: list[_Request]) -> _Pass | None:
        if not requests:
            return None
        rows = [_Row(request, sample, self.completions[request.number][sample])
                for request in requests for sample in request.samples]
        self.active += rows
        length = self._padded(max(len(request.prompt) for request in requests))
        tokens_BS = torch.tensor([request.prompt + [0] * (length - len(request.prompt)) for request in requests])
        prompt_R = torch.tensor([i for i, request in enumerate(requests) for _ in request.samples])
        place_R = torch.tensor([row.position for row in rows])
        return _Pass(rows, PromptPattern(), upload(tokens_BS),
                     torch.arange(length, device=device()).expand(len(requests), -1), upload(prompt_R), upload(place_R))

    def _next_tokens(self) -> _Pass | None:
        if not self.active:
            return None
        rows, count = self.active, len(self.active)
        length = self._padded(count)
        last = torch.tensor([[row.completion.tokens[-1] for row in rows], [row.position for row in rows]])
        tokens_S, positions_S = upload(torch.nn.functional.pad(last, (0, length - count)))
        columns = max(row.position for row in rows) + 1
        self.cache.reserve(columns)
        return _Pass(list(rows), NextTokenPattern(self.cache, positions_S[:count], columns), tokens_S[None],
                     positions_S[None], torch.zeros(count, dtype=torch.int64, device=device()),
                     torch.arange(count, device=device()))

    def work(self, virtual: int) -> None:
        """The current pass through one of this rank's stages."""
        chunk, now = self.policy[virtual], self.current
        is_first, is_final = is_first_stage() and virtual == 0, virtual == len(self.policy) - 1
        if not is_first:
            unwrap(chunk).set_input_tensor(self._receive(unwrap(chunk).config))
        readout = self._readout() if is_last_stage() and is_final else None
        out = chunk(now.tokens_BS if is_first else None, now.positions_BS, as_mask(now.pattern), readout=readout)
        unwrap(chunk).set_input_tensor(None)
        if is_final and isinstance(now.pattern, PromptPattern):
            self.cache.add(now.pattern, now.prompt_R, self._columns(now.rows))
        if readout is None:
            self.link.send(out)
            return
        self.drawn = torch.stack([x.double() for x in out])
        if self.link is not None:
            self.link.announce(self.drawn)

    def _receive(self, config) -> Tensor:
        """Hidden states of the previous stage, [S (/tp), B, H]."""
        batch, length = self.current.tokens_BS.shape
        if config.sequence_parallel:
            length //= dist.get_world_size(tp_group())
        return self.link.receive((length, batch, config.hidden_size), config.params_dtype)

    def _padded(self, length: int) -> int:
        return -(-length // self.config.pad_to) * self.config.pad_to

    def _columns(self, rows: list[_Row]) -> int:
        """Columns to begin with: for the prompts and a first part of what follows them."""
        return max(self._padded(len(row.request.prompt)) for row in rows) + min(256, self.config.max_new_tokens)

    def _readout(self) -> "_NextTokens":
        rows, now = self.current.rows, self.current
        key_R, sample_R, step_R = upload(torch.tensor(
            [[row.request.key, row.request.before + row.sample, len(row.completion.tokens)] for row in rows])).unbind(1)
        numbers_R = uniform(self.config.seed, self.iteration, key_R, 0, sample_R, step_R)
        return _NextTokens(now.place_R, now.prompt_R, numbers_R, self.config)


@dataclass
class _NextTokens:
    """Readout: the next token of each completion, int64 [R], and its log-probability, float32 [R]."""

    place_R: Tensor
    prompt_R: Tensor
    numbers_R: Tensor
    config: GenerationConfig

    def __call__(self, hidden_SBH: Tensor, model) -> tuple[Tensor, Tensor]:
        hidden_RH = model.select_rows(hidden_SBH, slice(None))[self.place_R, self.prompt_R]
        size = max(HEAD_ROWS, temporary_elements() // model.vocab_shard)
        parts = [self._choose(model.row_logits(hidden_RH[i : i + size]), self.numbers_R[i : i + size], model)
                 for i in range(0, len(hidden_RH), size)]
        return tuple(torch.cat(x) for x in zip(*parts))

    def _choose(self, logits_RV: Tensor, numbers_R: Tensor, model) -> tuple[Tensor, Tensor]:
        config, group = self.config, model.pg_collection.tp
        if config.temperature == 0:
            return most_likely(logits_RV, model.num_real_ids, group)
        drawn = sample(logits_RV, model.num_real_ids, numbers_R[:, None], config.temperature, config.top_p,
                       config.top_k, group)
        return drawn[0].squeeze(1), drawn[1].squeeze(1)


def prompt_key(prompt: list[int]) -> int:
    """A 64-bit hash of a prompt's ids."""
    ids = torch.tensor(prompt, dtype=torch.int64)
    place = mix64(torch.arange(len(ids)) + GOLDEN)
    return int(mix64(mix64(ids + place).sum() + len(ids)))
