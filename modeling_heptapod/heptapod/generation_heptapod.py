"""`generate` for the grid: each denoising step predicts all masked tokens, and a sampler decides which are unmasked.

In this order: the output, the draw of tokens, the canvas, one step, the loop. The options are in
`generation_config_heptapod.py`, the samplers in `samplers.py`.
"""

import time
from collections.abc import Callable, Sequence
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
from .generation_config_heptapod import DEFAULTS, HeptapodGenerationConfig, reject_unknown
from .samplers import MEASURES, SAMPLERS


logger = logging.get_logger(__name__)


@dataclass
class HeptapodGenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate=True`. All tensors have the shape of the prompt.

    Args:
        sequences (`torch.LongTensor`, `[batch, height, width]`):
            The generated pages.
        unmask_step (`torch.LongTensor`, `[batch, height, width]`):
            The denoising step, from 0, that unmasked each token; -1 for prompt tokens and padding.
        nfe (`int`):
            Number of function evaluations: forward passes. Finished rows are left out of later ones.
        seconds (`float`):
            Time that the call took.
        confidence (`torch.FloatTensor`, `[batch, height, width]`):
            Probability of each generated token when it was unmasked, before temperature, top-k and top-p; 1 elsewhere.
        scores (`torch.FloatTensor`, `[batch, height, width]`, *optional*):
            Log-probability of each generated token in the distribution that it was sampled from; 0 elsewhere.
            With `output_scores=True`.
        history (`torch.LongTensor`, `[steps + 1, batch, height, width]`, *optional*):
            The canvas before the first step and after each. With `output_history=True`.
    """

    sequences: torch.Tensor
    unmask_step: torch.Tensor | None = None
    nfe: int | None = None
    seconds: float | None = None
    confidence: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    history: torch.Tensor | None = None


@dataclass
class _Prediction:
    """Predictions for cells, all `[rows, cells]`; zero for cells without one."""

    sampled: torch.Tensor  # token ids; without sampling the most probable ones
    most_probable: torch.Tensor
    score: torch.Tensor  # log-probability of `sampled` in the distribution it was sampled from
    confidence: torch.Tensor  # probability of `sampled` before temperature, top-k and top-p
    measured: torch.Tensor | None  # what the sampler reads, likewise
    current: torch.Tensor  # probability of the token on the canvas, likewise


class _TokenDraw:
    """Draws tokens: mask and padding tokens are excluded, then custom processors apply, then temperature, top-k, top-p."""

    def __init__(self, config, processors, forbidden, generator, width):
        self.processors, self.forbidden, self.generator, self.width = processors, forbidden, generator, width
        self.do_sample = config.do_sample
        self.temperature = config.temperature if isinstance(config.temperature, list | tuple) else None
        self.warpers = LogitsProcessorList()
        if config.temperature not in (None, 1) and self.temperature is None:
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p not in (None, 1):
            self.warpers.append(TopPLogitsWarper(float(config.top_p)))

    def __call__(self, logits, ids, wanted, measure, progress):
        """Predicts the cells `wanted` of `ids`, both `[rows, cells]`, from `logits [rows, cells, vocab]`.

        `measure` is that of the sampler, `progress [rows]` goes from 0 in the first step to 1 in the last.
        """
        scores = logits[wanted].to(torch.promote_types(logits.dtype, torch.float32))
        scores[:, self.forbidden] = -torch.inf
        if self.processors:
            scores = self._process(scores, ids, wanted)
        log_probs = scores.log_softmax(-1)
        most_probable = sampled = log_probs.argmax(-1)
        warped = log_probs
        if self.do_sample:
            if self.temperature is not None:
                first, last = self.temperature
                temperature = (first + (last - first) * progress).repeat_interleave(wanted.sum(1))
                warped = warped / temperature.to(warped).unsqueeze(1)
            warped = self.warpers(None, warped).log_softmax(-1)  # type: ignore[arg-type]  # none reads `input_ids`
            sampled = torch.multinomial(warped.exp(), 1, generator=self.generator).squeeze(1)

        def spread(values):
            return values.new_zeros(wanted.shape).masked_scatter(wanted, values)

        def of(tokens, logs):
            return logs.gather(1, tokens.unsqueeze(1)).squeeze(1)

        return _Prediction(
            sampled=spread(sampled),
            most_probable=spread(most_probable),
            score=spread(of(sampled, warped)),
            confidence=spread(of(sampled, log_probs).exp()),
            measured=None if measure is None else spread(MEASURES[measure](log_probs, sampled)),
            current=spread(of(ids[wanted], log_probs).exp()),
        )

    def _process(self, scores, ids, wanted):
        """Applies custom processors, a page at a time: each cell is a row whose `input_ids` are the complete page."""
        processed = []
        for page, cells, page_scores in zip(ids, wanted, scores.split(wanted.sum(1).tolist())):
            if len(page_scores):
                where = cells.nonzero().squeeze(1)
                where = {"rows": where // self.width, "columns": where % self.width}
                page_scores = self.processors(page.expand(len(page_scores), -1), page_scores, **where)
            processed.append(page_scores)
        scores = torch.cat(processed)
        if not (scores > -torch.inf).any(-1).all():
            raise ValueError("`logits_processor` leaves a cell without any token.")
        return scores


class _Canvas:
    """The grids that are denoised, all `[batch, cells]`. `rows` are indices; other arguments are `[rows, cells]`."""

    def __init__(self, ids, mask_token_id, on_canvas):
        self.ids, self.mask_token_id = ids, mask_token_id
        self.is_masked = (ids == mask_token_id) & on_canvas
        self.generated = self.is_masked.clone()
        self.may_remask = torch.ones_like(self.is_masked)  # below the threshold, at most once
        self.unmask_step = torch.full_like(ids, -1)
        self.scores = torch.zeros_like(ids, dtype=torch.float32)
        self.confidence = torch.ones_like(self.scores)
        self.predicted = ids.clone()  # with the most probable token for every masked one
        self.stable_for = torch.zeros_like(ids[:, 0])  # steps without a change of these

    def unfinished(self):
        return self.is_masked.any(1).nonzero().squeeze(1)

    def unmasked(self, rows):
        """Tokens generated so far."""
        return self.generated[rows] & ~self.is_masked[rows]

    def record(self, rows, most_probable):
        """Records the prediction. Returns the number of steps since it changed, `[rows]`."""
        predicted = torch.where(self.is_masked[rows], most_probable, self.ids[rows])
        same = (predicted == self.predicted[rows]).all(1)
        self.predicted[rows] = predicted
        self.stable_for[rows] = torch.where(same, self.stable_for[rows] + 1, 0)
        return self.stable_for[rows]

    def unmask(self, rows, cells, prediction, step):
        self.ids[rows] = torch.where(cells, prediction.sampled, self.ids[rows])
        self.scores[rows] = torch.where(cells, prediction.score.float(), self.scores[rows])
        self.confidence[rows] = torch.where(cells, prediction.confidence.float(), self.confidence[rows])
        self.unmask_step[rows] = self.unmask_step[rows].masked_fill(cells, step)
        self.is_masked[rows] &= ~cells

    def remask(self, rows, cells):
        self.ids[rows] = self.ids[rows].masked_fill(cells, self.mask_token_id)
        self.is_masked[rows] |= cells

    def draft(self):
        return torch.where(self.is_masked, self.predicted, self.ids)


def _denoise(canvas, rows, step, logits, sampler, draw, drafts):
    """One denoising step of the canvases `rows`, from their `logits [rows, cells, vocab]`."""
    config, is_masked, unmasked = sampler.config, canvas.is_masked[rows], canvas.unmasked(rows)
    remasked, chosen = sampler.remask(unmasked, rows, step), None
    if sampler.measure is None:
        chosen = sampler.choose(is_masked, rows, step, None)
    # All masked tokens are predicted only if the sampler or an option needs them.
    wanted = is_masked if chosen is None or drafts or config.stability_threshold else chosen
    if config.remask_threshold is not None:
        wanted = wanted | unmasked
    prediction = draw(logits, canvas.ids[rows], wanted, sampler.measure, sampler.progress(rows, step))
    if chosen is None:
        chosen = sampler.choose(is_masked, rows, step, prediction.measured)

    ends = sampler.is_last(rows, step)
    if drafts or config.stability_threshold:
        stable_for = canvas.record(rows, prediction.most_probable)
        if config.stability_threshold:
            ends = ends | (stable_for >= config.stability_threshold)
    ends = ends.unsqueeze(1)
    canvas.unmask(rows, chosen | (is_masked & ends), prediction, step)
    if remasked is not None:
        canvas.remask(rows, remasked & ~ends)
    if config.remask_threshold is not None:
        improbable = unmasked & canvas.may_remask[rows] & (prediction.current < config.remask_threshold)
        canvas.remask(rows, improbable & ~ends)
        canvas.may_remask[rows] &= ~improbable


class HeptapodGenerationMixin:
    """`generate` for models whose `forward` takes pages `[batch, height, width]` and returns `logits` for every cell.

    The model has `config.mask_token_id`, `config.pad_token_id` (may be `None`), `config.vocab_size`, and where
    `config.self_conditioning` is set its `forward` takes `self_conditioning_logits`.
    """

    generation_config_class: type[GenerationConfig] = HeptapodGenerationConfig
    generation_config: GenerationConfig
    config: Any
    device: torch.device
    __call__: Callable[..., Any]

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
    ) -> torch.Tensor | HeptapodGenerateOutput:
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
        began = time.perf_counter()
        config = self._prepare_generation_config(generation_config, kwargs)
        mask_token_id, forbidden = self._special_tokens()
        shape, pages, on_canvas = self._prepare_canvas(input_ids, attention_mask, height, width)
        generator = _prepare_generator(generator, config.seed, pages.device)
        draw = _TokenDraw(config, _prepare_processors(logits_processor), forbidden, generator, pages.shape[2])
        on_canvas, batch_shape = on_canvas.flatten(1), pages.shape
        canvas = _Canvas(pages.flatten(1), mask_token_id, on_canvas)
        if not canvas.is_masked.any():
            logger.warning_once(f"`input_ids` hold no mask token ({mask_token_id}), so there is nothing to generate.")
        sampler = SAMPLERS[config.sampler](config, canvas.is_masked.sum(1), generator)
        _check_annealing(config, sampler)
        put_draft = getattr(streamer, "put_draft", None)
        history = [canvas.ids.clone()]
        self_conditioning_logits, step = None, 0
        if streamer is not None:
            streamer.put(canvas.ids.to("cpu", copy=True))

        rows = canvas.unfinished()
        while len(rows):
            logits = self._predict(canvas.ids[rows], on_canvas[rows], batch_shape, self_conditioning_logits)
            _denoise(canvas, rows, step, logits, sampler, draw, put_draft is not None)
            step += 1
            if config.output_history:
                history.append(canvas.ids.clone())
            if put_draft is not None:
                put_draft(canvas.draft().cpu())
            if getattr(self.config, "self_conditioning", False):
                self_conditioning_logits = logits[canvas.is_masked[rows].any(1)]
            rows = canvas.unfinished()

        if streamer is not None:
            streamer.put(canvas.ids.to("cpu", copy=True))
            streamer.end()
        if not config.return_dict_in_generate:
            return canvas.ids.view(shape)
        return HeptapodGenerateOutput(
            sequences=canvas.ids.view(shape),
            unmask_step=canvas.unmask_step.view(shape),
            nfe=step,
            seconds=time.perf_counter() - began,
            confidence=canvas.confidence.view(shape),
            scores=canvas.scores.view(shape) if config.output_scores else None,
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

    def _prepare_generation_config(self, generation_config, options):
        """Options of this call, then those of `generation_config`, of the model, and the defaults."""
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(
                f"`generation_config` must be a HeptapodGenerationConfig, got {type(generation_config).__name__}."
            )
        reject_renamed("heptapod generation", options)
        reject_unknown(options)
        # By value, as a config of a checkpoint's own code is of another class.
        config = HeptapodGenerationConfig(**(generation_config or self.generation_config).to_diff_dict())
        config.update(**self.generation_config.to_diff_dict(), defaults_only=True)
        config.update(**options)
        config.update(**DEFAULTS, defaults_only=True)
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
        """The prompt's shape, a copy of it to denoise, and a mask of its cells, both `[batch, height, width]`."""
        for name, value in (("height", height), ("width", width)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        default = getattr(self.config, "grid_size", None) or (None, None)
        rows, columns = height or default[0], width or default[1]
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("`attention_mask` was given without `input_ids`.")
            if rows is None or columns is None:
                raise ValueError("`input_ids`, or `height` and `width` of an empty canvas, must be given.")
            pages = torch.full((1, rows, columns), self.config.mask_token_id, dtype=torch.long, device=self.device)
            return pages.shape, pages, torch.ones_like(pages, dtype=torch.bool)

        _check_prompt(input_ids, attention_mask, getattr(self.config, "pad_token_id", None))
        shape = input_ids.shape
        if len(shape) == 3:
            if (height or shape[1], width or shape[2]) != tuple(shape[1:]):
                raise ValueError(
                    f"`height` and `width` ({height}, {width}) differ from those of `input_ids` {list(shape)}."
                )
            rows, columns = shape[1:]
        elif len(shape) != 2 or rows is None or columns is None or shape[1] != rows * columns:
            raise ValueError(
                f"`input_ids` must be [batch, height, width], or [batch, height * width] with `height` and `width` "
                f"(now {rows} and {columns}), got {list(shape)}."
            )
        pages = input_ids.reshape(-1, rows, columns).long().clone()
        if attention_mask is None:
            return shape, pages, torch.ones_like(pages, dtype=torch.bool)
        return shape, pages, attention_mask.reshape(-1, rows, columns).bool()

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
        """Called by `from_pretrained`: sets its `generation_config`, or the checkpoint's generation_config.json.

        `kwargs` are fields of the model's config and options of loading.
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
                logger.info("The checkpoint has no generation config; all options have their defaults.")


def _check_prompt(input_ids, attention_mask, pad_token_id):
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
        if value.is_floating_point() or (value.dtype == torch.bool and name == "input_ids"):
            raise TypeError(f"`{name}` must hold integers, got {value.dtype}.")
    shape = list(input_ids.shape)
    if attention_mask is not None and list(attention_mask.shape) != shape:
        raise ValueError(
            f"`attention_mask` must have the shape {shape} of `input_ids`, got {list(attention_mask.shape)}."
        )
    if 0 in shape:
        raise ValueError(f"`input_ids` must hold at least one page of at least one cell, got {shape}.")
    if attention_mask is None and pad_token_id is not None and (input_ids == pad_token_id).any():
        raise ValueError(f"`input_ids` hold the padding token {pad_token_id}, which needs an `attention_mask`.")


def _check_annealing(config, sampler):
    """Raises a `ValueError` for a temperature that changes over steps whose number is not known."""
    if isinstance(config.temperature, list | tuple) and (sampler.limit == torch.iinfo(torch.long).max).any():
        raise ValueError(
            f"`temperature` of the first and the last step, {config.temperature}, needs a number of steps, which "
            f"{config.sampler!r} does not have: give `max_denoising_steps`, another sampler, or one temperature."
        )


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


__all__ = ["HeptapodGenerateOutput", "HeptapodGenerationMixin"]
