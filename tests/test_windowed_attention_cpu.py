"""Windowed attention in C against masked attention in float64: values, gradients, threads, layouts, and its operator in graphs."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_heptapod.hierarchical_lm import hierarchical_block, windowed_attention_cpu, windowed_attention_operator
from modeling_heptapod.hierarchical_lm.windowed_attention import naive_windowed_attention, visible, window_reach
from modeling_heptapod.hierarchical_lm.windowed_attention_operator import kernel_attention
from tests.tiny_hierarchical_lm import VARIANTS, random_ids, tiny_hierarchical_lm


pytestmark = pytest.mark.skipif(
    not windowed_attention_cpu.takes(torch.zeros(1, 1, 1, 1), 1), reason="the C source is not compiled here"
)
# Batch, length, heads, channels of a head, window, dilation, blocks.
CASES = {
    "one step": (1, 1, 1, 1, 1, 1, False),
    "itself alone": (2, 23, 2, 4, 1, 1, False),
    "odd sizes": (2, 37, 3, 5, 4, 1, False),
    "two strips": (1, 110, 2, 8, 7, 1, False),
    "nine keys": (1, 50, 1, 20, 9, 1, False),
    "window beyond the text": (2, 19, 2, 4, 40, 1, False),
    "window beyond a strip": (1, 450, 1, 6, 130, 1, False),
    "many channels": (1, 12, 1, 130, 3, 1, False),
    "whole strips": (1, 192, 1, 3, 97, 1, False),
    "dilated": (2, 47, 2, 6, 5, 2, False),
    "uneven phases": (2, 301, 2, 16, 20, 3, False),
    "dilated beyond the text": (2, 5, 2, 4, 3, 8, False),
    "blocks": (2, 61, 2, 7, 6, 1, True),
    "dilated blocks": (1, 213, 2, 8, 40, 2, True),
    "blocks beyond the text": (1, 20, 1, 4, 30, 1, True),
    "longest": (1, 1200, 1, 2, 512, 1, True),
}


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Short texts run in several threads, too."""
    monkeypatch.setattr(windowed_attention_cpu, "_PARALLEL", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_inputs(batch, length, heads, dim, dtype=torch.float32):
    """Queries, keys, values and a gradient of the output."""
    return [torch.randn(batch, length, heads, dim).to(dtype) for _ in range(4)]


def reach_of(length, window, dilation, block):
    """Arguments of the kernels that say what is seen, without the scale."""
    reach = window_reach(torch.arange(length)[None], window, dilation, block)
    return reach, 2 * window if block else window, dilation


def with_gradients(function, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def in_c(q, k, v, grad, *arguments):
    """Output and gradients by the kernel, without the operator."""
    out, totals = windowed_attention_cpu.forward(q, k, v, *arguments)
    return out, *windowed_attention_cpu.backward(grad, q, k, v, totals, *arguments)


def by_mask(q, k, v, grad, mask, scale):
    """Output and gradients in float64, with `mask [1 or batch, length, length]` of what is seen."""

    def attend(*qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1), scale=scale).transpose(1, 2)

    return with_gradients(attend, *(x.double() for x in (q, k, v, grad)))


def exact(qkvg, window, dilation, block, scale):
    length = qkvg[0].shape[1]
    return by_mask(*qkvg, visible(torch.arange(length), length, window, dilation, block)[None], scale)


def check(got, expected, tolerance=1e-5):
    for name, one, other in zip(("out", "grad_q", "grad_k", "grad_v"), got, expected, strict=True):
        assert not one.double().sub(other).abs().gt(tolerance * (1 + other.abs())).any(), name
        assert torch.equal(one.isnan(), other.isnan()), name


@pytest.mark.parametrize("case", CASES)
def test_windows_and_dilations(case):
    *shape, window, dilation, block = CASES[case]
    qkvg = make_inputs(*shape)
    got = in_c(*qkvg, *reach_of(shape[1], window, dilation, block), 0.4)
    check(got, exact(qkvg, window, dilation, block, 0.4))


@pytest.mark.parametrize("case", ["odd sizes", "window beyond a strip", "uneven phases"])
def test_threads_change_no_bit(case):
    *shape, window, dilation, block = CASES[case]
    qkvg = make_inputs(1, 2500, 1, shape[3])  # long enough for several bands
    arguments = *reach_of(2500, window, dilation, block), 0.4
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(in_c(*qkvg, *arguments))
    check(results[0], exact(qkvg, window, dilation, block, 0.4))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("window, block", [(3, False), (100, False), (5, True)])
@pytest.mark.parametrize("dilation", [1, 4])
def test_packed_rows(window, block, dilation):
    lengths = [(4, 40, 12, 20), (72, 4)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    qkvg = make_inputs(2, 76, 2, 4)
    where = positions, window, dilation, block, segments
    expected = with_gradients(lambda *x: naive_windowed_attention(*x, *where), *(x.double() for x in qkvg))
    reach = window_reach(positions, window, dilation, block)
    check(in_c(*qkvg, reach, 2 * window if block else window, dilation, 0.5), expected)


@pytest.mark.parametrize("case", ["odd sizes", "two strips", "uneven phases"])
def test_bfloat16_is_as_good_as_rounding_the_exact_result(case):
    *shape, window, dilation, block = CASES[case]
    qkvg = make_inputs(*shape, torch.bfloat16)
    got = in_c(*qkvg, *reach_of(shape[1], window, dilation, block), 0.5)
    for one, other in zip(got, exact(qkvg, window, dilation, block, 0.5), strict=True):
        assert one.dtype == torch.bfloat16
        rounded = other.bfloat16().double()
        assert (one.double() - other).norm() <= 1.02 * (rounded - other).norm()


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels apart", "one projection", "one text for all", "heads first"]
)
def test_layouts(layout):
    shape = 2, 29, 3, 8
    make = {
        "contiguous": lambda: torch.randn(shape),
        "channels apart": lambda: torch.randn(2, 29, 8, 3).transpose(2, 3),
        "one projection": lambda: torch.randn(2, 29, 3, 3, 8)[:, :, 1],
        "one text for all": lambda: torch.randn(1, 29, 1, 8).expand(shape),
        "heads first": lambda: torch.randn(2, 3, 29, 8).transpose(1, 2),
    }[layout]
    qkvg = [make() for _ in range(4)]
    check(in_c(*qkvg, *reach_of(29, 5, 2, False), 0.4), exact(qkvg, 5, 2, False, 0.4))


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_large_logits(scale):
    qkvg = make_inputs(1, 40, 2, 4)
    check(in_c(*qkvg, *reach_of(40, 6, 1, False), scale), exact(qkvg, 6, 1, False, scale), 1e-4 * max(scale, 1))


def test_totals():
    (q, k, v, _), (reach, span, dilation) = make_inputs(2, 30, 2, 4), reach_of(30, 5, 2, False)
    _, totals = windowed_attention_cpu.forward(q, k, v, reach, span, dilation, 0.7)
    logits = 0.7 * q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)
    logits = logits.masked_fill(~visible(torch.arange(30), 30, 5, 2), float("-inf"))
    top = logits.amax(-1)
    expected = torch.stack((top, 1 / (logits - top[..., None]).exp().sum(-1)))
    torch.testing.assert_close(totals.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_sees_nothing_is_zero():
    """And what it would give is given to no key."""
    qkvg, (reach, span, dilation) = make_inputs(1, 30, 2, 4), reach_of(30, 5, 1, False)
    mask = visible(torch.arange(30), 30, 5)[None].clone()
    reach[0, 7:11], mask[0, 7:11] = 0, False
    got = in_c(*qkvg, reach, span, dilation, 0.4)
    mask[0, 7:11, 0] = True  # torch has no attention to nothing
    expected = by_mask(*qkvg[:3], qkvg[3].index_fill(1, torch.arange(7, 11), 0), mask, 0.4)
    assert got[0][:, 7:11].eq(0).all() and got[1][:, 7:11].eq(0).all()
    expected[0][:, 7:11] = 0
    check(got, expected)


@pytest.mark.parametrize("reach", [1000, -1000])
def test_no_reach_leaves_the_row(reach):
    """Whatever it is: keys before the text count as zero."""
    qkvg = make_inputs(1, 130, 2, 4)
    got = in_c(*qkvg, torch.full((1, 130), reach, dtype=torch.int32), 20, 1, 0.4)
    assert all(x.isfinite().all() for x in got)
    if reach > 0:
        padded = [nn.functional.pad(x, (0, 0, 0, 0, 19, 0)) for x in qkvg]
        expected = by_mask(*padded, visible(torch.arange(149), 149, 20)[None], 0.4)
        check(got, [x[:, 19:] for x in expected])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(where, value):
    """In the output and all gradients that it concerns, also those of the strip before or after; nowhere else."""
    torch.set_num_threads(1)
    qkvg = make_inputs(1, 205, 1, 4)
    place = 110  # in memory behind the queries of the last strip, which is shorter
    qkvg[where][0, place, 0, 1] = value
    got = in_c(*qkvg, *reach_of(205, 6, 1, False), 0.4)
    clean = [x.index_fill(1, torch.tensor(place), 0.5) if i == where else x for i, x in enumerate(qkvg)]
    expected = in_c(*clean, *reach_of(205, 6, 1, False), 0.4)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[:, : place - 10], other[:, : place - 10])
        assert torch.equal(one[:, place + 11 :], other[:, place + 11 :])
    assert not all(x.isfinite().all() for x in got)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("q", torch.zeros(1, 7, 2, 4, dtype=torch.float16)),
        ("k", torch.zeros(1, 7, 2, 3)),
        ("v", torch.zeros(1, 7, 2, 4, dtype=torch.bfloat16)),
        ("v", torch.zeros(1, 7, 2, 4, device="meta")),
        ("reach", torch.ones(1, 7)),
        ("reach", torch.ones(2, 7, dtype=torch.int32)),
        ("reach", torch.ones(1, 6, dtype=torch.int32)),
        ("totals", torch.zeros(2, 1, 2, 6)),
        ("totals", torch.zeros(2, 1, 2, 7, dtype=torch.float64)),
        ("grad_out", torch.zeros(1, 7, 2, 4, dtype=torch.bfloat16)),
    ],
)
def test_nothing_reaches_c_that_it_would_take_for_something_else(name, wrong):
    q, k, v, grad = make_inputs(1, 7, 2, 4)
    given = {"grad_out": grad, "q": q, "k": k, "v": v, "totals": torch.zeros(2, 1, 2, 7)}
    given["reach"] = torch.ones(1, 7, dtype=torch.int32)
    numbers = {"span": 3, "dilation": 1, "scale": 1.0}
    with pytest.raises(ValueError, match=f"`{name}` must be a"):
        windowed_attention_cpu.backward(**{**given, name: wrong}, **numbers)
    if name in ("q", "k", "v", "reach"):
        given = {name: given[name] for name in ("q", "k", "v", "reach")}
        with pytest.raises(ValueError, match=f"`{name}` must be a"):
            windowed_attention_cpu.forward(**{**given, name: wrong}, **numbers)


