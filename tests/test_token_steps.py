"""A token of the hierarchical LM and MultiGrid in one call of C: against the layers in float64, and what is left to the layers.

`test_leap_step.py` is about LEAP, `test_step_program.py` about the operations.
"""

import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_heptapod.common import plain_modules, step_program
from modeling_heptapod.common.step_program import load_steps
from modeling_heptapod.hierarchical_lm import hierarchical_step
from modeling_heptapod.multigrid import multigrid_step
from tests.token_steps import FAMILIES, VARIANTS, all_logits, decode, exact, part, watch_steps


PAST, TOKENS = 9, 14
slow = partial(pytest.param, marks=pytest.mark.slow)
STEPS = {"hierarchical_lm": hierarchical_step, "multigrid": multigrid_step}


@pytest.fixture(autouse=True)
def compiled():
    if load_steps() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def taken(family, monkeypatch):
    """For each single token of a forward pass, whether it went through C."""
    return watch_steps(monkeypatch, family)


def close(got, expected, error=6e-5):
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=error)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [slow(1), 3, slow(8)])
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_float32(name, variant, batch, kind, monkeypatch):
    family = FAMILIES[name]
    taken = watch_steps(monkeypatch, family)
    model = family.make(variant)
    text = family.text(model, batch, PAST + TOKENS)
    cache = family.static_class(model.config, 40) if kind == "static" else None
    logits, expected = decode(model, text, PAST, cache), exact(model, text, PAST)
    assert taken == [True] * TOKENS
    if getattr(model, "next_axes", None) is not None:  # single tokens do not know the next axis ids, but the last
        size = model.config.vocab_size
        close(logits[..., size:], expected[..., size:])
        logits, expected = logits[:, -1:], expected[:, -1:]
    close(logits, expected)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_pytorch_tanh"])
def test_activations(activation, family, taken):
    model = family.make(hidden_act=activation)
    text = family.text(model, 2, PAST + TOKENS)
    close(decode(model, text, PAST), exact(model, text, PAST))
    assert all(taken)


def test_long_texts(family, taken):
    """More keys than the softmax takes at once, windows that are full, and memory that grows."""
    model = family.make(max_position_embeddings=400)
    text = family.text(model, 1, 340)
    for cache in (None, family.static_class(model.config, 400)):
        close(decode(model, text, 150, cache), exact(model, text, 150))
    assert all(taken)


def test_bf16_is_closer_to_the_exact_result_than_the_layers(family, taken, monkeypatch):
    model = family.make(num_hidden_layers=4).bfloat16()
    text = family.text(model, 2, PAST + 30)
    expected, errors = exact(model, text, PAST), []
    for where in ("C", "layers"):
        if where == "layers":
            monkeypatch.setattr(STEPS[model.config.model_type], "MOST_ROWS", 0)
        logits = decode(model, text, PAST)
        assert logits.dtype == torch.bfloat16
        errors.append((logits.double() - expected).square().mean().sqrt())
    assert taken == [True] * 30 + [False] * 30
    assert errors[0] < errors[1] < 0.05 * expected.std()


def test_threads_change_nothing(family, taken, monkeypatch):
    monkeypatch.setattr(step_program, "_PARALLEL", 0)
    model = family.make()
    text, results, before = family.text(model, 3, PAST + TOKENS), [], torch.get_num_threads()
    with torch.no_grad():
        start = model(**part(text, 0, PAST), use_cache=True).past_key_values
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(decode(model, text, PAST, copy.deepcopy(start)))
    finally:
        torch.set_num_threads(before)
    assert all(taken)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_pads(kind, family, taken):
    """MultiGrid masks cached keys; rows of the hierarchical LM have steps at different tokens, which is left to the layers."""
    windows = {} if family is FAMILIES["multigrid"] else {"window_sizes": [2, 2]}  # shorter than both rows
    model = family.make(**windows)
    text, mask = family.text(model, 2, PAST + TOKENS), torch.ones(2, PAST + TOKENS, dtype=torch.long)
    mask[0, :4] = 0
    cache = family.static_class(model.config, 40) if kind == "static" else None
    close(decode(model, text, PAST, cache, mask), exact(model, text, PAST, mask))
    assert len(taken) == TOKENS and set(taken) == {family is FAMILIES["multigrid"]}


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_the_same(beams, family, taken, monkeypatch):
    model = family.make()
    text = family.text(model, 2, PAST)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    written = model.generate(**text, **kwargs)
    assert any(taken) and all(taken)
    monkeypatch.setattr(STEPS[model.config.model_type], "MOST_ROWS", 0)
    assert torch.equal(written, model.generate(**text, **kwargs))


