"""Attention to adapted windows, with spans and biases: all forms against the loop over cells in float64."""

import pytest
import torch
import torch._inductor.config
from huggingface_hub.errors import StrictDataclassError
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from modeling_heptapod.heptapod import local_attention as forms
from modeling_heptapod.heptapod import local_attention_cpu, local_attention_operator
from modeling_heptapod.heptapod.adaptive_attention import adaptive_attention
from modeling_heptapod.heptapod.local_attention import attention_weights, local_attention, naive_local_attention
from tests.tiny_heptapod import VARIANTS, random_page, tiny_heptapod


NEEDS_C = pytest.mark.skipif(
    not local_attention_cpu.takes(torch.zeros(1, 1, 1, 1, 1), 0), reason="the C source is not compiled here"
)
# Batch, heads, height, width, channels of a head, radius, dilation.
CASES = {
    "one cell": (1, 1, 1, 1, 1, 0, 1),
    "one row": (2, 1, 1, 23, 4, 2, 1),
    "no neighbours": (2, 2, 5, 6, 8, 0, 1),
    "odd sizes": (2, 3, 6, 9, 7, 2, 1),
    "window beyond the grid": (1, 1, 5, 7, 4, 9, 1),
    "eleven offsets": (1, 2, 7, 12, 5, 5, 1),
    "two strips": (1, 2, 3, 110, 4, 2, 1),
    "uneven phases": (1, 2, 5, 7, 5, 1, 3),
    "tiny": (1, 2, 3, 3, 2, 1, 1),
    "dilated strips": (1, 1, 3, 203, 2, 1, 2),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
ADAPTED = pytest.mark.parametrize("adapted", ["span", "bias", "both"])
NAMES = ("q", "k", "v", "span", "bias")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Small grids run in several threads, too."""
    monkeypatch.setattr(local_attention_cpu, "_PARALLEL", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_inputs(case, adapted="both", share_real=None, dtype=torch.float32):
    """Queries, keys, values, spans and biases by name, those that there are, a gradient of the output, and a padding mask.

    Some spans are negative or larger than the radius. Whole numbers, at which gradients jump, are left to a test of their own.
    """
    batch, heads, height, width, dim, radius, _ = CASES[case]
    shape = batch, heads, height, width
    q, k, v, grad = (torch.randn(*shape, dim).to(dtype) for _ in range(4))
    span = (1.4 * torch.rand(shape) - 0.2) * (radius + 0.5)
    span = torch.where((span - span.round()).abs() < 1e-3, span + 0.01, span)
    bias = torch.randn(heads, 2 * radius + 1, 2 * radius + 1)
    given = {"q": q, "k": k, "v": v, "span": span, "bias": bias}
    if adapted != "both":
        del given["bias" if adapted == "span" else "span"]
    return given, grad, None if share_real is None else torch.rand(batch, height, width) < share_real


def run(function, given, grad):
    """Output and gradients by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = function(**inputs)
    return {"out": out.detach(), **dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad)))}


def by_loop(given, grad, case, mask):
    *_, radius, dilation = CASES[case]
    options = {"radius": radius, "dilation": dilation, "padding_mask": mask, "scale": 0.4}
    double = {name: x.double() for name, x in given.items()}
    return run(lambda **x: naive_local_attention(**x, **options), double, grad.double())


def in_c(given, grad, case, mask):
    *_, radius, dilation = CASES[case]
    others = radius, dilation, 0.4, mask
    adapted = {name: given.get(name) for name in ("span", "bias")}
    q, k, v = (given[name] for name in "qkv")
    out, totals = local_attention_cpu.forward(q, k, v, *others, **adapted)
    grads = local_attention_cpu.backward(grad, q, k, v, totals, *others, **adapted)
    return {"out": out, **dict(zip(given, grads, strict=True))}