@pytest.mark.parametrize("span, dilation", [(1025, 1), (0, 1), (1, 0)])
def test_c_refuses_sizes_that_it_lacks(span, dilation):
    q, k, v, _ = make_inputs(1, 3, 1, 4)
    with pytest.raises(ValueError, match="lacks the options or the sizes of this windowed attention"):
        windowed_attention_cpu.forward(q, k, v, torch.ones(1, 3, dtype=torch.int32), span, dilation, 1.0)


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernel's functions, as they are called."""
    names, call = [], windowed_attention_cpu._call
    monkeypatch.setattr(
        windowed_attention_cpu, "_call", lambda name, *a, **k: (names.append(name), call(name, *a, **k))
    )
    return names


FORTH_AND_BACK = ["windowed_attention_forward", "windowed_attention_backward"]
WINDOWED = ("two", "widths", "stride", "blocks", "merge-all", "attention-compressor")


def test_the_operator_is_what_torch_expects():
    (q, k, v, _), (reach, span, dilation) = make_inputs(2, 7, 2, 4), reach_of(7, 3, 2, False)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    operator = windowed_attention_operator._attention.operator
    torch.library.opcheck(operator, (*inputs, reach, span, dilation, 0.4))
    torch.library.opcheck(operator, (*inputs, reach.expand(2, -1), span, dilation, 0.4))


