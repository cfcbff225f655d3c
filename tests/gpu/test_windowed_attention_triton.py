"""The Triton kernels of windowed attention against masked attention in float64: values, totals, gradients.

On a machine with a CUDA device these tests run there (`pytest -m gpu tests/gpu`). With `TRITON_INTERPRET=1` they run on a
CPU in Triton's interpreter; `tests/test_windowed_attention_triton.py` does that.
"""

import os

import pytest
import torch

from modeling_heptapod.common import triton_attention
from modeling_heptapod.hierarchical_lm import windowed_attention_triton as kernels
from modeling_heptapod.hierarchical_lm.windowed_attention import naive_windowed_attention, visible, window_reach
from tests.test_focus import relative_rms
from tests.test_windowed_attention_cpu import by_mask, exact, make_inputs, reach_of, with_gradients
from tests.triton_interpreter import complete_interpreter


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(kernels.triton is None, reason="there is no Triton"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(triton_attention, "DEVICES", (DEVICE,))
    if INTERPRETED:
        complete_interpreter()


def run(q, k, v, grad, reach, span, dilation, scale):
    """Output, gradients and totals by the kernels, on the CPU."""
    q, k, v, grad, reach = (x.to(DEVICE) for x in (q, k, v, grad, reach))
    assert kernels.takes(q, span)
    out, totals = kernels.forward(q, k, v, reach, span, dilation, scale)
    grads = kernels.backward(grad, q, k, v, totals, reach, span, dilation, scale)
    for x in (out, *grads):
        assert x.dtype == q.dtype and x.shape == q.shape and x.is_contiguous()
    return out.cpu(), *(x.cpu() for x in grads), totals.cpu()


def check_totals(totals, q, k, mask, scale):
    logits = scale * q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)
    logits = logits.masked_fill(~mask.unsqueeze(1), -torch.inf)
    largest = logits.amax(-1)
    expected = torch.stack([largest, 1 / (logits - largest[..., None]).exp().sum(-1)])
    assert totals.dtype == torch.float32
    torch.testing.assert_close(totals.double(), expected, rtol=1e-5, atol=1e-5)


def check(got, expected, tolerance=1e-5):
    for name, one, other in zip(("out", "grad q", "grad k", "grad v"), got, expected):
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = [  # batch, length, heads, channels, window, dilation, blocks
    (1, 1, 1, 8, 1, 1, False),
    (2, 9, 2, 20, 3, 1, False),
    (1, 5, 1, 1, 2, 8, False),
    (1, 64, 1, 16, 64, 1, False),
    (1, 65, 1, 16, 17, 1, False),
    (1, 130, 1, 64, 33, 1, False),
    (1, 150, 1, 8, 5, 4, False),
    (1, 70, 2, 32, 9, 1, True),
    (1, 90, 1, 128, 6, 2, True),
    (1, 40, 1, 8, 100, 1, False),
    *(
        ()
        if INTERPRETED
        else (
            (2, 4097, 4, 64, 128, 1, False),
            (1, 2049, 2, 32, 512, 3, True),
            (3, 1000, 2, 100, 1000, 1, False),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_values_gradients_and_totals(case):
    *shape, window, dilation, block = case
    qkvg, scale = make_inputs(*shape), 1.3 * shape[3] ** -0.5
    *got, totals = run(*qkvg, *reach_of(shape[1], window, dilation, block), scale)
    check(got, exact(qkvg, window, dilation, block, scale))
    check_totals(totals, *qkvg[:2], visible(torch.arange(shape[1]), shape[1], window, dilation, block)[None], scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 20, 128])
def test_low_precision_is_nearly_as_good_as_rounding_the_exact_result(head_dim, dtype):
    length = 70 if INTERPRETED else 900
    qkvg, scale = make_inputs(1, length, 2, head_dim, dtype), 2 * head_dim**-0.5
    *got, _ = run(*qkvg, *reach_of(length, 11, 1, False), scale)
    for one, other in zip(got, exact(qkvg, 11, 1, False, scale)):
        assert relative_rms(one, other) <= 1.6 * relative_rms(other.to(dtype), other)  # weights are rounded, too


@pytest.mark.parametrize("window, block, dilation", [(3, False, 4), (100, False, 1), (5, True, 4)])
def test_packed_rows(window, block, dilation):
    lengths = [(4, 40, 12, 20), (72, 4)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    qkvg, where = make_inputs(2, 76, 2, 4), (positions, window, dilation, block, segments)
    expected = with_gradients(lambda *x: naive_windowed_attention(*x, *where), *(x.double() for x in qkvg))
    reach = window_reach(positions, window, dilation, block)
    check(run(*qkvg, reach, 2 * window if block else window, dilation, 0.5)[:4], expected)


def test_what_sees_nothing_is_zero():
    qkvg, (reach, span, dilation) = make_inputs(1, 30, 2, 4), reach_of(30, 5, 1, False)
    mask = visible(torch.arange(30), 30, 5)[None].clone()
    reach[0, 7:11], mask[0, 7:11] = 0, False
    *got, totals = run(*qkvg, reach, span, dilation, 0.4)
    assert not got[0][:, 7:11].any() and not got[1][:, 7:11].any() and not totals[..., 7:11].any()
    mask[0, 7:11, 0] = True  # torch has no attention to nothing
    expected = by_mask(*qkvg[:3], qkvg[3].index_fill(1, torch.arange(7, 11), 0), mask, 0.4)
    expected[0][:, 7:11] = 0
    check(got, expected)


def test_any_layout():
    q, k, v, _ = (x.to(DEVICE) for x in make_inputs(2, 29, 3, 20))
    grad = torch.ones((), device=DEVICE).expand(q.shape)
    where = *reach_of(29, 5, 2, False), 0.4
    expected = run(*(x.contiguous() for x in (q, k, v, grad)), *where)
    parts = torch.stack((q, k, v), 2).unbind(2)
    heads_first, channels_apart = (v.transpose(*p).contiguous().transpose(*p) for p in ((1, 2), (2, 3)))
    for some in (parts, (q, k, heads_first), (q, k, channels_apart)):
        for one, other in zip(run(*some, grad, *where), expected):
            assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_extreme_logits(scale):
    qkvg = make_inputs(1, 70, 2, 8)
    *got, totals = run(*qkvg, *reach_of(70, 9, 1, False), scale)
    expected = exact(qkvg, 9, 1, False, scale)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in (*got, totals)) and totals[0].abs().max() > 2e3


def test_repeated_runs_are_equal_to_the_last_bit():
    length, head_dim = (70, 8) if INTERPRETED else (4000, 32)
    qkvg, where = make_inputs(2, length, 2, head_dim), (*reach_of(length, 33, 1, False), 0.4)
    first = run(*qkvg, *where)
    for _ in range(2 if INTERPRETED else 5):
        assert all(torch.equal(one, other) for one, other in zip(run(*qkvg, *where), first))
