"""Training objectives of the families: the next token of a stream, with or without axes, or masked cells of pages.

An objective holds the data sets and the options for the trainer; `objective_for(config)` returns its class, for `train.py`.
"""

import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpora
import numpy as np
import tokenizers
import torch
from corpora import (
    AXES,
    BLOCK_SIZE,
    DataArguments,
    PackedBlocks,
    Texts,
    annotate,
    build_tokenizer,
    encode,
    is_byte_tokenizer,
    wrap_tokenizer,
)
from corpus_cache import Cache, default_folder
from corpus_streaming import StreamedExamples
from diffusion_bound import MASK_SAMPLES, diffusion_bound
from loading import SPECIAL_IDS
from metric_modules import bits_per_byte
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.utils import logging

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor, make_axis
from modeling_heptapod.multigrid.axes import check_axis
from modeling_heptapod.multigrid.axis_files import load_axis_class


logger = logging.get_logger(__name__)

# On which each axis is tried before the corpus is read: English and Python, with characters of several bytes.
AXIS_CHECK_TEXT = 'A few "quoted" words: don\'t go (é, 漢字)!\n\nclass A:\n    x = [1, "two"]  # 42\n\nThe end.\n'
SAMPLE_TOKENS = 64  # length of the prompt and of the continuation of a sample


def sum_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary], [batch, length] -> [batch], float32: -log p summed over the labels of each row."""
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return nats.sum(-1)


class NextTokens:
    """Texts as one stream, cut into blocks; each token is predicted from those before it in its block.

    Attributes:
        processing_class: tokenizer or processor, saved beside the model; created here if none is given.
        config_options (`dict`): fields of the config that follow from the data.
        train_dataset, eval_dataset: arguments of `Trainer`.
        label_names, ignore_keys: arguments of `Trainer`: the inputs that evaluation keeps, the outputs that it drops; `None` for the default.
        text_losses (`list[str]`): names of the losses that add up to that of the text, if the model has them.
        bits_per_byte_of_loss (`float`): factor from a training loss to bits per byte.
        about (`dict`): figures for `results.json`.
    """

    auto_class = AutoModelForCausalLM
    label_names = ignore_keys = None
    text_losses = ["ce_loss"]

    def __init__(
        self,
        texts: Texts,
        data_args: DataArguments,
        config: PreTrainedConfig,
        streamed: StreamedExamples | None = None,
        processing_class=None,
    ):
        self.cache = _cache(data_args)
        if processing_class is None:
            processing_class = _tokenizer(texts, data_args, self.cache)
        self.processing_class = processing_class
        tokenizer = self.tokenizer
        self.block_size = BLOCK_SIZE if data_args.block_size is None else data_args.block_size
        self.isolate_at = tokenizer.eos_token_id if data_args.packing == "isolated" else None
        self._read_config(data_args, config)
        ids = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
        self.config_options = {"vocab_size": len(tokenizer), **ids, **self._axis_options()}
        held_out = self._columns(texts.validation, "held-out text")
        self.eval_dataset = self._blocks(*held_out, tokenizer.pad_token_id)
        self.held_out_texts = texts.validation
        self.held_out_bytes = _bytes_of(texts.validation)
        if streamed is None:
            columns = self._columns(texts.train, "training text")
            self.train_dataset = self._blocks(*columns)
            tokens_per_byte = (len(columns[0]) - 1) / _bytes_of(texts.train)
        else:
            streamed.examples_of = self._stream_blocks
            self.train_dataset = streamed
            tokens_per_byte = (len(held_out[0]) - 1) / self.held_out_bytes
        self.bits_per_byte_of_loss = tokens_per_byte / math.log(2)
        self.about = {
            "vocab_size": len(tokenizer),
            "block_size": self.block_size,
            "packing": data_args.packing,
            "tokens_per_example": self.block_size,
        }

    def _read_config(self, data_args, config):
        """Read what is needed before any text is read."""
        _warn_of_unused(config, axes=data_args.axes)

    def _axis_options(self):
        return {}

    def _columns(self, texts, desc):
        """The stream of texts, with axis ids in families that have them."""
        return self._stream(texts, f"Tokenizing {desc}"), None

    def _stream(self, texts, desc):
        is_isolated = self.isolate_at is not None
        made_of = ["stream", str(is_isolated), json_of(self.tokenizer), *texts]
        return self.cache.array(made_of, lambda: encode(texts, self.tokenizer, desc, is_isolated))

    @property
    def tokenizer(self):
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _blocks(self, stream, meta, pad_token_id=None):
        return PackedBlocks(stream, self.block_size, pad_token_id, meta, self.isolate_at)

    def _stream_blocks(self, texts: Iterator[str]) -> Iterator[dict]:
        """The blocks of streamed texts; only a tail that does not fill a block is dropped."""
        rest, stride = None, self.block_size - 1
        for text in texts:
            columns = self._columns_of(text)
            if rest is not None:  # continuous texts share the separator between them
                shared = self.isolate_at is None
                columns = [_join(before, new, shared) for before, new in zip(rest, columns)]
            whole = (len(columns[0]) - 1) // stride * stride
            if whole:
                yield from self._blocks(*(None if x is None else x[..., : whole + 1] for x in columns))
            rest = [None if x is None else x[..., whole:] for x in columns]

    def _columns_of(self, text):
        return encode([text], self.tokenizer, desc=None), None

    def sample(self, model: PreTrainedModel) -> str:
        """A continuation of the start of the held-out text."""
        size = min(SAMPLE_TOKENS, self.block_size // 2)
        text = next(filter(None, self.held_out_texts))
        inputs = self.processing_class(text[:size], return_tensors="pt").to(model.device)
        inputs = {name: ids[..., :size] for name, ids in inputs.items()}
        written = model.generate(**inputs, max_new_tokens=size, use_cache=True, do_sample=True)
        return self.processing_class.decode(written[0])

    def trainer_options(self) -> dict:
        """Keep sums of nats instead of logits, so that the held-out text fits in memory."""
        return {
            "preprocess_logits_for_metrics": sum_nats,
            "compute_metrics": lambda output: {
                "bits_per_byte": bits_per_byte(output.predictions, self.held_out_bytes)
            },
        }

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Figures of a trained model."""
        return {"bits_per_byte": trainer.evaluate(ignore_keys=self.ignore_keys)["eval_bits_per_byte"]}


