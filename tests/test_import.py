"""`import modeling_heptapod`: cheap, and everything is registered."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

import modeling_heptapod
from modeling_heptapod.common.auto_mapping import enter_name


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
    "StaticHierarchicalCache",
    "StaticMultiGridCache",
    "StaticRecurrentCache",
    "check_axis",
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
print("LeapModel" in dir(modeling_heptapod) and "LeapModel" in dir(modeling_heptapod.leap))
modeling_heptapod.LeapModel
print("modeling_heptapod.heptapod.modeling_heptapod" in sys.modules)
modeling_heptapod.HeptapodModel, modeling_heptapod.HierarchicalLMModel, modeling_heptapod.MultiGridModel
print([name for name in heavy if name not in sys.modules])
"""
    assert run(code).split("\n") == ["[]", "True", "True", "False", "[]"]


def test_auto_classes_know_ours():
    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    code = f"""
import transformers, modeling_heptapod
for config_name, names in {AUTO}.items():
    config = getattr(modeling_heptapod, config_name)(**{small})
    print([type(getattr(transformers, auto).from_config(config)).__name__ for auto in names])
"""
    assert run(code).split("\n") == [str(list(names.values())) for names in AUTO.values()]
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


@pytest.mark.parametrize("family", ["heptapod", "hierarchical_lm", "leap", "multigrid"])
def test_a_family_exports_its_public_names(family):
    """Each of them imported when used, and seen by type checkers."""
    package = importlib.import_module(f"modeling_heptapod.{family}")
    assert {name for name in PUBLIC if f".{family}." in getattr(modeling_heptapod, name).__module__} == {
        *package.__all__
    }
    statements = ast.walk(ast.parse(Path(package.__file__).read_text(encoding="utf-8")))
    starred = [node.module for node in statements if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    seen = [name for module in starred for name in importlib.import_module(f"{package.__name__}.{module}").__all__]
    assert {*package.__all__} <= {*seen}
    for name in package.__all__:
        assert getattr(package, name) is getattr(modeling_heptapod, name)
    with pytest.raises(AttributeError, match=f"modeling_heptapod.{family}.*NoSuchModel"):
        package.NoSuchModel  # noqa: B018


@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_processors_are_registered(order):
    """Whether `AutoProcessor` is imported before this package or after it."""
    imports = ["from transformers import AutoProcessor", "import modeling_heptapod"]
    code = "\n".join(imports if order == "after" else imports[::-1])
    code += """
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
for config_name in ("HeptapodConfig", "MultiGridConfig"):
    processor_class = PROCESSOR_MAPPING[getattr(modeling_heptapod, config_name)]
    assert processor_class_from_name(processor_class.__name__) is processor_class
    print(processor_class.__name__)
"""
    assert run(code).split("\n") == ["HeptapodProcessor", "MultiGridProcessor"]


def test_registration_keeps_names_from_saved_folders(monkeypatch):
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    monkeypatch.setitem(names, "leap", "OtherLeapForCausalLM")  # of a folder with its own code, loaded before
    monkeypatch.delitem(names, "LeapForCausalLM", raising=False)
    enter_name("AutoModelForCausalLM", "leap", "LeapForCausalLM")
    assert names["leap"] == "OtherLeapForCausalLM" and names.pop("LeapForCausalLM") == "LeapForCausalLM"


@pytest.mark.parametrize("name", AUTO)
def test_entries_of_the_auto_classes_are_used_as_classes(name):
    """As transformers' own tests use them."""
    config = getattr(modeling_heptapod, name)
    for auto_class, model_name in AUTO[name].items():
        model, entry = getattr(modeling_heptapod, model_name), getattr(transformers, auto_class)._model_mapping[config]
        assert entry == model and model == entry and {entry} == {model} and entry.__name__ == model_name

        class Copy(entry):
            pass

        assert issubclass(Copy, model)
        for names in (vars(modeling_auto)[table] for table in dir(modeling_auto) if table.endswith("_MAPPING_NAMES")):
            names.pop("Copy", None)


@pytest.mark.parametrize("name", AUTO)
def test_a_config_class_of_the_same_name_is_not_ours(name):
    """The prototype of LEAP has a `LeapConfig`, too: registering it, and asking for its model, must not give ours."""

    class Model:
        @classmethod
        def _from_config(cls, config, **kwargs):
            return cls()

    theirs = type(name, (transformers.PreTrainedConfig,), {"model_type": "foreign"})
    Model.config_class = theirs
    for auto_class in AUTO[name]:
        auto = getattr(transformers, auto_class)
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_config(theirs())
        auto.register(theirs, Model)
        try:
            assert isinstance(auto.from_config(theirs()), Model)
        finally:
            del auto._model_mapping._extra_content[theirs]


@pytest.mark.slow
def test_star_import():
    assert run("from modeling_heptapod import *; print(LeapModel.__name__, LeapConfig.model_type)") == "LeapModel leap"
