"""Fast paths of windowed attention against its loops."""

import pytest
import torch
from torch import nn

from modeling_heptapod.hierarchical_lm.windowed_attention import (
    first_key,
    naive_windowed_attention,
    step_attention,
    visible,
    windowed_attention,
)


WINDOWS = [(None, False), (1, False), (2, False), (5, False), (40, False), (1, True), (3, True), (40, True)]


def attend(query, key, value, mask, is_causal):
    assert mask is None or mask.any(-1).all(), "a query without keys"
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal).transpose(1, 2)


def draw(batch, length, heads=2, channels=4):
    return [torch.randn(batch, length, heads, channels, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 8, 33, 70])
@pytest.mark.parametrize("window, block", WINDOWS)
def test_whole_sequences(window, block, length, dilation):
    qkv = draw(2 if length < 70 else 1, length, heads=2 if length < 70 else 1)
    positions = torch.arange(length).expand(len(qkv[0]), -1)
    expected = naive_windowed_attention(*qkv, positions, window, dilation, block)
    out = windowed_attention(attend, *qkv, window, dilation, block)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    if length <= 33:
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), qkv)
        for grad, other in zip(grads, torch.autograd.grad((expected * weight).sum(), qkv)):
            torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("window, block", WINDOWS)
def test_packed_sequences(window, block, dilation):
    lengths = (4, 40, 12, 20), (72, 4)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    qkv = draw(2, 76, heads=1)
    expected = naive_windowed_attention(*qkv, positions, window, dilation, block, segments)
    out = windowed_attention(attend, *qkv, window, dilation, block, positions, segments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    # The last sequence ends in the middle of a phase.
    cut = [x[:, :75] for x in qkv]
    out = windowed_attention(attend, *cut, window, dilation, block, positions[:, :75], segments[:, :75])
    torch.testing.assert_close(out, expected[:, :75], rtol=1e-10, atol=1e-10)


def test_packed_blocks_above_33():
    """A step sees up to two blocks, here of 34: chunks have to be longer than one."""
    positions = torch.cat([torch.arange(100), torch.arange(40)])[None]
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor([100, 40]))[None]
    qkv = draw(1, 140, heads=1)
    expected = naive_windowed_attention(*qkv, positions, 34, 1, True, segments)
    out = windowed_attention(attend, *qkv, 34, 1, True, positions, segments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("window, block", WINDOWS)
def test_masks(window, block, dilation):
    """Queries that continue, in rows that have begun at different times: row 1 has no keys at its first three places."""
    positions = torch.stack([torch.arange(20), torch.arange(20) - 3])
    q, k, v = draw(2, 20)
    expected = naive_windowed_attention(q[:, -6:], k, v, positions, window, dilation, block)
    mask = visible(positions, 6, window, dilation, block).unsqueeze(1)
    out = attend(q[:, -6:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, False)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 7, 20])
def test_one_step(length, window, dilation):
    q, k, v = draw(2, length)
    expected = naive_windowed_attention(q[:, -1:], k, v, torch.arange(length).expand(2, -1), window, dilation)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = step_attention(attend, q[:, :, -1:], k, v, window, dilation)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    first = first_key(length, window, dilation)
    read = len(range(first, length, dilation))
    assert read <= (window or length) and range(first, length, dilation)[-1] == length - 1


def test_the_loops_follow_the_words():
    """Windows and phases as they are described, by the keys that receive a gradient."""
    q, k, v = draw(1, 12, heads=1)

    def seen(**how):
        out = naive_windowed_attention(q, k, v, torch.arange(12)[None], **how)
        return (
            torch.autograd.grad(out[:, 9].sum(), v, allow_unused=True)[0].abs().sum((0, 2, 3)).nonzero()[:, 0].tolist()
        )

    assert seen() == list(range(10))
    assert seen(window=3) == [7, 8, 9]
    assert seen(window=2, dilation=4) == [5, 9]
    assert seen(window=4, block=True) == list(range(4, 10))
    assert seen(window=1, dilation=2, block=True) == [7, 9]
