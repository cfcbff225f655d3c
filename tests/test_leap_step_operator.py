"""LEAP's step as a registered operator: in graphs of `torch.compile`, and with any arguments."""

from functools import partial

import pytest
import torch

from modeling_heptapod.common.step_program import load_steps
from modeling_heptapod.leap import leap_step, modeling_leap
from modeling_heptapod.leap.focus_cpu import _library as focus_library
from tests.test_leap_step import (
    FOCUS_VARIANTS,
    TOKENS,
    exact,
    hooked,
    in_training,
    mixed_activations,
    subclassed,
    without_bias,
)
from tests.tiny_leap import random_ids, tiny_leap


@pytest.fixture(autouse=True)
def compiled():
    if load_steps() is None or focus_library(8) is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def calls(monkeypatch):
    """Grows with each call of C."""
    seen, step = [], leap_step._step
    monkeypatch.setattr(leap_step, "_step", lambda *arguments: (seen.append(True), step(*arguments))[1])
    return seen


def decode_compiled(model, ids, steps):
    """Logits of `steps` tokens after 8, from a compiled model with a static cache."""
    with torch.no_grad():
        cache = modeling_leap.StaticRecurrentCache(model.config)
        model(ids[:, :8], past_key_values=cache)
        run = torch.compile(model, fullgraph=True)
        return torch.cat([run(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 8 + steps)], dim=1)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("variant", ["default", slow("alibi"), slow("plain-scale")])
def test_graphs_hold_the_call(variant, calls):
    torch._dynamo.reset()
    model, ids = tiny_leap(**FOCUS_VARIANTS[variant]), random_ids(2, 8 + TOKENS)
    logits = decode_compiled(model, ids, TOKENS)
    assert len(calls) == TOKENS
    torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=6e-5)


def transposed(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.t()  # the same memory, in another order


@pytest.mark.slow
@pytest.mark.parametrize("change", [hooked, subclassed, mixed_activations, without_bias, in_training, transposed])
def test_changed_layers_are_called_in_graphs(change, calls):
    torch._dynamo.reset()
    model, ids = tiny_leap(hidden_dropout=0.0, intermediate_size=32), random_ids(1, 8 + 3)
    change(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(decode_compiled(model, ids, 3), expected, rtol=0, atol=6e-5)
    assert not calls


@pytest.mark.slow
def test_graphs_do_without_a_compiler(monkeypatch, calls):
    torch._dynamo.reset()
    monkeypatch.setattr(leap_step, "load_steps", lambda: None)
    model, ids = tiny_leap(), random_ids(1, 8 + 3)
    logits = decode_compiled(model, ids, 3)
    assert not calls
    torch.testing.assert_close(logits.double(), exact(model, ids)[:, :3], rtol=0, atol=6e-5)


@torch.no_grad()
def operator_arguments(monkeypatch, **options):
    model, ids, seen = tiny_leap(**options), random_ids(2, 9), []
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with monkeypatch.context() as patch:
        patch.setattr(leap_step, "_step", lambda *arguments: seen.append(arguments))
        model(ids[:, 8:], past_key_values=cache)
    return seen[0]


@pytest.mark.parametrize("variant", ["default", "alibi"])
def test_opcheck(variant, monkeypatch):
    arguments = list(operator_arguments(monkeypatch, **FOCUS_VARIANTS[variant]))
    arguments[2] = [weight.detach() for weight in arguments[2]]
    torch.library.opcheck(leap_step._operator, arguments)


NAMES = "hidden_states states weights alibi_slopes cos sin heads windows".split()
WRONG = {
    "hidden_states": [
        torch.zeros(2, 32),
        torch.zeros(2, 2, 32),
        torch.zeros(2, 1, 16),
        torch.zeros(2, 1, 32).double(),
    ],
    "states": [[], [torch.zeros(3)] * 4],
    "weights": [[], [torch.zeros(32)] * 36, [torch.zeros(32).double()] * 36],
    "alibi_slopes": [[torch.zeros(4)], [torch.zeros(3)] * 4],
    "cos": [torch.zeros(2, 1, 8).double(), torch.zeros(3, 1, 8)],
    "heads": [-1, 0, 3, 32],
    "windows": [[], [0], [65, 0, 0, 0]],
}


@pytest.mark.parametrize("name, place", [(name, place) for name in WRONG for place in range(len(WRONG[name]))])
def test_the_operator_checks_its_arguments(name, place, monkeypatch):
    arguments = list(operator_arguments(monkeypatch))
    arguments[NAMES.index(name)] = WRONG[name][place]
    before = [state.clone() for state in arguments[1]]
    of_layers = name in ("hidden_states", "weights", "alibi_slopes")
    with pytest.raises(ValueError, match="must be those of LEAP's layers" if of_layers else "`"):
        leap_step._operator(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments[1]))


def test_heads_that_do_not_divide_the_width(monkeypatch):
    arguments = list(operator_arguments(monkeypatch, window_sizes=[None] * 4))
    arguments[1], arguments[6] = [torch.ones(2, 3 * (2 + 2 * 10)) for _ in range(4)], 3  # as of heads of 10 channels
    arguments[4] = arguments[5] = torch.ones(1, 1, 10)
    with pytest.raises(ValueError, match="`weights` and `alibi_slopes` must be those of LEAP's layers"):
        leap_step._operator(*arguments)


def test_the_operator_says_that_there_is_no_compiler(monkeypatch):
    arguments = operator_arguments(monkeypatch)
    leap_step._make_plan.cache_clear()
    monkeypatch.setattr(leap_step, "has_kernel", lambda *_: False)
    with pytest.raises(ValueError, match="There is no compiled C source for `windows`"):
        leap_step._operator(*arguments)