@torch.no_grad()
def test_passes_of_several_tokens_between(family, taken):
    model = family.make()
    text = family.text(model, 2, 40)
    expected = exact(model, text, 0)
    for cache in (None, family.static_class(model.config, 40)):
        logits, at = [], 0
        for count in (9, 1, 1, 5, 1, 2, 1, 1, 1, 3, 1, 14):
            outputs = model(**part(text, at, at + count), past_key_values=cache, use_cache=True)
            cache, at = outputs.past_key_values, at + count
            logits.append(all_logits(outputs))
        close(torch.cat(logits, dim=1), expected)
    assert all(taken)


@torch.no_grad()
def test_what_was_returned_does_not_change(family, taken):
    """States of a cache are views of what the layers computed, and of the cache before beams were chosen."""
    model = family.make()
    text = family.text(model, 1, 14)  # of one row, whose parts are contiguous
    cache = model(**part(text, 0, 9), use_cache=True).past_key_values
    outputs = model(**part(text, 9, 10), past_key_values=cache, use_cache=True, output_hidden_states=True)
    twin = copy.deepcopy(cache)
    held = [x.clone() for x in outputs.hidden_states]
    first = all_logits(model(**part(text, 10, 11), past_key_values=cache))
    for t in range(11, 14):
        model(**part(text, t, t + 1), past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(held, outputs.hidden_states))
    assert torch.equal(all_logits(model(**part(text, 10, 11), past_key_values=twin)), first)


@torch.no_grad()
def test_beams_and_rollback_between_tokens(family, taken):
    model = family.make()
    text = family.text(model, 2, 20)
    cache = model(**part(text, 0, 9), use_cache=True).past_key_values
    for t in (9, 10, 11):
        model(**part(text, t, t + 1), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    turned = {name: x[[1, 1]] for name, x in text.items()}
    close(decode(model, turned, 12, cache), exact(model, turned, 12))
    assert all(taken)


# ---------------------------------------------------------------------------------------------------------------------
# What is left to the layers
# ---------------------------------------------------------------------------------------------------------------------


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(family, model):
    family.linear(model).register_forward_hook(lambda module, inputs, output: 2 * output)


def subclassed(family, model):
    family.linear(model).__class__ = Louder


def wrapped(family, model):
    linear = family.linear(model)
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def with_other_bias(family, model):
    linear = family.linear(model)
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features)) if linear.bias is None else None


def other_norm(family, model):
    block = family.blocks(model)[1]
    norm = block.post_attention_layernorm
    kind = torch.nn.RMSNorm if type(norm) is torch.nn.LayerNorm else torch.nn.LayerNorm
    block.post_attention_layernorm = kind(norm.weight.shape[0], eps=norm.eps).eval()


def norm_without_weight(family, model):
    norm = family.blocks(model)[1].post_attention_layernorm
    norm.weight = None


def other_epsilon(family, model):
    family.blocks(model)[1].post_attention_layernorm.eps = 0.5


def other_activation(family, model):
    for module in list(model.model.layers.modules()):
        if hasattr(module, "act_fn"):
            module.act_fn = torch.nn.Tanh().eval()


def linear_activation(family, model):
    for module in list(model.model.layers.modules()):
        if hasattr(module, "act_fn"):
            inner = module.up_proj.out_features
            module.act_fn = torch.nn.Linear(inner, inner, bias=family is FAMILIES["multigrid"]).eval()


def mixed_activations(family, model):
    for block in family.blocks(model):
        block.mlp.act_fn = torch.nn.ReLU().eval()


def patched_layer(family, model):
    kind = type(model.model.layers[0])
    forward = kind.forward

    def louder(*args, **kwargs):
        first, *rest = forward(*args, **kwargs)
        return 2 * first, *rest

    kind.forward = louder


def patched_torch(family, model):
    forward = torch.nn.Linear.forward
    torch.nn.Linear.forward = lambda self, x: 2 * forward(self, x)


def transposed(family, model):
    linear = family.linear(model)
    linear.weight.data = linear.weight.data.t().contiguous().t()


class Watched(torch.Tensor):
    """A tensor that might do something else."""


def other_tensor(family, model):
    linear = family.linear(model)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Watched))


def other_buffer(family, model):
    family.linear(model).register_buffer("extra", torch.zeros(1).as_subclass(Watched))


def with_eager_attention(family, model):
    model.set_attn_implementation("eager")


CHANGES = [
    hooked,
    subclassed,
    wrapped,
    with_other_bias,
    other_norm,
    norm_without_weight,
    other_epsilon,
    other_activation,
]
CHANGES += [linear_activation, mixed_activations, patched_layer, patched_torch, transposed, other_tensor, other_buffer]
CHANGES += [with_eager_attention]


