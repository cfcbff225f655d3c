"""LEAP: softmax-weighted running means instead of attention, trained in parallel, generated from a constant-size state.

Read bottom-up: mixers, layer, model, heads. The arithmetic of the mixers is in `focus.py`. The prototype is
`leap-transformer` on PyPI ("Linear Explainable Attention in Parallel"); `LeapMixer` follows its `MultiheadLeap`,
`AdditiveMixer` its Fastformer (arXiv 2108.09084).
"""

import copy
from dataclasses import replace
from functools import partial

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
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.cache_mixins import CustomCacheMixin
from ..common.losses import causal_lm_loss, masked_lm_loss, sequence_classification_loss
from ..common.model_inputs import (
    apply_mask_to_padding_states,
    check_past_mask,
    check_position_ids,
    check_position_range,
    count_positions,
    embed_text,
    mask_of_new_tokens,
    token_mask,
)
from ..common.packing import next_positions
from ..common.packing import segment_ids as find_segments
from ..common.transformers_versions import CACHE, OldCacheNameMixin, slice_logits_to_keep, with_cache_argument
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .configuration_leap import LeapConfig
from .focus import attention_matrix, focus_mean, focus_mixing, token_state
from .focus_cpu import step
from .focus_functions import FocusSettings, log_weight, rotate, standardize
from .focus_recurrent import (
    gate_output,
    pack_state,
    prepare_step,
    state_of_rows,
    step_global_mean,
    step_window_mean,
    unpack_state,
)
from .focus_triton import step as triton_step
from .mixing_rows import MixingRows, lay_out
from .recurrent_cache import RecurrentCache, StaticRecurrentCache, mixing_states
from .running_mean import FocusState


