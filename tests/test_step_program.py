"""Operations of programs for one token, each against torch in float64, and what a program and its C source refuse."""

import ctypes
import re

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, relu, rms_norm, silu

from modeling_heptapod.common import step_program
from modeling_heptapod.common.step_program import Slots, StepProgram, load_steps
from modeling_heptapod.common.step_program_source import SOURCE


BATCH, WIDTH = 3, 37
FLOAT = torch.float64


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    if load_steps() is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(step_program, "_PARALLEL", 0)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def run(write, x, *tensors, out=WIDTH, dtype=torch.float32, slots=(), batch=BATCH):
    """What a program makes of rows `x [batch, width]`: `write(program, rows of x, rows of the result, places of tensors)`."""
    program = StepProgram(batch)
    given, result = program.tensor("x", *x.shape), program.tensor("result", batch, out)
    places = [program.tensor(f"tensor {i}", *t.shape, dtype=t.dtype) for i, t in enumerate(tensors)]
    rows, written = program.rows(x.shape[1]), program.rows(out)
    y = torch.zeros(batch, out, dtype=dtype)
    program.load(given, rows)
    program.load(result, written)
    write(program, rows, written, *places)
    program.store(result, written)
    program.compile().run([x, y, *tensors], [], dtype, slots)
    return y


def close(got, expected, error=2e-6):
    torch.testing.assert_close(got.to(FLOAT), expected, rtol=0, atol=error * max(1, float(expected.abs().max())))


def randn(*shape):
    return torch.randn(*shape, dtype=FLOAT)


@pytest.mark.parametrize("height", [1, 3, 4, 29])
@pytest.mark.parametrize("width", [1, 8, 37])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(width, height, has_bias):
    x, weight, bias = randn(BATCH, width), randn(height, width), randn(height)
    tensors = [weight.float()] + [bias.float()] * has_bias
    y = run(lambda p, rows, out, *places: p.linear(rows, out, *places), x.float(), *tensors, out=height)
    close(y, linear(x, weight, bias if has_bias else None))


def test_rows_of_a_linear_layer_are_added_to_a_part_of_what_is_there():
    x, weight, bias = randn(BATCH, WIDTH), randn(20, WIDTH), randn(20)

    def write(program, rows, out, *places):
        program.add(rows, out, adds=False)
        program.linear(rows, out.part(5, 7), *places, adds=True, first=9)

    expected = x.clone()
    expected[:, 5:12] += linear(x, weight, bias)[:, 9:16]
    close(run(write, x.float(), weight.float(), bias.float()), expected)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "silu": silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.cat((torch.linspace(-12, 12, 900), torch.tensor([0, 30, -30, 1e30, -1e30, 1e-30]))).to(FLOAT)
    number = 1 + step_program._ACTIVATION_NAMES.index(name)
    weight, bias = torch.zeros(len(x), 1), x.float()
    write = lambda p, rows, out, *places: p.linear(rows, out, *places, activation=number)
    y = run(write, torch.zeros(BATCH, 1), weight, bias, out=len(x))
    error = (y.to(FLOAT) - ACTIVATIONS[name](x.float().to(FLOAT))).abs()
    assert (error <= 5e-7 * (1 + x.abs())).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_of_what_is_not_finite(name, value):
    number = 1 + step_program._ACTIVATION_NAMES.index(name)
    write = lambda p, rows, out, *places: p.linear(rows, out, *places, activation=number)
    y = run(write, torch.ones(BATCH, 1), torch.full((WIDTH, 1), value))
    assert not y.isfinite().any()


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norms(kind, has_bias):
    x, weight, bias = 3 + randn(BATCH, WIDTH), randn(WIDTH), randn(WIDTH)
    tensors = [weight.float()] + [bias.float()] * has_bias

    def write(program, rows, out, weight, bias=None):
        program.norm(rows, out, weight, bias, 0.5, kind)

    shape = (WIDTH,)
    expected = layer_norm(x, shape, weight, None, 0.5) if kind == "layer_norm" else rms_norm(x, shape, weight, 0.5)
    close(run(write, x.float(), *tensors), expected + bias * has_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 37])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_norm_after_a_token_shift(steps, width, dtype):
    moved = width // 2
    x, weight, state = (t.to(dtype).to(FLOAT) for t in (randn(BATCH, width), randn(width), randn(BATCH, steps, moved)))
    held = state.to(dtype)

    def write(program, rows, out, weight, state):
        program.shifted_norm(rows, out, weight, None, 0.5, "rms_norm", state, steps)

    y = run(write, x.to(dtype), weight.to(dtype), held, out=width, dtype=dtype)
    shifted = torch.cat((x[:, : width - moved], state[:, 0]), dim=1)
    close(y, rms_norm(shifted, (width,), weight, 0.5), 2e-6 if dtype == torch.float32 else 4e-3)
    expected = torch.cat((state[:, 1:], x[:, None, width - moved :]), dim=1)
    assert torch.equal(held, expected.to(dtype))