@pytest.mark.parametrize("kind", ["dynamic", slow("static")])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_called(change, kind, family, taken, monkeypatch):
    model = family.make()
    text = family.text(model, 1, PAST + TOKENS)
    for patched in (type(model.model.layers[0]), torch.nn.Linear):
        monkeypatch.setattr(patched, "forward", patched.forward)  # puts back what a change replaces
    cache = family.static_class(model.config, 40) if kind == "static" else None
    decode(model, text, PAST, copy.deepcopy(cache), steps=2)
    assert taken == [True, True]
    change(family, model)
    with torch.no_grad():
        expected = all_logits(model(**text, use_cache=False))[:, PAST:]
    close(decode(model, text, PAST, cache), expected)
    assert taken[2:] == [False] * TOKENS


def test_weights_that_change_are_read(family, taken):
    model = family.make()
    text = family.text(model, 1, PAST + TOKENS)
    for change in ("none", "in place", "data", "parameter", "module", "all epsilons"):
        linear = family.linear(model)
        with torch.no_grad():
            if change == "in place":
                linear.weight.mul_(1.5)
            elif change == "data":
                linear.weight.data = torch.randn_like(linear.weight)
            elif change == "parameter":
                linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))
            elif change == "module":
                family.blocks(model)[1].mlp.up_proj = copy.deepcopy(linear)
            elif change == "all epsilons":
                for module in model.model.layers.modules():
                    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
                        module.eps = 0.1
        close(decode(model, text, PAST), exact(model, text, PAST))
    assert all(taken)


def test_weights_that_were_replaced_go(family, taken):
    """Those that were read are not kept in memory, also when the layers are called from then on."""
    model = family.make()
    text = family.text(model, 1, PAST + 1)
    for change in (None, hooked):
        decode(model, text, PAST)
        linear = family.linear(model)
        old = weakref.ref(linear.weight)
        linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))
        if change is not None:
            change(family, model)
        decode(model, text, PAST)
        assert old() is None
    assert taken == [True, True, True, False]


def test_axis_weights_that_change_are_read(monkeypatch):
    family = FAMILIES["multigrid"]
    taken, model = watch_steps(monkeypatch, family), family.make("weights")
    text = family.text(model, 1, PAST + 3)
    for weights in ([0.5, 0.3, 0.4], [0.1, 0.2, 0.9], None):
        model.config.axis_weights = weights
        close(decode(model, text, PAST), exact(model, text, PAST))
    assert all(taken)


