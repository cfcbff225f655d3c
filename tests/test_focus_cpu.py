"""The compiled mixing step against the loop in float64: values, states, gradients, single tokens; and life without it."""

import math
import re
from dataclasses import replace

import pytest
import torch

from modeling_heptapod.leap import focus, focus_cpu, focus_operator
from modeling_heptapod.leap.focus import FocusSettings, FocusState, focus_mixing, naive_focus_mixing
from modeling_heptapod.leap.focus_cpu_source import SOURCE
from modeling_heptapod.leap.focus_functions import OUTPUT_GATES, WEIGHT_FUNCTIONS, WeightFunction
from modeling_heptapod.leap.focus_recurrent import pack_state
from tests.test_focus import (
    KINDS,
    KINDS_WITH_KERNELS,
    OPTIONS,
    OPTIONS_WITH_KERNELS,
    check_state,
    relative_rms,
    settings_for,
)
from tests.tiny import mostly_slow
from tests.tiny_leap import tiny_leap


HEADS = 2
WINDOWS = [None, 1, 2, 16, 64]


@pytest.fixture(autouse=True)
def compiled():
    if focus_cpu._library(4) is None:
        pytest.skip("there is no C compiler")


def make_inputs(batch, seq, head_dim=4, **options):
    """Float32 `qfkv` and keyword arguments of `focus_mixing`."""
    parts = 3 if options.get("output_gate") == "none" else 4
    qfkv = 1.5 * torch.randn(batch, seq, parts, HEADS, head_dim)
    kwargs = {}
    if options.get("alibi_slopes"):
        kwargs["alibi_slopes"] = torch.tensor([0.3, 0.01])
    if options.get("rotary"):
        angles = torch.rand(batch, seq, head_dim // 2).repeat(1, 1, 2) * 6
        kwargs["rotary"] = (angles.cos(), angles.sin())
    if options.get("padding"):
        kwargs["padding_mask"] = torch.rand(batch, seq) > 0.3
        kwargs["padding_mask"][0, : seq // 2] = False
    if options.get("segments"):
        kwargs["segment_ids"] = (torch.rand(batch, seq) < 6 / seq).cumsum(1)
    return qfkv, kwargs


def in_float64(kwargs):
    double = {name: value.double() if name == "alibi_slopes" else value for name, value in kwargs.items()}
    if "rotary" in double:
        double["rotary"] = tuple(x.double() for x in double["rotary"])
    return double


def with_gradient(function, qfkv, weight):
    qfkv = qfkv.detach().clone().requires_grad_()
    result = function(qfkv)
    out, state = result if isinstance(result, tuple) else (result, None)
    (out * weight).sum().backward()
    return out.detach(), state, qfkv.grad


def check(qfkv, settings, kwargs, tolerance=1e-5):
    """Output and gradient to float32's precision; returns the state."""
    assert focus_cpu.is_supported(qfkv, settings, kwargs.get("rotary"))
    weight = torch.randn(*qfkv.shape[:2], *qfkv.shape[3:])
    out, state, grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    double = in_float64(kwargs)
    expected, _, expected_grad = with_gradient(
        lambda x: naive_focus_mixing(x, settings, **double), qfkv.double(), weight.double()
    )
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=10 * tolerance, atol=10 * tolerance)
    return state


@pytest.mark.parametrize("option", OPTIONS_WITH_KERNELS)
@pytest.mark.parametrize("window", WINDOWS)
def test_options(window, option):
    qfkv, kwargs = make_inputs(2, 150, **OPTIONS[option])
    settings = settings_for(window, **OPTIONS[option])
    state = check(qfkv, settings, kwargs)
    double = FocusState(*(None if x is None else x.double() for x in state))
    check_state(double, qfkv.double(), settings, in_float64(kwargs), tolerance=1e-5)


@pytest.mark.parametrize("seq", [1, 63, 127, 128, 129, 300])
@pytest.mark.parametrize("window", WINDOWS)
def test_lengths_around_the_blocks(window, seq):
    check(*_with_settings(1, seq, window))


def _with_settings(batch, seq, window, head_dim=4, **options):
    qfkv, kwargs = make_inputs(batch, seq, head_dim, **options)
    return qfkv, settings_for(window, **options), kwargs


@pytest.mark.parametrize("head_dim", mostly_slow([7, 16, 64, 2, 96], (7,)))
def test_head_dims(head_dim):
    options = {"normalize": head_dim > 2, "padding": True, "rotary": head_dim % 2 == 0}
    check(*_with_settings(2, 40, 5, head_dim, **options))
    check(*_with_settings(2, 40, None, head_dim, **options))


def test_rotary_positions_of_one_row_serve_the_batch():
    qfkv, kwargs = make_inputs(3, 20, rotary=True)
    kwargs["rotary"] = tuple(x[:1] for x in kwargs["rotary"])
    check(qfkv, settings_for(4), kwargs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("option", ["plain", *KINDS, "null", "alibi_slopes", "rotary", "padding"])
def test_any_split_in_chunks_equals_the_whole(window, option):
    qfkv, kwargs = make_inputs(2, 200, **OPTIONS[option])
    settings = settings_for(window, **OPTIONS[option])
    whole, final = focus_mixing(qfkv, settings, **kwargs)
    state, outs = None, []
    for start, end in ((0, 1), (1, 3), (3, 40), (40, 169), (169, 200)):
        piece = {
            name: tuple(x[:, start:end] for x in value) if name == "rotary" else value[:, start:end]
            for name, value in kwargs.items()
            if name != "alibi_slopes"
        }
        alibi_slopes = {"alibi_slopes": kwargs["alibi_slopes"]} if "alibi_slopes" in kwargs else {}
        out, state = focus_mixing(qfkv[:, start:end], settings, **piece, **alibi_slopes, initial_state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.values, final.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.log_weights, final.log_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4, 64])
def test_gradient_after_a_state(window, monkeypatch):
    qfkv, kwargs = make_inputs(2, 150, alibi_slopes=True)
    settings, weight = settings_for(window), torch.randn(2, 100, HEADS, 4)
    _, state = focus_mixing(qfkv[:, :50], settings, **kwargs)

    def run(x):
        return focus_mixing(x, settings, **kwargs, initial_state=state)

    out, _, grad = with_gradient(run, qfkv[:, 50:], weight)
    monkeypatch.setattr(focus_operator, "native_is_supported", lambda *_: False)
    expected, _, expected_grad = with_gradient(run, qfkv[:, 50:], weight)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_bf16_is_as_good_as_rounding_the_exact_result(window, normalize):
    qfkv, _ = make_inputs(2, 150, 64)
    qfkv, weight = qfkv.bfloat16(), torch.randn(2, 150, HEADS, 64).bfloat16()
    settings = replace(settings_for(window, normalize=normalize), scale=0.1)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, weight)
    exact, _, exact_grad = with_gradient(lambda x: naive_focus_mixing(x, settings), qfkv.double(), weight.double())
    for got, expected in ((out, exact), (grad, exact_grad)):
        assert got.dtype == torch.bfloat16
        assert relative_rms(got, expected) <= 1.1 * relative_rms(expected.bfloat16(), expected)


