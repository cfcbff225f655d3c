"""Text to tokens and axis ids, for training and generation."""

from collections.abc import Sequence

import numpy as np
from transformers.feature_extraction_utils import BatchFeature

from ..common.processing_utils import columns_of, list_of_texts, reads_text_only, special_token_ids
from ..common.remote_code import CustomCodeMixin
from .axes import Axis
from .axis_files import AxisFilesMixin
from .axis_registry import make_axis


UNFINISHED = "\ufffd"


class MultiGridProcessor(CustomCodeMixin, AxisFilesMixin):
    """A tokenizer and the axes of its tokens.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            A fast tokenizer, which returns the offsets of tokens.
        axes (`Sequence`, *optional*, defaults to `()`):
            The axes in the order of the model's `axis_names`, as [`Axis`] objects or arguments of [`make_axis`]. They are
            saved with the processor. To load an axis of a custom class, import its module before; the files of classes from
            [`load_axis_class`] are saved as well, and load with `trust_remote_code=True`.
        chat_template (`str`, *optional*): for `apply_chat_template`. Defaults to that of `tokenizer`.

    Raises:
        ValueError: for a tokenizer that is not fast, and for axes that are unknown or have equal names.

    Example:

    ```python
    >>> processor = MultiGridProcessor(tokenizer, ["token_kind", "bracket"])
    >>> names, sizes = processor.axis_names, processor.axis_vocab_sizes
    >>> config = MultiGridConfig(vocab_size=len(tokenizer), axis_names=names, axis_vocab_sizes=sizes)
    >>> model.generate(**processor("def f(x):", return_tensors="pt"), axis_source="annotated", processor=processor)
    ```"""

    _auto_classes = {"AutoProcessor": "processing_multigrid.MultiGridProcessor"}

    def __init__(self, tokenizer, axes: Sequence = (), chat_template: str | None = None):
        super().__init__(tokenizer)
        self.chat_template = getattr(tokenizer, "chat_template", None) if chat_template is None else chat_template
        if not tokenizer.is_fast:
            raise ValueError(f"`tokenizer` must be a fast one, which gives offsets, got {type(tokenizer).__name__}.")
        if isinstance(axes, (str, dict, Axis)):
            raise ValueError(f"`axes` must be a sequence of axes, got {axes!r}.")
        self.axes = tuple(make_axis(axis) for axis in axes)
        names = [axis.name for axis in self.axes]
        if len(set(names)) < len(names):
            raise ValueError(f"`axes` must have different names, got {names}.")

    @reads_text_only
    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        split_special_tokens: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Tokenize and annotate one text or several.

        Args:
            text: a text or a sequence of texts.
            add_special_tokens, padding, truncation, max_length, pad_to_multiple_of, padding_side:
                As for the tokenizer.
            split_special_tokens: whether to encode the names of special tokens in a text as text. Defaults to the setting of
                the tokenizer, usually `False`. Use `True` for untrusted texts.
            return_special_tokens_mask: whether to return `special_tokens_mask`, 1 at special tokens and pads.
            return_offsets_mapping: whether to return `offset_mapping`, `(start, end)` of each token; only without tensors.
            return_tensors: `"pt"`, `"np"` or `None` for lists.

        These may also be given as the dicts `text_kwargs` and `common_kwargs`, as for all processors.

        Returns:
            `input_ids` and `attention_mask [batch, tokens]`, and with axes `axis_ids [batch, axes, tokens]`, of int64. Axis ids
            of a truncated text are those of the whole text. Pads and special tokens have id 0, and axes do not read their
            characters.

        Raises:
            TypeError: unless `text` is a string or a sequence of strings, and for unknown options.
            ValueError: without any text, and what the tokenizer and the axes raise.
        """
        texts = list_of_texts(text)
        split = {} if split_special_tokens is None else {"split_special_tokens": split_special_tokens}
        encoded = self._tokenize(
            texts,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_special_tokens_mask=True,
            **split,
        )
        special = list(special_token_ids(self.tokenizer))
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [np.isin(ids, special).astype(int).tolist() for ids in encoded["input_ids"]]
        if return_offsets_mapping:
            data["offset_mapping"] = encoded["offset_mapping"]
        if self.axes:
            data["axis_ids"] = self._annotate_rows(texts, encoded, special, truncation, split)
        return _batch(data, return_tensors)

    def pad(
        self,
        encoded_inputs,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchFeature:
        """As the `pad` of the tokenizer, with `axis_ids` and `labels`. `DataCollatorWithPadding(processor)` makes batches from
        outputs of [`~MultiGridProcessor.__call__`], and `DataCollatorForLanguageModeling(processor, mlm=False)` adds labels.

        Args:
            encoded_inputs: rows `[{name: values}]`, or columns `{name: rows}`, with `axis_ids [axes, tokens]` in each row.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors, verbose:
                As for the tokenizer.

        Returns:
            All columns, padded: `axis_ids` with 0, `labels` with -100, others by the tokenizer.

        Raises:
            TypeError: unless `encoded_inputs` are rows or columns.
            ValueError: where `axis_ids` are missing or not aligned with the tokens, and what the tokenizer raises.
        """
        columns = columns_of(encoded_inputs)
        lengths = [len(ids) for ids in columns["input_ids"]]
        axis_ids, labels = columns.pop("axis_ids", None), columns.pop("labels", None)
        if axis_ids is None and self.axes:
            raise ValueError(f"`encoded_inputs` must have `axis_ids` of the axes {self.axis_names}.")
        padded = self.tokenizer.pad(
            columns,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=verbose,
        )
        data = dict(padded)
        side = self.tokenizer.padding_side if padding_side is None else padding_side
        for name, rows, filler, shape in (("axis_ids", axis_ids, 0, [len(self.axes)]), ("labels", labels, -100, [])):
            if rows is None:
                continue
            data[name] = []
            for row, length, ids in zip(rows, lengths, data["input_ids"]):
                row = np.asarray(row, dtype=np.int64)
                if list(row.shape) != [*shape, length]:
                    raise ValueError(
                        f"`{name}` must be {[*shape, length]} each like the tokens, got {list(row.shape)}."
                    )
                room = (len(ids) - length, 0) if side == "left" else (0, len(ids) - length)
                data[name].append(np.pad(row, [(0, 0)] * len(shape) + [room], constant_values=filler).tolist())
        return _batch(data, return_tensors)

    def annotate(self, text: str, offsets=None) -> list[list[int]]:
        """The ids of each axis, `[axes][tokens]`. See [`Axis.annotate`]."""
        return [axis.annotate(text, offsets) for axis in self.axes]

    def new_characters(self, pending: tuple, token_id: int) -> tuple[str, tuple]:
        """Characters that one more token completes, for axes that annotate text during generation.

        As in `Axis.annotate`, the last of several tokens that share a character completes it. The character U+FFFD, which
        tokenizers return for incomplete characters, is completed by the token after it.

        Args:
            pending: state from the last call, `()` before the first token. It is not changed in place.
            token_id: the token.

        Returns:
            The characters, none for special tokens, and the state for the next call.
        """
        seen, ids = pending if pending else (0, ())
        ids = (*ids, int(token_id))
        text = self._decode(ids)
        complete = text.rstrip(UNFINISHED)
        if len(complete) < len(text):
            return complete[seen:], (max(seen, len(complete)), ids)
        # The next token is decoded after this one, since some tokenizers decode the first token of a text differently.
        return text[seen:], (len(self._decode(ids[-1:])), ids[-1:])

    @property
    def axis_names(self) -> list[str]:
        return [axis.name for axis in self.axes]

    @property
    def axis_vocab_sizes(self) -> list[int]:
        return [len(axis.vocabulary) for axis in self.axes]

    @property
    def pad_token_id(self) -> int | None:
        """The `pad_token_id` of the tokenizer, for collators."""
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "axis_ids"]

    def to_dict(self):
        return {**super().to_dict(), "axes": [axis.to_dict() for axis in self.axes]}

    def _tokenize(self, texts, **kwargs):
        return self.tokenizer(texts, return_offsets_mapping=True, verbose=False, **kwargs)

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _annotate_rows(self, texts, encoded, special, truncation, split):
        """Axis ids of tokenized texts, `[axes, tokens]` each."""
        # Without pads and the special tokens that the tokenizer adds.
        is_text = [np.array(mask) == 0 for mask in encoded["special_tokens_mask"]]
        if truncation:  # the last token may hold a part of a character, so the whole text is annotated
            whole = self._tokenize(texts, add_special_tokens=False, **split)
            tokens = list(zip(whole["input_ids"], whole["offset_mapping"]))
        else:
            columns = zip(encoded["input_ids"], encoded["offset_mapping"], is_text)
            tokens = [(np.array(ids)[here], np.array(pairs)[here]) for ids, pairs, here in columns]
        return [
            self._lay(each, np.isin(ids, special), pairs, here)
            for each, (ids, pairs), here in zip(texts, tokens, is_text)
        ]

    def _lay(self, text, is_special, offsets, is_text):
        """Axis ids `[axes, tokens]` of a text where `is_text`, 0 elsewhere and at special tokens."""
        offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if is_special.any():  # their characters are not annotated, as in `new_characters`
            kept = np.ones(len(text), dtype=bool)
            for start, end in offsets[is_special]:
                kept[start:end] = False
            offsets = np.append(0, kept.cumsum())[offsets]
            text = "".join(np.array(list(text))[kept]) if kept.any() else ""
        annotated = np.array(self.annotate(text, offsets), dtype=np.int64)
        annotated[:, is_special] = 0
        places = is_text.nonzero()[0]
        right = self.tokenizer.truncation_side == "right"
        first = 0 if right else len(offsets) - len(places)
        ids = np.zeros((len(self.axes), len(is_text)), dtype=np.int64)
        ids[:, places] = annotated[:, first : first + len(places)]
        return ids.tolist()


def _batch(data, return_tensors):
    """Columns as a batch, with tensors of int64 for integers and for empty rows, which would be floats."""
    if return_tensors is not None:
        arrays = {name: [np.asarray(row) for row in rows] for name, rows in data.items()}
        data = {
            name: [row.astype(np.int64) if not row.size or row.dtype.kind in "iu" else row for row in rows]
            for name, rows in arrays.items()
        }
    return BatchFeature(data, tensor_type=return_tensors)


__all__ = ["MultiGridProcessor"]
