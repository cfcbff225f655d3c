"""Axes added to a trained MultiGrid and removed from it. Predictions stay the same to the last bit."""

import copy
from typing import Any

from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .configuration_multigrid import MultiGridConfig
from .multigrid_blocks import MultiGridBlock, NextAxesBlock


class MultiGridGrowthMixin(PreTrainedModel):
    """Mixin of [`MultiGridForCausalLM`] that adds and removes axes."""

    config: MultiGridConfig
    model: Any
    lm_head: nn.Linear
    axis_lm_heads: nn.ModuleList
    next_axes: NextAxesBlock | None

    def add_axis(self, name: str, vocab_size: int, freeze_rest: bool = False) -> None:
        """Add an axis, the last in `axis_ids`. Predictions of the text and of other axes stay the same to the last bit.

        What the main stream reads from the new axis is initialised to zero. The other axes keep their weights in
        `config.axis_weights`, and the weight of the new one is one over the number of axes. `config` is replaced by a copy.
        Create the optimizer afterwards, so that it has the new parameters.

        Args:
            name (`str`): name of the axis, not one of `config.axis_names`.
            vocab_size (`int`): size of its vocabulary.
            freeze_rest (`bool`): whether to train the new weights only. All others no longer require gradients.

        Raises:
            ValueError: for a name that is taken, "main" or no Python identifier, and for a vocabulary of less than one entry.
        """
        taken = [*self.config.axis_names, "main"]
        if not isinstance(name, str) or not name.isidentifier() or name in taken:
            raise ValueError(f"`name` must be a new Python identifier, got {name!r}; there are {taken}.")
        if type(vocab_size) is not int or vocab_size < 1:
            raise ValueError(f"`vocab_size` must be an integer of at least 1, got {vocab_size!r}.")
        config, before = copy.deepcopy(self.config), set(self.parameters())
        config.axis_weights = [*config.axis_shares, 1 / (config.num_axes + 1)]
        config.axis_names = [*config.axis_names, name]
        config.axis_vocab_sizes = [*config.axis_vocab_sizes, vocab_size]
        self._set_config(config)
        base = self.model
        self._append(base.axis_embed_tokens, nn.Embedding(vocab_size, config.axis_hidden_size), base.embed_tokens)
        self._append(base.axis_norms, nn.LayerNorm(config.axis_hidden_size, eps=config.layer_norm_eps), base.norm)
        self._append(self.axis_lm_heads, nn.Linear(config.axis_hidden_size, vocab_size, bias=False), self.lm_head)
        for layer in base.layers:
            self._append(layer.axis_self_blocks, MultiGridBlock(config, True, False), layer.self_block)
            self._append(layer.main_cross_blocks, MultiGridBlock(config, False, True), layer.self_block)
            self._append(layer.axis_cross_blocks, MultiGridBlock(config, True, True), layer.self_block)
            layer.main_cross_blocks[-1].close()
            layer.make_cores()
        if config.num_axes == 1 and config.core == "transformer" and config.axis_hidden_size != config.hidden_size:
            table = nn.Embedding(config.max_position_embeddings, config.axis_hidden_size)
            base.axis_embed_positions = self._like(table, base.embed_positions)
        if config.axis_order == "factored":
            if self.next_axes is None:
                self.next_axes = self._like(NextAxesBlock(config), self.lm_head)
                init.zeros_(self.next_axes.mlp.down_proj.weight)
            else:
                proj = nn.Linear(config.axis_hidden_size, config.hidden_size, bias=False)
                self._append(self.next_axes.projs, proj, self.lm_head)
            init.zeros_(self.next_axes.projs[-1].get_parameter("weight"))
        self.train(self.training)
        if freeze_rest:
            for parameter in self.parameters():
                parameter.requires_grad_(parameter not in before)

    def remove_axis(self, name: str) -> None:
        """Remove an axis. Right after `add_axis` predictions are those before it, to the last bit.

        The other axes keep their weights in `config.axis_weights`. `config` is replaced by a copy.

        Args:
            name (`str`): one of `config.axis_names`.

        Raises:
            ValueError: for any other name.
        """
        if name not in self.config.axis_names:
            raise ValueError(f"`name` must be one of {self.config.axis_names}, got {name!r}.")
        config, place = copy.deepcopy(self.config), self.config.axis_names.index(name)
        config.axis_weights = config.axis_shares
        for values in (config.axis_weights, config.axis_names, config.axis_vocab_sizes):
            del values[place]
        self._set_config(config)
        base = self.model
        for modules in (base.axis_embed_tokens, base.axis_norms, self.axis_lm_heads):
            del modules[place]
        for layer in base.layers:
            for blocks in (layer.axis_self_blocks, layer.main_cross_blocks, layer.axis_cross_blocks):
                del blocks[place]
            layer.make_cores()
        if self.next_axes is not None:
            del self.next_axes.projs[place]
        if config.num_axes == 0:
            self.next_axes = base.axis_embed_positions = None
        self.train(self.training)

    def _set_config(self, config):
        """Set the config of this model only. Others may share the old one."""
        old = self.config
        for module in self.modules():
            if getattr(module, "config", None) is old:
                module.config = config

    def _like(self, module, neighbour):
        """`module`, initialised, with the device and dtype of `neighbour`."""
        module.apply(self._init_weights)
        weight = next(neighbour.parameters())
        return module.to(weight.device, weight.dtype)

    def _append(self, modules, module, neighbour):
        modules.append(self._like(module, neighbour))


__all__ = ["MultiGridGrowthMixin"]
