"""A page in the browser to try a saved model of any family: `python training/demo_app.py outputs/leap-tiny`.

Causal models write on from a prompt, token by token. LEAP also shows where it looks, MultiGrid the ids of its axes below each line.
The grid shows a page as it forms: type what is known, leave holes, and watch them being filled.

Read top-down: models, what each family does (plain functions and generators, which know nothing of gradio but speak of the
page's fields in their errors), the page. What is shown as HTML is made in demo_views.py.
Needs the extra `app`. Nothing of the package is imported: a folder brings its own code, which runs here, so open only those
that you trust; that of a name on the Hub runs with `--trust_remote_code` only. The page itself asks no other machine for
anything, and answers to nobody who calls it by another name than this machine's own.
"""

import os

from argument_checks import NUMPY_SEEDS, need, whole


need("app", "gradio", "matplotlib", "PIL")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from inspect import signature
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

import gradio
import torch
from demo_views import CSS, show_page, show_tracks, show_weights
from loading import TRUST_HELP, may_run_code
from redaction import Parser
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
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
ALL_SHOWN, FRAME_SECONDS = 24, 0.12  # denoising steps of a page that forms; of later ones fewer and fewer are shown
EXAMPLE_PROMPT = "import os\nimport sys\n\n\nclass "
EXAMPLE_PAGE = f"""def area(width, height):
    {HOLE * 6} width * height


def longest(words):
    best = None
    for word in words:
        if best is None or len(word) > len(best):
            {HOLE * 11}
    return best
"""


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
    reader = AutoProcessor if config.model_type in ("heptapod", "multigrid") else AutoTokenizer
    return Loaded(model, reader.from_pretrained(folder, trust_remote_code=trust))


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


# The page in the browser

SYSTEM_FONTS = ("system-ui", "Helvetica", "Arial", "sans-serif")
MONO_FONTS = ("DejaVu Sans Mono", "ui-monospace", "monospace")


def _theme():
    """Fonts that the machine has: gradio's own would be asked of another one."""
    fonts = {
        "font": [gradio.themes.Font(name) for name in SYSTEM_FONTS],
        "font_mono": [gradio.themes.Font(name) for name in MONO_FONTS],
    }
    return gradio.themes.Default(primary_hue="orange", **fonts)


def _shown(function, fields):
    """A handler whose errors appear on the page: what was typed or chosen wrong, or what went wrong while it worked."""

    def handler(*arguments):
        for field, value in zip(fields, arguments):
            if value is None:
                raise gradio.Error(escape(f"{field.label} is not filled in."), print_exception=False)
        try:
            yield from function(*arguments)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError))
            raise gradio.Error(escape(_told(error)), print_exception=not expected) from error

    return handler


