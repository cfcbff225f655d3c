"""LEAP configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from ..common.config_checks import check_fields, check_numbers, check_window_sizes
from ..common.remote_code import CustomCodeMixin
from ..common.renamed_fields import RenamedFieldsMixin
from .focus_functions import OUTPUT_GATES, WEIGHT_FUNCTIONS


_CHOICES = {
    "mixer": ("focus", "additive"),
    "weight_function": WEIGHT_FUNCTIONS,
    "output_gate": OUTPUT_GATES,
    "position_embedding_type": ("absolute", "rotary", "alibi", "none"),
}
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# Rotary variants whose frequencies do not depend on the length, because a recurrent state cannot be rotated again.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@auto_docstring(checkpoint="heptapod/leap-tiny")
@strict
class LeapConfig(RenamedFieldsMixin, CustomCodeMixin, PreTrainedConfig):
    r"""
    mixer (`str`, *optional*, defaults to `"focus"`):
        Token mixer in place of attention: `"focus"` (LEAP's gated running means) or `"additive"` (Fastformer's two rounds
        of additive attention, arXiv 2108.09084).
    weight_function (`str`, *optional*, defaults to `"elu"`):
        Function from focus logits to positive weights: `"elu"` (`elu(x) + 1`) or `"exp"` (softmax weights).
    rescale (`float`, *optional*, defaults to 10.0):
        Standardise queries, focus, keys and values over the head dimension and multiply dot products by
        `rescale / head_dim`. With `None` nothing is standardised, and the factor is `head_dim ** -0.5`.
    output_gate (`str`, *optional*):
        Gate on each head's output: `"sigmoid"` (default of the focus mixer), `"gelu"` or `"none"` (no queries; the only
        value for the additive mixer, which pools its queries instead).
    window_sizes (`list`, *optional*):
        Window of each layer in tokens, `None` in the list for a global layer. Defaults to the schedule of the prototype,
        `[None, 4, 8, 16]` repeated.
    position_embedding_type (`str`, *optional*):
        `"rotary"` (default of the focus mixer; rotates queries and keys), `"absolute"` (default of the additive mixer;
        limited to `max_position_embeddings`), `"alibi"` (weights decrease with distance, by a slope for each head, arXiv
        2108.12409) or `"none"`.
    sink_weight (`float`, *optional*, defaults to 0.0):
        Weight of an additional token of value zero in every window. It equals the `1e-5` in the denominators of the
        prototype.
    is_causal (`bool`, *optional*, defaults to `True`):
        Whether a position sees only itself and its past. `LeapForMaskedLM` sets it to `False`.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on embeddings and on the output of feed-forward layers.
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on queries, focus, values and focus logits, as in the prototype. In the additive mixer, dropout on pooled
        queries and keys.
    initializer_range (`float`, *optional*):
        Standard deviation of initial weights. Defaults to `hidden_size ** -0.5`.

    Example:

    ```python
    >>> from modeling_heptapod import LeapConfig, LeapForCausalLM

    >>> config = LeapConfig(vocab_size=258, hidden_size=256, num_hidden_layers=4)
    >>> model = LeapForCausalLM(config)
    ```"""

    model_type = "leap"
    _auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_leap.LeapConfig",
        "AutoModel": "modeling_leap.LeapModel",
        "AutoModelForCausalLM": "modeling_leap.LeapForCausalLM",
        "AutoModelForMaskedLM": "modeling_leap.LeapForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_leap.LeapForSequenceClassification",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    hidden_act: str = "gelu"
    mixer: str = "focus"
    weight_function: str = "elu"
    rescale: float | int | None = 10.0
    output_gate: str | None = None
    window_sizes: list[int | None] | tuple[int | None, ...] | None = None
    position_embedding_type: str | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int = 1024
    sink_weight: float | int = 0.0
    is_causal: bool = True
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        check_numbers(self)
        focus = self.mixer == "focus"
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.output_gate is None:
            self.output_gate = "sigmoid" if focus else "none"
        if self.position_embedding_type is None:
            self.position_embedding_type = "rotary" if focus else "absolute"
        if self.window_sizes is None:
            self.window_sizes = [(None, 4, 8, 16)[layer % 4] for layer in range(self.num_hidden_layers)]
        if self.initializer_range is None:
            self.initializer_range = max(self.hidden_size, 1) ** -0.5
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` for values that define no model."""
        check_numbers(self)
        check_fields(self, _CHOICES, _AT_LEAST_ONE)
        if self.rescale is not None and (self.rescale <= 0 or self.head_dim < 2):
            raise ValueError(
                f"`rescale` must be positive and needs a head dimension of at least 2, got rescale={self.rescale}, "
                f"head_dim={self.head_dim}."
            )
        check_window_sizes(self)
        if self.sink_weight < 0:
            raise ValueError(f"`sink_weight` must not be negative, got {self.sink_weight}.")
        if self.mixer == "additive" and self.output_gate != "none":
            raise ValueError(f"`output_gate` must be 'none' with mixer='additive', got {self.output_gate!r}.")
        if self.position_embedding_type == "rotary":
            self._check_rotary()

    def validate_rope(self):
        """As `PreTrainedConfig.validate_rope`, which checks the default rotary settings of models without rotary positions too."""
        if self.position_embedding_type == "rotary":
            PreTrainedConfig.validate_rope(self)

    def _check_rotary(self):
        if self.output_gate == "none":
            raise ValueError(
                "`position_embedding_type`='rotary' rotates queries and keys, but there are none with "
                f"mixer={self.mixer!r} and output_gate='none'; use 'absolute', 'alibi' or 'none'."
            )
        if self.head_dim % 2:
            raise ValueError(f"Rotary positions need an even head dimension, got head_dim={self.head_dim}.")
        rope_parameters = self.rope_parameters or {}
        if rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters['partial_rotary_factor']` must be 1 (all channels are rotated), got "
                f"{rope_parameters['partial_rotary_factor']}."
            )
        rope_type = rope_parameters.get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {_ROPE_TYPES} (a recurrent state cannot follow "
                f"frequencies that change with length), got {rope_type!r}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer, from which transformers builds the layers of a cache."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def number_of_conv_states(self) -> int:
        """Number of states in a cache layer: two for the additive mixer, which pools twice."""
        return 2 if self.mixer == "additive" else 1


__all__ = ["LeapConfig"]
