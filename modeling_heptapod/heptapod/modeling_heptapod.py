"""The Heptapod grid: a page of tokens, each attending to its neighbours on all sides, trained to fill what is masked.

Read bottom-up: attention, layer, model, head. The arithmetic of attention is in `local_attention.py`, writing pages is
in `generation_heptapod.py`. The prototype is `nonlinear-transformer` on PyPI; the training objective is that of masked
diffusion (MDLM, arXiv 2406.07524).
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ..common.auto_mapping import AutoMappingMixin
from ..common.losses import IGNORE_INDEX, at_least_one, require_labels
from ..common.model_inputs import apply_mask_to_padding_states, check_ids, check_one_input, has_dynamic_shapes
from ..common.unused_kwargs import pop_kwargs, reject_unused_kwargs
from .configuration_heptapod import HeptapodConfig
from .generation_heptapod import HeptapodGenerationMixin
from .local_attention import attention_weights, grid_rotary, local_attention, rotate


logger = logging.get_logger(__name__)

_DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # above, below, left, right


def cell_by_cell(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer on a page `[batch, height, width, channels]`, given `[batch, cells, channels]`.

    Adapters and quantized layers of other libraries take no more dimensions.
    """
    return layer(x.flatten(1, -2)).view(*x.shape[:-1], -1)


