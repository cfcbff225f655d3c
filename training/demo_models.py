"""What demo_app.py does with models: loads them, generates with them, and shows where LEAP attends.

Plain functions and generators without gradio, whose errors name the fields of the page.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
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


HOLE = "\u2591"  # a masked cell, where a page is typed
_HOLE_CHARACTER = "\0"  # what the tokenizer is given for it: no text has one, and it is a token of its own
REGIONS = ("only the typed holes", "hole", "frame", "top", "middle", "bottom", "all")
SAMPLERS = ("confidence", "entropy_bound", "random", "raster")
ALL_SHOWN = 24  # denoising steps of a page that forms; of later ones fewer and fewer are shown


@dataclass
class Loaded:
    """A model and what turns text into its inputs: a processor where the family has one, else a tokenizer."""

    model: PreTrainedModel
    processor: Any

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)


_one_load_at_a_time = Lock()  # `from_pretrained` changes where tensors are made, for all threads


def load(folder: str, trust_remote_code: bool = False) -> Loaded:
    """A saved model of any family, by folder or name on the Hub; the last two are kept.

    Raises:
        ValueError: where there is no model that writes, and what `may_run_code` raises.
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
        raise ValueError(f"{folder} holds {head}, which doesn't write; a causal model or a grid does.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = auto_class.from_pretrained(folder, trust_remote_code=trust).to(device).eval()
    return Loaded(model, load_processing_class(folder, config.model_type, trust))


def describe(loaded: Loaded) -> str:
    """HTML: one line about a model."""
    million = loaded.model.num_parameters() / 1e6
    return f"<b>{type(loaded.model).__name__}</b>, {million:.1f} million parameters, on {loaded.model.device.type}"


def _whole_number(label, value, most):
    """A number typed into the field `label`. Raises a `ValueError` that names the field."""
    if not 0 <= value <= most:
        raise ValueError(f"{label} must lie between 0 and {most:,}, got {value:,}.")
    return int(value)


def _check_length(loaded, tokens, new_tokens=0):
    """Raise a `ValueError` where there is no text, or more of it than the model has positions."""
    if not tokens:
        raise ValueError("The prompt is empty: type something.")
    limit = loaded.model.config.max_position_embeddings
    # Of learned positions there are so many, others go on; the last token that is written needs none.
    if hasattr(loaded.model.base_model, "embed_positions") and tokens + max(0, new_tokens - 1) > limit:
        more = f" and {new_tokens:,} new ones" if new_tokens else ""
        raise ValueError(
            f"The prompt has {tokens:,} tokens{more}, and this model has places for {limit:,} only: shorten the prompt"
            f"{', or let it write less' if new_tokens else ''}."
        )


@contextmanager
def _in_background(work: Callable[[Event], Any], at_end: Callable[[], None]):
    """`work(stop)` in a thread of its own, at the end of which `at_end()` is called. Leaving the block sets `stop` and waits.

    Gives a dict that holds its `result` in the end. An error of the work is raised where the block ends.
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
    finally:  # also where the page stops listening
        stop.set()
        thread.join()
    if "error" in done:
        raise done["error"]


# Causal models: text, and what stands beside it


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
    """The text so far again and again, each time with what has been written, and an HTML view of its axes, empty until it is done.

    Args:
        loaded: a causal model.
        prompt: not empty.
        max_new_tokens: how much to write.
        temperature: 0 takes the most probable token.
        seed: of the sampling.
        axis_source: of a MultiGrid with axes: `"predicted"` or `"annotated"`.

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
    """HTML: how much each token of a text counts for one position, layer by layer.

    Args:
        loaded: a LEAP.
        prompt: the text.
        head: from 1, or 0 for the mean of all.
        position: which token looks, from 1, or 0 for the last.

    Raises:
        ValueError: for an empty text, one that is too long, a head or a position that is not there.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    length, heads = ids.shape[1], model.config.num_attention_heads
    _check_length(loaded, length)
    head = _whole_number("Head", head, heads)
    position = _whole_number("Token that looks", position, length)
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
        about = "everything so far" if window is None else f"the last {window} tokens"
        layers.append((f"layer {number + 1}: {about}", weights.tolist()))
    return show_weights(tokenizer, ids[0].tolist(), layers, here)


# The grid: a page with holes


def lay_out(loaded: Loaded, text: str, region: str = REGIONS[0]) -> torch.LongTensor:
    """A page `[1, height, width]` of the model's size, masked where `HOLE` was typed and in a region.

    Raises:
        ValueError: for a text that doesn't fit on the page, and a page without masked cells.
    """
    processor = loaded.processor
    height = processor.height or loaded.model.config.grid_size[0]
    width = processor.width or loaded.model.config.grid_size[1]
    if _HOLE_CHARACTER in text:
        raise ValueError("The page holds a zero byte, which is no text.")
    rows = torch.from_numpy(processor.paginate(text.replace(HOLE, _HOLE_CHARACTER), 1, width))[:, 0]
    if len(rows) > height:
        raise ValueError(
            f"The text takes {len(rows):,} rows of {width:,} cells, and the page has {height:,}: shorten it. A line that is longer "
            "than a row takes several."
        )
    page = torch.full((1, height, width), processor.blank_token_id)
    page[0, : len(rows)] = rows
    hole = int(processor(_HOLE_CHARACTER, height=1, width=1)["input_ids"])
    page[page == hole] = processor.tokenizer.mask_token_id
    if region != REGIONS[0]:
        page = processor.mask_cells(page, region)
    if not (page == processor.tokenizer.mask_token_id).any():
        raise ValueError(f"No cell is masked: put {HOLE} where something is missing, or choose a region to mask.")
    return page


def fill(
    loaded: Loaded,
    text: str,
    region: str = REGIONS[0],
    sampler: str = "confidence",
    max_denoising_steps: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[str, str]]:
    """HTML of the page as it forms, and the text on it: before the first denoising step, after the first ones, then now and then, at the end.

    Args:
        loaded: a grid.
        text: the prompt, with `HOLE` at masked cells.
        region: what to mask besides, one of `REGIONS`.
        sampler, max_denoising_steps: as for `generate`; `"entropy_bound"` and `"raster"` take as many steps as they need.
        temperature: 0 takes the most probable token.
        seed: of the sampling.

    Raises:
        ValueError: for a seed out of range, and what `lay_out` and `generate` raise.
    """
    seed = _whole_number("Seed", seed, NUMPY_SEEDS)
    page = lay_out(loaded, text, region)
    draw = {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    counted = {"max_denoising_steps": int(max_denoising_steps)} if sampler in ("confidence", "random") else {}
    options = {"sampler": sampler, "seed": seed, **counted, **draw}
    seen = SimpleQueue()

    def generate(stop):
        watch = [_Watch(seen, stop)]
        return loaded.model.generate(page.to(loaded.model.device), logits_processor=watch, **options)

    def frame():
        written = int((pages[-1] != page[0]).sum())
        caption = f"{len(pages) - 1} denoising steps, {written} cells unmasked"
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
    """Passes on the page that each step begins with, and ends the writing when it is to stop."""

    def __init__(self, seen, stop):
        self.seen, self.stop = seen, stop

    def __call__(self, input_ids, scores):
        if self.stop.is_set():
            raise InterruptedError("Nobody looks at the page any longer.")
        self.seen.put(input_ids[0].cpu())
        return scores
