"""LEAP: running means instead of attention, trained in parallel, with generation from a constant-size state.

Read in this order: mixer, layer, model, heads. The mixing step is in `leap_mixing.py`, its arithmetic in `focus.py`. The
prototype is `leap-transformer` on PyPI ("Linear Explainable Attention in Parallel"). `LeapMixer` follows its `MultiheadLeap`,
`AdditiveMixer` its Fastformer (arXiv 2108.09084).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.cache_mixins import CustomCacheMixin
from ..common.forward_context import ForwardContext
from ..common.losses import causal_lm_loss, masked_lm_loss, sequence_classification_loss
from ..common.model_inputs import (
    apply_mask_to_padding_states,
    check_position_range,
    count_positions,
    embed_text,
    is_eager,
)
from ..common.registered_operators import in_graph
from ..common.transformers_versions import CACHE, OldCacheNameMixin, slice_logits_to_keep, with_cache_argument
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .additive_mixer import AdditiveMixer
from .configuration_leap import LeapConfig
from .leap_mixing import FocusMixing, RunningMeanMixer, get_alibi_slopes
from .leap_step import can_step, step_layers
from .mixing_rows import MixingRows, lay_out
from .recurrent_cache import RecurrentCache, StaticRecurrentCache, mixing_states


logger = logging.get_logger(__name__)


@dataclass
class LeapContext(ForwardContext):
    """What all layers of one forward pass read.

    Attributes:
        rows (`MixingRows`, *optional*): pads, packed sequences and positions, as mixers take them.
        is_causal (`bool`): whether a position sees only itself and its past.
        single_step (`bool`): whether this is one real token after cached ones, without gradients.
    """

    rows: MixingRows | None = None
    is_causal: bool = True
    single_step: bool = False


class LeapMixer(FocusMixing):
    """Projection of hidden states to queries, focus, keys and values, and LEAP's mixing step."""

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.qfkv_proj = nn.Linear(config.hidden_size, self.num_parts * config.hidden_size, bias=False)

    def _project(self, inputs):
        return self.qfkv_proj(inputs)


MIXERS = {"focus": LeapMixer, "additive": AdditiveMixer}  # by `config.mixer`


class LeapMLP(nn.Module):
    def __init__(self, config: LeapConfig):
        super().__init__()
        assert config.intermediate_size is not None  # for type checkers
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        if not self.training:  # even a call without effect takes time in a single step
            return hidden_states
        return nn.functional.dropout(hidden_states, self.hidden_dropout)


