"""The focus operator against its own loop and against dense float64 formulas: values, states, gradients, memory."""

import functools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from modeling_heptapod.leap import focus_cpu, focus_tiles
from modeling_heptapod.leap.focus import (
    FocusSettings,
    FocusState,
    attention_matrix,
    focus_mean,
    focus_mixing,
    log_weight,
    naive_focus_mean,
    naive_focus_mixing,
    rotate,
    standardize,
)
from modeling_heptapod.leap.focus_functions import OUTPUT_GATES, WEIGHT_FUNCTIONS
from modeling_heptapod.leap.focus_recurrent import (
    gate_output,
    pack_state,
    prepare_step,
    step_global_mean,
    step_window_mean,
    unpack_state,
)
from tests.tiny import mostly_slow


WINDOWS = [None, 1, 2, 4, 16, 17, 64, 65, 66, 100, 1000]
HEADS, DIM = 2, 4
SCALE = 0.7

# Whatever the tables of the operator hold: the others are compared with the defaults, which "plain" has.
KINDS = {name: {"weight_function": name} for name in WEIGHT_FUNCTIONS if name != "elu"}
KINDS |= {"no gate" if name == "none" else name: {"output_gate": name} for name in OUTPUT_GATES if name != "sigmoid"}
# Those with kernels. The others run in torch on all devices.
KINDS_WITH_KERNELS = [
    name for name, options in KINDS.items() if None not in FocusSettings(scale=1.0, **options).kernels
]
# Every option alone, then several at once.
OPTIONS = {
    "plain": {},
    **KINDS,
    "normalize": {"normalize": True},
    "null": {"sink_weight": 0.4},
    "alibi_slopes": {"alibi_slopes": True},
    "rotary": {"rotary": True},
    "padding": {"padding": True},
    "segments": {"segments": True},
    "all": {
        "normalize": True,
        "sink_weight": 0.4,
        "alibi_slopes": True,
        "rotary": True,
        "padding": True,
        "segments": True,
    },
    "all of exp": {
        "weight_function": "exp",
        "output_gate": "none",
        "sink_weight": 1e-5,
        "alibi_slopes": True,
        "padding": True,
    },
}
OPTIONS_WITH_KERNELS = [name for name in OPTIONS if name not in KINDS or name in KINDS_WITH_KERNELS]


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """The torch form of the step; the compiled one has tests of its own."""
    monkeypatch.setattr(focus_cpu, "_library", lambda head_dim: None)


def in_float32(qfkv, kwargs):
    """The same inputs in float32, masks and segments as they are."""
    single = {}
    for name, value in kwargs.items():
        single[name] = tuple(x.float() for x in value) if name == "rotary" else value
        if name == "alibi_slopes":
            single[name] = value.float()
    return qfkv.float(), single


def settings_for(window=None, causal=True, **options):
    names = ("normalize", "weight_function", "output_gate", "sink_weight")
    chosen = {name: options[name] for name in names if name in options}
    return FocusSettings(scale=SCALE, window=window, causal=causal, **chosen)


