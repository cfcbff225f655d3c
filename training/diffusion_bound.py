"""The negative ELBO of pages under a masked diffusion model."""

import math

import numpy as np
import torch
from argument_checks import check_number
from tqdm.auto import tqdm
from transformers import PreTrainedModel


MASK_SAMPLES = 8  # forward passes over each page


def diffusion_bound(
    model: PreTrainedModel, pages: torch.Tensor, batch_size: int, num_samples: int = MASK_SAMPLES
) -> tuple[np.ndarray, float]:
    """The negative ELBO of pages, an upper bound of their negative log-likelihood.

    Args:
        model: a grid model in evaluation mode.
        pages: [pages, height, width].
        batch_size: number of pages in a batch.
        num_samples: number of forward passes over each page, even.

    Raises:
        ValueError: naming `--batch_size` or `num_samples` for invalid values.

    Returns:
        [pages], float64: nats of each page; and the standard error of their sum over draws of masks.
    """
    check_number("--batch_size", batch_size, least=1)
    check_number("num_samples", num_samples, least=2)
    generator = torch.Generator(model.device).manual_seed(0)
    nats, variance = [], 0.0
    for some in tqdm(pages.split(batch_size), desc="Negative ELBO", unit=" batches", disable=None):
        estimate = model.elbo(some.to(model.device), num_samples=num_samples, generator=generator)
        nats.append(estimate.nats.double().cpu().numpy())
        variance += estimate.standard_error.double().square().sum().item()
    return np.concatenate(nats), math.sqrt(variance)
