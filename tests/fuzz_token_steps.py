"""Random tokens of the hierarchical LM and MultiGrid through all layers in C: valid ones against the layers in float64; operations
with spoiled tensors and slots, which must be refused.

    python -m tests.fuzz_token_steps --valid 2000 --invalid 2000 --seed 0 [--sanitize]

With `--sanitize` the source is compiled with gcc's address and undefined behaviour sanitizers, whose runtime must be preloaded.
"""

import copy
import random

import pytest
import torch

from modeling_heptapod.common import step_program
from modeling_heptapod.common.step_program import Slots, StepProgram
from tests import fuzzing
from tests.fuzzing import refused, resized
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_multigrid import tiny_multigrid
from tests.token_steps import FAMILIES, all_logits, decode, watch_steps


ACTIVATIONS = ("gelu", "relu", "silu", "gelu_pytorch_tanh")
LENGTH = 70


def draw_hierarchical(rng):
    factors = sorted(rng.sample((1, 2, 4, 8), rng.randint(1, 3)))
    if 1 not in factors:
        factors[0] = 1
    rng.shuffle(factors)
    predicting = factors.index(1)
    every = range(len(factors))
    strides = [rng.choice([s for s in (1, 2, 4, 8) if s <= factor]) for factor in factors]
    strides[predicting] = 1
    sizes = [rng.choice((8, 12, 20)) for _ in every]
    return tiny_hierarchical_lm(
        seed=rng.randrange(1000),
        compression_factors=factors,
        strides=strides,
        hidden_sizes=sizes,
        num_attention_heads=[rng.randint(1, 3) for _ in every],
        head_dim=[rng.choice((4, 6)) for _ in every],
        window_sizes=[rng.choice((None, 0, 2, 3, 5, 9)) for _ in every],
        window_type=rng.choice(("sliding", "block")),
        attention_norm=[rng.choice(("rms_norm", "layer_norm")) for _ in every],
        use_xpos=[rng.random() < 0.5 for _ in every],
        shared_attention=rng.random() < 0.3,
        merge_into=rng.choice(("predicting", "all")),
        predict_from_all=rng.random() < 0.3,
        hidden_act=rng.choice(ACTIVATIONS),
        num_hidden_layers=rng.randint(1, 3),
    )


def draw_multigrid(rng):
    axes = rng.randint(0, 3)
    return tiny_multigrid(
        seed=rng.randrange(1000),
        axis_names=["a", "b", "c"][:axes],
        axis_vocab_sizes=[7, 5, 3][:axes],
        axis_weights=[rng.choice((0.0, 0.3, 0.5)) for _ in range(axes)] or None,
        hidden_size=16,
        num_attention_heads=rng.choice((2, 4)),
        axis_hidden_size=rng.choice((8, 16)),
        cross_feed_forward=rng.random() < 0.5,
        hidden_act=rng.choice((*ACTIVATIONS, "gelu_new")),
        num_hidden_layers=rng.randint(1, 2),
    )


DRAWS = {"hierarchical_lm": draw_hierarchical, "multigrid": draw_multigrid}


@torch.no_grad()
def valid_call(seed):
    """Compare the logits of the last tokens, one at a time, with those of the whole text."""
    rng = random.Random(seed)
    name = rng.choice(list(DRAWS))
    family, model = FAMILIES[name], DRAWS[name](rng)
    if rng.random() < 0.2:
        model = model.bfloat16()
    batch, length = rng.randint(1, 8), rng.randint(12, LENGTH)
    text, past, mask = family.text(model, batch, length), rng.randint(length - 10, length - 1), None
    if name == "multigrid" and rng.random() < 0.3:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[rng.randrange(batch), : rng.randint(0, past - 1)] = 0
    exact = all_logits(copy.deepcopy(model).double()(**text, attention_mask=mask, use_cache=False))[:, past:]
    cache = family.static_class(model.config, LENGTH) if rng.random() < 0.5 else None
    torch.set_num_threads(rng.choice((1, 1, 3)))
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(step_program, "_PARALLEL", 0)
            taken = watch_steps(monkeypatch, family)
            logits = decode(model, text, past, cache, mask)
    finally:
        torch.set_num_threads(1)
    assert taken == [True] * (length - past), f"seed {seed}: a token was left to the layers"
    parallel = all_logits(model(**text, attention_mask=mask, use_cache=False))[:, past:]
    fuzzing.check_error(logits, exact, parallel, seed)


def invalid_call(seed):
    """Spoil a tensor or the slots of a small program: a `ValueError` must name them, and nothing is written."""
    rng = random.Random(seed)
    batch, heads, dim, length = rng.randint(1, 3), rng.randint(1, 3), rng.choice((2, 8)), rng.randint(1, 9)
    inner = heads * dim
    program, weight, norm = StepProgram(batch, [(3 * inner, inner), (inner,)]), 0, 1
    token, state = program.tensor("token", batch, inner), program.tensor("state", batch, 2, inner // 2)
    mask = program.tensor("mask", batch, None, dtype=torch.bool)
    keys, values = (program.tensor(name, batch, heads, None, dim) for name in ("keys", "values"))
    x, normed, qkv = program.rows(inner), program.rows(inner), program.rows(3 * inner)
    program.load(token, x)
    program.shifted_norm(x, normed, norm, None, 1e-6, "rms_norm", state, 2)
    program.linear(normed, qkv, weight)
    program.attend(qkv.part(0, inner), qkv.part(inner, 2 * inner), x, keys, values, heads, 1.0, None, 0, mask)
    program.store(token, x)
    program.compile()
    caches = [torch.randn(batch, heads, length, dim) for _ in range(2)]
    tensors = {
        "weight": torch.randn(3 * inner, inner),
        "norm": torch.randn(inner),
        "token": torch.randn(batch, inner),
        "state": torch.randn(batch, 2, inner // 2),
        "mask": torch.ones(batch, length, dtype=torch.bool),
        "keys": caches[0],
        "values": caches[1],
    }
    slots, what = Slots(length - 1, 0, 0, 1, length, length), rng.choice((*tensors, "slots"))
    if what == "slots":
        fields = list(slots)
        place = rng.randrange(len(fields))
        fields[place] = rng.choice((-1, -7, length + rng.randint(1, 90), 2**40))
        slots = Slots(*fields)
        if slots.are_in(length):
            return
    else:
        wrong = [resized(rng, tensors[what]), tensors[what].to("meta"), tensors[what].double()]
        tensors[what] = rng.choice(wrong)
        if what == "mask" and tensors[what].shape == (batch, length + 1) and tensors[what].dtype == torch.bool:
            return  # a longer one will do
    before = [x.clone() for x in tensors.values()]
    weights, others = list(tensors.values())[:2], list(tensors.values())[2:]
    addresses = program.addresses_of_weights(weights, torch.float32)
    name = {"slots": "slots", "weight": "`weights`", "norm": "`weights`"}.get(what, "")
    refused(lambda: program.run(others, addresses, torch.float32, [slots]), name)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors.values()) if a.device.type == "cpu")


def fuzz(valid, invalid, seed=0):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    fuzzing.run(valid_call, invalid_call, valid, invalid, seed)


def library():
    """What both kinds of calls need."""
    return step_program.load_steps()


if __name__ == "__main__":
    fuzzing.main(__doc__, library, fuzz)
