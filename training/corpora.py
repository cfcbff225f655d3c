"""Text in, packed blocks of tokens out.

    texts = load_texts("stdlib")                         # or a file, a folder, the name of a data set
    tokenizer = build_tokenizer("byte", texts.train)     # or "bpe", or any tokenizer that AutoTokenizer can load
    train = PackedBlocks(encode(texts.train, tokenizer), block_size=1024)

The default corpus is the source of the Python standard library, which is installed with Python: about twelve megabytes of
text without a download.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from argument_checks import check_number
from corpus_cache import default_folder
from corpus_files import read_file, read_folder
from redaction import redact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
MASK, BLANK = "<|mask|>", "<|blank|>"  # special tokens of pages, see HeptapodProcessor

BLOCK_SIZE = 1024
AXES = ["token_kind", "bracket", "indentation", "string"]


@dataclass
class DataArguments:
    """Arguments for the training data."""

    dataset_name: str = field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the source of Python's standard library), a UTF-8 text file or a folder of them (.gz and "
            ".bz2 are unpacked), or the name of a data set for `datasets.load_dataset`."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a named data set."})
    text_column_name: str = field(
        default="text", metadata={"help": "The column of a named data set that holds the text."}
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Percentage of the text to hold out if the data set has no validation split."}
    )
    max_validation_bytes: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many bytes of the held-out text."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "'byte' (ids 0 to 255 are the bytes, the default), 'bpe' (trained here on the training text), or a name "
            "for `AutoTokenizer`. With --model_name_or_path the tokenizer of the model is used."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of the vocabulary of a 'bpe' tokenizer."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": f"Length of a training sequence in tokens, by default {BLOCK_SIZE}. Not used for pages, whose size is in the config."
        },
    )
    packing: str = field(
        default="continuous",
        metadata={
            "help": "'continuous': a block is a segment of one stream of texts, and a text attends to the texts before it. "
            "'isolated': texts in a block do not attend to each other. A page always holds one text.",
            "choices": ["continuous", "isolated"],
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the corpus during training, for one that does not fit in memory; needs --max_steps or "
            "--train_tokens. See training/corpus_streaming.py."
        },
    )
    cache_dir: str | None = field(
        default_factory=default_folder,
        metadata={"help": "Folder of the cache of tokens, annotations and pages; 'none' turns it off."},
    )
    axes: list[str] | None = field(
        default=None,
        metadata={
            "help": "The axes of a MultiGrid: names for `make_axis`, JSON files with a spec, or classes in Python files "
            f"as my_axis.py:Vowels, which are saved beside the model. By default {' '.join(AXES)}."
        },
    )


@dataclass
class Texts:
    """Documents to train on and documents held out; no document is in both."""

    train: list[str]
    validation: list[str]


def check_data_arguments(data_args: DataArguments) -> None:
    """Check arguments before any text is read.

    Raises:
        ValueError: for an invalid argument; the message contains its name.
    """
    check_held_out(data_args.validation_split_percentage, data_args.max_validation_bytes)
    check_number("--block_size", data_args.block_size, least=2)
    check_number("--vocab_size", data_args.vocab_size, least=1)


def check_held_out(validation_percent: float, max_validation_bytes: int | None) -> None:
    """Raise a ValueError for an invalid argument."""
    if not 0 < validation_percent < 100:
        raise ValueError(f"--validation_split_percentage must lie between 0 and 100, got {validation_percent}")
    if max_validation_bytes is not None and max_validation_bytes < 1:
        raise ValueError(f"--max_validation_bytes must be positive, got {max_validation_bytes}")


def check_dataset_config(dataset: str, config: str | None) -> None:
    """Raise a ValueError if `--dataset_config_name` is not used."""
    if config is not None and (dataset == "stdlib" or Path(dataset).expanduser().exists()):
        raise ValueError(
            f"--dataset_config_name {config} is of a named data set, which --dataset_name {dataset} is not"
        )


def public_name(name: str) -> str:
    """Name of a corpus or a model in figures: the last part of a path, an address without secrets."""
    path = os.path.expanduser(name)
    return os.path.basename(os.path.normpath(path)) if os.path.exists(path) else redact(name)


def load_texts(
    dataset: str = "stdlib",
    dataset_config: str | None = None,
    text_column: str = "text",
    validation_percent: float = 5.0,
    max_validation_bytes: int | None = None,
) -> Texts:
    """Read and split a corpus; the arguments are those of [`DataArguments`].

    Files are split by a hash of their path within the corpus and rows by a hash of their index, so the split depends
    neither on the machine nor on the order of reading. The tail of a single text is held out.

    Raises:
        ValueError: naming `--dataset_name` where the corpus does not exist, is empty or is not text; naming
            `--text_column_name`, `--validation_split_percentage` or `--max_validation_bytes` for invalid values.
    """
    check_held_out(validation_percent, max_validation_bytes)

    def held_out(name: str) -> bool:
        return hash_of(name) < validation_percent / 100

    path = Path(dataset).expanduser()
    check_dataset_config(dataset, dataset_config)
    if dataset == "stdlib":
        texts = _split(read_folder(Path(sysconfig.get_path("stdlib")), dataset), held_out)
    elif path.is_dir():
        texts = _split(read_folder(path, dataset), held_out)
    elif path.is_file():
        text = read_file(path)
        if text is None:
            raise ValueError(f"--dataset_name {dataset} is not text: it is not UTF-8, or it holds zero bytes")
        texts = Texts([text], [])
    else:
        texts = _load_named(dataset, dataset_config, text_column, held_out)

    if not any(texts.train) and not any(texts.validation):
        raise ValueError(f"--dataset_name {dataset} holds no text: it is empty")
    if not any(texts.train) or not any(texts.validation):  # one text, or too few to split by hash
        texts = _split_tail("".join(texts.train + texts.validation), validation_percent)
    if not any(texts.train) or not any(texts.validation):
        raise ValueError(
            f"--dataset_name {dataset} is too short, or --validation_split_percentage {validation_percent} does not fit: of its "
            f"{len(''.join(texts.train + texts.validation))} characters nothing is left to train on, or to hold out"
        )
    if max_validation_bytes is not None:
        texts.validation = first_bytes(texts.validation, max_validation_bytes)
        if not texts.validation:
            raise ValueError(
                f"--max_validation_bytes {max_validation_bytes} is less than the first character of {dataset}"
            )
    return texts


def hash_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    name = name.encode(errors="surrogateescape")  # names of files may not be UTF-8
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


def _load_named(dataset: str, config: str | None, text_column: str, held_out: Callable[[str], bool]) -> Texts:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--dataset_name {dataset} is no file or folder, and `datasets` is not installed") from error
    try:
        splits = datasets.load_dataset(dataset, config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {dataset} does not exist: it is neither 'stdlib', nor a file or folder, nor a data set that "
            f"`datasets` can load ({error})"
        ) from error
    if "train" not in splits or text_column not in splits["train"].column_names:
        columns = {name: split.column_names for name, split in splits.items()}
        raise ValueError(
            f"--text_column_name {text_column}: no such column in a 'train' split of --dataset_name {dataset}: {columns}"
        )
    train = list(tqdm(splits["train"][text_column], desc="Reading", unit=" rows", disable=None))
    if "validation" in splits:
        return Texts(train, list(splits["validation"][text_column]))
    return _split({str(row): text for row, text in enumerate(train)}, held_out)


def _split(texts: dict[str, str], held_out: Callable[[str], bool]) -> Texts:
    train = [text for name, text in texts.items() if not held_out(name)]
    # In the order of the hashes, so that the first bytes of the held-out text are a random sample of it.
    validation = [texts[name] for name in sorted(texts, key=hash_of) if held_out(name)]
    return Texts(train, validation)


def _split_tail(text: str, percent: float) -> Texts:
    """Hold out the end of one text, from the start of a line if there is one."""
    cut = round(len(text) * (1 - percent / 100))
    line = text.find("\n", cut) + 1
    if line in (0, len(text)):  # the cut lies in the last line
        line = text.rfind("\n", 0, cut) + 1
    cut = line or cut
    return Texts([text[:cut]], [text[cut:]])


def first_bytes(texts: list[str], size: int) -> list[str]:
    """The first `size` bytes of the texts, without a character that would be cut."""
    kept = []
    for text in texts:
        text = text.encode()[:size].decode(errors="ignore")
        size -= len(text.encode())
        if text:
            kept.append(text)
        if size <= 0:
            break
    return kept


def build_tokenizer(
    name: str, texts: list[str], vocab_size: int = 4096, for_pages: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer that decodes to the original text.

    Args:
        name: "byte", "bpe" or a name for `AutoTokenizer`.
        texts: training text of a "bpe" tokenizer.
        vocab_size: size of a "bpe" vocabulary, the 256 bytes and the two special tokens included.
        for_pages: whether to add special tokens for masked and for blank cells.

    Raises:
        ValueError: naming `--vocab_size` or `--tokenizer_name` for invalid values.
    """
    if name not in ("byte", "bpe"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--tokenizer_name {name} is neither 'byte' nor 'bpe' and cannot be loaded: {error}"
            ) from error
        if tokenizer.eos_token_id is None:
            raise ValueError(f"--tokenizer_name {name} has no end-of-sequence token, which separates documents")
        return _add_page_tokens(tokenizer) if for_pages else tokenizer

    special_tokens = 4 if for_pages else 2
    if name == "byte":
        tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    else:
        if vocab_size < 256 + special_tokens:
            raise ValueError(
                f"--vocab_size must be at least {256 + special_tokens} (256 bytes, {special_tokens} special tokens), "
                f"got {vocab_size}"
            )
        tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=True,
        )
        tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return wrap_tokenizer(tokenizer, for_pages)


