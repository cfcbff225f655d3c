"""The hierarchical LM: decoders of the same text at several resolutions, which are merged in every layer.

Model and head. Layers are in `hierarchical_block.py`, the context of a forward pass in `stream_plan.py`, pads and packed rows
in `token_layout.py`, auxiliary losses in `auxiliary_losses.py`. The prototype is `simple-hierarchical-transformer` on PyPI.
Compression with strides follows Hourglass (arXiv 2110.13711).

A stream with factor `c` and stride `s` has a step for every `s`-th token. Step `k` is made of tokens up to `k * s`. A token
reads the last step that is made of no later tokens. Attention and token shift have a dilation of `c / s` steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.cache_mixins import CompiledStepMixin, CustomCacheMixin
from ..common.losses import causal_lm_loss, require_labels
from ..common.model_inputs import apply_mask_to_padding_states, embed_text, has_dynamic_shapes
from ..common.plain_modules import may_step
from ..common.token_layout import TokenLayout
from ..common.transformers_versions import CACHE, slice_logits_to_keep, with_cache_argument, with_cache_field
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .auxiliary_losses import (
    AuxiliaryLosses,
    PredictionHead,
    RandomProjectionQuantizer,
    ZeroInitLinear,
    auxiliary_inputs,
)
from .causal_compressors import AttentionCompressor, compress, make_compressor
from .configuration_hierarchical_lm import HierarchicalLMConfig
from .hierarchical_block import (
    HierarchicalLMAttention,
    HierarchicalLMBlock,
    HierarchicalLMLayer,
    HierarchicalLMMLP,
    steps_to_read,
)
from .hierarchical_cache import HierarchicalCache, layer_states
from .hierarchical_step import describe_layers, step_layers
from .hierarchy_merges import ConcatMerge, CrossAttentionMerge
from .static_hierarchical_cache import StaticHierarchicalCache, ring_sizes
from .stream_plan import HierarchicalLMContext, make_plan, make_step_plan


logger = logging.get_logger(__name__)

# What `hierarchical_step.py` computes in one call for a token.
_FORWARDS: dict[type, Callable] = {
    kind: kind.forward
    for kind in (HierarchicalLMLayer, HierarchicalLMBlock, HierarchicalLMAttention, HierarchicalLMMLP, ConcatMerge)
}


@auto_docstring(
    custom_intro="""
    Output of the base model.
    """
)
@dataclass
@with_cache_field
class HierarchicalLMModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, prediction_size)`):
        Input of the head: the normalised stream of the predicting hierarchy, or all streams concatenated.
    past_key_values (`HierarchicalCache`, *optional*):
        Cache for further tokens.
    hidden_states (`tuple`, *optional*):
        The stream of the predicting hierarchy before the first layer and after each, the last as `last_hidden_state`.
    attentions (`tuple`, *optional*):
        `[batch_size, heads, steps, steps]` of each hierarchy with attention, layer after layer.
    hierarchy_hidden_states (`tuple`, *optional*):
        The normalised stream of every hierarchy, one step for every `stride`-th token of a sequence. Padded and packed rows
        are arranged by `token_layout`.
    token_layout (`TokenLayout`, *optional*):
        Given with `hierarchy_hidden_states` for padded or packed rows.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    hierarchy_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    token_layout: TokenLayout | None = None


@auto_docstring(
    custom_intro="""
    Output of the language model, with each loss by name.
    """
)
@dataclass
@with_cache_field
class HierarchicalLMCausalLMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Sum of `ce_loss` and the other losses times their weights.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Scores of the next token.
    past_key_values (`HierarchicalCache`, *optional*):
        Cache for further tokens.
    hidden_states (`tuple`, *optional*):
        As from the base model.
    attentions (`tuple`, *optional*):
        As from the base model.
    hierarchy_hidden_states (`tuple`, *optional*):
        As from the base model.
    token_layout (`TokenLayout`, *optional*):
        As from the base model.
    ce_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross-entropy of the next token.
    reconstruction_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross-entropy of the tokens that a step was made of. Like the next two without its weight, and `None` at weight 0.
    prophet_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross-entropy of the next `c` tokens, with compression factor `c`.
    quantized_prophet_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross-entropy of the codes of the next `c` tokens.
    next_latent_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Distance to the next latent, with the weights of hierarchies.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    hierarchy_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    token_layout: TokenLayout | None = None
    ce_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    prophet_loss: torch.FloatTensor | None = None
    quantized_prophet_loss: torch.FloatTensor | None = None
    next_latent_loss: torch.FloatTensor | None = None


@auto_docstring
class HierarchicalLMPreTrainedModel(AutoMappingMixin, CustomCacheMixin, PreTrainedModel):
    config: HierarchicalLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HierarchicalLMLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    _cache_classes = {"dynamic": HierarchicalCache, "static": StaticHierarchicalCache}

    def __init__(self, config: HierarchicalLMConfig, *args, **kwargs):
        config.complete()
        super().__init__(config, *args, **kwargs)

    def _cache_layers(self, cache):
        sizes = ring_sizes(self.config, cache.max_cache_len) if cache.is_compileable else None
        return layer_states(self.config, sizes)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AttentionCompressor):
            init.normal_(module.tap_embed, std=self.config.initializer_range)
        elif isinstance(module, ConcatMerge):
            init.zeros_(module.up_bias)
        elif isinstance(module, PredictionHead):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (ZeroInitLinear, RandomProjectionQuantizer)):
            module.init_weights()


@auto_docstring
class HierarchicalLMModel(HierarchicalLMPreTrainedModel):
    def __init__(self, config: HierarchicalLMConfig):
        super().__init__(config)
        hierarchies = range(config.num_hierarchies)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = nn.ModuleList(
            LlamaRotaryEmbedding(config.of_hierarchy(h))  # type: ignore[arg-type]  # reads the fields it shares with Llama's
            for h in hierarchies
        )
        self.compressors = nn.ModuleList(make_compressor(config, h) for h in hierarchies)
        self.embed_norms = nn.ModuleList(
            nn.LayerNorm(width, eps=config.layer_norm_eps) for width in config.hidden_sizes
        )
        self.layers = nn.ModuleList(HierarchicalLMLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for width in config.hidden_sizes)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]  # `TransformersKwargs` lists some of these arguments, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_hierarchy_hidden_states: bool = False,
        ablate_merge: bool = False,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HierarchicalLMModelOutput:
        r"""
        output_hierarchy_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to also return the normalised stream of every hierarchy.
        ablate_merge (`bool`, *optional*, defaults to `False`):
            Whether to leave out the merges of hierarchies.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row. Restarting `position_ids` mean the same.
        """
        reject_unused_kwargs(self, kwargs, cu_seq_lens_q)
        config = self.config
        if self.training and torch.is_grad_enabled() and not output_hierarchy_hidden_states:
            _warn_of_forgotten_losses(config)
        embeds = self.embed(input_ids, inputs_embeds)
        length = embeds.shape[1]
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        rows = (attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        context, cache = self._make_context(embeds, *rows, past_key_values, use_cache)
        context.output_attentions = bool(output_attentions)
        any_length = has_dynamic_shapes(embeds) and cache is None
        any_length = any_length and not (output_attentions or output_hierarchy_hidden_states)
        if any_length:
            embeds = context.add_empty_slots(embeds, config.strides)
        streams = self._make_streams(embeds, context, cache)
        streams, hidden_states, attentions = self._run_layers(
            streams, context, cache, ablate_merge, output_hidden_states
        )
        last_hidden_state = self._predict_from(streams, context, cache)
        if any_length:
            last_hidden_state = last_hidden_state[:, :length]
            hidden_states = [x[:, : -(-length // config.strides[config.predict_index])] for x in hidden_states]
        if cache is not None:
            cache = self._count(cache, past_key_values, context, embeds)
        return HierarchicalLMModelOutput(
            last_hidden_state=last_hidden_state,
            **{CACHE: cache},
            hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            hierarchy_hidden_states=streams if output_hierarchy_hidden_states else None,
            token_layout=context.layout if output_hierarchy_hidden_states else None,
        )

    def _make_context(
        self, embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cache, use_cache
    ) -> tuple[HierarchicalLMContext, HierarchicalCache | None]:
        """The context of a pass, and the cache that the pass continues or fills."""
        is_given = cache is not None
        if is_given:
            self.check_cache(cache, embeds)
            if cache.is_compileable:
                cache = cache.of_pass(embeds)
        elif self.starts_cache(use_cache):
            cache = HierarchicalCache(self.config)
        is_first = cache is None or (not cache.is_compileable and cache.seen_tokens == 0)
        continued = None if is_first else cache
        context = HierarchicalLMContext.from_inputs(
            embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q, continued
        )
        context.is_first = is_first
        if context.segment_ids is not None:
            if is_given:
                raise ValueError(f"`{CACHE}` cannot be filled by packed rows: a cache row is one sequence.")
            cache = None
        return context, cache

    def _make_streams(self, embeds, context, cache):
        """The streams before the first layer, from embeddings `[batch, slots, hidden_size]`, and their plans in `context`."""
        config, dtype = self.config, self.embed_tokens.weight.dtype
        embeds = context.lay_out(embeds, cache, max(config.compression_factors))
        context.streams = [
            make_step_plan(config, h, context, cache, rotary_emb, dtype)
            if context.is_static_step
            else make_plan(config, h, context, embeds, cache, rotary_emb, dtype)
            for h, rotary_emb in enumerate(self.rotary_emb)
        ]
        streams = compress(self.compressors, config, embeds, context, cache)
        return [norm(x) for norm, x in zip(self.embed_norms, streams)]

    def _run_layers(self, streams, context, cache, ablate_merge, output_hidden_states):
        """The normalised streams after the last layer, hidden states before each layer, and attentions."""
        predicting, hidden_states, attentions = self.config.predict_index, [], []
        layers = list(self.layers)
        if not (ablate_merge or output_hidden_states or context.output_attentions):
            stepped = self._step(streams, context, cache)
            if stepped is not None:
                streams, layers = stepped, []
        for layer in layers:
            if output_hidden_states:
                hidden_states.append(_restore(streams[predicting], context, predicting))
            out = layer(*streams, context=context, ablate_merge=ablate_merge, **{CACHE: cache})
            streams = out[: len(context.streams)]
            attentions.extend(out[len(context.streams) :])
        return tuple(norm(x) for norm, x in zip(self.norms, streams)), hidden_states, attentions

    def _step(self, streams, context, cache):
        """The streams after all layers, computed in one call for a token, or `None`."""
        if cache is None or context.is_first or context.streams[0].tokens != 1:
            return None
        known = self._describe_layers() if may_step(streams[0], self.config, context.is_static_step) else None
        return None if known is None else step_layers(self.layers, known, self.config, streams, context, cache)

    @torch.compiler.assume_constant_result  # so that a graph is not broken by what the layers are asked
    def _describe_layers(self):
        return describe_layers(self.layers, self.config, _FORWARDS)

    def _predict_from(self, streams, context, cache):
        """`[batch, seq, prediction_size]`, what the head reads at each token, in the order of the input."""
        config = self.config
        used = range(config.num_hierarchies) if config.predict_from_all else [config.predict_index]
        last = len(self.layers) * config.num_hierarchies
        plans = context.streams
        at_tokens = [plans[h].at_tokens(steps_to_read(streams[h], plans[h], cache, last, h)) for h in used]
        hidden_states = at_tokens[0] if len(at_tokens) == 1 else torch.cat(at_tokens, dim=-1)
        if context.is_static_step:
            return apply_mask_to_padding_states(hidden_states, context.padding_mask)
        return hidden_states if context.layout is None else context.layout.restore(hidden_states)

    @staticmethod
    def _count(cache, given, context, embeds):
        """The cache to return, after the new tokens were counted. `given`: as it was given."""
        length = embeds.shape[1]
        if context.is_static_step:
            context.advance(cache, length, embeds.device)
            cache.finish_step(context.padding_mask is not None)
            return cache
        cache.advance(length, [before + more for before, more in zip(context.past_lengths, context.new_lengths)])
        if given is None or not given.is_compileable:
            return cache
        given.keep(cache)
        return given

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The embeddings `[batch, seq, hidden_size]` of one or the other. Raises `TypeError` and `ValueError` for bad input."""
        return embed_text(self.embed_tokens, input_ids, inputs_embeds, self.config.hidden_size)


