"""Animations of denoised pages: cells in the colour of the denoising step that unmasked them.

    output = model.generate(**page, return_dict_in_generate=True, output_history=True)
    draw_page(output.history[:, 0], processor, "infilling.gif", "infilling.png")

Needs the extra `plots` (matplotlib for the colours and the font, pillow for the drawing).
"""

from argument_checks import need


need("plots", "matplotlib", "PIL")

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont


GIVEN, OPEN, OFF_PAGE = (255, 255, 255), (205, 205, 205), (120, 120, 120)
INK, PALE_INK = (20, 20, 20), (245, 245, 245)


def draw_page(
    history,
    processor,
    gif: str | Path | None = None,
    strip: str | Path | None = None,
    font_size: int = 13,
    max_frames: int = 60,
    panels: int = 4,
    seconds: float = 5.0,
) -> list[Image.Image]:
    """Draw one page of `generate`'s history as an animation and as a strip of pictures.

    White cells are the prompt, grey ones are masked, coloured ones are unmasked: from dark blue in the first denoising step
    to yellow in the last. A cell that is remasked turns grey again.

    Args:
        history: token ids `[steps + 1, height, width]`, a tensor or an array: the page before the first
            denoising step and after each.
        processor: the `HeptapodProcessor` of the page.
        gif, strip: files to write, an animated GIF and a PNG.
        font_size: size in pixels.
        max_frames: number of pages shown of a longer history, evenly spaced.
        panels: number of pages in the strip, the first and the last included.
        seconds: length of the animation; its last page is shown two seconds longer.

    Returns:
        The frames.

    Raises:
        ValueError: for a history of another shape.
    """
    pages = np.asarray(history.cpu() if hasattr(history, "cpu") else history)
    if pages.ndim != 3 or 0 in pages.shape:
        raise ValueError(f"`history` must be [steps + 1, height, width] of one page, got {list(pages.shape)}.")
    last = len(pages) - 1
    shown, in_strip = _evenly(last, max_frames), _evenly(last, panels)
    frames = _draw(pages, processor, font_size, {*shown, *in_strip})
    if gif is not None:
        durations = [round(1000 * seconds / len(shown))] * (len(shown) - 1) + [2000]
        first, *others = (frames[step] for step in shown)
        first.save(gif, save_all=True, append_images=others, duration=durations, loop=0)
    if strip is not None:
        _side_by_side([(step, frames[step]) for step in in_strip], last, font_size).save(strip)
    return [frames[step] for step in shown]


def _evenly(last, number):
    """At most `number` of the steps 0 to `last`, both included."""
    return sorted({round(step) for step in np.linspace(0, last, max(2, number))})


def _draw(pages, processor, font_size, kept):
    """Pictures of the pages in `kept`; only changed cells are drawn in each step."""
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), font_size)
    texts = {int(token): cell_text(int(token), processor) for token in np.unique(pages)}
    longest = min(max(map(len, texts.values())), 8)
    cell_width, cell_height = round(longest * font.getlength("0")) + 2, round(font_size * 1.35)
    height, width = pages.shape[1:]
    picture = Image.new("RGB", (width * cell_width + 1, height * cell_height + 1), OFF_PAGE)
    colours = (colormaps["viridis"](np.linspace(0, 1, max(2, len(pages) - 1)))[:, :3] * 255).astype(int)
    canvas, frames = ImageDraw.Draw(picture), {}
    for step, page in enumerate(pages):
        changed = page != pages[step - 1] if step else np.ones_like(page, dtype=bool)
        for row, column in np.argwhere(changed):
            token = int(page[row, column])
            if token == processor.tokenizer.pad_token_id:
                continue
            background = GIVEN if step == 0 else tuple(colours[step - 1])
            if token == processor.tokenizer.mask_token_id:
                background = OPEN
            left, top = column * cell_width, row * cell_height
            canvas.rectangle((left, top, left + cell_width, top + cell_height), background, outline=OPEN)
            ink = INK if sum(background) > 330 else PALE_INK
            canvas.text((left + 1, top + 1), texts[token][:longest], ink, font)
        if step in kept:
            frames[step] = picture.copy()
    return frames


def cell_text(token, processor):
    """Text of a cell: empty for blanks and masked cells, an arrow for a newline, a dot for an unprintable character."""
    if token in (processor.blank_token_id, processor.tokenizer.mask_token_id):
        return ""
    if token == processor.newline_token_id:
        return "\u21b5"
    text = processor.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return "".join(c if c.isprintable() and c != "\ufffd" else "\u00b7" for c in text)


def _side_by_side(numbered, last, font_size):
    """Pictures next to each other, each below its step."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), font_size)
    width, height = numbered[0][1].size
    gap, caption = font_size, round(font_size * 1.8)
    strip = Image.new("RGB", (len(numbered) * (width + gap) - gap, height + caption), GIVEN)
    for place, (step, picture) in enumerate(numbered):
        left = place * (width + gap)
        ImageDraw.Draw(strip).text((left, 2), f"{step} of {last}", INK, font)
        strip.paste(picture, (left, caption))
    return strip
