"""MultiGrid: decoders of a text and of axes aligned with its tokens, which read each other in every layer.

Model and head. Layers are in `multigrid_blocks.py`, mixers in `multigrid_cores.py`, the context of a forward pass in
`multigrid_context.py`, adding and removing axes in `multigrid_growth.py`. The prototype is the Metadata-Enhanced-Transformer
notebook, on nanoGPT. Without axes MultiGrid is GPT-2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.cache_mixins import CustomCacheMixin
from ..common.losses import IGNORE_INDEX, causal_lm_loss, check_labels, require_labels
from ..common.model_inputs import (
    apply_mask_to_padding_states,
    check_ids,
    check_position_range,
    embed_ids,
    embed_text,
    mask_of_new_tokens,
    token_mask,
)
from ..common.packing import segment_ids as find_segments
from ..common.plain_modules import may_step
from ..common.transformers_versions import CACHE, slice_logits_to_keep, with_cache_argument, with_cache_field
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .configuration_multigrid import MultiGridConfig
from .generation_multigrid import MultiGridGenerationMixin
from .multigrid_blocks import MultiGridBlock, MultiGridLayer, MultiGridMLP, NextAxesBlock, shift_axis_ids
from .multigrid_cache import MultiGridCache, StaticMultiGridCache
from .multigrid_context import add_causal_mask, make_context
from .multigrid_cores import TransformerCore, grouped_norm, leap_config
from .multigrid_growth import MultiGridGrowthMixin
from .multigrid_step import describe_layers, step_layers


# What `multigrid_step.py` computes in one call for a token.
_FORWARDS: dict[type, Callable] = {
    kind: kind.forward
    for kind in (
        MultiGridLayer,
        MultiGridBlock,
        MultiGridMLP,
        TransformerCore,
        TransformerCore.self_mixer,
        TransformerCore.cross_mixer,
    )
}


@auto_docstring(
    custom_intro="""
    Output of the base model.
    """
)
@dataclass
@with_cache_field
class MultiGridModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        The main stream, normalised.
    past_key_values (`MultiGridCache` or `StaticMultiGridCache`, *optional*):
        Cache for further tokens.
    hidden_states (`tuple`, *optional*):
        The main stream before the first layer and after each, the last as `last_hidden_state`.
    attentions (`tuple`, *optional*):
        Weights of self-attention in each layer, `[batch_size, heads, sequence_length, keys]`: heads of the main stream, then
        of each axis (`core="transformer"` only).
    axis_hidden_states (`torch.FloatTensor` of shape `(batch_size, axes, sequence_length, axis_hidden_size)`, *optional*):
        The axis streams, normalised.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: MultiGridCache | StaticMultiGridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    axis_hidden_states: torch.Tensor | None = None


@auto_docstring(
    custom_intro="""
    Output of the language model, with the loss and the scores of every axis.
    """
)
@dataclass
@with_cache_field
class MultiGridCausalLMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        `main_loss_weight * main_loss + (1 - main_loss_weight) * mean of axis_losses`; the main loss without axes.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Scores of the next main token. In the factored order, given the next axis ids.
    past_key_values (`MultiGridCache` or `StaticMultiGridCache`, *optional*):
        Cache for further tokens.
    hidden_states (`tuple`, *optional*):
        As from the base model.
    attentions (`tuple`, *optional*):
        As from the base model.
    main_hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
        In the factored order: the main stream before the next axis ids are known, for `main_logits`.
    axis_logits (`tuple`, *optional*):
        Scores of the next id of each axis, `[batch_size, sequence_length, axis_vocab_sizes[a]]`.
    main_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross-entropy of the next main token. In the factored order the code length of the text is the sum of this and all
        `axis_losses`.
    axis_losses (`tuple`, *optional*):
        Cross-entropy of the next id of each axis, in the order of `axis_names`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: MultiGridCache | StaticMultiGridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    main_hidden_states: torch.Tensor | None = None
    axis_logits: tuple[torch.Tensor, ...] | None = None
    main_loss: torch.Tensor | None = None
    axis_losses: tuple[torch.Tensor, ...] | None = None


@auto_docstring
class MultiGridPreTrainedModel(AutoMappingMixin, CustomCacheMixin, PreTrainedModel):
    config: MultiGridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MultiGridLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MultiGridLayer}
    _cache_classes = {"dynamic": MultiGridCache, "static": StaticMultiGridCache}

    def __init__(self, config: MultiGridConfig, *args, **kwargs):
        config.complete()
        super().__init__(config, *args, **kwargs)
        self._is_stateful = config.core != "transformer"  # recurrent states cannot be cropped

    def _cache_layers(self, cache):
        """See `CustomCacheMixin._cache_layers`: layers of the self blocks, then, with axes, of the cross blocks."""
        layers = self.base_model.layers
        cores = [*(layer.core for layer in layers), *(layer.cross_core for layer in layers if self.config.num_axes)]
        return [core.cache_states(cache) for core in cores]


@auto_docstring
class MultiGridModel(MultiGridPreTrainedModel):
    def __init__(self, config: MultiGridConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.axis_embed_tokens = nn.ModuleList(
            nn.Embedding(size, config.axis_hidden_size) for size in config.axis_vocab_sizes
        )
        if config.core == "leap":
            heads = leap_config(config, config.num_attention_heads)
            self.rotary_emb = LlamaRotaryEmbedding(heads)  # type: ignore[arg-type]  # reads what it shares with Llama's
        elif config.core == "transformer":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.axis_embed_positions = None  # streams of equal width share the table
            if config.num_axes and config.axis_hidden_size != config.hidden_size:
                self.axis_embed_positions = nn.Embedding(config.max_position_embeddings, config.axis_hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(MultiGridLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.axis_norms = nn.ModuleList(
            nn.LayerNorm(config.axis_hidden_size, eps=config.layer_norm_eps) for _ in config.axis_names
        )
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]  # `TransformersKwargs` lists some of these arguments, too
        self,
        input_ids: torch.Tensor | None = None,
        axis_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MultiGridCache | StaticMultiGridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultiGridModelOutput:
        r"""
        axis_ids (`torch.LongTensor` of shape `(batch_size, axes, sequence_length)`, *optional*):
            Token of each axis at each position, in the order of `config.axis_names`. Required with axes.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row. Restarting `position_ids` mean the same.
        """
        reject_unused_kwargs(self, kwargs, cu_seq_lens_q)
        config = self.config
        main = self.embed(input_ids, inputs_embeds)
        meta = self.embed_axes(axis_ids, main.shape[:2])
        asked, use_cache = use_cache, config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if past_key_values is not None:
            self.check_cache(past_key_values, main)
        elif self.starts_cache(asked):
            past_key_values = MultiGridCache(config)
        rotary_emb = self.rotary_emb if config.core == "leap" else None
        rows = (attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        context = make_context(config, main, *rows, past_key_values, bool(output_attentions), rotary_emb)
        main = apply_mask_to_padding_states(main, context.padding_mask)
        meta = None if meta is None else apply_mask_to_padding_states(meta, context.padding_mask)
        if config.core == "transformer":
            longest = _longest_text(past_key_values, main.shape[1])
            may_be_out = position_ids is not None or longest > config.max_position_embeddings
            main, meta = self._add_positions(main, meta, context.position_ids, may_be_out)
        main, meta = self.dropout(main), None if meta is None else self.dropout(meta)

        attentions, layers = [], list(self.layers)
        stepped = self._step(main, meta, context, past_key_values)
        if stepped is not None:
            (main, meta), layers = stepped, []
        elif config.core == "transformer":
            add_causal_mask(context, config, main, past_key_values)
        for layer in layers:
            main, meta, weights = layer(main, meta, context=context, **{CACHE: past_key_values})
            attentions.append(weights)
        if past_key_values is not None:
            context.advance(past_key_values, main.shape[1], main.device)
            past_key_values.keep_mask(context.token_mask, *main.shape[:2])
        return MultiGridModelOutput(
            last_hidden_state=self.norm(main),
            **{CACHE: past_key_values if use_cache else None},  # type: ignore[arg-type]
            attentions=tuple(attentions) if output_attentions and attentions[0] is not None else None,
            axis_hidden_states=None if meta is None else grouped_norm(list(self.axis_norms), meta).transpose(0, 1),
        )

    def _step(self, main, meta, context, cache):
        """The streams after all layers, computed in one call for a token, or `None`."""
        if cache is None or context.is_first or main.shape[1] != 1:
            return None
        if context.padding_mask is not None or context.output_attentions:
            return None
        known = self._describe_layers() if may_step(main, self.config, cache.max_cache_len is not None) else None
        return None if known is None else step_layers(self.layers, known, main, meta, context, cache)

    @torch.compiler.assume_constant_result  # so that a graph is not broken by what the layers are asked
    def _describe_layers(self):
        return describe_layers(self.layers, self.config, _FORWARDS)

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeddings `[batch, seq, hidden_size]` of the main axis. Raises `TypeError` and `ValueError` for bad input."""
        return embed_text(self.embed_tokens, input_ids, inputs_embeds, self.config.hidden_size)

    def embed_axes(self, axis_ids: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Embeddings `[axes, batch, seq, axis_hidden_size]` of the axes, `None` without axes.

        Args:
            axis_ids (`torch.LongTensor` of shape `[batch, axes, seq]`, *optional*).
            shape (`tuple[int, int]`): batch and seq of the main axis.

        Raises:
            TypeError: for ids that are no integers.
            ValueError: where they are missing, do not align with the main axis, or are outside of an axis's vocabulary.
        """
        names = self.config.axis_names
        expected = [shape[0], len(names), shape[1]]
        if axis_ids is None:
            if names:
                raise ValueError(f"`axis_ids` must be given, {expected}: a token of each of the axes {names}.")
            return None
        check_ids("axis_ids", axis_ids)
        if list(axis_ids.shape) != expected:
            raise ValueError(
                f"`axis_ids` must be [batch, axes, seq] = {expected}, aligned with the main axis, got "
                f"{list(axis_ids.shape)} (axes: {names})."
            )
        if not names:
            return None
        tables = zip(self.axis_embed_tokens, axis_ids.unbind(1), names)
        return torch.stack(
            [embed_ids(table, ids, f"`axis_ids` of axis {name!r}") for table, ids, name in tables]  # type: ignore[arg-type]
        )

    def _add_positions(self, main, meta, position_ids, may_be_out):
        limit = self.config.max_position_embeddings
        remedy = "Cores 'leap' and 'lstm' have no such bound."
        if may_be_out and position_ids.device.type != "cpu":  # on a CPU the embedding checks
            check_position_range(position_ids, limit, remedy)
        try:
            main = main + self.embed_positions(position_ids)
        except IndexError:
            check_position_range(position_ids, limit, remedy)
            raise
        if meta is not None:
            table = self.embed_positions if self.axis_embed_positions is None else self.axis_embed_positions
            meta = meta + table(position_ids)
        return main, meta


def _longest_text(cache, seq):
    """The most tokens that a text may have after `seq` more, without reading the count of a static cache."""
    if cache is None:
        return seq
    return cache.get_seq_length() + seq if cache.max_cache_len is None else cache.max_cache_len


@auto_docstring
class MultiGridForCausalLM(MultiGridPreTrainedModel, MultiGridGrowthMixin, MultiGridGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MultiGridConfig):
        super().__init__(config)
        self.model = MultiGridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.axis_lm_heads = nn.ModuleList(
            nn.Linear(config.axis_hidden_size, size, bias=False) for size in config.axis_vocab_sizes
        )
        is_factored = config.axis_order == "factored" and config.num_axes > 0
        self.next_axes = NextAxesBlock(config) if is_factored else None
        self.loss_type, self.loss_function = "ForCausalLM", causal_lm_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]  # `TransformersKwargs` lists some of these arguments, too
        self,
        input_ids: torch.Tensor | None = None,
        axis_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MultiGridCache | StaticMultiGridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        axis_targets: torch.Tensor | None = None,
        next_axis_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultiGridCausalLMOutput:
        r"""
        axis_ids (`torch.LongTensor` of shape `(batch_size, axes, sequence_length)`, *optional*):
            Token of each axis at each position, in the order of `config.axis_names`. Required with axes.
        axis_targets (`torch.LongTensor` of shape `(batch_size, axes, sequence_length)`, *optional*):
            Targets of the axes, aligned like `labels` or `shift_labels`. Defaults to `axis_ids`, ignored where those are -100.
        next_axis_ids (`torch.LongTensor` of shape `(batch_size, axes)`, *optional*):
            In the factored order, the axis ids after the last position, on which the logits there are conditioned.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row.
        """
        of_loss = pop_kwargs(kwargs, "num_items_in_batch", "shift_labels")
        if next_axis_ids is not None and self.next_axes is None:
            raise ValueError("`next_axis_ids` need axis_order='factored' and at least one axis.")
        rows = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
        is_first = not getattr(past_key_values, "has_tokens", False)  # caches of other classes are refused below
        outputs = self.model(
            input_ids=input_ids,
            axis_ids=axis_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **rows,
            **kwargs,
        )
        main = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        if self.next_axes is None:
            logits = self.lm_head(main)
        else:
            states, past = outputs.last_hidden_state, 0
            if not is_first:
                past = past_key_values.get_seq_length() - states.shape[1]  # type: ignore[union-attr]
            shifted = self._next_axis_ids(
                axis_ids, next_axis_ids, states, past, is_first, logits_to_keep, attention_mask, **rows
            )
            logits = self.main_logits(main, *shifted)
        axis_logits = self._axis_logits(outputs.axis_hidden_states, logits_to_keep)
        losses = self._losses(logits, axis_logits, labels, axis_ids, axis_targets, **of_loss)
        return MultiGridCausalLMOutput(
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            main_hidden_states=None if self.next_axes is None else main,
            axis_logits=axis_logits,
            **losses,
        )

    def _axis_logits(self, axis_hidden_states, logits_to_keep):
        if axis_hidden_states is None:
            return None
        states = axis_hidden_states.unbind(1)
        return tuple(head(slice_logits_to_keep(x, logits_to_keep)) for head, x in zip(self.axis_lm_heads, states))

    def _next_axis_ids(self, axis_ids, next_axis_ids, states, past, is_first, logits_to_keep, attention_mask, **rows):
        """What `shift_axis_ids` returns for the rows of a pass after `past` tokens, at the positions of the logits."""
        mask = mask_of_new_tokens(token_mask(attention_mask, states, past), states.shape[1])
        # A pass that continues a cache has no packed sequences.
        segments = find_segments(states, mask, **rows) if is_first else None
        next_ids, known = shift_axis_ids(axis_ids, next_axis_ids, mask, segments)
        next_ids = slice_logits_to_keep(next_ids.transpose(1, 2), logits_to_keep).transpose(1, 2)
        return next_ids, slice_logits_to_keep(known.unsqueeze(-1), logits_to_keep).squeeze(-1)

    def main_logits(
        self, main_hidden_states: torch.Tensor, next_axis_ids: torch.Tensor, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores of the next main token given the next axis ids, in the factored order.

        Args:
            main_hidden_states (`torch.Tensor` of shape `[batch, seq, hidden_size]`): of a forward pass's output.
            next_axis_ids (`torch.LongTensor` of shape `[batch, axes, seq]`): axis ids after each position.
            known (`torch.BoolTensor` of shape `[1 or batch, seq]`, *optional*): where it is known. Defaults to everywhere.

        Returns:
            `torch.Tensor` of shape `[batch, seq, vocab_size]`.

        Raises:
            ValueError: in the parallel order, and for ids of another shape or outside of an axis's vocabulary.
        """
        if self.next_axes is None:
            raise ValueError("`main_logits` needs axis_order='factored' and at least one axis.")
        names = self.config.axis_names
        expected = [main_hidden_states.shape[0], len(names), main_hidden_states.shape[1]]
        if list(next_axis_ids.shape) != expected:
            raise ValueError(
                f"`next_axis_ids` must be [batch, axes, seq] = {expected}, got {list(next_axis_ids.shape)}."
            )
        tables = zip(self.model.axis_embed_tokens, next_axis_ids.unbind(1), names)
        embeds = [embed_ids(table, ids, f"`next_axis_ids` of axis {name!r}") for table, ids, name in tables]
        return self.lm_head(self.next_axes(main_hidden_states, embeds, known))

    def _losses(self, logits, axis_logits, labels, axis_ids, axis_targets, shift_labels=None, **kwargs):
        """The loss and its parts, none without labels. `num_items_in_batch` counts main tokens, for all parts.

        `shift_labels` are aligned with the logits, and then so are `axis_targets`.
        """
        if axis_logits is not None:
            require_labels(labels, kwargs.get("num_items_in_batch"), "the axes learn with them")
        if labels is None:
            return {}

        def loss(logits, targets, vocab_size):
            shifted = None if shift_labels is None else targets.contiguous()
            return self.loss_function(
                logits=logits, labels=targets, vocab_size=vocab_size, shift_labels=shifted, **kwargs
            )

        config, targets = self.config, labels if shift_labels is None else shift_labels
        main_loss = loss(logits, targets, config.vocab_size)
        if axis_logits is None:
            return {"loss": main_loss, "main_loss": main_loss}
        if axis_targets is None:
            if shift_labels is not None:
                axis_ids = nn.functional.pad(axis_ids[:, :, 1:], (0, 1), value=IGNORE_INDEX)
            axis_targets = axis_ids.masked_fill((targets == IGNORE_INDEX).unsqueeze(1), IGNORE_INDEX)
        else:
            check_labels("axis_targets", axis_targets, axis_ids.shape)
            self._check_axis_targets(axis_targets)
        axis_losses = tuple(map(loss, axis_logits, axis_targets.unbind(1), config.axis_vocab_sizes))
        share = config.main_loss_weight
        whole = share * main_loss + (1 - share) * sum(axis_losses) / len(axis_losses)
        return {"loss": whole, "main_loss": main_loss, "axis_losses": axis_losses}

    def _check_axis_targets(self, axis_targets):
        if axis_targets.device.type != "cpu" or is_tracing(axis_targets):
            return  # reading a value would synchronize the device
        sizes = torch.tensor(self.config.axis_vocab_sizes).unsqueeze(-1)
        wrong = (axis_targets >= sizes) | ((axis_targets < 0) & (axis_targets != IGNORE_INDEX))
        if wrong.any():
            axis = int(wrong.nonzero()[0, 1])
            raise ValueError(
                f"`axis_targets` of axis {self.config.axis_names[axis]!r} must be in [0, {self.config.axis_vocab_sizes[axis]}) or "
                f"{IGNORE_INDEX}, got {int(axis_targets[wrong][0])}."
            )


__all__ = [
    "MultiGridCausalLMOutput",
    "MultiGridForCausalLM",
    "MultiGridModel",
    "MultiGridModelOutput",
    "MultiGridPreTrainedModel",
]
