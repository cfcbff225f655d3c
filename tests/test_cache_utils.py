"""What the caches of all families have in common: kinds, rows, and what `generate` makes of a given one."""

import contextlib
import copy

import pytest
import torch
from corpora import build_tokenizer
from transformers import DynamicCache

from modeling_heptapod import (
    HierarchicalCache,
    MultiGridCache,
    RecurrentCache,
    StaticHierarchicalCache,
    StaticMultiGridCache,
    StaticRecurrentCache,
)
from modeling_heptapod.common.cache_checks import held_states
from modeling_heptapod.common.transformers_versions import CACHE
from tests.tiny import mostly_slow
from tests.tiny_hierarchical_lm import VARIANTS as STREAMS
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import VARIANTS as MIXERS
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import VARIANTS as GRIDS
from tests.tiny_multigrid import random_grid, tiny_multigrid


# A family, one of its cache classes, and ways in which what is cached differs.
CASES = {
    **{("leap", name): (tiny_leap, RecurrentCache, MIXERS[name]) for name in ("default", "alibi-null", "additive")},
    ("leap", "static"): (tiny_leap, StaticRecurrentCache, MIXERS["default"]),
    **{
        ("hierarchical_lm", name): (tiny_hierarchical_lm, HierarchicalCache, STREAMS[name])
        for name in ("plain", "stride", "blocks", "cross", "attention-compressor", "no-attention")
    },
    **{
        ("hierarchical_lm", f"static-{name}"): (tiny_hierarchical_lm, StaticHierarchicalCache, STREAMS[name])
        for name in ("plain", "stride", "no-attention")
    },
    **{
        ("multigrid", name): (tiny_multigrid, MultiGridCache, GRIDS[name])
        for name in ("plain", "axes", "factored", "leap", "lstm-factored", "lstm-plain")
    },
    **{
        ("multigrid", f"static-{name}"): (tiny_multigrid, StaticMultiGridCache, GRIDS[name])
        for name in ("plain", "factored", "leap", "lstm-plain")
    },
}
SOME_FAST = mostly_slow(
    CASES, [x for x in CASES if x[1] in ("default", "additive", "static", "stride", "factored") or "static-" in x[1]]
)
LENGTH, PROMPT, PADS = 13, 7, 2  # pads before the second row, so that rows differ in length


def empty_cache(cache_class, model):
    """With room for more than any test writes, where it has to be known."""
    room = {"max_cache_len": 19} if cache_class in (StaticHierarchicalCache, StaticMultiGridCache) else {}
    return cache_class(model.config, **room)


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
    return model, empty_cache(cache_class, model), {**inputs, "attention_mask": mask}


def part(inputs, rows, start, end):
    """Some rows of inputs from `start` to `end`; the mask from the beginning."""
    taken = {name: values[rows, ..., start:end] for name, values in inputs.items()}
    return {**taken, "attention_mask": inputs["attention_mask"][rows, :end]}


NO_ROWS = torch.tensor([], dtype=torch.long)


def all_states(cache):
    """All tensors of a cache's layers."""
    return [state for layer in cache.layers for state in held_states(layer).values()]