def choose_axes(names: Sequence) -> list:
    """The annotators in `--axes`, or those of a processor.

    Raises:
        ValueError: naming `--axes`, for an unknown axis, a file without one, missing requirements, an axis that is given twice,
            and one that is not causal.
    """
    given = f"--axes {' '.join(map(str, names))}"
    try:
        axes = [_read_axis(name) for name in names]
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{given}: {error}") from error
    for axis in axes:
        try:
            # With the corpus in the cache, NLTK and its data would not be missed before the first sample.
            check_axis(axis, AXIS_CHECK_TEXT)
        except Exception as error:  # of the class, which may raise any
            raise ValueError(f"{given}: {type(axis).__name__}: {type(error).__name__}: {error}") from error
    if len({axis.name for axis in axes}) < len(axes):
        raise ValueError(f"{given}: two axes have the same name")
    ahead = [axis.name for axis in axes if not axis.causal]
    if ahead:
        raise ValueError(
            f"--axes {' '.join(ahead)}: looks ahead in the text, so a model that reads it has seen what it predicts, and "
            "its bits per byte have no meaning; training/experiments/multigrid_experiment.py measures how much"
        )
    return axes


def _read_axis(name):
    """An axis from an argument of `make_axis`, or from a class in a file, `my_axis.py:Vowels`."""
    path, _, class_name = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    if path.endswith(".py"):
        axis_class = load_axis_class(path, class_name)
        try:
            return axis_class()
        except TypeError as error:
            raise ValueError(f"{class_name}() must work without arguments: {error}") from error
    if str(name).endswith(".py"):
        raise ValueError(f"the class in {name} must be named as well, as {name}:Vowels")
    try:
        return make_axis(name)
    except ValueError as error:
        raise ValueError(f"{error} An axis of your own is given as FILE.py:CLASS.") from error


