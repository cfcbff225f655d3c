"""Heptapod grid configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from ..common.config_checks import check_numbers
from ..common.remote_code import CustomCodeMixin
from ..common.renamed_fields import RenamedFieldsMixin


# Radius and dilation of the neighbourhood in each type of layer, from those of the config. `None` is the whole page.
ATTENTION_TYPES = {
    "local": lambda radius, dilation: (radius, 1),
    "dilated": lambda radius, dilation: (radius, dilation),
    "global": lambda radius, dilation: (None, 1),
}


@auto_docstring(checkpoint="heptapod/heptapod-tiny")
@strict
class HeptapodConfig(RenamedFieldsMixin, CustomCodeMixin, PreTrainedConfig):
    r"""
    attention_types (`list`, *optional*):
        What the cells of each layer attend to: `"local"` (the cells around them), `"dilated"` (cells around them at
        distances of `dilation`) or `"global"` (the whole page). When not given, `["local", "dilated", "local",
        "global"]` repeated.
    local_radius (`int` or `list`, *optional*, defaults to 3):
        Radius of the neighbourhood in local and dilated layers, in neighbours: `1` is the 3 x 3 cells around a cell.
        One number, or one for each layer.
    dilation (`int` or `list`, *optional*, defaults to 2):
        Distance between neighbours in dilated layers, in cells. One number, or one for each layer; other layers ignore
        it.
    num_global_heads (`int`, *optional*, defaults to 0):
        Heads of local and dilated layers, the last ones, that attend to the whole page.
    adaptive_span (`bool`, *optional*, defaults to `False`):
        Whether heads of local and dilated layers learn from the state of each cell how many neighbours they attend to, up to
        `local_radius` (adaptive attention span, arXiv 1905.07799, in two dimensions).
    span_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight, in training, of the mean span as a share of the radius.
    use_relative_position_bias (`bool`, *optional*, defaults to `False`):
        Whether heads of local and dilated layers have a learned bias for each offset of the neighbourhood.
    rope_theta (`float`, *optional*, defaults to 100.0):
        Base of the two-dimensional rotary positions. Pages are shorter than texts: with 100 the period of the slowest
        channel is a few hundred cells.
    use_absolute_position_embeddings (`bool`, *optional*, defaults to `True`):
        Whether the embedding of a cell includes its distances to the four borders of its page. Otherwise positions are
        relative, and all cells of an empty page get the same prediction.
    grid_size (`list`, *optional*):
        Height and width of flat inputs `[batch, height * width]`, unless given in the call.
    self_conditioning (`bool`, *optional*, defaults to `False`):
        Whether the model takes its own last prediction as input (`self_conditioning_logits`), as in Analog Bits (arXiv
        2208.04202).
    neighbor_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight, in training, of a loss on the prediction of each masked cell from the cells above, below, left and
        right.
    mask_token_id (`int`, *optional*):
        Id of the mask token. Training and generation require it.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on embeddings and on the outputs of attention and feed-forward.
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on attention weights.

    Example:

    ```python
    >>> from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM

    >>> config = HeptapodConfig(vocab_size=259, hidden_size=256, mask_token_id=256)
    >>> model = HeptapodForMaskedLM(config)
    ```"""

    model_type = "heptapod"
    keys_to_ignore_at_inference = ["spans"]
    _auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_heptapod.HeptapodConfig",
        "AutoModel": "modeling_heptapod.HeptapodModel",
        "AutoModelForMaskedLM": "modeling_heptapod.HeptapodForMaskedLM",
    }

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    hidden_act: str = "gelu"
    attention_types: list[str] | tuple[str, ...] | None = None
    local_radius: int | list[int] | tuple[int, ...] = 3
    dilation: int | list[int] | tuple[int, ...] = 2
    num_global_heads: int = 0
    adaptive_span: bool = False
    span_loss_weight: float | int = 0.0
    use_relative_position_bias: bool = False
    rope_theta: float | int = 100.0
    use_absolute_position_embeddings: bool = True
    grid_size: list[int] | tuple[int, ...] | None = None
    self_conditioning: bool = False
    neighbor_loss_weight: float | int = 0.0
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    mask_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        check_numbers(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_types is None:
            cycle = ("local", "dilated", "local", "global")
            self.attention_types = [cycle[layer % 4] for layer in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` for values that define no model."""
        check_numbers(self)
        self._check_sizes()
        self._check_layers()
        self._check_special_tokens()

    def _check_sizes(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of four times `num_attention_heads` "
                f"({self.num_attention_heads}): rotary positions on a grid rotate two pairs of channels of each head."
            )
        if self.rope_theta <= 0:
            raise ValueError(f"`rope_theta` must be positive, got {self.rope_theta}.")
        if self.grid_size is not None and (len(self.grid_size) != 2 or min(self.grid_size) < 1):
            raise ValueError(f"`grid_size` must be a height and a width of at least 1, got {self.grid_size}.")
        for name in ("neighbor_loss_weight", "span_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.span_loss_weight and not self.adaptive_span:
            raise ValueError(f"`span_loss_weight` ({self.span_loss_weight}) needs `adaptive_span=True`.")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")

    def _check_layers(self):
        attention_types = self.attention_types or ()
        if len(attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_types` must have one entry for each of the {self.num_hidden_layers} layers, got "
                f"{len(attention_types)}: {self.attention_types}."
            )
        if not set(attention_types) <= set(ATTENTION_TYPES):
            raise ValueError(f"`attention_types` must be of {tuple(ATTENTION_TYPES)}, got {self.attention_types}.")
        for name, least in (("local_radius", 0), ("dilation", 1)):
            values = getattr(self, name)
            if not isinstance(values, int) and len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must be one number or one for each of the {self.num_hidden_layers} layers, got "
                    f"{len(values)}: {values}."
                )
            if min(values if not isinstance(values, int) else [values]) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {values}.")
        has_windows = self.num_global_heads < self.num_attention_heads and {"local", "dilated"} & set(attention_types)
        for name in ("adaptive_span", "use_relative_position_bias"):
            if getattr(self, name) and not has_windows:
                raise ValueError(f"`{name}` needs a local or dilated layer with heads that attend to a neighbourhood.")
        if not 0 <= self.num_global_heads <= self.num_attention_heads:
            raise ValueError(
                f"`num_global_heads` must be between 0 and `num_attention_heads` ({self.num_attention_heads}), got "
                f"{self.num_global_heads}."
            )

    def _check_special_tokens(self):
        for name in ("mask_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"`{name}` must be in [0, {self.vocab_size}), got {token}.")
        if self.mask_token_id is not None and self.mask_token_id == self.pad_token_id:
            raise ValueError(f"`mask_token_id` and `pad_token_id` must differ, got {self.mask_token_id} for both.")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    def neighborhood(self, layer_idx: int) -> tuple[int | None, int]:
        """Radius and dilation of a layer's neighbourhood; a radius of `None` is the whole page."""
        assert self.attention_types is not None  # for type checkers
        radius, dilation = (x if isinstance(x, int) else x[layer_idx] for x in (self.local_radius, self.dilation))
        return ATTENTION_TYPES[self.attention_types[layer_idx]](radius, dilation)


__all__ = ["HeptapodConfig"]