def make_inputs(batch, seq, **options):
    """Random `qfkv` and keyword arguments of `focus_mixing`."""
    parts = 3 if options.get("output_gate") == "none" else 4
    qfkv = 1.5 * torch.randn(batch, seq, parts, HEADS, DIM, dtype=torch.float64)
    kwargs = {}
    if options.get("alibi_slopes"):
        kwargs["alibi_slopes"] = torch.tensor([0.3, 0.01], dtype=torch.float64)
    if options.get("rotary"):
        angles = torch.rand(batch, seq, DIM // 2, dtype=torch.float64) * 6
        angles = torch.cat((angles, angles), dim=-1)
        kwargs["rotary"] = (angles.cos(), angles.sin())
    if options.get("padding"):
        kwargs["padding_mask"] = torch.rand(batch, seq) > 0.3
        kwargs["padding_mask"][0, : seq // 2] = False
        kwargs["padding_mask"][-1, seq // 2 :] = False
    if options.get("segments"):
        kwargs["segment_ids"] = (torch.rand(batch, seq) < 6 / seq).cumsum(1)
    return qfkv, kwargs


def with_gradient(function, qfkv, weight):
    """Output, other results and the gradient of `(output * weight).sum()`."""
    qfkv = qfkv.detach().clone().requires_grad_()
    out = function(qfkv)
    out, rest = out if isinstance(out, tuple) else (out, None)
    (out * weight).sum().backward()
    return out.detach(), rest, qfkv.grad


def check_against_naive(qfkv, settings, kwargs, tolerance=1e-9):
    weight = torch.randn(*qfkv.shape[:2], *qfkv.shape[3:], dtype=qfkv.dtype)
    out, state, grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    expected, _, expected_grad = with_gradient(lambda x: naive_focus_mixing(x, settings, **kwargs), qfkv, weight)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)
    return state


def tokens_of(qfkv, settings, rotary=None, padding_mask=None, **_):
    """Log weights `[batch, seq, heads]` and what is averaged `[batch, seq, heads, channels]`, from the definitions."""
    if padding_mask is not None:
        qfkv = qfkv.masked_fill(~padding_mask[..., None, None, None], 0)
    parts = [standardize(x) if settings.normalize else x for x in qfkv.unbind(2)]
    f, k, v = parts[-3:]
    logs = log_weight(settings.scale * (f * k).sum(-1), settings.weight_function)
    if padding_mask is not None:
        logs = logs.masked_fill(~padding_mask[..., None], -math.inf)
    if settings.output_gate == "none":
        return logs, v
    return logs, torch.cat((k if rotary is None else rotate(k, *rotary), v), dim=-1)


def check_state(state, qfkv, settings, kwargs, tolerance=1e-7):
    """The final state against what it is said to hold."""
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    logs, values = tokens_of(qfkv, settings, **kwargs)
    if settings.window is not None:
        count = min(settings.window - 1, qfkv.shape[1])
        past = state.log_weights.shape[2]
        assert past <= settings.window - 1
        held_logs, held_values = state.log_weights[:, :, past - count :], state.values[:, :, past - count :]
        close(held_logs, logs[:, logs.shape[1] - count :].transpose(1, 2))
        close(held_values, values[:, values.shape[1] - count :].transpose(1, 2))
        return
    alibi_slopes, segments = kwargs.get("alibi_slopes"), kwargs.get("segment_ids")
    if alibi_slopes is not None:
        logs = logs - torch.arange(logs.shape[1]).flip(0)[:, None] * alibi_slopes
    if segments is not None:
        logs = logs.masked_fill((segments != segments[:, -1:])[..., None], -math.inf)
    total = logs.logsumexp(1)
    means = torch.einsum("bjh,bjhc->bhc", torch.softmax(logs, dim=1).nan_to_num(0.0), values)
    empty = total == -math.inf
    assert (state.log_weights[empty] < -1e28).all()
    close(state.log_weights[~empty], total[~empty])
    close(state.values[~empty], means[~empty])


# --- against the loop --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 tokens, so that short sequences cross their borders."""
    monkeypatch.setattr(focus_tiles, "_CPU_BLOCK", 64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_and_lengths(window, seq, causal, small_blocks):
    options = {**OPTIONS["all"], "segments": seq < 200}  # the longest for windows that nothing cuts short
    qfkv, kwargs = make_inputs(2, seq, **options)
    settings = settings_for(window, causal, **options)
    state = check_against_naive(qfkv, settings, kwargs)
    assert (state is None) == (not causal)
    if causal:
        check_state(state, qfkv, settings, kwargs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", mostly_slow([None, 5, 70], (None, 70)))
def test_options(window, option, causal, small_blocks):
    options = OPTIONS[option]
    qfkv, kwargs = make_inputs(2, 170, **options)
    settings = settings_for(window, causal, **options)
    state = check_against_naive(qfkv, settings, kwargs)
    if causal:
        check_state(state, qfkv, settings, kwargs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4, 70])
def test_several_rows_a_block_and_several_blocks_a_batch(window, causal, small_blocks):
    options = OPTIONS["all"]
    for batch, seq in ((7, 20), (5, 33)):
        qfkv, kwargs = make_inputs(batch, seq, **options)
        settings = settings_for(window, causal, **options)
        state = check_against_naive(qfkv, settings, kwargs)
        if causal:
            check_state(state, qfkv, settings, kwargs)


@functools.cache
def _distance(seq):
    place = torch.arange(seq)
    return place[:, None] - place[None, :]


def dense_mixing(qfkv, settings, alibi_slopes=None, padding_mask=None):
    """`naive_focus_mixing` as one softmax, for lengths at which a loop takes too long (sigmoid gate, no sink weight)."""
    logs, values = tokens_of(qfkv, settings, padding_mask=padding_mask)
    distance = _distance(qfkv.shape[1])
    hidden = distance < 0 if settings.causal else torch.zeros_like(distance, dtype=torch.bool)
    if settings.window is not None:
        hidden = hidden | (distance.abs() >= settings.window)
    logits = logs.transpose(1, 2).unsqueeze(2)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.view(-1, 1, 1) * distance.abs()
    means = torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1) @ values.transpose(1, 2)
    kbar, vbar = means.transpose(1, 2).chunk(2, dim=-1)
    q = standardize(qfkv[:, :, 0]) if settings.normalize else qfkv[:, :, 0]
    return torch.sigmoid(settings.scale * (q * kbar).sum(-1, keepdim=True)) * vbar


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 100, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seq", [focus_tiles._CPU_BLOCK - 1, focus_tiles._CPU_BLOCK, focus_tiles._CPU_BLOCK + 1, 4097])
def test_real_blocks(seq, window, causal):
    if seq == 4097 and not (causal and window is None):
        window = {None: 16, 17: 64, 100: 65}[window]
    settings = settings_for(window, causal, normalize=True)
    qfkv = torch.randn(1, seq, 4, 1, 4, dtype=torch.float64)
    alibi_slopes = torch.tensor([1e-3], dtype=torch.float64) if seq % 2 else None
    weight = torch.randn(1, seq, 1, 4, dtype=torch.float64)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings, alibi_slopes=alibi_slopes), qfkv, weight)
    expected, _, expected_grad = with_gradient(lambda x: dense_mixing(x, settings, alibi_slopes), qfkv, weight)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_the_dense_formula_is_the_loop(window, causal):
    qfkv, kwargs = make_inputs(2, 30, alibi_slopes=True)
    settings = settings_for(window, causal)
    torch.testing.assert_close(dense_mixing(qfkv, settings, **kwargs), naive_focus_mixing(qfkv, settings, **kwargs))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", ["padding", "alibi_slopes", "all"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_matrix_of_torch_func_is_the_loop(window, option, causal):
    """Where pads count in windows and as steps of the ALiBi bias, too."""
    qfkv, kwargs = make_inputs(2, 30, **OPTIONS[option])
    settings = settings_for(window, causal, **OPTIONS[option])
    weight = torch.randn(2, 30, HEADS, DIM, dtype=torch.float64)
    expected, _, expected_grad = with_gradient(lambda x: naive_focus_mixing(x, settings, **kwargs), qfkv, weight)
    out, gradient = torch.func.vjp(lambda x: focus_mixing(x, settings, **kwargs)[0], qfkv)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(weight)[0], expected_grad, rtol=1e-9, atol=1e-9)


