"""Evaluate a saved model on any text: bits per byte, losses of axes, generation speed.

    python training/evaluate_model.py outputs/leap-tiny --max_validation_bytes 131072

A causal model is evaluated with a sliding window: each token is predicted once, with at least `window - stride` tokens
of context. The result is lower than that of train.py, whose blocks share no context
(`--stride` of one less than the window gives the same figure). A grid model is evaluated by a bound, the negative ELBO.

The package is not imported, since the folder brings its own code. The figures are written to `evaluation.json` in the
folder, which the model card reads.
"""

from argument_checks import check_can_write_file, check_number, need, real, whole


need("eval", "evaluate")

import hashlib
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from corpora import annotate, encode, load_texts, public_name
from diffusion_bound import MASK_SAMPLES, diffusion_bound
from huggingface_hub import snapshot_download
from loading import add_model_arguments, load_processing_class, may_run_code, read_json
from metric_modules import bits_per_byte
from provenance import provenance, weights_digest, write_figures
from redaction import Parser
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel


SPEED_ROUNDS = 3


def load_model(folder: str | Path, trust: bool | None = None) -> tuple[PreTrainedModel, object]:
    """A saved model in evaluation mode, and its tokenizer or processor.

    Args:
        folder: folder of the model.
        trust: whether its code may run; `None` for the result of `may_run_code`.

    Raises:
        ValueError: for a model without a language modeling head, and what `may_run_code` raises.
    """
    trust = may_run_code(str(folder)) if trust is None else trust
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    head = (config.architectures or ["none"])[0]
    if head.endswith("ForCausalLM"):
        auto_class = AutoModelForCausalLM
    elif head == "HeptapodForMaskedLM":
        auto_class = AutoModelForMaskedLM
    else:
        raise ValueError(
            f"{folder} holds a {head}: only causal models and HeptapodForMaskedLM give a text a likelihood"
        )
    processing = load_processing_class(folder, config.model_type, trust)
    return auto_class.from_pretrained(folder, trust_remote_code=trust).eval(), processing


@torch.inference_mode()
def sliding_window_nats(
    model: PreTrainedModel,
    stream: np.ndarray,
    meta: np.ndarray | None = None,
    *,
    window: int,
    stride: int,
    batch_size: int = 8,
) -> np.ndarray:
    """Negative log-likelihood of each token of a stream, given the tokens before it in its window.

    The first window predicts all of its tokens but the first; each further one starts `stride` tokens later and predicts
    the last `stride` of its `window` tokens.

    Args:
        model: a causal model in evaluation mode.
        stream: [tokens], integers.
        meta: [axes, tokens] for a MultiGrid with axes.
        window: length of the model's input in tokens.
        stride: number of tokens that each window predicts, at most `window - 1`.
        batch_size: number of windows in a batch.

    Returns:
        [1 + axes, tokens - 1], float64: nats of the tokens, then of the axis ids of each axis.

    Raises:
        ValueError: naming `--max_length`, `--stride` or `--batch_size` for invalid values.
    """
    check_number("--max_length", window, least=2)
    check_number("--batch_size", batch_size, least=1)
    if not 1 <= stride < window:
        raise ValueError(f"--stride must lie between 1 and --max_length less 1, here {window - 1}, got {stride}")
    tracks = torch.from_numpy(stream.astype(np.int64))[None]
    if meta is not None:
        tracks = torch.cat([tracks, torch.from_numpy(meta.astype(np.int64))])
    predicted = tracks.shape[1] - 1
    nats = np.full((len(tracks), predicted), np.nan)
    starts = range(0, max(predicted + 1 - window + stride, 1), stride)
    # Right padding of a causal model needs no attention mask: no real token attends to it.
    tracks = torch.nn.functional.pad(tracks, (0, max(starts[-1] + window - tracks.shape[1], 0)))
    for first in tqdm(range(0, len(starts), batch_size), desc="Predicting", unit=" batches", disable=None):
        some = starts[first : first + batch_size]
        batch = torch.stack([tracks[:, start : start + window] for start in some]).to(model.device)
        inputs = {} if meta is None else {"axis_ids": batch[:, 1:]}
        outputs = model(input_ids=batch[:, 0], use_cache=False, **inputs)
        logits = (outputs.logits, *((outputs.axis_logits or ()) if meta is not None else ()))
        cost = torch.stack([_next_token_nats(each, batch[:, track]) for track, each in enumerate(logits)], dim=1)
        for start, row in zip(some, cost.double().cpu().numpy()):
            new = 0 if start == 0 else window - 1 - stride  # first column that no earlier window has predicted
            end = min(start + window - 1, predicted)
            nats[:, start + new : end] = row[:, new : end - start]
    return nats