@pytest.mark.parametrize("window", [None, 4, 64])
def test_long_sequences_of_extreme_logits(window):
    settings = FocusSettings(scale=1.0, weight_function="exp", window=window, output_gate="none")
    qfkv = torch.randn(1, 20_000, 3, 1, 4)
    logits = 60 * torch.rand(20_000) - 30
    qfkv[0, :, 0, 0], qfkv[0, :, 1, 0] = 0.0, 0.0
    qfkv[0, :, 0, 0, 0], qfkv[0, :, 1, 0, 0] = logits, 1.0
    weight = torch.randn(1, 20_000, 1, 4)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, weight)
    weights, values = logits.double().exp(), qfkv[0, :, 2, 0].double().requires_grad_()
    if window is None:
        exact = (weights[:, None] * values).cumsum(0) / weights.cumsum(0)[:, None]
    else:
        padded = torch.nn.functional.pad(weights, (window - 1, 0)).unfold(0, window, 1)
        rows = torch.nn.functional.pad(values, (0, 0, window - 1, 0)).unfold(0, window, 1)
        exact = (padded.unsqueeze(1) * rows).sum(-1) / padded.sum(-1, keepdim=True)
    (exact * weight[0, :, 0].double()).sum().backward()
    assert relative_rms(out[0, :, 0], exact.detach()) < 1e-6
    assert relative_rms(grad[0, :, 2, 0], values.grad) < 2e-6