def test_a_graph_of_all_lengths_keeps_the_kernel(calls, fresh_compiler):
    torch.use_deterministic_algorithms(False)
    graphs, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(
        lambda q, k, v, reach: kernel_attention(q, k, v, reach, 5, 2, 0.4),
        fullgraph=True,
        dynamic=True,
        backend=graphs,
    )
    for length in (9, 40, 130):
        qkvg, (reach, *_) = make_inputs(2, length, 2, 8), reach_of(length, 5, 2, False)
        expected = in_c(*qkvg, reach, 5, 2, 0.4)
        calls.clear()
        got = with_gradients(lambda *qkv, reach=reach: compiled(*qkv, reach), *qkvg)
        assert calls == FORTH_AND_BACK
        assert all(map(torch.equal, got, expected))
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1


def test_autocast_decides_the_precision(calls):
    """As for torch's attention, whose inputs may differ in dtype."""
    q, k, v, _ = make_inputs(1, 20, 2, 8)
    reach, span, dilation = reach_of(20, 5, 1, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernel_attention(q, k, v.bfloat16(), reach, span, dilation, 0.4)
    expected = kernel_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), reach, span, dilation, 0.4)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected) and len(calls) == 2


def model_of(variant, **options):
    return tiny_hierarchical_lm(pad_token_id=3, **VARIANTS[variant], **options)


