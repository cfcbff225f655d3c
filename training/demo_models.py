"""Work of demo_app.py on models: loading, generation, the weights of LEAP's layers.

Functions and generators without gradio. Their errors use the labels of the fields on the page.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from argument_checks import NUMPY_SEEDS
from demo_views import show_page, show_tracks, show_weights
from loading import load_processing_class, may_run_code
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
    set_seed,
)


MASK = "\u2591"  # a masked cell, where a page is typed
_MASK_CHARACTER = "\0"  # its stand-in for the tokenizer: no text contains it, and it is a token of its own
TYPED = "only the typed cells"  # the region without further masked cells
ALL_SHOWN = 24  # denoising steps that are all shown; of later ones fewer and fewer are


@dataclass
class Loaded:
    """A model and its processor, or its tokenizer in families without a processor."""

    model: PreTrainedModel
    processor: Any

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)


_one_load_at_a_time = Lock()  # `from_pretrained` changes the default device of all threads


def load(folder: str, trust_remote_code: bool = False) -> Loaded:
    """Load a saved model of any family, by folder or name on the Hub. The last two models are kept.

    Raises:
        ValueError: for a model that does not generate, and what `may_run_code` raises.
    """
    if not folder:
        raise ValueError("No model is chosen: choose one, or type its folder.")
    with _one_load_at_a_time:
        trust = may_run_code(folder, trust_remote_code)
        return _load(folder, trust, max((path.stat().st_mtime for path in Path(folder).glob("*")), default=0.0))


@lru_cache(maxsize=2)
def _load(folder, trust, changed):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    head = (config.architectures or ["no model"])[0]
    classes = {"ForCausalLM": AutoModelForCausalLM, "ForMaskedLM": AutoModelForMaskedLM}
    auto_class = next((auto for name, auto in classes.items() if head.endswith(name)), None)
    if auto_class is None or (auto_class is AutoModelForMaskedLM and config.model_type != "heptapod"):
        raise ValueError(f"{folder} holds {head}, which does not generate: choose a causal model or a grid.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = auto_class.from_pretrained(folder, trust_remote_code=trust).to(device).eval()
    return Loaded(model, load_processing_class(folder, config.model_type, trust))


def describe(loaded: Loaded) -> str:
    """HTML: one line about a model."""
    million = loaded.model.num_parameters() / 1e6
    return f"<b>{type(loaded.model).__name__}</b>, {million:.1f} million parameters, on {loaded.model.device.type}"


def _whole_number(label, value, most):
    """The number in the field `label` as an integer. Raises a `ValueError` that names the field."""
    if not 0 <= value <= most:
        raise ValueError(f"{label} must lie between 0 and {most:,}, got {value:,}.")
    return int(value)


def _check_length(loaded, tokens, new_tokens=0):
    """Raise a `ValueError` for an empty text, and for one of more tokens than the model has positions."""
    if not tokens:
        raise ValueError("The prompt is empty: type something.")
    limit = loaded.model.config.max_position_embeddings
    # Only absolute position embeddings are limited. The last new token is not read, so it needs no position.
    if hasattr(loaded.model.base_model, "embed_positions") and tokens + max(0, new_tokens - 1) > limit:
        more = f" and {new_tokens:,} new ones" if new_tokens else ""
        raise ValueError(
            f"The prompt has {tokens:,} tokens{more}, and this model has {limit:,} positions: shorten the prompt"
            f"{', or choose fewer new tokens' if new_tokens else ''}."
        )


@contextmanager
def _in_background(work: Callable[[Event], Any], at_end: Callable[[], None]):
    """Run `work(stop)` in a thread, then `at_end()`. Leaving the block sets the event `stop` and waits for the thread.

    Yields a dict with the `result` once the thread has ended. An error in the thread is raised at the end of the block.
    """
    stop, done = Event(), {}

    def run():
        try:
            done["result"] = work(stop)
        except Exception as error:
            done["error"] = error
        finally:
            at_end()

    thread = Thread(target=run)
    thread.start()
    try:
        yield done
    finally:  # also when the browser has closed the page
        stop.set()
        thread.join()
    if "error" in done:
        raise done["error"]


# Causal models: text and axis ids


class _StopWhen(StoppingCriteria):
    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def write(
    loaded: Loaded,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
    axis_source: str = "predicted",
) -> Iterator[tuple[str, str]]:
    """The prompt and the text generated so far, with an HTML view of the axis ids, which is empty until the end.

    Args:
        loaded: a causal model.
        prompt: a text that is not empty.
        max_new_tokens: number of tokens to generate.
        temperature: 0 takes the most probable token.
        seed: seed of the sampling.
        axis_source: `"predicted"` or `"annotated"`, read by a MultiGrid with axes only.

    Raises:
        ValueError: for an empty prompt, one that is too long, a seed out of range, and what `generate` raises.
    """
    seed = _whole_number("Seed", seed, NUMPY_SEEDS)
    inputs = loaded.processor(prompt, return_tensors="pt").to(loaded.model.device)
    length, config = inputs["input_ids"].shape[1], loaded.model.config
    _check_length(loaded, length, int(max_new_tokens))
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    draw = {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    has_axes = "axis_ids" in inputs
    axes = {"axis_source": axis_source, "processor": loaded.processor} if has_axes else {}
    if any(getattr(config, "use_xpos", ())) and length > 8 * config.xpos_scale_base:
        draw["prefill_chunk_size"] = max(1, int(8 * config.xpos_scale_base))  # xPos bounds the tokens of one pass

    def generate(stop):
        set_seed(seed)
        return loaded.model.generate(
            **inputs,
            **axes,
            **draw,
            max_new_tokens=int(max_new_tokens),
            return_dict_in_generate=True,
            streamer=streamer,
            stopping_criteria=[_StopWhen(stop)],
        )

    text = prompt
    with _in_background(generate, at_end=streamer.end) as done:
        for piece in streamer:
            text += piece
            yield text, ""
    if has_axes:
        yield text, show_tracks(loaded.processor, done["result"])


@torch.no_grad()
def look(loaded: Loaded, prompt: str, head: int = 0, position: int = 0) -> str:
    """HTML: the weights that each layer gives to the tokens of a text at one position.

    Args:
        loaded: a LEAP.
        prompt: the text.
        head: number of a head from 1, or 0 for the mean of all.
        position: number of the token that attends from 1, or 0 for the last.

    Raises:
        ValueError: for an empty text, one that is too long, and a head or a position out of range.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    length, heads = ids.shape[1], model.config.num_attention_heads
    _check_length(loaded, length)
    head = _whole_number("Head", head, heads)
    position = _whole_number("Position that attends", position, length)
    here = (position or length) - 1
    outputs = model(ids, output_attentions=True, use_cache=False)
    layers = []
    for number, (layer, attentions) in enumerate(zip(model.model.layers, outputs.attentions)):
        if "positions" in signature(layer.mixer.attention_matrix).parameters:
            # One row: all of them would be quadratic in length.
            matrix = layer.mixer.attention_matrix(attentions, positions=torch.tensor([here]))[0, ..., 0, :]
        else:  # code of an earlier version, which came with the folder
            matrix = layer.mixer.attention_matrix(attentions)[0, ..., here, :]
        matrix = matrix.abs().view(heads, -1, length).mean(1)  # of the additive mixer's two poolings the mean
        weights = matrix.mean(0) if head == 0 else matrix[head - 1]
        window = layer.mixer.settings.window
        about = "all tokens up to here" if window is None else f"the last {window} tokens"
        layers.append((f"layer {number + 1}: {about}", weights.tolist()))
    return show_weights(tokenizer, ids[0].tolist(), layers, here)