def test_what_watches_operations_sees_them(family, taken):
    model = family.make()
    text = family.text(model, 1, PAST + TOKENS)
    with torch.no_grad():
        cache = model(**part(text, 0, PAST), use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        decode(model, text, PAST, copy.deepcopy(cache))
    assert counter.get_total_flops() > 2 * TOKENS * family.linear(model).weight.numel() and not any(taken)
    with torch.autocast("cpu", torch.bfloat16):
        decode(model, text, PAST, cache)
    assert not any(taken)


def test_other_passes_are_left_to_the_layers(family, taken):
    model = family.make()
    text = family.text(model, 9, PAST + 2)
    close(decode(model, text, PAST), exact(model, text, PAST))
    model.double()
    close(decode(model, text, PAST), exact(model, text, PAST))
    model.float()
    text = family.text(model, 2, PAST + 1)
    cache = decode_to_cache(model, text)
    model(**part(text, PAST, PAST + 1), past_key_values=cache)  # with gradients
    assert not any(taken)


@torch.no_grad()
def decode_to_cache(model, text, cache=None):
    return model(**part(text, 0, PAST), past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_attentions_and_hidden_states_are_there(kind, family, taken):
    model = family.make()
    text = family.text(model, 1, PAST + 1)
    cache = decode_to_cache(model, text, family.static_class(model.config, 40) if kind == "static" else None)
    last = part(text, PAST, PAST + 1)
    hidden = model(**last, past_key_values=copy.deepcopy(cache), output_hidden_states=True).hidden_states
    attentions = model(**last, past_key_values=copy.deepcopy(cache), output_attentions=True).attentions
    assert len(hidden) == 1 + model.config.num_hidden_layers and attentions and not any(taken)
    model(**last, past_key_values=cache)
    assert taken[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, family, taken):
    model = family.make()
    text = family.text(model, 1, PAST + TOKENS)
    cache = decode_to_cache(model, text)
    with torch.no_grad():
        family.blocks(model)[1].post_attention_layernorm.weight[0] = value
    assert not decode(model, text, PAST, cache)[..., : model.config.vocab_size].isfinite().any()
    assert all(taken)


def test_models_copy_pickle_and_go(family, taken):
    model = family.make()
    text = family.text(model, 1, PAST + TOKENS)
    logits, seen = decode(model, text, PAST), len(plain_modules._seen)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(decode(twin, text, PAST), logits)
    assert all(taken) and len(plain_modules._seen) == seen + 2
    del model, twins, twin
    assert len(plain_modules._seen) == seen - 1


# ---------------------------------------------------------------------------------------------------------------------
# In graphs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(family, monkeypatch):
    """Grows with each call of C."""
    module, seen = STEPS["multigrid" if family is FAMILIES["multigrid"] else "hierarchical_lm"], []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *arguments: (seen.append(True), run(*arguments))[1])
    return seen


@torch.no_grad()
def decode_compiled(model, family, text, steps, backend="eager"):
    """Logits of `steps` tokens after `PAST`, from a compiled model with a static cache."""
    torch._dynamo.reset()
    cache, logits = family.static_class(model.config, 40), []
    run = torch.compile(model, fullgraph=True, backend=backend)
    model(**part(text, 0, PAST), past_key_values=cache)
    for t in range(PAST, PAST + steps):
        getattr(cache, "prepare_step", lambda: None)()
        logits.append(all_logits(run(**part(text, t, t + 1), past_key_values=cache)))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("backend", ["eager", slow("inductor")])
def test_graphs_hold_the_call(backend, family, calls):
    model = family.make()
    text = family.text(model, 2, PAST + TOKENS)
    logits = decode_compiled(model, family, text, TOKENS, backend)
    assert len(calls) == TOKENS
    close(logits, exact(model, text, PAST))


@pytest.mark.slow
@pytest.mark.parametrize("change", [hooked, subclassed, mixed_activations, with_other_bias, transposed])
def test_changed_layers_are_called_in_graphs(change, family, calls):
    model = family.make()
    text = family.text(model, 1, PAST + 3)
    change(family, model)
    with torch.no_grad():
        expected = all_logits(model(**text, use_cache=False))[:, PAST:]
    close(decode_compiled(model, family, text, 3), expected)
    assert not calls


@pytest.mark.slow
def test_graphs_do_without_a_compiler(family, calls, monkeypatch):
    for module in STEPS.values():
        monkeypatch.setattr(module, "load_steps", lambda: None)
    model = family.make()
    text = family.text(model, 1, PAST + 3)
    close(decode_compiled(model, family, text, 3), exact(model, text, PAST)[:, :3])
    assert not calls


def operator_arguments(family, monkeypatch):
    """The operator of a family and its arguments for one token of a static cache."""
    model, seen = family.make(), []
    module = STEPS[model.config.model_type]
    text = family.text(model, 2, PAST + 1)
    cache = family.static_class(model.config, 40)
    with torch.no_grad(), monkeypatch.context() as patch:
        model(**part(text, 0, PAST), past_key_values=cache)
        patch.setattr(module, "in_graph", lambda: True)
        patch.setattr(module, "_operator", lambda token, *arguments: (seen.append((token, *arguments)), token)[1])
        model(**part(text, PAST, PAST + 1), past_key_values=cache)
    arguments = [[x.detach() for x in value] if _are_tensors(value) else value for value in seen[0]]
    return module._operator, arguments


def _are_tensors(value):
    return isinstance(value, list) and value and isinstance(value[0], torch.Tensor)


def test_opcheck(family, monkeypatch):
    torch.library.opcheck(*operator_arguments(family, monkeypatch))


@pytest.mark.parametrize("what", ["token", "weights", "states", "too few", "places"])
def test_the_operator_checks_its_arguments(what, family, monkeypatch):
    operator, arguments = operator_arguments(family, monkeypatch)
    token, states, weights, *rest = arguments
    if what == "token":
        token = token[..., 1:]
    elif what == "weights":
        weights = [weights[0][1:], *weights[1:]]
    elif what == "states":
        states = [*states[:-1], states[-1].double()]
    elif what == "too few":
        weights = weights[1:]
    elif family is FAMILIES["multigrid"]:
        rest[1] = torch.tensor(40)
    else:
        rest[2] = [ring + 40 for ring in rest[2]]
        rest[1] = torch.tensor(200)
    before = [state.clone() for state in states]
    with pytest.raises(ValueError, match="must be (a )?contiguous|A step needs|have no"):
        operator(token, states, weights, *rest)
    assert all(torch.equal(a, b) for a, b in zip(before, states))
