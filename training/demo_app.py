"""A page in the browser to try a saved model of any family: `python training/demo_app.py outputs/leap-tiny`.

Causal models write on from a prompt, token by token. LEAP also shows where it looks, MultiGrid the ids of its axes below each line.
The grid shows a page as it forms: type what is known, leave holes, and watch them being filled.

What the page does with models is in demo_models.py, what it shows as HTML in demo_views.py.
Needs the extra `app`. Nothing of the package is imported: a folder brings its own code, which runs here, so open only those
that you trust; that of a name on the Hub runs with `--trust_remote_code` only. The page itself asks no other machine for
anything, and answers to nobody who calls it by another name than this machine's own.
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
from demo_models import HOLE, REGIONS, SAMPLERS, describe, fill, load, look, write
from demo_views import CSS
from loading import TRUST_HELP, may_run_code
from redaction import Parser
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse


FRAME_SECONDS = 0.12  # of a page that forms
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
