"""A page in the browser to try a saved model of any family: `python training/demo_app.py outputs/leap-tiny`.

Causal models continue a prompt token by token. LEAP also shows the weights of the tokens, MultiGrid the axis ids below each line.
A grid model fills the masked cells of a page, which is shown after each denoising step.

Work on models is in demo_models.py, HTML in demo_views.py. Needs the extra `app`.
The package is not imported: a folder brings its own code, which runs on this machine, so load folders that you trust only; the
code of a name on the Hub runs with `--trust_remote_code` only. The page sends no request to another machine, and accepts
requests for this machine's own host name only.
"""

import os

from argument_checks import need, whole


need("app", "gradio", "matplotlib", "PIL")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import time
import traceback
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import gradio
from demo_models import MASK, TYPED, describe, fill, load, look, page_options, page_size, write
from demo_views import CSS
from loading import TRUST_HELP, may_run_code
from redaction import Parser
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse


FRAME_SECONDS = 0.12  # between two denoising steps that are shown
TEMPERATURE = "Temperature (0: greedy)"
EXAMPLE_PROMPT = "import os\nimport sys\n\n\nclass "
EXAMPLE_PAGE = f"""def area(width, height):
    {MASK * 6} width * height


def longest(words):
    best = None
    for word in words:
        if best is None or len(word) > len(best):
            {MASK * 11}
    return best
"""


SYSTEM_FONTS = ("system-ui", "Helvetica", "Arial", "sans-serif")
MONO_FONTS = ("DejaVu Sans Mono", "ui-monospace", "monospace")


def _theme():
    """Fonts of this machine: gradio's own would be requested from another one."""
    fonts = {
        "font": [gradio.themes.Font(name) for name in SYSTEM_FONTS],
        "font_mono": [gradio.themes.Font(name) for name in MONO_FONTS],
    }
    return gradio.themes.Default(primary_hue="orange", **fonts)


# `data-end` is the height of the text before the last token: the box scrolls to the new end unless the user has scrolled up.
START_AT_THE_END = "() => { document.querySelector('#written').dataset.end = 0; }"
STAY_AT_THE_END = """() => requestAnimationFrame(() => {
    const block = document.querySelector('#written'), box = block.querySelector('textarea');
    if (box.scrollTop + box.clientHeight >= block.dataset.end - 20) box.scrollTop = box.scrollHeight;
    block.dataset.end = box.scrollHeight;
})"""
# Replaces each selected character except newlines; without a selection inserts one at the cursor.
MASK_CELLS = r"""() => {
    const box = document.querySelector('#page_text textarea'), [start, end] = [box.selectionStart, box.selectionEnd];
    const masked = box.value.slice(start, end).replace(/[^\n]/gu, 'MASK') || 'MASK';
    box.setRangeText(masked, start, end, 'end');
    box.dispatchEvent(new Event('input', { bubbles: true }));
    box.focus();
}""".replace("MASK", MASK)


def build_app(folders: list[str], first: str | None = None, trust_remote_code: bool = False) -> gradio.Blocks:
    """The page: a model is loaded at its top, below it are the sections that this model has.

    Args:
        folders: the models to choose from; any other folder or name on the Hub can be typed.
        first: the model that is loaded when the page opens.
        trust_remote_code: whether the code of a name on the Hub may run.
    """

    def load_here(name):
        return load(name, trust_remote_code)

    with gradio.Blocks(title="Heptapod", analytics_enabled=False) as app:
        gradio.Markdown("# Heptapod\nFour families of language models that run on this machine.")
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
        text = TextSection()
        sections = [text, AttentionSection(text.prompt), GridSection()]

        def show(name):
            try:
                loaded = load_here(name)
                shown = {about: describe(loaded)}
                for section in sections:
                    shown |= section.show(loaded)
                return shown
            except Exception as error:  # shown above the model that stays loaded
                if not isinstance(error, (ValueError, OSError)):
                    traceback.print_exc()
                outcome = f"{name} was not loaded." if name else "Nothing was loaded."
                return {about: f"<b>{escape(outcome)}</b> {escape(_message(error))}"}

        shown = [about, *(component for section in sections for component in section.shown)]
        for event in (load_button.click, folder.input) + ((app.load,) if first else ()):
            event(show, folder, shown)
        for section in sections:
            section.connect(folder, load_here)
    return app