def mean_kwargs(kwargs):
    """The loop has no argument for pads: they are log weights of `-inf`."""
    return {name: value for name, value in kwargs.items() if name != "padding_mask"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", ["plain", "null", "alibi_slopes", "padding", "segments", "all"])
@pytest.mark.parametrize("window", mostly_slow([None, 1, 5, 66, 100], (None, 5, 100)))
def test_means_alone(window, option, causal):
    seq, options = 190, {**OPTIONS[option], "rotary": False}
    _, kwargs = make_inputs(2, seq, **options)
    settings = settings_for(window, causal, **options)
    values = torch.randn(2, seq, HEADS, 3, dtype=torch.float64, requires_grad=True)
    logs = (3 * torch.randn(2, seq, HEADS, dtype=torch.float64)).requires_grad_()
    weight = torch.randn_like(values)
    means, state = focus_mean(logs, values, settings, **kwargs)
    grads = torch.autograd.grad((means * weight).sum(), (logs, values))
    masked = logs
    if "padding_mask" in kwargs:
        masked = logs.masked_fill(~kwargs["padding_mask"][..., None], -math.inf)
    expected = naive_focus_mean(
        masked, values, window, sink_weight=settings.sink_weight, causal=causal, **mean_kwargs(kwargs)
    )
    torch.testing.assert_close(means, expected, rtol=1e-9, atol=1e-9)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weight).sum(), (logs, values))):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)
    assert (state is None) == (not causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", ["plain", "gelu", "all", "all of exp"])
@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window, option, causal, monkeypatch):
    monkeypatch.setattr(focus_tiles, "_CPU_BLOCK", 12)
    options = OPTIONS[option]
    qfkv, kwargs = make_inputs(1, 30, **options)
    settings = settings_for(window, causal, **options)
    qfkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focus_mixing(x, settings, **kwargs)[0], qfkv, fast_mode=True)


def test_gradcheck_of_every_entry():
    qfkv, kwargs = make_inputs(1, 5, alibi_slopes=True, rotary=True)
    settings = settings_for(3, sink_weight=0.1)
    assert torch.autograd.gradcheck(lambda x: focus_mixing(x, settings, **kwargs)[0], qfkv.requires_grad_())


def test_inputs_that_are_not_contiguous():
    qfkv, _ = make_inputs(2, 50)
    settings = settings_for(4)
    strided = qfkv.permute(4, 1, 3, 2, 0).contiguous().permute(4, 1, 3, 2, 0)
    assert not strided.is_contiguous()
    weight = torch.randn(50, 2, HEADS, DIM, dtype=torch.float64).transpose(0, 1)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings)[0], strided, weight)
    expected, _, expected_grad = with_gradient(lambda x: naive_focus_mixing(x, settings), qfkv, weight)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


