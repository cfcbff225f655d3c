"""training/convert_hierarchical.py: files in, a folder out, and nothing left over in between. No prototype needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_hierarchical import DEFAULTS, convert, convert_config, convert_state_dict, load_prototype, parameter_names
from safetensors.torch import save_file

from modeling_heptapod import HierarchicalLMForCausalLM


SCRIPT = Path(__file__).parent.parent.parent / "training" / "convert_hierarchical.py"
ARGUMENTS = {
    "num_tokens": 30,
    "dim": [8, 12, 16],
    "depth": 2,
    "seq_len": 64,
    "heads": 2,
    "dim_head": 4,
    "hierarchies": [1, 2, 8],
    "hierarchical_stride": [1, 1, 4],
    "window_sizes": [4, None, 0],
}


def prototype_state(**overrides):
    """Random weights under the prototype's names and shapes, with those of ours to go by."""
    config = convert_config({**ARGUMENTS, **overrides})
    state = {}
    for ours, tensor in HierarchicalLMForCausalLM(config).state_dict().items():
        theirs, tensor = parameter_names(config)[ours], torch.randn_like(tensor)
        if theirs.endswith("conv.weight"):
            tensor = tensor.view(len(tensor), -1, config.hidden_size).transpose(1, 2).contiguous()
        if theirs.endswith("compress_fn.3.weight"):
            tensor = tensor.unsqueeze(-1)
        # What the prototype has in one matrix, ours have in one for each stream.
        state[theirs] = torch.cat((state[theirs], tensor), dim=1) if theirs in state else tensor
    for layer in range(2):  # what we compute ourselves, and gains
        state[f"hierarchical_merges.{layer}.net.0.gamma"] = torch.ones(sum(config.hidden_sizes))
        state[f"layers.{layer}.0.attn.attn_fn.rel_pos.inv_freq"] = torch.ones(2)
        state[f"layers.{layer}.1.attn.rotary_emb.freqs"] = torch.ones(2)
    return state


def test_every_number_arrives():
    state = prototype_state()
    ours = convert(ARGUMENTS, state).state_dict()
    for name, theirs in parameter_names(convert_config(ARGUMENTS)).items():
        if ".merge.up_projs." in name:
            continue
        assert torch.equal(ours[name].flatten().sort().values, state[theirs].flatten().sort().values), name
    assert set(ours) == set(parameter_names(convert_config(ARGUMENTS)))


def test_the_gain_of_a_merge_moves_into_its_first_matrix():
    state = prototype_state()
    gain = state["hierarchical_merges.1.net.0.gamma"] = torch.randn(36)
    merge = convert(ARGUMENTS, state).model.layers[1].merge
    ours = torch.cat([proj.weight for proj in merge.up_projs], dim=1)
    assert torch.equal(ours, state["hierarchical_merges.1.net.1.weight"] * gain)
    assert [proj.in_features for proj in merge.up_projs] == [8, 12, 16]


def test_taps_of_the_convolution_are_oldest_first():
    state = prototype_state()
    weight = convert(ARGUMENTS, state).model.compressors[1].conv_in.weight
    taps = state["compressors.1.compress_fn.1.conv.weight"]
    assert torch.equal(weight[:, :16], taps[:, :, 0]) and torch.equal(weight[:, 16:], taps[:, :, 1])


def test_pairs_of_rotary_channels():
    """Only full attention of the prototype rotates neighbouring channels."""
    state = prototype_state()
    blocks = convert(ARGUMENTS, state).model.layers[1].blocks
    assert torch.equal(blocks[0].self_attn.qkv_proj.weight, state["layers.1.0.attn.to_qkv.weight"])
    theirs = state["layers.1.1.attn.to_qkv.weight"].view(3, 2, 4, 12)
    ours = blocks[1].self_attn.qkv_proj.weight.view(3, 2, 4, 12)
    assert torch.equal(ours[:2], theirs[:2][:, :, [0, 2, 1, 3]]) and torch.equal(ours[2], theirs[2])


