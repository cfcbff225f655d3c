"""Random tokens through all layers in C: valid ones against the layers in float64, invalid ones, which must be refused by name.

    python -m tests.fuzz_leap_step --valid 2000 --invalid 2000 --seed 0 [--sanitize]

With `--sanitize` the sources are compiled with gcc's address and undefined behaviour sanitizers, whose runtime must be preloaded.
"""

import copy
import random
from unittest.mock import patch

import pytest
import torch

from modeling_heptapod import LeapConfig, LeapForCausalLM
from modeling_heptapod.common import step_program
from modeling_heptapod.leap import focus_cpu, leap_step
from tests import fuzzing
from tests.fuzzing import refused, resized
from tests.leap_steps import watch_steps


HEAD_DIMS = (4, 7, 16)


def draw(rng):
    """A model, and ids of a text."""
    heads, dim, layers = rng.randint(1, 3), rng.choice(HEAD_DIMS), rng.randint(1, 3)
    gate = rng.choice(("sigmoid", "gelu", "none"))
    positions = ["none", "absolute", "alibi"] + ["rotary"] * (gate != "none" and dim % 2 == 0)
    config = LeapConfig(
        vocab_size=20,
        hidden_size=heads * dim,
        intermediate_size=rng.randint(1, 70),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=rng.choice(("gelu", "relu", "silu")),
        weight_function=rng.choice(("exp", "elu")),
        rescale=rng.choice((None, 1.0, 10.0)),
        output_gate=gate,
        position_embedding_type=rng.choice(positions),
        window_sizes=[rng.choice((None, 1, 2, rng.randint(3, 63), 64)) for _ in range(layers)],
        sink_weight=rng.choice((0.0, 0.5)),
        max_position_embeddings=100,
        initializer_range=0.3,
    )
    torch.manual_seed(rng.randrange(2**31))
    model = LeapForCausalLM(config).eval()
    if rng.random() < 0.3 and config.position_embedding_type != "alibi":
        model = model.bfloat16()
    return model, torch.randint(20, (rng.randint(1, 8), rng.randint(2, 60)))


@torch.no_grad()
def valid_call(seed):
    """Compare the logits of the last tokens, one at a time, with those of the whole text."""
    rng = random.Random(seed)
    model, ids = draw(rng)
    exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
    length = ids.shape[1]
    past = rng.randint(max(1, length - 8), length - 1)
    torch.set_num_threads(rng.choice((1, 1, 3)))
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(step_program, "_PARALLEL", 0)
            taken = watch_steps(monkeypatch)
            cache = model(ids[:, :past], use_cache=True).past_key_values
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(past, length)]
    finally:
        torch.set_num_threads(1)
    assert taken == [True] * len(steps), f"seed {seed}: a token was left to the layers"
    parallel = model(ids, use_cache=False).logits
    fuzzing.check_error(torch.cat(steps, dim=1), exact[:, past:], parallel[:, past:], seed)


@torch.no_grad()
def invalid_call(seed):
    """Spoil a state or the positions: a `ValueError` must name them, or the token is left to the layers."""
    rng = random.Random(seed)
    model, ids = draw(rng)
    embeds, dim = torch.randn(len(ids), 1, model.config.hidden_size, dtype=model.dtype), model.config.head_dim
    cache = model(ids, use_cache=True).past_key_values
    mixers = [layer.mixer for layer in model.model.layers]
    states = [mixer.packed_state(cache).clone() for mixer in mixers]
    rotary, what = None, rng.choice(("past_key_values", "cos", "sin"))
    if what == "past_key_values":
        place = rng.randrange(len(states))
        wrong = rng.choice((resized(rng, states[place]), states[place].double(), states[place].to("meta")))
        states[place] = wrong
    else:
        turns = {name: torch.randn(rng.choice((1, len(ids))), 1, dim) for name in ("cos", "sin")}
        turns[what] = resized(rng, turns["cos"])
        rotary = turns["cos"], turns["sin"]
        if turns["cos"].shape == turns["sin"].shape and turns["sin"].shape in ((1, 1, dim), (len(ids), 1, dim)):
            return
    before = [state.clone() for state in states]

    def call():
        with patch.object(type(mixers[0]), "packed_state", lambda mixer, _: states[mixer.layer_idx]):
            return leap_step.step_layers(model.model.layers, embeds, rotary, cache)

    refused(call, what if what == "past_key_values" else "n` must be" if what == "sin" else "s` must be")
    assert all(torch.equal(a, b) for a, b in zip(before, states) if a.device.type == "cpu")


def fuzz(valid, invalid, seed=0):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    fuzzing.run(valid_call, invalid_call, valid, invalid, seed)


def library():
    """What both kinds of calls need."""
    return step_program.load_steps() and focus_cpu._library(HEAD_DIMS[0])


if __name__ == "__main__":
    fuzzing.main(__doc__, library, fuzz)