def wrap_tokenizer(tokenizer: Tokenizer, for_pages: bool = False) -> PreTrainedTokenizerBase:
    """A transformers tokenizer from one of `tokenizers`, with this project's special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",  # `generate` continues the last token of each row
    )
    return _add_page_tokens(tokenizer) if for_pages else tokenizer


def _add_page_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    missing = {
        name: token for name, token in (("mask_token", MASK), ("pad_token", PAD)) if not getattr(tokenizer, name)
    }
    tokenizer.add_special_tokens({**missing, "extra_special_tokens": [BLANK]}, replace_extra_special_tokens=False)
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """The 256 characters by which `tokenizers` represents bytes, each with its byte as the id."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the ids of a text are its bytes, so that it can be encoded without the tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, before = parts["model"], parts["pre_tokenizer"] or {}
    is_plain = parts["normalizer"] is None and before.get("type") == "ByteLevel" and not before["add_prefix_space"]
    return is_plain and model["type"] == "BPE" and model["vocab"] == _byte_vocabulary()


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, desc: str = "Tokenizing", isolated: bool = False
) -> np.ndarray:
    """All texts as one stream of ids, with an end-of-sequence token before the first text and after each.

    Args:
        texts, tokenizer: the texts, and the tokenizer that encodes them.
        desc: label of the progress bar; `None` shows none.
        isolated: whether to add another one before each text but the first, so that texts share no separator.

    Returns:
        [number of tokens], uint16 where the vocabulary allows it, else int32.

    Raises:
        ValueError: for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which separates documents")
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    separator = np.array([tokenizer.eos_token_id], dtype=dtype)
    between = np.repeat(separator, 2 if isolated else 1)
    batch = 16
    bytes_are_ids = is_byte_tokenizer(tokenizer)
    stream = []
    for start in tqdm(range(0, len(texts), batch), desc=desc, unit_scale=batch, unit=" texts", disable=_no_bar(desc)):
        some = texts[start : start + batch]
        if bytes_are_ids:
            ids_of_texts = [np.frombuffer(text.encode(), dtype=np.uint8) for text in some]
        else:
            # split_special_tokens: a text that spells "<|endoftext|>" is text.
            ids_of_texts = tokenizer(
                some,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        for ids in ids_of_texts:
            stream += [between, np.array(ids, dtype=dtype)]
    return np.concatenate([separator, *stream[1:], separator]) if stream else separator


def annotate(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    axes: Sequence,
    desc: str = "Annotating",
    isolated: bool = False,
) -> np.ndarray:
    """Axis ids for the stream that [`encode`] returns for the same texts: a row for each axis.

    Each text is annotated on its own, from its beginning; separators have axis id 0.

    Args:
        texts, tokenizer, isolated: as for `encode`; the tokenizer must be a fast one, which returns offsets.
        axes: annotators, see `Axis`.

    Returns:
        [axes, number of tokens], uint8 where the vocabularies allow it, else int32.
    """
    dtype = np.uint8 if max((len(axis.vocabulary) for axis in axes), default=0) <= 2**8 else np.int32
    separator = np.zeros((len(axes), 1), dtype=dtype)
    between = np.repeat(separator, 2 if isolated else 1, axis=1)
    bytes_are_ids = is_byte_tokenizer(tokenizer)
    columns = []
    for text in tqdm(texts, desc=desc, unit=" texts", disable=_no_bar(desc)):
        offsets = _byte_offsets(text) if bytes_are_ids else _offsets(text, tokenizer)
        rows = [np.array(axis.annotate(text, offsets), dtype=dtype) for axis in axes]
        columns += [between, np.stack(rows) if rows else np.empty((0, len(offsets)), dtype)]
    return np.concatenate([separator, *columns[1:], separator], axis=1) if columns else separator


def _no_bar(desc):
    return True if desc is None else None  # None: no bar if the output is not a terminal


def _offsets(text, tokenizer):
    return tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]


def _byte_offsets(text):
    """`(start, end)` of the character of each byte, [bytes, 2]."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    start = np.cumsum((data & 0xC0) != 0x80) - 1  # all bytes of a character but the first begin with bits 10
    return np.stack([start, start + 1], axis=1)


