"""Draw the architectures as SVG: `python docs/figures/draw.py` writes all pictures beside this file.

Only the standard library is needed, and the same source draws the same bytes. A picture has a background of its own and follows
the reader's colour scheme, so that it can be read on light and on dark pages.
"""

import re
from html import escape
from pathlib import Path


HERE = Path(__file__).resolve().parent

STYLE = """
  svg { --paper: #ffffff; --ink: #1f2430; --soft: #5b6475; --line: #aab2c0; --cell: #eef1f6;
        --blue: #2563c9; --blue-fill: #cfe0fb; --orange: #b4580c; --orange-fill: #fcdcb8;
        --green: #17794a; --green-fill: #c9ecd8; --violet: #6d3fb4; --violet-fill: #e2d5f7; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #171b22; --ink: #e7eaf1; --soft: #a3acbd; --line: #566072; --cell: #262c37;
          --blue: #7fb0ff; --blue-fill: #24406f; --orange: #ffb066; --orange-fill: #69400f;
          --green: #6ed6a0; --green-fill: #1c5237; --violet: #bf9df5; --violet-fill: #47307a; }
  }
  text { fill: var(--ink); font: 13px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
  .title { font-size: 17px; font-weight: 600; }
  .small { font-size: 11.5px; fill: var(--soft); }
  .label { font-size: 11.5px; }
  .code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
  .math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "DejaVu Serif", Georgia, serif; font-size: 14px; }
  .paper { fill: var(--paper); stroke: var(--line); }
  .cell { fill: var(--cell); stroke: var(--line); }
  .line { fill: none; stroke: var(--soft); stroke-width: 1.4; }
  .head { fill: var(--soft); }
""" + "".join(
    f"  .{name} {{ fill: var(--{name}-fill); stroke: var(--{name}); }}\n"
    f"  .{name}-line {{ fill: none; stroke: var(--{name}); stroke-width: 1.8; }}\n"
    f"  .{name}-head {{ fill: var(--{name}); }}\n"
    for name in ("blue", "orange", "green", "violet")
)