def test_threads_wait_for_one_another():
    """In programs that take long enough for all threads to begin, on a busy machine, too."""
    batch, width, depth = 8, 512, 200
    x, weight = torch.randn(batch, width), torch.randn(width, width) / width**0.5
    program = StepProgram(batch)
    given, place = program.tensor("x", batch, width), program.tensor("weight", width, width)
    rows = program.rows(width), program.rows(width)
    program.load(given, rows[0])
    for layer in range(depth):
        program.linear(rows[layer % 2], rows[1 - layer % 2], place)
    program.store(given, rows[depth % 2])
    program.compile()
    results = []
    for threads in (1, 3, 3, 7):
        torch.set_num_threads(threads)
        results.append(x.clone())
        program.run([results[-1], weight], [], torch.float32)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_sums():
    x, other = randn(BATCH, WIDTH), randn(BATCH, WIDTH)

    def write(program, rows, out, place):
        others = program.rows(WIDTH)
        program.load(place, others)
        program.add(rows, out, 0.3, others, adds=False)
        program.add(rows, out, 2.0)
        program.add(others, out, 0.5, rows)

    expected = 0.3 * (x - other) + 2 * x + 0.5 * (other - x)
    close(run(write, x.float(), other.float()), expected)


def test_the_gate_of_a_merge():
    x, bias, up = 2 * randn(BATCH, WIDTH), randn(20), randn(BATCH, 20)

    def write(program, rows, out, bias, up):
        program.load(up, out)
        program.gate(rows, out, bias, 0.5)

    y = run(write, x.float(), bias.float(), up.float(), out=20)
    close(y, silu(up * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.5) + bias))


def attention(heads, dim, cached, slots, mask=None, rotary=None, first_head=0, dtype=torch.float32, scale=0.4):
    """Result of one token, its query, key and value `[batch, heads, dim]`, and the cache before and after it."""
    inner = heads * dim
    x = randn(BATCH, 3 * inner).to(dtype)
    keys, values = (randn(BATCH, first_head + heads + 1, cached, dim).to(dtype) for _ in range(2))
    after = keys.clone(), values.clone()
    extra = ([] if rotary is None else list(rotary)) + ([] if mask is None else [mask])

    def write(program, rows, out, keys, values, *more):
        turns = None if rotary is None else more[:2]
        place = None if mask is None else more[-1]
        query, rest = rows.part(0, inner), rows.part(inner, 2 * inner)
        program.attend(query, rest, out, keys, values, heads, scale, turns, first_head, place)

    y = run(write, x, *after, *extra, out=inner, dtype=dtype, slots=[slots])
    query, key, value = x.to(FLOAT).view(BATCH, 3, heads, dim).unbind(1)
    return y.view(BATCH, heads, dim), (query, key, value), (keys, values), after