def check(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, one in got.items():
        other = expected[name]
        scale = 10 if name in ("span", "bias") else 1  # sums over channels and cells
        assert not one.double().sub(other).abs().gt(scale * tolerance * (1 + other.abs())).any(), name
        assert torch.equal(one.isnan(), other.isnan()), name


@EVERY_CASE
@ADAPTED
@pytest.mark.parametrize("share_real", [None, 0.5])
def test_forms_in_torch_equal_the_loop(case, adapted, share_real):
    given, grad, mask = make_inputs(case, adapted, share_real, torch.float64)
    given = {name: x.double() for name, x in given.items()}
    expected = by_loop(given, grad, case, mask)
    *_, height, width, _, radius, dilation = CASES[case]

    def in_windows(q, k, v, span=None, bias=None):
        return adaptive_attention(q, k, v, span, bias, mask, radius, dilation, 0.4, 0.0)

    def by_matrix(q, k, v, span=None, bias=None):
        weights = attention_weights(q, k, radius, dilation, mask, 0.4, span, bias)
        return (weights @ v.flatten(2, 3)).unflatten(2, (height, width))

    for form in (in_windows, by_matrix):
        check(run(form, given, grad), expected, 1e-12)


@NEEDS_C
@EVERY_CASE
@ADAPTED
@pytest.mark.parametrize("share_real", [None, 0.5])
def test_the_kernel_equals_the_loop(case, adapted, share_real):
    given, grad, mask = make_inputs(case, adapted, share_real)
    check(in_c(given, grad, case, mask), by_loop(given, grad, case, mask))


def test_gradients_are_those_of_small_steps():
    """Of the loop itself, away from the kinks at whole numbers."""
    given, _, mask = make_inputs("tiny", share_real=0.7)
    *_, radius, dilation = CASES["tiny"]
    inputs = [given[name].double().requires_grad_() for name in NAMES]

    def function(q, k, v, span, bias):
        return naive_local_attention(q, k, v, radius, dilation, mask, 0.4, span, bias)

    assert torch.autograd.gradcheck(function, inputs)


def test_spans_by_hand():
    """One row, equal logits: whole neighbours count 1, the last one in part."""
    q, v = torch.zeros(1, 1, 1, 7, 1), torch.arange(7.0).view(1, 1, 1, 7, 1) ** 2
    span = torch.tensor([0.0, 1.0, 1.25, 3.0, -0.5, 9.0, 2.5]).view(1, 1, 1, 7)
    expected = [
        0.0,
        (0 + 1 + 4) / 3,
        (1 + 4 + 9 + 0.25 * (0 + 16)) / 3.5,
        sum(x * x for x in range(7)) / 7,
        16.0,  # of the cell alone, which counts in part: as much as if it counted whole
        sum(x * x for x in range(2, 7)) / 5,
        (16 + 25 + 36 + 0.5 * 9) / 3.5,
    ]
    for form in (local_attention, naive_local_attention):
        out = form(q, q, v, 3, span=span)
        torch.testing.assert_close(out.flatten(), torch.tensor(expected))
    assert not local_attention(q, q, v, 3, span=span - 10).any()  # attends to nothing


def test_a_span_of_the_radius_and_biases_of_zero_change_nothing():
    given, _, mask = make_inputs("odd sizes", share_real=0.7)
    q, k, v = (given[name] for name in "qkv")
    span, bias = torch.full(q.shape[:4], 2.0), torch.zeros(3, 5, 5)
    plain = local_attention(q, k, v, 2, 1, mask)
    torch.testing.assert_close(local_attention(q, k, v, 2, 1, mask, span=span, bias=bias), plain)


@NEEDS_C
@pytest.mark.parametrize("case", ["odd sizes", "two strips", "uneven phases"])
def test_threads_change_no_bit(case):
    shape = list(CASES[case])
    shape[:3] = 1, 2, 34  # enough rows for several bands
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, case, tuple(shape))
        given, grad, mask = make_inputs(case, share_real=0.7)
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(in_c(given, grad, case, mask))
        check(results[0], by_loop(given, grad, case, mask))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], x) for name, x in other.items())


@NEEDS_C
@pytest.mark.parametrize("case", ["odd sizes", "uneven phases"])
def test_bfloat16_is_as_good_as_rounding_the_exact_result(case):
    given, grad, mask = make_inputs(case, share_real=0.7, dtype=torch.bfloat16)
    got, exact = in_c(given, grad, case, mask), by_loop(given, grad, case, mask)
    for name, one in got.items():
        rounded = exact[name].to(one.dtype).double()
        assert (one.double() - exact[name]).norm() <= 1.02 * (rounded - exact[name]).norm() + 1e-4, name
    assert [got[name].dtype for name in NAMES] == 3 * [torch.bfloat16] + 2 * [torch.float32]


@NEEDS_C
@pytest.mark.parametrize("adapted", ["span", "both"])
@pytest.mark.parametrize("where", ["q", "k", "v", "span", "bias"])
def test_what_is_not_a_number_stays_where_it_is(where, adapted):
    torch.set_num_threads(1)
    given, grad, _ = make_inputs("two strips", adapted)
    if where not in given:
        return
    given[where][(0, 0, 1, 60) if given[where].dim() > 3 else (0, 1, 1)] = float("nan")
    got, expected = (form(given, grad, "two strips", None) for form in (in_c, by_loop))
    for name in ("out", "q", "k", "v"):
        # A bias is added beyond the border, too.
        assert (
            got[name].isnan() >= expected[name].isnan()
            if where == "bias"
            else got[name].isnan() == expected[name].isnan()
        ).all()
        assert got[name].isnan().any() or (name, where) == ("v", "v")


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernel's functions, as they are called."""
    names, call = [], local_attention_cpu._call
    monkeypatch.setattr(local_attention_cpu, "_call", lambda name, *a, **k: (names.append(name), call(name, *a, **k)))
    return names


