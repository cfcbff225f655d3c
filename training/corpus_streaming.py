"""Corpora that do not fit in memory: read during training, in an order that a resumed run repeats.

Files are read in segments of about a megabyte that end with a line, each a text; data sets on the Hub are read with
`datasets.load_dataset(..., streaming=True)`. Examples are drawn at random from a buffer.
"""

import bz2
import gzip
import itertools
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from corpora import DataArguments, Texts, check_dataset_config, check_held_out, first_bytes, hash_of
from corpus_files import folder_files
from transformers.utils import logging


logger = logging.get_logger(__name__)

PIECE = 2**20  # characters of a segment
HELD_OUT_BYTES = 2**20  # kept in memory for evaluation without --max_validation_bytes
TOKENIZER_BYTES = 2**24  # training text of a BPE tokenizer
SHUFFLED = 1024  # examples in the buffer


class StreamedTexts:
    """The training texts of a corpus, one after the other, from the beginning in each iteration."""

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[str, str]]],
        held_out: Callable[[str], bool],
        files: dict[str, Path] | None = None,
    ):
        self.read, self.held_out, self.files = read, held_out, files or {}

    def __iter__(self) -> Iterator[str]:
        return (text for name, text in self.read() if text and not self.held_out(name))

    def sizes(self) -> list[str]:
        """Name and size of each file, which identify a corpus without reading it; empty for data sets on the Hub."""
        return [f"{name!r} {path.stat().st_size}" for name, path in self.files.items()]

    def head(self, size: int) -> list[str]:
        """The first texts, `size` bytes in total."""
        texts = []
        for text in self:
            texts.append(text)
            size -= len(text.encode())
            if size <= 0:
                break
        return texts


def stream_texts(data_args: DataArguments) -> tuple[StreamedTexts, Texts]:
    """The streamed training texts; and in memory their first texts, with the held-out ones.

    The split depends on a hash of names: the path and the index of the segment, or the index of the row.

    Raises:
        ValueError: naming `--dataset_name`, `--text_column_name`, `--validation_split_percentage` or `--max_validation_bytes` for
            invalid values.
    """
    check_held_out(data_args.validation_split_percentage, data_args.max_validation_bytes)
    check_dataset_config(data_args.dataset_name, data_args.dataset_config_name)
    path = Path(data_args.dataset_name).expanduser()
    if data_args.dataset_name == "stdlib" or path.is_dir():
        folder = Path(sysconfig.get_path("stdlib")) if data_args.dataset_name == "stdlib" else path
        files = {name: folder / name for name in folder_files(folder, data_args.dataset_name == "stdlib")}
    elif path.is_file():
        files = {path.name: path}
    else:
        files = None
    if files is None:
        read, read_held_out = _rows(data_args)
    else:
        read, read_held_out = lambda: _pieces(files), None

    if read_held_out is None:
        texts = StreamedTexts(read, lambda name: hash_of(name) < data_args.validation_split_percentage / 100, files)
        held_out = StreamedTexts(read, lambda name: not texts.held_out(name))
    else:  # the data set has a validation split
        texts = StreamedTexts(read, lambda name: False)
        held_out = StreamedTexts(read_held_out, lambda name: False)
    size = data_args.max_validation_bytes or HELD_OUT_BYTES
    memory = Texts(texts.head(TOKENIZER_BYTES), first_bytes(held_out.head(size), size))
    if not memory.train or not memory.validation:
        raise ValueError(
            f"--dataset_name {data_args.dataset_name} is too short for --streaming: of its pieces of {PIECE:,} characters there are "
            f"{len(memory.train)} to train on and {len(memory.validation)} held out; leave --streaming out"
        )
    return texts, memory


def _pieces(files):
    for name, path in files.items():
        unpack = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
        number = 0
        with unpack(path, "rt", encoding="utf-8", newline="") as file:
            while piece := _next_piece(file, name, number):
                yield f"{name}#{number}", piece
                number += 1


def _next_piece(file, name, number):
    """About a megabyte up to the end of a line, if it is no longer than that; empty at the end of the file and of its text."""
    try:
        piece = file.read(PIECE)
        piece += file.readline(PIECE)
        reason = "it holds zero bytes" if "\0" in piece else None
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error)
    except OSError as error:  # from bz2, for other content; an error of the disk has a number
        if error.errno is not None:
            raise
        reason = str(error)
    if reason is None:
        return piece
    logger.warning_once(
        f"--dataset_name: {name} is left out from piece {number} on, which is not UTF-8 text: {reason}"
    )
    return ""


def _rows(data_args):
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset_name {data_args.dataset_name} is no file or folder, and `datasets` is not installed"
        ) from error
    try:
        splits = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {data_args.dataset_name} does not exist: it is neither 'stdlib', nor a file or folder, nor a data set "
            f"that `datasets` can stream ({error})"
        ) from error
    column = data_args.text_column_name
    if "train" not in splits or column not in next(iter(splits["train"]), {}):
        raise ValueError(
            f"--text_column_name {column}: no such column in a 'train' split of --dataset_name {data_args.dataset_name}: {splits}"
        )

    def read(split):
        return lambda: ((str(number), row[column]) for number, row in enumerate(splits[split]))

    return read("train"), read("validation") if "validation" in splits else None


class StreamedExamples(torch.utils.data.IterableDataset):
    """An endless stream of examples of texts, in a random order that depends on the seed and the epoch alone.

    It has no end, so that `Trainer`, which counts epochs of a stream without a length by its steps, skips the examples of earlier
    steps on a resume in any epoch.

    Args:
        texts: an iterable that can be iterated over several times.
        seed: seed of the order.
        buffer: number of examples from which the next one is drawn.

    Attributes:
        examples_of (`Callable`): from an iterator of texts to one of examples; an objective sets it.
        bytes_read (`int`): bytes of text that were read, repetitions included.
    """

    examples_of: Callable[[Iterator[str]], Iterator[dict]]

    def __init__(self, texts: Iterable[str], seed: int, buffer: int = SHUFFLED):
        self.texts, self.seed, self.buffer = texts, seed, buffer
        self.bytes_read = 0

    def _counted(self):
        for text in self.texts:
            self.bytes_read += len(text.encode())
            yield text

    def __iter__(self) -> Iterator[dict]:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError("--dataloader_num_workers must be 0 with --streaming: each worker would read all of it")
        self.bytes_read = 0
        for number in itertools.count():
            empty = True
            for example in self.one_pass(number):
                empty = False
                yield example
            if empty:
                raise ValueError(
                    "--dataset_name holds less text than one example of --block_size; leave --streaming out"
                )

    def one_pass(self, number: int) -> Iterator[dict]:
        """All examples of one epoch."""
        draw, waiting = np.random.default_rng((self.seed, number)), []
        for example in self.examples_of(self._counted()):
            if len(waiting) < self.buffer:
                waiting.append(example)
                continue
            place = int(draw.integers(self.buffer))
            waiting[place], example = example, waiting[place]
            yield example
        yield from (waiting[place] for place in draw.permutation(len(waiting)))
