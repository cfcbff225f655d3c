"""The Heptapod grid: a page of tokens, each attending to its neighbours on all sides, trained to fill masked cells.

Model and head. Layers are in `heptapod_blocks.py`, the arithmetic of attention in `local_attention.py`, the training objective in
`masked_diffusion.py`, generation in `generation_heptapod.py`. The prototype is `nonlinear-transformer`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.losses import IGNORE_INDEX, require_labels
from ..common.model_inputs import apply_mask_to_padding_states, check_one_input
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .configuration_heptapod import HeptapodConfig
from .generation_heptapod import HeptapodGenerationMixin
from .grid_positions import HeptapodSinePositionEmbedding, grid_rotary
from .heptapod_blocks import HeptapodAttention, HeptapodLayer, HeptapodSpan, cell_by_cell
from .masked_diffusion import (
    DIRECTIONS,
    ElboEstimate,
    check_clean,
    estimate_elbo,
    masked_diffusion_loss,
    neighbor_loss,
    prepare_labels,
    rank_and_num_ranks,
    sample_eval_masks,
    sample_mask,
    span_loss,
    warn_if_padding_was_counted,
)
from .page_inputs import (
    check_page,
    check_vocabulary,
    make_global_mask,
    make_padding_mask,
    page_size,
    values_are_readable,
)


logger = logging.get_logger(__name__)


class HeptapodSelfConditioning(nn.Linear):
    """Projection of the last prediction. Zero-initialised, so self-conditioning starts as a no-op."""


@auto_docstring
class HeptapodPreTrainedModel(AutoMappingMixin, PreTrainedModel):
    config: HeptapodConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HeptapodLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    # Training breaks the graph in two places: attention dropout in tiles, and the random choice of self-conditioning.
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HeptapodLayer, "attentions": HeptapodAttention}

    def __init__(self, config: HeptapodConfig, *args, **kwargs):
        config.validate_architecture()  # again, as `from_pretrained` sets the fields that it overrides afterwards
        super().__init__(config, *args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """As in `nn.Module`. Raises a `ValueError` for peft's prompt learning, which looks up this name when it wraps."""
        if target == "embeddings.word_embeddings":
            raise ValueError(
                "Prompt learning (prefix, prompt and p-tuning) puts virtual tokens before a text, but a page has no cells for "
                "them: use LoRA or another adapter."
            )
        return super().get_submodule(target)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HeptapodSelfConditioning):
            init.zeros_(module.weight)
        elif isinstance(module, HeptapodSpan):
            init.constant_(module.bias, 2.0)
        elif isinstance(module, HeptapodAttention) and module.relative_position_bias is not None:
            init.zeros_(module.relative_position_bias)