FORTH_AND_BACK = ["local_attention_forward", "local_attention_backward"]


@NEEDS_C
@ADAPTED
@pytest.mark.parametrize("padded", [True, False])
def test_local_attention_is_the_kernel(adapted, padded, calls):
    given, grad, mask = make_inputs("uneven phases", adapted, 0.6)
    mask = mask if padded else None
    got = run(lambda **x: local_attention(**x, radius=1, dilation=3, padding_mask=mask, scale=0.4), given, grad)
    assert calls == FORTH_AND_BACK
    check(got, by_loop(given, grad, "uneven phases", mask))


@pytest.mark.parametrize("what", ["dropout", "dtype", "torch.func"])
def test_torch_does_what_the_kernel_lacks(what, calls):
    given, grad, _ = make_inputs("odd sizes")
    if what == "torch.func":
        others = {name: given[name] for name in NAMES if name != "span"}
        grads = torch.func.grad(lambda span: local_attention(**others, span=span, radius=2).square().sum())(
            given["span"]
        )
        assert grads.shape == given["span"].shape
    elif what == "dtype":
        double = {name: x.double() for name, x in given.items()}
        got = run(lambda **x: local_attention(**x, radius=2, scale=0.4), double, grad.double())
        check(got, by_loop(given, grad, "odd sizes", None), 1e-12)
    else:
        dropped = torch.stack([local_attention(**given, radius=2, dropout=0.3) for _ in range(400)])
        mean = local_attention(**given, radius=2)
        assert not calls or calls == FORTH_AND_BACK[:1]  # of the last line
        error = (dropped.mean(0) - mean) / (dropped.std(0) / 20 + 1e-6)
        assert error.abs().mean() < 1 and error.abs().max() < 8
        return
    assert not calls


@NEEDS_C
def test_autocast_does_not_reach_inside():
    given, grad, mask = make_inputs("odd sizes", share_real=0.7)
    function = lambda **x: local_attention(**x, radius=2, padding_mask=mask)
    expected = run(function, given, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(function, given, grad)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


@NEEDS_C
@ADAPTED
def test_a_graph_of_all_sizes_keeps_the_kernel(adapted, calls, fresh_compiler):
    torch.use_deterministic_algorithms(False)
    graphs, counts = CompileCounterWithBackend("aot_eager"), []

    def function(mask, **given):
        return local_attention(**given, radius=2, dilation=2, padding_mask=mask, scale=0.4)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for height, width in ((9, 11), (16, 5), (30, 40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CASES, "odd sizes", (2, 2, height, width, 8, 2, 2))
            given, grad, mask = make_inputs("odd sizes", adapted, 0.7)
        expected = run(lambda mask=mask, **x: function(mask, **x), given, grad)
        calls.clear()
        got = run(lambda mask=mask, **x: compiled(mask, **x), given, grad)
        assert calls == FORTH_AND_BACK
        assert all(torch.equal(got[name], x) for name, x in expected.items())
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1


@NEEDS_C
@ADAPTED
def test_the_operator_is_what_torch_expects(adapted):
    given, _, mask = make_inputs("uneven phases", adapted, 0.7)
    if "span" in given:  # as models lay it out, with the heads of a cell side by side
        given["span"] = given["span"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    inputs = [given[name].requires_grad_() if name in given else None for name in NAMES]
    torch.library.opcheck(local_attention_operator._adaptive_operator, (*inputs, mask, 1, 3, 0.4))
    torch.library.opcheck(local_attention_operator._adaptive_operator, (*inputs, None, 1, 3, 0.4))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"span": torch.zeros(2, 3, 6, 8)}, ValueError, r"`span` must be \[2, 3, 6, 9\], got \[2, 3, 6, 8\]"),
        ({"span": torch.zeros(2, 3, 6, 9).long()}, TypeError, "`span` must be floating point, got torch.int64"),
        ({"bias": torch.zeros(3, 5, 4)}, ValueError, r"`bias` must be \[3, 5, 5\], got \[3, 5, 4\]"),
        ({"bias": torch.zeros(1, 5, 5)}, ValueError, r"`bias` must be \[3, 5, 5\]"),
        ({"radius": None}, ValueError, r"`span` and `bias` need a `radius`, got None"),
    ],
)
def test_bad_input_is_named(wrong, error, message):
    given, _, _ = make_inputs("odd sizes")
    with pytest.raises(error, match=message):
        local_attention(**{**given, "radius": 2, **wrong})


