"""training/convert_leap.py: folders in, folders out, and nothing left over in between. No prototype needed."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_leap import ADDITIVE_LAYER, FOCUS_LAYER, convert, convert_config, convert_state_dict, load_prototype
from safetensors.torch import save_file

from modeling_heptapod import LeapForCausalLM


SCRIPT = Path(__file__).parent.parent.parent / "training" / "convert_leap.py"
WIDTH = 16


def prototype_config(additive=False, **overrides):
    """As the prototype writes it."""
    heads, kind = ("n_heads", "FastformerForCausalLM") if additive else ("n_head", "LeapForCausalLM")
    return {
        "model_type": kind,
        "hidden_size": WIDTH,
        "vocab_size": 30,
        heads: 2,
        "use_local_att": True,
        "window_sizes": [32, 4],
        "n_positions": 32,
        "n_layer": 2,
        "rescale": 10,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.25,
        "transformers_version": "5.23.0",
        **overrides,
    }


def prototype_state(additive=False):
    """Random weights under the prototype's names."""
    shapes = {"word_embedding.weight": (30, WIDTH), "last_norm.weight": (WIDTH,), "last_norm.bias": (WIDTH,)}
    body = "fastformer_model" if additive else "leap_model"
    shapes[f"{body}.position_embeddings.weight"] = (32, WIDTH)
    parts = 3 if additive else 4
    for layer in range(2):
        for name in (ADDITIVE_LAYER if additive else FOCUS_LAYER).values():
            shape = (WIDTH,)
            if name.endswith("projections.weight"):
                shape = (parts * WIDTH, WIDTH)
            elif name == "boom.weight":
                shape = (4 * WIDTH, WIDTH)
            elif name == "unboom.weight":
                shape = (WIDTH, 4 * WIDTH)
            elif name == "boom.bias":
                shape = (4 * WIDTH,)
            elif name.endswith("_attn"):
                shape = (2, WIDTH // 2)
            shapes[f"{body}.decoders.{layer}.{name}"] = shape
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state["proj_logits.weight"] = state["word_embedding.weight"].clone()
    if additive:
        state["proj_logits.bias"] = torch.zeros(30)
    return state


@pytest.mark.parametrize("additive", [False, True])
def test_every_tensor_arrives(additive):
    state = prototype_state(additive)
    model = convert(prototype_config(additive), state)
    ours = model.state_dict()
    arrived = [tensor for tensor in ours.values() if tensor.any()]
    for name, tensor in state.items():
        if name != "proj_logits.bias":
            assert any(torch.equal(tensor, other) for other in arrived), name
    zero = {name for name, tensor in ours.items() if not tensor.any()}
    biases = {f"model.layers.{i}.mlp.{part}_proj.bias" for i in (0, 1) for part in ("up", "down")}
    assert zero == (biases if additive else set())
    assert not model.training and model(torch.arange(20)[None]).logits.isfinite().all()


def test_config():
    config = convert_config(prototype_config(window_sizes=[32, 4], pad_token_id=3))
    assert config.window_sizes == [None, 4] and config.max_position_embeddings == 32
    assert (config.weight_function, config.output_gate, config.mixer) == ("exp", "sigmoid", "focus")
    assert (config.rescale, config.sink_weight, config.position_embedding_type) == (10, 1e-5, "absolute")
    assert (config.num_attention_heads, config.vocab_size, config.hidden_size) == (2, 30, WIDTH)
    assert (config.hidden_dropout, config.attention_dropout, config.initializer_range) == (0.1, 0.1, 0.25)
    assert config.tie_word_embeddings and config.pad_token_id == 3
    assert convert_config(prototype_config(rescale=None)).rescale is None
    additive = convert_config(prototype_config(additive=True, n_heads=4))
    assert (additive.mixer, additive.output_gate, additive.num_attention_heads) == ("additive", "none", 4)


def test_a_config_of_something_else():
    with pytest.raises(ValueError, match="model_type.*gpt2"):
        convert_config(prototype_config(model_type="gpt2"))
    for name in ("n_head", "window_sizes", "rescale", "hidden_dropout_prob"):
        config = prototype_config()
        del config[name]
        with pytest.raises(ValueError, match=f"`{name}`"):
            convert_config(config)


@pytest.mark.parametrize("additive", [False, True])
def test_missing_and_left_over_keys_are_named(additive):
    config, state = convert_config(prototype_config(additive)), prototype_state(additive)
    for name in state:
        if name.startswith("proj_logits"):
            continue
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert_state_dict({k: v for k, v in state.items() if k != name}, config)
    with pytest.raises(ValueError, match="unknown.*rotary_thing"):
        convert_state_dict({**state, "rotary_thing": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="decoders.2.boom.weight"):
        body = "fastformer_model" if additive else "leap_model"
        convert_state_dict({**state, f"{body}.decoders.2.boom.weight": torch.ones(1)}, config)


def test_what_has_no_place_in_our_model():
    config, state = convert_config(prototype_config()), prototype_state()
    with pytest.raises(ValueError, match=r"proj_logits\.weight"):
        convert_state_dict({**state, "proj_logits.weight": torch.ones(30, WIDTH)}, config)
    with pytest.raises(ValueError, match=r"proj_logits\.bias"):
        convert_state_dict({**state, "proj_logits.bias": torch.ones(30)}, config)
    with pytest.raises(ValueError, match=r"last_norm\.bias.*\[3\].*\[16\]"):
        convert_state_dict({**state, "last_norm.bias": torch.ones(3)}, config)
    del state["proj_logits.weight"]  # safetensors keep one of two tied tensors
    convert_state_dict(state, config)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_command_line(weights, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(prototype_config()))
    state = prototype_state()
    if weights == "model.safetensors":
        save_file({name: tensor for name, tensor in state.items() if name != "proj_logits.weight"}, source / weights)
    else:
        torch.save(state, source / weights)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--source", source, "--output", output],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent.parent,
        env={**__import__("os").environ, "PYTHONPATH": str(SCRIPT.parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    ids = torch.arange(20)[None]
    expected = convert(prototype_config(), state)(ids).logits
    assert torch.equal(LeapForCausalLM.from_pretrained(output)(ids).logits, expected)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--source.*config\.json"):
        load_prototype(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"--source.*model\.safetensors"):
        load_prototype(tmp_path)
    others = []
    for content in ([1, 2], {"model": {"weight": torch.zeros(1)}}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "other")
        others.append((tmp_path / "other").read_bytes())
    for name in ("pytorch_model.bin", "model.safetensors"):
        for damage in (b"", b"hello", b"not weights at all", pickle.dumps(Path("a class")), *others):
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(ValueError, match=f"{name} holds no weights"):
                load_prototype(tmp_path)
