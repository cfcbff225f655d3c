"""The layers of MultiGrid. Blocks of equal shape are computed together.

One layer of the main stream and `A` axis streams has `1 + 3 A` pre-norm blocks of a mixer and a feed-forward:

    x       <- self_block(x)                            every stream reads its own past
    main_a  <- main_cross_blocks[a](main, meta_a)       the main stream reads axis a
    meta_a  <- axis_cross_blocks[a](meta_a, main)       at the same time, axis a reads the main stream
    main    <- main + sum_a axis_weights[a] * (main_a - main)

Position `t` of a stream reads positions up to `t` only, of itself or of another stream after its self block.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.model_inputs import check_ids
from ..common.transformers_versions import with_cache_argument
from .configuration_multigrid import MultiGridConfig
from .multigrid_cache import MultiGridCache, StaticMultiGridCache
from .multigrid_context import MultiGridContext
from .multigrid_cores import CORES, Group, grouped_linear, grouped_norm


class MultiGridMLP(nn.Module):
    def __init__(self, config: MultiGridConfig, width: int, inner: int):
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        # The same function in one operation instead of eight.
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]


def grouped_mlp(mlps: list[MultiGridMLP], x: torch.Tensor) -> torch.Tensor:
    """Feed-forwards of all streams `[streams, batch, seq, width]`."""
    x = grouped_linear([mlp.up_proj for mlp in mlps], x)
    return grouped_linear([mlp.down_proj for mlp in mlps], mlps[0].act_fn(x))


class MultiGridBlock(nn.Module):
    """Weights of one pre-norm block: mixer and feed-forward of a stream that reads its own past or another stream.

    Args:
        config (`MultiGridConfig`): of the model.
        is_axis (`bool`): whether the block changes an axis stream.
        is_cross (`bool`): whether it reads a stream of the other kind.
    """

    def __init__(self, config: MultiGridConfig, is_axis: bool, is_cross: bool):
        super().__init__()
        core = CORES[config.core]
        sizes = [
            (config.hidden_size, config.intermediate_size),
            (config.axis_hidden_size, config.axis_intermediate_size),
        ]
        width, inner = sizes[is_axis]
        other_width = sizes[not is_axis][0]
        self.input_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if is_cross:
            self.key_value_layernorm = nn.LayerNorm(other_width, eps=config.layer_norm_eps)
        reach = config.axis_hidden_size
        self.mixer = core.cross_mixer(width, other_width, reach) if is_cross else core.self_mixer(width)
        self.mlp = None
        if not is_cross or config.cross_feed_forward:
            self.post_attention_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp = MultiGridMLP(config, width, inner)

    def close(self):
        """Initialise output projections to zero, so that the block starts as a no-op."""
        outputs = [self.mixer.get_submodule("o_proj")]
        if self.mlp is not None:
            outputs.append(self.mlp.down_proj)
        for linear in outputs:
            for parameter in linear.parameters():
                init.zeros_(parameter)


class MultiGridLayer(GradientCheckpointingLayer):
    """The `1 + 3 A` blocks of one layer with `A` axes."""

    def __init__(self, config: MultiGridConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.hidden_dropout = config.hidden_dropout
        axes = range(config.num_axes)
        self.self_block = MultiGridBlock(config, is_axis=False, is_cross=False)
        self.axis_self_blocks = nn.ModuleList(MultiGridBlock(config, is_axis=True, is_cross=False) for _ in axes)
        self.main_cross_blocks = nn.ModuleList(MultiGridBlock(config, is_axis=False, is_cross=True) for _ in axes)
        self.axis_cross_blocks = nn.ModuleList(MultiGridBlock(config, is_axis=True, is_cross=True) for _ in axes)
        self.layer_idx = layer_idx
        self.make_cores()

    def make_cores(self):
        """Make the cores that run the mixers. They have no weights, and depend on the number of axes."""
        core, layers = CORES[self.config.core], self.config.num_hidden_layers
        self.core = core(self.config, self.layer_idx)
        self.cross_core = core(self.config, layers + self.layer_idx) if self.config.num_axes else None

    @with_cache_argument
    def forward(
        self,
        main: torch.Tensor,
        meta: torch.Tensor | None = None,
        context: MultiGridContext | None = None,
        past_key_values: MultiGridCache | StaticMultiGridCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`main [batch, seq, hidden_size]` and `meta [axes, batch, seq, axis_hidden_size]` after this layer, and attentions."""
        streams: list[tuple[Iterable[nn.Module], torch.Tensor, None]] = [([self.self_block], main.unsqueeze(0), None)]
        if meta is not None:
            streams.append((self.axis_self_blocks, meta, None))
        (main, *rest), weights = self._run(self.core, streams, context, past_key_values)
        main = main[0]
        if meta is None:
            return main, None, weights
        meta = rest[0]
        mains = main.expand(len(meta), *main.shape)
        readings = [(self.main_cross_blocks, mains, meta), (self.axis_cross_blocks, meta, mains)]
        (read, meta), _ = self._run(self.cross_core, readings, context, past_key_values)
        # One after the other, so that an axis without an effect does not change rounding.
        for change, share in zip(read - main, self.config.axis_shares):
            main = torch.add(main, change, alpha=share)
        return main, meta, weights

    def _run(self, core, streams, context, cache):
        """Run the blocks of several groups of streams, given as (blocks, own, other)."""
        groups = []
        for blocks, own, other in streams:
            own = grouped_norm([block.input_layernorm for block in blocks], own)
            if other is not None:
                other = grouped_norm([block.key_value_layernorm for block in blocks], other)
            groups.append(Group([block.mixer for block in blocks], own, other))
        mixed, weights = core.mix(groups, context, cache)
        results = []
        for (blocks, own, _), out in zip(streams, mixed):
            x = own + self._dropout(out)
            if blocks[0].mlp is not None:
                normed = grouped_norm([block.post_attention_layernorm for block in blocks], x)
                x = x + self._dropout(grouped_mlp([block.mlp for block in blocks], normed))
            results.append(x)
        return results, weights

    def _dropout(self, x):
        return nn.functional.dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout else x