def test_config():
    config = convert_config({**ARGUMENTS, "next_latent_loss_weight": (0.1, 0.0, 0.3), "ignore_index": 3})
    assert (config.compression_factors, config.strides, config.hidden_sizes) == ([1, 2, 8], [1, 1, 4], [8, 12, 16])
    assert (config.num_attention_heads, config.head_dim, config.mlp_ratio) == ([2] * 3, [4] * 3, [4] * 3)
    assert config.window_sizes == [5, None, 0] and config.window_type == "sliding"
    assert config.attention_norm == ["layer_norm", "rms_norm", "rms_norm"] and config.use_xpos == [False, True, False]
    assert (config.merge, config.merge_into, config.predict_from_all, config.predict_index) == (
        "concat",
        "predicting",
        False,
        0,
    )
    assert (config.reconstruction_loss_weight, config.next_latent_loss_weight) == (0.1, [0.1, 0.0, 0.3])
    assert (config.prophet_loss_weight, config.quantized_prophet_loss_weight) == (0, 0)
    assert (config.next_latent_loss_type, config.next_latent_dynamic_weights) == ("mse_and_cosine", True)
    assert (config.max_position_embeddings, config.pad_token_id, config.tie_word_embeddings) == (64, 3, False)
    blocks = convert_config(ARGUMENTS, block_windows=True)
    assert blocks.window_sizes == [4, None, 0] and blocks.window_type == "block"


def test_windows_wider_than_the_longest_stream_are_none():
    config = convert_config({**ARGUMENTS, "window_sizes": [64, 33, 8]})
    assert config.window_sizes == [65, None, 9]
    config = convert_config({**ARGUMENTS, "window_sizes": 9})
    assert config.window_sizes == [10, 10, None]


@pytest.mark.parametrize(
    "weights", [{"recon_loss_weight": 0.0}, {"next_latent_loss_weight": [0.0, 0.2, 0.0]}], ids=str
)
def test_losses_that_are_off_are_left_behind(weights):
    state = prototype_state()
    del state["compressors.1.to_recon.weight"], state["compressors.2.to_recon.weight"]
    if "recon_loss_weight" not in weights:
        state |= {name: tensor for name, tensor in prototype_state().items() if "to_recon" in name}
    model = convert({**ARGUMENTS, **weights}, state)
    names = {name for name, _ in model.auxiliary_losses.named_children()}
    assert names == ({"next_latent"} if "recon_loss_weight" in weights else {"reconstruction", "next_latent"})


def test_arguments_of_something_else():
    for name in ("num_tokens", "dim", "depth"):
        with pytest.raises(ValueError, match=f"missing.*'{name}'"):
            convert_config({key: value for key, value in ARGUMENTS.items() if key != name})
    with pytest.raises(ValueError, match="`num_tokens` must be a whole number, got 'x'"):
        convert_config({**ARGUMENTS, "num_tokens": "x"})
    with pytest.raises(ValueError, match="unknown.*'n_layer'"):
        convert_config({**ARGUMENTS, "n_layer": 2})
    with pytest.raises(ValueError, match="`chunk_summarizers` are code"):
        convert_config({**ARGUMENTS, "chunk_summarizers": [None, None, "something"]})
    convert_config({**ARGUMENTS, "chunk_summarizers": [None, None, None]})
    with pytest.raises(ValueError, match="`next_latent_loss_type` must be one of .*huber"):
        convert_config({**ARGUMENTS, "next_latent_loss_type": "huber"})
    assert not {"num_tokens", "dim", "depth"} & set(DEFAULTS)


def test_missing_and_left_over_keys_are_named():
    config, state = convert_config(ARGUMENTS), prototype_state()
    for name in parameter_names(config).values():
        with pytest.raises(ValueError, match="missing.*" + name.replace(".", r"\.")):
            convert_state_dict({key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(ValueError, match="unknown.*layers.2.0.ff.net.1.weight"):
        convert_state_dict({**state, "layers.2.0.ff.net.1.weight": torch.ones(1)}, config)
    with pytest.raises(ValueError, match=r"norms\.0\.bias.*\[3\].*\[8\]"):
        convert_state_dict({**state, "norms.0.bias": torch.ones(3)}, config)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_command_line(suffix, tmp_path):
    state, output = prototype_state(), tmp_path / "output"
    source, arguments = tmp_path / f"prototype.{suffix}", tmp_path / "prototype.json"
    save_file(state, source) if suffix == "safetensors" else torch.save(state, source)
    arguments.write_text(json.dumps(ARGUMENTS))
    command = [sys.executable, SCRIPT, "--state_dict", source, "--arguments", arguments, "--output", output]
    done = subprocess.run(
        [*command, "--block_windows"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent.parent,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    ids = torch.arange(20)[None]
    expected = convert(ARGUMENTS, state, block_windows=True)(ids, labels=ids)
    found = HierarchicalLMForCausalLM.from_pretrained(output)(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_files_that_are_not_there(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"`--state_dict`.*nowhere\.pt"):
        load_prototype(tmp_path / "nowhere.pt", there)
    with pytest.raises(FileNotFoundError, match=r"`--arguments`.*nowhere\.json"):
        load_prototype(there, tmp_path / "nowhere.json")
