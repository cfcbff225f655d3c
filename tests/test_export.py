"""Exported folders work where this package is not installed: other interpreter, other directory, no Triton."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tests.clean_room import run_alone
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import random_ids, tiny_leap
from tests.tiny_multigrid import TWO_AXES, tiny_multigrid


AUTO_MAPS = {
    "leap": {
        "AutoConfig": "configuration_leap.LeapConfig",
        "AutoModel": "modeling_leap.LeapModel",
        "AutoModelForCausalLM": "modeling_leap.LeapForCausalLM",
        "AutoModelForMaskedLM": "modeling_leap.LeapForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_leap.LeapForSequenceClassification",
    },
    "heptapod": {
        "AutoConfig": "configuration_heptapod.HeptapodConfig",
        "AutoModel": "modeling_heptapod.HeptapodModel",
        "AutoModelForMaskedLM": "modeling_heptapod.HeptapodForMaskedLM",
    },
    "hierarchical_lm": {
        "AutoConfig": "configuration_hierarchical_lm.HierarchicalLMConfig",
        "AutoModel": "modeling_hierarchical_lm.HierarchicalLMModel",
        "AutoModelForCausalLM": "modeling_hierarchical_lm.HierarchicalLMForCausalLM",
    },
    "multigrid": {
        "AutoConfig": "configuration_multigrid.MultiGridConfig",
        "AutoModel": "modeling_multigrid.MultiGridModel",
        "AutoModelForCausalLM": "modeling_multigrid.MultiGridForCausalLM",
    },
}
# The modules that a family's export consists of, and nothing else.
CODE = {
    "leap": {
        "additive_mixer.py",
        "auto_mapping.py",
        "cache_checks.py",
        "cache_mixins.py",
        "cache_utils.py",
        "config_checks.py",
        "configuration_leap.py",
        "cpu_kernels.py",
        "cpu_math_source.py",
        "focus.py",
        "focus_cpu.py",
        "focus_cpu_source.py",
        "focus_functions.py",
        "focus_operator.py",
        "focus_recurrent.py",
        "focus_tiles.py",
        "focus_triton.py",
        "focus_triton_backward.py",
        "focus_triton_forward.py",
        "focus_triton_parts.py",
        "forward_context.py",
        "leap_mixing.py",
        "leap_step.py",
        "losses.py",
        "mixing_rows.py",
        "model_inputs.py",
        "modeling_leap.py",
        "native_library.py",
        "packing.py",
        "plain_modules.py",
        "recurrent_cache.py",
        "registered_operators.py",
        "remote_code.py",
        "renamed_fields.py",
        "running_mean.py",
        "static_cache.py",
        "step_program.py",
        "step_program_source.py",
        "token_layout.py",
        "transformers_versions.py",
        "unused_kwargs.py",
    },
    "heptapod": {
        "adaptive_attention.py",
        "attention_operator.py",
        "auto_mapping.py",
        "config_checks.py",
        "configuration_heptapod.py",
        "cpu_attention_source.py",
        "cpu_kernels.py",
        "cpu_math_source.py",
        "generation_config_heptapod.py",
        "generation_heptapod.py",
        "grid_positions.py",
        "heptapod_blocks.py",
        "local_attention.py",
        "local_attention_cpu.py",
        "local_attention_cpu_source.py",
        "local_attention_layout.py",
        "local_attention_operator.py",
        "local_attention_triton.py",
        "local_attention_triton_kernels.py",
        "losses.py",
        "masked_diffusion.py",
        "model_inputs.py",
        "modeling_heptapod.py",
        "native_library.py",
        "page_inputs.py",
        "registered_operators.py",
        "remote_code.py",
        "renamed_fields.py",
        "samplers.py",
        "tiled_attention.py",
        "transformers_versions.py",
        "triton_attention.py",
        "unused_kwargs.py",
    },
    "hierarchical_lm": {
        "attention_operator.py",
        "auto_mapping.py",
        "auxiliary_losses.py",
        "cache_checks.py",
        "cache_mixins.py",
        "cache_utils.py",
        "causal_compressors.py",
        "config_checks.py",
        "configuration_hierarchical_lm.py",
        "cpu_attention_source.py",
        "cpu_kernels.py",
        "cpu_math_source.py",
        "eager_attention.py",
        "forward_context.py",
        "hierarchical_block.py",
        "hierarchical_cache.py",
        "hierarchical_step.py",
        "hierarchy_merges.py",
        "key_room.py",
        "linear_cross_entropy.py",
        "losses.py",
        "model_inputs.py",
        "modeling_hierarchical_lm.py",
        "native_library.py",
        "packing.py",
        "plain_modules.py",
        "registered_operators.py",
        "remote_code.py",
        "renamed_fields.py",
        "static_cache.py",
        "static_hierarchical_cache.py",
        "step_program.py",
        "step_program_source.py",
        "stream_plan.py",
        "token_layout.py",
        "transformers_versions.py",
        "triton_attention.py",
        "unused_kwargs.py",
        "windowed_attention.py",
        "windowed_attention_cpu.py",
        "windowed_attention_cpu_source.py",
        "windowed_attention_layout.py",
        "windowed_attention_operator.py",
        "windowed_attention_triton.py",
        "windowed_attention_triton_kernels.py",
    },
}
CODE["multigrid"] = {  # a core is LEAP's mixing step
    *CODE["leap"] - {"additive_mixer.py", "leap_step.py", "modeling_leap.py"},
    "configuration_multigrid.py",
    "axis_state.py",
    "eager_attention.py",
    "forward_context.py",
    "generation_multigrid.py",
    "key_room.py",
    "multigrid_step.py",
    "modeling_multigrid.py",
    "multigrid_blocks.py",
    "multigrid_cache.py",
    "multigrid_context.py",
    "multigrid_cores.py",
    "multigrid_growth.py",
    "processing_utils.py",
}
HEADS = {
    "LeapModel": "AutoModel",
    "LeapForCausalLM": "AutoModelForCausalLM",
    "LeapForMaskedLM": "AutoModelForMaskedLM",
    "LeapForSequenceClassification": "AutoModelForSequenceClassification",
    "HeptapodModel": "AutoModel",
    "HeptapodForMaskedLM": "AutoModelForMaskedLM",
    "HierarchicalLMModel": "AutoModel",
    "HierarchicalLMForCausalLM": "AutoModelForCausalLM",
    "MultiGridModel": "AutoModel",
    "MultiGridForCausalLM": "AutoModelForCausalLM",
}
# What the exports below are made of: all the ways in which modules or weights differ.
MODELS = {
    "leap": {
        "focus": {},
        "additive": {"mixer": "additive"},
        "alibi": {"position_embedding_type": "alibi", "tie_word_embeddings": True},
    },
    "heptapod": {
        "plain": {},
        "split": {"num_global_heads": 1, "tie_word_embeddings": True},
        "feedback": {"self_conditioning": True, "neighbor_loss_weight": 0.5},
    },
    "hierarchical_lm": {
        "plain": {"compression_factors": 1, "window_sizes": 7, "tie_word_embeddings": True},
        "streams": {
            "compression_factors": [1, 4, 8],
            "strides": [1, 1, 4],
            "window_sizes": [4, None, 3],
            "compressor": ["conv", "attention", "conv"],
            "merge": "cross_attention",
            "prophet_loss_weight": 0.1,
            "quantized_prophet_loss_weight": 0.1,
            "next_latent_loss_weight": 0.1,
        },
    },
    "multigrid": {
        "plain": {"tie_word_embeddings": True},
        "axes": {**TWO_AXES, "axis_hidden_size": 8, "cross_feed_forward": False},
        "ordered": {**TWO_AXES, "core": "leap", "axis_order": "factored"},
        "lstm": {**TWO_AXES, "core": "lstm", "axis_weights": [0.2, 0.3]},
    },
}
MASK, GRID = 50, (3, 4)  # of the grid models, whose other tokens are those of the others

CLEAN_ROOM = """
import json
import torch
import transformers