def get_alibi_slopes(num_heads: int) -> torch.Tensor:
    """How much each head's log weights fall per token of distance: ALiBi's slopes (arXiv 2108.12409), `[num_heads]`."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)


class _Mixer(nn.Module):
    """What both mixers share: settings, slopes, and the way of their rows and states into the mixing and out of it."""

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        scale = self.head_dim**-0.5 if config.rescale is None else config.rescale / self.head_dim
        self.settings = FocusSettings(
            scale=scale,
            normalize=config.rescale is not None,
            weight_function=config.weight_function,
            output_gate=config.output_gate,
            window=config.window_sizes[layer_idx],
            sink_weight=config.sink_weight,
        )
        self.two_sided = replace(self.settings, causal=False)  # made here, not in a forward pass that is compiled
        alibi_slopes = get_alibi_slopes(self.num_heads) if config.position_embedding_type == "alibi" else None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool | None = None,
        rows: MixingRows | None = None,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = MixingRows() if rows is None else rows
        if rows.layout is None:
            return self._mix(hidden_states, output_attentions, rows, **context)
        aligned = rows.layout.align(hidden_states)
        out, attentions = self._mix(aligned, output_attentions, rows, **context)
        if attentions is not None:
            flat = rows.layout.restore(attentions.transpose(1, 2).flatten(2))
            attentions = flat.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            attentions = self._without_pads(attentions, rows.layout.given)
        return rows.layout.restore(out), attentions

    def _mix(self, hidden_states, output_attentions, rows, past_key_values, is_causal, single_step):
        """What `forward` returns, of rows as they are laid out."""
        raise NotImplementedError

    @staticmethod
    def _without_pads(attentions, mask):
        """`attentions [batch, heads, seq, 2]` with log weights of `-inf` at pads."""
        raise NotImplementedError

    def attention_matrix(
        self,
        attentions: torch.Tensor,
        is_causal: bool = True,
        segment_ids: torch.Tensor | None = None,
        positions: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Token-to-token attention of this layer from its entry of a forward pass's `attentions`.

        Args:
            attentions (`torch.Tensor` of shape `[batch, heads, seq, 2]`): of a forward pass without a cached past.
            is_causal (`bool`): as in the forward pass.
            segment_ids (`torch.Tensor` of shape `[batch, seq]`, *optional*): of packed rows.
            positions (`torch.LongTensor` of shape `[rows]`, *optional*): which tokens' rows to make; all, which is quadratic
                in length, when not given.

        Returns:
            `torch.Tensor`: see the mixers' own notes on `attentions` for shape and meaning.
        """
        raise NotImplementedError

    def _dropout(self, x):
        return nn.functional.dropout(x, self.attention_dropout, self.training)

    def _packed_state(self, cache, state_idx=0):
        read = cache.get_recurrent_state if self.settings.window is None else cache.get_conv_state
        return read(self.layer_idx, state_idx)

    def _read_state(self, cache, state_idx=0):
        packed = None if cache is None else self._packed_state(cache, state_idx)
        return None if packed is None else unpack_state(packed, self.settings, self.num_heads, self.head_dim)

    def _write_state(self, state, past, tokens, seq, rows, cache, state_idx=0):
        """Put the state after `seq` more tokens into the cache; `past` and `tokens` are those of `state_of_rows`."""
        if state is None:
            raise ValueError(
                f"`use_cache` must be False and `{CACHE}` left out where `torch.export` leaves sizes open or `torch.func` is at "
                "work: there LEAP's mixing leaves no state."
            )
        state = state_of_rows(
            state, past, self.settings, self.alibi_slopes, seq, rows.lengths, rows.segment_ids, tokens
        )
        packed = pack_state(state, self.settings, self.head_dim, cache.get_seq_length() + seq)
        write = cache.update_recurrent_state if self.settings.window is None else cache.update_conv_state
        write(packed, self.layer_idx, state_idx)

    def _step_mean(self, logits, token, cache, state_idx=0):
        """Means of one more token `[batch, parts, heads, head_dim]`, which also enters the cached state."""
        if self.settings.window is None:
            return step_global_mean(
                logits, token, self._packed_state(cache, state_idx), self.settings, self.alibi_slopes
            )
        push = partial(cache.update_conv_state, layer_idx=self.layer_idx, state_idx=state_idx)
        return step_window_mean(logits, token, push, self.settings, self.alibi_slopes)

    def _mean(self, logits, values, rows, cache, is_causal, state_idx=0):
        """Means over `logits [batch, seq, heads]`, `values [batch, seq, heads, channels]`, continuing from the cache.

        Returns them with the log weights.
        """
        logs = log_weight(logits, self.settings.weight_function)
        if rows.padding_mask is not None:
            logs = logs.masked_fill(~rows.padding_mask.unsqueeze(-1), -torch.inf)
        past, settings = self._read_state(cache, state_idx), self.settings if is_causal else self.two_sided
        means, state = focus_mean(logs, values, settings, self.alibi_slopes, None, rows.segment_ids, past)
        if cache is not None:
            tokens = partial(self._tokens_of_mean, logs.detach(), values.detach())
            self._write_state(state, past, tokens, values.shape[1], rows, cache, state_idx)
        return means, logs

    @staticmethod
    def _tokens_of_mean(logs, values, places):
        """Log weights and values at `places [batch, count]`, as a windowed state holds them."""
        batch = torch.arange(len(places), device=places.device).unsqueeze(1)
        dtype = torch.promote_types(values.dtype, torch.float32)
        return FocusState(*(x[batch, places].to(dtype).transpose(1, 2) for x in (logs, values)))