@pytest.mark.parametrize("option", ["plain", *KINDS_WITH_KERNELS, "null", "alibi_slopes", "rotary", "normalize"])
@pytest.mark.parametrize("window", WINDOWS)
def test_single_tokens_equal_the_whole(window, option):
    options = OPTIONS[option]
    qfkv, kwargs = make_inputs(2, 90, **options)
    settings, alibi_slopes = settings_for(window, **options), kwargs.pop("alibi_slopes", None)
    expected, final = focus_mixing(qfkv, settings, alibi_slopes, **kwargs)
    start = {name: tuple(x[:, :20] for x in value) for name, value in kwargs.items()}
    _, state = focus_mixing(qfkv[:, :20], settings, alibi_slopes, **start)
    packed, outs = pack_state(state, settings, 4, 20), []
    for t in range(20, 90):
        rotary = tuple(x[:, t : t + 1] for x in kwargs["rotary"]) if kwargs else None
        outs.append(focus_cpu.step(qfkv[:, t : t + 1], settings, alibi_slopes, rotary, packed))
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 20:], rtol=1e-5, atol=1e-5)
    if window == 1:
        return  # its state holds a token that no window reaches
    in_the_end = pack_state(final, settings, 4, 90)
    if window is None:  # the reference is free where log weights are not bounded
        packed, in_the_end = (
            (x[:, :HEADS] + x[:, HEADS : 2 * HEADS].log(), x[:, 2 * HEADS :]) for x in (packed, in_the_end)
        )
    torch.testing.assert_close(packed, in_the_end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [34, 40, 63])
def test_windows_above_33(window):
    """Two vectors of sixteen and one more: values, gradients and single tokens."""
    options = {"alibi_slopes": True, "sink_weight": 0.4}
    qfkv, kwargs = make_inputs(1, 150, **options)
    settings = settings_for(window, **options)
    check(qfkv, settings, kwargs)
    expected, _ = focus_mixing(qfkv, settings, kwargs["alibi_slopes"])
    _, state = focus_mixing(qfkv[:, :50], settings, kwargs["alibi_slopes"])
    packed = pack_state(state, settings, 4, 50)
    outs = [focus_cpu.step(qfkv[:, t : t + 1], settings, kwargs["alibi_slopes"], None, packed) for t in range(50, 150)]
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 50:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads):
    qfkv, kwargs = make_inputs(3, 300, padding=True)
    settings, weight = settings_for(8), torch.randn(3, 300, HEADS, 4)
    expected = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize("window", [None, 4])
def test_pads_leave_no_trace(window):
    qfkv, _ = make_inputs(1, 40)
    mask = torch.ones(1, 40)
    mask[0, 10:20] = 0
    other = qfkv.clone()
    other[:, 10:20] = 1e4
    kept, weight = mask[0].bool(), mask.view(1, 40, 1, 1)

    def run(x):
        return focus_mixing(x, settings_for(window), padding_mask=mask)

    (out, _, _), (expected, _, grad) = with_gradient(run, other, weight), with_gradient(run, qfkv, weight)
    assert torch.equal(out[:, kept], expected[:, kept])
    assert grad[:, ~kept].abs().max() == 0


def test_inputs_that_are_not_contiguous():
    qfkv, _ = make_inputs(2, 30)
    strided = qfkv.transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.randn(30, 2, HEADS, 4).transpose(0, 1)
    expected = with_gradient(lambda x: focus_mixing(x, settings_for(4)), qfkv, weight)
    got = with_gradient(lambda x: focus_mixing(x, settings_for(4)), strided, weight)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize(
    "change", [{"window": 65}, {"causal": False}], ids=["a window wider than the source's", "bidirectional"]
)
def test_what_the_source_does_not_do_is_left_to_torch(change):
    qfkv, _ = make_inputs(1, 100)
    settings = replace(settings_for(4), **change)
    assert not focus_cpu.is_supported(qfkv, settings)
    out, _ = focus_mixing(qfkv, settings)
    torch.testing.assert_close(out, naive_focus_mixing(qfkv, settings), rtol=1e-5, atol=1e-5)


def test_a_cache_that_keeps_more_than_a_window_is_left_to_torch():
    qfkv, _ = make_inputs(1, 1)
    packed = torch.zeros(1, HEADS * 9, 5)
    assert focus_cpu.step(qfkv, settings_for(4), None, None, packed) is None
    assert packed.abs().max() == 0


