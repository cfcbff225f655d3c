"""Samplers: the rules that choose which masked tokens a denoising step of `generate` unmasks.

The method is that of Mask-Predict (arXiv 1904.09324) and MaskGIT (arXiv 2202.04200: mask schedule and confidence); the
entropy bound is that of arXiv 2505.24857. Unmasked one token at a time in an order that does not depend on the tokens, a
page is a sample of the model's own conditionals (arXiv 2110.02037).

A new sampler is a class and its name in `SAMPLERS`, a new mask schedule a function and its name in `MASK_SCHEDULES`.
"""

import math

import torch


DEFAULT_DENOISING_STEPS = 32


def _cosine(num_masked, done, last):
    return (num_masked * torch.cos(math.pi / 2 * done.double() / last)).floor().long()


def _linear(num_masked, done, last):
    return num_masked - num_masked * done // last


# Number of tokens that are still masked after `done` of `last` steps, all int64 `[rows]`.
MASK_SCHEDULES = {"cosine": _cosine, "linear": _linear}


def num_masked_after(
    step: int, num_masked: torch.Tensor, max_denoising_steps: int, mask_schedule: str
) -> torch.Tensor:
    """Number of tokens of each row that are still masked after a step of `"confidence"` or `"random"`.

    Each step unmasks at least one token, until none is masked after `min(max_denoising_steps, num_masked)` of them.

    Args:
        step: index of the step, from 0.
        num_masked: `[rows]`, int64: tokens that were masked before the first step.
        max_denoising_steps: number of steps that unmask them all.
        mask_schedule: a name in `MASK_SCHEDULES`.

    Returns:
        `[rows]`, int64.
    """
    last = num_masked.clamp(min=1, max=max_denoising_steps)
    done = last.clamp(max=step + 1)
    left = MASK_SCHEDULES[mask_schedule](num_masked, done, last)
    return torch.where(done == last, 0, torch.minimum(left, num_masked - done))


class Sampler:
    """Base class of samplers.

    Args:
        config ([`HeptapodGenerationConfig`]): all options of the call.
        num_masked (`torch.LongTensor` of shape `[batch]`): tokens that are masked before the first step.
        generator (`torch.Generator`, *optional*): the global one when not given.

    Attributes:
        needs_prediction (`bool`): whether `choose` reads the prediction of all masked tokens.
        limit (`torch.LongTensor` of shape `[batch]`): number of steps, of which the last one unmasks all tokens.
    """

    needs_prediction = True

    def __init__(self, config, num_masked: torch.Tensor, generator: torch.Generator | None):
        self.config, self.num_masked, self.generator = config, num_masked, generator
        self.limit = torch.full_like(num_masked, torch.iinfo(torch.long).max)

    def choose(self, is_masked: torch.Tensor, rows: torch.Tensor, step: int, prediction) -> torch.Tensor:
        """The tokens to unmask.

        Args:
            is_masked (`torch.BoolTensor` of shape `[rows, cells]`): the masked tokens.
            rows (`torch.LongTensor` of shape `[rows]`): indices of these canvases in the batch.
            step (`int`): index of the step, from 0.
            prediction: with `confidence` and `entropy`, `[rows, cells]` each; `None` without `needs_prediction`.

        Returns:
            `torch.BoolTensor` of shape `[rows, cells]`.
        """
        raise NotImplementedError

    def is_last(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Whether a step must unmask all tokens, `[rows]`."""
        return step + 1 >= self.limit[rows]


class _ScheduledSampler(Sampler):
    """Base class of samplers that unmask as many tokens as the mask schedule says."""

    def __init__(self, config, num_masked, generator):
        super().__init__(config, num_masked, generator)
        self.max_denoising_steps = config.max_denoising_steps or DEFAULT_DENOISING_STEPS
        self.limit = num_masked.clamp(max=self.max_denoising_steps)

    def _number(self, is_masked, rows, step):
        # Counted from the tokens that are masked now, remasked ones included.
        num_masked = self.num_masked[rows].cpu()  # some devices have no float64
        left = num_masked_after(step, num_masked, self.max_denoising_steps, self.config.mask_schedule)
        return is_masked.sum(1) - left.to(is_masked.device)


class ConfidenceSampler(_ScheduledSampler):
    """Unmasks the tokens whose sampled token is the most probable."""

    def choose(self, is_masked, rows, step, prediction):
        return _least(-prediction.confidence, is_masked, self._number(is_masked, rows, step))


class EntropyBoundSampler(Sampler):
    """Unmasks the tokens of least entropy while their entropies add up to no more than `entropy_bound`."""

    def __init__(self, config, num_masked, generator):
        super().__init__(config, num_masked, generator)
        if config.max_denoising_steps is not None:
            self.limit = torch.full_like(num_masked, config.max_denoising_steps)

    def choose(self, is_masked, rows, step, prediction):
        return within_entropy_bound(prediction.entropy, is_masked, self.config.entropy_bound)


class RandomSampler(_ScheduledSampler):
    """Unmasks tokens in random order."""

    needs_prediction = False

    def choose(self, is_masked, rows, step, prediction):
        keys = torch.rand(is_masked.shape, generator=self.generator, device=is_masked.device)
        return _least(keys, is_masked, self._number(is_masked, rows, step))


class RasterSampler(Sampler):
    """Unmasks the first token, left to right and top to bottom."""

    needs_prediction = False

    def choose(self, is_masked, rows, step, prediction):
        return is_masked & (is_masked.cumsum(1) == 1)


SAMPLERS = {
    "confidence": ConfidenceSampler,
    "entropy_bound": EntropyBoundSampler,
    "random": RandomSampler,
    "raster": RasterSampler,
}


def _least(keys, is_masked, number):
    """The `number [rows]` masked tokens of each row with the least keys `[rows, cells]`; of equal ones the first."""
    order = keys.masked_fill(~is_masked, torch.inf).sort(dim=1, stable=True).indices
    ranks = order.argsort(dim=1)
    return is_masked & (ranks < number.unsqueeze(1))


def within_entropy_bound(entropy: torch.Tensor, is_masked: torch.Tensor, bound: float) -> torch.Tensor:
    """The masked tokens of least entropy whose sum stays within the bound, and always the first of them."""
    entropy, order = entropy.masked_fill(~is_masked, torch.inf).sort(dim=1, stable=True)
    fits = entropy.cumsum(1) <= bound
    fits[:, 0] = True
    return is_masked & torch.zeros_like(is_masked).scatter(1, order, fits)


__all__ = [
    "DEFAULT_DENOISING_STEPS",
    "MASK_SCHEDULES",
    "SAMPLERS",
    "Sampler",
    "num_masked_after",
    "within_entropy_bound",
]
