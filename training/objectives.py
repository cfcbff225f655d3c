"""What a family learns from text: the next token of a stream, with meta axes beside it or without, or masked cells of pages.

An objective holds the data sets and what the trainer must know of them; `objective_for(config)` picks it, for `train.py`.
"""

import math

import numpy as np
import torch
from data import DataArguments, PackedBlocks, Texts, annotate, build_tokenizer, encode
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, Trainer

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor, make_axis


ELBO_SAMPLES = 8  # forward passes over the held-out pages, for the figure that is reported


def sum_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary], [batch, length] -> [batch], float32: -log p summed over the labels of each row."""
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return nats.sum(-1)


def bits_per_byte(nats: np.ndarray, num_bytes: int) -> float:
    """All the nats of a text, over its bytes: independent of the tokenizer. End-of-sequence tokens cost, too."""
    return float(nats.sum(dtype=np.float64)) / math.log(2) / num_bytes


class NextTokens:
    """Texts as one stream, cut into blocks; each token is predicted from those before it in its block.

    Attributes:
        processing_class: what turns text into inputs, saved beside the model.
        config_options (`dict`): fields of the config that follow from the data.
        train_dataset, eval_dataset: of `Trainer`.
        label_names, ignore_keys: what evaluation keeps of inputs and drops of outputs, of `Trainer`; `None`: its default.
        text_losses (`list[str]`): the named losses that the text costs, where a model has losses of these names.
        bits_per_byte_of_loss (`float`): factor from a training loss to bits per byte.
        about (`dict`): figures for `results.json`.
    """

    auto_class = AutoModelForCausalLM
    label_names = ignore_keys = None
    text_losses = ["ce_loss"]

    def __init__(self, texts: Texts, data_args: DataArguments, config: PreTrainedConfig):
        tokenizer = build_tokenizer(data_args.tokenizer, texts.train, data_args.vocab_size)
        stream = encode(texts.train, tokenizer, desc="Tokenizing training text")
        held_out = encode(texts.validation, tokenizer, desc="Tokenizing held-out text")
        self.processing_class = tokenizer
        self.config_options = {"vocab_size": len(tokenizer)}
        self.train_dataset = PackedBlocks(stream, data_args.block_size)
        self.eval_dataset = PackedBlocks(held_out, data_args.block_size, tokenizer.pad_token_id)
        self.held_out_bytes = _bytes_of(texts.validation)
        self.bits_per_byte_of_loss = (len(stream) - 1) / _bytes_of(texts.train) / math.log(2)
        self.about = {
            "vocab_size": len(tokenizer),
            "block_size": data_args.block_size,
            "tokens_per_example": data_args.block_size,
        }

    def trainer_options(self) -> dict:
        """Of the logits only their sums of nats are kept, so the whole held-out text fits."""
        return {
            "preprocess_logits_for_metrics": sum_nats,
            "compute_metrics": lambda output: {
                "bits_per_byte": bits_per_byte(output.predictions, self.held_out_bytes)
            },
        }

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The figures to report of a trained model."""
        return {"bits_per_byte": trainer.evaluate(ignore_keys=self.ignore_keys)["eval_bits_per_byte"]}


def choose_axes(names: list[str]) -> list:
    """The annotators that `--axes` names.

    Raises:
        ValueError: naming `--axes` for an unknown axis, a file that describes none, the same one twice, or one that looks ahead.
    """
    try:
        axes = [make_axis(name) for name in names]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--axes {' '.join(names)}: {error}") from error
    if len({axis.name for axis in axes}) < len(axes):
        raise ValueError(f"--axes {' '.join(names)}: two axes have the same name")
    ahead = [axis.name for axis in axes if not axis.causal]
    if ahead:
        raise ValueError(
            f"--axes {' '.join(ahead)}: looks ahead in the text, so a model that reads it has seen what it predicts, and "
            "its bits per byte mean nothing; training/multigrid_experiment.py measures how much"
        )
    return axes


