"""The page to try a model: what its handlers give for every family, and the page in a real browser."""

import http.client
import os
import re
import shutil
import threading
from html import unescape
from itertools import pairwise

import pytest
import torch
from data import build_tokenizer
from demo_app import (
    ALL_SHOWN,
    HOLE,
    build_app,
    describe,
    fill,
    is_own,
    launch,
    lay_out,
    load,
    look,
    saved_folders,
    write,
)

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


TOKENIZER = build_tokenizer("byte", [], for_pages=True)
PLAIN = build_tokenizer("byte", [])
AXES = MultiGridProcessor(PLAIN, ["token_kind", "bracket"])
COMMON = {"vocab_size": len(PLAIN), "pad_token_id": PLAIN.pad_token_id}
HEIGHT, WIDTH = 5, 12
PROMPT = "if a < b:\n"
PAGE = f"def f(x):\n    {HOLE * 6} x\n"
CAUSAL = ["leap", "additive", "hierarchical_lm", "multigrid", "axes"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model, as `train.py` leaves them but untrained."""
    root = tmp_path_factory.mktemp("outputs")
    page_tokens = {"vocab_size": len(TOKENIZER), "mask_token_id": TOKENIZER.mask_token_id}
    models = {
        "leap": (tiny_leap(**COMMON), PLAIN),
        "additive": (tiny_leap(mixer="additive", **COMMON), PLAIN),
        "masked": (tiny_leap("LeapForMaskedLM", **COMMON), PLAIN),
        "hierarchical_lm": (tiny_hierarchical_lm(**COMMON), PLAIN),
        "multigrid": (tiny_multigrid(**COMMON), MultiGridProcessor(PLAIN)),
        "axes": (
            tiny_multigrid(axis_names=AXES.axis_names, axis_vocab_sizes=AXES.axis_vocab_sizes, **COMMON),
            AXES,
        ),
        "heptapod": (
            tiny_heptapod(grid_size=(HEIGHT, WIDTH), pad_token_id=TOKENIZER.pad_token_id, **page_tokens),
            HeptapodProcessor(TOKENIZER, HEIGHT, WIDTH),
        ),
    }
    for name, (model, processor) in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture
def loaded(folders, request):
    return load(str(folders / request.param))


@pytest.fixture
def leap(folders):
    return load(str(folders / "leap"))


@pytest.fixture
def grid(folders):
    return load(str(folders / "heptapod"))


for_causal_models = pytest.mark.parametrize("loaded", CAUSAL, indirect=True)


def text_of(html):
    return unescape(re.sub("<[^>]*>", "", html))


@for_causal_models
def test_text_grows_to_what_generate_writes(loaded):
    shown = [text for text, _ in write(loaded, PROMPT, max_new_tokens=12, temperature=0)]
    assert len(shown) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    inputs = loaded.processor(PROMPT, return_tensors="pt")
    tokens = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert shown[-1] == loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)


@for_causal_models
def test_a_seed_is_a_text(loaded):
    texts = [list(write(loaded, PROMPT, 20, 1.0, seed))[-1][0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("loaded", ["axes"], indirect=True)
@pytest.mark.parametrize("meta_source", ["predicted", "annotated"])
def test_tracks_stand_below_the_text(loaded, meta_source):
    *_, (text, tracks) = write(loaded, PROMPT, 6, 0, meta_source=meta_source)
    rows = [text_of(row) for row in re.findall(r'<div class="(?:text|track)">(.*?)</div>', tracks, re.DOTALL)]
    assert rows[0].strip() == "if a < b:" and "if a < b:" not in tracks  # escaped
    assert [row.split(" ")[0] for row in rows[1:3]] == ["token_kind", "bracket"]
    assert text.startswith(PROMPT)
    assert all(f"<b>{name}</b>" in tracks for name in ("token_kind", "bracket"))


def test_only_models_with_axes_have_tracks(leap):
    assert {tracks for _, tracks in write(leap, PROMPT, 6)} == {""}


def test_who_stops_listening_stops_the_writing(leap):
    before, steps = threading.active_count(), []
    leap.model.register_forward_hook(lambda *_: steps.append(1))
    pieces = write(leap, PROMPT, max_new_tokens=3000)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before and len(steps) < 3000


def test_errors_of_generate_are_not_lost_in_its_thread(folders):
    with pytest.raises(ValueError, match="meta_source"):
        list(write(load(str(folders / "axes")), PROMPT, 5, meta_source="guessed"))


def test_an_empty_prompt_is_refused(leap):
    with pytest.raises(ValueError, match="prompt is empty"):
        next(write(leap, ""))
    with pytest.raises(ValueError, match="prompt is empty"):
        look(leap, "")


def test_one_token_looks_without_the_matrix_of_all(leap, monkeypatch):
    largest = 0
    softmax = torch.softmax

    def watched(x, **kwargs):
        nonlocal largest
        largest = max(largest, x.numel())
        return softmax(x, **kwargs)

    monkeypatch.setattr(torch, "softmax", watched)
    look(leap, PROMPT * 10)
    assert 0 < largest <= leap.model.config.num_attention_heads * (len(PROMPT) * 10 + 1)


@pytest.mark.parametrize("loaded", ["leap", "additive"], indirect=True)
@pytest.mark.parametrize("head, position", [(0, 0), (2, 5)])
def test_where_leap_looks(loaded, head, position):
    html = look(loaded, PROMPT, head, position)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        attentions = loaded.model(ids, output_attentions=True).attentions
    shown = re.findall(r'<div class="layer">.*?</div></div>', html, re.DOTALL)
    assert len(shown) == len(attentions) == 4
    for layer, given, part in zip(loaded.model.model.layers, attentions, shown):
        matrix = layer.mixer.attention_matrix(given)[0]
        matrix = matrix.mean(1) if matrix.dim() == 4 else matrix
        row = matrix[:, (position or len(PROMPT)) - 1]
        row = row[head - 1] if head else row.mean(0)
        weights = [float(x) for x in re.findall(r'title="(.*?)"', part)]
        torch.testing.assert_close(weights, row.tolist(), rtol=0, atol=6e-5)
        spans = re.findall(r"<span( class=\"here\")?.*?>(.*?)</span>", part, re.DOTALL)
        assert "".join(unescape(text) for _, text in spans).replace("\u21b5", "") == PROMPT
        assert [place for place, (here, _) in enumerate(spans) if here] == [(position or len(PROMPT)) - 1]


@pytest.mark.parametrize("options", [{"head": 5}, {"head": -1}, {"position": len(PROMPT) + 1}])
def test_nobody_looks_from_elsewhere(leap, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        look(leap, PROMPT, **options)


def test_typed_holes_are_open_cells(grid):
    page = lay_out(grid, PAGE)
    is_open = page == TOKENIZER.mask_token_id
    assert page.shape == (1, HEIGHT, WIDTH) and is_open.sum() == 6 and is_open[0, 1, 4:10].all()
    assert grid.processor.decode(page[0]) == PAGE
    assert (lay_out(grid, PAGE, "bottom") == TOKENIZER.mask_token_id)[0, -2:].all()


@pytest.mark.parametrize(
    "text, message", [("def f(x):\n", "No cell is open"), ("\n" * 9 + HOLE, "rows"), ("\0", "zero")]
)
def test_pages_that_cannot_be_filled(grid, text, message):
    with pytest.raises(ValueError, match=message):
        lay_out(grid, text)


def cells_of(html):
    return re.findall(r'<i class="(.*?)"(?: style="background:(.*?)")?>', html)


def test_a_page_forms_and_keeps_what_was_given(grid):
    frames = list(fill(grid, PAGE, num_iterations=3))
    kinds = [[kind for kind, _ in cells_of(html)] for html, _ in frames]
    assert [row.count("open") for row in kinds] == [6, 5, 3, 0]
    assert all(row.count("given") == HEIGHT * WIDTH - 6 for row in kinds)
    colours = {colour for _, colour in cells_of(frames[-1][0]) if colour}
    assert len(colours) == 3  # one for each iteration
    filled = grid.model.generate(lay_out(grid, PAGE), num_iterations=3)
    assert frames[-1][1] == grid.processor.decode(filled[0])


def test_long_runs_are_shown_in_part(grid):
    frames = list(fill(grid, PAGE, "all", "raster"))
    done = [int(re.search(r"(\d+) iterations", html)[1]) for html, _ in frames]
    assert done[: ALL_SHOWN + 1] == [*range(ALL_SHOWN), ALL_SHOWN] and done[ALL_SHOWN + 1 :][:2] == [26, 28]
    assert done[-1] == HEIGHT * WIDTH > len(frames) and done == sorted(set(done))
    assert [kind for kind, _ in cells_of(frames[-1][0])].count("open") == 0


def test_a_page_is_shown_while_it_forms_until_nobody_looks(grid, monkeypatch):
    calls = []
    whole = grid.model.forward
    monkeypatch.setattr(grid.model, "forward", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))
    before, frames = threading.active_count(), fill(grid, PAGE, "all", "raster")
    next(frames)
    assert threading.active_count() > before
    frames.close()
    assert threading.active_count() == before and len(calls) < HEIGHT * WIDTH


def test_errors_of_a_page_that_forms_are_not_lost_in_its_thread(grid):
    with pytest.raises(ValueError, match="schedule"):
        list(fill(grid, PAGE, schedule="guessed"))


def test_what_does_not_write_is_not_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="LeapForMaskedLM, which doesn't write"):
        load(str(folders / "masked"))
    with pytest.raises((OSError, ValueError)):
        load(str(tmp_path / "nothing"))


def test_a_folder_that_was_written_again_is_loaded_again(folders, tmp_path):
    shutil.copytree(folders / "leap", tmp_path / "leap")
    first = load(str(tmp_path / "leap"))
    assert load(str(tmp_path / "leap")) is first
    with torch.no_grad():
        first.model.lm_head.weight[0] += 1
    first.model.save_pretrained(tmp_path / "leap")
    os.utime(tmp_path / "leap" / "model.safetensors", (0, 2e9))
    again = load(str(tmp_path / "leap")).model
    assert again is not first.model and torch.equal(again.lm_head.weight, first.model.lm_head.weight)


def test_folders_to_choose_from(folders):
    assert len(saved_folders(str(folders))) == 7
    assert "LeapForCausalLM" in describe(load(str(folders / "leap")))


def test_gradio_reports_nothing():
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert build_app([]).analytics_enabled is False


OWN = b"127.0.0.1:7860"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"host", OWN)], True),
        ([(b"host", b"localhost")], True),
        ([(b"host", b"LOCALHOST:80"), (b"origin", b"http://localhost:80")], True),
        ([(b"host", b"evil.example:7860")], False),
        ([(b"host", b"127.0.0.1.evil.example")], False),
        ([(b"host", b"localhost@evil.example")], False),
        ([(b"host", b"")], False),
        ([(b"host", b"[::")], False),
        ([(b"host", OWN), (b"host", b"evil.example")], False),
        ([(b"host", OWN), (b"origin", b"http://evil.example")], False),
        ([(b"host", OWN), (b"origin", b"null")], False),
        ([], False),
    ],
)
def test_requests_name_this_machine(headers, expected):
    assert is_own(headers) is expected


def test_the_page_answers_to_its_own_host_only(folders):
    """A name that is made to point here (DNS rebinding) gets nothing, over HTTP and over websockets, and no page of another host."""
    app = build_app(saved_folders(str(folders)))
    _, url, _ = launch(app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    port = int(url.rstrip("/").rsplit(":", 1)[1])

    def status(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        return connection.getresponse().status

    try:
        assert status("GET", "/config") == status("GET", "/config", Host=f"localhost:{port}") == 200
        assert status("GET", "/config", Origin=f"http://127.0.0.1:{port}") == 200
        for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}):
            assert status("GET", "/", **headers) == status("GET", "/config", **headers) == 403
            assert status("POST", "/gradio_api/queue/join", "{}", Content_Type="application/json", **headers) == 403
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
        upgrade |= {"Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Host": "evil.example"}
        assert status("GET", "/gradio_api/anything", **upgrade) == 403
    finally:
        app.close()


def test_code_of_a_name_is_not_run_unasked(monkeypatch):
    monkeypatch.setattr("loading.PreTrainedConfig.get_config_dict", lambda name, **_: ({"auto_map": {}}, {}))
    with pytest.raises(ValueError, match="me/model brings its own code, .*: --trust_remote_code allows it"):
        load("me/model")


CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture
def page(folders):
    """The page in a browser, with LEAP loaded; and the hosts that the browser has asked for something."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    app = build_app(saved_folders(str(folders)), str(folders / "leap"))
    _, url, _ = launch(app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
            page = browser.new_page()
            page.set_default_timeout(60_000)
            hosts = set()
            page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            page.goto(url)
            yield page, hosts
            browser.close()
    finally:
        app.close()


def pick(page, folder):
    page.fill("#folder input", str(folder))
    page.keyboard.press("Enter")
    page.click("#load")


@pytest.mark.slow
def test_in_a_browser(page, folders):
    """One visit: text that streams, where it looks, a wrong name, tracks, a page that is typed, and forms."""
    from playwright.sync_api import expect

    page, hosts = page
    expect(page.locator("#about")).to_contain_text("LeapForCausalLM")
    page.fill("#prompt textarea", PROMPT)
    page.fill("#new_tokens input[type=number]", "30")
    page.click("#write")
    page.wait_for_function(
        "length => document.querySelector('#written textarea').value.length > length", arg=len(PROMPT) + 15
    )
    assert page.input_value("#written textarea").startswith(PROMPT)
    assert not page.is_visible("#fill")
    page.click("#look")
    expect(page.locator("#looked .layer")).to_have_count(4)
    expect(page.locator("#looked .layer").first.locator("span")).to_have_count(len(PROMPT))

    pick(page, "/nowhere")
    expect(page.locator("#about")).to_contain_text("/nowhere was not loaded")
    assert page.is_visible("#write")

    pick(page, folders / "hierarchical_lm")
    expect(page.locator("#about")).to_contain_text("HierarchicalLMForCausalLM")
    expect(page.locator("#written textarea")).to_have_value("")
    page.click("#write")
    page.wait_for_function(
        "length => document.querySelector('#written textarea').value.length > length", arg=len(PROMPT) + 15
    )
    assert not page.is_visible("#look")

    pick(page, folders / "axes")
    expect(page.locator("#about")).to_contain_text("MultiGridForCausalLM")
    page.click("#write")
    expect(page.locator("#tracks .track").first).to_contain_text("token_kind")
    assert not page.is_visible("#look")

    pick(page, folders / "heptapod")
    expect(page.locator("#about")).to_contain_text("HeptapodForMaskedLM")
    assert not page.is_visible("#write")
    page.fill("#page_text textarea", PAGE)
    page.click("#fill")
    expect(page.locator("#formed i.open").first).to_be_visible()
    expect(page.locator("#formed i")).to_have_count(HEIGHT * WIDTH)
    expect(page.locator("#formed i.open")).to_have_count(0)
    expect(page.locator("#formed i[style]")).to_have_count(6)
    assert page.input_value("#read textarea").startswith("def f(x):\n    ")

    page.fill("#page_text textarea", "nothing open")
    page.click("#fill")
    expect(page.locator(".toast-body")).to_contain_text("No cell is open")
    page.fill("#page_seed input", "")
    page.click("#fill")
    expect(page.locator(".toast-body").last).to_contain_text("Something is not filled in")
    assert len(hosts) == 1 and next(iter(hosts)).startswith("127.0.0.1")
