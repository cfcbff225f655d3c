"""Models with caches of their own: which ones a forward pass takes, and which ones `generate` makes."""

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_checks import LayerStates, check_states
from .model_inputs import is_torch_func_active
from .transformers_versions import CACHE, checkpoints_layers


logger = logging.get_logger(__name__)


class CustomCacheMixin:
    """For the `PreTrainedModel` of a family and, before `GenerationMixin`, its classes that generate.

    Attributes:
        _cache_classes (`dict[str, type]`): cache classes by the `cache_implementation` that asks for them, "dynamic" first.
    """

    _cache_classes: dict[str, type[Cache]]

    def _cache_layers(self, cache: Cache) -> list[LayerStates]:
        """What each layer of `cache` holds once it has seen a token."""
        raise NotImplementedError

    def starts_cache(self, use_cache: bool | None) -> bool:
        """Whether a forward pass without a cache fills a new one: in training only if asked to, by more than the config."""
        if use_cache is None and is_torch_func_active():
            return False  # of `torch.func`, whose tensors are not to be kept
        if not self.training:
            return self.config.use_cache if use_cache is None else bool(use_cache)
        if use_cache and checkpoints_layers(self.base_model):
            logger.warning_once(
                "`use_cache=True` is ignored in training with gradient checkpointing, where layers get no cache."
            )
            return False
        return bool(use_cache)

    def check_cache(self, cache: Cache, inputs_embeds: torch.Tensor | None = None) -> None:
        """Check that a cache is of this model, and fits the input that is to continue it.

        Args:
            cache (`Cache`): of any origin.
            inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`, *optional*): the input.

        Raises:
            TypeError: for caches of other kinds.
            ValueError: for a cache of another model, dtype, device or batch size, or of no rows, and for any in training with
                gradient checkpointing, where layers get none.
        """
        names = [cache_class.__name__ for cache_class in self._cache_classes.values()]
        # By name: a cache that was made here also serves a model whose code came with its folder.
        if not any(base.__name__ in names for base in type(cache).__mro__):
            raise TypeError(
                f"`{CACHE}` must be a {' or '.join(names)}, got {type(cache).__name__}: build it with "
                f"`{names[0]}(model.config)`, or leave it out and pass `use_cache=True`. Prefix tuning, which makes a "
                "cache of keys and values, does not work with this model."
            )
        if checkpoints_layers(self.base_model):
            raise ValueError(
                f"`{CACHE}` cannot be used in training with gradient checkpointing, where layers get none: call `eval()` or "
                "`gradient_checkpointing_disable()` before."
            )
        # Where accelerate has spread the layers over devices, so are their states.
        one_device = not any("_hf_hook" in vars(module) for module in getattr(self, "layers", ()))
        rows = check_states(cache, self._cache_layers(cache), inputs_embeds, one_device)
        batch = None if inputs_embeds is None else inputs_embeds.shape[0]
        if None not in (rows, batch) and rows != batch:
            raise ValueError(
                f"`{CACHE}` holds {rows} rows, but the batch has {batch}. `batch_repeat_interleave` and "
                "`batch_select_indices` of the cache repeat and choose rows."
            )

    def init_continuous_batching(self, *args, **kwargs):
        """Raise a `ValueError`: continuous batching keeps keys and values in pages that it shares out among requests."""
        raise ValueError(
            f"Continuous batching (`generate_batch`, `cache_implementation='paged'`) does not work with {type(self).__name__}, "
            "which keeps a cache of its own: give `generate` a left-padded batch with its `attention_mask`."
        )

    generate_batch = init_continuous_batching

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        """A cache of our own in place of the stock one; none in training with gradient checkpointing, where layers get none."""
        if model_kwargs.get(CACHE) is None and checkpoints_layers(self.base_model):
            logger.warning_once(
                "`generate` does without a cache in training with gradient checkpointing, where layers get none: each token "
                "reads the whole text anew. Call `eval()` before."
            )
            generation_config.use_cache = model_kwargs["use_cache"] = False
        given, kind = model_kwargs.get(CACHE), generation_config.cache_implementation
        if given is not None:
            self.check_cache(given)
            if given.packed:
                raise ValueError(
                    f"`{CACHE}` holds packed sequences, but `generate` counts positions of whole rows: continue "
                    "with forward passes, or from a cache of the last sequence alone."
                )
        elif kind is not None and kind not in self._cache_classes:
            raise ValueError(
                f"`cache_implementation` must be {' or '.join(map(repr, self._cache_classes))} for "
                f"{type(self).__name__}, got {kind!r}."
            )
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] and not mask[:, -1].all():
            raise ValueError(
                "`attention_mask` must end with 1 in every row, since `generate` reads what follows a prompt off its last place: "
                'pad prompts on the left (`tokenizer.padding_side = "left"`). Where no mask is given, every `pad_token_id` counts '
                "as a pad."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_length)
        if given is None and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self._cache_classes[kind or "dynamic"](self.config)


__all__ = ["CustomCacheMixin"]