class NextAxesBlock(nn.Module):
    """Conditioning of the main stream on the next axis ids in the factored order, and a feed-forward."""

    def __init__(self, config: MultiGridConfig):
        super().__init__()
        self.projs = nn.ModuleList(
            nn.Linear(config.axis_hidden_size, config.hidden_size, bias=False) for _ in config.axis_names
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MultiGridMLP(config, config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, next_embeds: list[torch.Tensor], known: torch.Tensor | None
    ) -> torch.Tensor:
        """Add embeddings `[batch, seq, axis_hidden_size]` of each axis to `hidden_states [batch, seq, hidden_size]`.

        `known [1 or batch, seq]` is `False` where there are none; `None` means known everywhere.
        """
        for proj, embeds in zip(self.projs, next_embeds):
            change = proj(embeds)
            hidden_states = hidden_states + (change if known is None else change.masked_fill(~known.unsqueeze(-1), 0))
        return hidden_states + grouped_mlp([self.mlp], self.norm(hidden_states).unsqueeze(0))[0]


def shift_axis_ids(
    axis_ids: torch.Tensor,
    next_axis_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Axis ids of the real token after each position, for the factored order.

    Args:
        axis_ids (`torch.LongTensor` of shape `[batch, axes, seq]`): of the tokens.
        next_axis_ids (`torch.LongTensor` of shape `[batch, axes]`, *optional*): of the token after the last position.
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segments (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token.

    Returns:
        The ids `[batch, axes, seq]`, and where they are known `[batch, seq]`: not at the end of a packed sequence, nor at the
        last real token without `next_axis_ids`.

    Raises:
        TypeError, ValueError: for `next_axis_ids` of another dtype or shape.
    """
    batch, axes, seq = axis_ids.shape
    known = torch.ones(batch, seq + 1, dtype=torch.bool, device=axis_ids.device)
    if next_axis_ids is None:
        next_axis_ids = torch.zeros_like(axis_ids[:, :, 0])
        known[:, -1] = False
    else:
        check_ids("next_axis_ids", next_axis_ids)
        if list(next_axis_ids.shape) != [batch, axes]:
            expected = [batch, axes]
            raise ValueError(f"`next_axis_ids` must be [batch, axes] = {expected}, got {list(next_axis_ids.shape)}.")
    axis_ids = torch.cat((axis_ids, next_axis_ids.unsqueeze(-1)), dim=2)
    following = torch.arange(1, seq + 1, device=axis_ids.device).expand(batch, -1)
    if mask is not None:  # the nearest one that is real, or what comes after the row
        places = torch.where(mask, following - 1, seq)[:, 1:]
        places = nn.functional.pad(places, (0, 1), value=seq)
        following = places.flip(1).cummin(1).values.flip(1)
    known = known.gather(1, following)
    if segments is not None:
        segments = nn.functional.pad(segments, (0, 1), mode="replicate")
        known = known & (segments.gather(1, following) == segments[:, :-1])
    return axis_ids.gather(2, following.unsqueeze(1).expand(-1, axes, -1)), known


__all__ = ["MultiGridBlock", "MultiGridLayer", "MultiGridMLP", "NextAxesBlock", "grouped_mlp", "shift_axis_ids"]
