"""Writing one page without sampling, cell by cell in plain loops: what `HeptapodGenerationMixin.generate` has to do.

Nothing of the package is imported; numbers are Python floats.
"""

import math


def schedule_left(iteration, num_open, num_iterations, counts):
    """Cells that may be open after the iteration numbered from 0: MaskGIT's cosine (arXiv 2202.04200) or a line."""
    steps = min(num_iterations, num_open)
    done = iteration + 1
    if done >= steps:
        return 0
    if counts == "linear":
        return num_open - (num_open * done) // steps
    return min(math.floor(num_open * math.cos(math.pi / 2 * done / steps)), num_open - done)


def write_page(
    predict,
    page,
    mask,
    forbidden,
    schedule="confidence",
    counts="cosine",
    num_iterations=None,
    entropy_bound=0.1,
    reopen_threshold=None,
    stability_threshold=None,
):
    """Write the open cells of one page.

    Args:
        predict: from a page (list of token ids) to one list of logits for each cell.
        page: token ids in reading order; `mask` marks an open cell.
        mask, forbidden: the mask token; tokens that are never written.
        others: options of `HeptapodGenerationConfig`, without its defaults.

    Returns:
        page, iteration in which each cell was written (-1: given), pages after each iteration.
    """
    page = list(page)
    open_cells = [cell for cell, token in enumerate(page) if token == mask]
    num_open, once_open, reopened = len(open_cells), set(open_cells), set()
    committed_at, trajectory = [-1] * len(page), [list(page)]
    previous, stable_for, iteration = None, 0, 0
    while open_cells:
        probabilities = []
        for logits in predict(page):
            weights = [0.0 if token in forbidden else math.exp(logit) for token, logit in enumerate(logits)]
            probabilities.append([weight / sum(weights) for weight in weights])
        best = {cell: max(range(len(p)), key=p.__getitem__) for cell, p in enumerate(probabilities)}
        doubtful = []
        if reopen_threshold is not None:
            written = [cell for cell in once_open if cell not in open_cells and cell not in reopened]
            doubtful = [cell for cell in written if probabilities[cell][page[cell]] < reopen_threshold]

        if schedule == "raster":
            chosen = [min(open_cells)]
        elif schedule == "confidence":
            surest_first = sorted(open_cells, key=lambda cell: (-probabilities[cell][best[cell]], cell))
            chosen = surest_first[: len(open_cells) - schedule_left(iteration, num_open, num_iterations, counts)]
        else:
            entropy = {cell: -sum(p * math.log(p) for p in probabilities[cell] if p > 0) for cell in open_cells}
            chosen, total = [], 0.0
            for cell in sorted(open_cells, key=lambda cell: (entropy[cell], cell)):
                total += entropy[cell]
                if chosen and total > entropy_bound:
                    break
                chosen.append(cell)

        ends = num_iterations is not None and iteration + 1 == num_iterations and schedule != "raster"
        ends = ends or (schedule == "confidence" and iteration + 1 == num_open)
        predicted = [best[cell] if cell in open_cells else token for cell, token in enumerate(page)]
        stable_for = stable_for + 1 if predicted == previous else 0
        previous = predicted
        ends = ends or (stability_threshold is not None and stable_for >= stability_threshold)
        for cell in open_cells if ends else chosen:
            page[cell], committed_at[cell] = best[cell], iteration
        open_cells = [] if ends else [cell for cell in open_cells if cell not in chosen]
        if not ends:
            for cell in doubtful:
                page[cell] = mask
                reopened.add(cell)
                open_cells.append(cell)
        trajectory.append(list(page))
        iteration += 1
    return page, committed_at, trajectory