class TextSection:
    """A causal model continues a prompt; a MultiGrid shows its axis ids below each line."""

    def __init__(self):
        with gradio.Column(visible=False) as self.column, gradio.Row():
            with gradio.Column(scale=2):
                self.prompt = gradio.Textbox(EXAMPLE_PROMPT, label="Prompt", lines=6, max_lines=12, elem_id="prompt")
                with gradio.Row():
                    self.max_new_tokens = gradio.Slider(
                        10, 1000, 200, step=10, label="New tokens", elem_id="new_tokens"
                    )
                    self.temperature = gradio.Slider(0, 2, 0.7, step=0.1, label=TEMPERATURE)
                with gradio.Row():
                    self.seed = gradio.Number(0, label="Seed", precision=0)
                    self.axis_source = gradio.Radio(
                        ["predicted"], value="predicted", label="Axis ids", visible=False, elem_id="axis_source"
                    )
                with gradio.Row():
                    self.button = gradio.Button("Write", variant="primary", elem_id="write")
                    self.stop_button = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=3):
                self.text = gradio.Textbox(
                    label="Text", lines=18, max_lines=18, autoscroll=False, interactive=False, elem_id="written"
                )
        self.tracks = gradio.HTML(visible=False, elem_id="tracks")
        self.shown = [self.column, self.axis_source, self.text, self.tracks]

    def show(self, loaded):
        has_axes = loaded.family == "multigrid" and loaded.model.config.num_axes > 0
        axes = loaded.processor.axes if has_axes else ()
        sources = ["predicted", "annotated"] if all(axis.causal for axis in axes) else ["predicted"]
        return {
            self.column: gradio.update(visible=loaded.family != "heptapod"),
            self.axis_source: gradio.update(choices=sources, value="predicted", visible=has_axes),
            self.text: "",
            self.tracks: gradio.update(value="", visible=has_axes),
        }

    def connect(self, folder, load_here):
        def on_write(name, *arguments):
            yield from write(load_here(name), *arguments)

        fields = [folder, self.prompt, self.max_new_tokens, self.temperature, self.seed, self.axis_source]
        self.button.click(None, js=START_AT_THE_END)
        writing = self.button.click(_on_page(on_write, fields), fields, [self.text, self.tracks])
        self.text.change(None, js=STAY_AT_THE_END)
        self.stop_button.click(None, cancels=[writing])


class AttentionSection:
    """Weights that the layers of LEAP give to the tokens of the prompt."""

    def __init__(self, prompt):
        self.prompt = prompt
        with gradio.Column(visible=False) as self.column:
            gradio.Markdown("### Weights of the tokens", padding=True)
            with gradio.Row():
                self.head = gradio.Slider(0, 1, 0, step=1, label="Head (0: the mean of all)", elem_id="head")
                self.position = gradio.Number(0, label="Position that attends (0: the last token)", precision=0)
                self.button = gradio.Button("Show the weights of the prompt", elem_id="look")
            self.weights = gradio.HTML(padding=True, elem_id="looked")
        self.shown = [self.column, self.head, self.weights]

    def show(self, loaded):
        is_leap = loaded.family == "leap"
        heads = loaded.model.config.num_attention_heads if is_leap else 1
        return {
            self.column: gradio.update(visible=is_leap),
            self.head: gradio.update(maximum=heads, value=0),
            self.weights: "",
        }

    def connect(self, folder, load_here):
        def on_look(name, *arguments):
            yield look(load_here(name), *arguments)

        fields = [folder, self.prompt, self.head, self.position]
        self.button.click(_on_page(on_look, fields), fields, self.weights)