class AnnotatedTokens(NextTokens):
    """A stream of tokens with axis ids; tokens and axis ids are predicted from those before them.

    Causal axes are functions of the text so far, so the loss of the text is that of its tokens. In the factored order tokens are
    predicted from their own axis ids, and the loss of the text includes those of the axes.
    """

    def _read_config(self, data_args, config):
        if isinstance(self.processing_class, MultiGridProcessor):
            axes = choose_axes(self.processing_class.axes)
        else:
            axes = choose_axes(AXES if data_args.axes is None else data_args.axes)
            self.processing_class = MultiGridProcessor(self.processing_class, axes)
        names = [axis.name for axis in axes]
        self.is_factored = config.axis_order == "factored"
        self.text_losses = ["main_loss", *(f"{name}_loss" for name in names if self.is_factored)]
        # Evaluation needs the axis ids among the labels, and the axis logits beside the logits.
        self.label_names = ["labels", "axis_ids"]
        self.ignore_keys = [key for key in config.keys_to_ignore_at_inference if key != "axis_logits"]

    def __init__(self, texts, data_args, config, streamed=None, processing_class=None):
        super().__init__(texts, data_args, config, streamed, processing_class)
        self.about["axes"] = dict(zip(self.config_options["axis_names"], self.config_options["axis_vocab_sizes"]))

    def _axis_options(self):
        axes = self.processing_class.axes
        return {
            "axis_names": [axis.name for axis in axes],
            "axis_vocab_sizes": [len(axis.vocabulary) for axis in axes],
        }

    def _columns(self, texts, desc):
        axes, is_isolated = self.processing_class.axes, self.isolate_at is not None
        made_of = ["axes", str(is_isolated), json_of(self.tokenizer), *map(source_of, axes), *texts]
        meta = self.cache.array(
            made_of, lambda: annotate(texts, self.tokenizer, axes, f"Annotating {desc}", is_isolated)
        )
        return self._stream(texts, f"Tokenizing {desc}"), meta

    def _columns_of(self, text):
        axes = self.processing_class.axes
        return encode([text], self.tokenizer, desc=None), annotate([text], self.tokenizer, axes, desc=None)

    def trainer_options(self) -> dict:
        return {**super().trainer_options(), "preprocess_logits_for_metrics": self._sum_nats}

    def _sum_nats(self, logits, labels):
        (logits, axis_logits), (labels, axis_ids) = logits, labels
        nats = sum_nats(logits, labels)
        if self.is_factored:
            axis_ids = axis_ids.masked_fill(labels[:, None] == -100, -100)
            nats += sum(sum_nats(logits, ids) for logits, ids in zip(axis_logits, axis_ids.unbind(1)))
        return nats


def _cache(data_args):
    folder = None if data_args.cache_dir in (None, "none") else data_args.cache_dir
    code = [__file__, corpora.__file__, inspect.getfile(HeptapodProcessor)]
    try:
        return Cache(folder, code)
    except ValueError as error:
        if folder != default_folder():
            raise
        logger.warning(f"the cache is off: {error}")
        return Cache(None, code)


def _tokenizer(texts, data_args, cache, for_pages=False):
    """The tokenizer from `build_tokenizer`, cached if it is trained here."""
    name, size = data_args.tokenizer_name or "byte", data_args.vocab_size
    if name != "bpe":
        return build_tokenizer(name, texts.train, size, for_pages)
    trained = cache.text(
        ["bpe", str(size), str(for_pages), *texts.train],
        lambda: json_of(build_tokenizer("bpe", texts.train, size, for_pages)),
    )
    return wrap_tokenizer(tokenizers.Tokenizer.from_str(trained), for_pages)


