"""Random calls of the compiled mixing step: valid ones against torch, invalid ones, which must be refused by name.

    python -m tests.fuzz_focus --valid 2000 --invalid 2000 --seed 0 [--sanitize]

With `--sanitize` the source is compiled with gcc's address and undefined behaviour sanitizers, whose runtime must be preloaded.
"""

import random

import torch

from modeling_heptapod import LeapConfig, LeapForCausalLM, MultiGridConfig, MultiGridForCausalLM
from modeling_heptapod.leap import focus_cpu, focus_operator
from modeling_heptapod.leap.focus import FocusSettings, FocusState, focus_mixing
from modeling_heptapod.leap.focus_functions import OUTPUT_GATES, WEIGHT_FUNCTIONS
from modeling_heptapod.leap.focus_recurrent import pack_state, packed_shape
from tests import fuzzing
from tests.fuzzing import refused, resized, spoiled


HEAD_DIMS = (4, 7, 16)


def draw(rng):
    """Arguments of a valid call: `qfkv`, settings and keyword arguments of `focus_mixing`."""
    batch, heads, dim = rng.randint(1, 3), rng.randint(1, 3), rng.choice(HEAD_DIMS)
    seq = rng.choice((1, 2, 3, rng.randint(4, 60), rng.randint(120, 135), rng.randint(200, 300)))
    gate = rng.choice([name for name, kind in OUTPUT_GATES.items() if kind.kernel is not None])
    settings = FocusSettings(
        scale=rng.choice((0.1, 0.5, 10 / dim)),
        normalize=rng.random() < 0.5,
        weight_function=rng.choice([name for name, kind in WEIGHT_FUNCTIONS.items() if kind.kernel is not None]),
        output_gate=gate,
        window=rng.choice((None, 1, 2, rng.randint(3, 63), 64)),
        sink_weight=rng.choice((0.0, 0.0, 1e-6, 0.7)),
    )
    parts, generator = 3 if gate == "none" else 4, torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    qfkv = normal(batch, seq, parts, heads, dim)
    layout = rng.randrange(4)
    if layout == 1:
        qfkv = normal(seq, batch, parts, heads, dim).transpose(0, 1)
    elif layout == 2:
        qfkv = normal(batch, seq + 3, parts, heads, dim + 5)[:, 2:-1, :, :, 1:-4]
    elif layout == 3:
        qfkv = normal(1, seq, parts, heads, dim).expand(batch, -1, -1, -1, -1)
    if rng.random() < 0.3:
        qfkv = qfkv.bfloat16()
    given = {}
    if rng.random() < 0.4:
        given["alibi_slopes"] = rng.choice((1.0, 0.01)) * torch.rand(heads, generator=generator)
    if gate != "none" and dim % 2 == 0 and rng.random() < 0.5:
        rows = rng.choice((1, batch))
        angles = 6 * torch.rand(rows, seq, dim // 2, generator=generator).repeat(1, 1, 2)
        given["rotary"] = angles.cos(), angles.sin()
    if rng.random() < 0.4:
        mask = torch.rand(batch, seq, generator=generator) > rng.choice((0.1, 0.9))
        given["padding_mask"] = mask.to(rng.choice((torch.bool, torch.long, torch.float32)))
    if rng.random() < 0.3:
        ids = (torch.rand(batch, seq, generator=generator) < 0.1).cumsum(1)
        given["segment_ids"] = ids.to(rng.choice((torch.long, torch.int)))
    if rng.random() < 0.4:
        channels, past = parts // 4 * dim + dim, ()
        if settings.window is not None:
            past = (rng.randint(0, settings.window - 1),)
        given["initial_state"] = FocusState(normal(batch, heads, *past), normal(batch, heads, *past, channels))
    return qfkv, settings, given


def run(qfkv, settings, given, weight):
    """Output, state and gradient, in float32."""
    qfkv = qfkv.detach().clone().requires_grad_()
    out, state = focus_mixing(qfkv, settings, **given)
    (out * weight).sum().backward()
    return [x.detach().float() for x in (out, state.log_weights.clamp_min(-1e9), state.values, qfkv.grad)]


def valid_call(seed):
    """Compare C with torch, for a whole chunk and then a single token."""
    rng = random.Random(seed)
    qfkv, settings, given = draw(rng)
    assert focus_cpu.is_supported(qfkv, settings, given.get("rotary"))
    weight = torch.randn(*qfkv.shape[:2], *qfkv.shape[3:], generator=torch.Generator().manual_seed(seed)).to(
        qfkv.dtype
    )
    torch.set_num_threads(rng.randint(1, 3))
    try:
        compiled = run(qfkv, settings, given, weight)
    finally:
        torch.set_num_threads(1)
    is_supported, focus_operator.native_is_supported = focus_operator.native_is_supported, lambda *_: False
    try:
        expected = run(qfkv, settings, given, weight)
        single = {"alibi_slopes": given.get("alibi_slopes")}
        _, state = focus_mixing(qfkv, settings, **single)
        token = qfkv[:, -1:].float()
        after, _ = focus_mixing(token, settings, **single, initial_state=state)
    finally:
        focus_operator.native_is_supported = is_supported
    for name, got, wanted in zip(("output", "log weights", "values", "gradient"), compiled, expected):
        if got.numel():
            close = 3e-2 if qfkv.dtype == torch.bfloat16 else 2e-3
            error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-3)
            assert error < close, f"seed {seed}: {name} is off by {error:.2g}"
    heads, dim = qfkv.shape[3:]
    packed = pack_state(state, settings, dim, qfkv.shape[1])
    assert packed.shape[1:] == packed_shape(settings.window, heads, qfkv.shape[2] - 2, dim)
    out = focus_cpu.step(token, settings, given.get("alibi_slopes"), None, packed.contiguous())
    torch.testing.assert_close(out, after, rtol=2e-3, atol=2e-3)