def expected_attention(query, keys, values, places, mask=None, scale=0.4):
    keys, values = (x.to(FLOAT)[:, :, places] for x in (keys, values))
    scores = (query.unsqueeze(2) @ keys.transpose(2, 3)).squeeze(2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, places], -torch.inf)
    return (scores.softmax(-1).unsqueeze(2) @ values).squeeze(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "slots, places",
    [
        (Slots(0, 0, 0, 1, 300, 1), [0]),
        (Slots(7, 0, 0, 1, 300, 8), range(8)),
        (Slots(63, 0, 0, 1, 300, 64), range(64)),
        (Slots(64, 0, 0, 1, 300, 65), range(65)),
        (Slots(299, 0, 0, 1, 300, 300), range(300)),
        (Slots(31, 4, 0, 3, 300, 10), range(4, 32, 3)),
        (Slots(21, 20, 3, 1, 5, 4), [23, 24, 20, 21]),
    ],
)
def test_attention(slots, places, dtype):
    out, (query, key, value), before, after = attention(2, 9, 300, slots, dtype=dtype, first_head=1)
    for old, new, token in zip(before, after, (key, value)):
        old[:, 1:3, slots.write] = token.to(dtype)
        assert torch.equal(old, new)
    expected = expected_attention(query, after[0][:, 1:3], after[1][:, 1:3], list(places))
    close(out, expected, 2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dim", [2, 8, 34])
@pytest.mark.parametrize("kinds", [1, 2])
def test_attention_with_rotary_positions(dim, kinds):
    rotary = [randn(kinds, dim).float() for _ in range(2)]
    out, (query, key, _), _, after = attention(2, dim, 5, Slots(4, 0, 0, 1, 5, 5), rotary=rotary)
    cos, sin = (x.to(FLOAT) for x in rotary)
    query, key = (x * cos[i] + x.roll(dim // 2, -1) * sin[i] for x, i in ((query, 0), (key, kinds - 1)))
    close(after[0][:, :2, 4], key)
    close(out, expected_attention(query, after[0][:, :2], after[1][:, :2], list(range(5))))


def test_attention_with_a_mask():
    mask = torch.rand(BATCH, 200) < 0.5
    mask[:, :70], mask[:, 150] = False, True
    out, (query, _, _), _, after = attention(2, 8, 200, Slots(150, 0, 0, 1, 200, 151), mask=mask)
    close(out, expected_attention(query, after[0][:, :2], after[1][:, :2], list(range(151)), mask))


@pytest.mark.parametrize("places", [80, slice(0, 64)])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_attention_to_what_is_not_finite(where, value, places):
    x = torch.ones(BATCH, 24)
    caches = [torch.ones(BATCH, 1, 100, 8) for _ in range(2)]
    caches[where == "value"][:, :, places] = value
    write = lambda p, rows, out, *places: p.attend(rows.part(0, 8), rows.part(8, 16), out, *places, 1, 1.0)
    y = run(write, x, *caches, out=8, slots=[Slots(99, 0, 0, 1, 100, 100)])
    expected = expected_attention(x[:, None, :8].to(FLOAT), *caches, list(range(100)), scale=1.0)
    assert torch.equal(y.isnan(), expected[:, 0].isnan()) and torch.equal(y.isinf(), expected[:, 0].isinf())


def test_bf16_is_rounded_to_nearest():
    x = torch.randn(BATCH, 500).bfloat16()
    y = run(lambda p, rows, out: p.add(rows, out, 0.7), x, out=500, dtype=torch.bfloat16)
    assert torch.equal(y, (x.float() * torch.tensor(0.7)).bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


BAD_SLOTS = [
    Slots(5, 0, 0, 1, 5, 5),
    Slots(-1, 0, 0, 1, 5, 5),
    Slots(4, 0, 0, 1, 5, 0),
    Slots(4, 0, 0, 1, 0, 5),
    Slots(4, 1, 0, 1, 5, 5),
    Slots(4, -1, 0, 1, 5, 5),
    Slots(4, 0, 0, 1, 9, 6),
    Slots(4, 0, 1, 2, 9, 3),
    Slots(4, 0, -1, 1, 5, 5),
    Slots(4, 0, 0, -1, 5, 2),
]


@pytest.mark.parametrize("slots", BAD_SLOTS)
def test_slots_outside_of_a_cache(slots):
    with pytest.raises(ValueError, match=r"Keys \[3, 3, 5, 8\] and values .* have no 2 heads or no such slots: Slots"):
        attention(2, 8, 5, slots)


def test_slots_outside_of_a_mask():
    with pytest.raises(ValueError, match="no such slots"):
        attention(2, 8, 5, Slots(4, 0, 0, 1, 5, 5), mask=torch.ones(BATCH, 4, dtype=torch.bool))


def test_missing_tensors_and_slots_are_counted():
    program = StepProgram(1)
    program.load(program.tensor("x", 1, 8), program.rows(8))
    with pytest.raises(ValueError, match="A step needs 1 tensors, got 0"):
        program.compile().run([], [], torch.float32)
    with pytest.raises(ValueError, match="A step needs the slots of 0 caches, got 1"):
        program.run([torch.zeros(1, 8)], [], torch.float32, BAD_SLOTS[:1])


def test_heads_that_the_cache_does_not_have():
    program = StepProgram(1)
    places = [program.tensor("cache", 1, None, None, 8) for _ in range(2)]
    rows = program.rows(24)
    program.attend(rows.part(0, 8), rows.part(8, 16), program.rows(8), *places, 1, 1.0, None, 2)
    caches = [torch.zeros(1, 2, 5, 8) for _ in range(2)]
    with pytest.raises(ValueError, match="have no 3 heads"):
        program.compile().run(caches, [], torch.float32, [Slots(0, 0, 0, 1, 5, 1)])


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, 8), torch.zeros(1, 8).double(), torch.zeros(8, 1).t()[:, ::2], torch.zeros(1, 8, device="meta")],
)
def test_other_tensors_are_named(tensor):
    program = StepProgram(1)
    program.load(program.tensor("past_key_values", 1, 8), program.rows(8))
    with pytest.raises(ValueError, match=r"`past_key_values` must be a contiguous torch.float32 of shape \[1, 8\]"):
        program.compile().run([tensor], [], torch.float32)


class Elsewhere(torch.Tensor):
    is_cpu = False


def without_memory():
    weight = torch.zeros(2, 8)
    weight.untyped_storage().resize_(0)
    return weight


WRONG_WEIGHTS = {
    "none": [],
    "shape": [torch.zeros(3, 8)],
    "dtype": [torch.zeros(2, 8).bfloat16()],
    "device": [torch.zeros(2, 8).as_subclass(Elsewhere)],
    "sparse": [torch.zeros(2, 8).to_sparse()],
    "layout": [torch.zeros(8, 2).t()],
    "negated": [torch._neg_view(torch.zeros(2, 8))],
    "memory": [without_memory()],
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(kind):
    program = StepProgram(1, [(2, 8)]).compile()
    good = torch.zeros(2, 8)
    assert program.addresses_of_weights([good], torch.float32) == [good.data_ptr()]
    addresses = program.addresses_of_weights(WRONG_WEIGHTS[kind], torch.float32)
    assert addresses is None
    with pytest.raises(ValueError, match="`weights` must be contiguous"):
        program.run([], addresses, torch.float32)
    with pytest.raises(ValueError, match="A step needs 1 weights, got 0"):
        program.run([], [], torch.float32)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(step_program, "load_steps", lambda: None)
    with pytest.raises(ValueError, match="There is no compiled C source for single tokens"):
        StepProgram(1).compile().run([], [], torch.float32)


@pytest.mark.parametrize(
    "field, value", [("batch", 0), ("batch", -1), ("threads", 0), ("threads", -1), ("threads", 257)]
)
def test_c_refuses_other_sizes(field, value):
    call = step_program._Call(**{"batch": 1, "threads": 1, field: value})
    assert load_steps().step_program(call) == 2


@pytest.mark.parametrize(
    "field, value", [("kind", -1), ("kind", 9), ("activation", -1), ("activation", 5), ("heads", 0), ("width", 2048)]
)
def test_c_refuses_operations_that_it_does_not_know(field, value):
    attends = step_program._KINDS.index("attend")
    operation = step_program._Operation(**{"kind": attends, "heads": 1, "width": 8, field: value})
    call = step_program._Call(batch=1, threads=1, operations=1, operation=ctypes.addressof(operation))
    assert load_steps().step_program(call) == 2


def fields_of(name):
    """Names of the fields of a structure of the source."""
    source = re.sub(r"/\*.*?\*/", "", SOURCE, flags=re.DOTALL)
    body = next(part for part in source.split("typedef struct {") if f"}} {name};" in part).split("}")[0]
    body = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", body)
    return [
        re.search(r"(\w+)(\[4\])?$", field.strip())[1] for line in body.split(";")[:-1] for field in line.split(",")
    ]


@pytest.mark.parametrize("name, mirror", [("Operation", "_Operation"), ("Slots", "_Slots"), ("StepProgram", "_Call")])
def test_structures_are_those_of_the_source(name, mirror):
    assert [field for field, _ in getattr(step_program, mirror)._fields_] == fields_of(name)