# The grid: a page with masked cells


@dataclass
class PageOptions:
    """Values of the options of `fill`."""

    regions: tuple[str, ...]
    samplers: tuple[str, ...]
    mask_schedules: tuple[str, ...]


def page_options(loaded: Loaded) -> PageOptions:
    """Values of the options of `fill`, from the tables in the code of a grid and of its processor.

    Raises:
        ValueError: for code without these tables, which an earlier version saved with the model.
    """
    package = import_module(type(loaded.model).__module__).__package__
    try:
        samplers = import_module(f"{package}.samplers")
        regions = import_module(type(loaded.processor).__module__).REGIONS
        return PageOptions((TYPED, *regions), tuple(samplers.SAMPLERS), tuple(samplers.MASK_SCHEDULES))
    except (AttributeError, ImportError) as error:
        raise ValueError(
            "The folder holds the code of an earlier version, whose samplers have other names: this page needs a model "
            "that was saved with the current version."
        ) from error


def page_size(loaded: Loaded) -> tuple[int, int]:
    """Height and width of the pages of a grid."""
    processor, (height, width) = loaded.processor, loaded.model.config.grid_size
    return processor.height or height, processor.width or width


def typed_page(loaded: Loaded, text: str, region: str = TYPED) -> torch.LongTensor:
    """A page `[1, height, width]` of the model's size, masked where `MASK` was typed and in a region.

    Raises:
        ValueError: for a text that does not fit on the page, and for a page without masked cells.
    """
    processor, (height, width) = loaded.processor, page_size(loaded)
    if _MASK_CHARACTER in text:
        raise ValueError("The page holds a zero byte, which is no text.")
    rows = torch.from_numpy(processor.paginate(text.replace(MASK, _MASK_CHARACTER), 1, width))[:, 0]
    if len(rows) > height:
        raise ValueError(
            f"The text takes {len(rows):,} rows of {width:,} cells, and the page has {height:,}: shorten it. A line that is longer "
            "than a row takes several."
        )
    page = torch.full((1, height, width), processor.blank_token_id)
    page[0, : len(rows)] = rows
    typed = int(processor(_MASK_CHARACTER, height=1, width=1)["input_ids"])
    page[page == typed] = processor.tokenizer.mask_token_id
    if region != TYPED:
        page = processor.mask_cells(page, region)
    if not (page == processor.tokenizer.mask_token_id).any():
        raise ValueError(f"No cell is masked: put {MASK} where something is missing, or choose a region to mask.")
    return page


