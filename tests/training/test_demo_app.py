"""The page to try a model: what its handlers give for every family, and the page in a real browser."""

import http.client
import os
import re
import shutil
import threading
import time
from html import unescape
from itertools import pairwise
from types import SimpleNamespace

import gradio
import pytest
import torch
from corpora import build_tokenizer
from demo_app import _on_page, build_app, is_own, launch, saved_folders
from demo_models import ALL_SHOWN, MASK, Loaded, describe, fill, load, look, typed_page, write
from demo_views import CSS, LINES_SHOWN, TOKENS_SHOWN, ink_on, show_page, show_tracks, show_weights, step_colours
from sample_axes import characters_to_show, lines_with_tracks
from token_text import readable
from transformers import AutoTokenizer, TextIteratorStreamer

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor
from modeling_heptapod.heptapod.processing_heptapod import REGIONS
from modeling_heptapod.heptapod.samplers import MASK_SCHEDULES, SAMPLERS
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
PAGE = f"def f(x):\n    {MASK * 6} x\n"
CAUSAL = ["leap", "additive", "hierarchical_lm", "multigrid", "axes"]
OCTOPUS = "\U0001f419"  # four bytes, f0 9f 90 99


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model, as `train.py` leaves them but untrained."""
    root = tmp_path_factory.mktemp("outputs")
    page_tokens = {"vocab_size": len(TOKENIZER), "mask_token_id": TOKENIZER.mask_token_id}
    models = {
        "leap": (tiny_leap(**COMMON), PLAIN),
        "additive": (tiny_leap(mixer="additive", **COMMON), PLAIN),
        "masked": (tiny_leap("LeapForMaskedLM", **COMMON), PLAIN),
        "absolute": (tiny_leap(position_embedding_type="absolute", **COMMON), PLAIN),
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
@pytest.mark.parametrize("axis_source", ["predicted", "annotated"])
def test_tracks_stand_below_the_text(loaded, axis_source):
    *_, (text, tracks) = write(loaded, PROMPT, 6, 0, axis_source=axis_source)
    rows = [text_of(row) for row in re.findall(r'<div class="(?:text|track)">(.*?)</div>', tracks, re.DOTALL)]
    assert rows[0].strip() == "if a < b:" and "if a < b:" not in tracks  # escaped
    assert [row.split(" ")[0] for row in rows[1:3]] == ["token_kind", "bracket"]
    assert text.startswith(PROMPT)
    assert all(f"<b>{name}</b>" in tracks for name in ("token_kind", "bracket"))


def test_columns_of_tracks_are_those_of_the_text():
    """A tab, an escape and a character that breaks lines take one column each, as their ids do."""
    lines = lines_with_tracks(AXES, list("a\tb\x1b\r\u2028(c\nd"), [[1] * 10, [2] * 10]).split("\n")
    assert lines[0].strip() == "a\u00b7b\u00b7\u00b7\u00b7(c" and lines[3].strip() == "d"
    assert {len(line) for line in lines[:3]} == {len(lines[0])}


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
    with pytest.raises(ValueError, match="axis_source"):
        list(write(load(str(folders / "axes")), PROMPT, 5, axis_source="guessed"))


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


def test_code_of_an_earlier_version_makes_all_rows(leap, monkeypatch):
    kind, expected = type(leap.model.model.layers[0].mixer), look(leap, PROMPT, 1, 3)
    of_all = kind.attention_matrix
    monkeypatch.setattr(kind, "attention_matrix", lambda self, attentions, is_causal=True: of_all(self, attentions))
    assert look(leap, PROMPT, 1, 3) == expected


def test_a_long_text_is_looked_at_in_part():
    """The tokens up to the one that looks, and how much weight lies on those that are not shown."""
    ids = [97] * (TOKENS_SHOWN + 500)
    weights = [1 / len(ids)] * len(ids)
    for here, first, last in ((len(ids) - 1, 501, 2500), (2099, 101, 2100), (3, 1, 2000)):
        html = show_weights(PLAIN, ids, [("layer 1", weights)], here)
        assert html.count("title=") == TOKENS_SHOWN
        assert f"layer 1; tokens {first:,} to {last:,} of 2,500 are shown, the others have 20% of the weight" in html
        places = [place for place, span in enumerate(re.findall("<span[^>]*title[^>]*>", html)) if "here" in span]
        assert places == [here + 1 - first]
    assert "are shown" not in show_weights(PLAIN, ids[:TOKENS_SHOWN], [("layer 1", weights[:TOKENS_SHOWN])], 0)


# What tokens are to a person who reads them


@pytest.mark.parametrize(
    "data, pieces",
    [
        (f"a\u00e9{OCTOPUS}\n".encode(), [("a", 1), ("\u00e9", 2), (OCTOPUS, 4), ("\n", 1)]),
        (b"\xf0", [(r"\xf0", 1)]),
        (b"\xf0\x9f\x90", [(r"\xf0", 1), (r"\x9f", 1), (r"\x90", 1)]),
        (b"\xf0a\xc3\xa9", [(r"\xf0", 1), ("a", 1), ("\u00e9", 2)]),
        (b"\x90\xf0\x9f\x90\x99", [(r"\x90", 1), (OCTOPUS, 4)]),
        ("\ufffd".encode(), [("\ufffd", 3)]),
        (b"", []),
    ],
)
def test_characters_where_bytes_are_whole(data, pieces):
    ids = [PLAIN.convert_tokens_to_ids(PLAIN.backend_tokenizer.id_to_token(byte)) for byte in data]
    assert ids == list(data)  # a token a byte
    assert readable(PLAIN, ids) == pieces


def test_tokens_of_several_characters_and_no_bytes():
    tokenizer = build_tokenizer("bpe", [f"ab {OCTOPUS} \u00e9"] * 30, vocab_size=280)
    ids = tokenizer(f"ab {OCTOPUS} \u00e9{OCTOPUS}")["input_ids"]
    pieces = readable(tokenizer, ids)
    assert "".join(text for text, _ in pieces) == f"ab {OCTOPUS} \u00e9{OCTOPUS}"
    assert sum(number for _, number in pieces) == len(ids) and "ab" in pieces[0][0]
    assert readable(tokenizer, [tokenizer.eos_token_id, 99_999]) == [(tokenizer.eos_token, 1), ("", 1)]


def test_tokenizers_that_know_no_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"two": 0, "words": 1}, unk_token="two"))
    words.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert readable(AutoTokenizer.from_pretrained(tmp_path), [0, 1]) == [("two", 1), ("words", 1)]


def test_bytes_of_a_split_character(leap, grid):
    html = look(leap, f"a{OCTOPUS}b", position=3)
    layer = re.search(r'<div class="weights">(.*?)</div>', html, re.DOTALL)[1]
    spans = re.findall(r"<span( class=\"here\")? title=\"(.*?)\".*?>(.*?)</span>", layer)
    assert [(bool(here), text) for here, _, text in spans] == [(False, "a"), (True, OCTOPUS), (False, "b")]
    whole, *parts = (float(number) for number in re.findall(r"\d\.\d+", spans[1][1]))
    assert len(parts) == 4 and whole == pytest.approx(sum(parts), abs=3e-4) and spans[1][1].endswith("of 4 tokens")

    ids = [*OCTOPUS.encode(), 10, 0xF0, 97, PLAIN.eos_token_id, 0x9F]
    processor = SimpleNamespace(tokenizer=PLAIN)
    assert characters_to_show(processor, ids) == ["", "", "", OCTOPUS, "\n", r"\xf0", "a", "", r"\x9f"]

    mask, blank = TOKENIZER.mask_token_id, grid.processor.blank_token_id
    page = torch.tensor(
        [[97, *OCTOPUS.encode()[:2]], [*OCTOPUS.encode()[2:], blank], [0xC3, mask, 0xA9], [10, 9, blank]]
    )
    html = show_page(grid.processor, page[None], "")
    rows = [re.findall("<i.*?>(.*?)</i>", row) for row in re.findall("<div><i.*?</div>", html)]
    assert rows == [["a", OCTOPUS, " "], [" "] * 3, ["c3", " ", "a9"], ["\u21b5", "\u00b7", " "]]
    assert html.count('class="given byte"') == 2 and "a byte that forms no character" in html


def test_tracks_of_a_long_text_are_shown_in_part():
    ids = PLAIN("".join(f"x{line:04}\n" for line in range(1500)) + "end")["input_ids"]
    output = SimpleNamespace(sequences=torch.tensor([ids]), axis_sequences=torch.zeros(1, 2, len(ids), dtype=int))
    html = show_tracks(AXES, output)
    lines = re.findall('<div class="text">(.*?)</div>', html)
    assert len(lines) == LINES_SHOWN and lines[0].strip() == "x1201" and lines[-1].strip() == "end"
    assert html.count('class="track"') == 2 * LINES_SHOWN
    assert "Lines 1,202 to 1,501 of 1,501 are shown" in html
    short = SimpleNamespace(sequences=output.sequences[:, :60], axis_sequences=output.axis_sequences[..., :60])
    assert "are shown" not in show_tracks(AXES, short)


# Colours


def contrast(one, other):
    """By WCAG 2, of colours `(red, green, blue)` from 0 to 255."""
    light = []
    for colour in (one, other):
        linear = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour]
        light.append(sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear)) + 0.05)
    return max(light) / min(light)


def parts_of(colour):
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


@pytest.mark.parametrize("scheme", [":root", ".dark"])
def test_colours_of_both_schemes_can_be_read(scheme):
    declared = dict(re.findall(r"--(\w+): (.*?);", re.search(rf"{re.escape(scheme)} \{{(.*?)\}}", CSS, re.DOTALL)[1]))
    paper, ink, track = (parts_of(declared[name]) for name in ("paper", "ink", "track"))
    heat = [int(part) for part in declared["heat"].split()]
    assert contrast(ink, paper) >= 4.5 and contrast(track, paper) >= 4.5
    for weight in range(101):
        blended = [weight / 100 * full + (1 - weight / 100) * none for full, none in zip(heat, paper)]
        assert contrast(ink, blended) >= 4.5, weight
    assert contrast(parts_of(declared["here"]), paper) >= 3 <= contrast(parts_of(declared["here"]), heat)  # a frame


def test_ink_of_written_cells_can_be_read():
    colours = {colour for steps in (1, 2, 16, 64, 1024) for colour in step_colours(steps)}
    colours |= {f"#{red:02x}{green:02x}{blue:02x}" for red in (0, 120) for green in range(256) for blue in (0, 90)}
    assert all(contrast(parts_of(colour), parts_of(ink_on(colour))) >= 4.5 for colour in colours)
    assert {ink_on(colour) for colour in step_colours(16)} == {"#000000", "#ffffff"}


def test_colours_of_ours_outrank_those_of_gradio():
    """`.prose *` of gradio's sets the colour of each element below an HTML block."""
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", CSS)
    coloured = [selector.strip() for selector, body in rules if re.search(r"(^|[;\s])color:", body)]
    assert len(coloured) >= 5
    assert all(part.strip().startswith("#") for selector in coloured for part in selector.split(","))


