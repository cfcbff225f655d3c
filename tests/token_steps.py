"""The families whose tokens go through all layers in one call of C with attention: models, texts, and which tokens do."""

import copy

import torch

from modeling_heptapod import StaticHierarchicalCache, StaticMultiGridCache
from modeling_heptapod.hierarchical_lm import modeling_hierarchical_lm
from modeling_heptapod.multigrid import modeling_multigrid
from tests import tiny_hierarchical_lm, tiny_multigrid


class HierarchicalLM:
    variants = {name: options for name, options in tiny_hierarchical_lm.VARIANTS.items() if "cross" not in name}
    module, model_class = modeling_hierarchical_lm, modeling_hierarchical_lm.HierarchicalLMModel
    static_class = StaticHierarchicalCache

    @staticmethod
    def make(variant="two", **options):
        return tiny_hierarchical_lm.tiny_hierarchical_lm(**{**tiny_hierarchical_lm.VARIANTS[variant], **options})

    @staticmethod
    def text(model, batch, length):
        return {"input_ids": tiny_hierarchical_lm.random_ids(batch, length)}

    @staticmethod
    def blocks(model):
        return [layer.blocks[0] for layer in model.model.layers]

    @staticmethod
    def linear(model):
        return HierarchicalLM.blocks(model)[1].mlp.up_proj

    @staticmethod
    def is_token(streams, context, cache):
        return context.streams[0].tokens == 1 and not context.is_first


class MultiGrid:
    variants = {name: options for name, options in tiny_multigrid.VARIANTS.items() if "core" not in options}
    module, model_class = modeling_multigrid, modeling_multigrid.MultiGridModel
    static_class = StaticMultiGridCache

    @staticmethod
    def make(variant="axes", **options):
        return tiny_multigrid.tiny_multigrid(**{**tiny_multigrid.VARIANTS[variant], **options})

    @staticmethod
    def text(model, batch, length):
        return tiny_multigrid.random_grid(model, batch, length)

    @staticmethod
    def blocks(model):
        return [layer.self_block for layer in model.model.layers]

    @staticmethod
    def linear(model):
        return MultiGrid.blocks(model)[1].mlp.up_proj

    @staticmethod
    def is_token(main, meta, context, cache):
        return main.shape[1] == 1 and not context.is_first


FAMILIES = {"hierarchical_lm": HierarchicalLM, "multigrid": MultiGrid}
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]


def watch_steps(monkeypatch, family):
    """A list that grows by a bool for each pass of a single token that asks for a call of C: whether it was one."""
    taken, step = [], family.model_class._step

    def spy(model, *arguments):
        out = step(model, *arguments)
        if family.is_token(*arguments):
            taken.append(out is not None)
        return out

    monkeypatch.setattr(family.model_class, "_step", spy)
    return taken


def part(text, start, end):
    """Tokens of a text."""
    return {name: x[..., start:end] for name, x in text.items()}


@torch.no_grad()
def decode(model, text, past, cache=None, mask=None, steps=None):
    """Logits of all axes, `[batch, steps, all vocabularies]`, of single tokens after `past` ones, which a cache may hold."""

    def masked(end):
        return {} if mask is None else {"attention_mask": mask[:, :end]}

    length = text["input_ids"].shape[1]
    if cache is None or not int(cache.get_seq_length()):
        cache = model(**part(text, 0, past), **masked(past), past_key_values=cache, use_cache=True).past_key_values
    ends = range(past + 1, (length if steps is None else past + steps) + 1)
    return torch.cat(
        [all_logits(model(**part(text, t - 1, t), **masked(t), past_key_values=cache, use_cache=True)) for t in ends],
        1,
    )


def all_logits(outputs):
    """Logits of the main axis and of all others, side by side."""
    return torch.cat((outputs.logits, *(outputs.get("axis_logits") or ())), dim=-1)


@torch.no_grad()
def exact(model, text, past, mask=None):
    """The same from the parallel forward pass in float64."""
    outputs = copy.deepcopy(model).double()(**text, attention_mask=mask, use_cache=False)
    return all_logits(outputs)[:, past:]
