"""HTML of the demo page: text with its axis ids, weights of tokens, pages of cells, legends and CSS.

The colours of the light and the dark scheme are variables of the CSS. Unmasked cells have the colour of their step, and the
text colour with more contrast to it.
"""

import re
from html import escape

import torch
from matplotlib import colormaps
from sample_axes import characters_to_show, letters_for, lines_with_tracks
from token_text import one_column_each, readable


# Gradio sets the colour of every element below an HTML block; a selector that begins with the block's id takes precedence.
CSS = """
:root { --paper: #ffffff; --ink: #141414; --edge: #bbbbbb; --grid: #e4e4e4; --stripe: #c4c4c4; --track: #7a3f00;
    --heat: 245 140 80; --here: #0f35b0; }
.dark { --paper: #17181c; --ink: #f2f2f2; --edge: #55565c; --grid: #2b2c31; --stripe: #4a4b52; --track: #f5b971;
    --heat: 165 62 10; --here: #b4caff; }
#formed .page, #tracks .tracks, #looked .weights { font-family: "DejaVu Sans Mono", ui-monospace, monospace; font-size: 13px;
    color: var(--ink); background: var(--paper); border: 1px solid var(--edge); border-radius: 6px; padding: 10px; overflow: auto; }
#formed .page, #tracks .tracks { max-height: 70vh; }
#formed .rows { display: table; }
#formed .rows > div { display: table-row; }
#formed .rows i { display: table-cell; font-style: normal; min-width: 1.25ch; width: 1.25ch; height: 1.45em; line-height: 1.45em;
    text-align: center; white-space: pre; color: var(--ink); box-shadow: inset 0 0 0 0.5px var(--grid); }
#formed i.masked, #formed .swatch.masked { background: repeating-linear-gradient(45deg, var(--stripe), var(--stripe) 3px, var(--paper) 3px,
    var(--paper) 6px); }
#formed i.byte { font-size: 8px; }
#formed .rows i.byte { min-width: 0; width: auto; }
#tracks .tracks div { white-space: pre; }
#tracks .text { margin-top: 4px; font-weight: 600; line-height: 1.35; color: var(--ink); }
#tracks .track { line-height: 1.15; color: var(--track); }
#looked .looks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 10px; }
#looked .weights { max-height: 40vh; white-space: pre-wrap; line-height: 1.6; overflow-wrap: anywhere; }
#looked .weights span { color: var(--ink); background: rgb(var(--heat) / var(--weight)); }
#looked .here { outline: 2px solid var(--here); outline-offset: -1px; }
.about, .legend { font-size: 13px; margin: 6px 2px; }
.legend li { margin: 2px 0; }
.legend .swatch { display: inline-block; width: 1.6em; height: 1.1em; vertical-align: text-bottom; margin: 0 4px 0 12px;
    border: 1px solid var(--edge); background: var(--paper); }
.legend .swatch:first-child { margin-left: 0; }
.legend .digits { font-size: 8px; text-align: center; width: 2em; height: 1.6em; }
.legend .wide { width: 6em; }
#looked .swatch.wide { background: linear-gradient(to right, rgb(var(--heat) / 0), rgb(var(--heat) / 1)), var(--paper); }
textarea { font-family: "DejaVu Sans Mono", ui-monospace, monospace !important; font-size: 13px !important; }
"""
BYTE_LEGEND = '<span class="swatch digits">e2</span>a byte that forms no character'
LINES_SHOWN = 300  # of text with axes
TOKENS_SHOWN = 2000  # of a text whose weights are shown
BYTE = re.compile(r"\\x[0-9a-f]{2}")  # as `readable` writes a byte that forms no character


def show_tracks(processor, output) -> str:
    """The last lines of a text, each above its axis ids, and a legend of the letters.

    Args:
        processor: a `MultiGridProcessor`.
        output: output of `generate`; its first row is shown.
    """
    characters = characters_to_show(processor, output.sequences[0].tolist())
    lines = lines_with_tracks(processor, characters, output.axis_sequences[0].tolist()).split("\n")
    names = {axis.name for axis in processor.axes}
    is_track = [line.split(" ", 1)[0] in names for line in lines]
    text_lines = [place for place, track in enumerate(is_track) if not track]
    total, first = len(text_lines), max(0, len(text_lines) - LINES_SHOWN)
    rows = [
        f'<div class="{"track" if track else "text"}">{escape(line) or "&nbsp;"}</div>'
        for line, track in list(zip(lines, is_track))[text_lines[first] :]
    ]
    caption = f"Lines {first + 1:,} to {total:,} of {total:,} are shown, each above its axis ids." if first else ""
    legend = []
    for axis in processor.axes:
        letters = letters_for(axis.vocabulary)
        entries = ", ".join(
            f"<code>{escape(letter)}</code>{'' if letter == name else ' ' + escape(name)}"
            for letter, name in zip(letters[1:], axis.vocabulary[1:])
        )
        legend.append(f"<li><b>{escape(axis.name)}</b>: {entries}; blank: {escape(axis.vocabulary[0])}</li>")
    return (
        f'<div class="about">{caption}</div><div class="tracks">{"".join(rows)}</div>'
        f'<ul class="legend">{"".join(legend)}</ul>'
    )


