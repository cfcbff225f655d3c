"""MultiGrid configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from ..common.config_checks import Field, check_fields, check_numbers, check_window_sizes
from ..common.remote_code import CustomCodeMixin
from ..common.renamed_fields import RenamedFieldsMixin


# Cores by name, with transformers' name for the type of their cache layers. Their code is in `CORES` in `multigrid_cores.py`.
CORE_LAYER_TYPES = {"transformer": "full_attention", "leap": "linear_attention", "lstm": "linear_attention"}
AXIS_ORDERS = ("parallel", "factored")

_CHOICES = {"core": tuple(CORE_LAYER_TYPES), "axis_order": AXIS_ORDERS}
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "axis_hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@auto_docstring(checkpoint="heptapod/multigrid-tiny")
@strict
class MultiGridConfig(RenamedFieldsMixin, CustomCodeMixin, PreTrainedConfig):
    r"""
    axis_names (`list[str]`, *optional*, defaults to `[]`):
        Names of the axes, in the order of `axis_ids`. Without axes the model is a plain decoder (GPT-2).
    axis_vocab_sizes (`list[int]`, *optional*, defaults to `[]`):
        Size of each axis's vocabulary, in the same order.
    axis_hidden_size (`int`, *optional*):
        Width of the axis streams, a multiple of the head dimension. Defaults to `hidden_size`. With narrower streams their
        feed-forwards and the cross blocks are smaller as well.
    cross_feed_forward (`bool`, *optional*, defaults to `True`):
        Whether cross blocks have a feed-forward, as in the prototype.
    core (`str`, *optional*, defaults to `"transformer"`):
        Mixer: `"transformer"` (attention, learned positions), `"leap"` (LEAP's gated running means, rotary positions) or
        `"lstm"` (no positions). The last two decode from a state of constant size and have no maximum length.
    axis_order (`str`, *optional*, defaults to `"parallel"`):
        `"parallel"` predicts all axes of the next position from the past. `"factored"` predicts its axis ids first, then the
        main token given them. Axis ids are a function of the text, so in the factored order the code length of the text is
        the *sum* of the main loss and the losses of all axes.
    main_loss_weight (`float`, *optional*, defaults to 0.5):
        `w` in the loss `w * main + (1 - w) * mean of axes`. Without axes the loss is that of the main axis.
    axis_weights (`list[float]`, *optional*):
        Weight of each axis in the sum that the main stream adds from its cross blocks. Defaults to one over the number of axes
        (the prototype's mean).
    window_sizes (`list`, *optional*):
        Window of each layer in tokens with `core="leap"`, `None` in the list for a global layer. Defaults to `[None, 4, 8, 16]`
        repeated.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on embeddings and on the outputs of mixers and feed-forwards.
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the weights of attention (`core="transformer"` only).

    Example:

    ```python
    >>> from modeling_heptapod import MultiGridConfig, MultiGridForCausalLM

    >>> config = MultiGridConfig(vocab_size=258, axis_names=["kind", "bracket"], axis_vocab_sizes=[12, 4])
    >>> model = MultiGridForCausalLM(config)
    ```"""

    model_type = "multigrid"
    _auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_multigrid.MultiGridConfig",
        "AutoModel": "modeling_multigrid.MultiGridModel",
        "AutoModelForCausalLM": "modeling_multigrid.MultiGridForCausalLM",
    }
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "main_hidden_states",
        "axis_logits",
        "main_loss",
        "axis_losses",
    ]

    vocab_size: int = 32000
    axis_names: Field[list[str] | tuple[str, ...] | None, list[str]] = Field(None)
    axis_vocab_sizes: Field[list[int] | tuple[int, ...] | None, list[int]] = Field(None)
    hidden_size: int = 256
    axis_hidden_size: Field[int | None, int] = Field(None)
    intermediate_size: Field[int | None, int] = Field(None)
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    hidden_act: str = "gelu_new"
    core: str = "transformer"
    axis_order: str = "parallel"
    cross_feed_forward: bool = True
    main_loss_weight: float | int = 0.5
    axis_weights: Field[list[float | int] | tuple[float | int, ...] | None, list[float] | None] = Field(None)
    window_sizes: Field[list[int | None] | tuple[int | None, ...] | None, list[int | None]] = Field(None)
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._fill_in()
        super().__post_init__(**kwargs)

    def complete(self) -> None:
        """Fill in what depends on values set after construction, as `from_pretrained` sets overrides.

        A model calls it before it is built. Raises what the constructor raises.
        """
        self._fill_in()
        self.validate_architecture()

    def _fill_in(self):
        check_numbers(self)
        self.axis_names = list(self.axis_names or [])
        self.axis_vocab_sizes = list(self.axis_vocab_sizes or [])
        if self.axis_weights is not None:
            self.axis_weights = list(self.axis_weights)
        if self.axis_hidden_size is None:
            self.axis_hidden_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.window_sizes is None and self.core == "leap":
            self.window_sizes = [(None, 4, 8, 16)[layer % 4] for layer in range(self.num_hidden_layers)]

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` for values that make no model."""
        check_fields(self, _CHOICES, _AT_LEAST_ONE)
        if self.axis_hidden_size % self.head_dim or self.axis_hidden_size > self.hidden_size:
            raise ValueError(
                f"`axis_hidden_size` must be a multiple of the head dimension {self.head_dim} and at most `hidden_size` "
                f"({self.hidden_size}), got {self.axis_hidden_size}."
            )
        self._validate_axes()
        if not 0 <= self.main_loss_weight <= 1:
            raise ValueError(f"`main_loss_weight` must be in [0, 1], got {self.main_loss_weight}.")
        self._validate_core()

    def _validate_axes(self):
        names = self.axis_names
        if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise ValueError(f"`axis_names` must be unique Python identifiers, got {names}.")
        if "main" in names:
            raise ValueError(f"`axis_names` must not hold 'main', the name of the main axis in logs, got {names}.")
        for name, values in (("axis_vocab_sizes", self.axis_vocab_sizes), ("axis_weights", self.axis_shares)):
            if len(values) != len(names):
                raise ValueError(
                    f"`{name}` must have one entry for each of the {len(names)} axes {names}, got {values}."
                )
        if min(self.axis_vocab_sizes, default=1) < 1:
            raise ValueError(f"`axis_vocab_sizes` must be at least 1, got {self.axis_vocab_sizes}.")
        if not all(weight >= 0 for weight in self.axis_shares):
            raise ValueError(f"`axis_weights` must not be negative, got {self.axis_weights}.")

    def _validate_core(self):
        if self.attention_dropout and self.core != "transformer":
            raise ValueError(f"`attention_dropout` needs core='transformer', got core={self.core!r}.")
        if self.core == "leap":
            if self.head_dim % 2:
                raise ValueError(f"core='leap' turns pairs of channels, but `head_dim` is {self.head_dim}.")
            check_window_sizes(self)
        elif self.window_sizes is not None:
            raise ValueError(f"`window_sizes` needs core='leap', got core={self.core!r}.")

    @property
    def num_axes(self) -> int:
        """Number of axes."""
        return len(self.axis_names)

    @property
    def axis_shares(self) -> list[float]:
        """`axis_weights`, or one over the number of axes each."""
        return self.axis_weights or [1 / self.num_axes for _ in self.axis_names]

    @property
    def head_dim(self) -> int:
        """Channels of one head, the same in all streams."""
        return self.hidden_size // self.num_attention_heads

    @property
    def axis_num_attention_heads(self) -> int:
        """Heads of an axis stream, and of cross blocks."""
        return self.axis_hidden_size // self.head_dim

    @property
    def axis_intermediate_size(self) -> int:
        """Width of an axis stream's feed-forward."""
        return self.intermediate_size * self.axis_hidden_size // self.hidden_size

    @property
    def layer_types(self) -> list[str]:
        """Type of each layer, by transformers' names for layers of a cache."""
        kind = CORE_LAYER_TYPES.get(self.core, "")  # also read before an unknown core raises an error
        return [kind] * self.num_hidden_layers

    @property
    def cache_layer_types(self) -> list[str]:
        """Types of the cache layers: of the self blocks of all layers, then, with axes, of the cross blocks."""
        return self.layer_types * (2 if self.num_axes else 1)


__all__ = ["AXIS_ORDERS", "CORE_LAYER_TYPES", "MultiGridConfig"]
