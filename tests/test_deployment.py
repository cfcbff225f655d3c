"""Models outside PyTorch's float32: the recurrent step in onnxruntime, weights in int8."""

import copy
import sys
from pathlib import Path

import export_onnx
import numpy as np
import pytest
import torch
from export_onnx import OnnxStep, export_step, write
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TorchAoConfig,
)

from tests.saved_models import save_tiny
from tests.tiny import mostly_slow
from tests.tiny_heptapod import random_page, tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import VARIANTS, random_ids, tiny_leap
from tests.tiny_multigrid import TWO_AXES, random_grid, tiny_multigrid


ROOT = Path(__file__).parent.parent
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50}
# Two layers, one that remembers everything and one that remembers a window; all other ways are among the slow tests.
SHORT = {"num_hidden_layers": 2, "window_sizes": [None, 4]}
STEPS = {"short": SHORT, "short, exp": {**SHORT, "weight_function": "exp", "rescale": None}, **VARIANTS}


def test_the_script_writes_as_much_as_asked_for_and_to_the_end_of_the_text(tmp_path, monkeypatch, capsys):
    save_tiny("leap", tmp_path)
    calls = []

    def write(step, prompt, max_new_tokens):
        calls.append((step, prompt.tolist(), max_new_tokens))
        return iter(np.array([[ord("c")], [ord("d")], [256], [ord("e")]]))  # the third one ends the text

    monkeypatch.setattr(export_onnx, "export_step", lambda model, folder: calls.append((model.dtype, folder)))
    monkeypatch.setattr(export_onnx, "OnnxStep", lambda folder: folder)
    monkeypatch.setattr(export_onnx, "write", write)
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(tmp_path), "--prompt", "ab", "--max_new_tokens", "7"])
    export_onnx.main()
    assert calls == [(torch.float32, tmp_path / "onnx"), (tmp_path / "onnx", [[97, 98]], 7)]
    assert capsys.readouterr().out == f"abcd\n\nwritten: {tmp_path / 'onnx' / 'step.onnx'}\n"


