"""Values that make no MultiGrid are named; the others survive a round trip."""

import itertools
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_heptapod import MultiGridConfig
from modeling_heptapod.multigrid.configuration_multigrid import AXIS_ORDERS, CORE_LAYER_TYPES
from modeling_heptapod.multigrid.multigrid_cores import CORES
from tests.tiny_multigrid import VARIANTS, tiny_config


CONFIGS = Path(__file__).parent.parent / "configs"
TWO = {"axis_names": ["kind", "bracket"], "axis_vocab_sizes": [7, 5]}


def test_a_plain_decoder_is_the_default():
    config = MultiGridConfig()
    assert config.num_axes == 0 and config.axis_names == [] and config.axis_vocab_sizes == []
    assert config.axis_shares == [] and config.core == "transformer" and config.axis_order == "parallel"
    assert config.intermediate_size == 1024 and config.axis_hidden_size == 256 and config.head_dim == 64
    assert config.layer_types == config.cache_layer_types == ["full_attention"] * 6
    assert config.window_sizes is None


def test_what_follows_from_axes():
    config = MultiGridConfig(
        hidden_size=96, num_hidden_layers=2, axis_names=("a", "b", "c"), axis_vocab_sizes=(2, 3, 4)
    )
    assert config.axis_names == ["a", "b", "c"] and config.axis_vocab_sizes == [2, 3, 4]
    assert config.axis_weights is None and config.axis_shares == [1 / 3] * 3
    assert config.cache_layer_types == ["full_attention"] * 4 and len(config.layer_types) == 2
    assert MultiGridConfig(**TWO, axis_weights=(0.25, 1)).axis_shares == [0.25, 1]


@pytest.mark.parametrize("field, known", [("core", tuple(CORE_LAYER_TYPES)), ("axis_order", AXIS_ORDERS)])
def test_unknown_options_are_named_with_the_known_ones(field, known):
    for value in known:
        assert getattr(MultiGridConfig(**TWO, **{field: value}), field) == value
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        MultiGridConfig(**TWO, **{field: "mamba"})
    assert f"`{field}` must be one of {known}, got 'mamba'" in str(error.value)


def test_every_core_has_code_and_is_tested_in_both_orders():
    assert tuple(CORES) == tuple(CORE_LAYER_TYPES)
    tested = {(config.core, config.axis_order) for config in (tiny_config(**x) for x in VARIANTS.values())}
    assert tested == set(itertools.product(CORE_LAYER_TYPES, AXIS_ORDERS))


def test_narrow_meta_streams():
    config = MultiGridConfig(hidden_size=96, num_attention_heads=4, axis_hidden_size=48, intermediate_size=200, **TWO)
    assert config.head_dim == 24 and config.axis_num_attention_heads == 2 and config.axis_intermediate_size == 100


def test_windows_are_for_leap():
    config = MultiGridConfig(core="leap")
    assert config.window_sizes == [None, 4, 8, 16, None, 4] and set(config.layer_types) == {"linear_attention"}
    assert set(MultiGridConfig(core="lstm", **TWO).cache_layer_types) == {"linear_attention"}


def test_round_trip(tmp_path):
    config = MultiGridConfig(
        **TWO,
        core="leap",
        axis_order="factored",
        axis_weights=[0.5, 0.25],
        num_hidden_layers=2,
        window_sizes=[None, 3],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MultiGridConfig and loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("name", ["multigrid-tiny", "multigrid-small"])
def test_the_configurations_of_this_repository(name):
    config = AutoConfig.from_pretrained(CONFIGS / name)
    assert type(config) is MultiGridConfig
    written = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    assert written == json.loads(MultiGridConfig.from_dict(written).to_json_string())
    # Axes are what users attach: set over the saved ones, one value after the other.
    overrides = {
        "vocab_size": 60,
        "axis_names": ["a", "b", "c"],
        "axis_vocab_sizes": [2, 3, 4],
    }
    config = AutoConfig.from_pretrained(CONFIGS / name, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    assert [head.out_features for head in model.axis_lm_heads] == [2, 3, 4]
    assert config.axis_shares == [1 / 3] * 3


BAD = {
    "another core": ({"core": "gru"}, "core"),
    "another order": ({"axis_order": "main first"}, "axis_order"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "heads that do not divide": ({"hidden_size": 10, "num_attention_heads": 4}, "num_attention_heads"),
    "no head": ({"num_attention_heads": 0}, "num_attention_heads"),
    "a meta width between heads": (
        {"hidden_size": 16, "num_attention_heads": 2, "axis_hidden_size": 12},
        "axis_hidden",
    ),
    "axis streams wider than the main one": ({"hidden_size": 16, "axis_hidden_size": 32}, "axis_hidden_size"),
    "no meta width": ({"axis_hidden_size": 0}, "axis_hidden_size"),
    "an axis twice": ({"axis_names": ["a", "a"], "axis_vocab_sizes": [2, 2]}, "axis_names"),
    "an axis without a name": ({"axis_names": [""], "axis_vocab_sizes": [2]}, "axis_names"),
    "an axis with the main axis's name": ({"axis_names": ["main"], "axis_vocab_sizes": [2]}, "'main'"),
    "an axis with a blank in its name": ({"axis_names": ["a b"], "axis_vocab_sizes": [2]}, r"identifiers.*'a b'"),
    "an axis that leads out of a folder": ({"axis_names": ["../x"], "axis_vocab_sizes": [2]}, r"identifiers.*'../x'"),
    "an axis without a size": ({"axis_names": ["a"]}, "axis_vocab_sizes"),
    "a size without an axis": ({"axis_vocab_sizes": [3]}, "axis_vocab_sizes"),
    "an axis of size zero": ({"axis_names": ["a"], "axis_vocab_sizes": [0]}, "axis_vocab_sizes"),
    "short weights": ({**TWO, "axis_weights": [1.0]}, "axis_weights"),
    "a negative weight": ({**TWO, "axis_weights": [1.0, -1.0]}, "axis_weights"),
    "a weight that is no number": ({**TWO, "axis_weights": [1.0, float("nan")]}, "axis_weights"),
    "a loss weight above one": ({"main_loss_weight": 1.5}, "main_loss_weight"),
    "dropout of everything": ({"hidden_dropout": 1.0}, "hidden_dropout"),
    "dropout of attention without attention": ({"core": "lstm", "attention_dropout": 0.1}, "attention_dropout"),
    "windows without LEAP": ({"window_sizes": [1] * 6}, "window_sizes"),
    "short windows": ({"core": "leap", "window_sizes": [4]}, "window_sizes"),
    "a window of zero": ({"core": "leap", "window_sizes": [0] * 6}, "window_sizes"),
    "an odd head": ({"core": "leap", "hidden_size": 12, "num_attention_heads": 4}, "head_dim"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_named(case):
    values, name = BAD[case]
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name):
        MultiGridConfig(**values)


def test_values_set_later_are_checked_before_a_model_is_built():
    config = MultiGridConfig(**TWO)
    config.axis_vocab_sizes = [3]
    with pytest.raises(ValueError, match="axis_vocab_sizes"):
        AutoModelForCausalLM.from_config(config)