# --- states ------------------------------------------------------------------------------------------------------------


def pieces(kwargs, place):
    """Keyword arguments of a stretch of the sequence."""
    kwargs = dict(kwargs)
    for name in ("padding_mask", "segment_ids"):
        if name in kwargs:
            kwargs[name] = kwargs[name][:, place]
    if "rotary" in kwargs:
        kwargs["rotary"] = tuple(x[:, place] for x in kwargs["rotary"])
    return kwargs


@pytest.mark.parametrize("option", ["plain", "null", "alibi_slopes", "rotary", "padding", "no gate", "all"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 66, 100])
def test_any_split_in_chunks_equals_the_whole(window, option, small_blocks):
    options = {**OPTIONS[option], "segments": False}
    seq = 230
    qfkv, kwargs = make_inputs(2, seq, **options)
    settings = settings_for(window, **options)
    whole, _ = focus_mixing(qfkv, settings, **kwargs)
    for cuts in ([1], [7, 8], [64, 128], [100], [5, 70, 71, 200], list(range(1, 40)), [seq - 1]):
        state, parts = None, []
        for start, end in zip([0, *cuts], [*cuts, seq]):
            place = slice(start, end)
            out, state = focus_mixing(qfkv[:, place], settings, **pieces(kwargs, place), initial_state=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
        check_state(state, qfkv, settings, kwargs)


@pytest.mark.parametrize("window", [None, 3, 20, 70])
def test_gradient_after_a_state(window, small_blocks):
    """A state is a constant: the gradient of the second chunk is that of the whole with the first chunk held fixed."""
    options = {**OPTIONS["all"], "segments": False}
    qfkv, kwargs = make_inputs(2, 180, **options)
    settings = settings_for(window, **options)
    first, second = slice(0, 50), slice(50, 180)
    _, state = focus_mixing(qfkv[:, first], settings, **pieces(kwargs, first))
    weight = torch.randn(2, 130, HEADS, DIM, dtype=torch.float64)
    _, _, grad = with_gradient(
        lambda x: focus_mixing(x, settings, **pieces(kwargs, second), initial_state=state), qfkv[:, second], weight
    )
    _, _, expected = with_gradient(
        lambda x: naive_focus_mixing(torch.cat((qfkv[:, first], x), dim=1), settings, **kwargs)[:, 50:],
        qfkv[:, second],
        weight,
    )
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 3, 20, 70])
def test_a_state_belongs_to_the_first_segment(window):
    qfkv, kwargs = make_inputs(2, 90, alibi_slopes=True)
    settings = settings_for(window)
    segments = torch.zeros(2, 90, dtype=torch.long)
    segments[:, 60:] = 1
    expected = naive_focus_mixing(qfkv, settings, **kwargs, segment_ids=segments)
    _, state = focus_mixing(qfkv[:, :40], settings, **kwargs)
    out, _ = focus_mixing(qfkv[:, 40:], settings, **kwargs, segment_ids=segments[:, 40:] + 5, initial_state=state)
    torch.testing.assert_close(out, expected[:, 40:])


