"""Local attention on a grid, as torch computes it, against its own loop over cells: values, gradients, borders, masks, memory.

Kernels have tests of their own, in `test_local_attention_cpu.py` and `test_local_attention_triton.py`.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_heptapod.heptapod import local_attention as operator
from modeling_heptapod.heptapod import tiled_attention as tiles
from modeling_heptapod.heptapod.grid_positions import grid_rotary, rotate
from modeling_heptapod.heptapod.local_attention import attention_weights, local_attention, naive_local_attention
from tests.tiny import mostly_slow


GRIDS = [(1, 1), (1, 17), (13, 7), (32, 32)]
WINDOWS = [0, 1, 3, 40]


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    monkeypatch.setattr(operator, "has_kernel", lambda q, radius: False)


@pytest.fixture
def tiled(monkeypatch):
    """No grid is small enough to be taken by rows, and no step holds more than a few tiles."""
    monkeypatch.setattr(operator, "_DENSE_CELLS", 0)
    monkeypatch.setattr(operator, "_DENSE_LIMIT", 0)
    monkeypatch.setattr(tiles, "_CPU_STEP", 4000)


def make_inputs(height, width, batch=2, heads=2, head_dim=4, dtype=torch.float64, share_real=0.7):
    """Random queries, keys, values, a gradient of the output and a padding mask."""
    qkvg = [torch.randn(batch, heads, height, width, head_dim, dtype=dtype) for _ in range(4)]
    return *qkvg, torch.rand(batch, height, width) < share_real


def with_gradients(function, q, k, v, grad):
    """The output and the gradients of `(output * grad).sum()`."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def check_against_naive(height, width, radius, dilation, padded, dtypes=(torch.float64, torch.float32), **shape):
    *qkvg, mask = make_inputs(height, width, **shape)
    arguments = (radius, dilation, mask if padded else None)
    expected = with_gradients(lambda *qkv: naive_local_attention(*qkv, *arguments), *qkvg)
    for dtype in dtypes:
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
        got = with_gradients(lambda *qkv: local_attention(*qkv, *arguments), *(x.to(dtype) for x in qkvg))
        for name, one, other in zip(("out", "grad q", "grad k", "grad v"), got, expected):
            assert one.dtype == dtype
            torch.testing.assert_close(
                one.double(), other, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: name + m
            )


# --- against the loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("radius", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS[:3])
def test_small_grids(grid, radius, dilation, padded):
    check_against_naive(*grid, radius, dilation, padded)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("radius", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS[:3])
def test_small_grids_in_tiles(grid, radius, dilation, padded, tiled):
    check_against_naive(*grid, radius, dilation, padded)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("radius", mostly_slow(WINDOWS, (1,)))
def test_a_grid_of_many_tiles(radius, dilation):
    check_against_naive(32, 32, radius, dilation, padded=dilation != 2, batch=2 if radius < 40 else 1)


# Windows that reach over one border, over both, over the whole of one axis; axes that tiles do not divide.
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("case", [(21, 5, 2), (5, 21, 2), (34, 9, 16), (9, 35, 15), (17, 17, 6), (37, 1, 17)])
def test_borders(case, padded, tiled):
    height, width, radius = case
    check_against_naive(height, width, radius, 1, padded, heads=1)


# Few rows in the last strip, one row, none; more strips than a window spans, and fewer.
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("case", [(35, 6, 1), (33, 3, 3), (24, 17, 3), (16, 16, 3), (25, 10, 9)])
def test_strips_of_rows(case, padded):
    height, width, radius = case
    assert len(operator._strips(height, radius)) > 1 and operator._is_small(height, width, radius)
    check_against_naive(height, width, radius, 1, padded, heads=1)


