"""The axis ids of one call of `generate`: their sources, and the ids of all rows so far."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..common.processing_utils import special_token_ids


@dataclass(frozen=True)
class Sources:
    """Source of the ids of each axis, and the axes that annotate."""

    of_axes: tuple[str, ...]
    processor: Any = None
    annotators: tuple = ()  # of the annotated axes, in order

    def places(self, source: str) -> list[int]:
        return [place for place, name in enumerate(self.of_axes) if name == source]


class _Reading(NamedTuple):
    """Tokens of a row that complete no character yet, and the state of each annotator. Beams share it."""

    pending: tuple
    states: tuple


class AxisState:
    """The axis ids of all rows during one call of `generate`.

    Between two forward passes `choose` adds the axis ids of a position, then the decoding loop adds the main tokens, then
    `follow` reorders rows as beams were reordered, and annotates the new tokens.

    Args:
        sources (`Sources`): sources of the axis ids.
        tokens (`torch.LongTensor` of shape `[rows, length]`): tokens of the prompts, of length 0 for embeddings.
        mask (`torch.Tensor` of shape `[rows, length]`, *optional*): which tokens are real.
        axis_ids (`torch.LongTensor` of shape `[rows, axes, prompt]`): of the prompts.
        forced (`torch.LongTensor` of shape `[rows, forced axes, steps]`, *optional*): ids given by the caller.
        past (`int`): number of cached tokens before the first of `axis_ids`.
        beams (`int`): number of rows of each prompt.
        temperature (`float`, *optional*): at which predicted axis ids are sampled. `None` for the likeliest ids.
    """

    def __init__(self, sources, tokens, mask, axis_ids, forced, past=0, beams=1, temperature=None):
        self.sources, self.tokens, self.axis_ids, self.forced = sources, tokens, axis_ids, forced
        self.past, self.beams, self.temperature = past, beams, temperature
        self.prompt_length, self.prompt_axis_ids = tokens.shape[1], axis_ids
        self.finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        self.chosen = []  # of each step, [rows, axes]
        self.annotated = sources.places("annotated")
        self.special_tokens = special_token_ids(sources.processor.tokenizer) if self.annotated else set()
        self.readings = self.prompt_readings = self._read_prompts(mask)

    def at(self, first: int, length: int) -> torch.Tensor:
        """Axis ids of `length` tokens, the first of which has `first` tokens before it: `[rows, axes, length]`."""
        first -= self.past
        # A copy, whose strides do not depend on the number of tokens: a compiled step reads them.
        return self.axis_ids[..., first : first + length].clone(memory_format=torch.contiguous_format)

    def choose(self, axis_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Axis ids of the next position from logits `[rows, axis vocabulary]` of each axis: `[rows, axes]`."""
        self.writes_pads = self.finished.clone()
        forced = self.sources.places("forced")
        ids = []
        for axis, logits in enumerate(axis_logits):
            if axis in forced:
                ids.append(self.forced[:, forced.index(axis), len(self.chosen)])
            elif self.temperature is None:
                ids.append(logits.argmax(-1))
            else:
                chances = (logits.float() / self.temperature).softmax(-1)
                ids.append(torch.multinomial(chances, 1).squeeze(-1))
        chosen = torch.stack([of_axis.to(self.tokens.device) for of_axis in ids], dim=1)
        self.chosen.append(chosen.masked_fill(self.writes_pads.unsqueeze(1), 0))
        self.axis_ids = torch.cat((self.axis_ids, self.chosen[-1].unsqueeze(-1)), dim=-1)
        return self.chosen[-1]

    def follow(self, tokens: torch.Tensor) -> None:
        """Continue with sequences `[rows, length]` that are one token longer, in the order of the beams."""
        if self.beams > 1:
            parents = self._parents(tokens[:, :-1])
            self.axis_ids = self.axis_ids[parents]
            self.readings = [self.readings[row] for row in parents.tolist()]
        self.tokens = tokens
        if self.annotated:
            self.readings = list(self.readings)
            for row in (~self.writes_pads).nonzero().flatten().tolist():
                ids, self.readings[row] = self.read(self.readings[row], int(tokens[row, -1]))
                self.axis_ids[row, self.annotated, -1] = self.axis_ids.new_tensor(ids)

    def of_rows(self, sequences: torch.Tensor) -> torch.Tensor:
        """Axis ids `[rows, axes, length]` of finished `sequences [rows, length]` without beams."""
        if sequences.shape[1] > self.tokens.shape[1]:
            self.follow(sequences)
        first = self.prompt_axis_ids.shape[-1] - self.prompt_length  # sequences do not contain prompts of embeddings
        return self.axis_ids[..., first : first + sequences.shape[1]]

    def of_beams(self, sequences: torch.Tensor, beam_indices: torch.Tensor, per_prompt: int):
        """Axis ids `[rows, axes, length]` of finished hypotheses.

        Args:
            sequences (`torch.LongTensor` of shape `[rows, length]`): the best `per_prompt` hypotheses of each prompt.
            beam_indices (`torch.LongTensor` of shape `[rows, steps]`): row that generated each token, -1 after the end.
            per_prompt (`int`): number of hypotheses of each prompt.
        """
        steps = torch.arange(beam_indices.shape[1], device=sequences.device)
        first_rows = torch.arange(len(sequences), device=sequences.device) // per_prompt * self.beams
        written = torch.stack(self.chosen[: len(steps)])[steps, beam_indices.clamp_min(0).long()]
        written = written.masked_fill((beam_indices < 0).unsqueeze(-1), 0).transpose(1, 2)
        for row, first_row in enumerate(first_rows.tolist() if self.annotated else ()):
            reading = self.prompt_readings[first_row]
            for step in range(int((beam_indices[row] >= 0).sum())):
                ids, reading = self.read(reading, int(sequences[row, self.prompt_length + step]))
                written[row, self.annotated, step] = written.new_tensor(ids)
        prompts = self.prompt_axis_ids[first_rows][..., self.prompt_axis_ids.shape[-1] - self.prompt_length :]
        return torch.cat((prompts, written), dim=-1)

    def _parents(self, tokens):
        """For each row the first row of the same prompt with the same tokens so far."""
        prompts = len(tokens) // self.beams
        new, old = (x[:, self.prompt_length :].unflatten(0, (prompts, self.beams)) for x in (tokens, self.tokens))
        same = (new.unsqueeze(2) == old.unsqueeze(1)).all(-1)
        first_rows = torch.arange(0, len(tokens), self.beams, device=tokens.device).unsqueeze(1)
        return (same.int().argmax(-1) + first_rows).flatten()

    def _read_prompts(self, mask):
        start = _Reading((), tuple(axis.start() for axis in self.sources.annotators))
        if not self.annotated:
            return [start] * len(self.tokens)
        known = {}  # beams share their prompt
        readings = []
        for row, tokens in enumerate(self.tokens):
            tokens = tuple((tokens if mask is None else tokens[mask[row].bool()]).tolist())
            if tokens not in known:
                reading = start
                for token in tokens:
                    _, reading = self.read(reading, token)
                known[tokens] = reading
            readings.append(known[tokens])
        return readings

    def read(self, reading, token):
        """Ids of the annotated axes for one more token, 0 for special tokens, and the reading after it."""
        if token in self.special_tokens:
            return [0] * len(self.annotated), reading
        characters, pending = self.sources.processor.new_characters(reading.pending, token)
        steps = [axis.step(state, characters) for axis, state in zip(self.sources.annotators, reading.states)]
        for axis, (axis_id, _) in zip(self.sources.annotators, steps):
            if not (isinstance(axis_id, Integral) and 0 <= int(axis_id) < len(axis.vocabulary)):
                raise ValueError(f"axis {axis.name!r} must give ids in [0, {len(axis.vocabulary)}), got {axis_id!r}.")
        return [axis_id for axis_id, _ in steps], _Reading(pending, tuple(state for _, state in steps))


__all__ = ["AxisState", "Sources"]
