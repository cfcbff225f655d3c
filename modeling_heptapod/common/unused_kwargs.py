"""Unused keyword arguments of a forward pass, which `**kwargs` must not hide."""

from typing import Any

from transformers.utils import logging

from .transformers_versions import check_version  # noqa: F401  (every family imports this module: saved folders check the version, too)


logger = logging.get_logger(__name__)

# Used by losses and decorators, so that a base model may ignore them. Decorators pass `use_cache` to a model without a cache if
# its config has such a field.
_READ_ELSEWHERE = ("num_items_in_batch", "output_hidden_states", "use_cache")
# Used by `generate` itself (`stop_strings`), which passes them to each forward pass.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
# Given with `cu_seq_lens_q`, without further information.
_WITH_CU_SEQ_LENS_Q = ("cu_seq_lens_k", "max_length_q", "max_length_k")


def pop_kwargs(kwargs: Any, *names: str) -> dict[str, Any]:
    """Remove `names` from `kwargs` and return those that were there: arguments of a loss that the base model must not get."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def reject_unused_kwargs(model, kwargs: dict[str, Any], cu_seq_lens_q=None) -> None:
    """Raise a `TypeError` for arguments in `kwargs` that `model.forward` does not use.

    `None` is accepted for any argument, and `False` for outputs. `token_type_ids`, which many tokenizers return by
    default, only cause a warning.
    """
    unread = []
    for name, value in kwargs.items():
        asks_for_nothing = value is None or (value is False and name.startswith("output_"))
        comes_along = cu_seq_lens_q is not None and name in _WITH_CU_SEQ_LENS_Q
        if asks_for_nothing or comes_along or name in _READ_ELSEWHERE + _OF_GENERATE:
            continue
        if name == "token_type_ids":
            logger.warning_once(f"`token_type_ids` are ignored: {type(model).__name__} has no token types.")
        else:
            unread.append(name)
    if unread:
        raise TypeError(
            f"{type(model).__name__} got unexpected arguments: {', '.join(f'`{name}`' for name in unread)}."
        )


__all__ = ["pop_kwargs", "reject_unused_kwargs"]
