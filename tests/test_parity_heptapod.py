"""Our operator is the prototype's `Local2DAttention` with queries, keys and values in one, and one head."""

import pytest
import torch

from modeling_heptapod.heptapod.local_attention import local_attention


prototype = pytest.importorskip("heptapod.model", reason="the prototype is not installed: pip install .[parity]")


# Torch computes in float64, the C source, where it is compiled, in float32.
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("radius", [0, 1, 3, 40])
@pytest.mark.parametrize("grid", [(1, 1), (1, 17), (13, 7), (20, 20)])
def test_values_and_gradients_equal_the_prototypes(grid, radius, dtype, close):
    theirs = prototype.Local2DAttention(8, window_size=radius)
    page = torch.randn(2, *grid, 8, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(page)
    cells = page.unsqueeze(1)  # one head
    out = local_attention(cells, cells, cells, radius).squeeze(1)
    expected = theirs(page)
    torch.testing.assert_close(out, expected, rtol=close, atol=close)
    expected_grad = torch.autograd.grad(expected, page, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(out, page, grad)[0], expected_grad, rtol=close, atol=close)