class Picture:
    """A list of SVG elements on a sheet of the given size; coordinates are numbers of pixels from the top left."""

    def __init__(self, width: int, height: int, title: str, description: str):
        self.width, self.height, self.title, self.description = width, height, title, description
        self.elements = []

    def add(self, name: str, content: str | None = None, **attributes):
        """One element; `_class` and attributes with `_` for `-` are written as SVG names them."""
        written = "".join(
            f' {key.strip("_").replace("_", "-")}="{_number(value)}"' for key, value in attributes.items()
        )
        self.elements.append(f"<{name}{written}/>" if content is None else f"<{name}{written}>{content}</{name}>")

    def box(self, x, y, width, height, style="cell", label="", label_style="", radius=4):
        """A rectangle with a label in its middle."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius, _class=style)
        if label:
            self.text(x + width / 2, y + height / 2 + 4.5, label, label_style, "middle")

    def text(self, x, y, words, style="", anchor="start"):
        """Words whose baseline begins, has its middle or ends at a point."""
        self.add("text", escape(words), x=x, y=y, text_anchor=anchor, **({"_class": style} if style else {}))

    def arrow(self, points, style="line"):
        """A line through points with a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        end = (x1 - 6 * ux, y1 - 6 * uy)
        self.line([*points[:-1], end], style)
        corners = [
            (x1, y1),
            (x1 - 7 * ux + 3.5 * uy, y1 - 7 * uy - 3.5 * ux),
            (x1 - 7 * ux - 3.5 * uy, y1 - 7 * uy + 3.5 * ux),
        ]
        head = "head" if style == "line" else style.replace("-line", "-head")
        self.add("polygon", points=_points(corners), _class=head)

    def line(self, points, style="line"):
        """A line through points."""
        self.add("polyline", points=_points(points), _class=style)

    def svg(self) -> str:
        """The file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-labelledby="title description">\n'
            f'<title id="title">{escape(self.title)}</title>\n<desc id="description">{escape(self.description)}</desc>\n'
            f"<style>{STYLE}</style>\n"
        )
        sheet = f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10" class="paper"/>\n'
        return head + sheet + "\n".join(self.elements) + "\n</svg>\n"


def _number(value):
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))


def _points(points):
    return " ".join(f"{_number(float(x))},{_number(float(y))}" for x, y in points)


def _wrapped(picture, x, y, lines, style="small", step=16):
    for number, line in enumerate(lines):
        picture.text(x, y + step * number, line, style)


# --- LEAP ------------------------------------------------------------------------------------------------------------

WEIGHTS = (0.5, 0.9, 0.3, 0.7, 0.4, 1.0, 0.25, 0.6)


def draw_mixing(p: Picture, x: float, y: float):
    """One head at one position: weights of a window, their means, the gate. 380 x 250."""
    cell, gap, window = 34, 8, 4
    for j, weight in enumerate(WEIGHTS):
        left, seen = x + j * (cell + gap), j >= len(WEIGHTS) - window
        p.box(left, y + 206, cell, 26, "blue" if seen else "cell", f"{j + 1}")
        p.box(left + 9, y + 196 - 40 * weight, 16, 40 * weight, "blue" if seen else "cell", radius=2)
    p.text(x, y + 136, "weight of a token, from its f · k", "small")
    first = x + (len(WEIGHTS) - window) * (cell + gap)
    last = x + len(WEIGHTS) * (cell + gap) - gap
    p.line([(first, y + 150), (first, y + 144), (last, y + 144), (last, y + 150)], "blue-line")
    middle = (first + last) / 2
    p.arrow([(middle - 36, y + 144), (middle - 36, y + 112)], "blue-line")
    p.arrow([(middle + 48, y + 144), (middle + 48, y + 112)], "blue-line")
    p.box(middle - 74, y + 84, 76, 27, "blue", "mean of k")
    p.box(middle + 10, y + 84, 76, 27, "blue", "mean of v")
    p.box(x + 66, y + 84, 58, 27, "green", "q of 8")
    p.arrow([(x + 95, y + 84), (x + 95, y + 46), (middle - 62, y + 46)], "line")
    p.arrow([(middle - 36, y + 84), (middle - 36, y + 60)], "line")
    p.box(middle - 62, y + 33, 62, 26, "orange", "gate")
    p.arrow([(middle, y + 46), (middle + 34, y + 46)], "line")
    p.add("circle", cx=middle + 48, cy=y + 46, r=13, _class="orange")
    p.text(middle + 48, y + 51, "×", "", "middle")
    p.arrow([(middle + 48, y + 84), (middle + 48, y + 60)], "line")
    p.arrow([(middle + 48, y + 33), (middle + 48, y + 8)], "line")
    p.text(middle + 60, y + 16, "out", "small")


def draw_windows(p: Picture, x: float, y: float):
    """What four layers average at one position. 320 x 190."""
    for layer, (name, window) in enumerate((("all", 22), ("4", 4), ("8", 8), ("16", 16))):
        top = y + layer * 32
        p.text(x, top + 14, f"layer {layer + 1}: {name}", "small")
        for j in range(22):
            p.box(x + 74 + 11 * j, top, 10, 20, "blue" if j >= 22 - window else "cell", radius=1)


def leap() -> Picture:
    """LEAP: gated running means."""
    p = Picture(
        800,
        372,
        "LEAP",
        "Each token has a weight that no query changes. A position averages keys and values of its window with "
        "these weights, and a gate made of its query and the mean key decides how much of the mean value passes.",
    )
    p.text(24, 34, "LEAP: gated running means instead of attention", "title")
    draw_mixing(p, 24, 62)
    p.text(24, 326, "Position 8 averages the window 5 to 8. Its query opens the gate,", "small")
    p.text(24, 343, "and does not choose among the tokens.", "small")
    p.text(440, 80, "windows of the layers")
    draw_windows(p, 440, 98)
    p.text(440, 262, "state while generating")
    p.box(440, 274, 106, 28, "violet", "Σ of weights")
    p.box(554, 274, 106, 28, "violet", "mean of k")
    p.box(668, 274, 106, 28, "violet", "mean of v")
    _wrapped(
        p,
        440,
        326,
        ["Running means, or the last tokens of a window:", "its size does not depend on the length of the text."],
        step=17,
    )
    return p


# --- Hierarchical LM -------------------------------------------------------------------------------------------------


def draw_streams(p: Picture, x: float, y: float, cell: float = 27):
    """Three resolutions of 17 tokens and their merge. About 640 x 200."""
    tokens = 17
    # From the tokens past the stream of factor 4, which is drawn over it.
    p.arrow([(x + 10.5 * cell, y + 132), (x + 10.5 * cell, y + 36)], "violet-line")
    p.arrow([(x + 14.5 * cell, y + 132), (x + 14.5 * cell, y + 98)], "green-line")
    p.text(x + 14.5 * cell - 8, y + 120, "compress", "small", "end")
    rows = ((1, "factor 1", "blue", 4), (4, "factor 4, stride 4", "green", 3), (8, "factor 8, stride 8", "violet", 3))
    for row, (factor, name, style, window) in enumerate(rows):
        top = y + 132 - 62 * row
        p.text(x, top - 6, name, "small")
        steps = (tokens - 1) // factor + 1
        for step in range(steps):
            end = step * factor  # the token that a step belongs to, the last of those it is made of
            first = max(0, end - factor + 1)
            seen = step >= steps - window
            left, width = x + first * cell, (end - first + 1) * cell - 3
            p.box(
                left,
                top,
                width,
                26,
                style if seen else "cell",
                str(end + 1) if factor == 1 and cell > 20 else "",
                radius=3,
            )
    right = x + tokens * cell + 16
    for row, (_, _, style, _) in enumerate(rows):
        p.arrow([(right - 16, y + 145 - 62 * row), (right + 18, y + 145 - 62 * row)], f"{style}-line")
    p.box(right + 18, y + 2, 62, 162, "orange", "merge")
    p.arrow([(right + 80, y + 83), (right + 108, y + 83)], "orange-line")
    p.text(right + 113, y + 80, "token")
    p.text(right + 113, y + 96, "18")


def hierarchical_lm() -> Picture:
    """The hierarchical LM: streams at several resolutions."""
    p = Picture(
        800,
        340,
        "Hierarchical LM",
        "Three streams read the same 17 tokens at different resolutions. Each attends to a window of its "
        "own positions, and at the end of each layer the streams are merged to predict the next token.",
    )
    p.text(24, 34, "Hierarchical LM: one text at several resolutions", "title")
    draw_streams(p, 24, 78)
    _wrapped(
        p,
        24,
        272,
        [
            "A position of factor c summarises the last c tokens: a compressor reads their embeddings.",
            "Each stream is a decoder. Coloured positions are in the window of token 17.",
            "The merge ends every layer. No position depends on future tokens.",
        ],
        step=18,
    )
    return p


# --- Heptapod grid ---------------------------------------------------------------------------------------------------

PAGE = ("def area(w, h):", "    size = w * h", "    return size ")
HOLE = (1, 4, 1, 8)  # top, left, height, width


def draw_page(p: Picture, x: float, y: float, masked_cells, new_cells=(), cell: float = 17, columns: int = 16):
    """A page of text with masked cells."""
    for row, line in enumerate(PAGE):
        for column in range(columns):
            character = line[column] if column < len(line) else " "
            place = (row, column)
            style = "orange" if place in masked_cells else "green" if place in new_cells else "cell"
            label = "" if place in masked_cells else character.strip()
            p.box(x + column * cell, y + row * 22, cell - 1.5, 20, style, label, "code", radius=2)


def draw_neighbourhood(p: Picture, x: float, y: float, kind: str, cell: float = 12):
    """What one cell attends to on a page of 9 x 9 cells."""
    for row in range(9):
        for column in range(9):
            rows, columns = abs(row - 4), abs(column - 4)
            seen = {
                "local": rows <= 1 and columns <= 1,
                "dilated": rows % 2 == columns % 2 == 0 and rows <= 2 and columns <= 2,
                "global": True,
            }[kind]
            style = "orange" if rows == columns == 0 else "blue" if seen else "cell"
            p.box(x + column * cell, y + row * cell, cell - 1.5, cell - 1.5, style, radius=1)
    p.text(x + 4.5 * cell, y + 9 * cell + 16, kind, "small", "middle")


def hole_after(iterations: int):
    """Open cells and new cells of the hole after some of three iterations."""
    top, left, height, width = HOLE
    cells = [(row, column) for row in range(top, top + height) for column in range(left, left + width)]
    order = sorted(cells, key=lambda cell: (cell[1] * 5 + 3) % 8)
    written = (0, 2, 5, 8)
    before, now = written[max(0, iterations - 1)], written[iterations]
    return set(order[now:]), set(order[before:now])


def heptapod() -> Picture:
    """The Heptapod grid: a page generated in all directions."""
    p = Picture(
        800,
        372,
        "Heptapod grid",
        "A page of cells. Each cell attends to its neighbours on all sides, to cells at a distance or to the "
        "whole page. Masked tokens are predicted at once and unmasked over several denoising steps, the most confident first.",
    )
    p.text(24, 34, "Heptapod grid: a page generated in all directions", "title")
    p.text(24, 68, "what the orange cell attends to")
    for number, kind in enumerate(("local", "dilated", "global")):
        draw_neighbourhood(p, 24 + 134 * number, 84, kind)
    _wrapped(
        p,
        24,
        250,
        [
            "Rotary positions in two dimensions: one half of the",
            "channels turns with the row, the other with the column.",
            "Training masks a share of the cells and predicts them all.",
        ],
        step=18,
    )
    p.text(470, 68, "generation unmasks the masked tokens")
    for iteration in range(4):
        top = 84 + 71 * iteration
        p.text(440, top + 37, str(iteration), "small", "middle")
        draw_page(p, 470, top, *hole_after(iteration))
    p.text(440, 82, "step", "small", "middle")
    return p


# --- MultiGrid -------------------------------------------------------------------------------------------------------

TEXT = "if f(x):"
# What the axes `token_kind` and `bracket` say of it; tests/test_docs.py compares them with the annotators.
TRACKS = {
    "token_kind": ("name", "keyword", "space", "name", "open", "name", "close", "operator"),
    "bracket": ("none", "none", "none", "none", "(", "(", "none", "none"),
}


def draw_tracks(p: Picture, x: float, y: float, columns: int = len(TEXT), cell: float = 66):
    """The first columns of a text and the ids of two axes, which attend to each other. Up to 690 x 170."""
    styles = ("green", "violet")
    p.text(x + 78, y + 21, "text", "", "end")
    for column, character in enumerate(TEXT[:columns]):
        left = x + 92 + column * (cell + 8)
        p.box(left, y + 4, cell, 26, "blue", "␣" if character == " " else character, "code")
        if column:
            p.arrow([(left - 8, y + 17), (left, y + 17)])
        for row, labels in enumerate(TRACKS.values()):
            top = y + 64 + 48 * row
            p.box(left, top, cell, 26, styles[row], labels[column], "label")
            if column:
                p.arrow([(left - 8, top + 13), (left, top + 13)])
        p.arrow([(left + 22, y + 47), (left + 22, y + 30)], "green-line")
        p.arrow([(left + 22, y + 47), (left + 22, y + 64)], "green-line")
        p.line([(left + 48, y + 47), (left + 48, y + 64)], "violet-line")
        p.arrow([(left + 48, y + 47), (left + 48, y + 30)], "violet-line")
        p.arrow([(left + 48, y + 90), (left + 48, y + 112)], "violet-line")
    for row, name in enumerate(TRACKS):
        p.text(x + 78, y + 81 + 48 * row, name, "", "end")


def multigrid() -> Picture:
    """MultiGrid: axes aligned with the text."""
    p = Picture(
        800,
        324,
        "MultiGrid",
        "The ids of each axis are aligned with the tokens of the text. Every axis is a decoder of its own; in "
        "each layer the text reads every axis and every axis reads the text, and the next token of all of them is predicted.",
    )
    p.text(24, 34, "MultiGrid: a text with aligned axes", "title")
    draw_tracks(p, 24, 64)
    _wrapped(
        p,
        24,
        258,
        [
            "Every row is a decoder of its own: position t sees its own past.",
            "In each layer the text attends to every axis and every axis to the text, up to position t.",
            "The model predicts the next token of every row. Annotators, the model or the caller continue the axes.",
        ],
        step=18,
    )
    return p


# --- all of them -----------------------------------------------------------------------------------------------------


def architectures() -> Picture:
    """All four on one sheet."""
    p = Picture(
        1000,
        560,
        "The four architectures",
        "LEAP averages a window with weights that no query changes. The hierarchical LM reads one text at "
        "several resolutions. The Heptapod grid fills a page in all directions. MultiGrid predicts the ids of axes with the text.",
    )
    for x, y, title, line in (
        (24, 34, "LEAP", "gated running means: linear time, constant memory"),
        (524, 34, "Hierarchical LM", "one text at several resolutions"),
        (24, 326, "Heptapod grid", "a page denoised in all directions"),
        (524, 326, "MultiGrid", "axis ids aligned with the text, read and predicted"),
    ):
        p.text(x, y, title, "title")
        p.text(x, y + 20, line, "small")
    p.line([(500, 20), (500, 540)])
    p.line([(20, 290), (980, 290)])
    draw_mixing(p, 64, 44)
    draw_streams(p, 524, 98, cell=17.5)
    draw_neighbourhood(p, 24, 388, "local", cell=10)
    draw_neighbourhood(p, 24 + 110, 388, "global", cell=10)
    for iteration, top in ((0, 340), (1, 411), (3, 482)):
        draw_page(p, 258, top, *hole_after(iteration), cell=14.5)
    draw_tracks(p, 516, 386, columns=5, cell=66)
    return p


# --- badges ----------------------------------------------------------------------------------------------------------


def badge(left: str, right: str) -> str:
    """A small label of two parts, as the front page shows them; the colours can be read on light and on dark pages."""
    widths = [round(6.7 * len(words)) + 14 for words in (left, right)]
    total = sum(widths)
    parts, x = [], 0
    for words, width, colour in zip((left, right), widths, ("#4a5163", "#2563c9")):
        parts.append(f'<rect x="{x}" width="{width}" height="20" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + width / 2:g}" y="14" fill="#ffffff" text-anchor="middle" textLength="{width - 14}" '
            f'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">{escape(words)}</text>'
        )
        x += width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" role="img" aria-label="{escape(left)}: {escape(right)}">'
        f'<clipPath id="round"><rect width="{total}" height="20" rx="3"/></clipPath><g clip-path="url(#round)">{"".join(parts)}</g></svg>\n'
    )


def badges() -> dict[str, str]:
    """What pyproject.toml says of licence, Python and Transformers."""
    project = (HERE.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    (licence,) = re.findall(r'^license = "(.*)"$', project, re.MULTILINE)
    (python,) = re.findall(r'^requires-python = "(.*)"$', project, re.MULTILINE)
    (transformers,) = re.findall(r'"transformers(>=[^"]*)"', project)
    return {
        "badge-licence": badge("licence", licence),
        "badge-python": badge("python", python),
        "badge-transformers": badge("transformers", transformers.replace(",", " ")),
    }


PICTURES = {
    "architectures": architectures,
    "leap": leap,
    "hierarchical_lm": hierarchical_lm,
    "heptapod": heptapod,
    "multigrid": multigrid,
}


def draw_all() -> dict[str, str]:
    """The text of every SVG file, by its name without the ending."""
    return {**{name: draw().svg() for name, draw in PICTURES.items()}, **badges()}


def main():
    for name, text in draw_all().items():
        (HERE / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