def fill(
    loaded: Loaded,
    text: str,
    region: str = TYPED,
    sampler: str = "confidence",
    mask_schedule: str = "cosine",
    max_denoising_steps: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[str, str]]:
    """HTML of the page and the text on it: before the first denoising step, after the first ones, then less often, at the end.

    Args:
        loaded: a grid.
        text: the prompt, with `MASK` at masked cells.
        region: further cells to mask, one of `page_options`.
        sampler, mask_schedule, max_denoising_steps: as for `generate`.
        temperature: 0 takes the most probable token.
        seed: seed of the sampling.

    Raises:
        ValueError: for a seed out of range, and what `typed_page` and `generate` raise.
    """
    seed = _whole_number("Seed", seed, NUMPY_SEEDS)
    page = typed_page(loaded, text, region)
    draw = {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    unmasking = {
        "sampler": sampler,
        "mask_schedule": mask_schedule,
        "max_denoising_steps": int(max_denoising_steps),
    }
    seen = SimpleQueue()

    def generate(stop):
        watch = [_Watch(seen, stop)]
        return loaded.model.generate(
            page.to(loaded.model.device), logits_processor=watch, seed=seed, **unmasking, **draw
        )

    def frame():
        unmasked = int((pages[-1] != page[0]).sum())
        caption = f"{len(pages) - 1} denoising steps, {unmasked} cells unmasked"
        return show_page(loaded.processor, torch.stack(pages), caption), loaded.processor.decode(pages[-1])

    pages = []
    with _in_background(generate, at_end=lambda: seen.put(None)) as done:
        while (cells := seen.get()) is not None:
            pages.append(cells.view_as(page[0]))
            steps = len(pages) - 1
            if steps % (1 + steps // ALL_SHOWN) == 0:
                yield frame()
    pages.append(done["result"][0].cpu())
    yield frame()


class _Watch(LogitsProcessor):
    """Puts the page at the start of each step into a queue, and ends the generation at a stop event."""

    def __init__(self, seen, stop):
        self.seen, self.stop = seen, stop

    def __call__(self, input_ids, scores):
        if self.stop.is_set():
            raise InterruptedError("The generation was stopped.")
        self.seen.put(input_ids[0].cpu())
        return scores