def _next_token_nats(logits, ids):
    """[batch, length, vocabulary], [batch, length] -> [batch, length - 1]"""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


def error_over_text(nats: np.ndarray, sizes: np.ndarray) -> float | None:
    """Standard error of a sum of nats over other texts of this type and size.

    Args:
        nats, sizes: nats and number of tokens of each stretch of text, [stretches].

    Returns:
        Standard error of the ratio of both, times the number of all tokens; `None` for a single stretch.
    """
    if len(nats) < 2:
        return None
    residuals = nats - sizes * (nats.sum() / sizes.sum())
    return math.sqrt(len(nats) / (len(nats) - 1) * (residuals**2).sum())


def measure_causal(model, processing, texts, num_bytes, window, stride, batch_size) -> dict:
    """Bits per byte with a sliding window, named losses and generation speed."""
    axes = getattr(processing, "axes", ())
    tokenizer = getattr(processing, "tokenizer", processing)
    stream = encode(texts, tokenizer)
    meta = annotate(texts, tokenizer, axes) if axes else None
    nats = sliding_window_nats(model, stream, meta, window=window, stride=stride, batch_size=batch_size)
    # Causal axes are functions of the text so far and add no loss. In the factored order tokens are predicted from
    # their own axis ids, so the loss of the text includes those of the axes.
    pays_for_axes = getattr(model.config, "axis_order", None) == "factored"
    text = nats.sum(0) if pays_for_axes else nats[0]
    edges = np.arange(0, len(text), window)
    sizes = np.diff([*edges, len(text)])
    error = error_over_text(np.add.reduceat(text, edges), sizes)
    to_bits_per_byte = 1 / math.log(2) / num_bytes
    return {
        "sliding_window_bits_per_byte": bits_per_byte(text, num_bytes),
        "standard_error_over_text": None if error is None else error * to_bits_per_byte,
        "window": window,
        "stride": stride,
        "least_context": window - stride,
        "tokens": len(text),
        "text_pays_for_axes": pays_for_axes,
        "losses": {
            name: {"nats_per_token": row.mean(), "bits_per_byte": bits_per_byte(row, num_bytes)}
            for name, row in zip(["text", *(axis.name for axis in axes)], nats)
        },
        "generation": generation_speed(model, stream, meta, prompt=max(window // 4, 1), new=max(window // 2, 1)),
    }


def measure_grid(model, processor, texts, num_bytes, batch_size) -> dict:
    """The bound with both standard errors, and generation speed."""
    pages = torch.cat([torch.from_numpy(processor.paginate(text)) for text in texts])
    nats, error = diffusion_bound(model, pages, batch_size)
    over_text = error_over_text(nats, np.ones(len(nats)))
    to_bits_per_byte = 1 / math.log(2) / num_bytes
    return {
        "bound_bits_per_byte": bits_per_byte(nats, num_bytes),
        "bound_standard_error": error * to_bits_per_byte,
        "standard_error_over_text": None if over_text is None else over_text * to_bits_per_byte,
        "mask_samples": MASK_SAMPLES,
        "bits_per_cell": nats.sum() / math.log(2) / pages.numel(),
        "page": [processor.height, processor.width],
        "cells": pages.numel(),
        "generation": page_speed(model, processor.height, processor.width),
    }


def generation_speed(model, stream, meta, prompt: int, new: int) -> dict:
    """Greedy, cached, one text at a time: `new` tokens after the first `prompt` ones of a stream."""
    inputs = {"input_ids": torch.from_numpy(stream[None, :prompt].astype(np.int64)).to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if meta is not None:
        inputs["axis_ids"] = torch.from_numpy(meta[None, :, :prompt].astype(np.int64)).to(model.device)
    seconds = _median_seconds(
        lambda: model.generate(**inputs, do_sample=False, min_new_tokens=new, max_new_tokens=new), model.device
    )
    return {"tokens_per_second": new / seconds, "prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": new}


def page_speed(model, height: int, width: int) -> dict:
    """Speed of generating an empty page with the folder's generation config."""
    seconds = _median_seconds(lambda: model.generate(height=height, width=width), model.device)
    steps, cells = model.generation_config.max_denoising_steps, height * width
    return {"tokens_per_second": cells / seconds, "new_tokens": cells, "max_denoising_steps": steps}


def _median_seconds(write, device):
    seconds = []
    for _ in range(1 + SPEED_ROUNDS):  # the first one warms up
        began = time.perf_counter()
        write()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def evaluate(
    folder: Path,
    texts: list[str],
    dataset: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    trust: bool | None = None,
) -> dict:
    """All figures of a saved model on texts, the content of `evaluation.json`.

    Args:
        folder: folder of the model.
        texts: texts that the model was not trained on.
        dataset: name of the data set, for the reader.
        window: length of the model's input in tokens; by default that of training, or all positions without results of a training.
        stride: number of tokens that each window predicts, by default half of it.
        batch_size: number of windows or pages in a batch.
        trust: as for `load_model`.

    Raises:
        ValueError: for a model without a language modeling head, for a window or a stride of a grid, and for invalid numbers.
    """
    check_number("--max_length", window, least=2)
    check_number("--stride", stride, least=1)
    check_number("--batch_size", batch_size, least=1)
    model, processing = load_model(folder, trust)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = "".join(texts).encode()
    if hasattr(model, "elbo"):
        if window is not None or stride is not None:
            raise ValueError(
                f"--max_length and --stride are not used for a grid, which reads pages, got {window}, {stride}"
            )
        measured = measure_grid(model, processing, texts, len(text), batch_size)
    else:
        if window is None:
            window = _window_of_training(folder) or model.config.max_position_embeddings
        stride = window // 2 if stride is None else stride
        measured = measure_causal(model, processing, texts, len(text), window, stride, batch_size)
    return {
        "model_type": model.config.model_type,
        "weights_sha256": weights_digest(folder),
        "dataset": public_name(dataset),
        "held_out_bytes": len(text),
        "held_out_sha256": hashlib.sha256(text).hexdigest(),
        **measured,
        **provenance(model.device),
    }


def _window_of_training(folder):
    try:
        return read_json(folder / "results.json").get("block_size")
    except FileNotFoundError:
        return None


def print_figures(name: str, results: dict) -> None:
    """Print the figures with their errors."""
    print(f"{name} on {results['held_out_bytes']:,} held-out bytes of {results['dataset']}")
    over_text = results["standard_error_over_text"]
    over_text = "" if over_text is None else f", +- {over_text:.3f} over text"
    if "page" in results:
        print(
            f"  at most {results['bound_bits_per_byte']:.3f} bits per byte (the negative ELBO; "
            f"+- {results['bound_standard_error']:.3f} by the draw of masks{over_text})"
        )
    else:
        print(
            f"  {results['sliding_window_bits_per_byte']:.3f} bits per byte with a sliding window of "
            f"{results['window']} tokens, stride {results['stride']}{over_text}"
        )
        for track, loss in results["losses"].items():
            print(f"  {track}: {loss['nats_per_token']:.3f} nats per token, {loss['bits_per_byte']:.3f} bits per byte")
    speed = results["generation"]["tokens_per_second"]
    print(f"  writes {speed:,.0f} tokens per second on {results['device']}, {results['threads']} threads")


def main():
    parser = Parser(description="Measure a saved model on any text.")
    add_model_arguments(parser, "model")
    parser.add_argument("--revision", help="commit or branch of a name on the Hub")
    parser.add_argument(
        "--dataset_name", default="stdlib", help="the data set, as for train.py; its held-out part is used"
    )
    parser.add_argument("--dataset_config_name", help="configuration of a named data set")
    parser.add_argument(
        "--text_column_name", default="text", help="the column of a named data set that holds the text"
    )
    parser.add_argument(
        "--validation_split_percentage",
        type=real(above=0, most=100),
        default=5.0,
        help="percentage of the text that is held out",
    )
    parser.add_argument("--max_validation_bytes", type=whole(1), help="at most this many bytes of the held-out text")
    parser.add_argument(
        "--max_length", type=whole(2), help="length of the input in tokens, by default that of training"
    )
    parser.add_argument(
        "--stride", type=whole(1), help="number of tokens that each window predicts, by default half of the window"
    )
    parser.add_argument("--batch_size", type=whole(1), default=8, help="number of windows or pages in a batch")
    parser.add_argument(
        "--output",
        help="file for the figures, by default evaluation.json in the folder, or here for a name on the Hub",
    )
    args = parser.parse_args()

    is_folder = os.path.isdir(args.model)
    if is_folder and args.revision is not None:
        parser.error(f"argument --revision: is of a name on the Hub, and {args.model} is a folder")
    trust = may_run_code(args.model, args.trust_remote_code, revision=args.revision)
    folder = Path(args.model if is_folder else snapshot_download(args.model, revision=args.revision))
    output = Path(args.output or (folder / "evaluation.json" if is_folder else "evaluation.json"))
    check_can_write_file("--output", output)
    texts = load_texts(
        args.dataset_name,
        args.dataset_config_name,
        args.text_column_name,
        args.validation_split_percentage,
        args.max_validation_bytes,
    )
    results = evaluate(
        folder, texts.validation, args.dataset_name, args.max_length, args.stride, args.batch_size, trust
    )
    write_figures(output, results)

    print_figures(args.model, results)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
