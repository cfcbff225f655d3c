"""Models with caches of their own: which ones a forward pass takes, and which ones `generate` makes."""

from transformers.cache_utils import Cache

from .transformers_versions import CACHE


class OwnCacheMixin:
    """For the `PreTrainedModel` of a family and, before `GenerationMixin`, its classes that generate.

    Attributes:
        _cache_classes (`dict[str, type]`): cache classes by the `cache_implementation` that asks for them, "dynamic" first.
    """

    _cache_classes: dict[str, type[Cache]]

    def check_cache(self, cache: Cache, batch: int | None = None) -> None:
        """Raise a `TypeError` for caches of other kinds, a `ValueError` for one of another batch size."""
        names = [cache_class.__name__ for cache_class in self._cache_classes.values()]
        # By name: a cache that was made here also serves a model whose code came with its folder.
        if not any(base.__name__ in names for base in type(cache).__mro__):
            raise TypeError(
                f"`{CACHE}` must be a {' or '.join(names)}, got {type(cache).__name__}: build it with "
                f"`{names[0]}(model.config)`, or leave it out and pass `use_cache=True`."
            )
        rows = cache.num_rows()
        if None not in (rows, batch) and rows != batch:
            raise ValueError(
                f"`{CACHE}` holds {rows} rows, but the batch has {batch}. `batch_repeat_interleave` and "
                "`batch_select_indices` of the cache repeat and choose rows."
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        """A cache of our own in place of the stock one."""
        given, kind = model_kwargs.get(CACHE), generation_config.cache_implementation
        if given is not None:
            self.check_cache(given)
        elif kind is not None and kind not in self._cache_classes:
            raise ValueError(
                f"`cache_implementation` must be {' or '.join(map(repr, self._cache_classes))} for "
                f"{type(self).__name__}, got {kind!r}."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_length)
        if given is None and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self._cache_classes[kind or "dynamic"](self.config)


__all__ = ["OwnCacheMixin"]
