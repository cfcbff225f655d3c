"""The registered operators of LEAP's mixing: the same numbers in a graph as in eager mode, by the same kernels."""

import importlib
import sys

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_heptapod.leap import focus_operator
from modeling_heptapod.leap.focus import focus_mean, focus_mixing
from modeling_heptapod.leap.focus_cpu import NativeMixing, takes
from modeling_heptapod.leap.focus_tiles import TiledMixing
from tests.test_focus import OPTIONS, make_inputs, settings_for
from tests.tiny import mostly_slow
from tests.tiny_leap import random_ids, tiny_leap


pytestmark = pytest.mark.usefixtures("fresh_compiler")

HEADS = 2
# One for the C source, one for tiles because of the window, one because of both directions.
SETTINGS = {
    "global": (None, True),
    "window": (5, True),
    "wide": (80, True),
    "two-sided": (None, False),
    "two-sided window": (5, False),
}


@pytest.fixture
def calls(monkeypatch):
    """How often each form of the mixing step ran, by name of class and method."""
    counts = {}

    def count(kind, name):
        run = getattr(kind, name)

        def counting(self, *args, **kwargs):
            counts[kind.__name__, name] = counts.get((kind.__name__, name), 0) + 1
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, counting)

    for kind in (NativeMixing, TiledMixing):
        for name in ("forward", "backward"):
            count(kind, name)
    return counts


def inputs(option="plain", seq=150, dtype=torch.float32):
    qfkv, kwargs = make_inputs(2, seq, **OPTIONS[option])
    kwargs = {name: _to(x, dtype) for name, x in kwargs.items()}
    return qfkv.to(dtype), kwargs


