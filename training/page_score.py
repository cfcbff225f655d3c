"""How much of the text in the masked cells of pages is right: precision, recall and F1 of the cells that are not blank.

Of the cells of most pages nearly half are blank, so the share of masked cells as in the original rates an empty page
highly. These scores count blanks for nothing: they are those of named entities, with the blank as the class "outside".
"""

from collections import Counter
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PageScore:
    """Counts of cells on each page, float64 `[pages]`. The scores sum them over all pages (micro average).

    Args:
        masked: masked cells.
        same: those of them that are as in the original, blanks included.
        right: those that are as in the original and not blank.
        filled: those that are not blank where the page was filled.
        original: those that are not blank in the original.
    """

    masked: torch.Tensor
    same: torch.Tensor
    right: torch.Tensor
    filled: torch.Tensor
    original: torch.Tensor

    @property
    def precision(self) -> float:
        """Of what was written, the share that is right; 0 where nothing was, NaN where there is nothing to write."""
        return self._share(self.right, self.filled)

    @property
    def recall(self) -> float:
        """Of what is written in the original, the share that was reproduced; 0 and NaN as for `precision`."""
        return self._share(self.right, self.original)

    @property
    def f1(self) -> float:
        """The harmonic mean of both; NaN where neither the original nor the filling holds anything but blanks."""
        return self._share(2 * self.right, self.filled + self.original)

    @property
    def right_with_blanks(self) -> float:
        """The share of all masked cells as in the original, which blanks alone make high."""
        return (self.same.sum() / self.masked.sum()).item()

    @property
    def f1_of_pages(self) -> torch.Tensor:
        """What each page contributes, `[pages]`: the mean is F1, the standard error of the mean that of F1."""
        cells = self.filled + self.original
        return self.f1 + (2 * self.right - self.f1 * cells) / cells.mean()

    def _share(self, part, whole):
        if not (self.filled + self.original).any():
            return float("nan")
        return (part.sum() / whole.sum().clamp(min=1)).item()


def score_pages(
    filled: torch.Tensor, original: torch.Tensor, is_masked: torch.Tensor, blank_token_id: int
) -> PageScore:
    """Compare the masked cells of pages with the original ones.

    Args:
        filled, original: token ids `[pages, height, width]`.
        is_masked: the cells that count, boolean, of the same shape.
        blank_token_id: the token of a blank cell.

    Raises:
        ValueError: for shapes that differ.
    """
    if not filled.shape == original.shape == is_masked.shape:
        shapes = [list(each.shape) for each in (filled, original, is_masked)]
        raise ValueError(f"`filled`, `original` and `is_masked` must have one shape, got {shapes}")
    same, wrote, there = is_masked & (filled == original), filled != blank_token_id, original != blank_token_id
    counted = (is_masked, same, same & wrote, is_masked & wrote, is_masked & there)
    return PageScore(*(cells.flatten(1).sum(1).double() for cells in counted))


def baselines(original: torch.Tensor, is_masked: torch.Tensor, processor) -> dict[str, torch.Tensor]:
    """The pages with all masked cells filled with one token: blanks, spaces, and the most frequent visible token there.

    Args:
        original: token ids `[pages, height, width]`.
        is_masked: boolean, of the same shape.
        processor: a `HeptapodProcessor`.

    Returns:
        Pages by what they are filled with; without the last where the original has nothing visible.
    """
    tokens = {"all blanks": processor.blank_token_id, "all spaces": int(processor.paginate(" ", 1, 1)[0, 0, 0])}
    counts = Counter(original[is_masked].tolist())
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        if text := processor.decode([token]).strip():
            tokens[f"all {text!r}"] = token
            break
    return {name: original.masked_fill(is_masked, token) for name, token in tokens.items()}
