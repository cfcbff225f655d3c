"""Auxiliary losses of the hierarchical LM, on the streams of single hierarchies. A step of factor `c` predicts

- reconstruction: the `c` tokens it was made of (prototype `simple-hierarchical-transformer` 0.4.0),
- prophet: the next `c` tokens (ProphetNet, arXiv 2001.04063; the prototype until 0.1.2),
- quantized prophet: the codes of the next block of `c` tokens by a frozen random quantiser (BEST-RQ, arXiv 2202.01855; the
  prototype until 0.1.2),
- next latent: the state of the next step, given a summary of the tokens between (arXiv 2511.05963).

Element `i` of the stream of a hierarchy with factor `c` and stride `s` belongs to token `i * s`, the last of the `c` tokens it
was made of. Targets are in the same packed sequence, and are not pads.
"""

from itertools import pairwise

import torch
from torch import nn
from transformers import initialization as init

from ..common.losses import IGNORE_INDEX, at_least_one
from .configuration_hierarchical_lm import HierarchicalLMConfig
from .linear_cross_entropy import linear_cross_entropy


_COSINE_SHARE = 0.9  # of "mse_and_cosine", as in the prototype


class AuxiliaryLosses(nn.Module):
    """All losses with a weight in the config. Modules are named by compression factor: `prophet["4"]`.

    A subclass may override `make_summarizer`. A model uses the class in its attribute `auxiliary_losses_class`.
    """

    def __init__(self, config: HierarchicalLMConfig):
        super().__init__()
        self.config = config
        coarse = [(str(c), h) for h, c in enumerate(config.compression_factors) if c > 1]
        if config.reconstruction_loss_weight > 0:
            self.reconstruction = nn.ModuleDict({name: self._token_head(h) for name, h in coarse})
        if config.prophet_loss_weight > 0:
            self.prophet = nn.ModuleDict({name: self._token_head(h) for name, h in coarse})
        if config.quantized_prophet_loss_weight > 0:
            self.quantized_prophet = nn.ModuleDict({name: QuantizedProphet(config, h) for name, h in coarse})
        self.next_latent_weights = config.next_latent_loss_weight
        if any(self.next_latent_weights):
            self.next_latent = nn.ModuleDict(
                {
                    str(c): NextLatent(config, h, self.make_summarizer(h))
                    for h, c in enumerate(config.compression_factors)
                    if self.next_latent_weights[h]
                }
            )

    @property
    def hierarchies_read(self) -> list[int]:
        """Indices of the hierarchies whose streams a loss reads."""
        config = self.config
        coarse = config.reconstruction_loss_weight, config.prophet_loss_weight, config.quantized_prophet_loss_weight
        return [
            h
            for h, (factor, next_latent) in enumerate(zip(config.compression_factors, self.next_latent_weights))
            if next_latent or (factor > 1 and any(coarse))
        ]

    @staticmethod
    def wanted(config: HierarchicalLMConfig) -> bool:
        """Whether any loss has a weight."""
        weights = config.reconstruction_loss_weight, config.prophet_loss_weight, config.quantized_prophet_loss_weight
        return any((*weights, *config.next_latent_loss_weight))

    def make_summarizer(self, h: int) -> nn.Module:
        """The module that summarises the tokens of each step of hierarchy `h`, for the next-latent loss.

        It is called with token embeddings `[batch, seq, hidden_size]` and `owners` (see `_owners`) and returns
        `[batch, ceil(seq / strides[h]), hidden_sizes[h]]`. Element `i` may depend on tokens up to `i * strides[h]` only.
        """
        return ChunkSummarizer(self.config, h)

    def resize_vocabulary(self, size: int) -> None:
        """Resize the heads that predict tokens to a vocabulary of `size`. Weights of new tokens are random."""
        for name in ("reconstruction", "prophet"):
            for factor, head in getattr(self, name, {}).items():
                weight = head.weight.detach().unflatten(0, (int(factor), -1))
                resized = weight.new_empty(int(factor), size, weight.shape[2]).normal_(
                    std=self.config.initializer_range
                )
                kept = min(size, weight.shape[1])
                resized[:, :kept] = weight[:, :kept]
                head.weight = nn.Parameter(resized.flatten(0, 1), requires_grad=head.weight.requires_grad)

    def _token_head(self, h):
        config = self.config
        return PredictionHead(config.hidden_sizes[h], config.compression_factors[h] * config.vocab_size)

    def forward(
        self,
        streams: list[torch.Tensor],
        token_embeddings: torch.Tensor,
        input_ids: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        scale: torch.Tensor | float | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses by name, without their weights. The next-latent loss contains those of single hierarchies.

        Args:
            streams (`list`): final normalised states `[batch, ceil(seq / stride), width]` of each hierarchy.
            token_embeddings (`torch.Tensor` of shape `(batch, seq, hidden_size)`): embeddings before compression.
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): may be `None` where no loss predicts tokens.
            mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*): which tokens are real.
            segments (`torch.LongTensor` of shape `(batch, seq)`, *optional*): number of the packed sequence of each
                token. Each begins at a multiple of the largest factor.
            scale (`torch.Tensor` or `float`, *optional*): factor of each loss; with gradient accumulation the share of this
                batch in all items of the step.

        Raises:
            ValueError: without `input_ids` where a loss predicts tokens, or for streams of a wrong number or length.
        """
        config = self.config
        batch, seq, _ = token_embeddings.shape
        expected = [[batch, -(-seq // s), d] for s, d in zip(config.strides, config.hidden_sizes)]
        if [list(stream.shape) for stream in streams] != expected:
            raise ValueError(f"`streams` must be {expected}, got {[list(stream.shape) for stream in streams]}.")
        owners = _owners(mask, segments)
        losses, zero = {}, streams[0].new_zeros((), dtype=torch.float32)
        for name in ("reconstruction", "prophet"):
            if hasattr(self, name):
                if input_ids is None:
                    raise ValueError(f"`{name}_loss_weight` needs `input_ids`, got `inputs_embeds` only.")
                losses[name] = self._token_loss(name, streams, input_ids, owners)
        if hasattr(self, "quantized_prophet"):
            losses["quantized_prophet"] = sum(
                (
                    self.quantized_prophet[str(c)](streams[h], token_embeddings, owners)
                    for h, c in enumerate(config.compression_factors)
                    if c > 1
                ),
                zero,
            )
        if hasattr(self, "next_latent"):
            each = self.next_latent_losses(streams, token_embeddings, owners)
            losses["next_latent"] = sum((self.next_latent_weights[h] * loss for h, loss in each.items()), zero)
        if scale is not None:
            losses = {name: loss * scale for name, loss in losses.items()}
        return losses

    def next_latent_losses(
        self, streams: list[torch.Tensor], token_embeddings: torch.Tensor, owners: torch.Tensor | None = None
    ) -> dict[int, torch.Tensor]:
        """The next-latent loss of each hierarchy that has one, by its index, without weights."""
        return {
            h: self.next_latent[str(c)](streams[h], token_embeddings, owners)
            for h, c in enumerate(self.config.compression_factors)
            if self.next_latent_weights[h]
        }

    def _token_loss(self, name, streams, input_ids, owners):
        """Cross-entropy of the tokens of a block, mean over a hierarchy's targets, sum over hierarchies."""
        total = streams[0].new_zeros((), dtype=torch.float32)
        for h, (c, s) in enumerate(zip(self.config.compression_factors, self.config.strides)):
            if c > 1:
                offsets = range(1 - c, 1) if name == "reconstruction" else range(1, c + 1)
                targets = _block_targets(input_ids, owners, offsets, s)
                weight = getattr(self, name)[str(c)].weight
                total = total + linear_cross_entropy(streams[h].flatten(0, 1), weight, targets.flatten(0, 1))
        return total


