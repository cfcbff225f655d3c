"""No option is lost between saving and loading: each is set to something that is not its default, and comes back."""

import json

import pytest
from transformers import AutoConfig

from modeling_heptapod import (
    AffixAxis,
    ConstantAxis,
    DecisionTreeAxis,
    GoldTagAxis,
    HeptapodConfig,
    HeptapodGenerationConfig,
    HeptapodProcessor,
    HierarchicalLMConfig,
    LeapConfig,
    MultiGridConfig,
    MultiGridProcessor,
    PartOfSpeechAxis,
    PythonIndentationAxis,
    RandomAxis,
    make_axis,
)
from modeling_heptapod.heptapod.generation_config_heptapod import OPTIONS


COMMON = {
    "vocab_size": 90,
    "num_hidden_layers": 2,
    "hidden_act": "relu",
    "layer_norm_eps": 3e-4,
    "initializer_range": 0.3,
    "pad_token_id": 3,
}
CAUSAL = {"bos_token_id": 4, "eos_token_id": [5, 6], "use_cache": False, "max_position_embeddings": 70}
DROPOUT = {"hidden_dropout": 0.25, "attention_dropout": 0.125}
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}

CONFIGS = {
    LeapConfig: {
        **COMMON,
        **CAUSAL,
        **DROPOUT,
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_attention_heads": 2,
        "weight_function": "exp",
        "rescale": 4.0,
        "output_gate": "gelu",
        "window_sizes": [7, None],
        "sink_weight": 0.5,
        "is_causal": False,
        "tie_word_embeddings": False,
        "rope_parameters": ROPE,
    },
    HeptapodConfig: {
        **COMMON,
        **DROPOUT,
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_attention_heads": 2,
        "attention_types": ["dilated", "global"],
        "local_radius": [1, 5],
        "dilation": [3, 4],
        "num_global_heads": 1,
        "adaptive_span": True,
        "span_loss_weight": 0.25,
        "use_relative_position_bias": True,
        "rope_theta": 50.0,
        "use_absolute_position_embeddings": False,
        "grid_size": [5, 9],
        "self_conditioning": True,
        "neighbor_loss_weight": 0.5,
        "tie_word_embeddings": False,
        "mask_token_id": 7,
    },
    HierarchicalLMConfig: {
        **COMMON,
        **CAUSAL,
        "compression_factors": [2, 4],
        "strides": [1, 2],
        "hidden_size": 40,
        "hidden_sizes": [24, 40],
        "num_attention_heads": [2, 4],
        "head_dim": [8, 16],
        "mlp_ratio": [2, 3],
        "window_sizes": [5, None],
        "window_type": "block",
        "attention_norm": ["layer_norm", "rms_norm"],
        "use_xpos": [False, True],
        "xpos_scale_base": 100,
        "rope_parameters": ROPE,
        "shared_attention": True,
        "compressor": ["conv", "attention"],
        "predict_hierarchy": 4,
        "predict_from_all": True,
        "merge": "cross_attention",
        "merge_into": "all",
        "merge_direction": "coarse_to_fine",
        "rms_norm_eps": 2e-4,
        "tie_word_embeddings": True,
        "reconstruction_loss_weight": 0.5,
        "prophet_loss_weight": 0.25,
        "quantized_prophet_loss_weight": 0.125,
        "prophet_codebook_size": 11,
        "prophet_codebook_dim": 9,
        "prophet_num_codebooks": 3,
        "next_latent_loss_weight": [0.5, 0.25],
        "next_latent_loss_type": "smooth_l1",
        "next_latent_rollouts": 2,
        "next_latent_rollout_weights": [2.0, 1.0],
        "next_latent_dynamic_weights": False,
        "next_latent_dynamic_decay": 0.5,
        "detach_summaries": False,
        "dynamics_hidden_size": 20,
        "dynamics_num_layers": 2,
    },
    MultiGridConfig: {
        **COMMON,
        **CAUSAL,
        "hidden_dropout": 0.25,
        "axis_names": ["kind", "depth"],
        "axis_vocab_sizes": [7, 5],
        "hidden_size": 32,
        "axis_hidden_size": 16,
        "intermediate_size": 50,
        "num_attention_heads": 2,
        "core": "leap",
        "axis_order": "factored",
        "cross_feed_forward": False,
        "main_loss_weight": 0.75,
        "axis_weights": [0.5, 0.25],
        "window_sizes": [7, None],
        "tie_word_embeddings": True,
    },
}
# What others rule out.
LEFT_OUT = {
    LeapConfig: {"mixer", "position_embedding_type"},
    HierarchicalLMConfig: {"tie_word_embeddings", "predict_from_all"},
    MultiGridConfig: {"attention_dropout"},
}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_option_of_a_config(config_class, tmp_path):
    values, left_out = dict(CONFIGS[config_class]), LEFT_OUT.get(config_class, set())
    not_saved = ("model_type", "keys_to_ignore_at_inference", "_auto_classes")
    own = {name for name in config_class.__annotations__ if name not in not_saved}
    assert own - left_out <= set(values) <= own
    if config_class is HierarchicalLMConfig:
        values["tie_word_embeddings"] = False  # the width of all streams is none of the embeddings
    default = config_class()
    for name, value in values.items():
        assert getattr(default, name) != value or name in left_out, name
    config_class(**values).save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {name: getattr(loaded, name) for name in values} == values