def _told(error):
    """What the page says of an error. Of those that nobody thought of the terminal has the rest."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error} (the terminal says where)"


# Where the end of the text was after the last piece; only who has not scrolled up since is taken to the new one.
START_AT_THE_END = "() => { document.querySelector('#written').dataset.end = 0; }"
STAY_AT_THE_END = """() => requestAnimationFrame(() => {
    const block = document.querySelector('#written'), box = block.querySelector('textarea');
    if (box.scrollTop + box.clientHeight >= block.dataset.end - 20) box.scrollTop = box.scrollHeight;
    block.dataset.end = box.scrollHeight;
})"""
# In place of each selected character but for ends of lines, or where nothing is selected at the cursor.
OPEN_CELLS = r"""() => {
    const box = document.querySelector('#page_text textarea'), [start, end] = [box.selectionStart, box.selectionEnd];
    const opened = box.value.slice(start, end).replace(/[^\n]/gu, 'HOLE') || 'HOLE';
    box.setRangeText(opened, start, end, 'end');
    box.dispatchEvent(new Event('input', { bubbles: true }));
    box.focus();
}""".replace("HOLE", HOLE)


def build_app(folders: list[str], first: str | None = None, trust_remote_code: bool = False) -> gradio.Blocks:
    """The page.

    Args:
        folders: what to choose from; any other folder or name on the Hub can be typed.
        first: what is loaded when the page opens.
        trust_remote_code: whether the code of a name on the Hub may run.
    """

    def load_here(name):
        return load(name, trust_remote_code)

    with gradio.Blocks(title="Heptapod", analytics_enabled=False) as app:
        gradio.Markdown("# Heptapod\nLanguage models that do not read and write in one straight line.")
        with gradio.Row(equal_height=True):
            folder = gradio.Dropdown(
                folders,
                value=first,
                allow_custom_value=True,
                label="Model: a folder or a name on the Hub (the code of a folder runs on this machine)",
                scale=4,
                elem_id="folder",
            )
            load_button = gradio.Button("Load", scale=0, min_width=120, elem_id="load")
        about = gradio.HTML(elem_id="about", padding=True)

        with gradio.Column(visible=False) as causal:
            with gradio.Row():
                with gradio.Column(scale=2):
                    prompt = gradio.Textbox(EXAMPLE_PROMPT, label="Prompt", lines=6, max_lines=12, elem_id="prompt")
                    with gradio.Row():
                        max_new_tokens = gradio.Slider(
                            10, 1000, 200, step=10, label="New tokens", elem_id="new_tokens"
                        )
                        temperature = gradio.Slider(0, 2, 0.7, step=0.1, label="Temperature (0: most probable)")
                    with gradio.Row():
                        seed = gradio.Number(0, label="Seed", precision=0)
                        axis_source = gradio.Radio(
                            ["predicted", "annotated"],
                            value="predicted",
                            label="Axis ids",
                            visible=False,
                            elem_id="axis_source",
                        )
                    with gradio.Row():
                        write_button = gradio.Button("Write", variant="primary", elem_id="write")
                        stop_button = gradio.Button("Stop", elem_id="stop")
                with gradio.Column(scale=3):
                    written = gradio.Textbox(
                        label="Text", lines=18, max_lines=18, autoscroll=False, interactive=False, elem_id="written"
                    )
        tracks = gradio.HTML(visible=False, elem_id="tracks")

        with gradio.Column(visible=False) as looks:
            gradio.Markdown("### Where it looks", padding=True)
            with gradio.Row():
                head = gradio.Slider(0, 1, 0, step=1, label="Head (0: the mean of all)", elem_id="head")
                position = gradio.Number(0, label="Token that looks (0: the last)", precision=0)
                look_button = gradio.Button("Look at the prompt", elem_id="look")
            looked = gradio.HTML(padding=True, elem_id="looked")

        with gradio.Column(visible=False) as grid:
            with gradio.Row():
                with gradio.Column(scale=2):
                    page = gradio.Textbox(
                        EXAMPLE_PAGE,
                        label=f"The page; {HOLE} is a masked cell",
                        lines=16,
                        max_lines=16,
                        elem_id="page_text",
                    )
                    open_button = gradio.Button(
                        f"{HOLE} Mask a cell here, or the selection", size="sm", elem_id="mask_cells"
                    )
                    region = gradio.Dropdown(list(REGIONS), value=REGIONS[0], label="Mask", elem_id="region")
                    with gradio.Row():
                        sampler = gradio.Dropdown(list(SAMPLERS), value=SAMPLERS[0], label="Sampler")
                        steps = gradio.Slider(1, 64, 16, step=1, label="Denoising steps")
                    with gradio.Row():
                        page_temperature = gradio.Slider(0, 2, 0, step=0.1, label="Temperature (0: most probable)")
                        page_seed = gradio.Number(0, label="Seed", precision=0, elem_id="page_seed")
                    with gradio.Row():
                        fill_button = gradio.Button("Fill", variant="primary", elem_id="fill")
                        leave_button = gradio.Button("Stop", elem_id="leave")
                with gradio.Column(scale=3):
                    formed = gradio.HTML(padding=True, min_height=300, elem_id="formed")
                    read = gradio.Textbox(
                        label="Read as text",
                        lines=16,
                        max_lines=16,
                        autoscroll=False,
                        interactive=False,
                        elem_id="read",
                    )

        def show(name):
            try:
                loaded = load_here(name)
            except Exception as error:  # a message beside what is still there
                if not isinstance(error, (ValueError, OSError)):
                    traceback.print_exc()
                outcome = f"{name} was not loaded." if name else "Nothing was loaded."
                return {about: f"<b>{escape(outcome)}</b> {escape(_told(error))}"}
            leap, is_grid = loaded.family == "leap", loaded.family == "heptapod"
            has_axes = loaded.family == "multigrid" and loaded.model.config.num_axes > 0
            heads = getattr(loaded.model.config, "num_attention_heads", 1) if leap else 1
            axes = loaded.processor.axes if has_axes else ()
            sources = ["predicted", "annotated"] if all(axis.causal for axis in axes) else ["predicted"]
            rows = min(40, loaded.processor.height or loaded.model.config.grid_size[0]) if is_grid else 16
            return {
                about: describe(loaded),
                causal: gradio.update(visible=not is_grid),
                axis_source: gradio.update(choices=sources, value="predicted", visible=has_axes),
                tracks: gradio.update(value="", visible=has_axes),
                looks: gradio.update(visible=leap),
                head: gradio.update(maximum=heads, value=0),
                grid: gradio.update(visible=is_grid),
                page: gradio.update(lines=rows, max_lines=rows),
                written: "",
                looked: "",
                formed: "",
                read: gradio.update(value="", lines=rows, max_lines=rows),
            }

        def on_write(name, *arguments):
            yield from write(load_here(name), *arguments)

        def on_look(name, text, head, position):
            yield look(load_here(name), text, head, position)

        def on_fill(name, *arguments):
            for frame in fill(load_here(name), *arguments):
                yield frame
                time.sleep(FRAME_SECONDS)

        shown = [about, causal, axis_source, tracks, looks, head, grid, page, written, looked, formed, read]
        for event in (load_button.click, folder.input) + ((app.load,) if first else ()):
            event(show, folder, shown)
        fields = [folder, prompt, max_new_tokens, temperature, seed, axis_source]
        write_button.click(None, js=START_AT_THE_END)
        writing = write_button.click(_shown(on_write, fields), fields, [written, tracks])
        written.change(None, js=STAY_AT_THE_END)
        stop_button.click(None, cancels=[writing])
        fields = [folder, prompt, head, position]
        look_button.click(_shown(on_look, fields), fields, looked)
        fields = [folder, page, region, sampler, steps, page_temperature, page_seed]
        filling = fill_button.click(_shown(on_fill, fields), fields, [formed, read])
        open_button.click(None, js=OPEN_CELLS)
        leave_button.click(None, cancels=[filling])
    return app


OWN_NAMES = ("127.0.0.1", "localhost")


class OwnHostOnly:
    """Refuses requests that are meant for another host, or that a page of another host makes the browser send.

    A name that somebody lets point to this machine (DNS rebinding) would otherwise let their page read and steer this one.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and not is_own(scope["headers"]):
            # Before a websocket is accepted it is refused with 403.
            response = PlainTextResponse(f"This page is for {' and '.join(OWN_NAMES)} only.", status_code=403)
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await response(scope, receive, send)
        await self.app(scope, receive, send)


