"""`generate` for the grid: each denoising step predicts all masked tokens, and a sampler decides which are unmasked.

Read top-down: the options, the four samplers, the draw of tokens, the loop. The method is that of Mask-Predict
(arXiv 1904.09324) and MaskGIT (arXiv 2202.04200: mask schedule and confidence); the entropy bound is that of
arXiv 2505.24857. Unmasked one token at a time in an order that does not depend on the tokens, a page is a sample of the
model's own conditionals (arXiv 2110.02037).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from ..common.renamed_fields import reject_renamed
from ..common.transformers_versions import GENERATION_METADATA


logger = logging.get_logger(__name__)

SAMPLERS = ("confidence", "entropy_bound", "random", "raster")
MASK_SCHEDULES = ("cosine", "linear")
# What `generate` falls back to. Where it is None the option is off.
_DEFAULTS = {
    "sampler": "confidence",
    "mask_schedule": "cosine",
    "max_denoising_steps": None,
    "entropy_bound": 0.1,
    "remask_threshold": None,
    "stability_threshold": None,
    "do_sample": False,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "seed": None,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_history": False,
}
# Not options: Trainer aligns the first three with the tokenizer, GenerationConfig writes the others into its file.
_METADATA = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
_DEFAULT_DENOISING_STEPS = 32


class HeptapodGenerationConfig(GenerationConfig):
    """Options of [`HeptapodGenerationMixin.generate`]. An option that is not set is taken from the model's own config.

    Args:
        sampler (`str`, *optional*, defaults to `"confidence"`):
            Which masked tokens a denoising step unmasks: those whose sampled token is the most probable
            (`"confidence"`), those of least entropy while their entropies add up to no more than `entropy_bound`
            (`"entropy_bound"`), any (`"random"`), or the first one, left to right and top to bottom (`"raster"`).
        mask_schedule (`str`, *optional*, defaults to `"cosine"`):
            How many tokens `"confidence"` and `"random"` unmask in a step: equal shares (`"linear"`) or few at
            first (`"cosine"`). Each row of a batch follows the schedule with its own number of masked tokens.
        max_denoising_steps (`int`, *optional*):
            Number of steps in which `"confidence"` and `"random"` unmask a canvas, 32 when not given; a row with fewer
            masked tokens takes a step for each. `"entropy_bound"` unmasks all that is left in the last of them; when
            not given, it takes as many as the bound needs. `"raster"` takes a step for each token.
        entropy_bound (`float`, *optional*, defaults to 0.1):
            For `"entropy_bound"`, in nats. The token with the least entropy is always unmasked.
        remask_threshold (`float`, *optional*):
            Mask a generated token again when the model gives it less than this probability in a later step. A cell is
            remasked once at most, prompt tokens never.
        stability_threshold (`int`, *optional*):
            Unmask all tokens of a row at once after this many steps in which its prediction has not changed.
        do_sample (`bool`, *optional*, defaults to `False`):
            Sample tokens instead of taking the most probable ones.
        temperature (`float`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
            Transformers' warpers, applied in this order when `do_sample=True`. They change the distribution that is
            sampled from; confidence and entropy are those of the distribution before them.
        seed (`int`, *optional*):
            Seed of a generator for this call. Without it the global one is used.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Return a [`HeptapodGenerateOutput`] instead of the sequences alone.
        output_scores, output_history (`bool`, *optional*, defaults to `False`):
            Whether it has `scores` and `history`.

    Raises:
        ValueError: for an unknown option or an invalid value; the message names both.
    """

    def __init__(self, **kwargs):
        reject_renamed("heptapod generation", kwargs)
        # GenerationConfig's own __init__ would add some sixty options that mean nothing here.
        for name in (*_DEFAULTS, *_METADATA):
            setattr(self, name, kwargs.pop(name, None))
        for name in GENERATION_METADATA:
            kwargs.pop(name, None)
        if kwargs:
            raise ValueError(_unknown(kwargs))
        self.validate()

    def validate(self, **unused_kwargs):
        """Raise a `ValueError` for values that make no sense; the arguments are those of the parent and unused."""
        for name, choices in (("sampler", SAMPLERS), ("mask_schedule", MASK_SCHEDULES)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
        for name, least in (("max_denoising_steps", 1), ("stability_threshold", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        for name, fits, expected in (
            ("entropy_bound", lambda x: x >= 0, "must not be negative"),
            ("remask_threshold", lambda x: 0 <= x <= 1, "must be a probability"),
            (
                "temperature",
                lambda x: 0 < x < math.inf,
                "must be positive and finite (`do_sample=False` is the limit of zero)",
            ),
            ("top_p", lambda x: 0 < x <= 1, "must be in (0, 1]"),
        ):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and fits(value)):
                raise ValueError(f"`{name}` {expected}, got {value!r}.")
        for name in ("do_sample", "return_dict_in_generate", "output_scores", "output_history"):
            value = getattr(self, name)
            if value is not None and type(value) is not bool:
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are set, and nothing else."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return dict(_DEFAULTS)

    @classmethod
    def from_model_config(cls, model_config):
        """An empty config: generation options have no place in a model config."""
        return cls()

    def get_generation_mode(self, assistant_model=None):
        raise NotImplementedError("The generation modes of GenerationMixin do not exist on a grid; see `sampler`.")


def _unknown(options) -> str:
    return f"Unknown generation options {sorted(options)}; there are {sorted(_DEFAULTS)}."


@dataclass
class HeptapodGenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate=True`. All tensors have the shape of the prompt.

    Args:
        sequences (`torch.LongTensor`, `[batch, height, width]`):
            The generated pages.
        unmask_step (`torch.LongTensor`, `[batch, height, width]`):
            The denoising step, from 0, that unmasked each token; -1 for prompt tokens and padding.
        nfe (`int`):
            Number of function evaluations: forward passes. Rows that are finished are left out of later ones.
        scores (`torch.FloatTensor`, `[batch, height, width]`, *optional*):
            Log-probability of each generated token in the distribution that it was sampled from; 0 elsewhere.
            With `output_scores=True`.
        history (`torch.LongTensor`, `[steps + 1, batch, height, width]`, *optional*):
            The canvas before the first step and after each. With `output_history=True`.
    """

    sequences: torch.LongTensor
    unmask_step: torch.LongTensor | None = None
    nfe: int | None = None
    scores: torch.FloatTensor | None = None
    history: torch.LongTensor | None = None


def num_masked_after(
    step: int, num_masked: torch.Tensor, max_denoising_steps: int, mask_schedule: str
) -> torch.Tensor:
    """Number of tokens of each row that are still masked after a step of `"confidence"` or `"random"`.

    Each step unmasks at least one token, until none is masked after `min(max_denoising_steps, num_masked)` of them.

    Args:
        step: index of the step, from 0.
        num_masked: `[rows]`, int64: tokens that were masked before the first step.
        max_denoising_steps: number of steps that unmask them all.
        mask_schedule: `"linear"` or `"cosine"`.

    Returns:
        `[rows]`, int64.
    """
    last = num_masked.clamp(min=1, max=max_denoising_steps)
    done = last.clamp(max=step + 1)
    if mask_schedule == "linear":
        return num_masked - num_masked * done // last
    left = (num_masked * torch.cos(math.pi / 2 * done.double() / last)).floor().long()
    return torch.where(done == last, 0, torch.minimum(left, num_masked - done))


def _least(keys, is_masked, number):
    """The `number [rows]` masked tokens of each row with the least keys `[rows, cells]`; of equal ones the first."""
    order = keys.masked_fill(~is_masked, torch.inf).sort(dim=1, stable=True).indices
    ranks = order.argsort(dim=1)
    return is_masked & (ranks < number.unsqueeze(1))


def _first(is_masked):
    return is_masked & (is_masked.cumsum(1) == 1)


def _within_entropy_bound(entropy, is_masked, bound):
    """The masked tokens of least entropy whose sum stays within the bound, and always the first of them."""
    entropy, order = entropy.masked_fill(~is_masked, torch.inf).sort(dim=1, stable=True)
    fits = entropy.cumsum(1) <= bound
    fits[:, 0] = True
    return is_masked & torch.zeros_like(is_masked).scatter(1, order, fits)


class _Sampler:
    """Which masked tokens `[rows, cells]` of the rows with indices `rows` a step unmasks."""

    def __init__(self, config, num_masked, generator):
        self.config, self.num_masked, self.generator = config, num_masked, generator
        self.max_denoising_steps = config.max_denoising_steps or _DEFAULT_DENOISING_STEPS
        self.limit = torch.full_like(num_masked, torch.iinfo(torch.long).max)
        if config.sampler in ("confidence", "random"):
            self.limit = num_masked.clamp(max=self.max_denoising_steps)
        elif config.sampler == "entropy_bound" and config.max_denoising_steps is not None:
            self.limit = torch.full_like(num_masked, config.max_denoising_steps)

    def choose_before(self, is_masked, rows, step):
        """The choice of samplers that need no prediction; `None` for the others."""
        if self.config.sampler == "raster":
            return _first(is_masked)
        if self.config.sampler == "random":
            keys = torch.rand(is_masked.shape, generator=self.generator, device=is_masked.device)
            return _least(keys, is_masked, self._number(is_masked, rows, step))
        return None

    def choose_after(self, prediction, is_masked, rows, step):
        if self.config.sampler == "entropy_bound":
            return _within_entropy_bound(prediction.entropy, is_masked, self.config.entropy_bound)
        return _least(-prediction.confidence, is_masked, self._number(is_masked, rows, step))

    def _number(self, is_masked, rows, step):
        # Counted from what is masked now, so that remasked tokens are made up for.
        num_masked = self.num_masked[rows].cpu()  # where there is float64
        left = num_masked_after(step, num_masked, self.max_denoising_steps, self.config.mask_schedule)
        return is_masked.sum(1) - left.to(is_masked.device)

    def is_last(self, rows, step):
        """`[rows]`: whether no token may be left masked."""
        return step + 1 >= self.limit[rows]


@dataclass
class _Prediction:
    """Predictions for cells, all `[rows, cells]`; zero for cells that none was computed for."""

    sampled: torch.Tensor  # token ids; without sampling the most probable ones
    most_probable: torch.Tensor
    score: torch.Tensor  # log-probability of `sampled` in the distribution it was sampled from
    confidence: torch.Tensor  # probability of `sampled` before temperature, top-k and top-p
    entropy: torch.Tensor  # nats, likewise
    current: torch.Tensor  # probability of the token on the canvas, likewise


class _TokenDraw:
    """Tokens for cells: never a mask or a pad, then the caller's processors, then temperature, top-k and top-p."""

    def __init__(self, config, processors, forbidden, generator, width):
        self.processors, self.forbidden, self.generator, self.width = processors, forbidden, generator, width
        self.do_sample = config.do_sample
        self.warpers = LogitsProcessorList()
        if config.temperature not in (None, 1):
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p not in (None, 1):
            self.warpers.append(TopPLogitsWarper(float(config.top_p)))

    def __call__(self, logits, ids, looked_at):
        """Predict the cells `looked_at` of `ids`, both `[rows, cells]`, from `logits [rows, cells, vocab]`."""
        scores = logits[looked_at].to(torch.promote_types(logits.dtype, torch.float32))
        scores[:, self.forbidden] = -torch.inf
        if self.processors:
            scores = self._process(scores, ids, looked_at)
        log_probs = scores.log_softmax(-1)
        most_probable = sampled = log_probs.argmax(-1)
        warped = log_probs
        if self.do_sample:
            warped = self.warpers(None, log_probs).log_softmax(-1)
            sampled = torch.multinomial(warped.exp(), 1, generator=self.generator).squeeze(1)

        def spread(values):
            return values.new_zeros(looked_at.shape).masked_scatter(looked_at, values)

        def of(tokens, logs):
            return logs.gather(1, tokens.unsqueeze(1)).squeeze(1)

        return _Prediction(
            sampled=spread(sampled),
            most_probable=spread(most_probable),
            score=spread(of(sampled, warped)),
            confidence=spread(of(sampled, log_probs).exp()),
            entropy=spread(torch.special.entr(log_probs.exp()).sum(-1)),
            current=spread(of(ids[looked_at], log_probs).exp()),
        )

    def _process(self, scores, ids, looked_at):
        """The caller's processors, a page at a time: each cell is a row whose `input_ids` are the whole page."""
        processed = []
        for page, cells, page_scores in zip(ids, looked_at, scores.split(looked_at.sum(1).tolist())):
            if len(page_scores):
                where = cells.nonzero().squeeze(1)
                where = {"rows": where // self.width, "columns": where % self.width}
                page_scores = self.processors(page.expand(len(page_scores), -1), page_scores, **where)
            processed.append(page_scores)
        scores = torch.cat(processed)
        if not (scores > -torch.inf).any(-1).all():
            raise ValueError("`logits_processor` leaves a cell without any token that could be written.")
        return scores


class _Canvas:
    """The grids that are denoised, all `[batch, cells]`. `rows` are indices; other arguments are `[rows, cells]`."""

    def __init__(self, ids, mask_token_id, on_canvas):
        self.ids, self.mask_token_id = ids, mask_token_id
        self.is_masked = (ids == mask_token_id) & on_canvas
        self.may_remask = self.is_masked.clone()  # no token twice, prompt tokens never
        self.unmask_step = torch.full_like(ids, -1)
        self.scores = torch.zeros_like(ids, dtype=torch.float32)
        self.predicted = ids.clone()  # with the most probable token for every masked one
        self.stable_for = torch.zeros_like(ids[:, 0])  # steps without a change of these

    def unfinished(self):
        return self.is_masked.any(1).nonzero().squeeze(1)

    def unmasked(self, rows):
        """Generated tokens that may still be remasked."""
        return self.may_remask[rows] & ~self.is_masked[rows]

    def see(self, rows, most_probable):
        """Record the prediction. Returns the number of steps since it changed, `[rows]`."""
        predicted = torch.where(self.is_masked[rows], most_probable, self.ids[rows])
        same = (predicted == self.predicted[rows]).all(1)
        self.predicted[rows] = predicted
        self.stable_for[rows] = torch.where(same, self.stable_for[rows] + 1, 0)
        return self.stable_for[rows]

    def unmask(self, rows, cells, prediction, step):
        self.ids[rows] = torch.where(cells, prediction.sampled, self.ids[rows])
        self.scores[rows] = torch.where(cells, prediction.score.float(), self.scores[rows])
        self.unmask_step[rows] = self.unmask_step[rows].masked_fill(cells, step)
        self.is_masked[rows] &= ~cells

    def remask(self, rows, cells):
        self.ids[rows] = self.ids[rows].masked_fill(cells, self.mask_token_id)
        self.is_masked[rows] |= cells
        self.may_remask[rows] &= ~cells

    def draft(self):
        return torch.where(self.is_masked, self.predicted, self.ids)


class HeptapodGenerationMixin:
    """`generate` for models whose `forward` takes pages `[batch, height, width]` and returns `logits` for every cell.

    The model has `config.mask_token_id`, `config.pad_token_id` (may be `None`), `config.vocab_size`, and where
    `config.self_conditioning` is set its `forward` takes `self_conditioning_logits`.
    """

    generation_config_class = HeptapodGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: HeptapodGenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs,
    ) -> torch.LongTensor | HeptapodGenerateOutput:
        """Unmask all masked tokens of a batch of grids. Prompt tokens never change.

        A token is masked where `input_ids` is `config.mask_token_id` and `attention_mask` is not 0. Each denoising step
        predicts all masked tokens of the canvas, and the sampler unmasks some of them. Mask and padding tokens are
        never generated. A prompt without masked tokens is returned as it is, without a forward pass.

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, height, width]`, *optional*):
                The prompt. A flat `[batch, height * width]` is taken as well, with `height` and `width` or
                `config.grid_size`. Without a prompt the canvas is all masked, `height` by `width`.
            attention_mask (`torch.Tensor` of the shape of `input_ids`, bool or integer, *optional*):
                0 for padding, which is not attended to and never generated.
            generation_config ([`HeptapodGenerationConfig`], *optional*):
                Options; those that it does not set come from `self.generation_config`.
            logits_processor (list of `LogitsProcessor`, *optional*):
                Called for each row of the batch with `input_ids [cells, height * width]`, each row of it the canvas, and
                `scores [cells, vocab]` of the cells that may be unmasked, before temperature, top-k and top-p. One with
                two more parameters `rows` and `columns` gets the positions of these cells, `[cells]` each.
            generator (`torch.Generator`, *optional*):
                Source of all random numbers, on the device of the input.
            streamer (`BaseStreamer`, *optional*):
                Gets the prompt, after each step a draft of the whole canvas (through `put_draft`, if it has this
                method, such as `TextDiffusionStreamer`), then the result; all as `[batch, height * width]`.
            height, width (`int`, *optional*):
                Size of an empty or a flat canvas.
            kwargs:
                Options of [`HeptapodGenerationConfig`], which take precedence over `generation_config`.

        Returns:
            `torch.LongTensor` of the shape of `input_ids`, or [`HeptapodGenerateOutput`].

        Raises:
            ValueError: for a model without a mask token, unknown options, shapes that do not fit, pads without an
                `attention_mask`, a `logits_processor` that forbids every token.
            TypeError: for arguments of another type.
        """
        config = self._prepare_generation_config(generation_config, kwargs)
        mask_token_id, forbidden = self._special_tokens()
        shape, pages, on_canvas = self._prepare_canvas(input_ids, attention_mask, height, width)
        generator = _prepare_generator(generator, config.seed, pages.device)
        draw = _TokenDraw(config, _prepare_processors(logits_processor), forbidden, generator, pages.shape[2])
        on_canvas, batch_shape = on_canvas.flatten(1), pages.shape
        state = _Canvas(pages.flatten(1), mask_token_id, on_canvas)
        sampler = _Sampler(config, state.is_masked.sum(1), generator)
        drafts = hasattr(streamer, "put_draft")
        history = [state.ids.clone()]
        self_conditioning_logits, step = None, 0
        if streamer is not None:
            streamer.put(state.ids.to("cpu", copy=True))

        rows = state.unfinished()
        while len(rows):
            ids, is_masked = state.ids[rows], state.is_masked[rows]
            logits = self._predict(ids, on_canvas[rows], batch_shape, self_conditioning_logits)

            # All masked tokens are predicted only where the sampler or an option needs them.
            chosen = sampler.choose_before(is_masked, rows, step)
            looked_at = is_masked if chosen is None or drafts or config.stability_threshold else chosen
            unmasked = state.unmasked(rows)
            if config.remask_threshold is not None:
                looked_at = looked_at | unmasked
            prediction = draw(logits, ids, looked_at)
            if chosen is None:
                chosen = sampler.choose_after(prediction, is_masked, rows, step)

            ends = sampler.is_last(rows, step)
            if drafts or config.stability_threshold:
                stable_for = state.see(rows, prediction.most_probable)
                if config.stability_threshold:
                    ends = ends | (stable_for >= config.stability_threshold)
            state.unmask(rows, chosen | (is_masked & ends.unsqueeze(1)), prediction, step)
            if config.remask_threshold is not None:
                doubtful = unmasked & (prediction.current < config.remask_threshold)
                state.remask(rows, doubtful & ~ends.unsqueeze(1))

            step += 1
            if config.output_history:
                history.append(state.ids.clone())
            if drafts:
                streamer.put_draft(state.draft().cpu())
            if self._is_self_conditioned():
                self_conditioning_logits = logits[state.is_masked[rows].any(1)]
            rows = state.unfinished()

        if streamer is not None:
            streamer.put(state.ids.to("cpu", copy=True))
            streamer.end()
        if not config.return_dict_in_generate:
            return state.ids.view(shape)
        return HeptapodGenerateOutput(
            sequences=state.ids.view(shape),
            unmask_step=state.unmask_step.view(shape),
            nfe=step,
            scores=state.scores.view(shape) if config.output_scores else None,
            history=torch.stack(history).view(len(history), *shape) if config.output_history else None,
        )

    def _predict(self, ids, on_canvas, batch_shape, self_conditioning_logits):
        """Logits `[rows, cells, vocab]` of canvases `[rows, cells]`."""
        shape = (len(ids), *batch_shape[1:])
        conditions = {}
        if self_conditioning_logits is not None:
            conditions["self_conditioning_logits"] = self_conditioning_logits.view(*shape, -1)
        attention_mask = None if on_canvas.all() else on_canvas.view(shape).long()
        outputs = self(input_ids=ids.view(shape), attention_mask=attention_mask, return_dict=True, **conditions)
        return outputs.logits.flatten(1, 2)

    def _is_self_conditioned(self):
        return getattr(self.config, "self_conditioning", False)

    def _prepare_generation_config(self, generation_config, options):
        """Options of this call, over those of `generation_config`, over the model's own, over the defaults."""
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(
                f"`generation_config` must be a HeptapodGenerationConfig, got {type(generation_config).__name__}."
            )
        reject_renamed("heptapod generation", options)
        unknown = set(options) - set(_DEFAULTS)
        if unknown:
            raise ValueError(_unknown(unknown))
        # By value: what a checkpoint's own code made is of another class.
        config = HeptapodGenerationConfig(**(generation_config or self.generation_config).to_diff_dict())
        config.update(**self.generation_config.to_diff_dict(), defaults_only=True)
        config.update(**options)
        config.update(**_DEFAULTS, defaults_only=True)
        ignored = [name for name in ("temperature", "top_k", "top_p") if options.get(name) is not None]
        if ignored and not config.do_sample:
            logger.warning_once(f"{ignored} have no effect without `do_sample=True`.")
        return config

    def _special_tokens(self):
        """The mask token, and all tokens that are never generated."""
        mask, pad = (getattr(self.config, name, None) for name in ("mask_token_id", "pad_token_id"))
        if mask is None:
            raise ValueError(
                "`config.mask_token_id` is not set, so no token can be masked; set it to the mask token's id."
            )
        if not 0 <= mask < self.config.vocab_size:
            raise ValueError(
                f"`config.mask_token_id` must be in the vocabulary [0, {self.config.vocab_size}), got {mask}."
            )
        if mask == pad:
            raise ValueError(f"`config.mask_token_id` and `config.pad_token_id` must differ, both are {mask}.")
        return mask, [mask] if pad is None else [mask, pad]

    def _prepare_canvas(self, input_ids, attention_mask, height, width):
        """The prompt's shape, a copy of it to denoise, and where it is not padding, both `[batch, height, width]`."""
        for name, value in (("height", height), ("width", width)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        default = getattr(self.config, "grid_size", None) or (None, None)
        size = (height or default[0], width or default[1])
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("`attention_mask` was given without `input_ids`.")
            if None in size:
                raise ValueError("`input_ids`, or `height` and `width` of an empty canvas, must be given.")
            pages = torch.full((1, *size), self.config.mask_token_id, dtype=torch.long, device=self.device)
            return pages.shape, pages, torch.ones_like(pages, dtype=torch.bool)

        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
            if value.is_floating_point() or (value.dtype == torch.bool and name == "input_ids"):
                raise TypeError(f"`{name}` must hold integers, got {value.dtype}.")
        shape = input_ids.shape
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(
                f"`attention_mask` must have the shape {list(shape)} of `input_ids`, got {list(attention_mask.shape)}."
            )
        if 0 in shape:
            raise ValueError(f"`input_ids` must hold at least one page of at least one cell, got {list(shape)}.")
        if len(shape) == 3:
            if (height or shape[1], width or shape[2]) != tuple(shape[1:]):
                raise ValueError(
                    f"`height` and `width` ({height}, {width}) differ from those of `input_ids` {list(shape)}."
                )
            size = tuple(shape[1:])
        elif len(shape) != 2 or None in size or shape[1] != size[0] * size[1]:
            raise ValueError(
                f"`input_ids` must be [batch, height, width], or [batch, height * width] with `height` and `width` "
                f"(now {size[0]} and {size[1]}), got {list(shape)}."
            )
        pad = getattr(self.config, "pad_token_id", None)
        if attention_mask is None and pad is not None and (input_ids == pad).any():
            raise ValueError(
                f"`input_ids` hold the pad token {pad}, but there is no `attention_mask` that says where they are padding."
            )
        pages = input_ids.reshape(-1, *size).long().clone()
        if attention_mask is None:
            return shape, pages, torch.ones_like(pages, dtype=torch.bool)
        return shape, pages, attention_mask.reshape(-1, *size).bool()

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=False,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=None,
        **kwargs,
    ):
        """Called by `from_pretrained`: take its `generation_config`, or the checkpoint's generation_config.json.

        Its other `kwargs` are fields of the model's config, or options of loading.
        """
        if generation_config is not None:
            self.generation_config = HeptapodGenerationConfig(**generation_config.to_diff_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = HeptapodGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                )
            except OSError:
                logger.info("There is no generation config; all options have their defaults.")


def _prepare_generator(generator, seed, device):
    if generator is None:
        return None if seed is None else torch.Generator(device).manual_seed(seed)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator, got {type(generator).__name__}.")
    if generator.device.type != device.type:
        raise ValueError(f"`generator` must be on the device of the pages, {device}, got {generator.device}.")
    return generator


def _prepare_processors(logits_processor):
    processors = LogitsProcessorList() if logits_processor is None else logits_processor
    if not isinstance(processors, list | tuple) or not all(callable(processor) for processor in processors):
        raise TypeError(f"`logits_processor` must be a list of logits processors, got {logits_processor!r}.")
    return LogitsProcessorList(processors)


__all__ = ["HeptapodGenerateOutput", "HeptapodGenerationConfig", "HeptapodGenerationMixin", "num_masked_after"]
