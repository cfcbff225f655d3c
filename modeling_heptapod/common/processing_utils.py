"""Utilities of processors: `ProcessorMixin`'s calling convention for text alone, columns, special tokens."""

import inspect
from collections.abc import Sequence
from functools import wraps

from transformers.processing_utils import ProcessingKwargs, TextKwargs


_OTHER_INPUTS = ("images", "videos", "audio")
_OTHER_KWARGS = tuple(f"{modality}_kwargs" for modality in ("images", "videos", "audio"))
# Passed with every call; without effect for these processors.
_WITHOUT_EFFECT = ("verbose", "return_text_replacement_offsets")
_KNOWN = {*TextKwargs.__annotations__, *ProcessingKwargs.__annotations__} - {"text_kwargs", *_OTHER_KWARGS}


def reads_text_only(call):
    """Decorator of a processor's `__call__`: it accepts the arguments of transformers' processors beside its own.

    These are `text_kwargs` and `common_kwargs`, dicts with arguments of the call; `images`, `videos` and `audio`, which
    must be `None`, and their kwargs; options that the call does not support, if they are `None` or `False`.

    Raises:
        TypeError: for other inputs than text, kwargs that are not a dict, and unknown or unsupported arguments.
        ValueError: for an argument that is given twice.
    """
    own = inspect.signature(call).parameters

    @wraps(call)
    def with_the_convention(self, text=None, *args, **given):
        for name in _OTHER_INPUTS:
            if given.pop(name, None) is not None:
                raise TypeError(f"`{name}` must be None: {type(self).__name__} reads text only.")
        for name in _OTHER_KWARGS:
            given.pop(name, None)
        merged = {}
        for name in ("common_kwargs", "text_kwargs"):
            options = given.pop(name, None)
            if options is not None and not isinstance(options, dict):
                raise TypeError(f"`{name}` must be a dict, got {type(options).__name__}.")
            for twice in sorted(set(options or ()) & set(given)) if name == "text_kwargs" else ():
                raise ValueError(f"`{twice}` was given twice: in `text_kwargs` and by itself.")
            merged.update(options or {})
        merged.update(given)
        for name in [name for name in merged if name not in own]:
            if name in _KNOWN and (merged[name] is None or merged[name] is False or name in _WITHOUT_EFFECT):
                del merged[name]
            else:
                why = "does not support the" if name in _KNOWN else "got an unexpected"
                raise TypeError(f"{type(self).__name__} {why} keyword argument `{name}`.")
        return call(self, text, *args, **merged)

    return with_the_convention


def list_of_texts(text: str | Sequence[str]) -> list[str]:
    """One text or several as a list. Raises a `TypeError` for other types than text, a `ValueError` for an empty list."""
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise TypeError("`text` must be a string or a sequence of strings.")
    if not texts:
        raise ValueError("`text` must contain at least one text.")
    return texts


def columns_of(features) -> dict[str, list]:
    """Rows `[{name: value}]` or columns `{name: values}` as columns of lists and numbers.

    Raises:
        TypeError: for other types.
        ValueError: without rows, without `input_ids`, for rows with different names, and for columns of different lengths.
    """
    if isinstance(features, Sequence) and all(hasattr(row, "keys") for row in features):
        names = {tuple(sorted(row.keys())) for row in features}
        if len(names) > 1:
            raise ValueError(f"`encoded_inputs` must be rows with the same names, got {sorted(names)}.")
        features = {name: [row[name] for row in features] for name in (features[0].keys() if features else ())}
    elif not hasattr(features, "keys"):
        raise TypeError(f"`encoded_inputs` must be a list of dicts or a dict, got {type(features).__name__}.")
    columns = {
        name: [value.tolist() if hasattr(value, "tolist") else value for value in values]
        for name, values in features.items()
    }
    if not columns.get("input_ids"):
        raise ValueError(f"`encoded_inputs` must be at least one row with `input_ids`, got {sorted(columns)}.")
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"`encoded_inputs` must be columns of equal length, got {counts}.")
    return columns


def special_token_ids(tokenizer) -> set[int]:
    """Ids of special tokens, including those added as special without a name such as `bos_token`."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


__all__ = ["columns_of", "list_of_texts", "reads_text_only", "special_token_ids"]