class GridSection:
    """A grid model fills the masked cells of a page, which is shown after each denoising step."""

    def __init__(self):
        with gradio.Column(visible=False) as self.column, gradio.Row():
            with gradio.Column(scale=2):
                self.page = gradio.Textbox(
                    EXAMPLE_PAGE,
                    label=f"The page; {MASK} is a masked cell",
                    lines=16,
                    max_lines=16,
                    elem_id="page_text",
                )
                self.mask_button = gradio.Button(
                    f"{MASK} Mask a cell here, or the selection", size="sm", elem_id="mask_cells"
                )
                self.region = gradio.Dropdown([TYPED], value=TYPED, label="Mask", elem_id="region")
                with gradio.Row():
                    self.sampler = gradio.Dropdown(label="Sampler", elem_id="sampler")
                    self.mask_schedule = gradio.Dropdown(label="Mask schedule", elem_id="mask_schedule")
                with gradio.Row():
                    self.steps = gradio.Slider(1, 64, 16, step=1, label="Denoising steps", elem_id="steps")
                    self.temperature = gradio.Slider(0, 2, 0, step=0.1, label=TEMPERATURE)
                    self.seed = gradio.Number(0, label="Seed", precision=0, elem_id="page_seed")
                with gradio.Row():
                    self.button = gradio.Button("Fill", variant="primary", elem_id="fill")
                    self.stop_button = gradio.Button("Stop", elem_id="leave")
            with gradio.Column(scale=3):
                self.canvas = gradio.HTML(padding=True, min_height=300, elem_id="formed")
                self.text = gradio.Textbox(
                    label="Read as text", lines=16, max_lines=16, autoscroll=False, interactive=False, elem_id="read"
                )
        self.shown = [self.column, self.page, self.region, self.sampler, self.mask_schedule, self.canvas, self.text]

    def show(self, loaded):
        if loaded.family != "heptapod":
            return {self.column: gradio.update(visible=False)}
        rows = min(40, page_size(loaded)[0])
        options = page_options(loaded)
        return {
            self.column: gradio.update(visible=True),
            self.page: gradio.update(lines=rows, max_lines=rows),
            self.region: _choices(options.regions),
            self.sampler: _choices(options.samplers),
            self.mask_schedule: _choices(options.mask_schedules),
            self.canvas: "",
            self.text: gradio.update(value="", lines=rows, max_lines=rows),
        }

    def connect(self, folder, load_here):
        def on_fill(name, *arguments):
            for frame in fill(load_here(name), *arguments):
                yield frame
                time.sleep(FRAME_SECONDS)

        options = [self.region, self.sampler, self.mask_schedule, self.steps, self.temperature, self.seed]
        fields = [folder, self.page, *options]
        filling = self.button.click(_on_page(on_fill, fields), fields, [self.canvas, self.text])
        self.mask_button.click(None, js=MASK_CELLS)
        self.stop_button.click(None, cancels=[filling])


def _choices(names):
    return gradio.update(choices=list(names), value=names[0])


def _on_page(function, fields):
    """A handler whose errors are shown on the page, those of empty fields first."""

    def handler(*arguments):
        for field, value in zip(fields, arguments):
            if value is None:
                raise gradio.Error(escape(f"{field.label} is not filled in."), print_exception=False)
        try:
            yield from function(*arguments)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError))
            raise gradio.Error(escape(_message(error)), print_exception=not expected) from error

    return handler


def _message(error):
    """The text of an error on the page. The terminal has the traceback of an unexpected one."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error} (the terminal has the traceback)"


OWN_NAMES = ("127.0.0.1", "localhost")


class OwnHostOnly:
    """Middleware that rejects requests for another host, or from a page of another host.

    Otherwise the page of an attacker whose host name resolves to this machine (DNS rebinding) could read and control this one.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and not is_own(scope["headers"]):
            # Closing a websocket before it is accepted answers 403.
            response = PlainTextResponse(f"This page is for {' and '.join(OWN_NAMES)} only.", status_code=403)
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await response(scope, receive, send)
        await self.app(scope, receive, send)


def is_own(headers: list[tuple[bytes, bytes]]) -> bool:
    """Returns whether a request has one host, this machine, and no origin but this machine."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    try:
        names = [urlsplit(address).hostname for address in (*(f"//{host}" for host in hosts), *origins)]
    except ValueError:  # not an address
        return False
    return len(hosts) == 1 and all(name in OWN_NAMES for name in names)


def launch(app: gradio.Blocks, **options):
    """Start the page with its theme, for its own host only. The options are those of `Blocks.launch`."""
    guard = {"middleware": [Middleware(OwnHostOnly)]}
    return app.queue().launch(theme=_theme(), css=CSS, footer_links=[], app_kwargs=guard, **options)


def saved_folders(root: str = "outputs") -> list[str]:
    """Folders below `root` that hold a model."""
    return sorted(str(path.parent) for path in Path(root).glob("*/config.json"))


def main():
    parser = Parser(description="A page in the browser to try a saved model.")
    parser.add_argument("folder", nargs="?", help="a folder that train.py wrote, or a name on the Hub")
    parser.add_argument(
        "--port", type=whole(1, 65535), default=7860, help="port of the page, which only this machine can open"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args()
    if args.folder is not None:
        may_run_code(args.folder, args.trust_remote_code)
    folders = saved_folders()
    app = build_app(folders, args.folder or next(iter(folders), None), args.trust_remote_code)
    launch(app, server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main()
