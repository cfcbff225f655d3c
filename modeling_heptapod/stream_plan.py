"""What one forward pass of the hierarchical LM does to the stream of one hierarchy, and the way between tokens and steps."""

from dataclasses import dataclass

import torch


@dataclass
class StreamPlan:
    """What one forward pass does to the stream of one hierarchy, the same in every layer.

    Attributes:
        stride, dilation (`int`), window (`int`, *optional*), block (`bool`): of the hierarchy.
        steps (`int`): new ones, of the row that has most of them.
        fresh (`bool`): whether they are the first.
        tokens (`int`): new ones.
        rotary (`tuple[torch.Tensor, torch.Tensor]`, *optional*): of the new steps, see `_rotate` in `modeling_hierarchical_lm.py`.
        pick (`slice` or `torch.LongTensor` of shape `[batch, steps]`): the token that each step comes with, at strides
            above 1.
        spread (`torch.LongTensor` of shape `[tokens]` or `[batch, tokens]`, *optional*): the step each token reads, 0 for
            the last cached one and from 1 on for new ones.
        counts (`torch.LongTensor` of shape `[batch]`, *optional*): new steps of each row, where not all have as many.
        order (`torch.LongTensor` of shape `[batch, length]`, *optional*): which cached and new steps to keep then.
        positions, segments (`torch.LongTensor` of shape `[batch, steps]`, *optional*): of packed rows.
        shift_mask (`torch.BoolTensor` of shape `[batch, steps, 1]`, *optional*): steps of packed rows that have another one
            to look back at.
        keys_seen (`int`, *optional*): how many keys a single step reads, `None` for all.
        mask (`torch.BoolTensor` of shape `[1 or batch, 1, queries, keys]`, *optional*): where neither windows of whole
            sequences nor a single step's say everything.
        token_positions (`torch.LongTensor` of shape `[1 or batch, steps]`, *optional*): of the token each step comes with.
        in_the_open (`bool`): whether to return attentions, which takes the mask.
    """

    stride: int
    dilation: int
    window: int | None
    block: bool
    steps: int
    fresh: bool
    tokens: int
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    pick: slice | torch.Tensor | None = None
    spread: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    order: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    shift_mask: torch.Tensor | None = None
    keys_seen: int | None = None
    mask: torch.Tensor | None = None
    token_positions: torch.Tensor | None = None
    in_the_open: bool = False

    def at_steps(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, width]` -> `[batch, steps, width]`: the tokens that steps come with."""
        if self.stride == 1:
            return x
        return x[:, self.pick] if isinstance(self.pick, slice) else gather_steps(x, self.pick)

    def to_read(self, x: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
        """`[batch, steps, width]` and `last [batch, 1, width]`, the step before -> the steps that tokens read."""
        if self.stride == 1 or self.fresh:
            return x
        if self.tokens == 1 and self.spread is None:
            return x if self.steps else last
        return torch.cat((last, x), dim=1)

    def at_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """What `to_read` gave, or any function of each of its steps -> `[batch, tokens, width]`: what each token reads."""
        if self.stride == 1:
            return x
        if self.fresh:
            return x.repeat_interleave(self.stride, dim=1)[:, : self.tokens]
        if self.spread is None:
            return x
        return x[:, self.spread] if self.spread.dim() == 1 else gather_steps(x, self.spread)

    def last_of(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The last `number` of cached and new steps, of `[batch, number + steps, width]`, as a state to keep."""
        if self.counts is not None:
            places = self.counts.unsqueeze(1) + torch.arange(number, device=x.device)
            return gather_steps(x, places)
        last = x[:, x.shape[1] - number :]
        return last if x.shape[1] <= 2 * number else last.clone()  # no long row is kept alive for its end


def gather_steps(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`[batch, steps, width]` at `places [batch, chosen]` of each row -> `[batch, chosen, width]`."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


__all__ = ["StreamPlan", "gather_steps"]