class HeptapodAttention(nn.Module):
    """Attention to the neighbourhood of each cell, to the whole page, or with some heads to one and some to the other.

    Its `attentions` are `[batch, heads, cells, cells]`. Asking for them, or `attn_implementation="eager"`, takes a path
    that is quadratic in cells; otherwise no such matrix is ever made.
    """

    def __init__(self, config: HeptapodConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        radius, dilation = config.neighborhood(layer_idx)
        split = self.num_heads - config.num_global_heads if radius is not None else 0
        groups = (slice(0, split), radius, dilation), (slice(split, self.num_heads), None, 1)
        self.head_groups = [group for group in groups if group[0].start < group[0].stop]  # heads, radius, dilation
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        padding_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv_proj(hidden_states).view(hidden_states.shape[0], *grid_size, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # [batch, heads, height, width, head_dim]
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        dropout = self.attention_dropout if self.training else 0.0
        use_eager = (
            output_attentions or self.config._attn_implementation == "eager" or has_dynamic_shapes(hidden_states)
        )
        attentions = None
        if use_eager:
            parts = [attention_weights(q[:, at], k[:, at], *window, padding_mask) for at, *window in self.head_groups]
            attentions = torch.cat(parts, dim=1)
            out = nn.functional.dropout(attentions, dropout) @ v.flatten(2, 3)
            out = out.unflatten(2, grid_size)
        else:
            parts = [
                local_attention(q[:, at], k[:, at], v[:, at], *window, padding_mask, dropout=dropout)
                for at, *window in self.head_groups
            ]
            out = torch.cat(parts, dim=1)
        out = out.permute(0, 2, 3, 1, 4).reshape(hidden_states.shape)
        return self.o_proj(out), attentions if output_attentions else None


class HeptapodMLP(nn.Module):
    def __init__(self, config: HeptapodConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class HeptapodLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention and feed-forward, each with a residual connection."""

    def __init__(self, config: HeptapodConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = HeptapodAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HeptapodMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        page = hidden_states.shape
        hidden_states = hidden_states.flatten(1, -2)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states.view(page)


class HeptapodSinePositionEmbedding(nn.Module):
    """Where a cell lies on its page: its distances to the four borders, as sines and cosines of eight frequencies.

    Rotary positions tell how cells lie to each other, not where: on an empty page, whose cells all hold the same mask
    token, attention averages equal vectors, and every cell would be told the same.
    """

    num_frequencies = 8

    def __init__(self, config: HeptapodConfig):
        super().__init__()
        self.theta = config.rope_theta
        self.proj = nn.Linear(8 * self.num_frequencies, config.hidden_size, bias=False)

    def forward(
        self, grid_size: tuple[int, int], like: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings `[1 or batch, height, width, hidden_size]` on the device and in the dtype of the tensor `like`.

        Pages begin and end with their first and last real cell.
        """
        device = like.device  # not that of the weight, which is elsewhere while offloaded
        distances = []
        for axis, length in enumerate(grid_size):
            place = torch.arange(length, device=device)[None]
            first, last = place[:, :1], place[:, -1:]
            if padding_mask is not None:
                real = padding_mask.any(2 - axis).int()
                first, last = real.argmax(1, keepdim=True), length - 1 - real.flip(1).argmax(1, keepdim=True)
            shape = (-1, length, 1) if axis == 0 else (-1, 1, length)
            distances += [x.view(shape).expand(-1, *grid_size) for x in (place - first, last - place)]
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=device) / self.num_frequencies
        angles = (torch.stack(distances, dim=-1).unsqueeze(-1) * self.theta**-steps).flatten(-2)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1) / (4 * self.num_frequencies) ** 0.5
        return cell_by_cell(self.proj, features.to(like.dtype)).to(
            like.dtype
        )  # under autocast the product has another


class HeptapodSelfConditioning(nn.Linear):
    """What the model makes of its last prediction. It starts at zero: an untrained model does not listen to itself."""


@auto_docstring
class HeptapodPreTrainedModel(AutoMappingMixin, PreTrainedModel):
    config: HeptapodConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HeptapodLayer"]
    _supports_sdpa = True  # what the local operator and the global heads use; "eager" makes attention matrices
    # Training breaks the graph in two places: attention dropout on pages in tiles, and the coin of self-conditioning.
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HeptapodLayer, "attentions": HeptapodAttention}

    def __init__(self, config: HeptapodConfig, *args, **kwargs):
        config.validate_architecture()  # values may have been set since, as `from_pretrained` sets what it overrides
        super().__init__(config, *args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module`'s. Raises a `ValueError` for peft's prompt learning, which looks for this name when it wraps."""
        if target == "embeddings.word_embeddings":
            raise ValueError(
                "Prompt learning (prefix, prompt and p-tuning) puts virtual tokens before a text, but a page of the grid has no "
                "cell for them: use LoRA or another adapter."
            )
        return super().get_submodule(target)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # between "sdpa" and "eager"; transformers would look for its own interface in the source

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HeptapodSelfConditioning):
            init.zeros_(module.weight)


@auto_docstring
class HeptapodModel(HeptapodPreTrainedModel):
    def __init__(self, config: HeptapodConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = (
            HeptapodSinePositionEmbedding(config) if config.use_absolute_position_embeddings else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            [HeptapodLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        grid_size: tuple[int, int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
            Tokens of a page, or flat `(batch_size, height * width)`, row after row. Outputs have the same leading
            shape.
        attention_mask (`torch.Tensor` of the shape of `input_ids`, *optional*):
            1 for cells of a page, 0 for what lies around it: pages of different size in one batch. Without it every
            cell is part of the page and seen by others, pad tokens as well, of which a warning tells.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, height, width, hidden_size)`, *optional*):
            Instead of `input_ids`; may be flat as well.
        grid_size (`tuple`, *optional*, defaults to `config.grid_size`):
            Height and width of a page that is given flat.
        output_attentions (`bool`, *optional*):
            Whether to also give each layer's `[batch, heads, cells, cells]`: takes time and memory quadratic in cells.
        """
        reject_unused_kwargs(self, kwargs)
        inputs_embeds = self.embed(input_ids, inputs_embeds, attention_mask)
        grid_size = self.page_size(inputs_embeds.shape[:-1], grid_size)
        padding_mask = _padding_mask(attention_mask, inputs_embeds.shape[:-1], grid_size)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        rotary = grid_rotary(*grid_size, self.config.head_dim, self.config.rope_theta, inputs_embeds.device)
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            places = self.embed_positions(grid_size, inputs_embeds, padding_mask)
            hidden_states = hidden_states + places.expand(inputs_embeds.shape[0], *places.shape[1:]).reshape_as(
                inputs_embeds
            )
        if padding_mask is not None:
            hidden_states = apply_mask_to_padding_states(hidden_states, padding_mask.view(hidden_states.shape[:-1]))
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                grid_size=grid_size,
                rotary=rotary,
                padding_mask=padding_mask,
                output_attentions=output_attentions,
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of tokens, `[batch, height, width, hidden_size]` or flat, or the given ones.

        Warns once of pad tokens without an attention mask.

        Raises:
            TypeError, ValueError: unless exactly one is given, of the right dtype and shape.
        """
        check_one_input(input_ids, inputs_embeds)
        if input_ids is None:
            width = self.config.hidden_size
            if inputs_embeds.dim() not in (3, 4) or 0 in inputs_embeds.shape or inputs_embeds.shape[-1] != width:
                raise ValueError(
                    f"`inputs_embeds` must be [batch, height, width, {width}] or [batch, cells, {width}], none of them "
                    f"0, got {list(inputs_embeds.shape)}."
                )
            return inputs_embeds
        if input_ids.dim() not in (2, 3) or 0 in input_ids.shape:
            raise ValueError(
                "`input_ids` must be [batch, height, width] or [batch, cells], none of them 0, got "
                f"{list(input_ids.shape)}."
            )
        _check_range("input_ids", input_ids, self.config.vocab_size)
        if attention_mask is None and self.config.pad_token_id is not None and not is_tracing(input_ids):
            if (input_ids == self.config.pad_token_id).any():
                logger.warning_once(
                    f"`input_ids` hold the pad token {self.config.pad_token_id}, but there is no `attention_mask`: "
                    "these cells are taken for part of the page and change what is predicted for the others."
                )
        return self.embed_tokens(input_ids)

    def page_size(self, shape: tuple[int, ...], grid_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width of a page from the leading shape of an input, `[batch, height, width]` or `[batch, cells]`.

        Raises:
            ValueError: where the size of a flat page is unknown, or `grid_size` does not fit.
        """
        if grid_size is not None and not _is_size(grid_size):
            raise ValueError(f"`grid_size` must be a height and a width of at least 1, got {grid_size!r}.")
        if len(shape) == 3:
            height, width = shape[1:]
            if grid_size is not None and tuple(grid_size) != (height, width):
                raise ValueError(f"`grid_size` {tuple(grid_size)} does not fit the page given, {height} x {width}.")
            return height, width
        grid_size = self.config.grid_size if grid_size is None else grid_size
        if grid_size is None:
            raise ValueError(f"A flat page of {shape[1]} cells needs `grid_size`, in the call or in the config.")
        height, width = grid_size
        if height * width != shape[1]:
            raise ValueError(f"`grid_size` {height} x {width} does not fit a flat page of {shape[1]} cells.")
        return height, width


def _is_size(grid_size):
    """Whether it is two positive integers; what an export leaves open is taken as it is."""
    if not isinstance(grid_size, (tuple, list)) or len(grid_size) != 2:
        return False
    return all(isinstance(x, torch.SymInt) or (isinstance(x, int) and x > 0) for x in grid_size)


def _padding_mask(attention_mask, shape, grid_size):
    """`[batch, height, width]`, or `None` where nothing is padded."""
    _check_shape("attention_mask", attention_mask, shape)
    if attention_mask is None or (not is_tracing(attention_mask) and attention_mask.all()):
        return None
    return attention_mask.bool().view(shape[0], *grid_size)


def _check_shape(name, tensor, shape):
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"`{name}` must be {list(shape)} like the page, got {list(tensor.shape)}.")


def _check_clean(input_ids, labels, mask_token_id):
    """Raise a `ValueError` where cells that count are masked already, or are not what the page holds."""
    counts = labels != IGNORE_INDEX
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if ids is not None and ((ids == mask_token_id) & counts).any():
            raise ValueError(
                f"`{name}` hold the mask token ({mask_token_id}), which stands for cells yet to be written, where "
                "`labels` count: give the clean page, the model masks it itself. `DataCollatorForLanguageModeling` needs "
                "`mlm=False`."
            )
    if input_ids is not None and ((input_ids != labels) & counts).any():
        number = int(((input_ids != labels) & counts).sum())
        raise ValueError(
            f"`labels` must be `input_ids` where they are not {IGNORE_INDEX}, but {number} of {int(counts.sum())} differ: give "
            "the clean page, the model masks it itself."
        )


def _may_be_looked_at(ids):
    """On the CPU; elsewhere reading values would synchronize the device."""
    return ids.device.type == "cpu" and not is_tracing(ids)


def _check_range(name, ids, size):
    """Raise a `ValueError` for ids beyond the vocabulary, where they may be looked at."""
    if _may_be_looked_at(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"`{name}` must be in [0, {size}), got values from {low} to {high}.")


@auto_docstring(
    custom_intro="""
    Output of the masked language model, with the cells that the loss counted.
    """
)
@dataclass
class HeptapodMaskedLMOutput(MaskedLMOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Negative ELBO in nats a cell, where there are labels.
    logits (`torch.FloatTensor` of shape `(batch_size, height, width, vocab_size)`, or of flat pages):
        Scores of each cell's token.
    hidden_states (`tuple`, *optional*):
        The stream before the first and after each layer, the last one normalised.
    attentions (`tuple`, *optional*):
        Of each layer, `[batch_size, heads, cells, cells]`.
    masked_labels (`torch.LongTensor` of the shape of `labels`, *optional*):
        The labels of the cells that the loss counted, which the model did not see; -100 at all others, whose logits
        training says nothing about. `Trainer` hands it to `compute_metrics` behind the logits:
        `logits, counted = prediction.predictions`.
    """

    masked_labels: torch.LongTensor | None = None


class ElboEstimate(NamedTuple):
    """Estimates of `-log p(page)` from above, see `HeptapodForMaskedLM.elbo`.

    Attributes:
        nats (`torch.Tensor` of shape `[batch]`): of whole pages, not a cell.
        standard_error (`torch.Tensor` of shape `[batch]`): of these estimates.
    """

    nats: torch.Tensor
    standard_error: torch.Tensor


def token_nll(logits: torch.Tensor, labels: torch.Tensor, excluded: list[int]) -> torch.Tensor:
    """`-log p(label)` of cells, in float32 at least.

    Args:
        logits (`torch.Tensor` of shape `[..., vocab]`).
        labels (`torch.LongTensor` of shape `[...]`): zero nats where `-100`; on any device.
        excluded (`list[int]`): tokens that are never written, so that they take no probability.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if excluded:
        columns = torch.tensor(excluded, device=logits.device)
        logits = logits.index_fill(-1, columns, torch.finfo(logits.dtype).min)
    nats = nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return nats.view(labels.shape)


def masked_diffusion_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    mask_ratio: torch.Tensor,
    excluded: list[int],
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross entropy of the masked cells, each over its row's mask ratio, over all cells that count.

    With the ratio drawn uniformly from (0, 1] this is an unbiased estimate of the negative ELBO in nats a cell (MDLM,
    arXiv 2406.07524).

    Args:
        logits (`torch.Tensor` of shape `[batch, ..., vocab]`).
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` where a cell does not count.
        masked (`torch.BoolTensor` of the shape of `labels`): the cells that the model did not see.
        mask_ratio (`torch.Tensor` of shape `[batch]`): the probability with which they were masked.
        excluded (`list[int]`): tokens that are never written.
        num_items_in_batch (`int`, *optional*): cells that count in all batches of one optimizer step.
    """
    nats = token_nll(logits, labels.masked_fill(~masked, IGNORE_INDEX), excluded).flatten(1).sum(1)
    return (nats / mask_ratio.to(nats)).sum() / _count(labels, num_items_in_batch, nats.device)


def _count(labels, num_items_in_batch, device):
    count = at_least_one((labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
    return count.to(device) if torch.is_tensor(count) else count


@auto_docstring(
    custom_intro="""
    The Heptapod grid with a masked language modeling head, trained by masked diffusion. With `labels`, the model itself
    masks cells of the clean page that it is given, and predicts them.
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
            self.neighbor_projs = nn.ModuleList(
                [nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in _DIRECTIONS]
            )
        self.loss_function = masked_diffusion_loss
        self._has_looked_at_labels = False
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
            Tokens of a page, or flat `(batch_size, height * width)`, row after row. Logits have the same leading shape.
        attention_mask (`torch.Tensor` of the shape of `input_ids`, *optional*):
            1 for cells of a page, 0 for what lies around it: pages of different size in one batch. Without it every
            cell is part of the page and seen by others, pad tokens as well, of which a warning tells.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, height, width, hidden_size)`, *optional*):
            Instead of `input_ids`; may be flat as well.
        labels (`torch.LongTensor` of the shape of `input_ids`, *optional*):
            The clean page, usually `input_ids` themselves; `-100` where a cell does not count, as pads never do. For
            each row a ratio is drawn uniformly from (0, 1], stratified over the batch and over all processes of a
            distributed run, and each cell that counts is replaced by `config.mask_token_id` with this probability. The
            loss is the cross entropy of these cells, each over its row's ratio, over the number of cells that count:
            an unbiased estimate of the negative ELBO in nats a cell. The logits are those of the masked page, and
            `masked_labels` of the output says which cells were masked. In evaluation mode each page's ratio and cells
            are drawn from its own labels, whatever the batch, the padding and the device.

            `Trainer` divides by a number of its own, for which it counts all labels but `-100` before the model sees
            them. Write `-100` at pads for it, as `processor(text, return_labels=True)` does; otherwise loss and
            gradient are too small by the share of pads.

            The model does the masking: a page that was masked already, as by `DataCollatorForLanguageModeling` with
            `mlm=True`, is an error, as are other labels than `input_ids` and a mask token among them. On devices other
            than the CPU the first batch is looked at, and later a mask token among the labels does not count.
        grid_size (`tuple`, *optional*, defaults to `config.grid_size`):
            Height and width of a page that is given flat.
        self_conditioning_logits (`torch.FloatTensor` of the shape of the logits, *optional*):
            The model's last prediction for this page, with `config.self_conditioning`. When not given, training with
            labels makes one first in half of the steps, evaluation with labels always.
        """
        of_loss = pop_kwargs(kwargs, "num_items_in_batch")
        require_labels(labels, of_loss.get("num_items_in_batch"), "the model masks the page by them")
        inputs_embeds = self.model.embed(input_ids, inputs_embeds, attention_mask)
        shape = inputs_embeds.shape[:-1]
        page = {"attention_mask": attention_mask, "grid_size": self.model.page_size(shape, grid_size)}
        predict_twice = False
        if labels is not None:
            given, labels = labels, self._cells_that_count(labels, shape, attention_mask, input_ids)
            if of_loss.get("num_items_in_batch") is not None:
                _warn_of_pads_that_were_counted(given, labels)
            if self.training:
                masked, mask_ratio = sample_mask(labels, None, *_rank_and_ranks())
            else:
                masked, mask_ratio = sample_eval_masks(labels)
            inputs_embeds = self._mask(inputs_embeds, masked)
            predict_twice = self.config.self_conditioning and (not self.training or bool(torch.rand(()) < 0.5))
        if predict_twice and self_conditioning_logits is None:
            self_conditioning_logits = self._first_prediction(inputs_embeds, page)
        outputs = self.model(
            inputs_embeds=self._with_self_conditioning(inputs_embeds, self_conditioning_logits), **page, **kwargs
        )
        logits = cell_by_cell(self.lm_head, outputs.last_hidden_state)
        loss = masked_labels = None
        if labels is not None:
            masked_labels = labels.masked_fill(~masked, IGNORE_INDEX)
            about = {"labels": labels, "masked": masked, "mask_ratio": mask_ratio, "excluded": self._never_written()}
            loss = self.loss_function(logits=logits, **about, **of_loss)
            if self.training and self.config.neighbor_loss_weight:
                neighbor_loss = self._neighbor_loss(outputs.last_hidden_state, page, **about, **of_loss)
                loss = loss + self.config.neighbor_loss_weight * neighbor_loss
        return HeptapodMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masked_labels=masked_labels,
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
        """The negative ELBO of each page in nats, and its standard error: how many nats the page costs at most.

        It is the same bound as that of the loss, estimated with less noise: a number of masked cells, uniform from 1 to
        all `n`, takes the place of a ratio, and `n / number` that of its inverse; both average to the mean over all
        orders in which the cells can be written one by one. Samples are stratified by this number, two of each stratum,
        whose differences give the standard error. Call it in evaluation mode.

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, height, width]`, or flat): clean pages.
            attention_mask (`torch.Tensor` of the same shape, *optional*): 1 for cells of a page.
            num_samples (`int`): forward passes, an even number; twice as many with `config.self_conditioning`.
            generator (`torch.Generator`, *optional*): of the draw, on the device of `input_ids`.
            labels (`torch.LongTensor` of the same shape, *optional*): `input_ids`, with `-100` at cells that are given:
                the result is then the cost of the others given these. All cells of the page when not given.
            grid_size (`tuple`, *optional*): of flat pages.

        Raises:
            ValueError: where `num_samples` is not an even number of at least 2, and as in `forward`.
        """
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"`num_samples` must be an even number of at least 2, got {num_samples}.")
        clean = self.model.embed(input_ids, attention_mask=attention_mask)
        page = {"attention_mask": attention_mask, "grid_size": self.model.page_size(input_ids.shape, grid_size)}
        labels = input_ids if labels is None else labels
        labels = self._cells_that_count(labels, input_ids.shape, attention_mask, input_ids)
        count = (labels != IGNORE_INDEX).flatten(1).sum(1)
        strata = num_samples // 2
        samples = []
        for sample in range(num_samples):
            place = torch.rand(len(count), generator=generator, device=count.device)
            number = ((sample // 2 + place) / strata * count).long().clamp_max(count - 1) + 1
            masked = _choose(labels != IGNORE_INDEX, number, generator)
            embeds = self._mask(clean, masked)
            self_conditioning_logits = self._first_prediction(embeds, page) if self.config.self_conditioning else None
            hidden_states = self.model(
                inputs_embeds=self._with_self_conditioning(embeds, self_conditioning_logits), **page
            )[0]
            logits = cell_by_cell(self.lm_head, hidden_states)
            nats = token_nll(logits, labels.masked_fill(~masked, IGNORE_INDEX), self._never_written())
            samples.append(nats.flatten(1).sum(1) * count / number.clamp_min(1))
        pairs = torch.stack(samples).unflatten(0, (strata, 2))  # [strata, 2, batch]
        error = (pairs[:, 0] - pairs[:, 1]).square().sum(0).sqrt() / (2 * strata)
        return ElboEstimate(pairs.mean((0, 1)), error)

    def _cells_that_count(self, labels, shape, attention_mask, input_ids=None):
        """The labels, checked, with `-100` at pads; and at masks, where they go unnoticed."""
        if self.config.mask_token_id is None:
            raise ValueError("`labels` need a `config.mask_token_id` to mask cells with, got None.")
        check_ids("labels", labels)
        _check_shape("labels", labels, shape)
        _check_shape("attention_mask", attention_mask, shape)
        labels = labels.long()
        if self.config.pad_token_id is not None:
            labels = labels.masked_fill(labels == self.config.pad_token_id, IGNORE_INDEX)
        if attention_mask is not None:
            labels = labels.masked_fill(~attention_mask.bool(), IGNORE_INDEX)
        _check_range("labels", labels.masked_fill(labels == IGNORE_INDEX, 0), self.config.vocab_size)
        mask_token_id = self.config.mask_token_id
        # Off the CPU reading values synchronizes the device: once, since what makes wrong batches makes them all the time.
        if _may_be_looked_at(labels) or not (self._has_looked_at_labels or is_tracing(labels)):
            _check_clean(input_ids, labels, mask_token_id)
            self._has_looked_at_labels = True
        return labels.masked_fill(labels == mask_token_id, IGNORE_INDEX)

    def _never_written(self):
        """Tokens that no cell is ever given, so that they take no share of its probability."""
        return [x for x in (self.config.mask_token_id, self.config.pad_token_id) if x is not None]

    def _mask(self, inputs_embeds, masked):
        mask_token = torch.tensor(self.config.mask_token_id, device=masked.device)
        return torch.where(masked.unsqueeze(-1), self.model.embed_tokens(mask_token).to(inputs_embeds), inputs_embeds)

    @torch.no_grad()
    def _first_prediction(self, inputs_embeds, page):
        return cell_by_cell(self.lm_head, self.model(inputs_embeds=inputs_embeds, **page)[0])

    def _with_self_conditioning(self, inputs_embeds, self_conditioning_logits):
        """Embeddings, and on top of them what the model made of the page last time."""
        if self_conditioning_logits is None:
            if not (self.config.self_conditioning and self.training):
                return inputs_embeds
            # Adds zeros: in distributed training every parameter takes part in every step.
            return inputs_embeds + cell_by_cell(self.self_conditioning_proj, torch.zeros_like(inputs_embeds))
        if not self.config.self_conditioning:
            raise ValueError("`self_conditioning_logits` were given, but `config.self_conditioning` is False.")
        expected = [*inputs_embeds.shape[:-1], self.config.vocab_size]
        if list(self_conditioning_logits.shape) != expected:
            raise ValueError(
                f"`self_conditioning_logits` must be {expected}, got {list(self_conditioning_logits.shape)}."
            )
        # All embeddings as the module gives them: its weight may be offloaded, quantized or have an adapter on top.
        table = self.model.embed_tokens(torch.arange(self.config.vocab_size, device=inputs_embeds.device))
        dtype = torch.promote_types(table.dtype, torch.float32)
        share = torch.softmax(self_conditioning_logits.to(inputs_embeds.device, dtype), dim=-1)
        feedback = cell_by_cell(self.self_conditioning_proj, share.to(table.dtype) @ table)
        return inputs_embeds + feedback.to(inputs_embeds.dtype)

    def _neighbor_loss(
        self, hidden_states, page, labels, masked, mask_ratio, excluded, num_items_in_batch=None, **kwargs
    ):
        """The loss of masked cells once more, predicted from the cells around them; the mean over four directions."""
        grid = labels.shape[0], *page["grid_size"]
        states, real = hidden_states.view(*grid, -1), page["attention_mask"]
        labels, masked = (x.view(grid).to(states.device) for x in (labels, masked))
        real = None if real is None else real.bool().view(grid).to(states.device)
        total = 0.0
        for (down, across), projection in zip(_DIRECTIONS, self.neighbor_projs):
            here, there = _overlap(down, across, *grid[1:])
            wanted = masked[there] if real is None else masked[there] & real[here]
            predicted = self.lm_head(projection(states[here][wanted]))
            nats = token_nll(predicted, labels[there][wanted], excluded)
            ratio = mask_ratio.to(nats).view(-1, 1, 1).expand_as(wanted)[wanted]
            total = total + (nats / ratio).sum()
        return total / (len(_DIRECTIONS) * _count(labels, num_items_in_batch, total.device))


def sample_mask(
    labels: torch.Tensor, generator: torch.Generator | None = None, rank: int = 0, num_ranks: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells to mask, and with which probability.

    The ratios of a batch are evenly spaced, from a common random start: each is uniform, together they cover (0, 1].
    Processes that draw the same numbers, as those that `Trainer` starts do, have ratios between each other's, and other
    cells: what each draws is moved on, around the circle, which leaves it uniform.

    Args:
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that are never masked.
        generator (`torch.Generator`, *optional*): the global one when not given.
        rank, num_ranks (`int`): which of how many processes this is.

    Returns:
        `torch.BoolTensor` of the shape of `labels`, and the ratios, float32 `[batch]`, in (0, 1].
    """
    batch, device = labels.shape[0], labels.device
    start = torch.rand((), generator=generator, device=device)
    rows = rank + num_ranks * torch.arange(batch, device=device)
    mask_ratio = 1 - (start + rows / (num_ranks * batch)) % 1
    chance = torch.empty(labels.shape, device=device).uniform_(generator=generator)  # `rand` takes no open sizes
    chance = (chance + rank / num_ranks) % 1 if rank else chance
    return (labels != IGNORE_INDEX) & (chance < mask_ratio.view(-1, *[1] * (labels.dim() - 1))), mask_ratio


def _rank_and_ranks():
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _warn_of_pads_that_were_counted(given, labels):
    """`Trainer` hands over how many labels of a step are not `-100`, some of them in batches that are not at hand."""
    if _may_be_looked_at(given) and (given != labels).any():
        logger.warning_once(
            "`labels` hold pads, which do not count, but were counted in `num_items_in_batch`: the loss is too small. "
            f"Give them the label {IGNORE_INDEX}, as `HeptapodProcessor(..., return_labels=True)` does."
        )


def sample_eval_masks(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample_mask`, but each page's ratio and cells are drawn from its own labels, in reading order.

    Whatever the model, the device, the batch and the padding, a page is always masked in the same way. So a loss over many
    pages does not depend on how they are batched.

    Args:
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that are never masked.

    Returns:
        `torch.BoolTensor` of the shape of `labels`, and the ratios, float32 `[batch]`, in (0, 1].
    """
    pages = labels.detach().cpu().long()
    masked, mask_ratio = torch.zeros_like(pages, dtype=torch.bool), torch.empty(len(pages))
    for row, page in enumerate(pages):
        counts = page != IGNORE_INDEX
        cells = page[counts]
        generator = torch.Generator().manual_seed(zlib.crc32(cells.numpy().tobytes()))
        mask_ratio[row] = 1 - torch.rand((), generator=generator)
        masked[row, counts] = torch.rand(len(cells), generator=generator) < mask_ratio[row]
    return masked.to(labels.device), mask_ratio.to(labels.device)


def _choose(candidates, number, generator):
    """As many of each row's candidates as `number` says, all sets equally likely. Both masks `[batch, ...]`."""
    order = torch.rand(candidates.flatten(1).shape, generator=generator, device=candidates.device)
    order = order.masked_fill(~candidates.flatten(1), 2.0)  # comes last
    chosen = order.argsort(1).argsort(1) < number[:, None]
    return chosen.view(candidates.shape) & candidates


def _overlap(down, across, height, width):
    """Indices of all cells that have a neighbour in this direction, and of these neighbours."""
    here = slice(max(0, -down), height - max(0, down)), slice(max(0, -across), width - max(0, across))
    there = slice(max(0, down), height - max(0, -down)), slice(max(0, across), width - max(0, -across))
    return (slice(None), *here), (slice(None), *there)


__all__ = ["HeptapodForMaskedLM", "HeptapodMaskedLMOutput", "HeptapodModel", "HeptapodPreTrainedModel"]
