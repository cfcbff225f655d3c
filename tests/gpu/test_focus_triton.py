"""The Triton kernels against the loop in float64: values, states, gradients, single tokens.

On a machine with a CUDA device these tests run there (`pytest -m gpu tests/gpu`). With `TRITON_INTERPRET=1` they run on a
CPU in Triton's interpreter, slowly; `tests/test_focus_triton.py` does that.
"""

import os
from dataclasses import replace

import pytest
import torch

from modeling_heptapod.leap import focus_operator, focus_triton
from modeling_heptapod.leap.focus import FocusSettings, FocusState, focus_mixing, naive_focus_mixing
from modeling_heptapod.leap.focus_recurrent import pack_state
from tests.test_focus import (
    KINDS_WITH_KERNELS,
    OPTIONS,
    OPTIONS_WITH_KERNELS,
    check_state,
    relative_rms,
    settings_for,
)
from tests.test_focus_cpu import HEADS, in_float64, make_inputs, with_gradient
from tests.triton_interpreter import complete_interpreter


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WINDOWS = [None, 4, 64]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(focus_triton.triton is None, reason="there is no Triton"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
at_length = pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels on whatever device the tests run; in the interpreter nothing else takes the step before them."""
    monkeypatch.setattr(focus_triton, "_DEVICES", (DEVICE,))
    monkeypatch.setattr(focus_operator, "native_is_supported", lambda *_: False)
    if INTERPRETED:
        complete_interpreter()


def on_device(value):
    if isinstance(value, tuple):
        return tuple(on_device(x) for x in value)
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def on_cpu(state):
    return FocusState(*(None if x is None else x.cpu() for x in state))


def run(qfkv, settings, kwargs, weight):
    """Output, state and gradient by the kernels, on the CPU."""
    qfkv, weight, kwargs = on_device(qfkv), on_device(weight), {name: on_device(x) for name, x in kwargs.items()}
    assert focus_triton.is_supported(qfkv, settings, kwargs.get("rotary"))
    out, state, grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    return out.cpu(), on_cpu(state), grad.cpu()


def check(qfkv, settings, kwargs, tolerance=1e-5):
    """Output, state and gradient to float32's precision."""
    weight = torch.randn(*qfkv.shape[:2], *qfkv.shape[3:])
    out, state, grad = run(qfkv, settings, kwargs, weight)
    double = in_float64(kwargs)
    expected, _, expected_grad = with_gradient(
        lambda x: naive_focus_mixing(x, settings, **double), qfkv.double(), weight.double()
    )
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=10 * tolerance, atol=10 * tolerance)
    state = FocusState(*(None if x is None else x.double() for x in state))
    check_state(state, qfkv.double(), settings, double, tolerance=tolerance)


@pytest.mark.parametrize("option", OPTIONS_WITH_KERNELS)
@pytest.mark.parametrize("window", WINDOWS)
def test_options(window, option):
    qfkv, kwargs = make_inputs(1 if INTERPRETED else 2, 130, **OPTIONS[option])
    check(qfkv, settings_for(window, **OPTIONS[option]), kwargs)


LENGTHS = [1, 63, 64, 65, *(() if INTERPRETED else (300, 2047, 4097))]


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 2, 17, *(() if INTERPRETED else (33, 34))])
def test_lengths_around_the_chunks(window, seq):
    qfkv, kwargs = make_inputs(1, seq, alibi_slopes=True)
    check(qfkv, settings_for(window), kwargs)


@pytest.mark.parametrize("head_dim", [2, 7, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 5])
def test_head_dims(window, head_dim):
    options = {"normalize": head_dim > 2, "padding": True, "rotary": head_dim % 2 == 0}
    qfkv, kwargs = make_inputs(1, 70, head_dim, **options)
    check(qfkv, replace(settings_for(window, **options), scale=2 / head_dim), kwargs)


