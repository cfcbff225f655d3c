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
    "AffixAxis",
    "Axis",
    "ConstantAxis",
    "DecisionTreeAxis",
    "GoldTagAxis",
    "HeptapodConfig",
    "HeptapodForMaskedLM",
    "HeptapodGenerationConfig",
    "HeptapodGenerationMixin",
    "HeptapodModel",
    "HeptapodPreTrainedModel",
    "HeptapodProcessor",
    "HierarchicalCache",
    "HierarchicalLMConfig",
    "HierarchicalLMForCausalLM",
    "HierarchicalLMModel",
    "HierarchicalLMPreTrainedModel",
    "LeapConfig",
    "LeapForCausalLM",
    "LeapForMaskedLM",
    "LeapForSequenceClassification",
    "LeapModel",
    "LeapPreTrainedModel",
    "MultiGridCache",
    "MultiGridConfig",
    "MultiGridForCausalLM",
    "MultiGridGenerationMixin",
    "MultiGridModel",
    "MultiGridPreTrainedModel",
    "MultiGridProcessor",
    "PartOfSpeechAxis",
    "PythonBracketAxis",
    "PythonIndentationAxis",
    "PythonStringAxis",
    "PythonTokenKindAxis",
    "RandomAxis",
    "RecurrentCache",
    "StaticRecurrentCache",
    "find_lookahead",
    "make_axis",
]
AUTO = {
    "LeapConfig": {
        "AutoModel": "LeapModel",
        "AutoModelForCausalLM": "LeapForCausalLM",
        "AutoModelForMaskedLM": "LeapForMaskedLM",
        "AutoModelForSequenceClassification": "LeapForSequenceClassification",
    },
    "HeptapodConfig": {"AutoModel": "HeptapodModel", "AutoModelForMaskedLM": "HeptapodForMaskedLM"},
    "HierarchicalLMConfig": {"AutoModel": "HierarchicalLMModel", "AutoModelForCausalLM": "HierarchicalLMForCausalLM"},
    "MultiGridConfig": {"AutoModel": "MultiGridModel", "AutoModelForCausalLM": "MultiGridForCausalLM"},
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
from transformers import {", ".join(["AutoConfig", *AUTO["LeapConfig"]])}, PreTrainedConfig
from transformers.utils import auto_docstring
before = set(sys.modules)
import modeling_heptapod
heavy = ["transformers.modeling_utils", "transformers.generation.utils"]
heavy += ["modeling_heptapod.leap.modeling_leap", "modeling_heptapod.heptapod.modeling_heptapod"]
heavy += ["modeling_heptapod.hierarchical_lm.modeling_hierarchical_lm", "modeling_heptapod.multigrid.modeling_multigrid"]
print([name for name in heavy if name in sys.modules])
print(len([name for name in set(sys.modules) - before if not name.startswith("modeling_heptapod")]) < 20)
modeling_heptapod.LeapModel
print("modeling_heptapod.heptapod.modeling_heptapod" in sys.modules)
modeling_heptapod.HeptapodModel, modeling_heptapod.HierarchicalLMModel, modeling_heptapod.MultiGridModel
print([name for name in heavy if name not in sys.modules])
"""
    assert run(code).split("\n") == ["[]", "True", "False", "[]"]


def test_auto_classes_know_ours():
    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    code = f"""
import transformers, modeling_heptapod
for config_name, names in {AUTO}.items():
    config = getattr(modeling_heptapod, config_name)(**{small})
    print([type(getattr(transformers, auto).from_config(config)).__name__ for auto in names])
"""
    assert run(code).split("\n") == [str(list(names.values())) for names in AUTO.values()]  # through the stand-ins
    for config_name, names in AUTO.items():
        config = getattr(modeling_heptapod, config_name)(**small)
        for auto, name in names.items():
            assert type(getattr(transformers, auto).from_config(config)) is getattr(modeling_heptapod, name)


@pytest.mark.parametrize("config_name", AUTO)
def test_the_config_is_known_by_its_model_type(config_name):
    config_class = getattr(modeling_heptapod, config_name)
    assert type(transformers.AutoConfig.for_model(config_class.model_type, hidden_size=64)) is config_class


def test_public_names():
    assert sorted(modeling_heptapod.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(modeling_heptapod, name).__name__ == name and name in dir(modeling_heptapod)
    with pytest.raises(AttributeError, match="NoSuchModel"):
        modeling_heptapod.NoSuchModel  # noqa: B018
    assert isinstance(modeling_heptapod.__version__, str)


def test_star_import():
    assert run("from modeling_heptapod import *; print(LeapModel.__name__, LeapConfig.model_type)") == "LeapModel leap"