class LeapLayer(GradientCheckpointingLayer):
    """Pre-norm block: mixer and feed-forward, each with a residual connection."""

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.mixer](config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LeapMLP(config)

    @with_cache_argument
    def forward(
        self, hidden_states: torch.Tensor, context: LeapContext, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        mixed, _ = self.mixer(
            self.input_layernorm(hidden_states),
            past_key_values=past_key_values,
            rows=context.rows,
            is_causal=context.is_causal,
            single_step=context.single_step,
            output_attentions=context.output_attentions,
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


# What `leap_step.py` computes, in one call for a token.
_FORWARDS: dict[type, Callable] = {kind: kind.forward for kind in (LeapLayer, LeapMixer, LeapMLP)}


@auto_docstring
class LeapPreTrainedModel(AutoMappingMixin, CustomCacheMixin, PreTrainedModel):
    config: LeapConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LeapLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _is_stateful = True
    _can_compile_fullgraph = True
    _cache_classes = {"dynamic": RecurrentCache, "static": StaticRecurrentCache}
    _can_record_outputs = {"hidden_states": LeapLayer, "attentions": RunningMeanMixer}

    def __init__(self, config: LeapConfig, *args, **kwargs):
        config.validate_architecture()  # values may have been set since, as `from_pretrained` sets what it overrides
        super().__init__(config, *args, **kwargs)

    def _cache_layers(self, cache):
        """See `CustomCacheMixin._cache_layers`."""
        config = self.config
        parts = 1 if config.output_gate == "none" else 2
        shape = config.num_attention_heads, parts, config.head_dim
        return [mixing_states(window, *shape, config.number_of_conv_states) for window in config.window_sizes or ()]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AdditiveMixer):
            init.normal_(module.query_vector, std=self.config.initializer_range)  # type: ignore[arg-type]
            init.normal_(module.key_vector, std=self.config.initializer_range)  # type: ignore[arg-type]
        if isinstance(module, RunningMeanMixer) and module.alibi_slopes is not None:
            init.copy_(module.alibi_slopes, get_alibi_slopes(module.num_heads))


@auto_docstring
class LeapModel(LeapPreTrainedModel):
    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.position_type = config.position_embedding_type
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rotary":
            self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([LeapLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        is_causal: bool | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        output_attentions (`bool`, *optional*):
            Whether to return attentions `[batch, heads, seq, 2]` of each layer: log focus weights and output gates, or log
            weights of both poolings with the additive mixer. `layers[i].mixer.attention_matrix` computes token-to-token
            attention from them.
        is_causal (`bool`, *optional*, defaults to `config.is_causal`):
            Whether a position sees only itself and its past. A bidirectional model has no cache.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row. `position_ids` that restart have the same effect.
        """
        reject_unused_kwargs(self, kwargs, cu_seq_lens_q)
        embeds = embed_text(self.embed_tokens, input_ids, inputs_embeds, self.config.hidden_size)
        seq = embeds.shape[1]
        # Not `merge_with_config_defaults`, which also writes `is_causal` into the config and slows down single tokens.
        is_causal = self.config.is_causal if is_causal is None else is_causal
        cache = self._find_cache(past_key_values, use_cache, is_causal, embeds)
        continues = cache is not None and cache.has_previous_state(0)
        context = LeapContext.from_inputs(
            embeds, _one_mask(attention_mask), position_ids, seq_idx, cu_seq_lens_q, cache if continues else None
        )
        mask = context.padding_mask
        hidden_states, rotary = self._add_positions(apply_mask_to_padding_states(embeds, mask), context)
        context.rows = lay_out(mask, context.segment_ids, rotary, continues, cache is not None)
        context.is_causal = is_causal
        context.single_step = seq == 1 and continues and mask is None and not torch.is_grad_enabled()
        context.output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden_states = self._through_layers(hidden_states, rotary, context, cache)
        if cache is not None:
            context.advance(cache, seq, hidden_states.device)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: cache if use_cache else None}
        )

    def _through_layers(self, hidden_states, rotary, context, cache):
        if (
            context.single_step
            and hidden_states.is_cpu
            and (in_graph() or is_eager(hidden_states))
            and self._can_step()
        ):
            stepped = step_layers(self.layers, hidden_states, rotary, cache)
            if stepped is not None:
                return stepped
        for layer in self.layers:
            # The cache by the name that gradient checkpointing reads.
            hidden_states = layer(hidden_states, context=context, **{CACHE: cache})
        return hidden_states

    @torch.compiler.assume_constant_result  # so that a graph is not broken by what the layers are asked
    def _can_step(self):
        return can_step(self.layers, _FORWARDS)

    def _find_cache(self, cache, use_cache, is_causal, inputs_embeds):
        """The cache to continue, or a new one to fill, or `None`."""
        if not is_causal and cache is not None:
            raise ValueError(f"`{CACHE}` was given, but a bidirectional model has no past to continue from.")
        if cache is not None:
            self.check_cache(cache, inputs_embeds)
        elif is_causal and self.starts_cache(use_cache):
            cache = RecurrentCache(self.config)
        return cache

    def _add_positions(self, hidden_states, context):
        """Embeddings with learned positions, if the model has any, after dropout; and cosines and sines of rotary positions."""
        rotary, position_ids, past = None, context.position_ids, context.past_lengths
        if self.position_type in ("absolute", "rotary"):
            counted = position_ids is None
            if counted:
                position_ids = count_positions(hidden_states, context.padding_mask, context.segment_ids, past)
            if self.position_type == "absolute":
                self._check_positions(position_ids, counted, past)
                hidden_states = hidden_states + self.embed_positions(position_ids)
            else:
                precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
                rotary = self.rotary_emb(precise, position_ids)
        return self.dropout(hidden_states) if self.training else hidden_states, rotary

    def _check_positions(self, position_ids, counted, past):
        limit = self.config.max_position_embeddings
        if not (counted and isinstance(past, int) and past + position_ids.shape[1] <= limit):
            remedy = "Only `position_embedding_type`='absolute' has this limit."
            check_position_range(position_ids, limit, remedy)


def _one_mask(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | None:
    """The mask itself, or that of the layers in a dict of masks by layer type, which `generate` may pass."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    if "linear_attention" not in attention_mask:
        raise ValueError(
            f"`attention_mask` as a dict must have the key 'linear_attention', got keys {sorted(map(str, attention_mask))}."
        )
    return attention_mask["linear_attention"]


@auto_docstring
class LeapForCausalLM(LeapPreTrainedModel, OldCacheNameMixin, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LeapConfig):
        if not config.is_causal:
            raise ValueError(
                "`config.is_causal` is False (a bidirectional checkpoint), but LeapForCausalLM predicts the next token; "
                "pass `is_causal=True` to train it as a causal model."
            )
        super().__init__(config)
        self.model = LeapModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type, self.loss_function = "ForCausalLM", causal_lm_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        of_loss = pop_kwargs(kwargs, "num_items_in_batch", "ignore_index", "shift_labels")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    The bidirectional LEAP model with a masked language modeling head. It copies the config and sets `is_causal` to
    `False`.
    """
)
class LeapForMaskedLM(LeapPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LeapConfig):
        if config.is_causal and "LeapForCausalLM" in (config.architectures or ()):
            logger.warning_once(
                "The checkpoint was trained to predict the next token, and LeapForMaskedLM reads it in both directions: train it "
                "before you use its predictions."
            )
        config = copy.deepcopy(config)
        config.is_causal = False
        super().__init__(config)
        self.model = LeapModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type, self.loss_function = "ForMaskedLM", masked_lm_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Original ids of masked tokens, `-100` elsewhere. Labels are not shifted.
        """
        of_loss = pop_kwargs(kwargs, "num_items_in_batch", "ignore_index")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(
    custom_intro="""
    LEAP with a linear head on the last real token of each sequence: the last one that `attention_mask` keeps, or, without
    a mask, the last one that is not `config.pad_token_id`. Batches of `inputs_embeds` need the mask.
    """
)
class LeapForSequenceClassification(LeapPreTrainedModel):
    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LeapModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)  # type: ignore[arg-type]
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @with_cache_argument
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes, regression targets or multi-label indicators, depending on `config.problem_type`.
        """
        of_loss = pop_kwargs(kwargs, "num_items_in_batch")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = self._last_tokens(input_ids, attention_mask, hidden_states)
        logits = self.score(hidden_states[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **of_loss
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(self, input_ids, attention_mask, hidden_states):
        """Places `[batch]` of the last real tokens."""
        batch, seq, _ = hidden_states.shape
        attention_mask = _one_mask(attention_mask)
        real = attention_mask[:, -seq:] if attention_mask is not None else None
        if real is None and self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids != self.config.pad_token_id
        if real is None and batch > 1:
            raise ValueError(
                "Batches of more than one sequence need an `attention_mask`, or `input_ids` and a `config.pad_token_id`, got "
                "neither: without them, pads cannot be recognised."
            )
        if real is None:
            return torch.full((batch,), seq - 1, device=hidden_states.device)
        places = torch.arange(seq, device=hidden_states.device)
        return (places * real.to(hidden_states.device).long()).argmax(-1)


__all__ = [
    "LeapForCausalLM",
    "LeapForMaskedLM",
    "LeapForSequenceClassification",
    "LeapModel",
    "LeapPreTrainedModel",
]