def test_logits_that_overflow_a_plain_exponential():
    settings = FocusSettings(scale=1.0, weight_function="exp", window=None)
    qfkv = torch.full((1, 5, 4, 1, 2), 20.0)
    out, _ = focus_mixing(qfkv, settings)
    assert math.isfinite(out.sum().item())
    torch.testing.assert_close(out, torch.full((1, 5, 1, 2), 20.0))


@pytest.mark.parametrize("window", [None, 4])
def test_single_tokens_of_extreme_logits(window):
    settings = FocusSettings(scale=1.0, weight_function="exp", window=window, output_gate="none")
    qfkv = torch.randn(1, 6, 3, 1, 4)
    logits = torch.tensor([100.0, -100.0, 0.0, 100.0, -100.0, -100.0])
    qfkv[0, :, 0, 0], qfkv[0, :, 1, 0] = logits[:, None] / 4, 1.0
    expected, _ = focus_mixing(qfkv, settings)
    _, state = focus_mixing(qfkv[:, :1], settings)
    packed = pack_state(state, settings, 4, 1)
    outs = [focus_cpu.step(qfkv[:, t : t + 1], settings, None, None, packed) for t in range(1, 6)]
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["plain", *KINDS_WITH_KERNELS])
@pytest.mark.parametrize("window", [None, 4])
def test_inputs_that_give_logits_of_thousands(window, option):
    """A weight function or gate in C must not overflow where its definition does not. Also one token at a time."""
    qfkv, _ = make_inputs(1, 200, **OPTIONS[option])
    qfkv, settings = 30 * qfkv, settings_for(window, **OPTIONS[option])
    assert focus_cpu.is_supported(qfkv, settings)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, torch.ones(1, 200, HEADS, 4))
    expected = naive_focus_mixing(qfkv.double(), settings)
    assert relative_rms(out, expected) < 1e-3 and grad.isfinite().all()
    _, state = focus_mixing(qfkv[:, :1], settings)
    packed = pack_state(state, settings, 4, 1)
    steps = [focus_cpu.step(qfkv[:, t : t + 1], settings, None, None, packed) for t in range(1, 200)]
    assert relative_rms(torch.cat(steps, 1), expected[:, 1:]) < 1e-3


def not_finite(x):
    return ~x.isfinite()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", mostly_slow([None, 4, 1, 64], (None,)))
def test_what_is_not_finite_stays_so(window, option, poison, monkeypatch):
    """Where the definition gives NaN or Inf, so does C; and nowhere where torch does not, whose tiles spread it."""
    qfkv, kwargs = make_inputs(2, 60, **OPTIONS[option])
    settings, weight = settings_for(window, **OPTIONS[option]), torch.randn(2, 60, HEADS, 4)
    double = in_float64(kwargs)
    alone = not {"padding_mask", "segment_ids"} & set(kwargs)  # there zero times NaN is NaN in the definition
    place = 20 if "padding_mask" not in kwargs else int(kwargs["padding_mask"][1].nonzero()[3])
    for part in range(qfkv.shape[2]):
        poisoned = qfkv.clone()
        poisoned[1, place, part, 0, 1] = poison
        compiled = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), poisoned, weight)
        exact = with_gradient(lambda x: naive_focus_mixing(x, settings, **double), poisoned.double(), weight.double())
        with monkeypatch.context() as patch:
            patch.setattr(focus_operator, "native_is_supported", lambda *_: False)
            tiles = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), poisoned, weight)
        for which in (0, 2):  # outputs, gradients
            got, wanted, spread = (not_finite(x[which]) for x in (compiled, exact, tiles))
            assert spread.any() == got.any() and (got.any() or poison == poison)
            assert not (got & ~spread).any()
            assert not (wanted & ~got).any() or not alone


