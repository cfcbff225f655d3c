"""Texts of the experiment on axes: fairy tales by books, and Python source by files."""

import hashlib
import re
import unicodedata
from pathlib import Path

from corpora import load_texts


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HELD_OUT_BOOKS, UNUSED_BOOKS = ("jacobs_more_celtic", "ozaki_japanese"), ("lang_crimson",)


def prepare(book: str) -> str:
    """A book in the characters of the experiment, a paragraph a line."""
    book = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", book)).lower()
    paragraphs = (re.sub(r"[^a-z0-9.,;:!?'\"()-]+", " ", text).strip() for text in re.split(r"\n\s*\n", book))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def middle(text: str, size: int) -> str:
    start = max(0, (len(text) - size) // 2)
    return text[start : start + size]


def fairy_tales(train_size: int, held_out_size: int) -> tuple[list[str], list[str]]:
    """An equal share of the middle of each book, to train on and held out."""
    books = {path.stem: path for path in sorted((SHARED / "fairy_tales").glob("*.txt"))}
    held_out = [books.pop(name) for name in HELD_OUT_BOOKS]
    train = [path for name, path in books.items() if name not in UNUSED_BOOKS]
    return tuple(
        [middle(prepare(path.read_text(encoding="utf-8")), -(-size // len(paths))) for path in paths]
        for paths, size in ((train, train_size), (held_out, held_out_size))
    )


def python_source(train_size: int, held_out_size: int) -> tuple[list[str], list[str]]:
    """Files in an order that depends on their content alone, until there is enough."""
    texts = load_texts("stdlib")
    parts = []
    for files, size in ((texts.train, train_size), (texts.validation, held_out_size)):
        files = sorted(filter(str.isascii, files), key=lambda text: hashlib.sha256(text.encode()).digest())
        part = []
        while size > 0:
            part.append(files.pop(0)[:size])
            size -= len(part[-1])
        parts.append(part)
    return tuple(parts)


TEXTS = {"fairy_tales": fairy_tales, "python": python_source, "python_wide": python_source}