@pytest.mark.parametrize("step", [1, 10_000, 30_000, 2**30])
def test_steps_of_any_size(step, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_STEP", step)
    check_against_naive(18, 19, 2, 1, padded=True, batch=3, dtypes=[torch.float64])


def test_the_whole_grid():
    for padded in (True, False):
        check_against_naive(5, 9, None, 1, padded)
        check_against_naive(5, 9, None, 3, padded)


@pytest.mark.parametrize("grid", [(9, 11), (18, 17)])
def test_a_scale_of_ones_own(grid):
    q, k, v, _, mask = make_inputs(*grid)
    expected = naive_local_attention(q, k, v, 2, padding_mask=mask, scale=1.7)
    torch.testing.assert_close(local_attention(q, k, v, 2, padding_mask=mask, scale=1.7), expected)
    weights = attention_weights(q, k, 2, padding_mask=mask, scale=1.7)
    torch.testing.assert_close((weights @ v.flatten(2, 3)).view(q.shape), expected)


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradcheck(dilation, tiled):
    q, k, v, _, mask = make_inputs(7, 9, batch=1, heads=1, head_dim=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: local_attention(*qkv, 1, dilation, mask), inputs)


def test_inputs_that_are_not_contiguous(tiled):
    qkvg = [torch.randn(2, 18, 19, 2, 4, dtype=torch.float64).permute(0, 3, 1, 2, 4) for _ in range(4)]
    got = with_gradients(lambda *qkv: local_attention(*qkv, 2), *qkvg)
    expected = with_gradients(lambda *qkv: local_attention(*qkv, 2), *(x.contiguous() for x in qkvg))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other)