def _to(x, dtype):
    if isinstance(x, tuple):
        return tuple(_to(part, dtype) for part in x)
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def gradients(function, *tensors):
    """What a function of tensors gives, and the gradients of a weighted sum of its first result."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, state = function(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    return out.detach(), *grads, *(() if state is None else state[:2])


def compare(function, *tensors, backend="aot_eager"):
    torch.use_deterministic_algorithms(False)
    expected = gradients(function, *tensors)
    compiled = gradients(torch.compile(function, fullgraph=True, backend=backend, dynamic=True), *tensors)
    for got, wanted in zip(compiled, expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", mostly_slow(SETTINGS, ("global", "wide", "two-sided window")))
def test_the_mixing_step_in_a_graph(kind):
    qfkv, kwargs = inputs("all")
    settings = settings_for(*SETTINGS[kind], **OPTIONS["all"])
    compare(lambda x: focus_mixing(x, settings, **kwargs), qfkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_dtypes(dtype):
    qfkv, kwargs = inputs("all", dtype=dtype)
    kwargs = {name: _to(x, torch.float32) for name, x in kwargs.items()}
    settings = settings_for(None, **OPTIONS["all"])
    compare(lambda x: focus_mixing(x, settings, **kwargs), qfkv)


@pytest.mark.parametrize("seq", [3, 60])
@pytest.mark.parametrize("kind", mostly_slow(["global", "window", "wide"], ("global",)))
def test_a_graph_that_goes_on_from_a_state(kind, seq):
    qfkv, kwargs = inputs("alibi_slopes", seq=40)
    settings = settings_for(*SETTINGS[kind], **OPTIONS["alibi_slopes"])
    _, state = focus_mixing(qfkv, settings, **kwargs)
    more, _ = inputs("alibi_slopes", seq=seq)
    compare(lambda x: focus_mixing(x, settings, initial_state=state, **kwargs), more)


@pytest.mark.parametrize("kind", ["global", pytest.param("window", marks=pytest.mark.slow), "two-sided window"])
def test_means_alone_in_a_graph(kind):
    settings, generator = settings_for(*SETTINGS[kind]), torch.Generator().manual_seed(5)
    logs, values = torch.randn(2, 50, HEADS, generator=generator), torch.randn(2, 50, HEADS, 6, generator=generator)
    compare(lambda *x: focus_mean(*x, settings), logs, values)


@pytest.mark.parametrize("kind", ["global", "wide", "two-sided window"])
def test_operators_are_what_torch_expects(kind):
    """Schema, shapes without memory, and gradients, as `torch.library.opcheck` looks at them."""
    qfkv, _ = inputs(seq=20)
    settings = settings_for(*SETTINGS[kind])
    nothing = (None,) * 7
    arguments = qfkv.requires_grad_(), *nothing, *focus_operator._values(settings), True
    torch.library.opcheck(focus_operator._mixing_operator, arguments)
    logs, values = torch.randn(2, HEADS, 20).requires_grad_(), torch.randn(2, HEADS, 20, 6).requires_grad_()
    arguments = logs, values, *(None,) * 4, settings.window, settings.sink_weight, settings.causal
    torch.library.opcheck(focus_operator._mean_operator, arguments)


@pytest.mark.skipif(
    not takes(torch.zeros(1, 1, 4, 1, 4), settings_for(None)), reason="the C source is not compiled here"
)
def test_compiled_models_keep_the_kernels(calls):
    torch.use_deterministic_algorithms(False)
    model, ids = tiny_leap(num_hidden_layers=2).train(), random_ids(2, 30)
    for run in (model, torch.compile(model, backend="aot_eager")):
        calls.clear()
        run(ids, labels=ids).loss.backward()
        assert calls == {("NativeMixing", "forward"): 2, ("NativeMixing", "backward"): 2}


def test_without_a_library_a_graph_runs_in_torch(calls, monkeypatch):
    monkeypatch.setattr("modeling_heptapod.leap.focus_cpu._library", lambda head_dim: None)
    qfkv, kwargs = inputs("all")
    settings = settings_for(None, **OPTIONS["all"])
    compare(lambda x: focus_mixing(x, settings, **kwargs), qfkv)
    assert {kind for kind, _ in calls} == {"TiledMixing"}


def test_autocast_does_not_reach_inside():
    qfkv, kwargs = inputs()
    settings = settings_for(80)

    def mixing(x):
        with torch.autocast("cpu", torch.bfloat16):
            return focus_mixing(x, settings, **kwargs)

    compare(mixing, qfkv)
    compiled = torch.compile(lambda x: focus_mixing(x, settings, **kwargs)[0], backend="aot_eager")
    expected = compiled(qfkv)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(qfkv), expected, rtol=0, atol=0)


def test_gradients_do_not_see_what_is_written_over_the_past():
    """A cache hands out its own memory as the past, and the next pass writes into it."""
    torch.use_deterministic_algorithms(False)
    qfkv, _ = inputs(seq=30)
    settings = settings_for(None)
    _, state = focus_mixing(qfkv, settings)

    def loss(x, state):
        return focus_mixing(x, settings, initial_state=state)[0].square().sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        x, past = qfkv.clone().requires_grad_(), type(state)(*(None if s is None else s.clone() for s in state))
        value = function(x, past)
        past.values.fill_(7.0)
        value.backward()
        grads.append(x.grad)
    expected = qfkv.clone().requires_grad_()
    loss(expected, state).backward()
    for grad in grads:
        torch.testing.assert_close(grad, expected.grad, rtol=1e-6, atol=1e-6)


def test_a_folder_registers_operators_of_its_own(tmp_path, monkeypatch):
    """Its code may be of another version than the package, or than that of another folder in the same process."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.use_deterministic_algorithms(False)
    model, ids = tiny_leap(num_hidden_layers=1).eval(), random_ids(2, 20)
    namespaces = {focus_operator.NAMESPACE}
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        theirs = get_class_from_dynamic_module("modeling_leap.LeapForCausalLM", str(tmp_path / name))
        module = importlib.import_module(theirs.__module__.rpartition(".")[0] + ".focus_operator")
        assert module is not focus_operator and module.__name__ in sys.modules
        namespaces.add(module.NAMESPACE)
        copy = theirs.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            compiled = torch.compile(copy, backend="aot_eager")(ids, use_cache=False).logits
            torch.testing.assert_close(compiled, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert "heptapod" in namespaces and len(namespaces) == 3
