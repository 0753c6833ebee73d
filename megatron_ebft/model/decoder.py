"""The transformer: embedding, Megatron-Core's layers, final norm, and a readout of the final hidden states.

Megatron-Core's GPTModel is not used: from 0.19 on it gets critical fixes only, it computes rotary angles from the
length of a sequence, and it returns logits or a loss. The names in checkpoints are GPTModel's.

1. Positions are explicit. Each stage computes the rotary angles of a pass once (`PositionRotary`); its core attentions
   get them together with the pattern (attention.py).
2. The caller says what to compute from the final hidden states, by a readout (log_probabilities.py). So the output head
   runs only on the tokens that need it, and logits of the whole vocabulary never leave the model.
3. A model may be cut above any layer: a stage without `post_process` returns its hidden states. That is the encoder.

Suffixes: B rows, S row length, H hidden size, V vocabulary shard, R rows of hidden states.
"""

import math
from collections.abc import Callable

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from megatron_ebft.common.device import device
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.attention import as_mask
from megatron_ebft.model.rotary import Angles, angles


class PositionRotary(torch.nn.Module):
    """Rotary angles at explicit positions, with Llama 3's frequency scaling where the architecture has it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = int(args.kv_channels * args.rotary_percent)
        inv_freq = 1.0 / args.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        if args.use_rope_scaling:
            inv_freq = _llama3_scaling(inv_freq, args)
        self.inv_freq = inv_freq.to(device())

    def forward(self, positions_BS: Tensor) -> Angles:
        return angles(positions_BS, self.inv_freq)


def _llama3_scaling(inv_freq: Tensor, args: ModelArgs) -> Tensor:
    """Llama 3.1's rotary scaling: long wavelengths are divided by the factor, with a ramp between two cut-offs."""
    turns = args.rope_original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / args.rope_scaling_factor)


Readout = Callable[[Tensor, "Decoder"], Tensor | tuple[Tensor, ...]]
"""Called with the final hidden states [S, B, H] (with sequence parallelism this rank's part of S) and the model; a
forward pass returns what it returns."""


class Decoder(LanguageModule):
    """One pipeline stage of a decoder-only transformer.

    Megatron-Core's schedules, its gradient reduction and its optimizer read the attributes `pre_process`,
    `post_process`, `share_embeddings_and_output_weights`, `vp_stage`, `model_type` and `decoder`, and call
    `set_input_tensor` and `shared_embedding_or_output_weight` (LanguageModule's).
    """

    def __init__(self, args: ModelArgs, config: TransformerConfig, layers: TransformerBlockSubmodules, *,
                 pre_process: bool, post_process: bool, share_embeddings_and_output_weights: bool,
                 vp_stage: int | None):
        """
        Args:
            layers: the layers of this stage and the kind of its norms.
            pre_process: whether the stage has the embedding.
            post_process: whether it has the final norm, the output head and the readout.
            share_embeddings_and_output_weights: whether the output head uses the embedding's weights; the same for all
                stages of a model.
            vp_stage: number of the virtual stage; None without virtual stages.
        """
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.vocab_size, self.real_vocab_size = args.padded_vocab_size, args.vocab_size
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config, vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings,
                position_embedding_type=args.position_embedding_type, tp_group=self.pg_collection.tp)
        self.decoder = TransformerBlock(config=config, spec=layers, pre_process=pre_process, post_process=post_process,
                                        pg_collection=self.pg_collection, vp_stage=vp_stage)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size, args.padded_vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=False, tp_group=self.pg_collection.tp,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        for module in self.modules():
            if hasattr(module, "finish_init"):  # up to 0.17, layers of Transformer Engine do not run without it
                module.finish_init(None)
        self.rotary = PositionRotary(args) if args.position_embedding_type == "rope" else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Hand over the previous stage's hidden states; Megatron-Core's schedules pass them in a list of one."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, tokens_BS: Tensor | None, positions_BS: Tensor, attention_mask: Tensor, *,
                readout: Readout | None = None):
        """One pass through this stage.

        Args:
            tokens_BS: token ids, int64; used by the first stage alone.
            positions_BS: position ids, int64.
            attention_mask: `as_mask` of a pattern.
            readout: needed with `post_process`; other stages ignore it.

        Returns:
            With `post_process` the result of the readout, otherwise hidden states [S, B, H].
        """
        if self.rotary is not None:
            attention_mask = as_mask(attention_mask.pattern, self.rotary(positions_BS))
        hidden_SBH = _usual_strides(self.embedding(tokens_BS, positions_BS)) if self.pre_process else None
        hidden_SBH = self.decoder(hidden_states=hidden_SBH, attention_mask=attention_mask)
        return readout(hidden_SBH, self) if self.post_process else hidden_SBH

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """LanguageModule's, without the extra state of the head: it is empty, and GPTModel's checkpoints have none."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)
        assert not (extra and extra.data), extra
        return state

    @property
    def vocab_shard(self) -> int:
        """Columns of this rank's logits."""
        return self.vocab_size // self.pg_collection.tp.size()

    @property
    def num_real_ids(self) -> int:
        """How many of this rank's columns are token ids. The columns after them are padding: they have probability 0,
        and no readout may read them."""
        first = self.pg_collection.tp.rank() * self.vocab_shard
        return min(max(self.real_vocab_size - first, 0), self.vocab_shard)

    def head(self, hidden_SBH: Tensor) -> Tensor:
        """Logits [S, B, V] of this rank's vocabulary shard, differentiable."""
        return self.output_layer(hidden_SBH, weight=self._tied_weight())[0]

    def select_rows(self, hidden_SBH: Tensor, rows: Tensor | slice) -> Tensor:
        """Hidden states [P, B, H] at these P of the S places of the whole sequence, without gradient."""
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.pg_collection.tp)
        return hidden_SBH[rows]

    def row_logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] of this rank's vocabulary shard, without gradient."""
        tied = self._tied_weight()
        return linear(hidden_RH, self.output_layer.weight if tied is None else tied)

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None


def _usual_strides(embedded_SBH: Tensor) -> Tensor:
    """The same view of memory with the strides of a fresh tensor.

    For B = 1 a transposed embedding counts as contiguous, whatever the stride of that dimension. The stride would pass
    down the residual stream, and torch.matmul would then multiply by a frozen weight token by token, and copy the
    weight for each.
    """
    return embedded_SBH.flatten(0, 1).unflatten(0, embedded_SBH.shape[:2])