folder, jobs = sys.argv[1], json.loads(sys.argv[2])
ids = torch.load(folder + "/ids.pt")
results = {}
for name, auto in jobs:
    auto_class = getattr(transformers, auto)
    model = auto_class.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    tracks = {}
    if model.config.model_type == "multigrid":
        tracks["axis_ids"] = ids[:, None].expand(-1, model.config.num_axes, -1) % 5
    with torch.no_grad():
        results[name, auto] = model(ids, **tracks)[0]
    if auto == "AutoModelForCausalLM":
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **tracks)
        results[name, "tokens"] = tokens
    if auto == "AutoModelForMaskedLM" and hasattr(model, "generate"):
        page = ids.view(2, 3, 4).clone()
        page[:, 1:, 1:] = model.config.mask_token_id
        results[name, "tokens"] = model.generate(page, max_denoising_steps=3, do_sample=True, seed=0)
    if sys.argv[3] == "again":
        model.save_pretrained(f"{folder}/{name}-again")
    print(type(model).__name__, type(model.config).__name__)
torch.save(results, folder + "/results.pt")
"""


def in_a_clean_room(folder, jobs, again="no", code=CLEAN_ROOM):
    """Load exports in a new interpreter that has nothing of this repository; `jobs` are (folder, Auto class)."""
    said = run_alone(code, folder, folder, json.dumps(jobs), again, home=f"home-{again}")
    return torch.load(folder / "results.pt"), said.split("\n")


def family(head):
    return {"Hep": "heptapod", "Hie": "hierarchical_lm", "Lea": "leap", "Mul": "multigrid"}[head[:3]]


def tiny(head, **options):
    if family(head) == "leap":
        return tiny_leap(head, pad_token_id=0, **options)
    if family(head) == "hierarchical_lm":
        return tiny_hierarchical_lm(head, pad_token_id=0, **options)
    if family(head) == "multigrid":
        return tiny_multigrid(head, pad_token_id=0, **options)
    return tiny_heptapod(head, vocab_size=52, mask_token_id=MASK, pad_token_id=51, grid_size=GRID, **options)


def tracks(model, ids):
    """What a model wants beside `ids`, as in the clean room."""
    if model.config.model_type != "multigrid":
        return {}
    return {"axis_ids": ids[:, None].expand(-1, model.config.num_axes, -1) % 5}


def export(folder, models):
    ids = random_ids(2, 12)
    torch.save(ids, folder / "ids.pt")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return ids


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every class and kind of model exported, loaded in a clean room, and saved again from there."""
    folder = tmp_path_factory.mktemp("exported")
    models = {
        f"{head}-{kind}": tiny(head, **options) for head in HEADS for kind, options in MODELS[family(head)].items()
    }
    ids = export(folder, models)
    jobs = [(name, HEADS[name.split("-")[0]]) for name in models]
    results, printed = in_a_clean_room(folder, jobs, again="again")
    return folder, models, ids, results, printed


