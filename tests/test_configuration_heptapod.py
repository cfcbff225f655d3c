"""HeptapodConfig: defaults, derived values, and an error with the argument's name for what makes no model."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_heptapod import HeptapodConfig
from tests.tiny_heptapod import tiny_config


def test_defaults():
    config = HeptapodConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 256, 1024)
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (4, 8, 32)
    assert config.attention_types == ["local", "dilated", "local", "global"]
    assert (config.local_radius, config.dilation, config.num_global_heads) == (3, 2, 0)
    assert (config.rope_theta, config.initializer_range, config.layer_norm_eps) == (100.0, 0.02, 1e-5)
    assert config.tie_word_embeddings and config.use_absolute_position_embeddings and not config.self_conditioning
    assert config.neighbor_loss_weight == config.hidden_dropout == config.attention_dropout == 0
    assert config.grid_size is config.mask_token_id is config.pad_token_id is None


def test_the_schedule_of_layers():
    types = HeptapodConfig(num_hidden_layers=6).attention_types
    assert types == ["local", "dilated", "local", "global", "local", "dilated"]
    assert HeptapodConfig(num_hidden_layers=1).attention_types == ["local"]


def test_neighborhoods():
    config = HeptapodConfig(local_radius=3, dilation=2)
    assert [config.neighborhood(layer) for layer in range(4)] == [(3, 1), (3, 2), (3, 1), (None, 1)]
    config = HeptapodConfig(local_radius=[1, 2, 5, 7], dilation=[9, 4, 9, 9])
    assert [config.neighborhood(layer) for layer in range(4)] == [(1, 1), (2, 4), (5, 1), (None, 1)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"local_radius": [0, 3, 9, 1], "dilation": [1, 2, 3, 4], "grid_size": [64, 96], "num_global_heads": 8},
        {"attention_types": ["global"] * 4, "self_conditioning": True, "neighbor_loss_weight": 0.25},
        {"mask_token_id": 7, "pad_token_id": 8, "intermediate_size": 99, "rope_theta": 1e4, "attention_dropout": 0.5},
    ],
)
def test_saving_and_loading_changes_nothing(values, tmp_path):
    config = HeptapodConfig(**values)
    config.save_pretrained(tmp_path)
    for loaded in (HeptapodConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        loaded.name_or_path = config.name_or_path
        assert type(loaded) is HeptapodConfig and loaded.to_dict() == config.to_dict()
        for name, value in values.items():
            assert getattr(loaded, name) == value


TYPE_ERRORS = {
    "vocab_size": "many",
    "hidden_size": 2.5,
    "num_hidden_layers": "four",
    "num_attention_heads": None,
    "attention_types": "local",
    "local_radius": 1.5,
    "dilation": None,
    "num_global_heads": "some",
    "rope_theta": "large",
    "grid_size": 64,
    "self_conditioning": "yes",
    "use_absolute_position_embeddings": "no",
    "neighbor_loss_weight": "little",
    "mask_token_id": "[MASK]",
    "pad_token_id": "pad",
}

VALUE_ERRORS = {
    "no vocabulary": ({"vocab_size": 0}, "`vocab_size`"),
    "no hidden size": ({"hidden_size": 0}, "`hidden_size`"),
    "no layers": ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
    "no heads": ({"num_attention_heads": 0}, "`num_attention_heads`"),
    "no feed-forward": ({"intermediate_size": 0}, "`intermediate_size`"),
    "heads that do not divide": ({"num_attention_heads": 7}, "`hidden_size`.*256.*`num_attention_heads`.*7"),
    "heads of two channels": ({"hidden_size": 16}, "`hidden_size`.*16.*four times"),
    "too few layer types": ({"attention_types": ["local"] * 3}, "`attention_types`.*4 layers.*3"),
    "unknown layer type": ({"attention_types": ["local"] * 3 + ["sparse"]}, "`attention_types`.*global.*sparse"),
    "too few windows": ({"local_radius": [1, 2]}, "`local_radius`.*4 layers.*2"),
    "no windows": ({"local_radius": []}, "`local_radius`"),
    "negative window": ({"local_radius": -1}, "`local_radius`.*at least 0.*-1"),
    "one negative window": ({"local_radius": [1, 1, -2, 1]}, "`local_radius`.*at least 0"),
    "dilation of zero": ({"dilation": 0}, "`dilation`.*at least 1.*0"),
    "too many dilations": ({"dilation": [1] * 5}, "`dilation`.*4 layers.*5"),
    "negative global heads": ({"num_global_heads": -1}, "`num_global_heads`"),
    "more global heads than heads": ({"num_global_heads": 9}, "`num_global_heads`.*8.*9"),
    "theta of zero": ({"rope_theta": 0.0}, "`rope_theta`"),
    "grid of one number": ({"grid_size": [64]}, "`grid_size`.*64"),
    "grid without rows": ({"grid_size": [0, 64]}, "`grid_size`.*0"),
    "negative loss weight": ({"neighbor_loss_weight": -0.1}, "`neighbor_loss_weight`"),
    "hidden dropout of one": ({"hidden_dropout": 1.0}, "`hidden_dropout`"),
    "negative attention dropout": ({"attention_dropout": -0.5}, "`attention_dropout`"),
    "mask beyond the vocabulary": ({"mask_token_id": 32000}, "`mask_token_id`.*32000"),
    "negative pad": ({"pad_token_id": -1}, "`pad_token_id`.*-1"),
    "mask that is pad": ({"mask_token_id": 5, "pad_token_id": 5}, "`mask_token_id`.*`pad_token_id`.*5"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_values_that_make_no_model(case):
    values, match = VALUE_ERRORS[case]
    with pytest.raises((ValueError, StrictDataclassError), match=match):
        HeptapodConfig(**values)


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_values_of_another_type(name):
    with pytest.raises((TypeError, StrictDataclassError), match=name):
        HeptapodConfig(**{name: TYPE_ERRORS[name]})


def test_values_at_the_edge_are_fine():
    HeptapodConfig(hidden_size=32, local_radius=0, dilation=1, num_global_heads=8, grid_size=(1, 1))
    HeptapodConfig(vocab_size=2, mask_token_id=0, pad_token_id=1, local_radius=10**9, attention_dropout=0.99)
    assert tiny_config(grid_size=None).num_hidden_layers == 2