@pytest.mark.parametrize("form", ["C", "torch", "definition"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_what_pads_hold_leaves_no_trace(window, form, monkeypatch):
    """Not even in sums where it would have a weight of 0: outputs, states and gradients as with zeros there."""
    if form == "torch":
        monkeypatch.setattr(focus_operator, "native_is_supported", lambda *_: False)
    mask, weight = torch.rand(2, 200) < 0.7, torch.randn(2, 200, HEADS, 4)
    mask[0, 150:], mask[1, :9] = False, False
    for option in ("normalize", "null") if window == 4 else ("no gate",):
        qfkv, kwargs = make_inputs(2, 200, **OPTIONS[option])
        kwargs["padding_mask"] = mask
        settings, results = settings_for(window, **OPTIONS[option]), []

        def mix(x, settings=settings, kwargs=kwargs):
            return (
                (naive_focus_mixing(x, settings, **kwargs), None)
                if form == "definition"
                else focus_mixing(x, settings, **kwargs)
            )

        for filling in (0.0, math.nan, math.inf):
            x = qfkv.masked_fill(~mask[..., None, None, None], filling).requires_grad_()
            out, state = mix(x)
            (out * weight).sum().backward()
            results.append((out.detach(), x.grad, *([] if state is None else state[:2])))
        for result in results[1:]:
            for got, expected in zip(result, results[0]):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("option", ["plain", "exp", "null", "alibi_slopes", "normalize", "no gate"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_state_keeps_what_is_not_finite(window, option, monkeypatch):
    """From one chunk to the next, and to single tokens."""
    qfkv, kwargs = make_inputs(2, 12, **OPTIONS[option])
    settings, alibi_slopes = settings_for(window, **OPTIONS[option]), kwargs.get("alibi_slopes")
    qfkv[1, 8, -2, 0, 1] = math.nan
    results = {}
    for form in ("C", "torch"):
        if form == "torch":
            monkeypatch.setattr(focus_operator, "native_is_supported", lambda *_: False)
        _, state = focus_mixing(qfkv[:, :10], settings, alibi_slopes)
        results[form] = not_finite(focus_mixing(qfkv[:, 10:], settings, alibi_slopes, initial_state=state)[0])
        if form == "C":
            packed = pack_state(state, settings, 4, 10)
            out = focus_cpu.step(qfkv[:, 10:11], settings, alibi_slopes, None, packed)
            assert torch.equal(not_finite(out), results[form][:, :1])
    assert results["C"][1, 0, 0].all() and torch.equal(results["C"], results["torch"])


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_that_are_not_finite_stay_so(window):
    qfkv, _ = make_inputs(1, 20)
    weight = torch.randn(1, 20, HEADS, 4)
    weight[0, 10, 0] = math.nan
    _, _, grad = with_gradient(lambda x: focus_mixing(x, settings_for(window)), qfkv, weight)
    first = 0 if window is None else 11 - window
    assert (
        not_finite(grad[0, first:11, 1:, 0]).all()
        and grad[0, 11:].isfinite().all()
        and grad[:, :, :, 1].isfinite().all()
    )


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("windows", [[None, None], [3, 3]])
@torch.no_grad()
def test_a_weight_that_is_nan_makes_the_loss_nan(windows, part):
    model, ids = tiny_leap(num_hidden_layers=2, window_sizes=windows), torch.arange(40)[None]
    assert model(ids, labels=ids).loss.isfinite()
    model.model.layers[0].mixer.qfkv_proj.weight[32 * part + 3, 5] = math.nan
    assert model(ids, labels=ids).loss.isnan()
    cache = model(ids[:, :5]).past_key_values
    assert not_finite(model(ids[:, :1], past_key_values=cache).logits).any()


# What comes with the tokens `[2, 10, 4 parts, 2 heads, 4 channels]`, wrong in one way, and what the error names.
def window_state(past, **changes):
    shapes = {"logs": (2, HEADS, past), "values": (2, HEADS, past, 8), **changes}
    return FocusState(torch.zeros(shapes["logs"]), torch.zeros(shapes["values"]))


WRONG = {
    "tokens of no floats": ({"qfkv": torch.zeros(2, 10, 4, HEADS, 4, dtype=torch.long)}, TypeError, "qfkv"),
    "three parts": ({"qfkv": torch.zeros(2, 10, 3, HEADS, 4)}, ValueError, "qfkv"),
    "no rows": ({"qfkv": torch.zeros(0, 10, 4, HEADS, 4)}, ValueError, "qfkv"),
    "no tokens": ({"qfkv": torch.zeros(2, 0, 4, HEADS, 4)}, ValueError, "qfkv"),
    "no heads": ({"qfkv": torch.zeros(2, 10, 4, 0, 4)}, ValueError, "qfkv"),
    "slopes of more heads": ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes"),
    "one slope": ({"alibi_slopes": torch.zeros(1)}, ValueError, "alibi_slopes"),
    "a number for slopes": ({"alibi_slopes": 0.1}, TypeError, "alibi_slopes"),
    "integers for slopes": ({"alibi_slopes": torch.zeros(HEADS, dtype=torch.long)}, TypeError, "alibi_slopes"),
    "slopes elsewhere": ({"alibi_slopes": torch.zeros(HEADS, device="meta")}, ValueError, "alibi_slopes"),
    "tables of fewer rows": (
        {"qfkv": torch.zeros(3, 10, 4, HEADS, 4), "rotary": 2 * (torch.zeros(2, 10, 4),)},
        ValueError,
        r"rotary\[0\]",
    ),
    "shorter tables": ({"rotary": 2 * (torch.zeros(2, 9, 4),)}, ValueError, r"rotary\[0\]"),
    "narrower tables": ({"rotary": 2 * (torch.zeros(1, 10, 2),)}, ValueError, r"rotary\[0\]"),
    "sines of one row": ({"rotary": (torch.zeros(2, 10, 4), torch.zeros(1, 10, 4))}, ValueError, "rotary"),
    "integers for tables": ({"rotary": 2 * (torch.zeros(1, 10, 4, dtype=torch.long),)}, TypeError, "rotary"),
    "an odd head": (
        {"qfkv": torch.zeros(2, 10, 4, HEADS, 3), "rotary": 2 * (torch.zeros(1, 10, 3),)},
        ValueError,
        "rotary",
    ),
    "a mask of fewer rows": ({"padding_mask": torch.ones(1, 10)}, ValueError, "padding_mask"),
    "a longer mask": ({"padding_mask": torch.ones(2, 11)}, ValueError, "padding_mask"),
    "a mask elsewhere": ({"padding_mask": torch.ones(2, 10, device="meta")}, ValueError, "padding_mask"),
    "segments of fewer rows": ({"segment_ids": torch.zeros(1, 10, dtype=torch.long)}, ValueError, "segment_ids"),
    "segments of no integers": ({"segment_ids": torch.zeros(2, 10)}, TypeError, "segment_ids"),
    "a state of fewer rows": (
        {"initial_state": window_state(3, logs=(1, HEADS, 3))},
        ValueError,
        "initial_state.log_weights",
    ),
    "a state of more heads": (
        {"initial_state": window_state(3, logs=(2, 3, 3))},
        ValueError,
        "initial_state.log_weights",
    ),
    "a state longer than the window": ({"initial_state": window_state(4)}, ValueError, "initial_state.log_weights"),
    "a global state": ({"initial_state": window_state(3, logs=(2, HEADS))}, ValueError, "initial_state.log_weights"),
    "values of fewer tokens": (
        {"initial_state": window_state(3, values=(2, HEADS, 2, 8))},
        ValueError,
        "initial_state.values",
    ),
    "values of fewer channels": (
        {"initial_state": window_state(3, values=(2, HEADS, 3, 4))},
        ValueError,
        "initial_state.values",
    ),
}


@pytest.mark.parametrize("form", ["C", "torch"])
@pytest.mark.parametrize("what", WRONG)
def test_inputs_that_do_not_fit_are_named(what, form, monkeypatch):
    if form == "torch":
        monkeypatch.setattr(focus_operator, "native_is_supported", lambda *_: False)
    changes, kind, name = WRONG[what]
    arguments = {"qfkv": torch.zeros(2, 10, 4, HEADS, 4), **changes}
    with pytest.raises(kind, match=f"`{name}"):
        focus_mixing(settings=settings_for(4), **arguments)
    if "initial_state" not in changes:
        return
    past = changes["initial_state"]
    with pytest.raises(kind, match=f"`{name}"):
        focus.focus_mean(torch.zeros(2, 10, HEADS), torch.zeros(2, 10, HEADS, 8), settings_for(4), initial_state=past)


@pytest.mark.parametrize(
    "shape",
    [(1, 18, 3), (2, 17, 3), (2, 18, 2), (2, 18), (2, 9, 3)],
    ids=["rows", "size", "short", "global", "one part"],
)
def test_packed_states_that_do_not_fit_are_named(shape):
    qfkv, packed = torch.zeros(2, 1, 4, HEADS, 4), torch.ones(shape)
    with pytest.raises(ValueError, match="`state` must be a contiguous torch.float32"):
        focus_cpu.step(qfkv, settings_for(4), None, None, packed)
    assert packed.eq(1).all()


def test_steps_take_one_token():
    with pytest.raises(ValueError, match="`qfkv` must hold one token, got 2"):
        focus_cpu.step(torch.zeros(2, 2, 4, HEADS, 4), settings_for(4), None, None, torch.zeros(2, 18, 3))


def test_nothing_reaches_c_that_it_would_take_for_something_else():
    """The last look, whoever calls."""
    qfkv, settings = torch.zeros(2, 10, 4, HEADS, 4), settings_for(4)
    for name, wrong in (
        ("out", torch.zeros(2, 10, HEADS, 5)),
        ("out", torch.zeros(2, 10, HEADS, 4, dtype=torch.float64)),
        ("out", torch.zeros(2, 10, HEADS, 8)[..., ::2]),
        ("out", torch.zeros(2, 10, HEADS, 4, device="meta")),
        ("out", torch.zeros(2, 10, HEADS, 4).to_sparse()),
        ("input", torch.zeros(2, 10, 4, HEADS, 4).to(torch.bfloat16)),
    ):
        mixing = focus_cpu.NativeMixing(qfkv, settings)
        tensors = {"input": qfkv, "out": torch.zeros(2, 10, HEADS, 4), name: wrong}
        with pytest.raises(ValueError, match=f"`{name}` must be a contiguous"):
            mixing.call("focus_forward", **tensors)
    freed = torch.zeros(2, 10, HEADS, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="`out` has no memory"):
        focus_cpu.NativeMixing(qfkv, settings).call("focus_forward", input=qfkv, out=freed)
    with pytest.raises(RuntimeError, match="backward pass"):
        focus_cpu.NativeMixing(qfkv, settings_for(None)).backward(qfkv, torch.zeros(2, 10, HEADS, 4))


@pytest.mark.parametrize("field", ["weight", "gate", "parts", "window", "past", "batch"])
def test_c_refuses_what_it_does_not_know(field):
    mixing = focus_cpu.NativeMixing(torch.zeros(2, 10, 4, HEADS, 4), settings_for(4))
    mixing.blank = type(mixing.blank).from_buffer_copy(mixing.blank)
    setattr(mixing.blank, field, 99 if field != "past" and field != "batch" else -1)
    with pytest.raises(ValueError, match="C source lacks"):
        mixing.forward(torch.zeros(2, 10, 4, HEADS, 4), False)


def test_c_numbers_kinds_as_the_tables_do():
    """A number that C takes for another kind is silently wrong."""
    source = re.sub(r"/\*.*?\*/", "", SOURCE)
    for table, last in ((WEIGHT_FUNCTIONS, "WEIGHT_FUNCTIONS"), (OUTPUT_GATES, "GATES")):
        (names,) = (found.split(", ") for found in re.findall(r"enum \{ (.*) \};", source) if found.endswith(last))
        numbers = {kind.kernel: name.upper() for name, kind in table.items() if kind.kernel is not None}
        assert names == [numbers[number].replace("NONE", "NO_GATE") for number in range(len(numbers))] + [last]


@pytest.mark.parametrize("window", [None, 4])
def test_kinds_are_in_one_table(window, monkeypatch):
    """A weight function without a number in the kernels runs in torch; one that is in no table is refused."""
    with pytest.raises(ValueError, match="`weight_function` must be one of .*'elu'.*, got 'square'"):
        settings_for(4, weight_function="square")
    square = WeightFunction(lambda x: (1 + x * x).log(), lambda x: 2 * x / (1 + x * x), lambda x: 1 + x * x)
    monkeypatch.setitem(WEIGHT_FUNCTIONS, "square", square)
    qfkv, weight = make_inputs(2, 40)[0], torch.randn(2, 40, HEADS, 4)
    settings = settings_for(window, weight_function="square")
    assert not focus_cpu.is_supported(qfkv, settings)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, weight)
    expected, _, expected_grad = with_gradient(lambda x: naive_focus_mixing(x, settings), qfkv, weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "field, value",
    [("window", 0), ("window", -4), ("window", 2.0), ("window", True), ("scale", math.nan), ("scale", math.inf)]
    + [("sink_weight", -1.0), ("sink_weight", math.nan), ("sink_weight", math.inf), ("output_gate", "unknown")],
)
def test_settings_that_mean_nothing(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        replace(settings_for(4), **{field: value})


def test_the_definition_keeps_nan():
    qfkv = torch.randn(1, 6, 4, HEADS, 4)
    qfkv[0, 3, 1, 0, 0] = math.nan
    out = naive_focus_mixing(qfkv, settings_for(2))
    assert out[0, 3:5, 0].isnan().all() and out[0, :3].isfinite().all() and out[0, 5:].isfinite().all()