def test_logits_are_equal_to_the_last_bit(exported):
    _, models, ids, results, _ = exported
    for name, model in models.items():
        with torch.no_grad():
            logits = model(ids, **tracks(model, ids))[0]
        assert torch.equal(results[name, HEADS[name.split("-")[0]]], logits), name


def test_generated_tokens_are_equal(exported):
    _, models, ids, results, _ = exported
    for name, model in models.items():
        if "ForCausalLM" in name:
            given = {"attention_mask": torch.ones_like(ids), **tracks(model, ids)}
            assert torch.equal(
                results[name, "tokens"], model.generate(ids, max_new_tokens=10, do_sample=False, **given)
            )
        elif name.startswith("HeptapodForMaskedLM"):
            page = ids.view(2, *GRID).clone()
            page[:, 1:, 1:] = MASK
            assert torch.equal(
                results[name, "tokens"], model.generate(page, max_denoising_steps=3, do_sample=True, seed=0)
            )


def test_classes_come_from_the_folder(exported):
    *_, models, _, _, printed = exported
    expected = [f"{type(model).__name__} {type(model.config).__name__}" for model in models.values()]
    assert printed[: len(models)] == expected


def test_folders_have_code_weights_and_a_full_map(exported):
    folder, models, *_ = exported
    for name, model in models.items():
        for exported_folder in (folder / name, folder / f"{name}-again"):
            config = json.loads((exported_folder / "config.json").read_text(encoding="utf-8"))
            auto_map = {auto: path.split("--")[-1] for auto, path in config["auto_map"].items()}
            assert auto_map == AUTO_MAPS[family(name)]
            assert config["architectures"] == [type(model).__name__] and config["model_type"] == family(name)
            files = {file.name for file in exported_folder.iterdir()}
            assert {file for file in files if file.endswith(".py")} - {"__init__.py"} == CODE[family(name)]
            assert "model.safetensors" in files
            writes = "ForCausalLM" in name or name.startswith("HeptapodForMaskedLM")
            assert ("generation_config.json" in files) == writes


