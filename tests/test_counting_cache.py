"""What the caches of all families have in common: kinds, rows, and what `generate` makes of a given one."""

import pytest
import torch
from transformers import DynamicCache

from modeling_heptapod import HierarchicalCache, MultiGridCache, RecurrentCache, StaticRecurrentCache
from tests.tiny_hierarchical_lm import VARIANTS as STREAMS
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import VARIANTS as MIXERS
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import VARIANTS as GRIDS
from tests.tiny_multigrid import random_grid, tiny_multigrid


# A family, one of its cache classes, and ways in which what is cached differs.
CASES = {
    **{("leap", name): (tiny_leap, RecurrentCache, MIXERS[name]) for name in ("default", "decay-null", "additive")},
    ("leap", "static"): (tiny_leap, StaticRecurrentCache, MIXERS["default"]),
    **{
        ("hierarchical_lm", name): (tiny_hierarchical_lm, HierarchicalCache, STREAMS[name])
        for name in ("plain", "stride", "blocks", "cross", "attention-compressor", "no-attention")
    },
    **{
        ("multigrid", name): (tiny_multigrid, MultiGridCache, GRIDS[name])
        for name in ("plain", "axes", "factored", "leap", "lstm-factored")
    },
}
LENGTH, PROMPT, PADS = 13, 7, 2  # pads before the second row, so that rows differ in length


def case(name):
    """A model in evaluation mode, an empty cache, and inputs of two rows."""
    make, cache_class, variant = CASES[name]
    model = make(**variant)
    if name[0] == "multigrid":
        inputs = random_grid(model, 2, LENGTH)
    else:
        inputs = {"input_ids": torch.randint(model.config.vocab_size, (2, LENGTH))}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADS] = 0
    return model, cache_class(model.config), {**inputs, "attention_mask": mask}


def part(inputs, rows, start, end):
    """Some rows of inputs from `start` to `end`; the mask from the beginning."""
    taken = {name: values[rows, ..., start:end] for name, values in inputs.items()}
    return {**taken, "attention_mask": inputs["attention_mask"][rows, :end]}


def continue_from(model, cache, inputs, rows):
    """Logits of what follows the prompt, a chunk and then a token at a time."""
    logits = []
    for start, end in zip((PROMPT, *range(PROMPT + 3, LENGTH)), range(PROMPT + 3, LENGTH + 1)):
        logits.append(model(**part(inputs, rows, start, end), past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ],
    ids=["repeat", "select", "mask", "reorder"],
)
@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_rows_are_repeated_and_chosen(name, change, rows):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    change(cache)
    assert cache.num_rows() == len(rows)
    fresh = type(cache)(model.config)
    model(**part(inputs, rows, 0, PROMPT), past_key_values=fresh)
    expected = continue_from(model, fresh, inputs, rows)
    torch.testing.assert_close(continue_from(model, cache, inputs, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_rows_of_an_empty_cache(name):
    _, cache, _ = case(name)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.num_rows() is None and int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_another_batch_size_is_an_error(name):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` holds 2 rows, but the batch has 1.*batch_select_indices"):
        model(**part(inputs, [0], PROMPT, LENGTH), past_key_values=cache)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_many_continuations_of_one_cached_prompt(name):
    """As transformers' guide on caches has it: a prompt is read once, its cache repeated, every row goes on by itself."""
    model, cache, inputs = case(name)
    first = {k: v[:1, ..., :PROMPT] for k, v in inputs.items() if k != "attention_mask"}
    model(**{k: v[..., :-1] for k, v in first.items()}, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    prompts = {k: v.repeat_interleave(3, dim=0) for k, v in first.items()}
    how = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    written = model.generate(**prompts, past_key_values=cache, **how)
    torch.testing.assert_close(written, model.generate(**first, **how).repeat_interleave(3, dim=0))


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_more_sequences_than_cached_rows_are_an_error(name):
    model, cache, inputs = case(name)
    first = {k: v[:1, ..., :PROMPT] for k, v in inputs.items() if k != "attention_mask"}
    model(**{k: v[..., :-1] for k, v in first.items()}, past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` holds 1 rows, but the batch has 3"):
        model.generate(**first, past_key_values=cache, num_return_sequences=3, do_sample=True, max_new_tokens=2)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_caches_of_other_kinds_are_errors(name):
    model, cache, inputs = case(name)
    match = rf"`past_key_values` must be a .*{type(cache).__name__}.*, got DynamicCache: build it with"
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(TypeError, match=match):
            call(**part(inputs, [0], 0, PROMPT), past_key_values=DynamicCache())
