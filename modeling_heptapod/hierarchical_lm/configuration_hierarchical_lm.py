"""Hierarchical LM configuration."""

import copy
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from ..common.config_checks import Field, check_numbers
from ..common.remote_code import CustomCodeMixin
from ..common.renamed_fields import RenamedFieldsMixin


_CHOICES = {
    "window_type": ("sliding", "block"),
    "merge": ("concat", "cross_attention"),
    "merge_into": ("predicting", "all"),
    "merge_direction": ("coarse_to_fine", "full"),
    "compressor": ("conv", "attention"),
    "attention_norm": ("rms_norm", "layer_norm"),
    "next_latent_loss_type": ("mse", "cosine", "mse_and_cosine", "smooth_l1"),
}
# One value for all hierarchies or a list with one for each; kept as lists.
_PER_HIERARCHY = (
    "strides",
    "hidden_sizes",
    "num_attention_heads",
    "head_dim",
    "mlp_ratio",
    "window_sizes",
    "attention_norm",
    "use_xpos",
    "compressor",
    "next_latent_loss_weight",
)
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_sizes",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "prophet_codebook_size",
    "prophet_codebook_dim",
    "prophet_num_codebooks",
    "next_latent_rollouts",
    "dynamics_num_layers",
    "num_attention_heads",
    "head_dim",
)
# Rotary variants whose frequencies never change with the length seen: cached keys are not rotated again.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_Integers = int | list[int] | tuple[int, ...]
_Numbers = int | float | list[int | float] | tuple[int | float, ...]
_Names = str | list[str] | tuple[str, ...]
_Windows = str | int | list[int | None] | tuple[int | None, ...] | None


class _HeadCounts(list):
    """Heads of each hierarchy. Raises a `TypeError` when a number is divided by it, as peft's prefix tuning does."""

    def __rfloordiv__(self, number):
        raise TypeError(
            f"`num_attention_heads` of a hierarchical LM must be read as a list, {list(self)}, a number for each hierarchy, got a "
            f"division of {number} by it. Prefix tuning adds keys and values before a text and does not work with this model; "
            "prompt tuning does."
        )


