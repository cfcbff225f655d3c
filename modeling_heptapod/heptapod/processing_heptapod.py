"""Text to pages and back: lines become rows of cells.

A line is its tokens and a newline token; a row that ends without one continues in the next row. Blank tokens fill the
rest of a row and of the page. They are ordinary tokens that the model predicts like any other, so the ends of lines and
of the text are predicted as well, and every text has exactly one page of a given size. The cells in reading order,
without the blanks, give the text back.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from ..common.processing_utils import columns_of, list_of_texts, reads_text_only, special_token_ids
from ..common.remote_code import CustomCodeMixin
from ..common.renamed_fields import reject_renamed


logger = logging.get_logger(__name__)

# A sample of what tokenizers and their normalizers are known to change: blanks at either end and in twos, a blank before a
# comma, tabs, carriage returns, control characters, upper case, composed and decomposed accents, ligatures, several bytes.
_PROBE = "  Two  blanks ,\ta tab\r \x00 \u00e9 e\u0301 \ufb01 \u00a0\U0001f419  "


def _wrap(lines, width, newline_token_id):
    return [line[start : start + width] for line in lines for start in range(0, len(line), width)]


def _truncate(lines, width, newline_token_id):
    return [_truncate_line(line, width, newline_token_id) for line in lines]


def _truncate_line(line, width, newline_token_id):
    if len(line) <= width:
        return line
    ending = line[-1:] if line[-1] == newline_token_id else []
    return line[: width - len(ending)] + ending


# Rows of at most `width` tokens from lines.
OVERFLOWS = {"wrap": _wrap, "truncate": _truncate}


def _third(length):
    return -(-length // 3)


def _centre(height, width):
    rows, columns = -(-height // 2), -(-width // 2)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


# Rectangle `(top, left, height, width)` on a page of a height and a width, and whether all but the rectangle is masked.
REGIONS = {
    "top": (lambda height, width: (0, 0, _third(height), width), False),
    "middle": (lambda height, width: (height // 3, 0, _third(height), width), False),
    "bottom": (lambda height, width: (height - _third(height), 0, _third(height), width), False),
    "hole": (_centre, False),
    "frame": (_centre, True),
    "all": (lambda height, width: (0, 0, height, width), False),
}


def region_mask(region, height: int, width: int) -> np.ndarray:
    """Cells of a region of a page.

    Args:
        region: `"top"`, `"middle"` or `"bottom"` (a third of the rows), `"hole"` (the centre: half of the rows by half
            of the columns), `"frame"` (all but the centre), `"all"`, a rectangle `(top, left, height, width)`, or a
            boolean array `[height, width]`.
        height, width: size of the page.

    Returns:
        Boolean array `[height, width]`.

    Raises:
        ValueError: for an unknown name, and for a rectangle or an array that does not fit on the page.
    """
    inverted = False
    if isinstance(region, str):
        if region not in REGIONS:
            raise ValueError(
                f"`mask_region` must be one of {tuple(REGIONS)}, a rectangle or a boolean array, got {region!r}."
            )
        rectangle, inverted = REGIONS[region]
        region = rectangle(height, width)
    if isinstance(region, tuple) and len(region) == 4 and all(type(number) is int for number in region):
        top, left, rows, columns = region
        if top < 0 or left < 0 or rows < 1 or columns < 1 or top + rows > height or left + columns > width:
            raise ValueError(
                f"`mask_region` (top, left, height, width) = {region} does not fit on a page of {height} x {width}."
            )
        is_masked = np.full((height, width), inverted)
        is_masked[top : top + rows, left : left + columns] = not inverted
        return is_masked
    array = np.asarray(region)
    if array.dtype != bool or array.shape != (height, width):
        raise ValueError(
            f"`mask_region` must be one of {tuple(REGIONS)}, a rectangle (top, left, height, width) or a boolean array "
            f"[{height}, {width}], got {region!r}."
        )
    return array.copy()


class HeptapodProcessor(CustomCodeMixin, ProcessorMixin):
    """Arranges text on pages for a grid model, and decodes pages to text.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            Decodes every text unchanged, encodes `"\\n"` as one token, has a mask and a padding token. A sample of what
            tokenizers often change (case, accents, blanks, ...) is tried.
        height, width (`int`, *optional*):
            Size of a page. Without them a page is as high or as wide as its text needs.
        overflow (`str`, *optional*, defaults to `"wrap"`):
            A line that is longer than a row continues in the next one (`"wrap"`) or is cut off (`"truncate"`). A text
            with more rows than the page raises an error with `"wrap"` and is cut off with `"truncate"`. See `paginate`
            for texts longer than a page.
        blank_token (`str`, *optional*, defaults to `"<|blank|>"`):
            The token of `tokenizer` that fills rows.
        chat_template (`str`, *optional*):
            For `apply_chat_template`, that of `tokenizer` when not given.

    Raises:
        ValueError: for a tokenizer without these tokens or one that changes text, and for other invalid arguments.

    Example:

    ```python
    >>> page = processor("def f(x):\\n    return x\\n", height=4, width=16, mask_region="middle")
    >>> processor.batch_decode(model.generate(**page))
    ```"""

    _auto_classes = {"AutoProcessor": "processing_heptapod.HeptapodProcessor"}

    def __init__(
        self, tokenizer, height=None, width=None, overflow="wrap", blank_token="<|blank|>", chat_template=None
    ):
        super().__init__(tokenizer)
        self.chat_template = getattr(tokenizer, "chat_template", None) if chat_template is None else chat_template
        self.height, self.width, self.overflow, self.blank_token = height, width, overflow, blank_token
        _check_size("height", height)
        _check_size("width", width)
        _check_overflow(overflow)
        if blank_token not in tokenizer.get_vocab():
            raise ValueError(f"`blank_token` {blank_token!r} is not in the vocabulary of `tokenizer`.")
        self.blank_token_id = tokenizer.convert_tokens_to_ids(blank_token)
        newline = self._tokenize(["\n"])[0]
        if len(newline) != 1:
            raise ValueError(f"`tokenizer` must encode a newline as one token, got {newline}.")
        self.newline_token_id = newline[0]
        for name in ("mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"`tokenizer` has no {name}; add one with `tokenizer.add_special_tokens`.")
        special = [self.newline_token_id, self.blank_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
        if len(set(special)) < 4:
            raise ValueError(
                f"`tokenizer` must have different newline, blank, mask and padding tokens, got {special}."
            )
        if self.decode(self._tokenize([_PROBE])[0]) != _PROBE:
            raise ValueError(
                "`tokenizer` does not decode text unchanged, so pages could not be decoded; use byte-level BPE."
            )

    @reads_text_only
    def __call__(
        self,
        text: str | Sequence[str],
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        overflow: str | None = None,
        mask_region=None,
        return_num_truncated_tokens: bool = False,
        return_labels: bool = False,
        split_special_tokens: bool = True,
        padding: bool | str = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Arranges one text or several, a page each.

        The name of a special token in a text is text, unless `split_special_tokens=False`: the name of the mask token
        masks nothing, `mask_region` does.

        Args:
            text: one text or a sequence of them.
            height, width: size of a page, or of each; the processor's own when not given.
            overflow: `"wrap"` or `"truncate"`, the processor's own when not given.
            mask_region: cells whose tokens are replaced with mask tokens, see [`region_mask`]: one region for all pages,
                or a list with a region or `None` for each.
            return_num_truncated_tokens: return `num_truncated_tokens [batch]`, the number of tokens of each text that
                are not on its page. Without it a warning reports them.
            return_labels: return `labels` for training: `input_ids` with `-100` at padding and masked cells. `Trainer`
                counts all others.
            split_special_tokens: whether the name of a special token in a text is text. With `False` it is that token,
                as in templates with `apply_chat_template(..., tokenize=True)`.
            padding: `True` or `"longest"`: the pages of a batch are always padded to the largest.
            return_tensors: `"pt"`, `"np"` or `None` for lists.

        `text_kwargs` and `common_kwargs`, dicts of these, are accepted as in all processors.

        Returns:
            `input_ids` and `attention_mask`, int64 `[batch, height, width]` of the highest and the widest page, with
            padding tokens and a mask of 0 at other cells.

        Raises:
            ValueError: if a text does not fit on its page with `"wrap"`, and for sizes and regions that do not fit.
            TypeError: for anything but text, and for unknown options.
        """
        texts = list_of_texts(text)
        _check_padding(padding)
        overflow = self.overflow if overflow is None else overflow
        _check_overflow(overflow)
        heights = _one_each("height", self.height if height is None else height, len(texts))
        widths = _one_each("width", self.width if width is None else width, len(texts))
        regions = mask_region if isinstance(mask_region, list) else [mask_region] * len(texts)
        if len(regions) != len(texts):
            raise ValueError(f"`mask_region` must have one entry for each of {len(texts)} texts, got {len(regions)}.")

        pages, num_truncated_tokens = [], []
        for number, (text, rows, columns, region) in enumerate(zip(texts, heights, widths, regions)):
            page, truncated = self._arrange(text, rows, columns, overflow, number, split_special_tokens)
            if region is not None:
                page[region_mask(region, *page.shape)] = self.tokenizer.mask_token_id
            pages.append(page)
            num_truncated_tokens.append(truncated)
        if any(num_truncated_tokens) and not return_num_truncated_tokens:
            logger.warning(f"Tokens of each text that are not on its page: {num_truncated_tokens}.")

        input_ids = _stack(pages, self.tokenizer.pad_token_id)
        attention_mask = _stack([np.ones_like(page) for page in pages], 0)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        if return_num_truncated_tokens:
            data["num_truncated_tokens"] = np.array(num_truncated_tokens)
        if return_labels:
            counts = (attention_mask == 1) & (input_ids != self.tokenizer.mask_token_id)
            data["labels"] = np.where(counts, input_ids, -100)
        if return_tensors is None:
            data = {name: values.tolist() for name, values in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def pad(
        self,
        encoded_inputs,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pads pages of different sizes to one batch, as for `DataCollatorWithPadding(processor)`.

        A processor with a `height` and a `width` pads every batch to them, so that all batches are of one size, as
        `Trainer.predict` requires; otherwise the size is that of the highest and the widest page of the batch.

        Args:
            encoded_inputs: rows `[{name: values}]`, or columns `{name: rows}`; of `input_ids`, `attention_mask` and
                `labels` each row is a page `[height, width]`.
            padding: `True` or `"longest"`.
            max_length, pad_to_multiple_of: must be `None`.
            return_tensors: `"pt"`, `"np"` or `None` for lists.

        Returns:
            All columns: `input_ids` padded with the padding token, `labels` with -100, `attention_mask`, which is added
            if missing, with 0; others unchanged.

        Raises:
            TypeError: for anything but rows or columns.
            ValueError: for pages that are not `[height, width]` or larger than the processor's, and for other options.
        """
        _check_padding(padding)
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None:
                raise ValueError(f"`{name}` must be None, as pages have a height and a width, got {value}.")
        data = columns_of(encoded_inputs)
        pages = [np.asarray(page, dtype=np.int64) for page in data["input_ids"]]
        for page in pages:
            if page.ndim != 2:
                raise ValueError(f"`input_ids` must be pages [height, width], got one of shape {list(page.shape)}.")
        data.setdefault("attention_mask", [np.ones_like(page) for page in pages])
        for name, filler in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            if name not in data:
                continue
            rows = [np.asarray(page, dtype=np.int64) for page in data[name]]
            for page, row in zip(pages, rows):
                if row.shape != page.shape:
                    raise ValueError(f"`{name}` must be {list(page.shape)} like its page, got {list(row.shape)}.")
            data[name] = _stack(rows, filler, self.height, self.width)
        if return_tensors is None:
            data = {name: np.asarray(values).tolist() for name, values in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As [`ProcessorMixin.apply_chat_template`]. Names of special tokens in the template become these tokens."""
        if kwargs.get("tokenize"):
            options = {"split_special_tokens": False, **(kwargs.get("processor_kwargs") or {})}
            if "split_special_tokens" in kwargs:
                options["split_special_tokens"] = kwargs.pop("split_special_tokens")
            kwargs["processor_kwargs"] = options
        return super().apply_chat_template(conversation, *args, **kwargs)

    def paginate(self, text: str, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Splits a text of any length into pages. Long lines wrap, and no token is lost.

        Args:
            text: the text.
            height, width: size of the pages, the processor's own when not given; both are required.

        Returns:
            Token ids, int64 `[pages, height, width]`. Decode all of them as one page, `pages.reshape(-1, width)`: a
            character of several tokens may begin on one page and end on the next.
        """
        height, width = self.height if height is None else height, self.width if width is None else width
        for name, value in (("height", height), ("width", width)):
            _check_size(name, value)
            if value is None:
                raise ValueError(f"`{name}` of the pages must be given.")
        rows = _wrap(self._lines(text), width, self.newline_token_id)
        pages = np.full((-(-len(rows) // height), height, width), self.blank_token_id, dtype=np.int64)
        _write(pages.reshape(-1, width), rows)
        return pages

    def mask_cells(self, pages, region) -> torch.Tensor:
        """Masks a region of pages.

        Args:
            pages: token ids `[..., height, width]`, a tensor or an array of integers; it is not changed.
            region: see [`region_mask`].

        Returns:
            The pages with mask tokens in the region, except at padding; a tensor, int64.
        """
        pages = torch.as_tensor(pages).long()
        is_masked = torch.from_numpy(region_mask(region, *pages.shape[-2:])).to(pages.device)
        return pages.masked_fill(is_masked & (pages != self.tokenizer.pad_token_id), self.tokenizer.mask_token_id)

    def decode(self, token_ids, mask_text: str = "\u2591", skip_special_tokens: bool = True) -> str:
        """Decodes a page.

        Args:
            token_ids: the page `[height, width]`, or its cells in reading order `[cells]`; a tensor, an array or lists.
            mask_text: the text for a masked token.
            skip_special_tokens: leave out blanks, padding and the tokenizer's other special tokens; otherwise all cells
                are decoded by the tokenizer.
        """
        page = np.asarray(token_ids.cpu() if hasattr(token_ids, "cpu") else token_ids)
        if page.ndim not in (1, 2):
            raise ValueError(
                f"`token_ids` must be [height, width] or [cells], got {list(page.shape)}; see `batch_decode`."
            )
        ids = page.ravel().tolist()
        if not skip_special_tokens:
            return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        mask = self.tokenizer.mask_token_id
        left_out = {self.blank_token_id, *special_token_ids(self.tokenizer)} - {mask}
        pieces: list[list[int]] = [[]]  # of text between masked tokens
        for token in ids:
            if token == mask:
                pieces.append([])
            elif token not in left_out:
                pieces[-1].append(token)
        return mask_text.join(self.tokenizer.decode(piece, clean_up_tokenization_spaces=False) for piece in pieces)

    def batch_decode(self, sequences, mask_text: str = "\u2591", skip_special_tokens: bool = True) -> list[str]:
        """Decodes pages `[batch, height, width]`; the other arguments are those of `decode`."""
        return [self.decode(page, mask_text, skip_special_tokens) for page in sequences]

    @property
    def pad_token_id(self) -> int:
        """Padding token id of the tokenizer, which collators read from the processor."""
        return self.tokenizer.pad_token_id

    @property
    def mask_token(self):
        """Not available to collators, since the model masks pages itself. See `tokenizer.mask_token`."""
        raise AttributeError("`DataCollatorForLanguageModeling` needs `mlm=False`: the model masks pages itself.")

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask"]

    def _tokenize(self, lines, split_special_tokens=True):
        if not lines:
            return []
        # split_special_tokens: "<|mask|>" in a text is text.
        return self.tokenizer(
            lines,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _lines(self, text, split_special_tokens=True):
        """Tokens of each line with its newline; line by line, so that no token extends over the end of a line."""
        *lines, end = text.split("\n")
        lines = [[*line, self.newline_token_id] for line in self._tokenize(lines, split_special_tokens)]
        return lines + self._tokenize([end] if end else [], split_special_tokens)

    def _arrange(self, text, height, width, overflow, number, split_special_tokens):
        """A page `[height, width]`, and the number of tokens that are not on it."""
        lines = self._lines(text, split_special_tokens)
        if width is None:
            width = max([1, *map(len, lines)])
        rows = OVERFLOWS[overflow](lines, width, self.newline_token_id)
        if height is None:
            height = max(1, len(rows))
        if len(rows) > height and overflow == "wrap":
            raise ValueError(
                f"Text {number} takes {len(rows)} rows of {width} cells, its page has {height}: use a larger page, "
                "`overflow='truncate'`, or `paginate`."
            )
        page = np.full((height, width), self.blank_token_id, dtype=np.int64)
        _write(page, rows[:height])
        return page, sum(map(len, lines)) - sum(map(len, rows[:height]))


def _write(page, rows):
    for row, tokens in enumerate(rows):
        page[row, : len(tokens)] = tokens


def _stack(pages, filler, height=None, width=None):
    """Pages `[height, width]` of any size as one array, padded with `filler` on the right and below."""
    sizes = [max(page.shape[axis] for page in pages) for axis in (0, 1)]
    for name, size, room in zip(("height", "width"), sizes, (height, width)):
        if room is not None and size > room:
            raise ValueError(f"`input_ids` must be pages of at most the processor's {name}, {room}, got {size}.")
    stacked = np.full((len(pages), height or sizes[0], width or sizes[1]), filler, dtype=np.int64)
    for place, page in zip(stacked, pages):
        place[: page.shape[0], : page.shape[1]] = page
    return stacked


def _check_padding(padding):
    if padding not in (True, "longest"):
        raise ValueError(f"`padding` must be True or 'longest': pages of a batch are of one size, got {padding!r}.")


def _one_each(name, value, number):
    values = list(value) if isinstance(value, Sequence) else [value] * number
    if len(values) != number:
        raise ValueError(f"`{name}` must be one number or one for each of {number} texts, got {len(values)}.")
    for value in values:
        _check_size(name, value)
    return values


def _check_size(name, value):
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _check_overflow(overflow):
    reject_renamed("heptapod processor", {"overflow": overflow})
    if not isinstance(overflow, str) or overflow not in OVERFLOWS:
        raise ValueError(f"`overflow` must be one of {tuple(OVERFLOWS)}, got {overflow!r}.")


__all__ = ["HeptapodProcessor", "region_mask"]
