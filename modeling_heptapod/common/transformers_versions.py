"""Supported versions of Transformers, and all code that depends on the version.

No other module reads the version. Each part names the versions that need it, so that it can be removed with them.
"""

import functools
import inspect
from typing import Any

import torch
import transformers
from packaging.version import Version


# Minor versions, both included, each tested with its newest patch.
OLDEST, NEWEST = (5, 17), (5, 24)


def check_version(installed: str) -> None:
    """Raise an `ImportError` if `installed`, a version of Transformers, is not supported."""
    if not OLDEST <= Version(installed).release[:2] <= NEWEST:
        window = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
        raise ImportError(
            f"Heptapod is tested with transformers{window}, but {installed} is installed, with which models could compute "
            f'wrong results without an error: `pip install "transformers{window}"`, or another version of Heptapod.'
        )


check_version(transformers.__version__)

# 5.24 renamed `past_key_values` to `cache` as an argument, as a field of outputs and within `generate`. Our functions use the
# old name in their source; the decorators below give them the name of the installed version, and accept the other.
CACHE = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"

# Before 5.20 loaded generation configs have the commit they come from.
GENERATION_METADATA = ("_commit_hash",)


def with_cache_argument(function):
    """Decorator of a function with an argument `past_key_values`: also accepts `cache`; the signature shows `CACHE`.

    Raises:
        ValueError: if the function is called with both.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if cache is not None and kwargs.get("past_key_values") is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: pass only one of them.")
            if cache is not None:
                kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    shown = [
        parameter.replace(name=CACHE) if name == "past_key_values" else parameter
        for name, parameter in signature.parameters.items()
    ]
    wrapper.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return wrapper


def with_cache_field(output_class):
    """Decorator, below `@dataclass`, of an output with a field `past_key_values`: renames the field to `CACHE`.

    The other name is a property: added here up to 5.23, one of `ModelOutput` from 5.24 on.
    """
    if CACHE == "past_key_values":
        output_class.cache = property(lambda self: self.past_key_values)
        return output_class
    annotations = output_class.__annotations__
    output_class.__annotations__ = {
        CACHE if name == "past_key_values" else name: kind for name, kind in annotations.items()
    }
    output_class.cache = output_class.past_key_values
    del output_class.past_key_values
    output_class.__doc__ = output_class.__doc__.replace("past_key_values (", f"{CACHE} (")
    return output_class


def checkpoints_layers(model) -> bool:
    """Whether a forward pass of a base model checkpoints its layers, which get no cache then; from 5.24 on only with gradients."""
    return model.training and model.gradient_checkpointing and (CACHE != "cache" or torch.is_grad_enabled())


class CacheVersionsMixin:
    """Mixin before a cache class that counts its tokens: differences between versions of stock caches."""

    layers: list[Any]
    # Number of tokens for which there is room, `None` without a limit. In 5.17 stock caches have a property that cannot be set.
    max_cache_len: int | None = None

    @property
    def is_linear(self) -> list[bool]:
        """`False` for each layer: from 5.24 on `generate` assumes that caches of linear layers alone cannot count their
        tokens, and passes all tokens again.
        """
        return [False] * len(self.layers)

    def reset(self) -> None:
        """Empty the cache. In 5.17, no longer in 5.20, growing stock layers keep keys of zeros and append to them."""
        for layer in self.layers:
            if getattr(layer, "is_initialized", False) and not layer.is_compileable:
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()  # type: ignore[misc]

    # Equal to those of stock caches from 5.21 on.
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Conv state of a layer, `None` before it is first written."""
        layer = self.layers[layer_idx]
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Recurrent state of a layer, `None` before it is first written."""
        layer = self.layers[layer_idx]
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None


class OldCacheNameMixin:
    """Mixin before `GenerationMixin`: prepared inputs contain the cache under its old name, which forward accepts as well.

    With 5.24 peft, up to 0.21, finds no cache under the new name, and prepends virtual tokens to every token.
    """

    @with_cache_argument
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ):
        """Same as the stock method, whose signature `generate` inspects."""
        given = {CACHE: past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length, is_first_iteration=is_first_iteration, **given, **kwargs
        )
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Select positions for logits, as `transformers.modeling_utils.slice_logits_to_keep` does from 5.23 on.

    Args:
        hidden_states (`torch.Tensor` of shape `[batch, seq, channels]`).
        logits_to_keep (`int` or `torch.Tensor`): number of last positions (0 for all), positions `[positions]` for all
            rows or `[batch, positions]` for each, or a mask `[batch, seq]`.

    Returns:
        `torch.Tensor` of shape `[batch, positions, channels]`, for a mask `[kept, channels]`.

    Raises:
        TypeError, ValueError: for a negative number, and for other types.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be at least 0, got {logits_to_keep}.")
        return hidden_states[:, slice(-logits_to_keep, None)]
    if not isinstance(logits_to_keep, torch.Tensor) or logits_to_keep.dim() not in (1, 2):
        got = getattr(logits_to_keep, "shape", type(logits_to_keep).__name__)
        raise TypeError(
            f"`logits_to_keep` must be an integer or a tensor [positions] or [batch, positions], got {got}."
        )
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep.unsqueeze(-1), dim=1)


__all__ = [
    "CACHE",
    "GENERATION_METADATA",
    "NEWEST",
    "OLDEST",
    "CacheVersionsMixin",
    "OldCacheNameMixin",
    "check_version",
    "checkpoints_layers",
    "slice_logits_to_keep",
    "with_cache_argument",
    "with_cache_field",
]