@auto_docstring(checkpoint="heptapod/hierarchical_lm-tiny")
@strict
class HierarchicalLMConfig(RenamedFieldsMixin, CustomCodeMixin, PreTrainedConfig):
    r"""
    compression_factors (`int` or `list[int]`, *optional*, defaults to 1):
        Compression factor of each hierarchy: unique powers of two. 1 alone is a plain decoder. A field below with the words
        "of each hierarchy" takes one value for all, or a list in this order. The config holds lists.
    strides (`int` or `list[int]`, *optional*, defaults to 1):
        Tokens from one step to the next of each hierarchy, a power of two that divides its factor. With stride 1 a hierarchy
        of factor `c` has as many steps as tokens, and each step attends to every `c`-th one before it. With stride `c` it has
        `c` times fewer steps (Hourglass, arXiv 2110.13711).
    hidden_size (`int`, *optional*):
        Width of the token embeddings. Defaults to that of the widest hierarchy.
    hidden_sizes (`int` or `list[int]`, *optional*):
        Width of each hierarchy. Defaults to `hidden_size`, or 256 when that is not given either.
    head_dim (`int` or `list[int]`, *optional*, defaults to 64):
        Channels of one attention head, of each hierarchy.
    mlp_ratio (`float` or `list[float]`, *optional*, defaults to 4):
        Width of the feed-forward divided by that of the stream, of each hierarchy.
    window_sizes (`str`, `int` or `list`, *optional*, defaults to `"auto"`):
        Number of steps of `c` tokens, its own included, that a step of each hierarchy of factor `c` attends to. `None` for
        all steps, 0 for no attention, `"auto"` for half of `max_position_embeddings` tokens.
    window_type (`str`, *optional*, defaults to `"sliding"`):
        `"sliding"` or `"block"`. With `"block"` the steps are divided into blocks of that size, and a step attends to its own
        block up to itself and to the whole block before it.
    attention_norm (`str` or `list[str]`, *optional*, defaults to `"rms_norm"`):
        Norm before the attention of each hierarchy: `"rms_norm"` or `"layer_norm"` (the prototype's choice with windows).
    use_xpos (`bool` or `list[bool]`, *optional*, defaults to `True`):
        Whether attention of each hierarchy also decays with distance (xPos, arXiv 2212.10554).
    xpos_scale_base (`int`, *optional*, defaults to 512):
        Distance over which xPos decays by its base, once.
    shared_attention (`bool`, *optional*, defaults to `False`):
        Whether hierarchies with equal width, heads and `head_dim` share the attention weights of a layer.
    compressor (`str` or `list[str]`, *optional*, defaults to `"conv"`):
        How each hierarchy compresses the last `c` token embeddings into one: `"conv"`, or `"attention"` over them (factors of
        at least 4). Not used at factor 1.
    predict_hierarchy (`int`, *optional*):
        Factor of the hierarchy that predicts. Defaults to the finest.
    predict_from_all (`bool`, *optional*, defaults to `False`):
        Whether to predict from the concatenation of all hierarchies.
    merge (`str`, *optional*, defaults to `"concat"`):
        How hierarchies are merged at the end of each layer: `"concat"` (concatenated, through a feed-forward) or
        `"cross_attention"` (over the hierarchies at the same token).
    merge_into (`str`, *optional*, defaults to `"predicting"`):
        Which hierarchies the merge changes: `"predicting"` or `"all"`.
    merge_direction (`str`, *optional*, defaults to `"full"`):
        What cross-attention of a hierarchy reads: `"full"` for all hierarchies, `"coarse_to_fine"` for itself and coarser
        ones.
    layer_norm_eps (`float`, *optional*, defaults to 1e-5):
        Epsilon of the norms of embeddings and outputs, and of `attention_norm="layer_norm"`.
    reconstruction_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight of the loss of reconstructing the last `c` tokens from their compression.
    prophet_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight of the loss of predicting the next `c` tokens (ProphetNet, arXiv 2001.04063).
    quantized_prophet_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight of the same loss on the next `c` tokens as codes of a random-projection quantizer (arXiv 2202.01855).
    prophet_codebook_size (`int`, *optional*, defaults to 1024):
        Codes in each codebook of this quantizer.
    prophet_codebook_dim (`int`, *optional*, defaults to 64):
        Width of a code.
    prophet_num_codebooks (`int`, *optional*, defaults to 16):
        Codebooks of this quantizer.
    next_latent_loss_weight (`float` or `list[float]`, *optional*, defaults to 0.0):
        Weight of the loss of predicting the next latent (arXiv 2511.05963), of each hierarchy.
    next_latent_loss_type (`str`, *optional*, defaults to `"mse_and_cosine"`):
        `"mse"`, `"cosine"`, `"mse_and_cosine"` (0.1 times the first plus 0.9 times the second) or `"smooth_l1"`.
    next_latent_rollouts (`int`, *optional*, defaults to 1):
        Number of latents that are predicted ahead.
    next_latent_rollout_weights (`list[float]`, *optional*):
        Weight of each of them. Defaults to equal weights.
    next_latent_dynamic_weights (`bool`, *optional*, defaults to `True`):
        Whether to reduce the weight of a rollout by the losses of earlier ones.
    next_latent_dynamic_decay (`float`, *optional*, defaults to 1.0):
        Rate of this reduction: the weight is multiplied by `exp(-decay * loss so far)`.
    detach_summaries (`bool`, *optional*, defaults to `True`):
        Whether to stop the gradient of this loss at the token embeddings.
    dynamics_hidden_size (`int`, *optional*):
        Width of the network that predicts the next latent. Defaults to the width of the hierarchy.
    dynamics_num_layers (`int`, *optional*, defaults to 3):
        Number of linear layers of this network.

    Example:

    ```python
    >>> from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM

    >>> config = HierarchicalLMConfig(vocab_size=258, compression_factors=[1, 2, 8], window_sizes=[32, 64, None])
    >>> model = HierarchicalLMForCausalLM(config)
    ```"""

    model_type = "hierarchical_lm"
    _auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_hierarchical_lm.HierarchicalLMConfig",
        "AutoModel": "modeling_hierarchical_lm.HierarchicalLMModel",
        "AutoModelForCausalLM": "modeling_hierarchical_lm.HierarchicalLMForCausalLM",
    }
    # What `Trainer` must not gather as logits.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "hierarchy_hidden_states",
        "token_layout",
        "ce_loss",
        "reconstruction_loss",
        "prophet_loss",
        "quantized_prophet_loss",
        "next_latent_loss",
    ]

    vocab_size: int = 32000
    compression_factors: Field[_Integers, list[int]] = Field(1)
    strides: Field[_Integers, list[int]] = Field(1)
    hidden_size: Field[int | None, int] = Field(None)
    hidden_sizes: Field[_Integers | None, list[int]] = Field(None)
    num_hidden_layers: int = 6
    num_attention_heads: Field[_Integers, list[int]] = Field(8)
    head_dim: Field[_Integers, list[int]] = Field(64)
    mlp_ratio: Field[_Numbers, list[int | float]] = Field(4)
    hidden_act: str = "gelu"
    window_sizes: Field[_Windows, list[int | None]] = Field("auto")
    window_type: str = "sliding"
    attention_norm: Field[_Names, list[str]] = Field("rms_norm")
    use_xpos: Field[bool | list[bool] | tuple[bool, ...], list[bool]] = Field(True)
    xpos_scale_base: int | float = 512
    rope_parameters: dict | None = None
    shared_attention: bool = False
    compressor: Field[_Names, list[str]] = Field("conv")
    predict_hierarchy: Field[int | None, int] = Field(None)
    predict_from_all: bool = False
    merge: str = "concat"
    merge_into: str = "predicting"
    merge_direction: str = "full"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    reconstruction_loss_weight: float | int = 0.0
    prophet_loss_weight: float | int = 0.0
    quantized_prophet_loss_weight: float | int = 0.0
    prophet_codebook_size: int = 1024
    prophet_codebook_dim: int = 64
    prophet_num_codebooks: int = 16
    next_latent_loss_weight: Field[_Numbers, list[int | float]] = Field(0.0)
    next_latent_loss_type: str = "mse_and_cosine"
    next_latent_rollouts: int = 1
    next_latent_rollout_weights: list[float | int] | tuple[float | int, ...] | None = None
    next_latent_dynamic_weights: bool = True
    next_latent_dynamic_decay: float | int = 1.0
    detach_summaries: bool = True
    dynamics_hidden_size: int | None = None
    dynamics_num_layers: int = 3

    def __post_init__(self, **kwargs):
        self._fill_in()
        super().__post_init__(**kwargs)

    def complete(self) -> None:
        """Fill in what depends on values set after construction, as `from_pretrained` sets overrides, and check all values.

        A model calls it before it is built. Raises what the constructor raises.
        """
        self._fill_in()
        self.validate_architecture()

    def _fill_in(self):
        check_numbers(self)
        if isinstance(self.compression_factors, int):
            self.compression_factors = [self.compression_factors]
        self.compression_factors = list(self.compression_factors)
        if self.hidden_sizes is None:
            self.hidden_sizes = 256 if self.hidden_size is None else self.hidden_size
        if self.window_sizes == "auto":
            self.window_sizes = [
                max(1, self.max_position_embeddings // max(2 * x, 1)) for x in self.compression_factors
            ]
        for name in _PER_HIERARCHY:
            value = getattr(self, name)
            listed = list(value) if isinstance(value, list | tuple) else [value] * self.num_hierarchies
            setattr(self, name, _HeadCounts(listed) if name == "num_attention_heads" else listed)
        if self.hidden_size is None:
            self.hidden_size = max(self.hidden_sizes, default=0)
        if self.predict_hierarchy is None:
            self.predict_hierarchy = min(self.compression_factors, default=1)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` for values that make no model."""
        factors = self.compression_factors
        if not factors or len(set(factors)) != len(factors) or not all(_is_power_of_two(x) for x in factors):
            raise ValueError(f"`compression_factors` must be unique powers of two, at least one, got {factors}.")
        for name in _PER_HIERARCHY:
            if len(getattr(self, name)) != len(factors):
                raise ValueError(
                    f"`{name}` must be one value, or a list with one for each of the {len(factors)} hierarchies {factors}, "
                    f"got {getattr(self, name)}."
                )
        for name, choices in _CHOICES.items():
            given = getattr(self, name)
            if not set(given if isinstance(given, list) else [given]) <= set(choices):
                raise ValueError(f"`{name}` must be one of {choices}, got {given!r}.")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._validate_streams()
        self._validate_prediction()
        self._validate_losses()
        self._validate_rotary()

    def _validate_streams(self):
        for factor, stride in zip(self.compression_factors, self.strides):
            if not _is_power_of_two(stride) or factor % stride:
                raise ValueError(
                    "`strides` must be powers of two that divide their compression factor, got stride "
                    f"{stride} at factor {factor}."
                )
        if any(int(size * mult) < 1 for size, mult in zip(self.hidden_sizes, self.mlp_ratio)):
            raise ValueError(
                f"`mlp_ratio` must make at least one channel of {self.hidden_sizes}, got {self.mlp_ratio}."
            )
        if any(x is not None and x < 0 for x in self.window_sizes):
            raise ValueError(
                f"`window_sizes` must be at least 0 (no attention) or None (all), got {self.window_sizes}."
            )
        if any(x == "attention" and factor == 2 for x, factor in zip(self.compressor, self.compression_factors)):
            raise ValueError(f"`compressor`='attention' needs factors of at least 4, got {self.compression_factors}.")

    def _validate_rotary(self):
        if any(x % 2 for x in self.head_dim):
            raise ValueError(f"Rotary positions need an even `head_dim`, got {self.head_dim}.")
        if self.xpos_scale_base <= 0:
            raise ValueError(f"`xpos_scale_base` must be positive, got {self.xpos_scale_base}.")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {_ROPE_TYPES} (cached keys cannot follow frequencies "
                f"that change with length), got {rope_type!r}."
            )
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters['partial_rotary_factor']` must be 1: all channels of a head are rotated."
            )

    def validate_rope(self):
        """As `PreTrainedConfig.validate_rope`, which expects a single head dimension."""
        PreTrainedConfig.validate_rope(self.of_hierarchy(0))

    def to_dict(self):
        """As `PreTrainedConfig.to_dict`, with an integer `head_dim` where hierarchies agree. `Trainer` reads the config of a
        checkpoint as a `PreTrainedConfig` before it resumes, which cannot validate a list."""
        output = super().to_dict()
        if isinstance(output["head_dim"], list) and len(set(output["head_dim"])) == 1:
            output["head_dim"] = output["head_dim"][0]
        return output

    def of_hierarchy(self, index: int) -> "HierarchicalLMConfig":
        """A copy with the `num_attention_heads` and `head_dim` of one hierarchy as integers, which transformers expects."""
        config = copy.copy(self)
        config.num_attention_heads = self.num_attention_heads[index]
        config.head_dim = self.head_dim[index]
        return config

    def _validate_prediction(self):
        if self.predict_hierarchy not in self.compression_factors:
            raise ValueError(
                f"`predict_hierarchy` must be one of `compression_factors` {self.compression_factors}, got {self.predict_hierarchy}."
            )
        stride = self.strides[self.predict_index]
        if stride > 1 and self.merge_into != "all":
            raise ValueError(
                "The hierarchy that predicts must have stride 1 unless `merge_into` is 'all', got stride "
                f"{stride} at `predict_hierarchy`={self.predict_hierarchy}."
            )
        finest = self.predict_hierarchy == min(self.compression_factors)
        if self.merge == "cross_attention" and self.merge_direction == "coarse_to_fine" and not finest:
            if not self.predict_from_all:
                raise ValueError(
                    "`merge_direction`='coarse_to_fine' needs the finest hierarchy to predict, or `predict_from_all`: finer "
                    f"ones than `predict_hierarchy`={self.predict_hierarchy} would not be read."
                )
        if self.tie_word_embeddings and self.prediction_size != self.hidden_size:
            raise ValueError(
                f"`tie_word_embeddings` needs predictions of the width of the embeddings, {self.hidden_size}, got "
                f"{self.prediction_size}."
            )

    def _validate_losses(self):
        for name in (
            "reconstruction_loss_weight",
            "prophet_loss_weight",
            "quantized_prophet_loss_weight",
            "next_latent_dynamic_decay",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not all(weight >= 0 for weight in self.next_latent_loss_weight):
            raise ValueError(f"`next_latent_loss_weight` must not be negative, got {self.next_latent_loss_weight}.")
        weights = self.next_latent_rollout_weights
        if weights is not None and (
            len(weights) != self.next_latent_rollouts or min(weights) < 0 or sum(weights) <= 0
        ):
            raise ValueError(
                f"`next_latent_rollout_weights` must be {self.next_latent_rollouts} numbers with a positive sum, got "
                f"{weights}."
            )
        if self.dynamics_hidden_size is not None and self.dynamics_hidden_size < 1:
            raise ValueError(f"`dynamics_hidden_size` must be at least 1, got {self.dynamics_hidden_size}.")

    @property
    def num_hierarchies(self) -> int:
        """Number of hierarchies."""
        return len(self.compression_factors)

    @property
    def predict_index(self) -> int:
        """Index of the predicting hierarchy in `compression_factors`."""
        return self.compression_factors.index(self.predict_hierarchy)

    @property
    def prediction_size(self) -> int:
        """Width of the input of the head."""
        return sum(self.hidden_sizes) if self.predict_from_all else self.hidden_sizes[self.predict_index]

    @property
    def intermediate_sizes(self) -> list[int]:
        """Width of each hierarchy's feed-forward."""
        return [int(size * mult) for size, mult in zip(self.hidden_sizes, self.mlp_ratio)]

    @property
    def dilations(self) -> list[int]:
        """Distance, in steps of each hierarchy, between the steps that its attention and token shift read."""
        return [factor // stride for factor, stride in zip(self.compression_factors, self.strides)]

    @property
    def kept_steps(self) -> list[int | None]:
        """Number of steps of each hierarchy that a cache holds for the next one, that one included. `None` for all."""
        reach = [x if x is None or self.window_type == "sliding" else 2 * x for x in self.window_sizes]
        return [None if x is None else max(x - 1, 0) * step + 1 for x, step in zip(reach, self.dilations)]

    @property
    def cache_layer_types(self) -> list[str]:
        """Types of the cache layers, by transformers' names: hierarchies within layers, then one for the compressors."""
        of_hierarchy = {None: "hybrid", 0: "conv"}
        layer = [of_hierarchy.get(window, "hybrid_sliding") for window in self.window_sizes]
        return layer * self.num_hidden_layers + ["conv"]


def _is_power_of_two(x):
    return x > 0 and x & (x - 1) == 0


__all__ = ["HierarchicalLMConfig"]
