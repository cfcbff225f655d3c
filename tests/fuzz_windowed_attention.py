"""Random calls of the compiled windowed attention: valid ones against torch, invalid ones, which must be refused by name.

    python -m tests.fuzz_windowed_attention --valid 2000 --invalid 2000 --seed 0 [--sanitize]

With `--sanitize` the source is compiled with gcc's address and undefined behaviour sanitizers, whose runtime must be preloaded.
"""

import random
from unittest.mock import patch

import torch
from torch import nn

from modeling_heptapod.hierarchical_lm import windowed_attention_cpu
from modeling_heptapod.hierarchical_lm.windowed_attention import visible, window_reach
from modeling_heptapod.hierarchical_lm.windowed_attention_operator import kernel_attention
from tests import fuzzing
from tests.fuzzing import refused, resized


def draw(rng):
    """Arguments of a valid call: queries, keys, values and a gradient; what they see; and where that is, as a mask."""
    batch, heads, dim = rng.randint(1, 2), rng.randint(1, 3), rng.choice((1, 4, 7, 16, 33))
    length = rng.choice((rng.randint(1, 40), rng.randint(90, 210), rng.randint(300, 900)))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = batch, length, heads, dim

    def steps():
        layout = rng.randrange(4)
        if layout == 1:
            return torch.randn(batch, heads, length, dim, generator=generator).transpose(1, 2)
        if layout == 2:
            return torch.randn(batch, length, 3, heads + 1, dim + 2, generator=generator)[:, :, 1, 1:, 1:-1]
        if layout == 3:
            return torch.randn(1, length, 1, dim, generator=generator).expand(shape)
        return torch.randn(shape, generator=generator)

    dtype = torch.bfloat16 if rng.random() < 0.3 else torch.float32
    window, block = rng.choice((1, 2, 5, rng.randint(6, 130), 512)), rng.random() < 0.3
    dilation = rng.choice((1, 1, 2, 3, 50))
    positions = segments = None
    if rng.random() < 0.4:  # two texts in a row
        first = dilation * rng.randint(0, length // dilation)
        positions = torch.cat((torch.arange(first), torch.arange(length - first))).expand(batch, -1)
        segments = (torch.arange(length) >= first).long().expand(batch, -1)
    else:
        positions = torch.arange(length)[None]
    mask = visible(positions, length, window, dilation, block, segments)
    reach = window_reach(positions, window, dilation, block)
    tensors = [steps().to(dtype) for _ in range(4)]
    return tensors, (reach, 2 * window if block else window, dilation, rng.choice((0.2, 1.0, 30.0))), mask


def valid_call(seed):
    """Compare the output and all gradients with those of torch in float64."""
    rng = random.Random(seed)
    tensors, arguments, mask = draw(rng)
    torch.set_num_threads(rng.choice((1, 1, 3)))
    scale = arguments[-1]

    def masked(*qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1), scale=scale).transpose(1, 2)

    results = []
    for dtype, attend in ((None, lambda *qkv: kernel_attention(*qkv, *arguments)), (torch.float64, masked)):
        *inputs, grad = (x.detach().to(dtype or x.dtype) for x in tensors)
        inputs = [x.requires_grad_() for x in inputs]
        with patch.object(windowed_attention_cpu, "_PARALLEL", 0):
            out = attend(*inputs)
            results.append([x.detach().float() for x in (out, *torch.autograd.grad(out, inputs, grad))])
    for name, got, wanted in zip(("output", "grad_q", "grad_k", "grad_v"), *results):
        close = 1e-2 if tensors[0].dtype == torch.bfloat16 else 1e-4
        # Gradients of queries and keys are differences of dot products times the scale: where weights are 0 or 1, rounding is all
        # of them.
        size = scale * tensors[0].shape[-1] ** 0.5
        least = 1e-3 * (max(1.0, size) if name in ("grad_q", "grad_k") else 1.0)
        error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(least)
        assert error < close, f"seed {seed}: {name} is off by {error:.2g}"


def invalid_call(seed):
    """Spoil one tensor of a valid call: a `ValueError` must name it."""
    rng = random.Random(seed)
    (q, k, v, grad), (reach, span, dilation, scale), _ = draw(rng)
    batch, length, heads, _ = q.shape
    totals = torch.zeros(2, batch, heads, length)
    given = {"q": q, "k": k, "v": v, "grad_out": grad, "totals": totals, "reach": reach}
    name = rng.choice([name for name in given if name != "q"])
    wrong = rng.choice((resized(rng, given[name]), given[name].double(), given[name].to("meta")))
    given = {**given, name: wrong, "span": span, "dilation": dilation, "scale": scale}
    if name == "reach" and wrong.shape in ((1, length), (batch, length)) and wrong.dtype == torch.int32:
        return  # one row for all, or one each
    refused(lambda: windowed_attention_cpu.backward(**given), name)
    if name not in ("grad_out", "totals"):
        del given["grad_out"], given["totals"]
        refused(lambda: windowed_attention_cpu.forward(**given), name)


def fuzz(valid, invalid, seed=0):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    fuzzing.run(valid_call, invalid_call, valid, invalid, seed)


if __name__ == "__main__":
    fuzzing.main(__doc__, windowed_attention_cpu._library, fuzz)
