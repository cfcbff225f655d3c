"""Samplers: the rules that choose which masked tokens a denoising step of `generate` unmasks.

The method is that of Mask-Predict (arXiv 1904.09324) and MaskGIT (arXiv 2202.04200: mask schedule, confidence and its noise);
the margin is that of arXiv 2502.06768, the entropy bound that of arXiv 2505.24857, remasking by chance that of ReMDM (arXiv
2503.00307). Unmasked one token at a time in an order that does not depend on the tokens, a page is a sample of the model's
own conditionals (arXiv 2110.02037).

A new sampler is a class and its name in `SAMPLERS`, a new mask schedule a function and its name in `MASK_SCHEDULES`.
"""

import math

import torch


DEFAULT_DENOISING_STEPS = 32


def _cosine(num_masked, done, last):
    return (num_masked * torch.cos(math.pi / 2 * done.double() / last)).floor().long()


def _linear(num_masked, done, last):
    return num_masked - num_masked * done // last


def _margin(log_probs, sampled):
    first, second = log_probs.topk(2).values.exp().unbind(-1)
    return first - second


# Measures `[tokens]` of predictions, from log-probabilities `[tokens, vocab]` and the sampled tokens `[tokens]`.
MEASURES = {
    "confidence": lambda log_probs, sampled: log_probs.gather(1, sampled.unsqueeze(1)).squeeze(1).exp(),
    "entropy": lambda log_probs, sampled: torch.special.entr(log_probs.exp()).sum(-1),  # nats
    "margin": _margin,
}


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
        measure (`str`, *optional*): the measure of all masked tokens that `choose` reads, a name in `MEASURES`.
        options (`tuple[str, ...]`): those of `choice_temperature` and `remask_rate` that it reads.
        limit (`torch.LongTensor` of shape `[batch]`): number of steps, of which the last one unmasks all tokens.

    Raises:
        ValueError: for options that it does not read.
    """

    measure: str | None = None
    options: tuple[str, ...] = ()

    def __init__(self, config, num_masked: torch.Tensor, generator: torch.Generator | None):
        self.config, self.num_masked, self.generator = config, num_masked, generator
        self.limit = torch.full_like(num_masked, torch.iinfo(torch.long).max)
        for name in ("choice_temperature", "remask_rate"):
            if getattr(config, name) and name not in self.options:
                able = [key for key, kind in SAMPLERS.items() if name in kind.options]
                raise ValueError(
                    f"`{name}` needs one of the samplers {able}, got {getattr(config, name)} for {config.sampler!r}."
                )

    def remask(self, unmasked: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor | None:
        """The generated tokens that a step masks again, `torch.BoolTensor` of the shape of `unmasked`, or `None`.

        Called before `choose`.

        Args:
            unmasked (`torch.BoolTensor` of shape `[rows, cells]`): the tokens generated so far.
            rows, step: as for `choose`.
        """
        return None

    def choose(
        self, is_masked: torch.Tensor, rows: torch.Tensor, step: int, measured: torch.Tensor | None
    ) -> torch.Tensor:
        """The tokens to unmask.

        Args:
            is_masked (`torch.BoolTensor` of shape `[rows, cells]`): the masked tokens.
            rows (`torch.LongTensor` of shape `[rows]`): indices of these canvases in the batch.
            step (`int`): index of the step, from 0.
            measured (`torch.Tensor` of shape `[rows, cells]`, *optional*): the measure of the masked tokens; `None` without one.

        Returns:
            `torch.BoolTensor` of shape `[rows, cells]`.
        """
        raise NotImplementedError

    def is_last(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Whether a step must unmask all tokens, `[rows]`."""
        return step + 1 >= self.limit[rows]

    def progress(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Share of the steps that are done before a step, `[rows]`: 0 in the first, 1 in the last."""
        return (step / (self.limit[rows] - 1).clamp_min(1)).clamp_max(1)


class _ScheduledSampler(Sampler):
    """Base class of samplers that unmask as many tokens as the mask schedule says."""

    options: tuple[str, ...] = ("remask_rate",)

    def __init__(self, config, num_masked, generator):
        super().__init__(config, num_masked, generator)
        self.max_denoising_steps = config.max_denoising_steps or DEFAULT_DENOISING_STEPS
        self.limit = num_masked.clamp(max=self.max_denoising_steps)
        self.num_remasked: torch.Tensor | int = 0  # in this step

    def remask(self, unmasked, rows, step):
        if not self.config.remask_rate:
            return None
        # ReMDM's cap: no more on average than are masked after the step, so that the schedule is kept.
        left = self._left(rows, step).to(unmasked.device)
        chance = (left / unmasked.sum(1).clamp_min(1)).clamp_max(self.config.remask_rate)
        draws = torch.rand(unmasked.shape, generator=self.generator, device=unmasked.device)
        remasked = unmasked & (draws < chance.unsqueeze(1))
        self.num_remasked = remasked.sum(1)
        return remasked

    def _left(self, rows, step):
        num_masked = self.num_masked[rows].cpu()  # some devices have no float64
        return num_masked_after(step, num_masked, self.max_denoising_steps, self.config.mask_schedule)

    def choose(self, is_masked, rows, step, measured):
        # Counted from the tokens that are masked now, remasked ones included.
        number = is_masked.sum(1) - self._left(rows, step).to(is_masked.device) + self.num_remasked
        return _least(self._keys(is_masked, rows, step, measured), is_masked, number)

    def _keys(self, is_masked, rows, step, measured):
        """Numbers `[rows, cells]`: tokens with the least are unmasked first."""
        raise NotImplementedError


class _MeasuringSampler(_ScheduledSampler):
    """Base class of samplers that unmask the tokens that are highest in a measure, with the annealed noise of MaskGIT."""

    options = ("choice_temperature", "remask_rate")

    def _keys(self, is_masked, rows, step, measured):
        if not self.config.choice_temperature:
            return -measured
        share_left = 1 - (step + 1) / self.limit[rows].clamp_min(step + 1)
        uniform = torch.rand(measured.shape, generator=self.generator, device=measured.device, dtype=measured.dtype)
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return -measured.log() - self.config.choice_temperature * share_left.unsqueeze(1).to(noise) * noise


class ConfidenceSampler(_MeasuringSampler):
    """Unmasks the tokens whose sampled token is the most probable."""

    measure = "confidence"


class MarginSampler(_MeasuringSampler):
    """Unmasks the tokens whose most probable token is furthest ahead of the second."""

    measure = "margin"


class EntropyBoundSampler(Sampler):
    """Unmasks the tokens of least entropy while their entropies add up to no more than `entropy_bound`."""

    measure = "entropy"

    def __init__(self, config, num_masked, generator):
        super().__init__(config, num_masked, generator)
        if config.max_denoising_steps is not None:
            self.limit = torch.full_like(num_masked, config.max_denoising_steps)

    def choose(self, is_masked, rows, step, measured):
        return within_entropy_bound(measured, is_masked, self.config.entropy_bound)


class RandomSampler(_ScheduledSampler):
    """Unmasks tokens in random order."""

    def _keys(self, is_masked, rows, step, measured):
        return torch.rand(is_masked.shape, generator=self.generator, device=is_masked.device)


class RasterSampler(Sampler):
    """Unmasks the first token, left to right and top to bottom."""

    def choose(self, is_masked, rows, step, measured):
        return is_masked & (is_masked.cumsum(1) == 1)


SAMPLERS = {
    "confidence": ConfidenceSampler,
    "margin": MarginSampler,
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
    "MEASURES",
    "SAMPLERS",
    "Sampler",
    "num_masked_after",
    "within_entropy_bound",
]
