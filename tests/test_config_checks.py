"""Numbers that make no model are refused by every configuration, in every field, before anything is made of them."""

import dataclasses
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from tests import tiny_heptapod, tiny_hierarchical_lm, tiny_leap, tiny_multigrid


TINY = {
    "leap": tiny_leap.tiny_config,
    "hierarchical_lm": tiny_hierarchical_lm.tiny_config,
    "heptapod": tiny_heptapod.tiny_config,
    "multigrid": lambda **values: tiny_multigrid.tiny_config(**{**tiny_multigrid.TWO_AXES, **values}),
}
MODELS = {
    "leap": tiny_leap.tiny_leap,
    "hierarchical_lm": tiny_hierarchical_lm.tiny_hierarchical_lm,
    "heptapod": tiny_heptapod.tiny_heptapod,
    "multigrid": tiny_multigrid.tiny_multigrid,
}
# Stock fields whose numbers are not ours.
STOCK = {"id2label", "label2id", "num_labels", "chunk_size_feed_forward"}


def fields_with(kind, config):
    """Own fields that take a number of this kind, each with a value that holds it, as its annotation allows."""
    own = {name for cls in type(config).__mro__[:2] for name in vars(cls).get("__annotations__", {})}
    for field in dataclasses.fields(config):
        written = str(field.type)
        if field.name not in own - STOCK or kind.__name__ not in written:
            continue
        is_list = f"list[{kind.__name__}" in written or f"| {kind.__name__}]" in written
        yield field.name, is_list


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_floats_are_finite(family, bad):
    config = TINY[family]()
    names = list(fields_with(float, config))
    assert len(names) >= 5 and "layer_norm_eps" in dict(names)
    for name, is_list in names:
        named = f"{name}[0]" if is_list else name
        with pytest.raises(
            (ValueError, StrictDataclassError), match=re.escape(f"`{named}` must be finite, got {bad}")
        ):
            TINY[family](**{name: [bad] if is_list else bad})
    if hasattr(config, "rope_parameters"):
        for values in ({"rope_theta": bad}, {"rope_type": "linear", "factor": bad, "rope_theta": 1e4}):
            with pytest.raises((ValueError, StrictDataclassError), match="`rope_parameters.*must be finite"):
                TINY[family](rope_parameters=values)


@pytest.mark.parametrize("family", TINY)
def test_integers_fit_into_32_bits(family):
    """Before a list as long as the model is deep is made, or a window reaches native code."""
    names = list(fields_with(int, TINY[family]()))
    assert len(names) >= 8
    for name, is_list in names:
        named = re.escape(f"{name}[0]" if is_list else name)
        for value in (2**31, 10**30, -(10**30)):
            with pytest.raises((ValueError, StrictDataclassError), match=f"`{named}` must be at most 2147483647"):
                TINY[family](**{name: [value] if is_list else value})
    with pytest.raises(
        (ValueError, StrictDataclassError), match="`num_hidden_layers` must be at most 65536, got 100000"
    ):
        TINY[family](num_hidden_layers=100_000)


@pytest.mark.parametrize("family", TINY)
def test_values_without_a_meaning(family):
    for name in ("layer_norm_eps", "rms_norm_eps", "initializer_range"):
        if hasattr(TINY[family](), name):
            with pytest.raises((ValueError, StrictDataclassError), match=f"`{name}` must not be negative, got -0.1"):
                TINY[family](**{name: -0.1})
            assert getattr(TINY[family](**{name: 0.0}), name) == 0
    if hasattr(TINY[family](), "rope_parameters"):
        for theta in (-1.0, 0.0):
            with pytest.raises(
                (ValueError, StrictDataclassError), match=f"`rope_parameters.*must be positive, got {theta}"
            ):
                TINY[family](rope_parameters={"rope_theta": theta})


@pytest.mark.parametrize("family", MODELS)
def test_a_saved_folder_is_no_way_around(family, tmp_path):
    model = MODELS[family]()
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match="`layer_norm_eps` must be finite, got nan"):
        type(model).from_pretrained(tmp_path, layer_norm_eps=float("nan"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "hidden_dropout": float("nan"), "mlp_ratio": float("inf")})
    )
    with pytest.raises((ValueError, StrictDataclassError), match="must be finite"):
        type(model).from_pretrained(tmp_path)