# Errors in the words of the page


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("leap", lambda it: look(it, PROMPT, head=5), r"^Head must lie between 0 and \d, got 5\.$"),
        ("leap", lambda it: look(it, PROMPT, head=-1), r"^Head must lie between 0 and \d, got -1\.$"),
        (
            "leap",
            lambda it: look(it, PROMPT, position=11),
            r"^Position that attends must lie between 0 and 10, got 11\.$",
        ),
        ("leap", lambda it: look(it, PROMPT, position=-1), "^Position that attends must"),
        ("leap", lambda it: look(it, ""), "^The prompt is empty"),
        ("leap", lambda it: list(write(it, "")), "^The prompt is empty"),
        ("leap", lambda it: list(write(it, PROMPT, seed=-1)), "^Seed must lie between 0 and 4,294,967,295, got -1"),
        ("leap", lambda it: list(write(it, PROMPT, seed=2**32)), "^Seed must lie between"),
        ("absolute", lambda it: look(it, "a" * 513), "513 tokens, and this model has 512 positions"),
        (
            "absolute",
            lambda it: list(write(it, "a" * 500, 14)),
            "500 tokens and 14 new ones, .* 512 positions: .* fewer new tokens",
        ),
        ("axes", lambda it: list(write(it, "a" * 100, 30)), "100 tokens and 30 new ones, .* 128 positions"),
        ("heptapod", lambda it: typed_page(it, "no hole"), f"^No cell is masked: put {MASK}"),
        ("heptapod", lambda it: typed_page(it, "\n" * 9 + MASK), "takes 10 rows of 12 cells, and the page has 5"),
        ("heptapod", lambda it: typed_page(it, MASK * 61), "takes 6 rows of 12 cells"),
        ("heptapod", lambda it: typed_page(it, "\0"), "zero byte"),
        ("heptapod", lambda it: list(fill(it, PAGE, seed=-1)), "^Seed must lie"),
        ("heptapod", lambda it: load(""), "^No model is chosen"),
    ],
)
def test_errors_speak_of_what_is_on_the_page(folders, name, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(load(str(folders / name)))
    assert not re.search(r"`|_|=|overflow|paginate", str(error.value))


def test_all_places_of_a_model_can_be_filled(folders):
    *_, (text, _) = write(load(str(folders / "absolute")), "a" * 500, 13)  # the last token needs none
    assert len(text) > 500


def test_a_prompt_of_more_tokens_than_xpos_takes_at_once_is_read_in_parts():
    model = tiny_hierarchical_lm(use_xpos=True, xpos_scale_base=1, **COMMON)
    with pytest.raises(ValueError, match="fit in one pass"):
        model.generate(**PLAIN("a" * 100, return_tensors="pt"), max_new_tokens=2)
    *_, (text, _) = write(Loaded(model, PLAIN), "a" * 100, 6, 0)
    assert text.startswith("a" * 100) and len(text) > 100


def test_errors_reach_the_page():
    fields = [SimpleNamespace(label="Model"), SimpleNamespace(label="Seed <1>")]

    def fails(error):
        def function(*_):
            yield 1
            raise error

        with pytest.raises(gradio.Error) as raised:
            list(_on_page(function, fields)("folder", 1))
        return raised.value.message, raised.value.print_exception

    assert fails(ValueError("<b> is no text")) == ("&lt;b&gt; is no text", False)
    assert fails(OSError("disk")) == ("disk", False)
    assert fails(KeyError("x")) == ("KeyError: &#x27;x&#x27; (the terminal has the traceback)", True)
    with pytest.raises(gradio.Error) as raised:
        list(_on_page(None, fields)("folder", None))
    assert raised.value.message == "Seed &lt;1&gt; is not filled in."


def shown_of(folder):
    """What the page shows when this folder is loaded, by the ids of elements."""
    app = build_app([])
    show = next(function.fn for function in app.fns.values() if function.name == "show")
    return {component.elem_id: value for component, value in show(folder).items() if component.elem_id}


def test_what_is_shown_of_a_model(folders):
    """As many lines as a page has; errors of loading beside what is there."""
    shown = shown_of(str(folders / "heptapod"))
    assert shown["read"]["lines"] == shown["read"]["max_lines"] == shown["page_text"]["lines"] == HEIGHT
    assert "HeptapodForMaskedLM" in shown["about"]
    message = "<b>/&lt;nowhere&gt; was not loaded.</b> there is no folder /&lt;nowhere&gt;"
    shown = shown_of("/<nowhere>")
    assert list(shown) == ["about"] and shown["about"].startswith(message)
    message = "<b>Nothing was loaded.</b> No model is chosen: choose one, or type its folder."
    assert shown_of(None) == shown_of("") == {"about": message}


@pytest.mark.parametrize(
    ("option", "table", "entry"),
    [
        pytest.param(option, table, entry, id=f"{option}-{entry}")
        for option, table in (("region", REGIONS), ("sampler", SAMPLERS), ("mask_schedule", MASK_SCHEDULES))
        for entry in (*table, "new entry")
    ],
)
def test_entries_of_the_tables_are_on_the_page(folders, grid, monkeypatch, option, table, entry):
    if entry not in table:
        monkeypatch.setitem(table, entry, next(iter(table.values())))
    choices = shown_of(str(folders / "heptapod"))[option]["choices"]
    assert entry in choices and choices[-len(table) :] == list(table)
    *_, (html, _) = fill(grid, PAGE, **{option: entry})
    assert html.count('class="unmasked') >= 6 and 'class="masked"' not in html  # some are bytes that form no character


def test_a_grid_with_the_code_of_an_earlier_version_is_not_shown(folders, monkeypatch):
    monkeypatch.delattr("modeling_heptapod.heptapod.samplers.SAMPLERS")
    message = shown_of(str(folders / "heptapod"))["about"]
    assert "was not loaded" in message and "the code of an earlier version" in message


def test_what_keeps_a_model_from_being_loaded_is_told(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders / "leap", tmp_path / "leap")
    (tmp_path / "leap" / "model.safetensors").write_bytes(b"no weights")
    message = shown_of(str(tmp_path / "leap"))["about"]
    assert "was not loaded" in message and "model.safetensors is damaged" in message
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr("demo_app.load", lambda *_: {}["<layer>"])  # nobody thought of it
    message = shown_of(str(tmp_path / "leap"))["about"]
    assert message.endswith("KeyError: &#x27;&lt;layer&gt;&#x27; (the terminal has the traceback)")
    assert "Traceback" in capsys.readouterr().err


def test_axes_that_look_ahead_are_not_annotated(folders, monkeypatch):
    folder = str(folders / "axes")
    assert shown_of(folder)["axis_source"]["choices"] == ["predicted", "annotated"]
    monkeypatch.setattr(type(load(folder).processor.axes[0]), "causal", False)
    assert shown_of(folder)["axis_source"]["choices"] == ["predicted"]


def test_typed_holes_are_open_cells(grid):
    page = typed_page(grid, PAGE)
    is_masked = page == TOKENIZER.mask_token_id
    assert page.shape == (1, HEIGHT, WIDTH) and is_masked.sum() == 6 and is_masked[0, 1, 4:10].all()
    assert grid.processor.decode(page[0]) == PAGE
    assert (typed_page(grid, PAGE, "bottom") == TOKENIZER.mask_token_id)[0, -2:].all()


def cells_of(html):
    return re.findall(r'<i class="(.*?)"(?: style="background:(.*?)")?>', html)


def test_a_page_forms_and_keeps_what_was_given(grid):
    frames = list(fill(grid, PAGE, max_denoising_steps=3))
    kinds = [[kind for kind, _ in cells_of(html)] for html, _ in frames]
    assert [row.count("masked") for row in kinds] == [6, 5, 3, 0]
    assert all(row.count("given") == HEIGHT * WIDTH - 6 for row in kinds)
    colours = {colour for _, colour in cells_of(frames[-1][0]) if colour}
    assert len(colours) == 3  # one for each denoising step
    filled = grid.model.generate(typed_page(grid, PAGE), max_denoising_steps=3)
    assert frames[-1][1] == grid.processor.decode(filled[0])


def test_long_runs_are_shown_in_part(grid):
    frames = list(fill(grid, PAGE, "all", "raster"))
    done = [int(re.search(r"(\d+) denoising steps", html)[1]) for html, _ in frames]
    assert done[: ALL_SHOWN + 1] == [*range(ALL_SHOWN), ALL_SHOWN] and done[ALL_SHOWN + 1 :][:2] == [26, 28]
    assert done[-1] == HEIGHT * WIDTH > len(frames) and done == sorted(set(done))
    assert [kind for kind, _ in cells_of(frames[-1][0])].count("masked") == 0


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
    with pytest.raises(ValueError, match="sampler"):
        list(fill(grid, PAGE, sampler="guessed"))


def test_what_does_not_write_is_not_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="LeapForMaskedLM, which does not generate"):
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
    assert len(saved_folders(str(folders))) == 8
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
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # the machine may be busy
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