def auxiliary_inputs(outputs, embeds, input_ids, labels, num_items_in_batch=None, shift_labels=None):
    """Arguments of `AuxiliaryLosses`, from outputs of the base model. Their scale is the share of this batch in all items."""
    rows, mask, segments = outputs.token_layout, None, None
    if rows is not None:
        mask, segments = rows.real, rows.segments
        embeds = rows.align(embeds)
        input_ids = None if input_ids is None else rows.align(input_ids.unsqueeze(-1)).squeeze(-1)
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    count = (targets != IGNORE_INDEX).sum()
    scale = count / at_least_one(count if num_items_in_batch is None else num_items_in_batch)
    return list(outputs.hierarchy_hidden_states), embeds, input_ids, mask, segments, scale


class PredictionHead(nn.Module):
    """The weight `[outputs, width]` for `linear_cross_entropy`. It is not called as a layer, so it is no `nn.Linear`."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, width) * width**-0.5)


class QuantizedProphet(nn.Module):
    """Prediction of the codes of the next block, the `c` tokens after the token of a step."""

    def __init__(self, config: HierarchicalLMConfig, h: int):
        super().__init__()
        self.factor, self.stride = config.compression_factors[h], config.strides[h]
        self.quantizer = RandomProjectionQuantizer(
            self.factor * config.hidden_size,
            config.prophet_codebook_dim,
            config.prophet_codebook_size,
            config.prophet_num_codebooks,
        )
        codes = config.prophet_num_codebooks * config.prophet_codebook_size
        self.head = PredictionHead(config.hidden_sizes[h], codes)

    def forward(
        self, stream: torch.Tensor, token_embeddings: torch.Tensor, owners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A scalar, the mean over codes and over steps `[batch, n, width]` with a whole block after them."""
        following = token_embeddings.detach()[:, 1:]
        codes = self.quantizer(following, self.factor, self.stride)
        if owners is not None:
            last = owners[:, self.factor :: self.stride]  # of the last token of each block
            first = owners[:, : owners.shape[1] - self.factor : self.stride]
            codes = codes.masked_fill(((last != first) | (last < 0)).unsqueeze(-1), IGNORE_INDEX)
        stream = stream[:, : codes.shape[1]]
        return linear_cross_entropy(stream.flatten(0, 1), self.head.weight, codes.flatten(0, 1))