def test_what_is_saved_from_there_works_there(exported):
    folder, models, ids, *_ = exported
    kinds = ("focus", "alibi", "feedback", "streams", "axes", "ordered")
    jobs = [(f"{name}-again", HEADS[name.split("-")[0]]) for name in models if name.endswith(kinds)]
    results, _ = in_a_clean_room(folder, jobs, again="no")
    for name, auto in jobs:
        with torch.no_grad():
            model = models[name.removesuffix("-again")]
            assert torch.equal(results[name, auto], model(ids, **tracks(model, ids))[0]), name


def test_a_causal_checkpoint_loads_through_every_auto_class(tmp_path):
    model = tiny_leap(pad_token_id=0)
    ids = export(tmp_path, {"causal": model})
    heads = {head: auto for head, auto in HEADS.items() if family(head) == "leap"}
    results, printed = in_a_clean_room(tmp_path, [("causal", auto) for auto in heads.values()])
    assert [line.split()[0] for line in printed[:4]] == list(heads)
    with torch.no_grad():
        assert torch.equal(results["causal", "AutoModel"], model.model(ids).last_hidden_state)
        bidirectional = model.lm_head(model.model(ids, is_causal=False).last_hidden_state)
        assert torch.equal(results["causal", "AutoModelForMaskedLM"], bidirectional)


@pytest.mark.slow
def test_a_grid_checkpoint_loads_through_every_auto_class(tmp_path):
    model = tiny("HeptapodForMaskedLM", self_conditioning=True)
    ids = export(tmp_path, {"grid": model})
    results, printed = in_a_clean_room(tmp_path, [("grid", "AutoModel"), ("grid", "AutoModelForMaskedLM")])
    assert [line.split()[0] for line in printed[:2]] == ["HeptapodModel", "HeptapodForMaskedLM"]
    with torch.no_grad():
        assert torch.equal(results["grid", "AutoModel"], model.model(ids).last_hidden_state)
        assert torch.equal(results["grid", "AutoModelForMaskedLM"], model(ids).logits)


@pytest.mark.slow
def test_a_hierarchical_checkpoint_loads_through_every_auto_class(tmp_path):
    model = tiny("HierarchicalLMForCausalLM", **MODELS["hierarchical_lm"]["streams"])
    ids = export(tmp_path, {"hierarchical": model})
    results, printed = in_a_clean_room(
        tmp_path, [("hierarchical", "AutoModel"), ("hierarchical", "AutoModelForCausalLM")]
    )
    assert [line.split()[0] for line in printed[:2]] == ["HierarchicalLMModel", "HierarchicalLMForCausalLM"]
    with torch.no_grad():
        assert torch.equal(results["hierarchical", "AutoModel"], model.model(ids).last_hidden_state)
        assert torch.equal(results["hierarchical", "AutoModelForCausalLM"], model(ids).logits)


@pytest.mark.slow
def test_a_multigrid_checkpoint_loads_through_every_auto_class(tmp_path):
    model = tiny("MultiGridForCausalLM", **MODELS["multigrid"]["ordered"])
    ids = export(tmp_path, {"grown": model})
    model.add_axis("new", 5)
    export(tmp_path, {"grown": model})
    results, printed = in_a_clean_room(tmp_path, [("grown", "AutoModel"), ("grown", "AutoModelForCausalLM")])
    assert [line.split()[0] for line in printed[:2]] == ["MultiGridModel", "MultiGridForCausalLM"]
    with torch.no_grad():
        given = tracks(model, ids)
        assert torch.equal(results["grown", "AutoModel"], model.model(ids, **given).last_hidden_state)
        assert torch.equal(results["grown", "AutoModelForCausalLM"], model(ids, **given).logits)


@pytest.mark.parametrize(
    "head", ["LeapForCausalLM", "HeptapodForMaskedLM", "HierarchicalLMForCausalLM", "MultiGridForCausalLM"]
)
def test_the_package_itself_needs_no_remote_code(head, tmp_path):
    model = tiny(head)
    model.save_pretrained(tmp_path)
    auto_class = AutoModelForCausalLM if "Causal" in head else AutoModelForMaskedLM
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(random_ids(1, 12)).logits, model(random_ids(1, 12)).logits)