def windows_of(model):
    config = model.config
    return config.num_hidden_layers * sum(window not in (None, 0) for window in config.window_sizes)


def rows(kind):
    """Arguments of a forward pass over rows of some kind."""
    ids = random_ids(2, 45)
    if kind == "padded":
        mask = torch.ones(2, 45, dtype=torch.long)
        mask[0, :9], mask[1, -20:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([13, 25, 7])).expand(2, -1)
        return {"input_ids": ids, "seq_idx": seq_idx}
    return {"input_ids": ids}


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("variant", WINDOWED)
def test_models_compute_what_they_do_in_torch(variant, kind, calls, monkeypatch):
    results, inputs = [], rows(kind)
    for has_kernel in (hierarchical_block.has_kernel, lambda *_: False):
        monkeypatch.setattr(hierarchical_block, "has_kernel", has_kernel)
        model = model_of(variant).train()
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        results.append((out.logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert sorted(calls) == sorted(windows_of(model) * FORTH_AND_BACK)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["eager", "float64", "float16 by autocast", "torch.func", "attentions", "cache"])
def test_torch_does_what_the_kernel_lacks(what, calls):
    model, ids = model_of("stride"), random_ids(1, 20)
    with torch.no_grad():
        if what == "eager":
            model.set_attn_implementation("eager")
            model(ids)
        elif what == "float64":
            model.double()(ids)
        elif what == "float16 by autocast":
            with torch.autocast("cpu", dtype=torch.float16):
                assert model(ids).logits.isfinite().all()
        elif what == "attentions":
            model(ids, output_attentions=True)
        elif what == "cache":
            cache = model(ids).past_key_values
            calls.clear()  # the prompt is a whole text
            model(ids[:, :5], past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        else:
            weights = dict(model.named_parameters())
            torch.func.functional_call(model, weights, (ids,))
            calls.clear()
            torch.func.grad(lambda w: torch.func.functional_call(model, w, (ids,)).logits.square().sum())(weights)
    assert not calls


def test_a_compiled_model_keeps_the_kernels(calls, fresh_compiler):
    torch.use_deterministic_algorithms(False)
    model, ids = model_of("stride", num_hidden_layers=1).train(), random_ids(2, 45)
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        calls.clear()
        run(ids, labels=ids).loss.backward()
        assert sorted(calls) == sorted(windows_of(model) * FORTH_AND_BACK) and calls


def test_exported_programs_hold_plain_operations(calls):
    model, ids = model_of("stride").eval(), random_ids(1, 24)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        assert "heptapod" not in {str(node.target).partition(".")[0] for node in program.graph.nodes}
        assert not calls
        got = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert calls