# The text of an element, its colour and the opaque colour behind it, which may be blended of several.
COLOURS = """selector => [...document.querySelectorAll(selector)].map(element => {
    const parts = text => text.match(/[\\d.]+/g).map(Number);
    let behind = [];
    for (let at = element; at; at = at.parentElement) behind.push(parts(getComputedStyle(at).backgroundColor));
    const colour = behind.reverse().reduce((below, [red, green, blue, alpha = 1]) =>
        [red, green, blue].map((part, place) => alpha * part + (1 - alpha) * below[place]), [255, 255, 255]);
    return [parts(getComputedStyle(element).color), colour, element.textContent];
})"""
WRITTEN = "([least]) => document.querySelector('#written textarea').value.length > least"
FROM_THE_END = """() => {
    const box = document.querySelector('#written textarea');
    return [box.scrollHeight - box.clientHeight - box.scrollTop, box.scrollHeight - box.clientHeight];
}"""
AT_THE_END = f"() => {{ const [distance, scrolled] = ({FROM_THE_END})(); return distance < 40 && scrolled > 40; }}"


def assert_readable(page, *selectors):
    for selector in selectors:
        shown = page.evaluate(COLOURS, selector)
        assert shown
        for ink, behind, text in shown:
            assert contrast(ink, behind) >= 4.5, (selector, text, ink, behind)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_a_browser(page, folders, scheme):
    from playwright.sync_api import expect

    page, _ = page
    page.emulate_media(color_scheme=scheme)
    page.reload()
    expect(page.locator("#about")).to_contain_text("LeapForCausalLM")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    page.fill("#prompt textarea", PROMPT)
    page.fill("#new_tokens input[type=number]", "30")
    page.click("#look")
    expect(page.locator("#looked .layer")).to_have_count(4)
    assert_readable(page, "#looked .weights span", "#looked .about", "#looked .legend", "#about b")

    pick(page, folders / "axes")
    expect(page.locator("#about")).to_contain_text("MultiGridForCausalLM")
    page.click("#write")
    expect(page.locator("#tracks .track").first).to_be_visible()
    assert_readable(page, "#tracks .text", "#tracks .track", "#tracks .legend li", "#tracks .legend code")

    pick(page, folders / "heptapod")
    expect(page.locator("#about")).to_contain_text("HeptapodForMaskedLM")
    page.fill("#page_text textarea", PAGE)
    page.click("#fill")
    expect(page.locator("#formed i[style]")).to_have_count(6)
    assert_readable(page, "#formed i.given", "#formed i[style]", "#formed .about", "#formed .legend")