# --- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(9, 11), (23, 19)])  # dense and tiled
@pytest.mark.parametrize("radius, dilation", [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 3)])
def test_a_cell_reaches_its_window_and_no_further(grid, radius, dilation):
    height, width = grid
    q, k, v, _, _ = make_inputs(*grid, batch=1, heads=1)
    v.requires_grad_()
    out = local_attention(q, k, v, radius, dilation)
    for y, x in ((0, 0), (height // 2, width // 2), (height - 1, 3), (5, width - 1)):
        (grad,) = torch.autograd.grad(out[0, 0, y, x].sum(), v, retain_graph=True)
        offsets = [dilation * a for a in range(-radius, radius + 1)]
        window = {(y + a, x + b) for a in offsets for b in offsets if 0 <= y + a < height and 0 <= x + b < width}
        assert {tuple(place) for place in grad[0, 0].abs().sum(-1).nonzero().tolist()} == window


@pytest.mark.parametrize("radius", [1, 3, None])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_page_on_a_larger_grid_is_the_page_alone(radius, dilation):
    q, k, v, grad, _ = make_inputs(18, 17)
    alone = with_gradients(lambda *qkv: local_attention(*qkv, radius, dilation), q, k, v, grad)
    larger = [torch.randn(2, 2, 26, 30, 4, dtype=torch.float64) for _ in range(4)]
    mask = torch.zeros(2, 26, 30)
    place = (..., slice(4, 22), slice(7, 24), slice(None))
    mask[:, 4:22, 7:24] = 1
    for whole, page in zip(larger, (q, k, v, grad)):
        whole[place] = page
    larger[3] = larger[3] * mask[:, None, :, :, None]  # nobody asks for the output of pads
    within = with_gradients(lambda *qkv: local_attention(*qkv, radius, dilation, mask), *larger)
    for one, other in zip(within, alone):
        torch.testing.assert_close(one[place], other)
    for grad_of_one in within[1:]:
        assert torch.equal(grad_of_one * (1 - mask[:, None, :, :, None]), torch.zeros_like(grad_of_one))


@pytest.mark.parametrize("grid", [(9, 11), (23, 19)])
@pytest.mark.parametrize("radius", [1, 2, None])
def test_cells_that_see_nothing_give_zeros(grid, radius):
    *qkvg, mask = make_inputs(*grid)
    mask[0], mask[1, 5:, 5:] = False, False
    out, *grads = with_gradients(lambda *qkv: local_attention(*qkv, radius, 1, mask), *qkvg)
    sees = torch.zeros_like(mask)
    reach = max(grid) if radius is None else radius
    for page, y, x in mask.nonzero().tolist():
        sees[page, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = True
    assert (~sees).any() and sees.any()
    blind = ~sees[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(out[blind], torch.zeros_like(out[blind])) and (out[~blind].abs().sum(-1) > 0).all()
    assert torch.equal(grads[0][blind], torch.zeros_like(out[blind]))
    assert all(grad.isfinite().all() for grad in grads)
    weights = attention_weights(*qkvg[:2], radius, padding_mask=mask)
    torch.testing.assert_close(weights.sum(-1).view(2, 2, *grid), (~blind).double())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("radius", [0, 2, 40, None])
def test_weights_times_values_are_the_output(radius, dilation, padded):
    q, k, v, _, mask = make_inputs(18, 17)
    mask = mask if padded else None
    weights = attention_weights(q, k, radius, dilation, mask)
    out = (weights @ v.flatten(2, 3)).view(v.shape)
    torch.testing.assert_close(out, local_attention(q, k, v, radius, dilation, mask))


# --- numbers ---------------------------------------------------------------------------------------------------------


def relative_rms(x, expected):
    return ((x.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("radius", [1, 3])
def test_half_precision_in_tiles_is_as_good_as_rounding_the_exact_result(radius, dtype):
    q, k, v, grad, mask = make_inputs(21, 42, head_dim=8)
    half = [x.to(dtype) for x in (2 * q, k, v, grad)]
    got = with_gradients(lambda *qkv: local_attention(*qkv, radius, 1, mask), *half)
    exact = with_gradients(lambda *qkv: naive_local_attention(*qkv, radius, 1, mask), *(x.double() for x in half))
    for one, other in zip(got, exact):
        assert one.dtype == dtype
        assert relative_rms(one, other) <= 1.1 * relative_rms(other.to(dtype), other)


@pytest.mark.parametrize("radius", [1, 3, None])
def test_half_precision_on_small_grids(radius):
    q, k, v, grad, mask = make_inputs(9, 11, head_dim=8)
    half = [x.bfloat16() for x in (2 * q, k, v, grad)]
    got = with_gradients(lambda *qkv: local_attention(*qkv, radius, 1, mask), *half)
    exact = with_gradients(lambda *qkv: naive_local_attention(*qkv, radius, 1, mask), *(x.double() for x in half))
    for one, other in zip(got, exact):
        assert one.dtype == torch.bfloat16
        assert relative_rms(one, other) < 0.01


@pytest.mark.parametrize("way", ["by rows", "in tiles"])
def test_autocast_does_not_reach_inside(way, request):
    if way == "in tiles":
        request.getfixturevalue("tiled")
    grid = (23, 19)
    *qkvg, mask = make_inputs(*grid, dtype=torch.float32)
    expected = with_gradients(lambda *qkv: local_attention(*qkv, 2, 1, mask), *qkvg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(lambda *qkv: local_attention(*qkv, 2, 1, mask), *qkvg)
    for one, other in zip(got, expected):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("way", ["by rows", "in tiles"])
def test_extreme_logits(way, request):
    if way == "in tiles":
        request.getfixturevalue("tiled")
    grid = (23, 19)
    q, k, v, grad, mask = make_inputs(*grid)
    for scale in (1e3, -1e3):
        exact = naive_local_attention(q, k, v, 2, 1, mask, scale)
        out, *grads = with_gradients(
            lambda *qkv, scale=scale: local_attention(*qkv, 2, 1, mask, scale), *(x.float() for x in (q, k, v, grad))
        )
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
        assert all(x.isfinite().all() for x in grads)


def test_dropout(tiled):
    q, k, v, _, mask = make_inputs(18, 19)
    expected = local_attention(q, k, v, 2, 1, mask)

    def dropped(q, k, v, seed=0):
        torch.manual_seed(seed)
        return local_attention(q, k, v, 2, 1, mask, dropout=0.4)

    assert torch.equal(dropped(q, k, v), dropped(q, k, v))
    assert not torch.equal(dropped(q, k, v), dropped(q, k, v, seed=1))
    mean = torch.stack([dropped(q, k, v, seed) for seed in range(400)]).mean(0)
    assert (mean - expected).square().mean() < 0.01 * expected.square().mean()
    inputs = [x[:1, :1, :7, :9, :2].clone().requires_grad_() for x in (q, k, v)]
    mask = mask[:1, :7, :9]
    assert torch.autograd.gradcheck(dropped, inputs)  # the same weights are gone in both passes


def test_dropout_on_small_grids():
    q, k, v, _, _ = make_inputs(9, 11)
    torch.manual_seed(0)
    assert not torch.equal(local_attention(q, k, v, 2, dropout=0.4), local_attention(q, k, v, 2))


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation inside it returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
def test_no_tensor_grows_faster_than_the_grid(padded, dilation):
    for side in (32, 64):
        q, k, v, grad, mask = make_inputs(side, side, batch=1, heads=1, dtype=torch.float32)
        arguments = (3, dilation, mask if padded else None)
        with Largest() as largest:
            with_gradients(lambda *qkv, rest=arguments: local_attention(*qkv, *rest), q, k, v, grad)
        # Inputs with their halos, or what one step works with.
        assert largest.bytes <= max(1.7 * q.nbytes, 4 * tiles._CPU_STEP)


def bytes_held(function):
    """Bytes that the allocator has given out and not got back when `function` returns, its results included."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages()), result


@pytest.mark.parametrize("padded", [True, False])
def test_nothing_but_the_inputs_is_held_for_the_backward_pass(padded):
    q, k, v, _, mask = make_inputs(40, 40, dtype=torch.float32, head_dim=16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    held, out = bytes_held(lambda: local_attention(*inputs, 3, 1, mask if padded else None))
    assert out.nbytes <= held <= (1.05 + padded * 0.1) * out.nbytes  # with a mask, which cells see anything
    out.sum().backward()


def test_backward_twice_is_the_same():
    q, k, v, _, _ = make_inputs(20, 20)
    out = local_attention(q, k.requires_grad_(), v, 2)
    first = torch.autograd.grad(out.sum(), k, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), k)[0])


class OwnOverlap(TorchDispatchMode):
    """Whether an addition in place ever wrote to one place twice: in parallel one of the two would get lost."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add_.Tensor:
            places = sum(
                torch.arange(size).view(-1, *[1] * (args[0].dim() - 1 - axis)) * stride
                for axis, (size, stride) in enumerate(zip(args[0].shape, args[0].stride()))
            )
            self.found |= places.unique().numel() < args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", [4000, 2**30])
def test_no_addition_overlaps_with_itself(step, tiled, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_STEP", step)
    with OwnOverlap() as overlap:
        with_gradients(lambda *qkv: local_attention(*qkv, 3), *make_inputs(23, 22)[:4])
    assert not overlap.found


def test_no_softmax_of_nothing(monkeypatch):
    """Not every backend has one."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask, **kwargs):
        assert attn_mask.any(-1).all()
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v, _, mask = make_inputs(9, 11)
    for radius in (1, None):
        local_attention(q, k, v, radius, padding_mask=mask & (torch.arange(11) > 7))
        local_attention(q, k, v, radius, padding_mask=mask & False)


def test_what_inference_leaves_behind_serves_training():
    operator._window_bias.cache_clear()
    q, k, v = (torch.randn(1, 1, 5, 6, 4, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        local_attention(q, k, v, radius=1)
    out = local_attention(q, k, v, radius=1)
    assert operator._window_bias.cache_info().hits == 1
    torch.testing.assert_close(out, naive_local_attention(q, k, v, radius=1), rtol=1e-5, atol=1e-6)
    out.sum().backward()  # raises, were the window an inference tensor


def test_what_fake_tensors_leave_behind_serves_real_ones():
    """Memory estimators and tracers run a model on fake tensors, which must not be kept."""
    operator._window_bias.cache_clear()
    q, k, v = (torch.randn(1, 1, 5, 6, 4) for _ in range(3))
    expected = naive_local_attention(q, k, v, radius=1)
    with FakeTensorMode() as mode:
        local_attention(*(mode.from_tensor(x) for x in (q, k, v)), radius=1)
    out = local_attention(q, k, v, radius=1)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert operator._window_bias.cache_info().currsize > 0


@pytest.mark.slow
@pytest.mark.parametrize("grid, dilation", [((9, 11), 1), ((18, 19), 1), ((9, 11), 2), ((37, 39), 2)])
def test_compiled_equals_eager(grid, dilation):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    *qkvg, mask = make_inputs(*grid, dtype=torch.float32)
    expected = with_gradients(lambda *qkv: local_attention(*qkv, 2, dilation, mask), *qkvg)
    compiled = torch.compile(lambda *qkv: local_attention(*qkv, 2, dilation, mask), fullgraph=True)
    for one, other in zip(with_gradients(compiled, *qkvg), expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager_on_a_small_grid_without_pads():
    torch._dynamo.reset()
    *qkvg, _ = make_inputs(9, 11, dtype=torch.float32)
    expected = with_gradients(lambda *qkv: local_attention(*qkv, 2), *qkvg)
    compiled = torch.compile(lambda *qkv: local_attention(*qkv, 2), fullgraph=True)
    for one, other in zip(with_gradients(compiled, *qkvg), expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- positions -------------------------------------------------------------------------------------------------------


def test_rotary_turns_the_first_half_by_the_row_and_the_second_by_the_column():
    height, width, head_dim, theta = 3, 5, 12, 50.0
    cos, sin = grid_rotary(height, width, head_dim, theta)
    assert cos.shape == sin.shape == (height, width, head_dim) and cos.dtype == torch.float32
    x = torch.randn(2, 2, height, width, head_dim, dtype=torch.float64)
    turned = rotate(x, cos, sin)
    for y in range(height):
        for column in range(width):
            for half, place in ((0, y), (6, column)):
                for c in range(3):
                    angle = place * theta ** (-c / 3)
                    a, b = x[..., y, column, half + c], x[..., y, column, half + c + 3]
                    expected = (
                        a * math.cos(angle) - b * math.sin(angle),
                        b * math.cos(angle) + a * math.sin(angle),
                    )
                    for offset, value in zip((0, 3), expected):
                        torch.testing.assert_close(
                            turned[..., y, column, half + c + offset], value, rtol=1e-6, atol=1e-6
                        )


def test_rotated_products_depend_on_the_way_between_two_cells_only():
    q, k = torch.randn(2, 1, 1, 1, 1, 16, dtype=torch.float64)
    cos, sin = grid_rotary(9, 9, 16, 100.0)
    turned_q, turned_k = (rotate(x.expand(1, 1, 9, 9, 16), cos, sin)[0, 0] for x in (q, k))

    def product(one, other):
        return turned_q[one] @ turned_k[other]

    torch.testing.assert_close(product((1, 2), (4, 3)), product((3, 5), (6, 6)), rtol=1e-5, atol=1e-5)
    assert abs(product((1, 2), (4, 3)) - product((1, 2), (3, 4))) > 1e-3  # rows are not columns
    assert abs(product((1, 2), (4, 3)) - product((4, 3), (1, 2))) > 1e-3


def test_rotation_keeps_dtype_and_length():
    cos, sin = grid_rotary(4, 4, 8, 100.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(1, 2, 4, 4, 8).to(dtype)
        turned = rotate(x, cos, sin)
        assert turned.dtype == dtype
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=0.02, atol=0.02)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input():
    q, k, v, _, mask = make_inputs(3, 4)
    for wrong in (q.long(), q.float()):
        with pytest.raises(TypeError, match=r"dtype.*`k`"):
            local_attention(q, wrong, v, 1)
    with pytest.raises(TypeError, match=r"dtype.*`q`"):
        local_attention(q.long(), k.long(), v.long(), 1)
    for wrong in (v[0], v[:, :1], v[..., :2], v[:, :, :2]):
        with pytest.raises(ValueError, match=r"shape.*`v`"):
            local_attention(q, k, wrong, 1)
    empty = q[:, :, :0]
    with pytest.raises(ValueError, match=r"\[2, 2, 0, 4, 4\]"):
        local_attention(empty, empty, empty, 1)
    with pytest.raises(ValueError, match=r"`radius`.*-1"):
        local_attention(q, k, v, -1)
    with pytest.raises(ValueError, match=r"`dilation`.*0"):
        local_attention(q, k, v, 1, 0)
    for wrong in (mask[0], mask[:, :2], mask[:1], mask[:, None]):
        with pytest.raises(ValueError, match=r"`padding_mask`.*\[2, 3, 4\]"):
            local_attention(q, k, v, 1, padding_mask=wrong)
    for rate in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"`dropout`.*{rate}"):
            local_attention(q, k, v, 1, dropout=rate)
    with pytest.raises(ValueError, match=r"`head_dim`.*6"):
        grid_rotary(2, 2, 6, 100.0)