def change_states(cache, change, only=None):
    """Put something else in place of every state, or of one of them, by number."""
    count = 0
    for layer in cache.layers:
        for name, place in held_states(layer):
            if only in (None, count):
                if place is None:
                    setattr(layer, name, change(getattr(layer, name)))
                else:
                    getattr(layer, name)[place] = change(getattr(layer, name)[place])
            count += 1


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
        (lambda cache: cache.batch_select_indices([1, 1]), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([-1, 0], dtype=torch.int16)), [1, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ],
    ids=["repeat", "select", "mask", "list", "from the end", "reorder"],
)
@pytest.mark.parametrize("name", SOME_FAST, ids="-".join)
@torch.no_grad()
def test_rows_are_repeated_and_chosen(name, change, rows):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    change(cache)
    assert cache.num_rows() == len(rows)
    fresh = empty_cache(type(cache), model)
    model(**part(inputs, rows, 0, PROMPT), past_key_values=fresh)
    expected = continue_from(model, fresh, inputs, rows)
    torch.testing.assert_close(continue_from(model, cache, inputs, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda cache: cache.batch_repeat_interleave(-1),
            ValueError,
            "`repeats` must be an integer of at least 0, got -1",
        ),
        (lambda cache: cache.batch_repeat_interleave(1.5), ValueError, "`repeats`.*got 1.5"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), ValueError, r"`indices`.*below 2.*\[0, 2\]"),
        (lambda cache: cache.batch_select_indices([-3]), ValueError, r"`indices`.*below 2.*\[-3\]"),
        (lambda cache: cache.batch_select_indices(torch.tensor(1)), ValueError, "`indices` must be a vector"),
        (lambda cache: cache.batch_select_indices([True, False, True]), ValueError, r"mask must be \[2\], got \[3\]"),
        (lambda cache: cache.batch_select_indices(torch.zeros(0, dtype=torch.bool)), ValueError, r"\[2\], got \[0\]"),
        (lambda cache: cache.batch_select_indices([0.5]), TypeError, "`indices` must be integers or a mask.*float32"),
    ],
)
@torch.no_grad()
def test_rows_that_are_not_there_are_named(change, error, message):
    model, cache, inputs = case(("leap", "default"))
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    with pytest.raises(error, match=message):
        change(cache)
    assert cache.num_rows() == 2