def test_the_options_that_were_left_out(tmp_path):
    for config in (
        LeapConfig(mixer="additive", position_embedding_type="alibi"),
        LeapConfig(rescale=None, window_sizes=[None] * 4),
        HierarchicalLMConfig(hidden_sizes=24, tie_word_embeddings=True, window_sizes=0),
        MultiGridConfig(attention_dropout=0.125),
    ):
        config.save_pretrained(tmp_path)
        loaded = type(config).from_pretrained(tmp_path)
        for name in type(config).__annotations__:
            assert getattr(loaded, name) == getattr(config, name), name


def test_every_option_of_generation(tmp_path):
    """Among them zero and False, which are not the same as nothing."""
    for options in (
        {
            "sampler": "random",
            "mask_schedule": "linear",
            "max_denoising_steps": 5,
            "entropy_bound": 0.0,
            "choice_temperature": 4.5,
            "remask_rate": 0.25,
            "remask_threshold": 0.0,
            "stability_threshold": 2,
            "do_sample": True,
            "temperature": [1.0, 0.5],
            "top_k": 0,
            "top_p": 0.5,
            "seed": 0,
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_history": True,
        },
        {"do_sample": False, "return_dict_in_generate": False, "output_scores": False, "output_history": False},
    ):
        assert set(options) <= set(OPTIONS)
        HeptapodGenerationConfig(**options).save_pretrained(tmp_path)
        loaded = HeptapodGenerationConfig.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in OPTIONS} == {**dict.fromkeys(OPTIONS), **options}
        if len(options) > 4:
            assert set(options) == set(OPTIONS)


TREE = {"nodes": [[1, 40, 1, 2], [0], [1]], "vocabulary": ["none", "late"]}
AXES = [
    (ConstantAxis, {"size": 3}),
    (RandomAxis, {"size": 5, "seed": 7}),
    (PythonIndentationAxis, {"max_level": 3}),
    (AffixAxis, {"entries": ["un-", "-ing", "the"]}),
    (PartOfSpeechAxis, {"alignment": "word", "tagset": "penn"}),
    (GoldTagAxis, {"vocabulary": ["none", "NOUN"]}),
    (DecisionTreeAxis, TREE),
]


@pytest.mark.parametrize("axis_class, options", AXES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_option_of_an_axis(axis_class, options):
    axis = axis_class("other_name", **options)
    again = make_axis(json.loads(json.dumps(axis.to_dict())))
    assert type(again) is axis_class and (again.name, again.arguments()) == ("other_name", options)
    assert (again.vocabulary, again.causal) == (axis.vocabulary, axis.causal)
    assert axis_class().vocabulary != axis.vocabulary or axis_class is RandomAxis
    assert axis_class().arguments() != options


def test_every_option_of_a_processor(by_bytes, tmp_path):
    options = {"overflow": "truncate", "blank_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    page = HeptapodProcessor(by_bytes, height=4, width=9, **options)
    page.save_pretrained(tmp_path / "page")
    loaded = HeptapodProcessor.from_pretrained(tmp_path / "page")
    expected = {"height": 4, "width": 9, **options}
    assert {name: getattr(loaded, name) for name in expected} == expected
    axes = [axis_class("a" * (i + 1), **options) for i, (axis_class, options) in enumerate(AXES)]
    MultiGridProcessor(by_bytes, axes, chat_template="{{ messages }}").save_pretrained(tmp_path / "grid")
    loaded = MultiGridProcessor.from_pretrained(tmp_path / "grid")
    assert loaded.chat_template == "{{ messages }}"
    assert [axis.to_dict() for axis in loaded.axes] == [axis.to_dict() for axis in axes]


@pytest.fixture(scope="module")
def by_bytes():
    from corpora import build_tokenizer

    return build_tokenizer("byte", [], for_pages=True)