def invalid_call(seed):
    """Spoil one argument of a valid call: a `TypeError` or `ValueError` must name it, and nothing may be written."""
    rng = random.Random(seed)
    kind = rng.randrange(10)
    if kind == 0:
        return _foreign_cache(rng)
    qfkv, settings, given = draw(rng)
    batch, seq, parts, heads, dim = qfkv.shape
    if kind in (1, 2):
        return _wrong_step(rng, qfkv, settings)
    if kind == 3:
        return _wrong_address(rng, qfkv, settings)
    state_shape = (batch, heads) if settings.window is None else (batch, heads, settings.window - 1)
    whole = {
        "alibi_slopes": torch.rand(heads),
        "padding_mask": torch.ones(batch, seq),
        "segment_ids": torch.zeros(batch, seq, dtype=torch.long),
        "rotary": torch.rand(batch, seq, dim),
        "initial_state": torch.rand(*state_shape, dim if parts == 3 else 2 * dim),
        "qfkv": qfkv,
    }
    name = rng.choice(list(whole))
    wrong = spoiled(rng, whole[name])
    if name == "qfkv":
        if (
            isinstance(wrong, torch.Tensor)
            and wrong.shape[2:3] == (parts,)
            and wrong.dim() == 5
            and wrong.is_floating_point()
        ):
            wrong = qfkv[:, :0] if wrong.device.type == "cpu" else torch.zeros(())
        arguments = {"qfkv": torch.zeros(()) if isinstance(wrong, list) else wrong}
    elif (
        name == "padding_mask"
        and isinstance(wrong, torch.Tensor)
        and wrong.shape == (batch, seq)
        and wrong.device.type == "cpu"
    ):
        arguments = {name: wrong[:, 1:]}
    elif (
        name == "segment_ids"
        and isinstance(wrong, torch.Tensor)
        and wrong.shape == (batch, seq)
        and wrong.device.type == "cpu"
    ):
        arguments = {name: wrong.float()}
    elif name == "rotary":
        if isinstance(wrong, torch.Tensor) and wrong.shape == (1, seq, dim):
            wrong = wrong[:, :0]
        arguments = {name: rng.choice(((wrong, whole[name]), (whole[name], wrong)))}
    elif name == "initial_state":
        logs = torch.rand(state_shape)
        if isinstance(wrong, list):
            wrong = whole[name].double().long()
        arguments = {name: FocusState(logs, wrong)}
    else:
        arguments = {name: wrong}
    arguments = {"qfkv": qfkv, **given, **arguments}
    try:
        focus_mixing(settings=settings, **arguments)
    except (TypeError, ValueError) as error:
        assert name in str(error), f"seed {seed}: {name} is not named in {error!r}"
    else:
        raise AssertionError(f"seed {seed}: a wrong {name} was taken")


