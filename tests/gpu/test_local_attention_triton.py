"""The Triton kernels of local attention against the loop over cells in float64: values, totals, gradients.

On a machine with a CUDA device these tests run there (`pytest -m gpu tests/gpu`). With `TRITON_INTERPRET=1` they run on a
CPU in Triton's interpreter; `tests/test_local_attention_triton.py` does that.
"""

import math
import os

import pytest
import torch

from modeling_heptapod.common import triton_attention
from modeling_heptapod.heptapod import local_attention_triton as kernels
from modeling_heptapod.heptapod.local_attention import naive_local_attention
from tests.test_focus import relative_rms
from tests.triton_interpreter import complete_interpreter


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HEADS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(kernels.triton is None, reason="there is no Triton"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
at_length = pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(triton_attention, "DEVICES", (DEVICE,))
    if INTERPRETED:
        complete_interpreter()


def make_inputs(height, width, head_dim=8, batch=1, dtype=torch.float32):
    """Queries, keys, values and a gradient of the output, with the heads of a cell side by side as in models."""
    cells = torch.randn(4, batch, height, width, HEADS, head_dim).to(dtype)
    return tuple(x.permute(0, 3, 1, 2, 4) for x in cells)


def make_mask(batch, height, width):
    """A third of all cells are padding, and in the last row of the batch the upper left part."""
    mask = torch.rand(batch, height, width) > 1 / 3
    mask[-1, : -(-height // 2), : -(-width // 2)] = False
    return mask


def run(q, k, v, grad, radius, dilation=1, mask=None, scale=0.3):
    """Output, gradients and totals by the kernels, on the CPU."""
    q, k, v, grad = (x.to(DEVICE) for x in (q, k, v, grad))
    mask = None if mask is None else mask.to(DEVICE)
    assert kernels.takes(q, radius)
    out, totals = kernels.forward(q, k, v, radius, dilation, scale, mask)
    grads = kernels.backward(grad, q, k, v, totals, radius, dilation, scale, mask)
    for x in (out, *grads):
        assert x.dtype == q.dtype and x.shape == q.shape and x.permute(0, 2, 3, 1, 4).is_contiguous()
    return out.cpu(), *(x.cpu() for x in grads), totals.cpu()


def by_the_loop(q, k, v, grad, radius, dilation=1, mask=None, scale=0.3):
    """Output and gradients by the loop in float64."""
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out = naive_local_attention(*inputs, radius, dilation, mask, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.double())


def visible(height, width, radius, dilation, mask):
    """Which cells each cell sees, `[batch or 1, 1, cells, cells]`."""
    y, x = (place.flatten() for place in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    down, across = ((place[:, None] - place[None, :]).abs() for place in (y, x))
    near = (down <= radius * dilation) & (across <= radius * dilation)
    near &= (down % dilation == 0) & (across % dilation == 0)
    return near[None, None] & (torch.tensor(True) if mask is None else mask.flatten(1)[:, None, None, :])


def check_totals(totals, q, k, radius, dilation, mask, scale, tolerance):
    seen = visible(*q.shape[2:4], radius, dilation, mask)
    logits = scale * q.double().flatten(2, 3) @ k.double().flatten(2, 3).transpose(2, 3)
    logits = logits.masked_fill(~seen, -math.inf)
    largest = logits.amax(-1).masked_fill(~seen.any(-1), 0)
    total = (logits - largest[..., None]).exp().sum(-1)
    expected = torch.stack([largest, torch.where(total == 0, 0, 1 / total)]).view(totals.shape)
    assert totals.dtype == torch.float32
    torch.testing.assert_close(totals.double(), expected, rtol=tolerance, atol=tolerance)


def check(inputs, radius, dilation=1, mask=None, scale=0.3, tolerance=1e-5):
    """Everything to float32's precision."""
    *got, totals = run(*inputs, radius, dilation, mask, scale)
    for name, one, other in zip(
        ("out", "grad q", "grad k", "grad v"), got, by_the_loop(*inputs, radius, dilation, mask, scale)
    ):
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    check_totals(totals, *inputs[:2], radius, dilation, mask, scale, tolerance)


CASES = [  # grid, radius, dilation, channels, batch, whether padded
    ((1, 1), 0, 1, 8, 1, False),
    ((1, 9), 2, 1, 8, 2, True),
    ((7, 5), 1, 1, 20, 2, False),
    ((3, 2), 2, 9, 8, 1, False),  # phases of one cell
    ((7, 5), 2, 3, 1, 2, True),
    ((9, 17), 3, 1, 32, 1, False),
    ((9, 17), 1, 2, 64, 1, True),
    ((9, 17), 32, 1, 8, 1, True),
    ((12, 12), 5, 1, 8, 1, True),
    ((12, 12), 0, 2, 20, 1, True),
    ((12, 12), 2, 3, 8, 1, False),
    ((3, 4), 1, 1, 128, 1, True),
    *(
        ()
        if INTERPRETED
        else (
            ((40, 33), 3, 1, 32, 2, True),
            ((40, 33), 5, 1, 64, 1, False),
            ((33, 40), 2, 2, 128, 1, True),
            ((64, 30), 11, 1, 100, 1, True),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (*case[0], *case[1:]))))
def test_values_gradients_and_totals(case):
    grid, radius, dilation, head_dim, batch, padded = case
    mask = make_mask(batch, *grid) if padded else None
    check(make_inputs(*grid, head_dim, batch), radius, dilation, mask, scale=1.3 * head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim, padded", [(32, False), (20, True), (128, False)])
def test_low_precision_is_nearly_as_good_as_rounding_the_exact_result(head_dim, padded, dtype):
    grid = (5, 12) if INTERPRETED else (21, 42)
    inputs = make_inputs(*grid, head_dim, dtype=dtype)
    mask = make_mask(1, *grid) if padded else None
    *got, totals = run(*inputs, 3, 1, mask, 2 * head_dim**-0.5)
    for one, exact in zip(got, by_the_loop(*inputs, 3, 1, mask, 2 * head_dim**-0.5)):
        assert relative_rms(one, exact) <= 1.6 * relative_rms(exact.to(dtype), exact)  # weights are rounded, too
    check_totals(totals, *inputs[:2], 3, 1, mask, 2 * head_dim**-0.5, 1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_queries_that_see_nothing_are_zero_and_have_no_gradient(dilation):
    inputs, mask = make_inputs(9, 10, batch=2), make_mask(2, 9, 10)
    out, *grads, totals = run(*inputs, 1, dilation, mask)
    blind = ~visible(9, 10, 1, dilation, mask).any(-1).expand(-1, HEADS, -1).view(out.shape[:4])
    assert blind[1].any() and not blind.all()
    for x in (out, grads[0], *totals):
        assert not x[blind].any()
    assert totals[:, ~blind].all() and out[~blind].any(-1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("radius, dilation", [(2, 1), (1, 3)])
def test_whatever_is_in_pads_leaves_no_trace(radius, dilation, value):
    inputs, mask = make_inputs(9, 10), make_mask(1, 9, 10)
    pads = ~mask[:, None, :, :, None].expand(inputs[0].shape)
    clean = [x.masked_fill(pads, 0) for x in inputs]
    expected = by_the_loop(*clean, radius, dilation, mask)
    spoiled = [x.masked_fill(pads, value) for x in inputs]
    for dirty in (spoiled, [*spoiled[:3], clean[3]], [*clean[:3], spoiled[3]]):
        out, grad_q, grad_k, grad_v, totals = run(*dirty, radius, dilation, mask)
        for one, other in zip((out, grad_q), expected):
            torch.testing.assert_close(one[~pads].double(), other[~pads], rtol=1e-5, atol=1e-5)
        for one, other in zip((grad_k, grad_v), expected[2:]):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
            assert not one[pads].any()
        blind = totals[1] == 0
        assert blind.any() and not out[blind].any() and not grad_q[blind].any()


def test_a_query_that_is_nan_is_not_hidden():
    inputs, mask = make_inputs(1, 9), torch.ones(1, 1, 9, dtype=torch.bool)
    inputs[0][0, 0, 0, 4] = math.nan
    out, grad_q, grad_k, grad_v, totals = run(*inputs, 1, 1, mask)
    assert out[0, 0, 0, 4].isnan().all() and totals[1, 0, 0, 0, 4].isnan() and grad_q[0, 0, 0, 4].isnan().all()
    assert grad_k[0, 0, 0, 3:6].isnan().all() and grad_v[0, 0, 0, 3:6].isnan().all()
    assert out[0, 0, 0, :4].isfinite().all() and out[0, 1].isfinite().all() and grad_k[0, 1].isfinite().all()


def test_any_layout():
    """Heads before cells, parts of one projection, gradients of a sum; masks of which all rows are one."""
    q, k, v, _ = (x.to(DEVICE) for x in make_inputs(7, 9, 20, batch=2))
    grad, mask = torch.ones((), device=DEVICE).expand(q.shape), torch.rand(1, 7, 9).gt(0.3).expand(2, -1, -1)
    expected = run(*(x.contiguous() for x in (q, k, v, grad)), 2, 1, mask.contiguous())
    parts = torch.stack([x.permute(0, 2, 3, 1, 4) for x in (q, k, v)], 3).permute(3, 0, 4, 1, 2, 5)
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    channels_first = k.movedim(-1, 0).contiguous().movedim(0, -1)
    for some in ((q, k, v), parts, (q, channels_first, turned)):
        for one, other in zip(run(*some, grad, 2, 1, mask), expected):
            assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_extreme_logits(scale):
    inputs = make_inputs(7, 9)
    mask = make_mask(1, 7, 9)
    *got, totals = run(*inputs, 2, 1, mask, scale)
    exact = by_the_loop(*inputs, 2, 1, mask, scale)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in (*got, totals)) and totals[0].abs().max() > 2e3
    weight = totals[1][totals[1] > 0]
    assert weight.min() > 0.1 and weight.max() <= 1 and (weight > 0.999).double().mean() > 0.8


def test_repeated_runs_are_equal_to_the_last_bit():
    grid, head_dim = ((5, 9), 8) if INTERPRETED else ((130, 125), 32)
    inputs, mask = make_inputs(*grid, head_dim, batch=2), make_mask(2, *grid)
    first = run(*inputs, 3, 1, mask)
    for _ in range(2 if INTERPRETED else 5):
        assert all(torch.equal(one, other) for one, other in zip(run(*inputs, 3, 1, mask), first))


def test_a_page_is_the_same_anywhere_on_a_larger_grid():
    """Tiles elsewhere, borders or pads around: nothing but the order of sums differs."""
    inputs = make_inputs(6, 7)
    mask = torch.zeros(1, 15, 20, dtype=torch.bool)
    place = (..., slice(6, 12), slice(11, 18), slice(None))
    mask[place[:-1]] = True
    larger = make_inputs(15, 20)
    larger[3].zero_()
    for whole, page in zip(larger, inputs):
        whole[place] = page
    for one, other in zip(run(*larger, 2, 1, mask)[:4], run(*inputs, 2)[:4]):
        torch.testing.assert_close(one[place], other, rtol=1e-5, atol=1e-5)


@at_length
@pytest.mark.parametrize("place", [1, 2, 3])
def test_tensors_of_more_than_two_to_the_31_elements(place):
    """Places that 32 bits do not hold, along heads, rows and columns."""
    storage = torch.zeros(2**32 + 2**10, dtype=torch.bfloat16, device=DEVICE)
    shape, strides = [1, 1, 1, 1, 16], [0, 0, 0, 0, 1]
    shape[place], strides[place] = 3, 2**31
    far = storage.as_strided(shape, strides)
    far.copy_(torch.randn(shape))
    near = far.contiguous()
    for one, other in zip(run(far, far, far, far, 1), run(near, near, near, near, 1)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["span", "bias", "both"])
@pytest.mark.parametrize(
    "size, radius, dilation, head_dim, padded",
    [((1, 9), 2, 1, 8, True), ((7, 5), 2, 3, 1, True), ((9, 17), 3, 1, 20, False), ((9, 5), 0, 1, 8, False)],
)
def test_adapted_windows(what, size, radius, dilation, head_dim, padded):
    """Values and gradients of spans and biases, which `heptapod::adaptive_local_attention` has."""
    q, k, v, grad = make_inputs(*size, head_dim, batch=2)
    mask = make_mask(2, *size) if padded else None
    span = (1.4 * torch.rand(2, HEADS, *size) - 0.2) * (radius + 0.5) if what != "bias" else None
    bias = torch.randn(HEADS, 2 * radius + 1, 2 * radius + 1) if what != "span" else None
    inputs = [x for x in (q, k, v, span, bias) if x is not None]
    double = [None if x is None else x.double().requires_grad_() for x in (q, k, v, span, bias)]
    out = naive_local_attention(*double[:3], radius, dilation, mask, 0.3, *double[3:])
    expected = out.detach(), *torch.autograd.grad(out, [x for x in double if x is not None], grad.double())
    on_device = [None if x is None else x.to(DEVICE) for x in (q, k, v, grad, span, bias, mask)]
    q, k, v, grad, span, bias, mask = on_device
    out, totals = kernels.forward(q, k, v, radius, dilation, 0.3, mask, span, bias)
    got = out, *kernels.backward(grad, q, k, v, totals, radius, dilation, 0.3, mask, span, bias)
    assert [list(x.shape) for x in got[1:]] == [list(x.shape) for x in inputs]
    for place, (one, other) in enumerate(zip(got, expected, strict=True)):
        scale = 10 if place > 3 else 1  # sums over channels and cells
        error = (one.cpu().double() - other).abs() / (1 + other.abs())
        assert error.max() < 1e-5 * scale, (place, error.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapted_windows_in_low_precision(dtype):
    q, k, v, grad = make_inputs(9, 10, 16, dtype=dtype)
    span, bias = 2 * torch.rand(1, HEADS, 9, 10), torch.randn(HEADS, 5, 5)
    double = [x.double().requires_grad_() for x in (q, k, v, span, bias)]
    out = naive_local_attention(*double[:3], 2, 1, None, 0.3, *double[3:])
    expected = out.detach(), *torch.autograd.grad(out, double, grad.double())
    q, k, v, grad, span, bias = (x.to(DEVICE) for x in (q, k, v, grad, span, bias))
    out, totals = kernels.forward(q, k, v, 2, 1, 0.3, None, span, bias)
    got = out, *kernels.backward(grad, q, k, v, totals, 2, 1, 0.3, None, span, bias)
    assert [x.dtype for x in got] == 4 * [dtype] + 2 * [torch.float32]
    for one, other in zip(got, expected, strict=True):
        assert relative_rms(one.cpu().double(), other) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
