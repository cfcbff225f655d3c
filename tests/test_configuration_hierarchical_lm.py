"""Values that make no hierarchical LM are named; the others survive a round trip."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from modeling_heptapod import HierarchicalLMConfig


def test_one_value_is_for_all_hierarchies():
    config = HierarchicalLMConfig(
        compression_factors=(1, 2, 8), strides=(1, 1, 4), hidden_sizes=[64, 96, 128], mlp_ratio=2.5
    )
    assert config.compression_factors == [1, 2, 8] and config.strides == [1, 1, 4]
    assert config.num_attention_heads == [8] * 3 and config.head_dim == [64] * 3 and config.compressor == ["conv"] * 3
    assert config.use_xpos == [True] * 3 and config.next_latent_loss_weight == [0.0] * 3
    assert config.intermediate_sizes == [160, 240, 320]
    assert config.hidden_size == 128 and config.num_hierarchies == 3 and config.dilations == [1, 2, 2]


def test_a_plain_decoder_is_the_default():
    config = HierarchicalLMConfig()
    assert config.compression_factors == [1] and config.hidden_sizes == [256] and config.hidden_size == 256
    assert config.prediction_size == 256 and config.predict_hierarchy == 1
    assert HierarchicalLMConfig(hidden_size=48).hidden_sizes == [48]
    assert HierarchicalLMConfig(hidden_size=48, hidden_sizes=32).hidden_size == 48


def test_windows():
    config = HierarchicalLMConfig(compression_factors=[1, 2, 16], max_position_embeddings=100)
    assert config.window_sizes == [50, 25, 3]  # half of the length at each resolution
    assert HierarchicalLMConfig(compression_factors=[1, 256], max_position_embeddings=100).window_sizes == [50, 1]
    assert HierarchicalLMConfig(compression_factors=[1, 2], window_sizes=None).window_sizes == [None, None]
    assert HierarchicalLMConfig(compression_factors=[1, 2], window_sizes=0).window_sizes == [0, 0]


def test_what_a_cache_holds():
    config = HierarchicalLMConfig(
        compression_factors=[1, 2, 8, 4], strides=[1, 1, 4, 4], window_sizes=[32, 5, None, 0], num_hidden_layers=2
    )
    assert config.cache_layer_types == ["hybrid_sliding", "hybrid_sliding", "hybrid", "conv"] * 2 + ["conv"]
    assert config.kept_steps == [32, 9, None, 1]
    blocks = HierarchicalLMConfig(
        compression_factors=[1, 4], strides=[1, 2], window_sizes=[32, 5], window_type="block"
    )
    assert blocks.kept_steps == [64, 19]


def test_the_predicting_hierarchy():
    config = HierarchicalLMConfig(compression_factors=[4, 1, 2], hidden_sizes=[30, 20, 10])
    assert config.predict_hierarchy == 1 and config.predict_index == 1 and config.prediction_size == 20
    config = HierarchicalLMConfig(compression_factors=[4, 1, 2], hidden_sizes=[30, 20, 10], predict_from_all=True)
    assert config.prediction_size == 60
    config = HierarchicalLMConfig(compression_factors=[1, 2], strides=[1, 2], predict_hierarchy=2, merge_into="all")
    assert config.predict_index == 1


def test_one_hierarchy_as_stock_code_reads_it():
    config = HierarchicalLMConfig(compression_factors=[1, 2], num_attention_heads=[2, 4], head_dim=[8, 16])
    other = config.of_hierarchy(1)
    assert other.num_attention_heads == 4 and other.head_dim == 16
    assert config.num_attention_heads == [2, 4] and config.head_dim == [8, 16]


def test_round_trip(tmp_path):
    config = HierarchicalLMConfig(
        compression_factors=[1, 4],
        strides=[1, 4],
        window_sizes=[None, 7],
        compressor="attention",
        next_latent_loss_weight=[0.5, 0],
        predict_from_all=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HierarchicalLMConfig and loaded.to_diff_dict() == config.to_diff_dict()


BAD = {
    "factors not unique": ({"compression_factors": [1, 2, 2]}, "compression_factors"),
    "a factor of three": ({"compression_factors": [1, 3]}, "compression_factors"),
    "a factor of zero": ({"compression_factors": 0}, "compression_factors"),
    "no hierarchy": ({"compression_factors": []}, "compression_factors"),
    "a stride above the factor": ({"compression_factors": [1, 2], "strides": [1, 4]}, "strides"),
    "a stride of three": ({"compression_factors": [1, 8], "strides": [1, 3]}, "strides"),
    "a stride of zero": ({"compression_factors": [1, 8], "strides": [1, 0]}, "strides"),
    "short strides": ({"compression_factors": [1, 2, 4], "strides": [1, 2]}, "strides"),
    "long widths": ({"compression_factors": [1, 2], "hidden_sizes": [8, 8, 8]}, "hidden_sizes"),
    "short windows": ({"compression_factors": [1, 2], "window_sizes": [8]}, "window_sizes"),
    "short heads": ({"compression_factors": [1, 2], "num_attention_heads": [8]}, "num_attention_heads"),
    "short head dims": ({"compression_factors": [1, 2], "head_dim": [8]}, "head_dim"),
    "short multipliers": ({"compression_factors": [1, 2], "mlp_ratio": [4]}, "mlp_ratio"),
    "short loss weights": (
        {"compression_factors": [1, 2], "next_latent_loss_weight": [1.0]},
        "next_latent_loss_weight",
    ),
    "a negative window": ({"window_sizes": -1}, "window_sizes"),
    "a window that is a word": ({"window_sizes": "some"}, "window_sizes"),
    "a head that turns in part": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "streams that nothing reads": (
        {
            "compression_factors": [1, 4],
            "merge": "cross_attention",
            "merge_direction": "coarse_to_fine",
            "predict_hierarchy": 4,
        },
        "coarse_to_fine",
    ),
    "a loss weight that is no number": ({"prophet_loss_weight": float("nan")}, "prophet_loss_weight"),
    "an odd head": ({"head_dim": 7}, "head_dim"),
    "no head": ({"num_attention_heads": 0}, "num_attention_heads"),
    "no width": ({"hidden_size": 8, "hidden_sizes": 0}, "hidden_sizes"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "no feed-forward": ({"mlp_ratio": 0}, "mlp_ratio"),
    "another merge": ({"merge": "sum"}, "merge"),
    "another receiver": ({"merge_into": "none"}, "merge_into"),
    "another direction": ({"merge_direction": "up"}, "merge_direction"),
    "another window type": ({"window_type": "round"}, "window_type"),
    "another compressor": ({"compression_factors": [1, 4], "compressor": ["conv", "mean"]}, "compressor"),
    "another norm": ({"attention_norm": "batch"}, "attention_norm"),
    "attention over two": ({"compression_factors": [1, 2], "compressor": "attention"}, "compressor"),
    "predicting with a stride": (
        {"compression_factors": [1, 2], "strides": [1, 2], "predict_hierarchy": 2},
        "predict_hierarchy",
    ),
    "predicting a hierarchy that is not there": (
        {"compression_factors": [1, 2], "predict_hierarchy": 4},
        "predict_hierarchy",
    ),
    "tied to another width": (
        {"compression_factors": [1, 2], "hidden_sizes": [8, 16], "tie_word_embeddings": True},
        "tie_word_embeddings",
    ),
    "a negative loss weight": ({"prophet_loss_weight": -1}, "prophet_loss_weight"),
    "a negative latent weight": (
        {"compression_factors": [1, 2], "next_latent_loss_weight": [1, -1]},
        "next_latent_loss_weight",
    ),
    "another latent loss": ({"next_latent_loss_type": "huber"}, "next_latent_loss_type"),
    "no rollout": ({"next_latent_rollouts": 0}, "next_latent_rollouts"),
    "rollout weights of another length": (
        {"next_latent_rollouts": 2, "next_latent_rollout_weights": [1.0]},
        "next_latent_rollout_weights",
    ),
    "rollout weights without a sum": (
        {"next_latent_rollouts": 2, "next_latent_rollout_weights": [0.0, 0.0]},
        "next_latent_rollout_weights",
    ),
    "dynamics without width": ({"dynamics_hidden_size": 0}, "dynamics_hidden_size"),
    "a scale base of zero": ({"xpos_scale_base": 0}, "xpos_scale_base"),
    "frequencies that change": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_named(case):
    values, name = BAD[case]
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name):
        HierarchicalLMConfig(**values)


def test_what_is_saved_can_be_read_as_a_config_of_no_family(tmp_path):
    """As `Trainer` does before it resumes."""
    for head_dim, written in ((32, 32), ([32, 64, 32], [32, 64, 32])):
        config = HierarchicalLMConfig(compression_factors=[1, 2, 8], strides=[1, 1, 4], head_dim=head_dim)
        assert config.to_dict()["head_dim"] == written
        config.save_pretrained(tmp_path)
        assert HierarchicalLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
        if head_dim == 32:
            assert PreTrainedConfig.from_json_file(tmp_path / "config.json").head_dim == 32
