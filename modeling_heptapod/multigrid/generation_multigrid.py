"""`generate` for MultiGrid: every new token has axis ids that are predicted, annotated from the text, or forced.

The decoding loops are transformers' own. They call `prepare_inputs_for_generation` before each forward pass and
`_update_model_kwargs_for_generation` after it, which pass axis ids on. The state of a call, in `axis_state.py`, is in its
model kwargs.

When the axis id of position `t + 1` is known:

    source       parallel order                           factored order
    predicted    with the main token of t + 1             before the main token of t + 1, which is conditioned on it
    forced       the same                                 the same: the main token is conditioned on the given id
    annotated    after it, by rule from the text          the main token is conditioned on a predicted id, which the
                                                          annotation then replaces
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)

from ..common.cache_mixins import CompiledStepMixin
from ..common.model_inputs import check_ids
from ..common.transformers_versions import CACHE, with_cache_argument
from .axis_state import AxisState, Sources
from .configuration_multigrid import MultiGridConfig


AXIS_SOURCES = ("predicted", "annotated", "forced")


@dataclass
class MultiGridGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate` with `return_dict_in_generate=True`, without beams.

    Args:
        axis_sequences (`torch.LongTensor` of shape `[batch, axes, length]`):
            Axis ids of every token of `sequences`, with axes in the order of `config.axis_names`, and 0 at pads after a
            finished row.
    """

    axis_sequences: torch.Tensor | None = None


@dataclass
class MultiGridGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """Output of `generate` with `return_dict_in_generate=True`, with beams.

    Args:
        axis_sequences (`torch.LongTensor` of shape `[batch, axes, length]`):
            As in [`MultiGridGenerateOutput`], of the returned hypotheses.
    """

    axis_sequences: torch.Tensor | None = None


class _NotesFinishedRows(StoppingCriteriaList):
    """Stopping criteria that also record which rows are finished and continue with padding."""

    def __init__(self, criteria, axis_state):
        super().__init__(criteria)
        self.axis_state = axis_state
        self.finished_rows_get_pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def __call__(self, input_ids, scores, **kwargs):
        done = super().__call__(input_ids, scores, **kwargs)
        if self.finished_rows_get_pads:
            self.axis_state.finished |= done
        return done


def _with_axis_state(loop):
    """A custom decoding loop (`custom_generate`) with the state of the axes in its model kwargs."""

    @wraps(loop)  # `generate` reads the signature
    def loop_with_axes(model, input_ids, *, stopping_criteria, generation_config, **kwargs):
        axis_state = model._start_axis_state(input_ids, generation_config, kwargs, beams=generation_config.num_beams)
        stopping_criteria = _NotesFinishedRows(stopping_criteria, axis_state)
        kwargs.update(stopping_criteria=stopping_criteria, generation_config=generation_config, axis_state=axis_state)
        return loop(model, input_ids, **kwargs)

    return loop_with_axes