class LeapMixer(_Mixer):
    """Gated running means: `sigmoid(scale * q_i . kbar_i) * vbar_i`, see `focus.py`.

    Its `attentions` are `[batch, heads, seq, 2]`: log focus weights (`-inf` at pads) and query gates. Its
    `attention_matrix` `[batch, heads, seq, seq]` times the (standardised) values is the mixer's output.
    """

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_parts = 3 if config.output_gate == "none" else 4
        self.qfkv_proj = nn.Linear(config.hidden_size, self.num_parts * config.hidden_size, bias=False)

    def _mix(self, hidden_states, output_attentions, rows, past_key_values, is_causal, single_step):
        batch, seq, _ = hidden_states.shape
        cache = past_key_values
        qfkv = self.qfkv_proj(hidden_states).view(batch, seq, self.num_parts, self.num_heads, self.head_dim)
        attentions = None
        if output_attentions or (self.training and self.attention_dropout > 0):
            out, attentions = self._mix_eager(qfkv, rows, cache, is_causal)
        elif single_step:
            out = self._step(qfkv, cache, rows.rotary)
        else:
            past, settings = self._read_state(cache), self.settings if is_causal else self.two_sided
            masks = rows.padding_mask, rows.segment_ids
            out, state = focus_mixing(qfkv, settings, self.alibi_slopes, rows.rotary, *masks, past)
            if cache is not None:
                self._write_state(state, past, partial(self._tokens, qfkv, rows), seq, rows, cache)
        return out.reshape(batch, seq, -1), attentions if output_attentions else None

    def _tokens(self, qfkv, rows, places):
        """Log weights and values at `places [batch, count]`, as a windowed state holds them."""
        batch, rotary = torch.arange(len(places), device=places.device).unsqueeze(1), rows.rotary
        mask = None if rows.padding_mask is None else rows.padding_mask.gather(1, places)
        if rotary is not None:
            rotary = tuple(x.expand(len(places), -1, -1)[batch, places] for x in rotary)
        return token_state(qfkv[batch, places], self.settings, rotary, mask)

    def _step(self, qfkv, cache, rotary):
        """One token, which also enters the cached state."""
        take = triton_step if qfkv.is_cuda else step
        out = take(qfkv, self.settings, self.alibi_slopes, rotary, self._packed_state(cache))
        if out is not None:
            return out
        parts, logits = prepare_step(qfkv, self.settings, rotary)
        means = self._step_mean(logits, parts[:, 2:], cache)
        if self.num_parts == 4:
            means = gate_output(parts[:, 0], means[:, 0], means[:, 1], self.settings)[0]
        return means.to(qfkv.dtype)

    def _mix_eager(self, qfkv, rows, cache, is_causal):
        """The same step in differentiable pieces, for dropout inside and for attentions to return."""
        settings = self.settings
        parts = qfkv.to(torch.promote_types(qfkv.dtype, torch.float32))
        parts = (standardize(parts) if settings.normalize else parts).unbind(2)
        f, k, v = self._dropout(parts[-3]), parts[-2], self._dropout(parts[-1])
        logits = self._dropout((f * k).sum(-1) * settings.scale)
        if settings.output_gate == "none":
            out, logs = self._mean(logits, v, rows, cache, is_causal)
            gate = torch.ones_like(logs)
        else:
            q = self._dropout(parts[0])
            if rows.rotary is not None:
                q, k = rotate(q, *rows.rotary), rotate(k, *rows.rotary)
            means, logs = self._mean(logits, torch.cat((k, v), dim=-1), rows, cache, is_causal)
            out, gate = gate_output(q, *means.chunk(2, dim=-1), settings)
        return out.to(qfkv.dtype), torch.stack((logs, gate), dim=-1).transpose(1, 2)

    @staticmethod
    def _without_pads(attentions, mask):
        logs, gate = attentions.unbind(-1)
        return torch.stack((logs.masked_fill(~mask.unsqueeze(1), -torch.inf), gate), dim=-1)

    def attention_matrix(self, attentions, is_causal=True, segment_ids=None, positions=None):
        logs, gate = attentions.unbind(-1)
        gate = gate if positions is None else gate[..., positions]
        settings = replace(self.settings, causal=is_causal)
        return gate.unsqueeze(-1) * attention_matrix(logs, settings, self.alibi_slopes, segment_ids, positions)