@pytest.mark.parametrize("head_dim, window", [(4, 33), (4, 34), (64, 64), (96, 33)])
def test_the_widest_windows(head_dim, window):
    """Queries of the chunks after one see all that their windows hold."""
    qfkv, kwargs = make_inputs(1, 140, head_dim, normalize=True)
    check(qfkv, replace(settings_for(window, normalize=True), scale=2 / head_dim), kwargs)


@pytest.mark.parametrize("window", [None, 4])
def test_many_groups_of_chunks(window, monkeypatch):
    """More chunks than a group holds; each row waits for its own."""
    if INTERPRETED:
        monkeypatch.setattr(focus_triton, "_GROUP", 2)
        monkeypatch.setattr(focus_triton, "_tile", lambda *_: (16, 4, 4))
    seq = 100 if INTERPRETED else 4500
    qfkv, kwargs = make_inputs(2, seq, segments=True, padding=True, alibi_slopes=True)
    check(qfkv, settings_for(window, sink_weight=0.3), kwargs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("option", ["plain", *KINDS_WITH_KERNELS, "null", "rotary", "padding"])
def test_any_split_in_chunks_equals_the_whole(window, option):
    qfkv, kwargs = make_inputs(1, 200, **OPTIONS[option])
    settings = settings_for(window, **OPTIONS[option])
    qfkv, kwargs = on_device(qfkv), {name: on_device(x) for name, x in kwargs.items()}
    whole, final = focus_mixing(qfkv, settings, **kwargs)
    state, outs = None, []
    for start, end in ((0, 1), (1, 3), (3, 40), (40, 169), (169, 200)):
        piece = {
            name: tuple(x[:, start:end] for x in value) if name == "rotary" else value[:, start:end]
            for name, value in kwargs.items()
        }
        out, state = focus_mixing(qfkv[:, start:end], settings, **piece, initial_state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.values, final.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.log_weights, final.log_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_gradient_after_a_state(window, monkeypatch):
    qfkv, kwargs = make_inputs(2, 150, alibi_slopes=True)
    kwargs = {name: on_device(x) for name, x in kwargs.items()}
    settings, weight, qfkv = settings_for(window), torch.randn(2, 100, HEADS, 4).to(DEVICE), on_device(qfkv)
    _, state = focus_mixing(qfkv[:, :50], settings, **kwargs)

    def step(x):
        return focus_mixing(x, settings, **kwargs, initial_state=state)

    out, _, grad = with_gradient(step, qfkv[:, 50:], weight)
    monkeypatch.setattr(focus_triton, "_DEVICES", ())
    monkeypatch.setattr(focus_operator, "triton_is_supported", lambda *_: False)
    expected, _, expected_grad = with_gradient(step, qfkv[:, 50:], weight)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_low_precision_is_nearly_as_good_as_rounding_the_exact_result(window, normalize, dtype):
    qfkv, _ = make_inputs(1, 150, 64)
    qfkv, weight = qfkv.to(dtype), torch.randn(1, 150, HEADS, 64).to(dtype)
    settings = replace(settings_for(window, normalize=normalize), scale=0.1)
    out, _, grad = run(qfkv, settings, {}, weight)
    exact, _, exact_grad = with_gradient(lambda x: naive_focus_mixing(x, settings), qfkv.double(), weight.double())
    for got, expected in ((out, exact), (grad, exact_grad)):
        assert got.dtype == dtype
        assert relative_rms(got, expected) <= 1.2 * relative_rms(expected.to(dtype), expected)


@pytest.mark.parametrize("window", [None, 4, 64])
def test_extreme_logits(window):
    settings = FocusSettings(scale=1.0, weight_function="exp", window=window, output_gate="none")
    seq = 200 if INTERPRETED else 20_000
    qfkv = torch.randn(1, seq, 3, 1, 4)
    logits = 60 * torch.rand(seq) - 30
    qfkv[0, :, 0, 0], qfkv[0, :, 1, 0] = 0.0, 0.0
    qfkv[0, :, 0, 0, 0], qfkv[0, :, 1, 0, 0] = logits, 1.0
    weight = torch.randn(1, seq, 1, 4)
    out, _, grad = run(qfkv, settings, {}, weight)
    weights, values = logits.double().exp(), qfkv[0, :, 2, 0].double().requires_grad_()
    if window is None:
        exact = (weights[:, None] * values).cumsum(0) / weights.cumsum(0)[:, None]
    else:
        padded = torch.nn.functional.pad(weights, (window - 1, 0)).unfold(0, window, 1)
        rows = torch.nn.functional.pad(values, (0, 0, window - 1, 0)).unfold(0, window, 1)
        exact = (padded.unsqueeze(1) * rows).sum(-1) / padded.sum(-1, keepdim=True)
    (exact * weight[0, :, 0].double()).sum().backward()
    assert relative_rms(out[0, :, 0], exact.detach()) < 5e-6
    assert relative_rms(grad[0, :, 2, 0], values.grad) < 1e-5


@pytest.mark.parametrize("option", ["plain", *KINDS_WITH_KERNELS])
@pytest.mark.parametrize("window", [None, 4])
def test_inputs_that_give_logits_of_thousands(window, option):
    """A weight function or gate in Triton must not overflow where its definition does not."""
    qfkv, _ = make_inputs(1, 100, **OPTIONS[option])
    qfkv, settings = 30 * qfkv, settings_for(window, **OPTIONS[option])
    out, _, grad = run(qfkv, settings, {}, torch.ones(1, 100, HEADS, 4))
    assert relative_rms(out, naive_focus_mixing(qfkv.double(), settings)) < 1e-3 and grad.isfinite().all()


def test_logits_that_overflow_a_plain_exponential():
    settings = FocusSettings(scale=1.0, weight_function="exp", window=None)
    out, _ = focus_mixing(torch.full((1, 5, 4, 1, 2), 20.0, device=DEVICE), settings)
    torch.testing.assert_close(out.cpu(), torch.full((1, 5, 1, 2), 20.0))


@pytest.mark.parametrize("option", ["plain", *KINDS_WITH_KERNELS, "null", "alibi_slopes", "rotary", "normalize"])
@pytest.mark.parametrize("window", [None, 1, 2, 16])
def test_single_tokens_equal_the_whole(window, option):
    options, tokens = OPTIONS[option], range(20, 30 if INTERPRETED else 90)
    qfkv, kwargs = make_inputs(2, tokens[-1] + 1, **options)
    qfkv, kwargs = on_device(qfkv), {name: on_device(x) for name, x in kwargs.items()}
    settings, alibi_slopes = settings_for(window, **options), kwargs.pop("alibi_slopes", None)
    expected, _ = focus_mixing(qfkv, settings, alibi_slopes, **kwargs)
    start = {name: tuple(x[:, :20] for x in value) for name, value in kwargs.items()}
    _, state = focus_mixing(qfkv[:, :20], settings, alibi_slopes, **start)
    packed, outs = pack_state(state, settings, 4, 20), []
    for t in tokens:
        rotary = tuple(x[:, t : t + 1] for x in kwargs["rotary"]) if kwargs else None
        outs.append(focus_triton.step(qfkv[:, t : t + 1], settings, alibi_slopes, rotary, packed))
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 20:], rtol=1e-5, atol=1e-5)