def json_of(tokenizer) -> str:
    """Everything that the ids of a tokenizer depend on."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())


def source_of(axis) -> str:
    """Everything that the ids of an axis depend on: its arguments and the code of its class."""
    files = {inspect.getfile(kind) for kind in type(axis).__mro__ if kind is not object}
    return json.dumps(axis.to_dict()) + "".join(Path(file).read_text(encoding="utf-8") for file in sorted(files))


def _join(before, new, shared):
    if before is None:
        return None
    return np.concatenate([before, new[..., 1:] if shared else new], axis=-1)


class Pages(torch.utils.data.Dataset):
    """Pages of tokens, `[pages, height, width]`, as `input_ids` and `labels`, int64."""

    def __init__(self, pages: np.ndarray):
        self.pages = pages

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.pages[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


class MaskedPages:
    """Texts on pages of the config's `grid_size`; masked cells are predicted from all others.

    See `HeptapodForMaskedLM`.

    Each text starts a new page. Blank cells are predicted and counted like others, so that bits per byte are
    those of the text, its line lengths included. The attributes are those of `NextTokens`.
    """

    auto_class = AutoModelForMaskedLM
    label_names = ignore_keys = None
    text_losses = []

    def __init__(
        self,
        texts: Texts,
        data_args: DataArguments,
        config: PreTrainedConfig,
        streamed: StreamedExamples | None = None,
        processing_class: HeptapodProcessor | None = None,
    ):
        _warn_of_unused(config, axes=data_args.axes, block_size=data_args.block_size)
        self.cache = _cache(data_args)
        if processing_class is None:
            if config.grid_size is None:
                raise ValueError("--config_name: its `grid_size` must be the height and width of a page, got None")
            tokenizer = _tokenizer(texts, data_args, self.cache, for_pages=True)
            processing_class = HeptapodProcessor(tokenizer, *config.grid_size)
        self.processing_class = processing_class
        tokenizer, height, width = processing_class.tokenizer, processing_class.height, processing_class.width
        self.config_options = {
            "vocab_size": len(tokenizer),
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        self.eval_dataset = Pages(self._pages(texts.validation, "held-out text"))
        self.held_out_bytes = _bytes_of(texts.validation)
        self.held_out_cells = self.eval_dataset.pages.size
        if streamed is None:
            self.train_dataset = Pages(self._pages(texts.train, "training text"))
            cells_per_byte = self.train_dataset.pages.size / _bytes_of(texts.train)
        else:
            streamed.examples_of = self._stream_pages
            self.train_dataset = streamed
            cells_per_byte = self.held_out_cells / self.held_out_bytes
        self.bits_per_byte_of_loss = cells_per_byte / math.log(2)
        self.about = {
            "vocab_size": len(tokenizer),
            "page": [height, width],
            "held_out_cells": self.held_out_cells,
            "tokens_per_example": height * width,
        }

    def _pages(self, texts, desc):
        processor = self.processing_class
        made_of = ["pages", str(processor.height), str(processor.width), json_of(processor.tokenizer), *texts]
        return self.cache.array(made_of, lambda: _paginate(texts, processor, f"Laying out {desc}"))

    def _stream_pages(self, texts: Iterator[str]) -> Iterator[dict]:
        for text in texts:
            yield from Pages(_paginate([text], self.processing_class, desc=None))

    def sample(self, model: PreTrainedModel) -> str:
        """The first held-out page with an infilled centre."""
        page = torch.from_numpy(self.eval_dataset.pages[:1].astype(np.int64))
        masked = self.processing_class.mask_cells(page, "hole").to(model.device)
        return self.processing_class.decode(model.generate(masked)[0])

    def trainer_options(self) -> dict:
        """During training each page is evaluated with one draw of masks; logits are not kept."""
        return {
            "preprocess_logits_for_metrics": lambda logits, labels: labels.new_zeros(len(labels)),
            "compute_metrics": lambda output: {
                "bits_per_byte": bits_per_byte(
                    [float(output.losses.mean()) * self.held_out_cells], self.held_out_bytes
                )
            },
        }

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The negative ELBO, an upper bound of the text's bits, with the standard error of the estimate."""
        pages = torch.from_numpy(self.eval_dataset.pages.astype(np.int64))
        with trainer.compute_loss_context_manager():  # the precision of the training
            nats, error = diffusion_bound(trainer.model.eval(), pages, trainer.args.eval_batch_size)
        return {
            "bits_per_byte": bits_per_byte(nats, self.held_out_bytes),
            "bits_per_byte_standard_error": error / math.log(2) / self.held_out_bytes,
            "bits_per_cell": nats.sum() / math.log(2) / self.held_out_cells,
            "elbo_samples": MASK_SAMPLES,
        }


def objective_for(config: PreTrainedConfig) -> type:
    """The objective of a family."""
    return {"heptapod": MaskedPages, "multigrid": AnnotatedTokens}.get(config.model_type, NextTokens)


def _warn_of_unused(config, **arguments):
    for name, value in arguments.items():
        if value is not None:
            logger.warning(f"--{name} {value} is of no use to a {config.model_type}: it is left aside")


def _bytes_of(texts):
    return sum(len(text.encode()) for text in texts)


def _paginate(texts, processor, desc):
    dtype = np.uint16 if len(processor.tokenizer) <= 2**16 else np.int32
    lay_out = _paginate_bytes if is_byte_tokenizer(processor.tokenizer) else HeptapodProcessor.paginate
    # Without a progress bar, since there are many texts.
    texts = texts if desc is None else tqdm(texts, desc=desc, disable=None)
    return np.concatenate([lay_out(processor, text).astype(dtype) for text in texts])


def _paginate_bytes(processor, text):
    """`processor.paginate(text)`, all cells at once, where a token is a byte."""
    height, width = processor.height, processor.width
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    ends = np.flatnonzero(ids == processor.newline_token_id) + 1  # of lines
    starts = np.concatenate([[0], ends])
    lengths = np.diff(np.append(starts, len(ids)))
    rows = -(-lengths // width)
    column = np.arange(len(ids)) - np.repeat(starts, lengths)
    row = np.repeat(np.cumsum(rows) - rows, lengths) + column // width
    pages = np.full((-(-int(rows.sum()) // height), height, width), processor.blank_token_id, dtype=np.int64)
    pages.reshape(-1, width)[row, column % width] = ids
    return pages