# --- the model -------------------------------------------------------------------------------------------------------


def test_spans_are_an_output():
    model, page = tiny_heptapod(**VARIANTS["adaptive"]), random_page(2, 5, 9)
    for run_model in (model, model.model):
        spans = run_model(page).spans
        assert [list(x.shape) for x in spans] == 2 * [[2, 3, 5, 9]]  # of four heads, one is global
        assert all(((x > 0) & (x < 2)).all() for x in spans)
    flat = model(page.flatten(1), grid_size=(5, 9)).spans
    assert all(map(torch.equal, flat, model(page).spans))
    assert tiny_heptapod()(page).spans is None


def test_trainer_predicts_logits_and_labels_alone(tmp_path):
    model, pages = tiny_heptapod(**VARIANTS["adaptive"]), random_page(3, 4, 5)
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    dataset = [{"input_ids": page, "labels": page} for page in pages]
    logits, masked_labels = Trainer(model, arguments).predict(dataset).predictions
    assert logits.shape == (3, 4, 5, 20) and masked_labels.shape == (3, 4, 5)


def test_a_new_model_looks_far():
    torch.manual_seed(0)
    model = type(tiny_heptapod())(tiny_heptapod(**VARIANTS["adaptive"]).config)
    spans = torch.stack(model(random_page(2, 5, 9)).spans) / 2
    assert 0.7 < spans.mean() < 0.95
    assert not any(layer.self_attn.relative_position_bias.any() for layer in model.model.layers)


def test_the_loss_of_spans():
    """The mean over layers, heads and cells with labels, as a share of the radius, in training alone."""
    options = {**VARIANTS["adaptive"], "local_radius": [1, 2]}
    model, page = tiny_heptapod(**options), random_page(2, 4, 5)
    plain = tiny_heptapod(**{**options, "span_loss_weight": 0.0})
    labels = page.clone()
    labels[0, :2] = -100
    for count in (None, 100):
        losses, spans = [], None
        for each in (model, plain):
            torch.manual_seed(3)
            out = each.train()(page, labels=labels, **({} if count is None else {"num_items_in_batch": count}))
            losses.append(out.loss)
            spans = out.spans
        shares = torch.stack([span.mean(1)[labels != -100].sum() / radius for span, radius in zip(spans, (1, 2))])
        expected = 0.5 * shares.mean() / (30 if count is None else count)
        torch.testing.assert_close(losses[0] - losses[1], expected, rtol=1e-3, atol=1e-6)
    losses[0].backward()
    assert all(layer.self_attn.span_proj.weight.grad.abs().max() > 0 for layer in model.model.layers)
    assert all(layer.self_attn.relative_position_bias.grad.abs().max() > 0 for layer in model.model.layers)
    assert torch.equal(model.eval()(page, labels=labels).loss, plain.eval()(page, labels=labels).loss)


@NEEDS_C
@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)  # which would hide another layout
def test_a_compiled_model_learns_the_same(fresh_compiler):
    torch.use_deterministic_algorithms(False)
    model, page, found = tiny_heptapod(**VARIANTS["adaptive"]).train(), random_page(2, 6, 7), []
    for run_model in (model, torch.compile(model)):
        logits = run_model(page).logits  # masks of a compiled loss are drawn by other random numbers
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for one, other in zip(*found):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6


def test_spans_shrink_where_they_cost():
    options = {**VARIANTS["adaptive"], "span_loss_weight": 5.0}
    model, page = tiny_heptapod(**options).train(), random_page(4, 6, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = torch.stack(model(page).spans).mean().item()
    for _ in range(30):
        model(page, labels=page).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.stack(model(page).spans).mean().item() < 0.5 * before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"span_loss_weight": 0.1}, r"`span_loss_weight` \(0.1\) needs `adaptive_span=True`"),
        ({"span_loss_weight": -0.1, "adaptive_span": True}, "`span_loss_weight` must not be negative"),
        ({"adaptive_span": True, "num_global_heads": 4}, "`adaptive_span` needs a local or dilated layer"),
        (
            {"use_relative_position_bias": True, "attention_types": ["global", "global"]},
            "`use_relative_position_bias` needs a local or dilated layer",
        ),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_heptapod(**options)


def test_forms_are_chosen_by_what_is_adapted(monkeypatch):
    """Without spans and biases the operator is the one it was."""
    monkeypatch.setattr(forms, "adaptive_attention", None)
    monkeypatch.setattr(forms, "adaptive_kernel_attention", None)
    given, _, _ = make_inputs("odd sizes")
    local_attention(given["q"], given["k"], given["v"], 2)
