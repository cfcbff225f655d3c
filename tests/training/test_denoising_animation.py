"""training/denoising_animation.py: the files are there, and every cell has the colour of the iteration that wrote it."""

import numpy as np
import pytest
import torch
from corpora import build_tokenizer
from denoising_animation import GIVEN, OFF_PAGE, OPEN, draw_page
from matplotlib import colormaps
from PIL import Image, ImageDraw

from modeling_heptapod import HeptapodProcessor


@pytest.fixture(scope="module")
def processor():
    return HeptapodProcessor(build_tokenizer("byte", [], for_pages=True))


@pytest.fixture
def history(processor):
    """Two rows of four: a given cell, three written in turn of which one is taken back, one off the page."""
    mask, pad, blank = processor.tokenizer.mask_token_id, processor.tokenizer.pad_token_id, processor.blank_token_id
    page = [[ord("a"), mask, mask, mask], [10, blank, ord("b"), pad]]
    pages = [page]
    for column, token in [(1, ord("x")), (2, 0xFF), (1, mask), (3, ord("y")), (1, ord("z"))]:
        page = [list(row) for row in page]
        page[0][column] = token
        pages.append(page)
    return torch.tensor(pages)


def colours_of(frame, rows=2, columns=4):
    """The background of each cell: the colour beside its right border."""
    pixels = np.asarray(frame)
    high, wide = (frame.height - 1) // rows, (frame.width - 1) // columns
    return [[tuple(pixels[r * high + high - 2, c * wide + wide - 2]) for c in range(columns)] for r in range(rows)]


def test_cells_have_the_colour_of_their_iteration(processor, history):
    frames = draw_page(history, processor)
    assert len(frames) == 6
    viridis = [tuple(int(255 * x) for x in colour[:3]) for colour in colormaps["viridis"](np.linspace(0, 1, 5))]
    expected = [GIVEN, OPEN, OPEN, OPEN]
    for step, (column, colour) in enumerate(
        [(0, GIVEN), (1, viridis[0]), (2, viridis[1]), (1, OPEN), (3, viridis[3]), (1, viridis[4])]
    ):
        expected[column] = colour
        first, second = colours_of(frames[step])
        assert first == expected, step
        assert second == [GIVEN, GIVEN, GIVEN, OFF_PAGE]


def test_files(processor, history, tmp_path, monkeypatch):
    gif, strip, texts, text = tmp_path / "infilling.gif", tmp_path / "infilling.png", [], ImageDraw.ImageDraw.text

    def noting_text(canvas, place, said, *more):
        texts.append(said)
        return text(canvas, place, said, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting_text)
    frames = draw_page(history.numpy(), processor, gif, strip, panels=3, seconds=1.2)
    with Image.open(gif) as animation:
        assert animation.n_frames == 6 and animation.size == frames[0].size and animation.info["loop"] == 0
        durations = []
        for frame in range(6):
            animation.seek(frame)
            durations.append(animation.info["duration"])
    assert durations == [200] * 5 + [2000]
    assert [said for said in texts if "of" in said] == ["0 of 5", "2 of 5", "5 of 5"]
    with Image.open(strip) as picture:
        assert picture.width > 3 * frames[0].width and picture.height > frames[0].height


def test_long_trajectories_are_thinned_out(processor):
    pages = torch.full((301, 3, 3), ord("a"))
    assert len(draw_page(pages, processor, max_frames=10)) == 10
    assert len(draw_page(pages[:1], processor)) == 1


def test_only_pages_that_are_shown_are_kept(processor, tmp_path, monkeypatch):
    """A page in raster order has as many steps as cells; one picture of each fills the memory."""
    mask = processor.tokenizer.mask_token_id
    pages = torch.full((129, 8, 16), mask)
    for step in range(1, 129):
        pages[step:].view(-1, 128)[:, step - 1] = ord("a") + step % 26
    every = draw_page(pages, processor, max_frames=129)
    copies, copy = [], Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda picture: copies.append(1) or copy(picture))
    frames = draw_page(pages, processor, strip=tmp_path / "infilling.png", max_frames=10, panels=4)
    assert len(copies) <= 14
    assert len({frame.tobytes() for frame in frames}) == 10
    for step, frame in zip([round(x) for x in np.linspace(0, 128, 10)], frames):
        assert frame.tobytes() == every[step].tobytes(), step


def test_tokens_of_several_letters_fit(processor, tmp_path):
    tokenizer = build_tokenizer("bpe", ["return return return"] * 9, vocab_size=280, for_pages=True)
    processor = HeptapodProcessor(tokenizer)
    pages = processor("return x\n", height=2, width=4).input_ids
    wide = draw_page(pages, processor)[0]
    narrow = draw_page(processor("x\n", height=2, width=4).input_ids, processor)[0]
    assert wide.width > 2 * narrow.width and wide.height == narrow.height


def test_a_batch_is_no_page(processor):
    with pytest.raises(ValueError, match=r"`history` must be .*\[2, 1, 3, 4\]"):
        draw_page(torch.zeros(2, 1, 3, 4), processor)