class RandomProjectionQuantizer(nn.Module):
    """Codes of blocks of vectors: a random projection of the block, then the nearest of random codes by angle.

    It has no trained weights. Projections sum to 0, which removes the mean of a block, and angles do not depend on its scale;
    the paper normalises its input instead.

    Args:
        width (`int`): channels of a whole block.
        codebook_dim, codebook_size, num_codebooks (`int`): each codebook has its own projection.
    """

    projection: torch.Tensor
    codebooks: torch.Tensor

    def __init__(self, width: int, codebook_dim: int, codebook_size: int, num_codebooks: int = 1):
        super().__init__()
        self.register_buffer("projection", torch.empty(num_codebooks * codebook_dim, width))
        self.register_buffer("codebooks", torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        init.normal_(self.projection)
        init.copy_(self.projection, self.projection - self.projection.mean(-1, keepdim=True))
        init.normal_(self.codebooks)
        init.copy_(self.codebooks, nn.functional.normalize(self.codebooks, dim=-1))

    @torch.no_grad()
    def forward(self, vectors: torch.Tensor, block: int, stride: int) -> torch.Tensor:
        """Codes `[batch, n, num_codebooks]` of all whole blocks of `vectors [batch, seq, width / block]` that begin at
        `0, stride, ...`."""
        batch, seq, width = vectors.shape
        num_codebooks, _, codebook_dim = self.codebooks.shape
        if seq < block:
            return torch.empty(batch, 0, num_codebooks, dtype=torch.long, device=vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):  # codes do not depend on the precision of training
            kernel = self.projection.unflatten(-1, (block, width)).transpose(1, 2)
            projected = nn.functional.conv1d(vectors.to(kernel.dtype).transpose(1, 2), kernel, stride=stride)
            projected = projected.unflatten(1, (num_codebooks, codebook_dim))
            return torch.einsum("bkdn,ksd->bnks", projected, self.codebooks).argmax(-1)


class NextLatent(nn.Module):
    """Prediction of the next latents of a stream from the present one, step by step, given summaries of the tokens.

    Targets have no gradient. Later steps count less where earlier ones have high losses (`next_latent_dynamic_weights`). An
    element counts where all `next_latent_rollouts` steps are in its sequence.
    """

    def __init__(self, config: HierarchicalLMConfig, h: int, summarizer: nn.Module):
        super().__init__()
        self.summarizer = summarizer
        self.dynamics = LatentDynamics(config, h)
        self.stride = config.strides[h]
        self.loss_type = config.next_latent_loss_type
        weights = config.next_latent_rollout_weights or [1.0] * config.next_latent_rollouts
        self.rollout_weights = [weight / sum(weights) for weight in weights]
        self.dynamic_weights = config.next_latent_dynamic_weights
        self.dynamic_decay = config.next_latent_dynamic_decay
        self.detach_summaries = config.detach_summaries

    def forward(
        self, stream: torch.Tensor, token_embeddings: torch.Tensor, owners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A scalar, the mean over elements of `stream [batch, n, width]`; 0 where none has enough successors.

        Raises:
            ValueError: for a summarizer that returns another shape than the stream's.
        """
        rollouts = len(self.rollout_weights)
        elements = max(0, stream.shape[1] - rollouts)
        summaries = self.summarizer(token_embeddings.detach() if self.detach_summaries else token_embeddings, owners)
        if summaries.shape != stream.shape:
            raise ValueError(
                f"A summarizer must return {list(stream.shape)}, as its stream is, got {list(summaries.shape)}."
            )
        latent, targets = stream[:, :elements], stream.detach()
        precise = torch.promote_types(stream.dtype, torch.float32)
        total = past = stream.new_zeros(stream.shape[0], elements, dtype=precise)
        for step, rollout_weight in enumerate(self.rollout_weights, start=1):
            latent = self.dynamics(latent, summaries[:, step : step + elements])
            error = self._error(latent, targets[:, step : step + elements])
            weighted = rollout_weight * error
            if self.dynamic_weights:
                weighted = weighted * torch.exp(-self.dynamic_decay * past)
                past = past + error.detach()
            total = total + weighted
        if owners is None:
            return total.sum() / max(1, total.numel())
        owners = owners[:, :: self.stride]
        counted = (owners[:, :elements] == owners[:, rollouts:]) & (owners[:, :elements] >= 0)
        return (total * counted).sum() / counted.sum().clamp_min(1)

    def _error(self, predicted, target):
        """`[batch, n]` in at least float32."""
        precise = torch.promote_types(predicted.dtype, torch.float32)
        predicted, target = predicted.to(precise), target.to(precise)
        if self.loss_type == "smooth_l1":
            return nn.functional.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
        squares = (predicted - target).square().mean(-1)
        if self.loss_type == "mse":
            return squares
        cosine = 1 - nn.functional.cosine_similarity(predicted, target, dim=-1)
        if self.loss_type == "cosine":
            return cosine
        return (1 - _COSINE_SHARE) * squares + _COSINE_SHARE * cosine


class ChunkSummarizer(nn.Module):
    """Mean of the last `c` token embeddings, of fewer at the beginning of a sequence."""

    def __init__(self, config: HierarchicalLMConfig, h: int):
        super().__init__()
        self.factor, self.stride = config.compression_factors[h], config.strides[h]
        width_in, width = config.hidden_size, config.hidden_sizes[h]
        self.proj = nn.Linear(width_in, width) if width_in != width else nn.Identity()

    def forward(self, token_embeddings: torch.Tensor, owners: torch.Tensor | None = None) -> torch.Tensor:
        """Summaries `[batch, ceil(seq / stride), width]`. `owners`: as `_owners` makes it."""
        # Sums over 1, 2, 4 ... tokens, each from the one before.
        sums = token_embeddings
        places = torch.arange(sums.shape[1], device=sums.device).unsqueeze(-1)
        counts = (places + 1).clamp_max(self.factor)
        if owners is not None:
            starts = nn.functional.pad(owners[:, 1:] != owners[:, :-1], (1, 0), value=True)
            start = torch.where(starts, places[:, 0], 0).cummax(-1).values.unsqueeze(-1)
            counts = (places - start + 1).clamp_max(self.factor)
        reach = 1
        while reach < self.factor:
            earlier = nn.functional.pad(sums, (0, 0, reach, 0))[:, : sums.shape[1]]
            if owners is not None:
                earlier = earlier.masked_fill(places - reach < start, 0)
            sums, reach = sums + earlier, 2 * reach
        return self.proj(sums[:, :: self.stride] / counts[..., :: self.stride, :])


class ZeroInitLinear(nn.Linear):
    """A linear layer initialised to zero. It is a class since transformers initialises weights by class."""

    def reset_parameters(self):
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class LatentDynamics(nn.Module):
    """One step of a latent, `latent + MLP(LayerNorm([latent, summary]))`. It is initialised to the identity."""

    def __init__(self, config: HierarchicalLMConfig, h: int):
        super().__init__()
        width = config.hidden_sizes[h]
        inner = config.dynamics_hidden_size or width
        widths = [2 * width, *[inner] * (config.dynamics_num_layers - 1), width]
        self.norm = nn.LayerNorm(2 * width)
        *inner_layers, last = pairwise(widths)
        self.layers = nn.ModuleList([*(nn.Linear(*sizes) for sizes in inner_layers), ZeroInitLinear(*last)])

    def forward(self, latent: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        change = self.norm(torch.cat((latent, summary), dim=-1))
        for layer in self.layers[:-1]:
            change = nn.functional.gelu(layer(change))
        return latent + self.layers[-1](change)


def _owners(mask, segments):
    """Index of the sequence of each token, `[batch, seq]`, -1 at pads; `None` for whole rows."""
    if mask is None:
        return segments
    return torch.where(mask, mask.long() if segments is None else segments, -1)


def _block_targets(input_ids, owners, offsets, stride):
    """Tokens at `offsets` from every `stride`-th token, `[batch, n, offsets]`; -100 outside of its sequence."""
    # One more than is read, so that no window spans the whole row: a compiler would specialise on such lengths.
    before, after = max(0, -offsets[0]) + 1, max(0, offsets[-1])

    def around(x, outside):
        padded = nn.functional.pad(x, (before, after), value=outside)
        return padded[:, before + offsets[0] :].unfold(1, len(offsets), stride)

    targets = around(input_ids, IGNORE_INDEX)
    if owners is not None:
        own = owners[:, ::stride].unsqueeze(-1)
        targets = targets.masked_fill((around(owners, -1) != own) | (own < 0), IGNORE_INDEX)
    return targets