@pytest.mark.slow
def test_long_texts_in_a_browser(page, folders, monkeypatch):
    """The end is in sight while text is written, unless one has scrolled away from it; no block grows without bound."""
    from playwright.sync_api import expect

    put = TextIteratorStreamer.put

    def put_slowly(streamer, value):
        time.sleep(0.02)  # a browser on a busy machine is not to see the text complete at once
        put(streamer, value)

    monkeypatch.setattr(TextIteratorStreamer, "put", put_slowly)
    page, _ = page
    expect(page.locator("#about")).to_contain_text("LeapForCausalLM")
    prompt = PROMPT * 60
    page.fill("#prompt textarea", prompt)
    page.fill("#new_tokens input[type=number]", "1000")
    page.click("#write")
    for more in (20, 60):
        page.wait_for_function(WRITTEN, arg=[len(prompt) + more])
        page.wait_for_function(AT_THE_END)
    page.evaluate("document.querySelector('#written textarea').scrollTop = 0")
    length = page.evaluate("document.querySelector('#written textarea').value.length")
    page.wait_for_function(WRITTEN, arg=[length + 20])
    distance, scrolled = page.evaluate(FROM_THE_END)
    assert distance == scrolled > 40
    page.click("#stop")
    page.fill("#new_tokens input[type=number]", "10")
    page.click("#write")  # another text: from its end again
    page.wait_for_function(
        "([most]) => document.querySelector('#written textarea').value.length < most", arg=[len(prompt) + 20]
    )
    page.wait_for_function(AT_THE_END)

    page.click("#look")
    expect(page.locator("#looked .layer")).to_have_count(4)
    assert page.locator("#looked").bounding_box()["height"] < 4 * 900
    pick(page, folders / "axes")
    expect(page.locator("#about")).to_contain_text("MultiGridForCausalLM")
    page.fill("#prompt textarea", "x\n" * 50)
    page.click("#write")
    expect(page.locator("#tracks .text").first).to_be_attached()
    assert page.locator("#tracks .tracks").bounding_box()["height"] < 0.75 * page.viewport_size["height"]
    box = "document.querySelector('#tracks .tracks')"
    assert page.evaluate(f"{box}.scrollHeight > {box}.clientHeight")