@pytest.mark.parametrize(
    "name",
    [("leap", "default"), ("hierarchical_lm", "plain"), ("multigrid", "plain"), ("multigrid", "axes")],
    ids="-".join,
)
def test_a_forward_that_was_wrapped_generates(name):
    """As one that is timed, logged or compiled: `generate` cannot read its signature."""
    model, _, inputs = case(name)
    how = {**part(inputs, [0, 1], 0, PROMPT), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(how["input_ids"])
    expected, forward = model.generate(**how), model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert torch.equal(model.generate(**how), expected)


@torch.no_grad()
def test_a_state_of_no_dimensions_is_named():
    model, cache, inputs = case(("leap", "default"))
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    change_states(cache, lambda state: torch.tensor(0.0), only=0)
    with pytest.raises(ValueError, match=r"does not fit this model: layer 0 has .* of shape \[\], expected \[rows"):
        continue_from(model, cache, inputs, [0, 1])


@pytest.mark.parametrize("name", [name for name in CASES if not name[1].startswith("static")], ids="-".join)
@torch.no_grad()
def test_a_reset_is_for_another_batch_too(name):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    cache.reset()
    assert cache.num_rows() is None
    again = model(**part(inputs, [0], 0, LENGTH), past_key_values=cache)
    torch.testing.assert_close(again.logits, model(**part(inputs, [0], 0, LENGTH), use_cache=False).logits)


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
    with pytest.raises(ValueError, match=f"`{CACHE}` holds 2 rows, but the batch has 1.*batch_select_indices"):
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
    with pytest.raises(ValueError, match=f"`{CACHE}` holds 1 rows, but the batch has 3"):
        model.generate(**first, past_key_values=cache, num_return_sequences=3, do_sample=True, max_new_tokens=2)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_caches_of_other_kinds_are_errors(name):
    model, cache, inputs = case(name)
    match = rf"`{CACHE}` must be a .*{type(cache).__name__}.*, got DynamicCache: create it with"
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(TypeError, match=match):
            call(**part(inputs, [0], 0, PROMPT), past_key_values=DynamicCache())


def filled(model, cache_class=None, batch=2, tokens=PROMPT):
    """A cache of a model after a prompt."""
    cache = (cache_class or next(iter(model._cache_classes.values())))(model.config)
    model(**prompt_for(model, batch, tokens), past_key_values=cache)
    return cache


def prompt_for(model, batch, tokens):
    if model.config.model_type == "multigrid":
        return random_grid(model, batch, tokens)
    return {"input_ids": torch.randint(model.config.vocab_size, (batch, tokens))}


def layout(cache):
    """Which states a cache holds, and their shapes without rows."""
    return [{name: state.shape[1:] for name, state in held_states(layer).items()} for layer in cache.layers]


@pytest.mark.parametrize(
    "make, variants",
    [(tiny_leap, MIXERS), (tiny_hierarchical_lm, STREAMS), (tiny_multigrid, GRIDS)],
    ids=["leap", "hierarchical_lm", "multigrid"],
)
@torch.no_grad()
def test_caches_of_other_models_are_errors(make, variants):
    models = {name: make(**variant) for name, variant in {**variants, "deep": {"num_hidden_layers": 3}}.items()}
    caches, refused = {name: filled(model) for name, model in models.items()}, 0
    for name, model in models.items():
        inputs = prompt_for(model, 2, 1)
        for other in models:
            cache, before = copy.deepcopy(caches[other]), layout(caches[other])
            if before == layout(caches[name]):
                model(**inputs, past_key_values=cache)
                continue
            refused += 1
            with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model"):
                model(**inputs, past_key_values=cache)
            assert layout(cache) == before
    with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model"):
        models["deep"].generate(
            **prompt_for(models["deep"], 2, 9), past_key_values=next(iter(caches.values())), max_new_tokens=2
        )
    assert refused > len(models)


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_a_cache_of_a_smaller_model_is_not_written_past_its_end(cache_class):
    """It was, in C: memory was corrupted."""
    small, large = tiny_leap(), tiny_leap(hidden_size=256, num_attention_heads=32)
    for cache, model in ((filled(small, cache_class), large), (filled(large, cache_class), small)):
        with pytest.raises(ValueError, match=r"layer 0 has recurrent_states\[0\] of shape .*, expected \[rows, "):
            model(**prompt_for(model, 2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "make, own, other",
    [
        (tiny_leap, {}, {"num_hidden_layers": 3}),
        (tiny_leap, {"mixer": "additive"}, {}),
        (tiny_hierarchical_lm, {}, {"num_hidden_layers": 3}),
        (tiny_hierarchical_lm, {}, {"window_sizes": [None, 5]}),
        (tiny_hierarchical_lm, {}, {"window_sizes": [6, None]}),
        (tiny_multigrid, {}, {"core": "lstm"}),
        (tiny_multigrid, {"core": "leap"}, {}),
        (tiny_multigrid, {}, GRIDS["axis"]),
    ],
)
@torch.no_grad()
def test_empty_caches_of_other_models_are_errors(make, own, other):
    model, cache = make(**own), next(iter(make()._cache_classes.values()))(make(**other).config)
    with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model"):
        model(**prompt_for(model, 2, 1), past_key_values=cache)


@pytest.mark.parametrize("choose", [lambda c: c.batch_select_indices(NO_ROWS), lambda c: c.batch_repeat_interleave(0)])
@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_caches_of_no_rows_are_errors(name, choose):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    choose(cache)
    assert cache.num_rows() == 0
    for rows in ([0], [0, 1]):
        with pytest.raises(ValueError, match=f"`{CACHE}` has a batch size of 0"):
            model(**part(inputs, rows, PROMPT, PROMPT + 1), past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_states_of_another_dtype_are_errors(name, dtype):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    change_states(cache, lambda state: state.to(dtype))
    with pytest.raises(ValueError, match=f"`{CACHE}` .*of {dtype}, expected torch.float32"):
        model(**part(inputs, [0, 1], PROMPT, LENGTH), past_key_values=cache)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_caches_of_a_model_in_another_dtype(name):
    """Recurrent states have float32 in half precision as well, and go on; everything else is of the model's dtype."""
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    kept = {state.dtype for state in all_states(filled(model.bfloat16()))} == {torch.float32}
    outcome = contextlib.nullcontext() if kept else pytest.raises(ValueError, match="expected torch.bfloat16")
    with outcome:
        model(**part(inputs, [0, 1], PROMPT, LENGTH), past_key_values=cache)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_states_on_another_device_are_errors(name):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    change_states(cache, lambda state: state.to("meta"))
    with pytest.raises(ValueError, match=f"`{CACHE}` .* on meta, the input is on cpu"):
        model(**part(inputs, [0, 1], PROMPT, LENGTH), past_key_values=cache)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: x[..., :-1], lambda x: x.unsqueeze(-1), lambda x: x[0], lambda x: None],
    ids=["rows", "size", "more dimensions", "fewer dimensions", "missing"],
)
@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_a_state_that_does_not_fit_the_others_is_an_error(name, change):
    model, cache, inputs = case(name)
    model(**part(inputs, [0, 1], 0, PROMPT), past_key_values=cache)
    for count in range(len(all_states(cache))):
        changed = copy.deepcopy(cache)
        change_states(changed, change, only=count)
        with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model"):
            model(**part(inputs, [0, 1], PROMPT, LENGTH), past_key_values=changed)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@torch.no_grad()
def test_tokens_are_taken_back_or_that_is_refused(name):
    """Assisted decoding asks for it. A refusal leaves the cache as it was, and a copy does instead."""
    model, cache, inputs = case(name)
    rows = slice(None)
    model(**part(inputs, rows, 0, PROMPT), past_key_values=cache)
    expected = continue_from(model, copy.deepcopy(cache), inputs, rows)
    kept = copy.deepcopy(cache)
    if model._is_stateful or type(cache) is StaticMultiGridCache:
        for ask in (cache.activate_past_recording, lambda: cache.crop(-1), lambda: cache.crop(0)):
            with pytest.raises(RuntimeError, match=rf"This {type(cache).__name__} cannot be cropped.*copy.deepcopy"):
                ask()
    else:
        cache.activate_past_recording()
        model(**part(inputs, rows, PROMPT, PROMPT + 3), past_key_values=cache)
        for wrong in (1, -PROMPT - 4):
            with pytest.raises(ValueError, match=f"`tokens_to_remove` must be from -{PROMPT + 3}.*, got {wrong}"):
                cache.crop(wrong)
        cache.crop(0)
        cache.crop(-3)
    for unharmed in (cache, kept):
        assert int(unharmed.get_seq_length()) == PROMPT
        torch.testing.assert_close(continue_from(model, unharmed, inputs, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_continuous_batching_is_refused(name):
    """It would share out pages of keys and values; requests would come back empty."""
    model, _, inputs = case(name)
    paged = {**part(inputs, slice(None), 0, PROMPT), "cache_implementation": "paged", "max_new_tokens": 2}
    for ask in (
        lambda: model.generate_batch(inputs=[[3, 4, 5], [6, 7]], max_new_tokens=3),
        lambda: model.generate_batch(inputs=[]),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(**paged),
    ):
        with pytest.raises(ValueError, match=rf"Continuous batching .* does not work with {type(model).__name__}"):
            ask()


@pytest.mark.parametrize("name", CASES, ids="-".join)
@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_caches_of_other_kinds_are_refused(name, kind):
    model, _, inputs = case(name)
    with pytest.raises(ValueError, match=rf"`cache_implementation` must be .* got '{kind}'"):
        model.generate(**part(inputs, slice(None), 0, PROMPT), cache_implementation=kind, max_new_tokens=2)


@pytest.mark.parametrize("name", CASES, ids="-".join)
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_drafted_tokens_are_right_or_refused(name, how):
    model, _, inputs = case(name)
    prompt = {**part(inputs, slice(0, 1), 0, PROMPT), "max_new_tokens": 6, "do_sample": False}
    drafted = {"assistant_model": model} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    if name[0] == "multigrid" and not model._is_stateful and not model.config.num_axes:
        prompt.pop("axis_ids")
        assert torch.equal(model.generate(**prompt, **drafted), model.generate(**prompt))
        return
    with pytest.raises(ValueError, match="stateful models|Assisted decoding is not supported with axes"):
        model.generate(**prompt, **drafted)


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_generate_with_a_tokenizer(name):
    """For `stop_strings`, as servers and pipelines give one: `generate` hands it on to every forward pass."""
    tokenizer = build_tokenizer("byte", [])
    make, _, variant = CASES[name]
    model = make(vocab_size=len(tokenizer), **variant)
    prompt = {**prompt_for(model, 1, PROMPT), "max_new_tokens": 4, "do_sample": False}
    written = model.generate(**prompt, stop_strings=["no such text"], tokenizer=tokenizer)
    assert torch.equal(written, model.generate(**prompt))


# --- training ----------------------------------------------------------------------------------------------------------

TRAINED = [("leap", "default"), ("hierarchical_lm", "stride"), ("multigrid", "factored"), ("multigrid", "leap")]


@pytest.mark.parametrize("name", [*TRAINED, ("multigrid", "lstm-plain")], ids=str)
def test_caches_in_training(name):
    """One is filled where it is asked for, and continued; the pass after it can be differentiated."""
    model, cache, inputs = case(name)
    every = slice(None)
    inputs["attention_mask"].fill_(1)  # pads are laid out in copies, which gradients need not share
    expected = model(**inputs).logits
    model.train()
    assert model(**part(inputs, every, 0, PROMPT)).get(CACHE) is None
    out = model(**part(inputs, every, 0, PROMPT), use_cache=True)
    assert type(out[CACHE]) is type(cache) and out[CACHE].get_seq_length() == PROMPT
    logits = model(**part(inputs, every, PROMPT, LENGTH), **{CACHE: out[CACHE]}).logits
    torch.testing.assert_close(logits, expected[:, PROMPT:], rtol=1e-4, atol=1e-4)
    (logits.square().sum() + out.logits.square().sum()).backward()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", [*TRAINED, ("leap", "static"), ("multigrid", "lstm-plain")], ids=str)
def test_gradients_of_a_pass_that_continues_a_cache(name, rows):
    """Against differences of losses: the pass writes its own states over those that it began with."""
    model, cache, inputs = case(name)
    inputs["attention_mask"].fill_(1)
    few = slice(rows)
    with torch.no_grad():
        model(**part(inputs, few, 0, PROMPT), past_key_values=cache)
    more = part(inputs, few, PROMPT, LENGTH)
    weights = list(model.parameters())

    def loss():
        return model(**more, past_key_values=copy.deepcopy(cache)).logits.double().log_softmax(-1)[..., 0].sum()

    loss().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in weights]
    length = sum(x.double().square().sum() for x in gradients).sqrt()
    found = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                weight += step * gradient / length
            found.append(loss())
            for weight, gradient in zip(weights, gradients):
                weight -= step * gradient / length
    torch.testing.assert_close((found[0] - found[1]) / 2e-2, length, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", TRAINED, ids=str)
def test_no_cache_is_lost_on_gradient_checkpointing(name):
    """In training its layers get no cache: `generate` does without one, and a given one is refused, not counted on.

    From Transformers 5.24 on they get one where there are no gradients, as in `generate`.
    """
    model, cache, inputs = case(name)
    greedy = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": model.config.vocab_size}
    expected = model.generate(**inputs, **greedy)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs, **greedy), expected)
    assert model(**inputs, use_cache=True).get(CACHE) is None
    refused = pytest.raises(ValueError, match=f"`{CACHE}` cannot be used in training with gradient checkpointing")
    with refused:
        model(**inputs, **{CACHE: cache})
    with torch.no_grad() if CACHE == "cache" else refused:
        model(**inputs, **{CACHE: copy.deepcopy(cache)})
        more = model.generate(**inputs, **greedy, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(more, expected) and model(**inputs, use_cache=True)[CACHE].get_seq_length() == LENGTH
    model.eval()
    assert model(**inputs, **{CACHE: cache})[CACHE].get_seq_length() == LENGTH
