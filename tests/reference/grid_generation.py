"""Writing one page without sampling, cell by cell in plain loops: what `HeptapodGenerationMixin.generate` has to do.

Nothing of the package is imported; numbers are Python floats.
"""

import math


def schedule_left(iteration, num_masked, max_denoising_steps, mask_schedule):
    """Cells that may be open after the iteration numbered from 0: MaskGIT's cosine (arXiv 2202.04200) or a line."""
    steps = min(max_denoising_steps, num_masked)
    done = iteration + 1
    if done >= steps:
        return 0
    if mask_schedule == "linear":
        return num_masked - (num_masked * done) // steps
    return min(math.floor(num_masked * math.cos(math.pi / 2 * done / steps)), num_masked - done)


def write_page(
    predict,
    page,
    mask,
    forbidden,
    sampler="confidence",
    mask_schedule="cosine",
    max_denoising_steps=None,
    entropy_bound=0.1,
    remask_threshold=None,
    stability_threshold=None,
):
    """Write the masked cells of one page.

    Args:
        predict: from a page (list of token ids) to one list of logits for each cell.
        page: token ids in reading order; `mask` marks an open cell.
        mask, forbidden: the mask token; tokens that are never written.
        others: options of `HeptapodGenerationConfig`, without its defaults.

    Returns:
        page, iteration in which each cell was written (-1: given), pages after each iteration.
    """
    page = list(page)
    masked_cells = [cell for cell, token in enumerate(page) if token == mask]
    num_masked, once_open, reopened = len(masked_cells), set(masked_cells), set()
    unmask_step, history = [-1] * len(page), [list(page)]
    previous, stable_for, iteration = None, 0, 0
    while masked_cells:
        probabilities = []
        for logits in predict(page):
            weights = [0.0 if token in forbidden else math.exp(logit) for token, logit in enumerate(logits)]
            probabilities.append([weight / sum(weights) for weight in weights])
        best = {cell: max(range(len(p)), key=p.__getitem__) for cell, p in enumerate(probabilities)}
        doubtful = []
        if remask_threshold is not None:
            written = [cell for cell in once_open if cell not in masked_cells and cell not in reopened]
            doubtful = [cell for cell in written if probabilities[cell][page[cell]] < remask_threshold]

        if sampler == "raster":
            chosen = [min(masked_cells)]
        elif sampler in ("confidence", "margin"):
            runner_up = {cell: sorted(p)[-2] if sampler == "margin" else 0.0 for cell, p in enumerate(probabilities)}
            ahead = {cell: probabilities[cell][best[cell]] - runner_up[cell] for cell in masked_cells}
            surest_first = sorted(masked_cells, key=lambda cell: (-ahead[cell], cell))
            chosen = surest_first[
                : len(masked_cells) - schedule_left(iteration, num_masked, max_denoising_steps, mask_schedule)
            ]
        else:
            entropy = {cell: -sum(p * math.log(p) for p in probabilities[cell] if p > 0) for cell in masked_cells}
            chosen, total = [], 0.0
            for cell in sorted(masked_cells, key=lambda cell: (entropy[cell], cell)):
                total += entropy[cell]
                if chosen and total > entropy_bound:
                    break
                chosen.append(cell)

        ends = max_denoising_steps is not None and iteration + 1 == max_denoising_steps and sampler != "raster"
        ends = ends or (sampler in ("confidence", "margin") and iteration + 1 == num_masked)
        predicted = [best[cell] if cell in masked_cells else token for cell, token in enumerate(page)]
        stable_for = stable_for + 1 if predicted == previous else 0
        previous = predicted
        ends = ends or (stability_threshold is not None and stable_for >= stability_threshold)
        for cell in masked_cells if ends else chosen:
            page[cell], unmask_step[cell] = best[cell], iteration
        masked_cells = [] if ends else [cell for cell in masked_cells if cell not in chosen]
        if not ends:
            for cell in doubtful:
                page[cell] = mask
                reopened.add(cell)
                masked_cells.append(cell)
        history.append(list(page))
        iteration += 1
    return page, unmask_step, history
