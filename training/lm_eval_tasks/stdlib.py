"""Documents of two lm_eval tasks, from the source files of Python's standard library that train.py holds out."""

import random
import sys
from pathlib import Path

import datasets


# At the end of the path, where no module of ours hides a library.
sys.path.append(str(Path(__file__).parent.parent))
from corpora import load_texts


FILES, CHARACTERS = 16, 2000  # number of held-out files, and characters of each
LINES, CONTEXT, CHOICES = 128, 400, 4


def _held_out() -> list[str]:
    return load_texts("stdlib").validation


def files(**_) -> dict[str, datasets.Dataset]:
    """The first characters of some held-out files: `text`."""
    return {"test": datasets.Dataset.from_list([{"text": text[:CHARACTERS]} for text in _held_out()[:FILES]])}


def lines(**_) -> dict[str, datasets.Dataset]:
    """The text before a line, and four lines of the same file of which one is the next: `context`, `choices`, `answer`."""
    draw = random.Random(0)
    documents = []
    for text in _held_out():
        numbered = text.splitlines(keepends=True)
        candidates = sorted({line for line in numbered if len(line.strip()) >= 10})
        places = [place for place in range(5, len(numbered)) if numbered[place] in candidates]
        if len(candidates) < 2 * CHOICES or not places:
            continue
        place = draw.choice(places)
        others = draw.sample([line for line in candidates if line != numbered[place]], CHOICES - 1)
        choices = draw.sample([numbered[place], *others], CHOICES)
        context = "".join(numbered[:place])[-CONTEXT:]
        documents.append({"context": context, "choices": choices, "answer": choices.index(numbered[place])})
    return {"test": datasets.Dataset.from_list(documents[:LINES])}
