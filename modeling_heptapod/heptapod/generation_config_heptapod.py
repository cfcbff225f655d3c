"""Options of `generate` for the grid, in one table with their defaults and checks."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers.generation import GenerationConfig

from ..common.renamed_fields import reject_renamed
from ..common.transformers_versions import GENERATION_METADATA
from .samplers import MASK_SCHEDULES, SAMPLERS


class _Option(NamedTuple):
    """An option of `generate`: what it falls back to, and which values it takes besides `None`, which unsets it."""

    default: Any
    is_valid: Callable[[Any], bool]
    expected: Callable[[], str]


def _name(default, table):
    return _Option(default, lambda x: isinstance(x, str) and x in table, lambda: f"be one of {tuple(table)}")


def _integer(least):
    return _Option(None, lambda x: type(x) is int and x >= least, lambda: f"be an integer of at least {least}")


def _number(default, is_valid, expected):
    return _Option(default, lambda x: type(x) in (int, float) and is_valid(x), lambda: expected)


def _flag():
    return _Option(False, lambda x: type(x) is bool, lambda: "be True or False")


def _is_temperature(x):
    return type(x) in (int, float) and 0 < x < math.inf


def _is_pair(x):
    return isinstance(x, (list, tuple)) and len(x) == 2


# A default of `None` means that the option is off.
OPTIONS = {
    "sampler": _name("confidence", SAMPLERS),
    "mask_schedule": _name("cosine", MASK_SCHEDULES),
    "max_denoising_steps": _integer(1),
    "entropy_bound": _number(0.1, lambda x: x >= 0, "not be negative"),
    "choice_temperature": _number(None, lambda x: 0 <= x < math.inf, "be finite and not negative"),
    "remask_rate": _number(None, lambda x: 0 <= x <= 1, "be a probability"),
    "remask_threshold": _number(None, lambda x: 0 <= x <= 1, "be a probability"),
    "stability_threshold": _integer(1),
    "do_sample": _flag(),
    "temperature": _Option(
        None,
        lambda x: all(map(_is_temperature, x if _is_pair(x) else [x])),
        lambda: "be positive and finite (`do_sample=False` is the limit of zero), or two such numbers",
    ),
    "top_k": _integer(0),
    "top_p": _number(None, lambda x: 0 < x <= 1, "be in (0, 1]"),
    "seed": _integer(0),
    "return_dict_in_generate": _flag(),
    "output_scores": _flag(),
    "output_history": _flag(),
}
DEFAULTS = {name: option.default for name, option in OPTIONS.items()}
# Not options: Trainer aligns the first three with the tokenizer, GenerationConfig writes the others into its file.
_METADATA = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")


def reject_unknown(options: Iterable[str]) -> None:
    """Raises a `ValueError` for names that are no options of `generate`."""
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise ValueError(f"Unknown generation options {sorted(unknown)}; there are {sorted(OPTIONS)}.")


class HeptapodGenerationConfig(GenerationConfig):
    """Options of [`HeptapodGenerationMixin.generate`]. An option that is not set is taken from the model's own config.

    Args:
        sampler (`str`, *optional*, defaults to `"confidence"`):
            The tokens that a denoising step unmasks: those whose sampled token is the most probable (`"confidence"`),
            those whose most probable token is furthest ahead of the second (`"margin"`), those of least entropy while their
            entropies add up to no more than `entropy_bound` (`"entropy_bound"`),
            any (`"random"`), or the first one, left to right and top to bottom (`"raster"`).
        mask_schedule (`str`, *optional*, defaults to `"cosine"`):
            Number of tokens that a step of `"confidence"`, `"margin"` and `"random"` unmasks: equal shares (`"linear"`) or few at
            first (`"cosine"`). Each row of a batch follows the schedule with its own number of masked tokens.
        max_denoising_steps (`int`, *optional*):
            Number of steps in which `"confidence"`, `"margin"` and `"random"` unmask a canvas, 32 when not given; a row with fewer
            masked tokens takes a step for each. `"entropy_bound"` unmasks all that is left in the last of them; when
            not given, it takes as many as the bound needs. `"raster"` takes a step for each token.
        entropy_bound (`float`, *optional*, defaults to 0.1):
            For `"entropy_bound"`, in nats. The token with the least entropy is always unmasked.
        choice_temperature (`float`, *optional*):
            For `"confidence"` and `"margin"`: the logarithm of the measure gets Gumbel noise of this scale, which falls to zero
            in the last step, as in MaskGIT (arXiv 2202.04200).
        remask_rate (`float`, *optional*):
            For samplers with a mask schedule: mask each generated token again with this probability in each step, or with a
            smaller one where more would be masked than the schedule says, as in ReMDM-cap (arXiv 2503.00307). As many more
            are unmasked.
        remask_threshold (`float`, *optional*):
            Mask a generated token again when the model gives it less than this probability in a later step. A cell is
            remasked once at most, prompt tokens never.
        stability_threshold (`int`, *optional*):
            Unmask all tokens of a row at once after this many steps in which its prediction has not changed.
        do_sample (`bool`, *optional*, defaults to `False`):
            Sample tokens instead of taking the most probable ones.
        temperature (`float` or `list`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
            Transformers' warpers, applied in this order when `do_sample=True`. They change the distribution that is
            sampled from; confidence, margin and entropy are those of the distribution before them. Two temperatures are those
            of the first and of the last step; in between it changes linearly.
        seed (`int`, *optional*):
            Seed of a generator for this call. Without it the global one is used.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Return a [`HeptapodGenerateOutput`] instead of the sequences alone.
        output_scores, output_history (`bool`, *optional*, defaults to `False`):
            Whether it has `scores` and `history`.

    Raises:
        ValueError: for an unknown option or an invalid value; the message names both.
    """

    def __init__(self, **kwargs):
        reject_renamed("heptapod generation", kwargs)
        # GenerationConfig's own __init__ would add some sixty options that do not apply here.
        for name in (*OPTIONS, *_METADATA):
            setattr(self, name, kwargs.pop(name, None))
        for name in GENERATION_METADATA:
            kwargs.pop(name, None)
        reject_unknown(kwargs)
        self.validate()

    def validate(self, *unused_args, **unused_kwargs):
        """Raises a `ValueError` for invalid values. The arguments are those of the parent and unused."""
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is not None and not option.is_valid(value):
                raise ValueError(f"`{name}` must {option.expected()}, got {value!r}.")

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return dict(DEFAULTS)

    @classmethod
    def from_model_config(cls, model_config):
        """An empty config: a model config has no generation options."""
        return cls()

    def get_generation_mode(self, assistant_model=None):
        raise NotImplementedError("The generation modes of GenerationMixin do not exist on a grid; see `sampler`.")


__all__ = ["DEFAULTS", "OPTIONS", "HeptapodGenerationConfig", "reject_unknown"]