@pytest.mark.parametrize("name", mostly_slow(STEPS, ("short",)))
def test_onnxruntime_writes_what_generate_writes(name, tmp_path):
    """Token for token and logit for logit; a batch of a size that the export has not seen."""
    model = tiny_leap(**STEPS[name])
    export_step(model, tmp_path)
    ids = random_ids(3, 9)
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    written = np.stack(list(write(OnnxStep(tmp_path, rows=3), ids.numpy(), 30)), axis=1)
    np.testing.assert_array_equal(written, expected.sequences[:, 9:].numpy())

    step = OnnxStep(tmp_path, rows=3)
    logits = np.stack([step(tokens) for tokens in expected.sequences[:, :-1].numpy().T], axis=1)
    np.testing.assert_allclose(logits[:, 8:], torch.stack(expected.logits, dim=1), atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(logits[:, :8], model(ids).logits[:, :8], atol=1e-4)
    size = sum(state.nbytes for state in step.states.values())
    assert size == sum(state.nbytes for state in OnnxStep(tmp_path, rows=3).states.values())  # whatever was written


def test_only_leap_has_such_a_step(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a LEAP.*'hierarchical_lm'"):
        export_step(tiny_hierarchical_lm(), tmp_path)


def leap_inputs(model):
    return {"input_ids": random_ids(2, 12)}


def grid_inputs(model):
    return {"input_ids": random_page(2, 4, 5)}


def multigrid_inputs(model):
    return random_grid(model, 2, 12)


CAUSAL, MASKED, CLASSES = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
HIERARCHICAL = {
    "compression_factors": [1, 4],
    "strides": [1, 4],
    "hidden_sizes": 64,
    "head_dim": 32,
    "merge": "cross_attention",
}
LOSSES = {"prophet_loss_weight": 0.1, "quantized_prophet_loss_weight": 0.1, "next_latent_loss_weight": 0.1}
QUANTIZED = {
    "leap": (CAUSAL, leap_inputs, lambda: tiny_leap(hidden_size=64)),
    "leap additive": (CAUSAL, leap_inputs, lambda: tiny_leap(hidden_size=64, mixer="additive")),
    "leap masked": (MASKED, leap_inputs, lambda: tiny_leap("LeapForMaskedLM", hidden_size=64)),
    "leap classes": (CLASSES, leap_inputs, lambda: tiny_leap("LeapForSequenceClassification", pad_token_id=0)),
    "hierarchical_lm": (CAUSAL, leap_inputs, lambda: tiny_hierarchical_lm(**HIERARCHICAL, **LOSSES)),
    "heptapod": (MASKED, grid_inputs, lambda: tiny_heptapod(hidden_size=64, tie_word_embeddings=True)),
    "heptapod feedback": (MASKED, grid_inputs, lambda: tiny_heptapod(hidden_size=64, self_conditioning=True)),
    "multigrid": (CAUSAL, multigrid_inputs, lambda: tiny_multigrid(hidden_size=64, **TWO_AXES)),
    "multigrid leap": (CAUSAL, multigrid_inputs, lambda: tiny_multigrid(hidden_size=64, core="leap", **TWO_AXES)),
    "multigrid lstm": (CAUSAL, multigrid_inputs, lambda: tiny_multigrid(hidden_size=64, core="lstm", **TWO_AXES)),
    "multigrid factored": (
        CAUSAL,
        multigrid_inputs,
        lambda: tiny_multigrid(hidden_size=64, axis_order="factored", **TWO_AXES),
    ),
}


@pytest.fixture(
    params=mostly_slow(QUANTIZED, ("leap", "hierarchical_lm", "heptapod", "multigrid lstm")), scope="module"
)
def quantized(request, tmp_path_factory):
    """A model, the same loaded in int8, that one saved and loaded again, and inputs for all three."""
    auto_class, inputs, build = QUANTIZED[request.param]
    tmp_path = tmp_path_factory.mktemp("quantized")
    model = build()
    model.save_pretrained(tmp_path / "float")
    how = TorchAoConfig(Int8WeightOnlyConfig())
    small = auto_class.from_pretrained(tmp_path / "float", trust_remote_code=True, quantization_config=how)
    small.save_pretrained(tmp_path / "int8")
    again = auto_class.from_pretrained(tmp_path / "int8", trust_remote_code=True)
    return model, small, again, inputs(model)


def linears(model):
    return {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def written(model, inputs):
    if model.config.model_type == "heptapod":
        page = inputs["input_ids"].clone()
        page[:, 1:3, 1:4] = model.config.mask_token_id
        return model.generate(page, max_denoising_steps=3)
    return model.generate(**inputs, max_new_tokens=8, **GREEDY)


def test_int8_weights_come_close_and_come_back(quantized):
    model, small, again, inputs = quantized
    in_int8 = {name for name, linear in linears(small).items() if hasattr(linear.weight, "qdata")}
    # transformers leaves the head, whose weights are often the embeddings, and a model's last module
    left = {"lm_head", "score", *list(linears(model))[-1:]}
    assert in_int8 >= set(linears(model)) - left
    assert all(linears(small)[name].weight.qdata.dtype == torch.int8 for name in in_int8)

    exact, near = outputs(model, inputs), outputs(small, inputs)
    assert not torch.equal(exact, near)
    assert (exact - near).std() < 0.05 * exact.std()
    assert torch.equal(outputs(again, inputs), near)
    if model.can_generate() or model.config.model_type == "heptapod":
        assert torch.equal(written(again, inputs), written(small, inputs))


def test_int8_weights_are_what_every_path_reads(quantized):
    """The same model with the weights that int8 stands for: a path past the modules would give something else."""
    model, small, _, inputs = quantized
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, linear in linears(small).items():
            if hasattr(linear.weight, "qdata"):
                linears(model)[name].weight.copy_(linear.weight.dequantize())
    torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)
    if model.config.model_type != "heptapod" and model.can_generate():
        # With gradients, and as many rows as MultiGrid multiplies at once.
        longer = {name: value.repeat(12, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        losses = [x(**longer, labels=longer["input_ids"], use_cache=False).loss for x in (small, model)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
        assert torch.equal(written(small, inputs), written(model, inputs))


def test_int8_takes_a_third_of_the_memory(tmp_path):
    """Of leap-tiny, where embeddings, norms and scales stay float32."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "configs" / "leap-tiny"))
    model.save_pretrained(tmp_path / "float")
    how = TorchAoConfig(Int8WeightOnlyConfig())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=how)
    small.save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("int8", "float")]
    assert sizes[0] < sizes[1] / 3
