"""LeapConfig: defaults, derived values, and an error with the argument's name for everything that makes no model."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_heptapod import LeapConfig, LeapForCausalLM
from modeling_heptapod.leap.focus_functions import OUTPUT_GATES, WEIGHT_FUNCTIONS
from tests.tiny_leap import tiny_config


def test_defaults():
    config = LeapConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 256, 1024)
    assert (config.mixer, config.weight_function, config.rescale, config.output_gate) == (
        "focus",
        "elu",
        10.0,
        "sigmoid",
    )
    assert config.window_sizes == [None, 4, 8, 16]
    assert (config.position_embedding_type, config.max_position_embeddings) == ("rotary", 1024)
    assert config.initializer_range == 256**-0.5 and config.head_dim == 64
    assert config.is_causal and config.tie_word_embeddings and config.use_cache
    assert config.sink_weight == config.hidden_dropout == config.attention_dropout == 0
    assert config.layer_types == ["linear_attention"] * 4 and config.number_of_conv_states == 1
    assert config.rope_parameters["rope_type"] == "default"


def test_the_window_schedule_of_the_prototype():
    assert LeapConfig(num_hidden_layers=6).window_sizes == [None, 4, 8, 16, None, 4]
    assert LeapConfig(num_hidden_layers=1).window_sizes == [None]
    assert LeapConfig(num_hidden_layers=2, window_sizes=(None, 3)).window_sizes in ([None, 3], (None, 3))


def test_defaults_of_the_additive_mixer():
    config = LeapConfig(mixer="additive")
    assert (config.output_gate, config.position_embedding_type, config.number_of_conv_states) == (
        "none",
        "absolute",
        2,
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window_sizes": [None, 3, 9, 1], "rescale": None, "sink_weight": 1e-5, "weight_function": "exp"},
        {"mixer": "additive", "position_embedding_type": "alibi", "initializer_range": 0.3},
        {"intermediate_size": 99, "is_causal": False, "eos_token_id": [1, 2], "rescale": 4, "attention_dropout": 0.5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"hidden_size": 12, "position_embedding_type": "absolute"},  # three channels of a head, which nothing rotates
    ],
)
def test_saving_and_loading_changes_nothing(values, tmp_path):
    config = LeapConfig(**values)
    config.save_pretrained(tmp_path)
    for loaded in (LeapConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        loaded.name_or_path = config.name_or_path
        assert type(loaded) is LeapConfig and loaded.to_dict() == config.to_dict()
        for name, value in values.items():
            assert getattr(loaded, name) == value


def test_an_untrained_config_makes_a_model():
    assert LeapForCausalLM(tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}))


TYPE_ERRORS = {
    "vocab_size": "many",
    "hidden_size": 2.5,
    "num_hidden_layers": "four",
    "num_attention_heads": None,
    "rescale": "strong",
    "window_sizes": [None, "all", 8, 16],
    "rope_parameters": 7,
    "is_causal": "yes",
    "tie_word_embeddings": 1.5,
    "sink_weight": "little",
    "mixer": 3,
    "hidden_dropout": "some",
    "pad_token_id": "pad",
}

VALUE_ERRORS = {
    "unknown mixer": ({"mixer": "attention"}, "`mixer`.*focus.*additive.*attention"),
    "unknown weight function": ({"weight_function": "unknown"}, "`weight_function`.*elu.*exp.*unknown"),
    "unknown gate": ({"output_gate": "unknown"}, "`output_gate`.*sigmoid.*unknown"),
    "unknown positions": ({"position_embedding_type": "sinusoidal"}, "`position_embedding_type`.*sinusoidal"),
    "no vocabulary": ({"vocab_size": 0}, "`vocab_size`"),
    "no hidden size": ({"hidden_size": 0}, "`hidden_size`"),
    "negative hidden size": ({"hidden_size": -8}, "`hidden_size`"),
    "no layers": ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
    "no heads": ({"num_attention_heads": 0}, "`num_attention_heads`"),
    "no feed-forward": ({"intermediate_size": 0}, "`intermediate_size`"),
    "heads that do not divide": ({"num_attention_heads": 7}, "`hidden_size`.*256.*`num_attention_heads`.*7"),
    "rescale of zero": ({"rescale": 0.0}, "`rescale`"),
    "negative rescale": ({"rescale": -1.0}, "`rescale`"),
    "rescale of one channel": ({"hidden_size": 4, "position_embedding_type": "none"}, "`rescale`.*head_dim=1"),
    "too few windows": ({"window_sizes": [None, 4, 8]}, "`window_sizes`.*4 layers.*3"),
    "too many windows": ({"window_sizes": [None] * 5}, "`window_sizes`.*4 layers.*5"),
    "no windows": ({"window_sizes": []}, "`window_sizes`"),
    "window of zero": ({"window_sizes": [None, 0, 8, 16]}, "`window_sizes`.*at least 1"),
    "negative window": ({"window_sizes": [None, 4, -8, 16]}, "`window_sizes`.*at least 1"),
    "negative sink weight": ({"sink_weight": -1e-5}, "`sink_weight`"),
    "hidden dropout of one": ({"hidden_dropout": 1.0}, "`hidden_dropout`"),
    "negative hidden dropout": ({"hidden_dropout": -0.1}, "`hidden_dropout`"),
    "attention dropout of more": ({"attention_dropout": 1.5}, "`attention_dropout`"),
    "a gate in the additive mixer": ({"mixer": "additive", "output_gate": "sigmoid"}, "`output_gate`.*additive"),
    "rotary without queries": ({"output_gate": "none"}, "`position_embedding_type`.*rotary"),
    "rotary in the additive mixer": (
        {"mixer": "additive", "position_embedding_type": "rotary"},
        "`position_embedding_type`.*rotary",
    ),
    "rotary of an odd head": ({"hidden_size": 12}, "even head dimension.*head_dim=3"),
    "rotary that changes with length": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type.*dynamic",
    ),
    "rotary with long and short factors": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 1e4,
                "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32,
            }
        },
        "rope_type.*longrope",
    ),
    "no positions to learn": (
        {"position_embedding_type": "absolute", "max_position_embeddings": 0},
        "`max_position_embeddings`",
    ),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_values_that_make_no_model(case):
    values, match = VALUE_ERRORS[case]
    with pytest.raises((ValueError, StrictDataclassError), match=match):
        LeapConfig(**values)


@pytest.mark.parametrize("field", ["weight_function", "output_gate"])
def test_every_entry_of_a_table_is_accepted_and_described(field, monkeypatch):
    table = WEIGHT_FUNCTIONS if field == "weight_function" else OUTPUT_GATES
    description = LeapConfig.__doc__.split(f"{field} (`str`")[1].split("*optional*", 2)[1]
    assert not [name for name in table if f'`"{name}"`' not in description]
    monkeypatch.setitem(table, "added later", next(iter(table.values())))
    assert getattr(LeapConfig(**{field: "added later"}), field) == "added later"


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_values_of_another_type(name):
    with pytest.raises((TypeError, StrictDataclassError), match=name):
        LeapConfig(**{name: TYPE_ERRORS[name]})


def test_values_at_the_edge_are_fine():
    LeapConfig(hidden_size=8, num_attention_heads=4, rescale=0.1, sink_weight=0, hidden_dropout=0)
    LeapConfig(hidden_size=4, num_attention_heads=4, rescale=None, position_embedding_type="none")
    LeapConfig(window_sizes=[1, None, 10**9, 2], attention_dropout=0.99)
    LeapConfig(mixer="additive", output_gate="none", position_embedding_type="none")
    LeapConfig(output_gate="none", position_embedding_type="alibi", rope_parameters=None)
