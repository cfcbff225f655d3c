"""`torch.export` with open batch and length, with and without gradients: one program for all sizes, equal at each."""

import pytest
import torch
from torch.export import Dim, export

from tests import tiny_heptapod, tiny_hierarchical_lm, tiny_leap, tiny_multigrid
from tests.tiny import random_ids
from tests.tiny_heptapod import random_page
from tests.tiny_multigrid import random_grid


SIZES = {"batch": ((3, 12), (1, 12), (4, 12)), "both": ((3, 12), (1, 9), (2, 33), (1, 63), (2, 1))}
CASES = {
    "leap": (tiny_leap.tiny_leap, tiny_leap.VARIANTS, ["default"]),
    "hierarchical_lm": (
        tiny_hierarchical_lm.tiny_hierarchical_lm,
        tiny_hierarchical_lm.VARIANTS,
        ["two"],
    ),
    "multigrid": (tiny_multigrid.tiny_multigrid, tiny_multigrid.VARIANTS, []),
    "heptapod": (tiny_heptapod.tiny_heptapod, tiny_heptapod.VARIANTS, ["split"]),
}


def cases():
    for family, (make, variants, fast) in CASES.items():
        for name, values in variants.items():
            marks = [] if name in fast else [pytest.mark.slow]
            yield pytest.param(family, make, values, id=f"{family}-{name}", marks=marks)


def inputs_of(family, model, batch, seq):
    if family == "heptapod":
        return {"input_ids": random_page(batch, seq, seq + 2)}
    if family == "multigrid":
        return {**random_grid(model, batch, seq), "use_cache": False}
    return {"input_ids": random_ids(batch, seq), "use_cache": False}


def open_sizes(family, inputs):
    """All but the number of axes is open; lengths of an LSTM are not, whose loop is over them."""
    places = {"input_ids": [0, 1, 2][: inputs["input_ids"].dim()], "axis_ids": [0, 2]}
    return {name: dict.fromkeys(places.get(name, []), Dim.DYNAMIC) or None for name in inputs}


@pytest.mark.parametrize("family, make, values", cases())
def test_one_program_for_all_sizes(family, make, values):
    model = make(**values)
    is_lstm = values.get("core") == "lstm"
    inputs = inputs_of(family, model, 3, 12)
    shapes = {
        name: {0: Dim.DYNAMIC} if sizes and is_lstm else sizes for name, sizes in open_sizes(family, inputs).items()
    }
    program = export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for batch, seq in SIZES["batch" if is_lstm else "both"]:
        inputs = inputs_of(family, model, batch, min(seq, 20) if family == "heptapod" else seq)
        found, expected = program(**inputs), model(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-4)
    found.logits.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in program.named_parameters()}
    expected.logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-4)
