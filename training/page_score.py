"""Scores of infilled pages: precision, recall and F1 of the cells that are not blank.

Nearly half of the cells of most pages are blank, so that the accuracy over masked cells is high for an empty page. In these
scores, which are those of named entities, the blank is the class "outside".
"""

from collections import Counter
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PageScore:
    """Counts of cells on each page, float64 `[pages]`. The scores sum them over all pages (micro average).

    Args:
        masked: number of masked cells.
        same: number of those that equal the original, blanks included.
        right: number of those that equal the original and are not blank.
        filled: number of those that are not blank in the infilled page.
        original: number of those that are not blank in the original.
    """

    masked: torch.Tensor
    same: torch.Tensor
    right: torch.Tensor
    filled: torch.Tensor
    original: torch.Tensor

    @property
    def precision(self) -> float:
        """Share of the filled cells that is right; 0 for an empty page, NaN if the original is empty."""
        return self._share(self.right, self.filled)

    @property
    def recall(self) -> float:
        """Share of the original's cells that is reproduced; 0 and NaN as for `precision`."""
        return self._share(self.right, self.original)

    @property
    def f1(self) -> float:
        """Harmonic mean of both; NaN if both pages are empty."""
        return self._share(2 * self.right, self.filled + self.original)

    @property
    def right_with_blanks(self) -> float:
        """Share of all masked cells that equal the original, which is high for an empty page."""
        return (self.same.sum() / self.masked.sum()).item()

    @property
    def f1_of_pages(self) -> torch.Tensor:
        """Contribution of each page, `[pages]`: their mean is F1, and the standard error of the mean that of F1."""
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
        is_masked: the masked cells, boolean, of the same shape.
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
        Pages by the name of the token; without the last if the original has no visible token.
    """
    tokens = {"all blanks": processor.blank_token_id, "all spaces": int(processor.paginate(" ", 1, 1)[0, 0, 0])}
    counts = Counter(original[is_masked].tolist())
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        if text := processor.decode([token]).strip():
            tokens[f"all {text!r}"] = token
            break
    return {name: original.masked_fill(is_masked, token) for name, token in tokens.items()}
