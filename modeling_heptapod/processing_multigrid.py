"""Text to tokens and meta ids, for training and for writing on."""

from collections.abc import Sequence

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .meta_axes import MetaAxis
from .shipped_axes import make_axis


UNFINISHED = "\ufffd"


class MultiGridProcessor(ProcessorMixin):
    """A tokenizer and the meta axes that stand beside its tokens.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            A fast one: it tells which characters each token covers.
        axes (`Sequence`, *optional*, defaults to `()`):
            The axes in the order of the model's `axis_names`: [`MetaAxis`] objects or what [`make_axis`] makes one of.
            They are saved with the processor; those of a class of your own load after its module is imported.

    Raises:
        ValueError: for a tokenizer that is not fast, and for axes that share a name or are unknown.

    Example:

    ```python
    >>> processor = MultiGridProcessor(tokenizer, ["token_kind", "bracket"])
    >>> names, sizes = processor.axis_names, processor.axis_vocab_sizes
    >>> config = MultiGridConfig(vocab_size=len(tokenizer), axis_names=names, axis_vocab_sizes=sizes)
    >>> model.generate(**processor("def f(x):", return_tensors="pt"), meta_source="annotated", processor=processor)
    ```"""

    def __init__(self, tokenizer, axes: Sequence = ()):
        super().__init__(tokenizer)
        if not tokenizer.is_fast:
            raise ValueError(f"`tokenizer` must be a fast one, which gives offsets, got {type(tokenizer).__name__}.")
        if isinstance(axes, (str, dict, MetaAxis)):
            raise ValueError(f"`axes` must be a sequence of axes, got {axes!r}.")
        self.axes = tuple(make_axis(axis) for axis in axes)
        names = [axis.name for axis in self.axes]
        if len(set(names)) < len(names):
            raise ValueError(f"`axes` must have different names, got {names}.")

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Tokenize and annotate one text or several.

        A text is text throughout: the name of a special token in it is not that token.

        Args:
            text: one text or a sequence of them.
            add_special_tokens, padding, truncation, max_length: as for the tokenizer, on the tokenizer's sides.
            return_offsets_mapping: give `offset_mapping`, `(start, end)` of each token, as well; without tensors only.
            return_tensors: `"pt"`, `"np"` or `None` for lists.

        Returns:
            `input_ids` and `attention_mask [batch, tokens]`, and, if there are axes, `meta_ids [batch, axes, tokens]`;
            int64. Meta ids of a text that is truncated are those of the whole text. Pads and special tokens have meta
            id 0.

        Raises:
            TypeError: for what is no text.
            ValueError: for no text at all, and what the tokenizer and the axes raise.
        """
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else None
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise TypeError("`text` must be a string or a sequence of strings.")
        if not texts:
            raise ValueError("`text` must hold at least one text.")
        encoded = self._tokenize(
            texts,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_special_tokens_mask=True,
        )
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if return_offsets_mapping:
            data["offset_mapping"] = encoded["offset_mapping"]
        if self.axes:
            # Pads count as special tokens. A token at the cut may hold a part of a character, hence the whole text.
            is_text = [np.array(mask) == 0 for mask in encoded["special_tokens_mask"]]
            if truncation:
                offsets = self._tokenize(texts, add_special_tokens=False)["offset_mapping"]
            else:
                offsets = [np.array(pairs)[here] for pairs, here in zip(encoded["offset_mapping"], is_text)]
            data["meta_ids"] = [self._lay(*each) for each in zip(texts, offsets, is_text)]
        if return_tensors is not None:  # which would be of floats where a text is empty
            data = {name: [np.array(row, dtype=np.int64) for row in rows] for name, rows in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def annotate(self, text: str, offsets=None) -> list[list[int]]:
        """The ids of each axis, `[axes][tokens]`; see [`MetaAxis.annotate`]."""
        return [axis.annotate(text, offsets) for axis in self.axes]

    def new_characters(self, pending: tuple, token_id: int) -> tuple[str, tuple]:
        """Which characters one more token completes, for axes that are stepped while a model writes.

        The rule is that of `MetaAxis.annotate`: of several tokens that share a character the last one completes it. The
        character U+FFFD, by which tokenizers show what is not complete, is completed by the token after it.

        Args:
            pending: what the last call returned, `()` before the first token. It is never changed in place.
            token_id: the token.

        Returns:
            The characters, none for special tokens, and what to give to the next call.
        """
        seen, ids = pending if pending else (0, ())
        ids = (*ids, int(token_id))
        text = self._decode(ids)
        complete = text.rstrip(UNFINISHED)
        if len(complete) < len(text):
            return complete[seen:], (max(seen, len(complete)), ids)
        # The next token is decoded behind this one: some tokenizers write the first token of a text differently.
        return text[seen:], (len(self._decode(ids[-1:])), ids[-1:])

    @property
    def axis_names(self) -> list[str]:
        return [axis.name for axis in self.axes]

    @property
    def axis_vocab_sizes(self) -> list[int]:
        return [len(axis.vocabulary) for axis in self.axes]

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "meta_ids"]

    def to_dict(self):
        return {**super().to_dict(), "axes": [axis.to_spec() for axis in self.axes]}

    def _tokenize(self, texts, **kwargs):
        # split_special_tokens: a text that spells "<|endoftext|>" is text.
        return self.tokenizer(texts, split_special_tokens=True, return_offsets_mapping=True, verbose=False, **kwargs)

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _lay(self, text, offsets, is_text):
        """The ids of a text at its tokens, as many as there are places; 0 elsewhere."""
        places = is_text.nonzero()[0]
        kept = (
            slice(len(places))
            if self.tokenizer.truncation_side == "right"
            else slice(len(offsets) - len(places), None)
        )
        ids = np.zeros((len(self.axes), len(is_text)), dtype=np.int64)
        ids[:, places] = [row[kept] for row in self.annotate(text, offsets)]
        return ids.tolist()


MultiGridProcessor.register_for_auto_class()

__all__ = ["MultiGridProcessor"]