def _warn_of_forgotten_losses(config):
    """Warn clients such as trl, which compute the loss themselves from the states of the base model."""
    if AuxiliaryLosses.wanted(config):
        logger.warning_once(
            "The config gives weights to losses beside cross-entropy (`*_loss_weight`), but this training step computes none of "
            "them: HierarchicalLMForCausalLM computes them with `labels` and without `past_key_values`."
        )


def _restore(x, context, hierarchy):
    """A stream in the order of the input. A stream with a stride is not rearranged."""
    layout, stride = context.layout, context.streams[hierarchy].stride
    return x if layout is None or stride > 1 else layout.restore(x)


@auto_docstring
class HierarchicalLMForCausalLM(HierarchicalLMPreTrainedModel, CompiledStepMixin, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    auxiliary_losses_class = AuxiliaryLosses

    def __init__(self, config: HierarchicalLMConfig):
        super().__init__(config)
        self.model = HierarchicalLMModel(config)
        self.lm_head = nn.Linear(config.prediction_size, config.vocab_size, bias=False)
        self.auxiliary_losses = None
        if self.auxiliary_losses_class.wanted(config):
            self.auxiliary_losses = self.auxiliary_losses_class(config)
        self._freeze_unread()
        self.loss_type, self.loss_function = "ForCausalLM", causal_lm_loss
        self.post_init()

    def _freeze_unread(self):
        """Freeze weights that neither the head nor a loss reads. Data parallel training would wait for their gradients."""
        config, merge = self.config, self.model.layers[-1].merge
        read = [] if self.auxiliary_losses is None else self.auxiliary_losses.hierarchies_read
        for h in range(config.num_hierarchies):
            if h == config.predict_index or config.predict_from_all or h in read:
                continue
            self.model.norms[h].requires_grad_(False)
            if isinstance(merge, CrossAttentionMerge) and h in merge.receivers:
                merge.q_projs[str(h)].requires_grad_(False)
                merge.o_projs[str(h)].requires_grad_(False)

    @can_return_tuple
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]  # `TransformersKwargs` lists some of these arguments, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hierarchy_hidden_states: bool = False,
        ablate_merge: bool = False,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HierarchicalLMCausalLMOutput:
        r"""
        output_hierarchy_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to also return the normalised stream of every hierarchy.
        ablate_merge (`bool`, *optional*, defaults to `False`):
            Whether to leave out the merges of hierarchies.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row.
        """
        of_loss = pop_kwargs(kwargs, "num_items_in_batch", "shift_labels")
        if self.auxiliary_losses is not None:
            require_labels(labels, of_loss.get("num_items_in_batch"), "the losses of coarse streams need them")
        auxiliary = self.auxiliary_losses if labels is not None and past_key_values is None else None
        embeds = inputs_embeds if auxiliary is None else self.model.embed(input_ids, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids if auxiliary is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            use_cache=use_cache,
            output_hierarchy_hidden_states=output_hierarchy_hidden_states or auxiliary is not None,
            ablate_merge=ablate_merge,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        losses = {}
        if labels is not None:
            losses = self._losses(auxiliary, outputs, logits, embeds, input_ids, labels, of_loss)
        return HierarchicalLMCausalLMOutput(
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            hierarchy_hidden_states=outputs.hierarchy_hidden_states if output_hierarchy_hidden_states else None,
            token_layout=outputs.token_layout if output_hierarchy_hidden_states else None,
            **losses,
        )

    def _losses(self, auxiliary, outputs, logits, embeds, input_ids, labels, of_loss):
        """The loss and its parts, by field of the output. `auxiliary`: `self.auxiliary_losses` where they count."""
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        losses = {"ce_loss": loss}
        if auxiliary is not None:
            inputs = auxiliary_inputs(outputs, embeds, input_ids, labels, **of_loss)
            for name, value in auxiliary(*inputs).items():
                # The next-latent loss contains its weights, one for each hierarchy.
                weight = 1.0 if name == "next_latent" else getattr(self.config, f"{name}_loss_weight")
                loss = loss + weight * value
                losses[f"{name}_loss"] = value
        return {"loss": loss, **losses}

    def get_compiled_call(self, compile_config):
        """As the stock method, for single tokens. Chunks of a prompt are not compiled: they go through a dynamic cache."""
        step = super().get_compiled_call(compile_config)

        def call(*args, **kwargs):
            ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
            is_step = ids is not None and ids.shape[1] == 1 and getattr(cache, "has_tokens", False)
            return (step if is_step else self.__call__)(*args, **kwargs)

        return call

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`. The heads of losses that predict tokens are resized, too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.auxiliary_losses is not None:
            self.auxiliary_losses.resize_vocabulary(self.config.vocab_size)
        return embeddings


__all__ = [
    "HierarchicalLMCausalLMOutput",
    "HierarchicalLMForCausalLM",
    "HierarchicalLMModel",
    "HierarchicalLMModelOutput",
    "HierarchicalLMPreTrainedModel",
]