def _wrong_step(rng, qfkv, settings):
    batch, _, parts, heads, dim = qfkv.shape
    packed = torch.full((batch, *packed_shape(settings.window, heads, parts - 2, dim)), 0.5)
    token, alibi_slopes, what = qfkv[:, :1], None, rng.choice(("state", "qfkv", "alibi_slopes", "input"))
    if what == "state":
        packed = resized(rng, packed) if rng.random() < 0.8 else packed.to(torch.float64)
    elif what == "qfkv":
        token = torch.cat((token, token), dim=1)
    elif what == "alibi_slopes":
        alibi_slopes = torch.rand(heads + 1)
    else:
        token, what = torch.cat((token, token), dim=rng.choice((0, 3))), "must be a contiguous"
    before = packed.clone()
    refused(lambda: focus_cpu.step(token, settings, alibi_slopes, None, packed), what)
    assert torch.equal(packed, before)


def _wrong_address(rng, qfkv, settings):
    mixing = focus_cpu.NativeMixing(qfkv, settings)
    shape = (*qfkv.shape[:2], *qfkv.shape[3:])
    tensors = {"input": qfkv.contiguous(), "out": qfkv.new_empty(shape)}
    name = rng.choice(list(tensors))
    wrong = rng.choice((resized(rng, tensors[name]), tensors[name].double(), tensors[name].to("meta")))
    refused(lambda: mixing.call("focus_forward", **{**tensors, name: wrong}), name)


def _models():
    """LEAPs and MultiGrids of several shapes, with LEAP's step in all of them."""
    leap = {"vocab_size": 11, "num_hidden_layers": 2, "window_sizes": [None, 5], "num_attention_heads": 2}
    grid = {"vocab_size": 11, "num_hidden_layers": 1, "core": "leap", "num_attention_heads": 2}
    shapes = [{}, {"hidden_size": 32}, {"hidden_size": 16, "num_attention_heads": 4}, {"window_sizes": [5, None]}]
    shapes += [{"output_gate": "none", "position_embedding_type": "alibi"}, {"window_sizes": [None, 6]}]
    models = [LeapForCausalLM(LeapConfig(**{"hidden_size": 8, **leap, **shape})) for shape in shapes]
    models += [MultiGridForCausalLM(MultiGridConfig(hidden_size=width, **grid)) for width in (8, 32)]
    return [model.eval() for model in models]


_CACHE = []


@torch.no_grad()
def _foreign_cache(rng):
    if not _CACHE:
        _CACHE.extend(_models())
    ids = torch.zeros(rng.randint(1, 3), 4, dtype=torch.long)
    model, other = rng.sample(_CACHE, 2)
    cache = other(ids).past_key_values
    how = rng.randrange(3)
    if how:
        other = model
        cache = model(ids).past_key_values
        rows = torch.arange(len(ids) + 1) % len(ids) if how == 1 else torch.tensor([], dtype=torch.long)
        cache.batch_select_indices(rows)
    refused(lambda: model(ids[:, :1], past_key_values=cache), "`")


def fuzz(valid, invalid, seed=0):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    fuzzing.run(valid_call, invalid_call, valid, invalid, seed)


if __name__ == "__main__":
    fuzzing.main(__doc__, lambda: focus_cpu._library(HEAD_DIMS[0]), fuzz)