@pytest.mark.parametrize("window", [None, 3, 70])
def test_equal_ids_that_do_not_touch_are_different_segments(window, small_blocks):
    for length in (5, 50):
        qfkv, _ = make_inputs(1, 3 * length)
        settings = settings_for(window)
        out, state = focus_mixing(qfkv, settings, segment_ids=torch.tensor([5, 3, 5]).repeat_interleave(length)[None])
        expected, expected_state = focus_mixing(
            qfkv, settings, segment_ids=torch.tensor([0, 1, 2]).repeat_interleave(length)[None]
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(state.log_weights, expected_state.log_weights)


class Window:
    """A packed window that slides, as a cache's conv state does."""

    def __init__(self, packed):
        self.packed = packed

    def __call__(self, token):
        recent = torch.cat((self.packed, token), dim=-1)
        self.packed = recent[..., 1:]
        return recent


def step(qfkv, settings, packed, alibi_slopes=None, rotary=None):
    """One token `[batch, 1, parts, heads, head_dim]` from a packed state, by the functions that models use."""
    parts, logits = prepare_step(qfkv.clone(), settings, rotary)
    if settings.window is None:
        packed = packed.clone()
        means = step_global_mean(logits, parts[:, 2:], packed, settings, alibi_slopes)
    else:
        window = Window(packed)
        means = step_window_mean(logits, parts[:, 2:], window, settings, alibi_slopes)
        packed = window.packed
    if settings.output_gate == "none":
        return means[:, 0], packed
    return gate_output(parts[:, 0], means[:, 0], means[:, 1], settings), packed


STEP_OPTIONS = ["plain", *KINDS, "normalize", "null", "alibi_slopes", "rotary", "all", "all of exp"]


@pytest.mark.parametrize("option", STEP_OPTIONS)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
def test_steps_equal_the_parallel_form(window, option):
    options = {**OPTIONS[option], "segments": False, "padding": False}
    seq = 60
    qfkv, kwargs = in_float32(*make_inputs(2, seq, **options))
    settings = settings_for(window, **options)
    if options.get("sink_weight"):  # one that is felt in longer sequences as well
        settings = replace(settings, sink_weight=20.0)
    expected, final = focus_mixing(qfkv, settings, **kwargs)
    for start in (1, 2, 17):
        place = slice(0, start)
        _, state = focus_mixing(qfkv[:, place], settings, **pieces(kwargs, place))
        packed = pack_state(state, settings, DIM, start)
        size = packed.shape
        for i in range(start, seq):
            here = slice(i, i + 1)
            out, packed = step(qfkv[:, here], settings, packed, **pieces(kwargs, here))
            torch.testing.assert_close(out, expected[:, i], rtol=1e-5, atol=1e-5)
            assert packed.shape == size and packed.dtype == torch.float32
        unpacked = unpack_state(packed, settings, HEADS, DIM)
        torch.testing.assert_close(unpacked.log_weights, final.log_weights, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unpacked.values, final.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_function", WEIGHT_FUNCTIONS)
@pytest.mark.parametrize("rescale", [1, 10, 30, 300])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_at_the_ends_of_standardised_logits(window, sign, rescale, weight_function):
    """Focus along keys, or against them: logits near +-rescale, where weights are huge or tiny but not all equal."""
    size = 8
    settings = FocusSettings(
        scale=rescale / size, normalize=True, window=window, weight_function=weight_function, output_gate="none"
    )
    v, k = torch.randn(2, 40, HEADS, size), torch.randn(2, 40, HEADS, size)
    qfkv = torch.stack((sign * k + 0.1 * torch.randn_like(k), k, v), dim=2)
    expected = naive_focus_mixing(qfkv.double(), settings).float()
    _, state = focus_mixing(qfkv[:, :1], settings)
    packed = pack_state(state, settings, size, 1)
    for i in range(1, 40):
        out, packed = step(qfkv[:, i : i + 1], settings, packed)
        torch.testing.assert_close(out, expected[:, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 4, 70])
@pytest.mark.parametrize("normalize", [False, True])
def test_packing_a_state_loses_nothing(normalize, window):
    options = {"normalize": normalize}
    qfkv, _ = in_float32(*make_inputs(3, 9))
    settings = settings_for(window, **options)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0] = False  # nothing but pads so far
    mask[1, 2:] = False
    _, state = focus_mixing(qfkv, settings, padding_mask=mask)
    packed = pack_state(state, settings, DIM, 9)
    assert packed.dtype == torch.float32 and not packed.isnan().any()
    unpacked = unpack_state(packed, settings, HEADS, DIM)
    for following in (1, 5):
        more, _ = in_float32(*make_inputs(3, following))
        expected, _ = focus_mixing(more, settings, initial_state=state)
        out, _ = focus_mixing(more, settings, initial_state=unpacked)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        alone, _ = focus_mixing(more[:1], settings)
        torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-6)
    stepped, _ = step(more[:, :1], settings, packed)
    torch.testing.assert_close(stepped, expected[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_global_state_still_feels_one_more_token_after_millions(normalize):
    """With equal weights the mean moves by 1/n a token; a float32 sum of that many ones stands still at 2**24."""
    settings = FocusSettings(scale=1.0, normalize=normalize, weight_function="exp", output_gate="none")
    count = 20_000_000
    state = FocusState(torch.full((1, 1), math.log(count)), torch.zeros(1, 1, 1))
    packed = pack_state(state, settings, 1, count)
    for _ in range(1000):
        means = step_global_mean(torch.zeros(1, 1), torch.full((1, 1, 1, 1), 1e6), packed, settings)
    assert abs(means.item() / (1e6 * 1000 / (count + 1000)) - 1) < 1e-3


# --- extreme logits ----------------------------------------------------------------------------------------------------


def relative_rms(x, expected):
    return ((x.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def extreme_logs(kind, seq):
    if kind == "uniform 30":
        return torch.empty(1, seq, 2).uniform_(-30, 30)
    if kind == "uniform 1e4":
        return torch.empty(1, seq, 2).uniform_(-1e4, 1e4)
    if kind == "all equal":
        return torch.full((1, seq, 2), -12345.0)
    logs = torch.randn(1, seq, 2)
    if kind == "one huge early token":
        logs[:, 3] = 1e4
    elif kind == "one tiny early token":
        logs[:, 0] = -1e4
    elif kind == "rising":
        logs = torch.linspace(-3000, 3000, seq)[None, :, None].repeat(1, 1, 2)
    elif kind == "falling":
        logs = torch.linspace(3000, -3000, seq)[None, :, None].repeat(1, 1, 2)
    return logs


EXTREMES = [
    "uniform 30",
    "uniform 1e4",
    "all equal",
    "one huge early token",
    "one tiny early token",
    "rising",
    "falling",
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("window", mostly_slow([None, 4, 64, 100], (None, 100)))
def test_extreme_logits(window, kind, causal):
    seq = 500
    settings = settings_for(window, causal)
    logs, values = extreme_logs(kind, seq).requires_grad_(), torch.randn(1, seq, 2, 3, requires_grad=True)
    means, _ = focus_mean(logs, values, settings)
    weight = torch.randn(1, seq, 2, 3)
    grads = torch.autograd.grad((means * weight).sum(), (logs, values))
    exact = [x.detach().double().requires_grad_() for x in (logs, values)]
    expected = naive_focus_mean(*exact, window, causal=causal)
    expected_grads = torch.autograd.grad((expected * weight.double()).sum(), exact)
    # A weight is exp of a difference of logs: float32 itself cannot tell 1e4 from 1e4 + 5e-4.
    conditioning = 1e-7 * max(20.0, logs.abs().max().item())
    assert relative_rms(means, expected) < conditioning
    for grad, expected_grad in zip(grads, expected_grads):
        assert grad.isfinite().all()
        assert (grad - expected_grad).abs().max() < 5 * conditioning * max(1.0, expected_grad.abs().max())


def test_a_huge_token_is_forgotten_when_its_window_ends():
    logs, values = torch.zeros(1, 300, 1), torch.randn(1, 300, 1, 2)
    logs[:, 3] = 1e4
    for window in (4, 64, 65, 66, 100):
        means, _ = focus_mean(logs, values, settings_for(window))
        plain = values[:, :, 0].unfold(1, window, 1).mean(-1)
        torch.testing.assert_close(means[:, window + 3 :, 0], plain[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_function", WEIGHT_FUNCTIONS)
def test_extreme_inputs_of_the_whole_step(weight_function):
    for window in (None, 4, 70):
        settings = FocusSettings(scale=1.0, weight_function=weight_function, window=window)
        qfkv = (50 * torch.randn(1, 200, 4, 2, 4)).requires_grad_()  # logits of thousands
        out, state = focus_mixing(qfkv, settings)
        out.sum().backward()
        assert out.isfinite().all() and qfkv.grad.isfinite().all() and state.values.isfinite().all()
        exact = naive_focus_mixing(qfkv.detach().double(), settings)
        assert relative_rms(out, exact) < 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", mostly_slow([None, 4, 100], (None, 100)))
@pytest.mark.parametrize("option", ["plain", "all"])
def test_float32(option, window, causal):
    options = OPTIONS[option]
    qfkv, kwargs = in_float32(*make_inputs(2, 700, **options))
    settings = settings_for(window, causal, **options)
    weight = torch.randn(2, 700, HEADS, DIM)
    out, _, grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, weight)
    expected, _, expected_grad = with_gradient(
        lambda x: naive_focus_mixing(x, settings, **kwargs), qfkv.double(), weight.double()
    )
    assert relative_rms(out, expected) < 1e-6
    assert relative_rms(grad, expected_grad) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", mostly_slow([None, 4, 70], (None, 70)))
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_is_as_good_as_rounding_the_exact_result(normalize, window, causal, dtype):
    settings = FocusSettings(scale=2.5, normalize=normalize, window=window, causal=causal)
    qfkv = torch.randn(2, 600, 4, 2, 8).to(dtype)
    weight = torch.randn(2, 600, 2, 8).to(dtype)
    out, state, grad = with_gradient(lambda x: focus_mixing(x, settings), qfkv, weight)
    expected, _, expected_grad = with_gradient(
        lambda x: naive_focus_mixing(x, settings), qfkv.double(), weight.double()
    )
    assert out.dtype == grad.dtype == dtype
    assert relative_rms(out, expected) <= 1.1 * relative_rms(expected.to(dtype), expected)
    assert relative_rms(grad, expected_grad) <= 1.1 * relative_rms(expected_grad.to(dtype), expected_grad)
    if causal:
        assert state.log_weights.dtype == state.values.dtype == torch.float32


@pytest.mark.parametrize("option", ["plain", "no gate", "alibi_slopes", "null"])
@pytest.mark.parametrize("window", [None, 4, 70])
def test_autocast_does_not_reach_inside(window, option):
    options = OPTIONS[option]
    qfkv, kwargs = in_float32(*make_inputs(2, 200, **options))
    settings = settings_for(window, **options)
    logs, values = torch.randn(2, 200, HEADS), torch.randn(2, 200, HEADS, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, 1.0)
        means, _ = focus_mean(logs, values, settings, **kwargs)
    expected, _, expected_grad = with_gradient(lambda x: focus_mixing(x, settings, **kwargs), qfkv, 1.0)
    assert torch.equal(out, expected) and torch.equal(grad, expected_grad)
    assert torch.equal(means, focus_mean(logs, values, settings, **kwargs)[0])


def exact_mean(logs, values, window):
    """Float64 sums over one row, without differences of sums: `logs [seq]`, `values [seq, channels]`."""
    weights = logs.exp()
    weighted = weights[:, None] * values
    if window is None:
        return weighted.cumsum(0) / weights.cumsum(0)[:, None]
    total, seen = torch.zeros_like(weights), torch.zeros_like(weighted)
    for shift in range(window):
        total = total + torch.nn.functional.pad(weights[: len(weights) - shift], (shift, 0))
        seen = seen + torch.nn.functional.pad(weighted[: len(weights) - shift], (0, 0, shift, 0))
    return seen / total[:, None]


@pytest.mark.parametrize("seq", [4097, pytest.param(131072, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [4, 8, 16, 64, None])
def test_long_sequences_against_a_float64_sum(window, seq):
    logs = torch.empty(1, seq, 1).uniform_(-30, 30).requires_grad_()
    values = torch.randn(1, seq, 1, 4, requires_grad=True)
    weight = torch.randn(seq, 4)
    means, _ = focus_mean(logs, values, settings_for(window))
    grads = torch.autograd.grad((means[0, :, 0] * weight).sum(), (logs, values))
    exact = [x.detach().double().requires_grad_() for x in (logs, values)]
    expected = exact_mean(exact[0][0, :, 0], exact[1][0, :, 0], window)
    expected_grads = torch.autograd.grad((expected * weight.double()).sum(), exact)
    assert relative_rms(means[0, :, 0], expected) <= 2e-6
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_rms(grad, expected_grad) <= 5e-6


# --- memory ------------------------------------------------------------------------------------------------------------


def bytes_held(function):
    """Bytes that the allocator has given out and not got back when `function` returns, its results included."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    return held, result


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", mostly_slow([None, 4, 8, 16, 64], (None, 8)))
def test_memory_held_for_the_backward_pass(window, causal):
    """Inputs, output and at most 5% more, whatever holds it: counted at the allocator, not in autograd's own lists."""
    settings = settings_for(window, causal, normalize=True)
    for shape in ((1, 16384, 4, 2, 16), (16, 1024, 4, 2, 16)):
        qfkv = torch.randn(shape, requires_grad=True)
        held, (out, state) = bytes_held(lambda qfkv=qfkv: focus_mixing(qfkv, settings))
        assert held >= out.nbytes  # the measurement sees the output
        more = held - out.nbytes - (0 if state is None else sum(x.nbytes for x in state if x is not None))
        assert more <= 0.05 * (qfkv.nbytes + out.nbytes)
        out.sum().backward()


def test_memory_held_counts_what_a_context_keeps():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = [x * 2]
            return x * 3

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    x = torch.randn(1000, 1000, requires_grad=True)
    held, _ = bytes_held(lambda: Keeps.apply(x))
    assert abs(held / (2 * x.nbytes) - 1) < 0.01


def test_backward_twice_is_the_same():
    qfkv, kwargs = make_inputs(2, 100, alibi_slopes=True)
    out, _ = focus_mixing(qfkv.requires_grad_(), settings_for(4), **kwargs)
    first = torch.autograd.grad(out.sum(), qfkv, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), qfkv)[0])


# --- errors and small things -------------------------------------------------------------------------------------------


def test_bad_input():
    settings = settings_for(4)
    qfkv = torch.randn(1, 5, 4, 2, 4)
    with pytest.raises(TypeError, match="qfkv"):
        focus_mixing(qfkv.long(), settings)
    for wrong in (qfkv[0], qfkv[:, :0], qfkv[:, :, :3], qfkv.flatten(3)):
        with pytest.raises(ValueError, match="qfkv"):
            focus_mixing(wrong, settings)
    with pytest.raises(ValueError, match="qfkv"):
        focus_mixing(qfkv, replace(settings, output_gate="none"))
    _, state = focus_mixing(qfkv, settings)
    with pytest.raises(ValueError, match="state"):
        focus_mixing(qfkv, replace(settings, causal=False), initial_state=state)
    logs, values = torch.randn(1, 5, 2), torch.randn(1, 5, 2, 3)
    with pytest.raises(TypeError, match="values"):
        focus_mean(logs, values.long(), settings)
    for wrong in (values[:, :4], values[0], values[:, :, :1]):
        with pytest.raises(ValueError, match="values"):
            focus_mean(logs, wrong, settings)
    with pytest.raises(ValueError, match="state"):
        focus_mean(logs, values, replace(settings, causal=False), initial_state=state)


def test_weights_are_those_of_their_functions():
    logits = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(log_weight(logits, "elu").exp(), torch.nn.functional.elu(logits) + 1)
    assert torch.equal(log_weight(logits, "exp"), logits)
    far = torch.tensor([-1e4, -1e30, 1e30])
    assert log_weight(far, "elu").isfinite().all()
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(log_weight(zero, "elu").sum(), zero)[0] == 1


def test_standardize():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(standardize(x), (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5))
    constant = torch.ones(2, 8, requires_grad=True)
    standardize(constant).sum().backward()
    assert torch.equal(standardize(constant), torch.zeros(2, 8)) and constant.grad.isfinite().all()


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-5, 1e-3, 1.0, 1e3])
def test_standardization_of_the_fast_path_at_any_spread(spread):
    qfkv = 0.5 + spread * torch.randn(1, 20, 4, 2, 8, dtype=torch.float64)
    check_against_naive(qfkv, settings_for(4, normalize=True), {}, tolerance=1e-6 if spread else 1.0)
    out, _ = focus_mixing(qfkv.float().requires_grad_(), settings_for(4, normalize=True))
    assert out.isfinite().all()


def test_attention_matrix_rows_are_weights():
    logs = torch.randn(2, HEADS, 30, dtype=torch.float64)
    logs[0, :, :4] = -math.inf
    for window in (None, 1, 5):
        for causal in (True, False):
            matrix = attention_matrix(logs, settings_for(window, causal))
            totals = matrix.sum(-1)
            seen = totals > 0
            torch.testing.assert_close(totals[seen], torch.ones_like(totals[seen]))
            assert seen[1].all() and (matrix[0, :, :, :4] == 0).all()
            values = torch.randn(2, 30, HEADS, 3, dtype=torch.float64)
            expected = naive_focus_mean(logs.transpose(1, 2), values, window, causal=causal)
            means = (matrix @ values.transpose(1, 2)).transpose(1, 2)
            torch.testing.assert_close(means[:, 4:], expected[:, 4:])  # what pads see does not matter


@pytest.mark.parametrize("name", WEIGHT_FUNCTIONS)
def test_the_columns_of_a_weight_function_agree(name):
    function, logits = WEIGHT_FUNCTIONS[name], torch.linspace(-20, 20, 81, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function.log(logits).sum(), logits)
    logits = logits.detach()
    torch.testing.assert_close(function.slope(logits), slope)
    torch.testing.assert_close(function.weight(logits), function.log(logits).exp())


def test_the_columns_of_the_example_in_the_docs_agree(monkeypatch):
    page = Path(__file__).resolve().parents[1] / "docs" / "extending" / "operator.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.setitem(WEIGHT_FUNCTIONS, "softplus", WEIGHT_FUNCTIONS["elu"])  # removed or restored afterwards
    exec(code, {})
    assert WEIGHT_FUNCTIONS["softplus"] is not WEIGHT_FUNCTIONS["elu"]
    test_the_columns_of_a_weight_function_agree("softplus")


@pytest.mark.parametrize("name", [name for name in OUTPUT_GATES if name != "none"])
def test_the_columns_of_a_gate_agree(name):
    gate, alignment = OUTPUT_GATES[name], torch.linspace(-20, 20, 81, dtype=torch.float64, requires_grad=True)
    value = gate.value(alignment)
    (slope,) = torch.autograd.grad(value.sum(), alignment)
    torch.testing.assert_close(gate.slope(alignment.detach(), value.detach()), slope)


def test_random_cases():
    """Whatever the tables above leave out: thirty draws of everything at once."""
    draw = random.Random(0)
    for _ in range(30):
        options = {
            "weight_function": draw.choice(list(WEIGHT_FUNCTIONS)),
            "output_gate": draw.choice(list(OUTPUT_GATES)),
            "normalize": draw.random() < 0.5,
            "sink_weight": draw.choice([0.0, 1e-5, 2.0]),
            **{name: draw.random() < 0.5 for name in ("alibi_slopes", "padding", "segments")},
        }
        options["rotary"] = options["output_gate"] != "none" and draw.random() < 0.5
        window, seq = draw.choice([None, draw.randint(1, 120)]), draw.randint(1, 260)
        settings = settings_for(window, draw.random() < 0.6, **options)
        qfkv, kwargs = make_inputs(draw.randint(1, 3), seq, **options)
        check_against_naive(qfkv, settings, kwargs)
