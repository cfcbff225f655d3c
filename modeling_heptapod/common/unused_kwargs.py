"""Keyword arguments of a forward pass that nothing reads: `**kwargs` must not swallow what would have changed the result."""

from typing import Any

from transformers.utils import logging

from .transformers_versions import check_version  # noqa: F401  (all families come here: saved folders, too, refuse untested versions)


logger = logging.get_logger(__name__)

# Read by the loss of heads and by decorators, so that a base model need not look at them; a model without a cache gets `use_cache`
# from decorators where somebody has put it into its config.
_READ_ELSEWHERE = ("num_items_in_batch", "output_hidden_states", "use_cache")
# Read by `generate` itself (`stop_strings`), which hands them on to each forward pass.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
# Come with `cu_seq_lens_q`, and say nothing more.
_WITH_CU_SEQ_LENS_Q = ("cu_seq_lens_k", "max_length_q", "max_length_k")


def pop_kwargs(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of `names` that are in `kwargs`, removed from it: what a loss reads and the base model must not get."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def reject_unused_kwargs(model, kwargs: dict[str, Any], cu_seq_lens_q=None) -> None:
    """Raise a `TypeError` for arguments left over in `kwargs`, of which `model.forward` makes no use.

    `None` asks for nothing, nor does `False` for an output. `token_type_ids`, which many tokenizers give unasked, are
    only warned of.
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
            f"{type(model).__name__} got arguments that it does not know: {', '.join(f'`{name}`' for name in unread)}."
        )


__all__ = ["pop_kwargs", "reject_unused_kwargs"]