class AnnotatedTokens(NextTokens):
    """A stream of tokens and meta axes beside it; tokens and meta ids are predicted from those before them.

    Causal axes are functions of the text so far, so the text costs what its tokens cost. In the factored order tokens are
    predicted from meta ids that nobody knows yet, and the text costs both.
    """

    def __init__(self, texts: Texts, data_args: DataArguments, config: PreTrainedConfig):
        super().__init__(texts, data_args, config)
        tokenizer, size = self.processing_class, data_args.block_size
        axes = choose_axes(data_args.axes)
        meta, held_out = (annotate(part, tokenizer, axes) for part in (texts.train, texts.validation))
        self.train_dataset = PackedBlocks(self.train_dataset.stream, size, meta=meta)
        self.eval_dataset = PackedBlocks(self.eval_dataset.stream, size, tokenizer.pad_token_id, held_out)
        self.processing_class = MultiGridProcessor(tokenizer, axes)
        names = [axis.name for axis in axes]
        self.config_options["axis_names"] = names
        self.config_options["axis_vocab_sizes"] = [len(axis.vocabulary) for axis in axes]
        self.about["axes"] = dict(zip(names, self.config_options["axis_vocab_sizes"]))
        self.is_factored = config.axis_order == "factored"
        self.text_losses = ["main_loss", *(f"{name}_loss" for name in names if self.is_factored)]
        # Evaluation needs the meta ids among the labels, and the meta logits beside the logits.
        self.label_names = ["labels", "meta_ids"]
        self.ignore_keys = [key for key in config.keys_to_ignore_at_inference if key != "meta_logits"]

    def trainer_options(self) -> dict:
        return {**super().trainer_options(), "preprocess_logits_for_metrics": self._sum_nats}

    def _sum_nats(self, logits, labels):
        (logits, meta_logits), (labels, meta_ids) = logits, labels
        nats = sum_nats(logits, labels)
        if self.is_factored:
            meta_ids = meta_ids.masked_fill(labels[:, None] == -100, -100)
            nats += sum(sum_nats(logits, ids) for logits, ids in zip(meta_logits, meta_ids.unbind(1)))
        return nats


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

    How is said in `HeptapodForMaskedLM`.

    Each text begins a page of its own. Blank cells are predicted and paid for like others, so that bits per byte are
    those of the text, its line lengths included. The attributes are those of `NextTokens`.
    """

    auto_class = AutoModelForMaskedLM
    label_names = ignore_keys = None
    text_losses = []

    def __init__(self, texts: Texts, data_args: DataArguments, config: PreTrainedConfig):
        if config.grid_size is None:
            raise ValueError("--config_name: its `grid_size` must be the height and width of a page, got None")
        height, width = config.grid_size
        tokenizer = build_tokenizer(data_args.tokenizer, texts.train, data_args.vocab_size, for_pages=True)
        processor = HeptapodProcessor(tokenizer, height, width)
        self.processing_class = processor
        self.config_options = {
            "vocab_size": len(tokenizer),
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        self.train_dataset = Pages(_paginate(texts.train, processor, "Laying out training text"))
        self.eval_dataset = Pages(_paginate(texts.validation, processor, "Laying out held-out text"))
        self.held_out_bytes = _bytes_of(texts.validation)
        train_cells = self.train_dataset.pages.size
        self.held_out_cells = self.eval_dataset.pages.size
        self.bits_per_byte_of_loss = train_cells / _bytes_of(texts.train) / math.log(2)
        self.about = {
            "vocab_size": len(tokenizer),
            "page": [height, width],
            "held_out_cells": self.held_out_cells,
            "tokens_per_example": height * width,
        }

    def trainer_options(self) -> dict:
        """While training, one draw of masks a page tells how it goes; logits are not kept at all."""
        return {
            "preprocess_logits_for_metrics": lambda logits, labels: labels.new_zeros(len(labels)),
            "compute_metrics": lambda output: {
                "bits_per_byte": float(output.losses.mean()) * self.held_out_cells / self.held_out_bytes / math.log(2)
            },
        }

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The negative ELBO, an upper bound of the bits that a text costs, with the standard error of the estimate."""
        model, device = trainer.model.eval(), trainer.args.device
        generator = torch.Generator(device).manual_seed(0)
        nats, variance = 0.0, 0.0
        batches = torch.from_numpy(self.eval_dataset.pages.astype(np.int64)).split(trainer.args.eval_batch_size)
        for pages in tqdm(batches, desc="Negative ELBO", unit=" batches", disable=None):
            with trainer.compute_loss_context_manager():  # in the precision of the training
                estimate = model.elbo(pages.to(device), num_samples=ELBO_SAMPLES, generator=generator)
            nats += estimate.nats.sum().item()
            variance += estimate.standard_error.square().sum().item()
        bits, error = nats / math.log(2), math.sqrt(variance) / math.log(2)
        return {
            "bits_per_byte": bits / self.held_out_bytes,
            "bits_per_byte_standard_error": error / self.held_out_bytes,
            "bits_per_cell": bits / self.held_out_cells,
            "elbo_samples": ELBO_SAMPLES,
        }


def objective_for(config: PreTrainedConfig) -> type:
    """The objective of a family."""
    return {"heptapod": MaskedPages, "multigrid": AnnotatedTokens}.get(config.model_type, NextTokens)


def _bytes_of(texts):
    return sum(len(text.encode()) for text in texts)


def _paginate(texts, processor, desc):
    dtype = np.uint16 if len(processor.tokenizer) <= 2**16 else np.int32
    return np.concatenate([processor.paginate(text).astype(dtype) for text in tqdm(texts, desc=desc, disable=None)])