def test_the_bounded_step_keeps_its_reference():
    settings = replace(settings_for(None, normalize=True), scale=0.5)
    assert settings.bounded(4)
    qfkv, _ = make_inputs(2, 8)
    qfkv = on_device(qfkv)
    expected, _ = focus_mixing(qfkv, settings)
    _, state = focus_mixing(qfkv[:, :5], settings)
    packed = pack_state(state, settings, 4, 5)
    outs = [focus_triton.step(qfkv[:, t : t + 1], settings, None, None, packed) for t in range(5, 8)]
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 5:], rtol=1e-5, atol=1e-5)
    assert packed[:, :HEADS].abs().max() == 0


def test_a_cache_that_keeps_more_than_a_window_is_left_to_torch():
    packed = torch.zeros(1, HEADS * 9, 5, device=DEVICE)
    assert focus_triton.step(on_device(make_inputs(1, 1)[0]), settings_for(4), None, None, packed) is None
    assert packed.abs().max() == 0


@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_equal_their_sequences_alone(window):
    lengths = (70, 1, 59)
    qfkv, _ = make_inputs(1, sum(lengths))
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    weight = torch.randn(1, sum(lengths), HEADS, 4)
    out, _, grad = run(qfkv, settings_for(window), {"segment_ids": segments}, weight)
    outs, grads = [], []
    for piece, part in zip(qfkv.split(lengths, 1), weight.split(lengths, 1)):
        alone = run(piece, settings_for(window), {}, part)
        outs.append(alone[0])
        grads.append(alone[2])
    torch.testing.assert_close(out, torch.cat(outs, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.cat(grads, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_pads_leave_no_trace(window):
    qfkv, _ = make_inputs(1, 80)
    mask = torch.ones(1, 80)
    mask[0, 10:20] = 0
    other = qfkv.clone()
    other[:, 10:20] = 1e4
    kept, weight = mask[0].bool(), mask.view(1, 80, 1, 1)
    out = run(other, settings_for(window), {"padding_mask": mask}, weight)[0]
    expected, _, grad = run(qfkv, settings_for(window), {"padding_mask": mask}, weight)
    assert torch.equal(out[:, kept], expected[:, kept])
    assert grad[:, ~kept].abs().max() == 0


@at_length
@pytest.mark.parametrize("window", [None, 16])
def test_repeated_runs_are_equal_to_the_last_bit(window):
    qfkv, _ = make_inputs(4, 8192, 32)
    weight = torch.randn(4, 8192, HEADS, 32)
    first = run(qfkv, settings_for(window, normalize=True), {}, weight)
    for _ in range(5):
        again = run(qfkv, settings_for(window, normalize=True), {}, weight)
        assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])


@at_length
def test_long_rows_equal_the_torch_form(monkeypatch):
    qfkv = torch.randn(1, 131_072, 4, 2, 32, device=DEVICE)
    weight = torch.randn(1, 131_072, 2, 32, device=DEVICE)
    settings = replace(settings_for(None, normalize=True), scale=0.3)
    out, state, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, weight)
    monkeypatch.setattr(focus_operator, "triton_is_supported", lambda *_: False)
    expected, final, expected_grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv.double(), weight.double())
    assert relative_rms(out, expected) < 5e-6
    assert relative_rms(grad, expected_grad) < 5e-5
    torch.testing.assert_close(state.values.double(), final.values, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous():
    qfkv, _ = make_inputs(2, 30)
    strided = qfkv.transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.randn(30, 2, HEADS, 4).transpose(0, 1)
    expected, got = run(qfkv, settings_for(4), {}, weight), run(strided, settings_for(4), {}, weight)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize(
    "head_dim, change",
    [(4, {"window": 65}), (65, {"window": 34}), (4, {"causal": False})],
    ids=["a window wider than the kernels'", "wide heads and a wide window", "bidirectional"],
)
def test_what_the_kernels_do_not_do_is_left_to_torch(head_dim, change):
    qfkv, _ = make_inputs(1, 100, head_dim)
    settings = replace(settings_for(4), scale=1 / head_dim, **change)
    assert not focus_triton.is_supported(on_device(qfkv), settings)
    out, _ = focus_mixing(on_device(qfkv), settings)
    torch.testing.assert_close(out.cpu(), naive_focus_mixing(qfkv, settings), rtol=1e-5, atol=1e-5)
