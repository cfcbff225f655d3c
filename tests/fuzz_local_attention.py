"""Random calls of the compiled local attention: valid ones against torch, invalid ones, which must be refused by name.

    python -m tests.fuzz_local_attention --valid 2000 --invalid 2000 --seed 0 [--sanitize]

With `--sanitize` the source is compiled with gcc's address and undefined behaviour sanitizers, whose runtime must be preloaded.
"""

import random
from unittest.mock import patch

import torch

from modeling_heptapod.heptapod import local_attention as operator
from modeling_heptapod.heptapod import local_attention_cpu
from modeling_heptapod.heptapod.local_attention import local_attention
from tests import fuzzing
from tests.fuzzing import refused, resized


def draw(rng):
    """Arguments of a valid call: queries, keys, values and a gradient, and the others of `local_attention`."""
    batch, heads, dim = rng.randint(1, 2), rng.randint(1, 3), rng.choice((1, 4, 7, 16, 33))
    height, width = rng.randint(1, 20), rng.choice((rng.randint(1, 40), rng.randint(90, 210)))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = batch, heads, height, width, dim

    def cells():
        layout = rng.randrange(5)
        if layout == 1:
            return torch.randn(batch, height, width, heads, dim, generator=generator).permute(0, 3, 1, 2, 4)
        if layout == 2:
            return torch.randn(batch, heads, height + 2, width + 3, dim + 5, generator=generator)[
                :, :, 1:-1, 2:-1, 1:-4
            ]
        if layout == 3:
            return torch.randn(1, 1, height, width, dim, generator=generator).expand(shape)
        if layout == 4:
            return torch.randn(batch, heads, dim, height, width, generator=generator).permute(0, 1, 3, 4, 2)
        return torch.randn(shape, generator=generator)

    dtype = torch.bfloat16 if rng.random() < 0.3 else torch.float32
    mask = None
    if rng.random() < 0.5:
        mask = torch.rand(batch, height, width, generator=generator) > rng.choice((0.1, 0.9, 1.0))
        mask = mask.to(rng.choice((torch.bool, torch.long)))
    radius, dilation = rng.choice((0, 1, 2, 3, 5, rng.randint(6, 32))), rng.choice((1, 1, 2, 3, 50))
    adapts = rng.random() < 0.6
    if radius > 5 and (width > 40 or adapts):
        radius = 5  # the peer is slow
    tensors = [cells().to(dtype) for _ in range(4)]
    span = bias = None
    if adapts and rng.random() < 0.7:
        span = (1.4 * torch.rand(batch, heads, height, width, generator=generator) - 0.2) * radius
    if adapts and (span is None or rng.random() < 0.5):
        bias = rng.choice((0.1, 3.0)) * torch.randn(heads, 2 * radius + 1, 2 * radius + 1, generator=generator)
    return tensors, (radius, dilation, mask, rng.choice((0.2, 1.0, 30.0))), (span, bias)


def attend(q, k, v, grad, arguments, adapted):
    """Output and gradients by their names, in float32."""
    given = {"q": q, "k": k, "v": v, "span": adapted[0], "bias": adapted[1]}
    given = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    radius, dilation, mask, scale = arguments
    options = {"radius": radius, "dilation": dilation, "padding_mask": mask, "scale": scale}
    out = local_attention(**given, **options)
    grads = torch.autograd.grad(out, list(given.values()), grad)
    found = {"output": out, **{f"grad_{name}": x for name, x in zip(given, grads)}}
    return {name: x.detach().float() for name, x in found.items()}


def valid_call(seed):
    """Compare the output and all gradients with those of torch."""
    rng = random.Random(seed)
    (q, k, v, grad), arguments, adapted = draw(rng)
    torch.set_num_threads(rng.choice((1, 1, 3)))
    with patch.object(local_attention_cpu, "_PARALLEL", 0):
        compiled = attend(q, k, v, grad, arguments, adapted)
    precise = [None if x is None else x.double() for x in adapted]
    with patch.object(operator, "has_kernel", lambda *_: False):
        expected = attend(*(x.double() for x in (q, k, v, grad)), arguments, precise)
    for name, got in compiled.items():
        wanted = expected[name]
        close = 1e-2 if q.dtype == torch.bfloat16 else 1e-4
        # Gradients of queries and keys are differences times the scale: where weights are 0 or 1, rounding is all of them. With
        # spans a weight of 1 is a quotient of two shares, which rounds, too.
        exact = adapted[0] is None
        least = (1e-3 if exact else 1e-2) * (max(1.0, arguments[3]) if name in ("grad_q", "grad_k") else 1.0)
        # Those of spans and biases are sums of such differences, which may cancel.
        least = 0.1 * max(1.0, arguments[3]) if name in ("grad_span", "grad_bias") else least
        error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(least)
        assert error < close, f"seed {seed}: {name} is off by {error:.2g}"


def invalid_call(seed):
    """Spoil one tensor of a valid call: a `ValueError` must name it."""
    rng = random.Random(seed)
    (q, k, v, grad), (radius, dilation, _, scale), (span, bias) = draw(rng)
    batch, heads, height, width, _ = q.shape
    given = {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad,
        "totals": torch.zeros(2, batch, heads, height, width),
        "padding_mask": torch.ones(batch, height, width, dtype=torch.bool),
        **{name: x for name, x in (("span", span), ("bias", bias)) if x is not None},
    }
    name = rng.choice([name for name in given if name != "q"])
    wrong = rng.choice((resized(rng, given[name]), given[name].double(), given[name].to("meta")))
    given = {**given, name: wrong, "radius": radius, "dilation": dilation, "scale": scale}
    refused(lambda: local_attention_cpu.backward(**given), name)
    if name not in ("grad_out", "totals"):
        del given["grad_out"], given["totals"]
        refused(lambda: local_attention_cpu.forward(**given), name)


def fuzz(valid, invalid, seed=0):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    fuzzing.run(valid_call, invalid_call, valid, invalid, seed)


if __name__ == "__main__":
    fuzzing.main(__doc__, local_attention_cpu._library, fuzz)