def show_weights(tokenizer, ids: list[int], layers: list[tuple[str, list[float]]], here: int) -> str:
    """The weights of all tokens at one position in each layer, as the strength of their background.

    Tokens that form a character together are one piece, and their weights are added.

    Args:
        tokenizer: tokenizer of the text.
        ids: token ids of the text.
        layers: title of each layer, and the weights of all tokens in it.
        here: index of the token that attends.
    """
    first = max(0, min(here + 1, len(ids)) - TOKENS_SHOWN)
    last = min(len(ids), first + TOKENS_SHOWN)
    pieces = readable(tokenizer, ids[first:last])
    parts = []
    for name, weights in layers:
        about, total = escape(name), sum(weights)
        if last - first < len(ids):
            rest = total - sum(weights[first:last])
            about += (
                f"; tokens {first + 1:,} to {last:,} of {len(ids):,} are shown, the others have {rest / (total or 1.0):.0%} "
                "of the weight"
            )
        shown = _heat(pieces, weights[first:last], here - first)
        parts.append(f'<div class="layer"><div class="about">{about}</div><div class="weights">{shown}</div></div>')
    legend = (
        '<div class="legend"><span class="swatch wide"></span>from no weight to the largest of the layer'
        '<span class="swatch here"></span>the token that attends</div>'
    )
    return f'{legend}<div class="looks">{"".join(parts)}</div>'


def _heat(pieces, weights, here):
    start, shown = 0, []
    for text, number in pieces:
        shown.append((text, weights[start : start + number], start <= here < start + number))
        start += number
    strongest = max((sum(each) for _, each, _ in shown), default=0.0) or 1.0
    spans = []
    for text, each, looks in shown:
        title = f"{sum(each):.4f}"
        if len(each) > 1:
            title += f" = {' + '.join(f'{weight:.4f}' for weight in each)}, of {len(each)} tokens"
        kind = ' class="here"' if looks else ""
        style = f"--weight:{sum(each) / strongest:.2f}"
        text = escape(text).replace("\n", "\u21b5\n")
        spans.append(f'<span{kind} title="{title}" style="{style}">{text}</span>')
    return "".join(spans)


def show_page(processor, pages: torch.LongTensor, caption: str) -> str:
    """The last of `pages [steps + 1, height, width]`, its cells in the colour of the denoising step that unmasked them, dark first.

    A character of several tokens is shown in the first of its cells; the others are empty.
    """
    mask, num_steps = processor.tokenizer.mask_token_id, len(pages) - 1
    changed = (pages[1:] != pages[:-1]).int()
    steps = torch.arange(1, len(pages)).view(-1, 1, 1)
    unmasked_at = (changed * steps).amax(0) if num_steps else torch.zeros_like(pages[0])
    colours = step_colours(num_steps)
    rows, has_bytes = [], False
    for tokens, times, texts in zip(pages[-1].tolist(), unmasked_at.tolist(), cell_texts(processor, pages[-1])):
        cells = []
        for token, at, text in zip(tokens, times, texts):
            kind, style = ("masked", "") if token == mask else ("given", "")
            if token != mask and at:
                kind, style = "unmasked", f' style="background:{colours[at - 1]};color:{ink_on(colours[at - 1])}"'
            if BYTE.fullmatch(text):  # two digits are as wide as a character
                kind, text, has_bytes = f"{kind} byte", text[2:], True
            cells.append(f'<i class="{kind}"{style}>{escape(text) or " "}</i>')
        rows.append(f"<div>{''.join(cells)}</div>")
    gradient = ", ".join(step_colours(9))
    legend = (
        '<div class="legend"><span class="swatch"></span>prompt<span class="swatch masked"></span>masked'
        f'<span class="swatch wide" style="background:linear-gradient(to right, {gradient})"></span>'
        f"unmasked, from the first denoising step to the latest{BYTE_LEGEND if has_bytes else ''}</div>"
    )
    return f'<div class="page"><div class="rows">{"".join(rows)}</div></div><div class="about">{escape(caption)}</div>{legend}'


def step_colours(steps: int) -> list[str]:
    """A colour `#rrggbb` for each denoising step, from dark blue to yellow."""
    colours = colormaps["viridis"]([step / max(1, steps - 1) for step in range(steps)], bytes=True)
    return ["#{:02x}{:02x}{:02x}".format(*colour[:3]) for colour in colours.tolist()]


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast to `#rrggbb`: at least 4.5 for any colour."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def cell_texts(processor, page: torch.LongTensor) -> list[list[str]]:
    """The text shown in each cell of `page [height, width]`.

    Blanks, padding and masked cells are empty; a newline is shown as an arrow, an unprintable character as a dot.
    """
    tokenizer, flat = processor.tokenizer, page.flatten().tolist()
    empty = {processor.blank_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id}
    texts = [""] * len(flat)
    run = []  # cells whose tokens are decoded together: only masked cells separate two runs
    for place, token in [*enumerate(flat), (None, tokenizer.mask_token_id)]:
        if token not in empty:
            run.append(place)
        elif token == tokenizer.mask_token_id:
            places = iter(run)
            for text, number in readable(tokenizer, [flat[place] for place in run]):
                first, *_ = [next(places) for _ in range(number)]
                texts[first] = one_column_each(text)
            run = []
    width = page.shape[1]
    return [texts[start : start + width] for start in range(0, len(texts), width)]