@pytest.mark.slow
def test_cells_are_opened_in_a_browser(page, folders):
    from playwright.sync_api import expect

    page, _ = page
    pick(page, folders / "heptapod")
    expect(page.locator("#about")).to_contain_text("HeptapodForMaskedLM")
    select = "([from, to]) => document.querySelector('#page_text textarea').setSelectionRange(from, to)"
    page.fill("#page_text textarea", f"a = 1{OCTOPUS}\nb\n")
    for place, opened in (
        ((0, 0), f"{MASK}a = 1{OCTOPUS}\nb\n"),
        ((1, 2), f"{MASK * 2} = 1{OCTOPUS}\nb\n"),
        ((5, 10), f"{MASK * 2} = {MASK * 2}\n{MASK}\n"),
    ):
        page.evaluate(select, place)
        page.click("#mask_cells")
        assert page.input_value("#page_text textarea") == opened
    page.keyboard.type("c")  # the cursor is behind what was opened
    assert page.input_value("#page_text textarea") == f"{MASK * 2} = {MASK * 2}\n{MASK}c\n"
    page.click("#fill")  # what was opened reaches the handler
    expect(page.locator("#formed i[style]")).to_have_count(5)
    assert page.input_value("#read textarea").count("\n") >= 2


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
    expect(page.locator("#formed i.masked").first).to_be_visible()
    expect(page.locator("#formed i")).to_have_count(HEIGHT * WIDTH)
    expect(page.locator("#formed i.masked")).to_have_count(0)
    expect(page.locator("#formed i[style]")).to_have_count(6)
    assert page.input_value("#read textarea").startswith("def f(x):\n    ")

    page.fill("#page_text textarea", "nothing open")
    page.click("#fill")
    expect(page.locator(".toast-body")).to_contain_text("No cell is masked")
    page.fill("#page_seed input", "")
    page.click("#fill")
    expect(page.locator(".toast-body").last).to_contain_text("Seed is not filled in.")
    assert len(hosts) == 1 and next(iter(hosts)).startswith("127.0.0.1")
