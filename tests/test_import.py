"""`import modeling_heptapod`: cheap, and everything is registered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import modeling_heptapod


ROOT = Path(__file__).parent.parent
PUBLIC = [
    "LeapConfig",
    "LeapForCausalLM",
    "LeapForMaskedLM",
    "LeapForSequenceClassification",
    "LeapModel",
    "LeapPreTrainedModel",
    "RecurrentCache",
    "StaticRecurrentCache",
]
AUTO = {
    "AutoModel": "LeapModel",
    "AutoModelForCausalLM": "LeapForCausalLM",
    "AutoModelForMaskedLM": "LeapForMaskedLM",
    "AutoModelForSequenceClassification": "LeapForSequenceClassification",
}


def run(code):
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_models():
    """Nor much else beyond transformers' own lazy modules: counted in modules, since seconds depend on the machine."""
    code = f"""
import sys
from transformers import {", ".join(["AutoConfig", *AUTO])}, PreTrainedConfig
from transformers.utils import auto_docstring
before = set(sys.modules)
import modeling_heptapod
heavy = ["transformers.modeling_utils", "transformers.generation.utils", "modeling_heptapod.modeling_leap"]
print([name for name in heavy if name in sys.modules])
print(len([name for name in set(sys.modules) - before if not name.startswith("modeling_heptapod")]) < 20)
modeling_heptapod.LeapModel
print([name for name in heavy if name not in sys.modules])
"""
    assert run(code).split("\n") == ["[]", "True", "[]"]


def test_auto_classes_know_ours():
    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    code = f"""
import transformers, modeling_heptapod
config = modeling_heptapod.LeapConfig(**{small})
print([type(getattr(transformers, auto).from_config(config)).__name__ for auto in {list(AUTO)}])
"""
    assert run(code) == str(list(AUTO.values()))  # through the stand-ins
    for auto, name in AUTO.items():
        model = getattr(transformers, auto).from_config(modeling_heptapod.LeapConfig(**small))
        assert type(model) is getattr(modeling_heptapod, name)


def test_the_config_is_known_by_its_model_type():
    assert type(transformers.AutoConfig.for_model("leap", hidden_size=64)) is modeling_heptapod.LeapConfig


def test_public_names():
    assert sorted(modeling_heptapod.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(modeling_heptapod, name).__name__ == name and name in dir(modeling_heptapod)
    with pytest.raises(AttributeError, match="NoSuchModel"):
        modeling_heptapod.NoSuchModel  # noqa: B018
    assert isinstance(modeling_heptapod.__version__, str)


def test_star_import():
    assert run("from modeling_heptapod import *; print(LeapModel.__name__, LeapConfig.model_type)") == "LeapModel leap"
