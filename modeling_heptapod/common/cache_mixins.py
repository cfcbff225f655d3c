"""Custom caches in forward passes and in `generate`."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_checks import LayerStates, check_states
from .model_inputs import is_torch_func_active
from .transformers_versions import CACHE, OldCacheNameMixin, checkpoints_layers, with_cache_argument


logger = logging.get_logger(__name__)


class CustomCacheMixin:
    """Base of a family's `PreTrainedModel` and, before `GenerationMixin`, of its classes that generate.

    Attributes:
        _cache_classes (`dict[str, type]`): cache classes by `cache_implementation`, "dynamic" first.
    """

    _cache_classes: dict[str, type[Cache]]
    _previous_max_cache_length: int
    config: Any
    base_model: Any
    training: bool

    def _cache_layers(self, cache: Cache) -> list[LayerStates]:
        """Expected states of each layer of `cache` after its first token."""
        raise NotImplementedError

    def starts_cache(self, use_cache: bool | None) -> bool:
        """Whether a forward pass without a cache creates one: in training only with `use_cache=True` as an argument."""
        if use_cache is None and is_torch_func_active():
            return False  # tensors of `torch.func` must not outlive the pass
        if not self.training:
            return self.config.use_cache if use_cache is None else bool(use_cache)
        if use_cache and checkpoints_layers(self.base_model):
            logger.warning_once(
                "`use_cache=True` is ignored in training with gradient checkpointing, where layers get no cache."
            )
            return False
        return bool(use_cache)

    def check_cache(self, cache: Cache, inputs_embeds: torch.Tensor | None = None) -> None:
        """Check that a cache fits this model and the input that continues it.

        Args:
            cache (`Cache`): cache of any origin.
            inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`, *optional*): the input.

        Raises:
            TypeError: for caches of other classes.
            ValueError: for a cache of another model, dtype, device or batch size, for an empty batch, and for any cache in
                training with gradient checkpointing, where layers get none.
        """
        names = [cache_class.__name__ for cache_class in self._cache_classes.values()]
        # By name, since the code of the model may come from a saved folder and that of the cache from this package.
        if not any(base.__name__ in names for base in type(cache).__mro__):
            raise TypeError(
                f"`{CACHE}` must be a {' or '.join(names)}, got {type(cache).__name__}: create it with "
                f"`{names[0]}(model.config)`, or omit it and pass `use_cache=True`. Prefix tuning, which creates a "
                "cache of keys and values, does not work with this model."
            )
        if checkpoints_layers(self.base_model):
            raise ValueError(
                f"`{CACHE}` cannot be used in training with gradient checkpointing, where layers get none: call `eval()` or "
                "`gradient_checkpointing_disable()` before."
            )
        # Layers that accelerate has placed on several devices have their states there.
        one_device = not any("_hf_hook" in vars(module) for module in getattr(self, "layers", ()))
        rows = check_states(cache, self._cache_layers(cache), inputs_embeds, one_device)
        batch = None if inputs_embeds is None else inputs_embeds.shape[0]
        if None not in (rows, batch) and rows != batch:
            raise ValueError(
                f"`{CACHE}` holds {rows} rows, but the batch has {batch}. `batch_repeat_interleave` and "
                "`batch_select_indices` of the cache change its rows."
            )

    def init_continuous_batching(self, *args, **kwargs):
        """Raise a `ValueError`: continuous batching needs paged keys and values."""
        raise ValueError(
            f"Continuous batching (`generate_batch`, `cache_implementation='paged'`) does not work with {type(self).__name__}, "
            "which has a custom cache: pass `generate` a left-padded batch with its `attention_mask`."
        )

    generate_batch = init_continuous_batching

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        """Create a custom cache instead of the stock one, and none in training with gradient checkpointing."""
        if model_kwargs.get(CACHE) is None and checkpoints_layers(self.base_model):
            logger.warning_once(
                "`generate` uses no cache in training with gradient checkpointing, where layers get none: each token processes "
                "the whole text again. Call `eval()` before."
            )
            generation_config.use_cache = model_kwargs["use_cache"] = False
        given, kind = model_kwargs.get(CACHE), generation_config.cache_implementation
        if given is not None:
            self.check_cache(given)
            if given.packed:
                raise ValueError(
                    f"`{CACHE}` holds packed sequences, but `generate` counts positions over whole rows: continue "
                    "with forward passes, or with a cache of the last sequence alone."
                )
        elif kind is not None and kind not in self._cache_classes:
            raise ValueError(
                f"`cache_implementation` must be {' or '.join(map(repr, self._cache_classes))} for "
                f"{type(self).__name__}, got {kind!r}."
            )
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] and not mask[:, -1].all():
            raise ValueError(
                "`attention_mask` must end with 1 in every row, since `generate` continues the last token of each row: "
                'pad prompts on the left (`tokenizer.padding_side = "left"`). Without a mask, every `pad_token_id` counts '
                "as padding."
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_length
        )
        if given is None and model_kwargs.get(CACHE) is not None and kind != "static":
            model_kwargs[CACHE] = self._cache_classes["dynamic"](self.config)

    def _prepare_static_cache(self, cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs):
        """Create a custom static cache with room for the longest text so far, so that compiled steps are for shorter ones, too."""
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", 0))
        static_class: Any = self._cache_classes["static"]
        return static_class(self.config, max_cache_len=self._previous_max_cache_length)


class CompiledStepMixin(OldCacheNameMixin):
    """Mixin before `GenerationMixin`, of models whose static caches count their tokens and know the pads."""

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """The mask of tokens unchanged, with which `generate` calls forward passes that may be compiled."""
        return attention_mask

    @with_cache_argument
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ):
        """As the stock method. With a static cache it checks that new tokens fit, and leaves out a mask that only grows."""
        given = {CACHE: past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, is_first_iteration=is_first_iteration, **given, **kwargs
        )
        if past_key_values is not None and past_key_values.is_compileable:
            new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            past_key_values.check_room(new.shape[1])
            past_key_values.prepare_step()
            mask = inputs.get("attention_mask")
            if mask is not None and not is_first_iteration and mask[:, -new.shape[1] :].all():
                del inputs["attention_mask"]
        return inputs


__all__ = ["CompiledStepMixin", "CustomCacheMixin"]