@auto_docstring(
    custom_intro="""
    Output of the base model.
    """
)
@dataclass
class HeptapodModelOutput(BaseModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, height, width, hidden_size)`, or of flat pages):
        States of all cells, normalised.
    hidden_states (`tuple`, *optional*):
        Embeddings and the output of each layer, the last one normalised.
    attentions (`tuple`, *optional*):
        Of each layer, `[batch_size, heads, cells, cells]`.
    spans (`tuple`, *optional*):
        With `config.adaptive_span`, of each layer with neighbourhoods: the number of neighbours that heads attend to in each
        direction, `[batch_size, heads, height, width]`.
    """

    spans: tuple[torch.Tensor, ...] | None = None


@auto_docstring
class HeptapodModel(HeptapodPreTrainedModel):
    def __init__(self, config: HeptapodConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        absolute = config.use_absolute_position_embeddings
        self.embed_positions = HeptapodSinePositionEmbedding(config) if absolute else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([HeptapodLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        grid_size: tuple[int, int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HeptapodModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
            Tokens of a page, or flat `(batch_size, height * width)`, row by row. Outputs have the same leading shape.
        attention_mask (`torch.Tensor` of the shape of `input_ids`, *optional*):
            1 for cells of a page, 0 for padding, which makes pages of different sizes one batch. Without it every cell
            is part of the page and attended to, padding tokens included; a warning reports these.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, height, width, hidden_size)`, *optional*):
            Instead of `input_ids`; may be flat as well.
        grid_size (`tuple`, *optional*, defaults to `config.grid_size`):
            Height and width of a flat page.
        output_attentions (`bool`, *optional*):
            Whether to return the `[batch, heads, cells, cells]` of each layer, in time and memory quadratic in cells.
        """
        reject_unused_kwargs(self, kwargs)
        hidden_states = embeds = self.embed(input_ids, inputs_embeds, attention_mask)
        grid_size = page_size(embeds.shape[:-1], grid_size, self.config.grid_size)
        padding_mask = make_padding_mask(attention_mask, embeds.shape[:-1], grid_size)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        global_mask = make_global_mask(self.config, padding_mask, embeds)
        rotary = grid_rotary(*grid_size, self.config.head_dim, self.config.rope_theta, embeds.device)
        if self.embed_positions is not None:
            positions = self.embed_positions(grid_size, embeds, padding_mask)
            hidden_states = embeds + positions.expand(embeds.shape[0], -1, -1).reshape_as(embeds)
        if padding_mask is not None:
            hidden_states = apply_mask_to_padding_states(hidden_states, padding_mask.view(hidden_states.shape[:-1]))
        hidden_states, spans = self.dropout(hidden_states), []
        for layer in self.layers:
            hidden_states, span = layer(
                hidden_states,
                grid_size=grid_size,
                rotary=rotary,
                padding_mask=padding_mask,
                global_mask=global_mask,
                output_attentions=output_attentions,
            )
            spans += [] if span is None else [span]
        return HeptapodModelOutput(last_hidden_state=self.norm(hidden_states), spans=tuple(spans) or None)

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of tokens, `[batch, height, width, hidden_size]` or flat, or `inputs_embeds` as they are.

        Warns once about padding tokens without an attention mask.

        Raises:
            TypeError, ValueError: unless exactly one is given, of the right dtype and shape.
        """
        check_one_input(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            check_page("inputs_embeds", inputs_embeds, self.config.hidden_size)
            return inputs_embeds
        assert input_ids is not None  # for type checkers
        check_page("input_ids", input_ids)
        check_vocabulary("input_ids", input_ids, self.config.vocab_size)
        if attention_mask is None and self.config.pad_token_id is not None and not is_tracing(input_ids):
            if (input_ids == self.config.pad_token_id).any():
                logger.warning_once(
                    f"`input_ids` hold the padding token {self.config.pad_token_id}, but there is no `attention_mask`: "
                    "these cells count as part of the page and change the predictions of the others."
                )
        return self.embed_tokens(input_ids)


@auto_docstring(
    custom_intro="""
    Output of the masked language model, with the labels of the masked cells.
    """
)
@dataclass
class HeptapodMaskedLMOutput(MaskedLMOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Negative ELBO in nats a cell, with labels.
    logits (`torch.FloatTensor` of shape `(batch_size, height, width, vocab_size)`, or of flat pages):
        Scores of each cell's tokens.
    hidden_states (`tuple`, *optional*):
        Embeddings and the output of each layer, the last one normalised.
    attentions (`tuple`, *optional*):
        Of each layer, `[batch_size, heads, cells, cells]`.
    masked_labels (`torch.LongTensor` of the shape of `labels`, *optional*):
        The labels of the masked cells, which the loss is of; -100 at all others, whose logits are not trained. `Trainer`
        passes it to `compute_metrics` after the logits: `logits, masked_labels = prediction.predictions`.
    spans (`tuple`, *optional*):
        As from the base model.
    """

    masked_labels: torch.Tensor | None = None
    spans: tuple[torch.Tensor, ...] | None = None


@auto_docstring(
    custom_intro="""
    The Heptapod grid with a masked language modeling head, trained by masked diffusion. With `labels`, the model masks
    cells of the clean page itself and predicts them.
    """
)
class HeptapodForMaskedLM(HeptapodGenerationMixin, HeptapodPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HeptapodConfig):
        super().__init__(config)
        self.model = HeptapodModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.self_conditioning:
            self.self_conditioning_proj = HeptapodSelfConditioning(config.hidden_size, config.hidden_size, bias=False)
        if config.neighbor_loss_weight:
            size = config.hidden_size
            self.neighbor_projs = nn.ModuleList([nn.Linear(size, size, bias=False) for _ in DIRECTIONS])
        self.loss_function = masked_diffusion_loss
        self._has_checked_labels = False
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        grid_size: tuple[int, int] | None = None,
        self_conditioning_logits: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HeptapodMaskedLMOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
            Tokens of a page, or flat `(batch_size, height * width)`, row by row. Logits have the same leading shape.
        attention_mask (`torch.Tensor` of the shape of `input_ids`, *optional*):
            1 for cells of a page, 0 for padding, which makes pages of different sizes one batch. Without it every cell
            is part of the page and attended to, padding tokens included; a warning reports these.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, height, width, hidden_size)`, *optional*):
            Instead of `input_ids`; may be flat as well.
        labels (`torch.LongTensor` of the shape of `input_ids`, *optional*):
            The clean page, usually `input_ids`; `-100` at cells that the loss leaves out. Padding is always left out.
            For each row a ratio is drawn uniformly from (0, 1], stratified over the batch and over all processes of a
            distributed run, and each cell with a label is replaced by `config.mask_token_id` with this probability. The
            loss is the cross-entropy of these cells, each divided by its row's ratio, over the number of labels: an
            unbiased estimate of the negative ELBO in nats a cell. The logits are those of the masked page. In evaluation
            mode each page's ratio and cells are drawn from its own labels, whatever the batch, the padding and the device.

            `Trainer` divides by its own number of labels, counted before the forward pass. Set them to `-100` at padding,
            as `processor(text, return_labels=True)` does; otherwise the loss is too small by the share of padding.

            An error is raised for a page that is already masked, as by `DataCollatorForLanguageModeling` with `mlm=True`,
            for labels that differ from `input_ids`, and for mask tokens among the labels. On devices other than the CPU
            only the first batch is checked; later a mask token among the labels is left out.
        grid_size (`tuple`, *optional*, defaults to `config.grid_size`):
            Height and width of a flat page.
        self_conditioning_logits (`torch.FloatTensor` of the shape of the logits, *optional*):
            The model's last prediction for this page, with `config.self_conditioning`. When not given, it is computed
            first in half of the training steps with labels, and always in evaluation with labels.
        """
        loss_kwargs = pop_kwargs(kwargs, "num_items_in_batch")
        require_labels(labels, loss_kwargs.get("num_items_in_batch"), "the model masks the page by them")
        embeds = self.model.embed(input_ids, inputs_embeds, attention_mask)
        shape = embeds.shape[:-1]
        grid_size = page_size(shape, grid_size, self.config.grid_size)
        page: dict[str, Any] = {"attention_mask": attention_mask, "grid_size": grid_size}
        if labels is not None:
            given, labels = labels, self._prepare_labels(input_ids, labels, shape, attention_mask)
            if loss_kwargs.get("num_items_in_batch") is not None:
                warn_if_padding_was_counted(given, labels)
            if self.training:
                masked, mask_ratio = sample_mask(labels, None, *rank_and_num_ranks())
            else:
                masked, mask_ratio = sample_eval_masks(labels)
            embeds = self._mask(embeds, masked)
            if self._predicts_twice() and self_conditioning_logits is None:
                self_conditioning_logits = self._first_prediction(embeds, page)
        embeds = self._with_self_conditioning(embeds, self_conditioning_logits)
        outputs = self.model(inputs_embeds=embeds, **page, **kwargs)
        logits = cell_by_cell(self.lm_head, outputs.last_hidden_state)
        loss = masked_labels = None
        if labels is not None:
            masked_labels = labels.masked_fill(~masked, IGNORE_INDEX)
            excluded = self._excluded_tokens()
            draw: dict[str, Any] = {"labels": labels, "masked": masked, "mask_ratio": mask_ratio, "excluded": excluded}
            loss = self.loss_function(logits=logits, **draw, **loss_kwargs)
            if self.training and self.config.neighbor_loss_weight:
                heads = {"projections": self.neighbor_projs, "lm_head": self.lm_head}
                extra = neighbor_loss(outputs.last_hidden_state, **heads, **page, **draw, **loss_kwargs)
                loss = loss + self.config.neighbor_loss_weight * extra
            if self.training and self.config.span_loss_weight:
                radii = [self.config.neighborhood(layer)[0] for layer in range(self.config.num_hidden_layers)]
                radii = [radius for radius in radii if radius is not None]
                extra = span_loss(outputs.spans, radii, grid_size, labels, **loss_kwargs)
                loss = loss + self.config.span_loss_weight * extra
        return HeptapodMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masked_labels=masked_labels,
            spans=outputs.spans,
        )

    @torch.no_grad()
    def elbo(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        num_samples: int = 32,
        generator: torch.Generator | None = None,
        labels: torch.LongTensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> ElboEstimate:
        """Estimates the negative ELBO of each page in nats, an upper bound of `-log p(page)`, and its standard error.

        The bound is that of the loss, with less noise: the number of masked cells is drawn, uniformly from 1 to all `n`,
        instead of a ratio, and `n / number` takes the place of its inverse. Both average to the mean over all orders in
        which the cells can be generated one by one. The samples are stratified. Call it in evaluation mode.

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, height, width]`, or flat): clean pages.
            attention_mask (`torch.Tensor` of the same shape, *optional*): 1 for cells of a page, 0 for padding.
            num_samples (`int`): forward passes, an even number; twice as many with `config.self_conditioning`.
            generator (`torch.Generator`, *optional*): source of the random numbers, on the device of `input_ids`.
            labels (`torch.LongTensor` of the same shape, *optional*): `input_ids`, with `-100` at cells that are given:
                the bound is then of the others given these.
            grid_size (`tuple`, *optional*): height and width of flat pages.

        Raises:
            ValueError: if `num_samples` is not an even number of at least 2, and as in `forward`.
        """
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"`num_samples` must be an even number of at least 2, got {num_samples}.")
        clean = self.model.embed(input_ids, attention_mask=attention_mask)
        grid_size = page_size(input_ids.shape, grid_size, self.config.grid_size)
        page = {"attention_mask": attention_mask, "grid_size": grid_size}
        labels = self._prepare_labels(input_ids, labels, input_ids.shape, attention_mask)

        def predict(masked):
            embeds = self._mask(clean, masked)
            self_conditioning_logits = self._first_prediction(embeds, page) if self.config.self_conditioning else None
            embeds = self._with_self_conditioning(embeds, self_conditioning_logits)
            return cell_by_cell(self.lm_head, self.model(inputs_embeds=embeds, **page)[0])

        return estimate_elbo(predict, labels, num_samples, self._excluded_tokens(), generator)

    def _prepare_labels(self, input_ids, labels, shape, attention_mask):
        labels = prepare_labels(input_ids if labels is None else labels, shape, attention_mask, self.config)
        mask_token_id = self.config.mask_token_id
        assert mask_token_id is not None  # for type checkers
        # Off the CPU a read synchronizes the device, so only the first batch is read: wrong batches are rarely the only one.
        if values_are_readable(labels) or not (self._has_checked_labels or is_tracing(labels)):
            check_clean(input_ids, labels, mask_token_id)
            self._has_checked_labels = True
        return labels.masked_fill(labels == mask_token_id, IGNORE_INDEX)

    def _excluded_tokens(self):
        """Tokens that are never generated, so that they get no probability."""
        return [x for x in (self.config.mask_token_id, self.config.pad_token_id) if x is not None]

    def _mask(self, inputs_embeds, masked):
        mask_token = torch.tensor(self.config.mask_token_id, device=masked.device)
        return torch.where(masked.unsqueeze(-1), self.model.embed_tokens(mask_token).to(inputs_embeds), inputs_embeds)

    def _predicts_twice(self):
        """Whether self-conditioning takes a first prediction: in evaluation, and in half of the training steps."""
        return self.config.self_conditioning and (not self.training or bool(torch.rand(()) < 0.5))

    @torch.no_grad()
    def _first_prediction(self, inputs_embeds, page):
        return cell_by_cell(self.lm_head, self.model(inputs_embeds=inputs_embeds, **page)[0])

    def _with_self_conditioning(self, inputs_embeds, self_conditioning_logits):
        """Embeddings plus the projected mean embedding of the last prediction."""
        if self_conditioning_logits is None:
            if not (self.config.self_conditioning and self.training):
                return inputs_embeds
            # Adds zeros: distributed training needs every parameter in every step.
            return inputs_embeds + cell_by_cell(self.self_conditioning_proj, torch.zeros_like(inputs_embeds))
        if not self.config.self_conditioning:
            raise ValueError("`self_conditioning_logits` were given, but `config.self_conditioning` is False.")
        expected = [*inputs_embeds.shape[:-1], self.config.vocab_size]
        if list(self_conditioning_logits.shape) != expected:
            raise ValueError(
                f"`self_conditioning_logits` must be {expected}, got {list(self_conditioning_logits.shape)}."
            )
        # All embeddings through the module: its weight may be offloaded, quantized or have an adapter.
        table = self.model.embed_tokens(torch.arange(self.config.vocab_size, device=inputs_embeds.device))
        dtype = torch.promote_types(table.dtype, torch.float32)
        share = torch.softmax(self_conditioning_logits.to(inputs_embeds.device, dtype), dim=-1)
        feedback = cell_by_cell(self.self_conditioning_proj, share.to(table.dtype) @ table)
        return inputs_embeds + feedback.to(inputs_embeds.dtype)


__all__ = ["HeptapodForMaskedLM", "HeptapodMaskedLMOutput", "HeptapodModel", "HeptapodPreTrainedModel"]