def is_own(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request names this machine as its host, once, and as its origin if it has one."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    try:
        names = [urlsplit(address).hostname for address in (*(f"//{host}" for host in hosts), *origins)]
    except ValueError:  # no address at all
        return False
    return len(hosts) == 1 and all(name in OWN_NAMES for name in names)


def launch(app: gradio.Blocks, **options):
    """Start the page with its looks, for its own host only; options as for `Blocks.launch`."""
    guard = {"middleware": [Middleware(OwnHostOnly)]}
    return app.queue().launch(theme=_theme(), css=CSS, footer_links=[], app_kwargs=guard, **options)


def saved_folders(root: str = "outputs") -> list[str]:
    """Folders below `root` that hold a model."""
    return sorted(str(path.parent) for path in Path(root).glob("*/config.json"))


def main():
    parser = Parser(description="A page in the browser to try a saved model.")
    parser.add_argument("folder", nargs="?", help="what train.py wrote, or a name on the Hub")
    parser.add_argument("--port", type=whole(1, 65535), default=7860, help="of the page, on this machine only")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args()
    if args.folder is not None:
        may_run_code(args.folder, args.trust_remote_code)
    folders = saved_folders()
    app = build_app(folders, args.folder or next(iter(folders), None), args.trust_remote_code)
    launch(app, server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main()
