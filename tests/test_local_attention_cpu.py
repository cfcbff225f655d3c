"""Local attention in C against the loop over cells in float64: values, gradients, threads, layouts, and its operator in graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_heptapod.heptapod import local_attention_cpu, local_attention_operator
from modeling_heptapod.heptapod.local_attention import local_attention, naive_local_attention
from tests.tiny_heptapod import random_page, tiny_heptapod


pytestmark = pytest.mark.skipif(
    not local_attention_cpu.takes(torch.zeros(1, 1, 1, 1, 1), 0), reason="the C source is not compiled here"
)
# Batch, heads, height, width, channels of a head, radius, dilation.
CASES = {
    "one cell": (1, 1, 1, 1, 1, 0, 1),
    "one row": (2, 1, 1, 23, 4, 2, 1),
    "one column": (1, 2, 21, 1, 3, 3, 1),
    "no neighbours": (2, 2, 5, 6, 8, 0, 1),
    "narrow": (2, 2, 19, 3, 8, 1, 1),
    "odd sizes": (2, 3, 13, 17, 7, 2, 1),
    "a vector and one": (1, 1, 6, 17, 16, 3, 1),
    "window of the grid": (1, 2, 9, 8, 9, 8, 1),
    "window beyond the grid": (1, 1, 5, 7, 4, 20, 1),
    "nine offsets": (1, 1, 15, 14, 20, 4, 1),
    "eleven offsets": (1, 2, 12, 30, 5, 5, 1),
    "widest": (1, 1, 40, 5, 2, 32, 1),
    "many channels": (1, 1, 5, 6, 130, 1, 1),
    "two strips": (1, 1, 7, 110, 5, 2, 1),
    "uneven strips": (1, 2, 4, 197, 3, 5, 1),
    "dilated": (2, 1, 9, 11, 6, 2, 2),
    "uneven phases": (1, 2, 10, 13, 5, 1, 3),
    "dilated beyond the grid": (1, 1, 4, 5, 4, 1, 7),
    "dilated strips": (1, 1, 5, 203, 2, 3, 2),
}


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Small grids run in several threads, too."""
    monkeypatch.setattr(local_attention_cpu, "_PARALLEL", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_inputs(batch, heads, height, width, dim, share_real=None, dtype=torch.float32):
    """Queries, keys, values and a gradient of the output, as linear layers lay them out, and a padding mask."""
    qkvg = [torch.randn(batch, height, width, heads, dim).permute(0, 3, 1, 2, 4).to(dtype) for _ in range(4)]
    return qkvg, None if share_real is None else torch.rand(batch, height, width) < share_real


def with_gradients(function, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def in_c(q, k, v, grad, *arguments):
    """Output and gradients by the kernel, without the operator."""
    radius, dilation, scale, mask = arguments
    out, totals = local_attention_cpu.forward(q, k, v, radius, dilation, scale, mask)
    return out, *local_attention_cpu.backward(grad, q, k, v, totals, radius, dilation, scale, mask)


def naive(q, k, v, grad, *arguments):
    radius, dilation, scale, mask = arguments
    return with_gradients(
        lambda *qkv: naive_local_attention(*qkv, radius, dilation, mask, scale), *(x.double() for x in (q, k, v, grad))
    )


def check(got, expected, tolerance=1e-5):
    for name, one, other in zip(("out", "grad_q", "grad_k", "grad_v"), got, expected, strict=True):
        assert not one.double().sub(other).abs().gt(tolerance * (1 + other.abs())).any(), name
        assert torch.equal(one.isnan(), other.isnan()), name


@pytest.mark.parametrize("share_real", [None, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_the_loop(case, share_real):
    *shape, radius, dilation = CASES[case]
    qkvg, mask = make_inputs(*shape, share_real)
    check(in_c(*qkvg, radius, dilation, 0.4, mask), naive(*qkvg, radius, dilation, 0.4, mask))


@pytest.mark.parametrize("case", ["narrow", "nine offsets", "two strips", "uneven phases"])
def test_threads_change_no_bit(case):
    *shape, radius, dilation = CASES[case]
    qkvg, mask = make_inputs(1, 1, 34, *shape[3:], 0.7)  # enough rows for several bands
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(in_c(*qkvg, radius, dilation, 0.4, mask))
    check(results[0], naive(*qkvg, radius, dilation, 0.4, mask))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("case", ["odd sizes", "two strips", "uneven phases"])
def test_bfloat16_is_as_good_as_rounding_the_exact_result(case):
    *shape, radius, dilation = CASES[case]
    qkvg, mask = make_inputs(*shape, 0.7, torch.bfloat16)
    got, exact = in_c(*qkvg, radius, dilation, 0.5, mask), naive(*qkvg, radius, dilation, 0.5, mask)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == torch.bfloat16
        rounded = other.bfloat16().double()
        assert (one.double() - other).norm() <= 1.02 * (rounded - other).norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels apart", "one projection", "one page for all", "flipped"])
def test_layouts(layout):
    shape = 2, 3, 7, 9, 8
    make = {
        "contiguous": lambda: torch.randn(shape),
        "channels apart": lambda: torch.randn(2, 3, 8, 7, 9).permute(0, 1, 3, 4, 2),
        "one projection": lambda: torch.randn(2, 7, 9, 3, 3, 8)[:, :, :, 1].permute(0, 3, 1, 2, 4),
        "one page for all": lambda: torch.randn(1, 3, 7, 9, 8).expand(shape),
        "flipped": lambda: torch.randn(2, 3, 9, 7, 8).transpose(2, 3)[:, :, :, 1:].expand(2, 3, 7, 8, 8),
    }[layout]
    qkvg = [make() for _ in range(4)]
    check(in_c(*qkvg, 2, 1, 0.4, None), naive(*qkvg, 2, 1, 0.4, None))


@pytest.mark.parametrize("scale", [300.0, -3000.0])
def test_extreme_logits(scale):
    """Weights from a stored log of the sum would be off by a thousandth here."""
    qkvg, mask = make_inputs(1, 2, 9, 20, 8, 0.7)
    qkvg = [x.mul(8).round().div(8) for x in qkvg]  # products are exact, so errors are of the softmax alone
    out, grad_q, grad_k, grad_v = naive(*qkvg, 2, 1, scale, mask)
    got = in_c(*qkvg, 2, 1, scale, mask)
    check((got[0], got[1] / scale, got[2] / scale, got[3]), (out, grad_q / scale, grad_k / scale, grad_v))


def test_totals():
    (q, k, v, _), mask = make_inputs(1, 1, 6, 7, 4, 0.3)
    mask[0, 3:, 3:] = False
    _, totals = local_attention_cpu.forward(q, k, v, 1, 1, 0.5, mask)
    for y in range(6):
        for x in range(7):
            near = [(a, b) for a in range(6) for b in range(7) if max(abs(a - y), abs(b - x)) < 2 and mask[0, a, b]]
            logits = torch.tensor([0.5 * float(q[0, 0, y, x] @ k[0, 0, a, b]) for a, b in near])
            expected = torch.stack((logits.max(), 1 / (logits - logits.max()).exp().sum())) if near else torch.zeros(2)
            torch.testing.assert_close(totals[:, 0, 0, y, x], expected)


def test_cells_that_attend_to_nothing_are_zero():
    qkvg, mask = make_inputs(2, 1, 9, 12, 8, 0.0)
    assert all(x.eq(0).all() for x in in_c(*qkvg, 2, 1, 0.4, mask))


def test_pads_leave_no_trace():
    qkvg, mask = make_inputs(1, 2, 9, 12, 8, 0.6)
    expected = in_c(*qkvg, 2, 1, 0.4, mask)
    spoiled = [x.masked_fill(~mask[:, None, :, :, None], float("nan")) for x in qkvg[1:3]]
    got = in_c(qkvg[0], *spoiled, qkvg[3], 2, 1, 0.4, mask)
    assert all(map(torch.equal, got, expected))
    assert got[2].masked_select(~mask[:, None, :, :, None]).eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(where, value):
    """In the output as in the loop; in all gradients that it concerns."""
    qkvg, _ = make_inputs(1, 1, 9, 21, 4)
    qkvg[where][0, 0, 4, 19, 1] = value
    got, expected = in_c(*qkvg, 2, 1, 0.4, None), naive(*qkvg, 2, 1, 0.4, None)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("where, column", [(0, 131), (1, 139), (3, 132)])
def test_what_is_not_finite_stays_where_it_is(where, column):
    """Also where the next strip is narrower, and its rows end in memory that the one before has used."""
    torch.set_num_threads(1)
    *shape, radius, dilation = CASES["uneven strips"]
    qkvg, _ = make_inputs(*shape)
    qkvg[where][0, 0, 3, column] = float("nan")
    got, expected = (run(*qkvg, radius, dilation, 0.4, None) for run in (in_c, naive))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("k", torch.zeros(1, 2, 5, 6, 4)),
        ("v", torch.zeros(1, 2, 5, 7, 4, dtype=torch.bfloat16)),
        ("v", torch.zeros(1, 2, 5, 7, 4, device="meta")),
        ("padding_mask", torch.zeros(1, 5, 7)),
        ("padding_mask", torch.zeros(2, 5, 7, dtype=torch.bool)),
        ("totals", torch.zeros(2, 1, 2, 5, 6)),
        ("totals", torch.zeros(2, 1, 2, 5, 7, dtype=torch.float64)),
        ("grad_out", torch.zeros(1, 2, 5, 7, 4, dtype=torch.bfloat16)),
    ],
)
def test_nothing_reaches_c_that_it_would_take_for_something_else(name, wrong):
    (q, k, v, grad), _ = make_inputs(1, 2, 5, 7, 4)
    given = {"grad_out": grad, "q": q, "k": k, "v": v, "totals": torch.zeros(2, 1, 2, 5, 7), "padding_mask": None}
    with pytest.raises(ValueError, match=f"`{name}` must be a"):
        local_attention_cpu.backward(**{**given, name: wrong}, radius=1, dilation=1, scale=1.0)
    if name in ("k", "v", "padding_mask"):
        given = {name: given[name] for name in ("q", "k", "v", "padding_mask")}
        with pytest.raises(ValueError, match=f"`{name}` must be a"):
            local_attention_cpu.forward(**{**given, name: wrong}, radius=1, dilation=1, scale=1.0)


@pytest.mark.parametrize("radius, dilation", [(33, 1), (-1, 1), (1, 0)])
def test_c_refuses_sizes_that_it_lacks(radius, dilation):
    (q, k, v, _), _ = make_inputs(1, 1, 3, 3, 4)
    with pytest.raises(ValueError, match="lacks the options or the sizes of this local attention"):
        local_attention_cpu.forward(q, k, v, radius, dilation, 1.0, None)


def test_freed_memory_is_refused():
    (q, k, v, _), _ = make_inputs(1, 1, 3, 3, 4)
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="`k` has no memory"):
        local_attention_cpu.forward(q, k, v, 1, 1, 1.0, None)


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernel's functions, as they are called."""
    names, call = [], local_attention_cpu._call
    monkeypatch.setattr(local_attention_cpu, "_call", lambda name, *a, **k: (names.append(name), call(name, *a, **k)))
    return names


FORTH_AND_BACK = ["local_attention_forward", "local_attention_backward"]


@pytest.mark.parametrize("case", ["odd sizes", "uneven phases"])
@pytest.mark.parametrize("padded", [True, False])
def test_local_attention_is_the_kernel(case, padded, calls):
    *shape, radius, dilation = CASES[case]
    qkvg, mask = make_inputs(*shape, 0.6)
    mask = mask if padded else None
    got = with_gradients(lambda *qkv: local_attention(*qkv, radius, dilation, mask, 0.4), *qkvg)
    assert calls == FORTH_AND_BACK
    check(got, naive(*qkvg, radius, dilation, 0.4, mask))


@pytest.mark.parametrize("what", ["radius", "dropout", "dtype", "torch.func"])
def test_torch_does_what_the_kernel_lacks(what, calls):
    (q, k, v, _), _ = make_inputs(1, 1, 9, 8, 4)
    if what == "torch.func":
        grads = torch.func.grad(lambda q: local_attention(q, k, v, 1).square().sum())(q)
        assert grads.shape == q.shape
    elif what == "dtype":
        local_attention(q.double(), k.double(), v.double(), 1)
    elif what == "radius":
        local_attention(q, k, v, 33)
        local_attention(q, k, v, None)
    else:
        local_attention(q, k, v, 1, dropout=0.1)
    assert not calls


def test_autocast_does_not_reach_inside():
    qkvg, mask = make_inputs(1, 2, 9, 8, 4, 0.7)
    expected = with_gradients(lambda *qkv: local_attention(*qkv, 1, 1, mask), *qkvg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(lambda *qkv: local_attention(*qkv, 1, 1, mask), *qkvg)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("padded", [True, False])
def test_a_graph_of_all_sizes_keeps_the_kernel(padded, calls, fresh_compiler):
    torch.use_deterministic_algorithms(False)
    graphs, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(
        lambda q, k, v, mask: local_attention(q, k, v, 2, 2, mask, 0.4), fullgraph=True, dynamic=True, backend=graphs
    )
    for height, width in ((9, 11), (16, 5), (30, 40)):
        qkvg, mask = make_inputs(2, 2, height, width, 8, 0.7)
        mask = mask if padded else None
        expected = with_gradients(lambda *qkv, mask=mask: local_attention(*qkv, 2, 2, mask, 0.4), *qkvg)
        calls.clear()
        got = with_gradients(lambda *qkv, mask=mask: compiled(*qkv, mask), *qkvg)
        assert calls == FORTH_AND_BACK
        assert all(map(torch.equal, got, expected))
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1


def test_the_operator_is_what_torch_expects():
    (q, k, v, _), mask = make_inputs(2, 2, 5, 6, 4, 0.7)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(local_attention_operator._attention.operator, (*inputs, mask, 1, 2, 0.4))
    torch.library.opcheck(local_attention_operator._attention.operator, (*inputs, None, 2, 1, 0.4))


def test_a_compiled_model_keeps_the_kernels(calls, fresh_compiler):
    torch.use_deterministic_algorithms(False)
    model, page = tiny_heptapod(num_hidden_layers=2).train(), random_page(2, 9, 11)
    local = sum(radius is not None for layer in model.model.layers for _, radius, _ in layer.self_attn.head_groups)
    for run in (model, torch.compile(model, backend="aot_eager")):
        calls.clear()
        run(page, labels=page).loss.backward()
        assert sorted(calls) == sorted(local * FORTH_AND_BACK) and local


def test_exported_programs_hold_plain_operations(calls):
    model, page = tiny_heptapod(num_hidden_layers=2).eval(), random_page(1, 6, 7)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": page}, strict=False)
        assert "heptapod" not in {str(node.target).partition(".")[0] for node in program.graph.nodes}
        assert not calls
        torch.testing.assert_close(program.module()(input_ids=page).logits, model(page).logits, rtol=1e-4, atol=1e-5)
    assert calls