class MultiGridGenerationMixin(CompiledStepMixin, GenerationMixin):
    """`generate` with axes. Without axes it is transformers' own."""

    # Of the model. Transformers' annotation of `self`, a protocol that no model fulfils, needs the ignored errors below.
    config: MultiGridConfig
    main_logits: Callable[..., torch.Tensor]

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        axis_source: str | dict[str, str] = "predicted",
        processor: Any = None,
        forced_axis_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        """As [`GenerationMixin.generate`], with axis ids.

        Args:
            inputs, generation_config, args, kwargs:
                As there. `axis_ids` (`torch.LongTensor` of shape `[batch, axes, prompt]`) are those of the prompt, which a
                [`MultiGridProcessor`] returns with the `input_ids`. With axes they are required, or `processor`, which then
                annotates the prompt, as for pipelines, which pass `input_ids` only.
            axis_source (`str` or `dict[str, str]`, *optional*, defaults to `"predicted"`):
                Source of the axis ids, for all axes or by name (`"predicted"` where a name is missing):

                - `"predicted"`: by the model. The likeliest id, or with `do_sample=True` one sampled at `temperature`. Other
                  logits processors apply to main tokens only.
                - `"annotated"`: by the rule of the axis, from the text so far. Needs `processor`, and a causal axis.
                - `"forced"`: from `forced_axis_ids`. In the parallel order the main stream reads a forced id at its position,
                  so it affects later tokens. In the factored order it also affects the token at its position.
            processor ([`MultiGridProcessor`], *optional*):
                Its tokenizer decodes tokens, and its axes annotate the new text, and the prompt where `axis_ids` are not
                given.
            forced_axis_ids (`torch.LongTensor` of shape `[batch, forced axes or all axes, steps]`, *optional*):
                Axis ids of the new tokens, at least as many as are generated. Of all axes the forced ones are read.
            custom_generate (`Callable` or `str`, *optional*):
                As there. A custom loop gets the axis ids in its keyword arguments and passes these on to
                `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation`. It must call them in the order of
                the stock loops: inputs, forward pass, update, and then read the logits.

        Returns:
            `sequences`, or with `return_dict_in_generate=True` a [`MultiGridGenerateOutput`] or
            [`MultiGridGenerateBeamOutput`] with `axis_sequences`. Scores are those of main tokens.

        Raises:
            TypeError: for an `axis_source`, `axis_ids` or `forced_axis_ids` of another type.
            ValueError: for a `guidance_scale`, assisted decoding, unknown axes or sources, a missing `processor` or `axis_ids`,
                an annotated axis that is not causal, and forced ids of a wrong shape, of too few tokens, or outside of the
                vocabulary of their axis.
        """
        sources = self._axis_sources(axis_source, processor, forced_axis_ids)
        if kwargs.get("axis_ids") is not None:
            check_ids("axis_ids", kwargs["axis_ids"])
        loop = kwargs.get("custom_generate")
        if sources.of_axes and isinstance(loop, str):  # code from a folder, which calls `generate` again
            kwargs.update(axis_source=axis_source, processor=processor, forced_axis_ids=forced_axis_ids)
        elif sources.of_axes:
            if loop is not None:
                kwargs["custom_generate"] = _with_axis_state(loop)
            kwargs.update(axis_sources=sources, forced_axis_ids=forced_axis_ids)
        else:
            axis_ids = kwargs.pop("axis_ids", None)
            if axis_ids is not None and axis_ids.numel():
                raise ValueError(f"`axis_ids` of shape {list(axis_ids.shape)} were given, but the model has no axes.")
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    @with_cache_argument
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        axis_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        axis_state: AxisState | None = None,
        axis_sources: Sources | None = None,
        forced_axis_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        """As the stock method, with the axis ids of the tokens of the next forward pass."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE: past_key_values},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if axis_ids is not None:
            inputs["axis_ids"] = axis_ids
        if axis_state is not None:
            if not is_first_iteration:
                axis_state.follow(input_ids)
            given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            inputs["axis_ids"] = axis_state.at(past, given.shape[1]).to(given.device)
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        axis_state = model_kwargs.get("axis_state")
        if axis_state is not None:
            next_axis_ids = axis_state.choose(tuple(logits[:, -1] for logits in outputs.axis_logits))
            if self.config.axis_order == "factored":
                hidden = outputs.main_hidden_states[:, -1:]
                outputs.logits = self.main_logits(hidden, next_axis_ids.unsqueeze(-1).to(hidden.device))
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        axis_state = self._start_axis_state(input_ids, generation_config, kwargs)
        if axis_state is not None:
            stopping_criteria = _NotesFinishedRows(stopping_criteria, axis_state)
            kwargs["axis_state"] = axis_state
        out = super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs
        )
        if axis_state is None or isinstance(out, torch.Tensor):
            return out
        return MultiGridGenerateOutput(**out, axis_sequences=axis_state.of_rows(out.sequences))

    def _beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        axis_state = self._start_axis_state(input_ids, generation_config, kwargs, beams=generation_config.num_beams)
        if axis_state is not None:
            kwargs["axis_state"] = axis_state
        out = super()._beam_search(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs
        )
        if axis_state is None or isinstance(out, torch.Tensor):
            return out
        axis_sequences = axis_state.of_beams(
            out.sequences, out["beam_indices"], generation_config.num_return_sequences
        )
        return MultiGridGenerateBeamOutput(**out, axis_sequences=axis_sequences)

    def _assisted_decoding(self, *args, **kwargs):
        if self.config.axis_names:
            raise ValueError(
                "Assisted decoding is not supported with axes: drafted tokens come without their axis ids. Leave "
                "`assistant_model` and `prompt_lookup_num_tokens` out."
            )
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]

    def _axis_sources(self, axis_source, processor, forced_axis_ids) -> Sources:
        names = list(self.config.axis_names)
        by_name = dict.fromkeys(names, axis_source) if isinstance(axis_source, str) else axis_source
        if not isinstance(by_name, dict):
            raise TypeError(f"`axis_source` must be a string or a dict, got {type(axis_source).__name__}.")
        unknown = sorted(set(by_name) - set(names))
        if unknown:
            raise ValueError(f"`axis_source` names unknown axes {unknown}; the model's are {names}.")
        wrong = [source for source in (*by_name.values(), axis_source) if source not in AXIS_SOURCES]
        if isinstance(axis_source, dict):
            wrong = wrong[:-1]
        if wrong:
            raise ValueError(f"`axis_source` must be one of {AXIS_SOURCES}, got {wrong[0]!r}.")
        of_axes = tuple(by_name.get(name, "predicted") for name in names)
        if ("forced" in of_axes) != (forced_axis_ids is not None):
            raise ValueError(
                "`forced_axis_ids` need an `axis_source` of 'forced' and vice versa, got "
                f"axis_source={axis_source!r} and {'no' if forced_axis_ids is None else 'some'} `forced_axis_ids`."
            )
        if forced_axis_ids is not None:
            check_ids("forced_axis_ids", forced_axis_ids)
        annotators = tuple(self._annotator(name, processor) for name in names if by_name.get(name) == "annotated")
        return Sources(of_axes, processor, annotators)

    def _annotator(self, name, processor):
        if processor is None:
            raise ValueError(
                f"`processor` is needed to annotate axis {name!r}, got None: pass the MultiGridProcessor."
            )
        axes = {axis.name: axis for axis in processor.axes}
        if name not in axes:
            raise ValueError(f"`processor` has no axis {name!r}; its axes are {list(axes)}.")
        axis, size = axes[name], self.config.axis_vocab_sizes[list(self.config.axis_names).index(name)]
        if not axis.causal:
            raise ValueError(
                f"Axis {name!r} cannot be annotated during generation, since it is not causal: "
                f"{axis.why_not_causal.rstrip('.')}. Use the source 'predicted' or 'forced' for it."
            )
        if len(axis.vocabulary) != size:
            raise ValueError(
                f"Axis {name!r} of `processor` has {len(axis.vocabulary)} axis ids, that of the model has {size}."
            )
        return axis

    def _start_axis_state(self, input_ids, generation_config, model_kwargs, beams=1) -> AxisState | None:
        """The state of a call. Arguments about axis ids are removed from `model_kwargs`."""
        sources, forced, axis_ids = (
            model_kwargs.pop(x, None) for x in ("axis_sources", "forced_axis_ids", "axis_ids")
        )
        if sources is None:
            return None
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"`guidance_scale` must be 1 with axes, got {generation_config.guidance_scale}: the pass without the "
                "prompt has no axis ids."
            )
        embeds, cache, mask = (model_kwargs.get(x) for x in ("inputs_embeds", CACHE, "attention_mask"))
        rows, length = (input_ids if embeds is None else embeds).shape[:2]
        expected = [rows, len(sources.of_axes), length]
        past = 0 if cache is None else int(cache.get_seq_length())
        if axis_ids is None and sources.processor is not None and embeds is None and past == 0:
            axis_ids = self._annotate_prompts(sources.processor, input_ids, mask)
        if axis_ids is None or list(axis_ids.shape) != expected:
            got = "None" if axis_ids is None else list(axis_ids.shape)
            raise ValueError(
                f"`axis_ids` must be [batch, axes, prompt] = {expected} (rows repeated for beams), got {got}: the "
                "processor returns them with the `input_ids`; or pass `processor`, which annotates a prompt of tokens."
            )
        annotated = sources.places("annotated")
        # Length by which `generate` distinguishes whole sequences from new tokens after a cache.
        whole_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        whole = embeds is not None or past == 0 or length == whole_length
        if annotated and (embeds is not None or not whole):
            raise ValueError(
                f"Axes {[self.config.axis_names[a] for a in annotated]} cannot be annotated: the text from its beginning "
                f"is needed, pass all of it as `input_ids`, also what is in `{CACHE}`."
            )
        if forced is not None:
            forced = self._check_forced(sources, forced, rows, generation_config.max_length - input_ids.shape[1])
        temperature = None
        if generation_config.do_sample:
            temperature = 1.0 if generation_config.temperature is None else generation_config.temperature
        device = input_ids.device
        return AxisState(
            sources,
            input_ids,
            mask,
            axis_ids.to(device),
            None if forced is None else forced.to(device),
            past=0 if whole else past,
            beams=beams,
            temperature=temperature,
        )

    def _annotate_prompts(self, processor, tokens, mask) -> torch.Tensor:
        """Axis ids `[rows, axes, length]` of prompts `[rows, length]` by the axes of `processor`, 0 at pads."""
        names = self.config.axis_names
        ahead = [axis.name for axis in processor.axes if axis.name in names and not axis.causal]
        if ahead:
            raise ValueError(
                f"`axis_ids` of the prompt must be given: axes {ahead} of `processor` look ahead and can't be stepped."
            )
        axes = tuple(self._annotator(name, processor) for name in names)
        axis_ids = tokens.new_zeros(len(tokens), len(names), tokens.shape[1])
        reader = AxisState(
            Sources(("annotated",) * len(names), processor, axes), tokens[:, :0], None, axis_ids[..., :0], None
        )
        for row, reading in enumerate(reader.readings):
            places = range(tokens.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
            for place in places:
                ids, reading = reader.read(reading, int(tokens[row, place]))
                axis_ids[row, :, place] = axis_ids.new_tensor(ids)
        return axis_ids

    def _check_forced(self, sources: Sources, forced: torch.Tensor, rows: int, steps: int) -> torch.Tensor:
        places = sources.places("forced")
        names = [self.config.axis_names[place] for place in places]
        if forced.dim() != 3 or forced.shape[0] != rows or forced.shape[1] not in (len(places), len(sources.of_axes)):
            raise ValueError(
                f"`forced_axis_ids` must be [batch, axes, steps] with rows for {names} or for all {len(sources.of_axes)} "
                f"axes and a batch of {rows}, got {list(forced.shape)}."
            )
        if forced.shape[2] < steps:
            raise ValueError(
                f"`forced_axis_ids` must have an id for each of the {steps} tokens that may be generated, got "
                f"{forced.shape[2]}."
            )
        if forced.shape[1] != len(places):
            forced = forced[:, places]
        for name, place, ids in zip(names, places, forced.unbind(1)):
            size = self.config.axis_vocab_sizes[place]
            if not ((ids >= 0) & (ids < size)).all():
                raise ValueError(
                    f"`forced_axis_ids` of axis {name!r} must be in [0, {size}), got values from {int(ids.min())} to "
                    f"{int(ids.max())}."
                )
        return forced


__all__ = ["AXIS_SOURCES", "MultiGridGenerateBeamOutput", "MultiGridGenerateOutput", "MultiGridGenerationMixin"]