class AdditiveMixer(_Mixer):
    """Fastformer's additive attention (arXiv 2108.09084, equations 3 to 6), causal and windowed as in the prototype.

    Queries are pooled with weights from a learned vector; keys times pooled queries are pooled likewise; the output is
    the pooled keys times the values. Its `attentions` are `[batch, heads, seq, 2]`: the log weights of both poolings.
    Its `attention_matrix` `[batch, heads, 2, seq, seq]` holds the weights of both.
    """

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.query_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.key_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))

    def _mix(self, hidden_states, output_attentions, rows, past_key_values, is_causal, single_step):
        batch, seq, _ = hidden_states.shape
        context = rows, past_key_values, is_causal, single_step and not output_attentions
        qkv = self.qkv_proj(hidden_states).view(batch, seq, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(2)
        pooled_q, query_logs = self._pool(q, self.query_vector, 0, *context)
        pooled_k, key_logs = self._pool(pooled_q * k, self.key_vector, 1, *context)
        out = (pooled_k * v).to(hidden_states.dtype).reshape(batch, seq, -1)
        if not output_attentions:
            return out, None
        return out, torch.stack((query_logs, key_logs), dim=-1).transpose(1, 2)

    @staticmethod
    def _without_pads(attentions, mask):
        return attentions.masked_fill(~mask[:, None, :, None], -torch.inf)

    def _pool(self, x, vector, state_idx, rows, cache, is_causal, single_step):
        vector = vector.to(x.dtype)
        if self.settings.normalize:
            x, vector = standardize(x), standardize(vector)
        logits = (x * vector).sum(-1) * self.settings.scale
        if single_step:
            return self._step_mean(logits[:, 0], x, cache, state_idx), None
        means, logs = self._mean(logits, x, rows, cache, is_causal, state_idx)
        return self._dropout(means), logs

    def attention_matrix(self, attentions, is_causal=True, segment_ids=None, positions=None):
        settings = replace(self.settings, causal=is_causal)
        matrices = (
            attention_matrix(logs, settings, self.alibi_slopes, segment_ids, positions)
            for logs in attentions.unbind(-1)
        )
        return torch.stack(tuple(matrices), dim=2)


class LeapMLP(nn.Module):
    def __init__(self, config: LeapConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        if not self.training:  # the call alone is felt by a single token
            return hidden_states
        return nn.functional.dropout(hidden_states, self.hidden_dropout)


class LeapLayer(GradientCheckpointingLayer):
    """Pre-norm block: mixer and feed-forward, each with a residual connection."""

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__()
        mixer_class = LeapMixer if config.mixer == "focus" else AdditiveMixer
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = mixer_class(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LeapMLP(config)

    @with_cache_argument
    def forward(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **context) -> torch.Tensor:
        mixed = self.mixer(self.input_layernorm(hidden_states), past_key_values=past_key_values, **context)[0]
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


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
    _can_record_outputs = {"hidden_states": LeapLayer, "attentions": _Mixer}

    def __init__(self, config: LeapConfig, *args, **kwargs):
        config.validate_architecture()  # values may have been set since, as `from_pretrained` sets what it overrides
        super().__init__(config, *args, **kwargs)

    def _cache_layers(self, cache):
        """See `CustomCacheMixin._cache_layers`."""
        config = self.config
        parts = 1 if config.output_gate == "none" else 2
        shape = config.num_attention_heads, parts, config.head_dim
        return [mixing_states(window, *shape, config.number_of_conv_states) for window in config.window_sizes]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AdditiveMixer):
            init.normal_(module.query_vector, std=self.config.initializer_range)
            init.normal_(module.key_vector, std=self.config.initializer_range)
        if isinstance(module, _Mixer) and module.alibi_slopes is not None:
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
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([LeapLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @auto_docstring
    @with_cache_argument
    def forward(
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
            Whether to also give what each layer attends with: per layer `[batch, heads, seq, 2]`, log focus weights and query gates
            (log weights of both poolings with the additive mixer). `layers[i].mixer.attention_matrix` makes
            token-to-token attention of them.
        is_causal (`bool`, *optional*, defaults to `config.is_causal`):
            `False` lets every position see both directions; there is no cache then.
        seq_idx (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Index of the packed sequence each token belongs to.
        cu_seq_lens_q (`torch.LongTensor` of shape `(num_sequences + 1,)`, *optional*):
            Boundaries of the sequences packed into one row. Restarting `position_ids` mean the same.
        """
        reject_unused_kwargs(self, kwargs, cu_seq_lens_q)
        inputs_embeds = embed_text(self.embed_tokens, input_ids, inputs_embeds, self.config.hidden_size)
        batch, seq, _ = inputs_embeds.shape
        # Not by `merge_with_config_defaults`, which also writes `is_causal` into the config: a token would feel that.
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        asked, use_cache = use_cache, config.use_cache if use_cache is None else use_cache
        is_causal = config.is_causal if is_causal is None else is_causal
        if not is_causal:
            if past_key_values is not None:
                raise ValueError(f"`{CACHE}` was given, but a bidirectional model has no past to continue from.")
        elif past_key_values is not None:
            self.check_cache(past_key_values, inputs_embeds)
        elif self.starts_cache(asked):
            past_key_values = RecurrentCache(self.config)

        check_position_ids(position_ids, batch, seq)

        continues = past_key_values is not None and past_key_values.has_previous_state(0)
        past = past_key_values.lengths() if continues else 0
        mask = self._token_mask(attention_mask, inputs_embeds, past_key_values if continues else None)
        segment_ids = find_segments(
            inputs_embeds, mask, position_ids, seq_idx, cu_seq_lens_q, past if continues else None
        )
        counted = position_ids is None
        if counted and self.position_type in ("absolute", "rotary"):
            position_ids = count_positions(inputs_embeds, mask, segment_ids, past)
        hidden_states = apply_mask_to_padding_states(inputs_embeds, mask)
        if self.position_type == "absolute":
            self._check_positions(position_ids, counted, past)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        rotary = None
        if self.position_type == "rotary":
            precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            rotary = self.rotary_emb(precise, position_ids)
        if self.training:
            hidden_states = self.dropout(hidden_states)

        rows = lay_out(mask, segment_ids, rotary, continues, past_key_values is not None)
        single_step = seq == 1 and continues and mask is None and not torch.is_grad_enabled()
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                **{CACHE: past_key_values},  # where layers with checkpointing look for it
                rows=rows,
                is_causal=is_causal,
                single_step=single_step,
                output_attentions=output_attentions,
            )
        if past_key_values is not None:
            past_key_values.advance(seq, hidden_states.device)
            if mask is not None or segment_ids is not None or past_key_values.next_positions is not None:
                past_key_values.follow(next_positions(segment_ids, mask, seq, past))
            if segment_ids is not None and not is_tracing(segment_ids):
                past_key_values.packed = True
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values if use_cache else None}
        )

    def _token_mask(self, attention_mask, inputs_embeds, cache):
        """Which of the new tokens are real, `None` where all are; the mask may be of each layer type."""
        if isinstance(attention_mask, dict):
            if "linear_attention" not in attention_mask:
                raise ValueError(
                    "`attention_mask` as a dict must have the key 'linear_attention', got keys "
                    f"{sorted(map(str, attention_mask))}."
                )
            attention_mask = attention_mask["linear_attention"]
        mask = token_mask(attention_mask, inputs_embeds, 0 if cache is None else cache.get_seq_length())
        if cache is not None and not cache.packed and (mask is not None or cache.next_positions is not None):
            check_past_mask(attention_mask, inputs_embeds.shape[1], cache.lengths())
        return mask_of_new_tokens(mask, inputs_embeds.shape[1])

    def _check_positions(self, position_ids, counted, past):
        limit = self.config.max_position_embeddings
        if not (counted and isinstance(past, int) and past + position_ids.shape[1] <= limit):
            remedy = "Other values of `position_embedding_type` than 'absolute' have no such bound."
            check_position_range(position_ids, limit, remedy)


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
    def forward(
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
    The bidirectional LEAP model with a masked language modeling head. It works on a copy of the config whose
    `is_causal` is `False`.
    """
)
class LeapForMaskedLM(LeapPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LeapConfig):
        config = copy.deepcopy(config)
        config.is_causal = False
        super().__init__(config)
        self.model = LeapModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type, self.loss_function = "ForMaskedLM", masked_lm_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
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
            Original ids where tokens were masked, `-100` elsewhere. They are not shifted.
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
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @with_cache_argument
    def forward(
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
            Classes, regression targets or multi-label indicators, told apart by `config.problem_type`.
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
        batch, seq, _ = hidden_states.shape
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["linear_attention"]
        real = attention_mask[:, -seq:] if attention_mask is not None else None
        if real is None and self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids != self.config.pad_token_id
        if real is None and batch > 1:
            raise ValueError(
                "Batches of more than one sequence need an `attention_mask`, or `input_ids` and a `config.pad_token_id`, got "
                "neither: the last real tokens cannot be told from pads."
            )
        last = torch.full((batch,), seq - 1, device=hidden_states.device)
        if real is not None:
            last = (torch.arange(seq, device=hidden_states.device) * real.to(hidden_states.device).long()).argmax(-1)
        logits = self.score(hidden_states[torch.arange(batch, device=hidden_states.device), last])
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


__all__ = [
    "LeapForCausalLM",
    "LeapForMaskedLM",
    "LeapForSequenceClassification",
    "LeapModel",
    "LeapPreTrainedModel",
]