class PackedBlocks(torch.utils.data.Dataset):
    """A stream of tokens cut into `input_ids` and `labels` of [block_size], int64.

    A block starts with the last token of the block before it, since a model predicts all tokens of a block but the
    first. So every token of the stream except its first is predicted once.

    Args:
        stream: [number of tokens], from [`encode`].
        block_size: tokens in a block.
        pad_token_id: if given, the tail that does not fill a block is padded (label -100); otherwise it is dropped.
        meta: [axes, number of tokens] if given, from [`annotate`]: blocks then have `axis_ids` of [axes, block_size] too.
        isolate_at: the token that ends and begins texts, if the stream was made with `isolated=True`: blocks then have
            `position_ids` [block_size] that restart with each text, and no text's beginning is predicted from another.

    Raises:
        ValueError: naming `--block_size` if it is below 2 or the text is too short for one block; naming `meta` if it
            does not have a column for each token.
    """

    def __init__(
        self,
        stream: np.ndarray,
        block_size: int,
        pad_token_id: int | None = None,
        meta: np.ndarray | None = None,
        isolate_at: int | None = None,
    ):
        if block_size < 2:
            raise ValueError(f"--block_size must be at least 2, got {block_size}")
        predicted = len(stream) - 1
        if predicted < 1 or (pad_token_id is None and predicted < block_size - 1):
            raise ValueError(
                f"--block_size {block_size} is too long for this text: all of it is {len(stream)} tokens; give a "
                "smaller --block_size or a larger --dataset_name"
            )
        if meta is not None and (meta.ndim != 2 or meta.shape[1] != len(stream)):
            raise ValueError(f"`meta` must be [axes, {len(stream)}], a column for each token, got {list(meta.shape)}")
        self.stream, self.stride, self.pad_token_id, self.meta = stream, block_size - 1, pad_token_id, meta
        self.isolate_at = isolate_at
        self.length = predicted // self.stride if pad_token_id is None else -(-predicted // self.stride)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        start = index * self.stride
        here = slice(start, start + self.stride + 1)
        ids = torch.from_numpy(self.stream[here].astype(np.int64))
        # Right padding of a causal model needs no attention mask: no real token attends to it.
        missing = (0, self.stride + 1 - len(ids))
        pad = torch.nn.functional.pad
        block = {"input_ids": pad(ids, missing, value=self.pad_token_id), "labels": pad(ids, missing, value=-100)}
        if self.meta is not None:
            block["axis_ids"] = pad(torch.from_numpy(self.meta[:, here].astype(np.int64)), missing)
        if self.isolate_at is not None:
            place = torch.arange(self.stride + 1)
            begins = pad((ids[1:] == self.isolate_at) & (ids[:-1] == self.isolate_at), (1, missing[1]))
            block["labels"] = block["labels"].masked_fill(begins, -100)
            block["position_ids"] = place - torch.where(begins, place, 0).cummax(0).values
        return block
