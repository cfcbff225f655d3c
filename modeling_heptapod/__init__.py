"""Heptapod: language models that do not read and write in one straight line, for Transformers.

Importing this package registers every family with transformers' Auto classes. Modules with models are imported when
one of their classes is first used.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .common import transformers_versions  # noqa: F401  (first: it refuses untested versions)
from .common.auto_mapping import register_mapping_name
from .heptapod.configuration_heptapod import HeptapodConfig
from .hierarchical_lm.configuration_hierarchical_lm import HierarchicalLMConfig
from .leap.configuration_leap import LeapConfig
from .multigrid.configuration_multigrid import MultiGridConfig


try:
    __version__ = version("modeling-heptapod")
except PackageNotFoundError:  # run from a folder that was not installed
    __version__ = "unknown"

_MODULE_OF = {
    "AffixAxis": "multigrid.text_axes",
    "Axis": "multigrid.axes",
    "ConstantAxis": "multigrid.axes",
    "DecisionTreeAxis": "multigrid.decision_tree_axis",
    "GoldTagAxis": "multigrid.text_axes",
    "HeptapodForMaskedLM": "heptapod.modeling_heptapod",
    "HeptapodGenerationConfig": "heptapod.generation_config_heptapod",
    "HeptapodGenerationMixin": "heptapod.generation_heptapod",
    "HeptapodModel": "heptapod.modeling_heptapod",
    "HeptapodPreTrainedModel": "heptapod.modeling_heptapod",
    "HeptapodProcessor": "heptapod.processing_heptapod",
    "HierarchicalCache": "hierarchical_lm.hierarchical_cache",
    "HierarchicalLMForCausalLM": "hierarchical_lm.modeling_hierarchical_lm",
    "HierarchicalLMModel": "hierarchical_lm.modeling_hierarchical_lm",
    "HierarchicalLMPreTrainedModel": "hierarchical_lm.modeling_hierarchical_lm",
    "LeapForCausalLM": "leap.modeling_leap",
    "LeapForMaskedLM": "leap.modeling_leap",
    "LeapForSequenceClassification": "leap.modeling_leap",
    "LeapModel": "leap.modeling_leap",
    "LeapPreTrainedModel": "leap.modeling_leap",
    "MultiGridCache": "multigrid.multigrid_cache",
    "MultiGridForCausalLM": "multigrid.modeling_multigrid",
    "MultiGridGenerationMixin": "multigrid.generation_multigrid",
    "MultiGridModel": "multigrid.modeling_multigrid",
    "MultiGridPreTrainedModel": "multigrid.modeling_multigrid",
    "MultiGridProcessor": "multigrid.processing_multigrid",
    "PartOfSpeechAxis": "multigrid.text_axes",
    "PythonBracketAxis": "multigrid.python_axes",
    "PythonIndentationAxis": "multigrid.python_axes",
    "PythonStringAxis": "multigrid.python_axes",
    "PythonTokenKindAxis": "multigrid.python_axes",
    "RandomAxis": "multigrid.axes",
    "RecurrentCache": "leap.recurrent_cache",
    "StaticRecurrentCache": "leap.recurrent_cache",
    "find_lookahead": "multigrid.axes",
    "make_axis": "multigrid.axis_registry",
}
_MODELS = (
    (AutoModel, HeptapodConfig, "HeptapodModel"),
    (AutoModelForMaskedLM, HeptapodConfig, "HeptapodForMaskedLM"),
    (AutoModel, HierarchicalLMConfig, "HierarchicalLMModel"),
    (AutoModelForCausalLM, HierarchicalLMConfig, "HierarchicalLMForCausalLM"),
    (AutoModel, LeapConfig, "LeapModel"),
    (AutoModelForCausalLM, LeapConfig, "LeapForCausalLM"),
    (AutoModelForMaskedLM, LeapConfig, "LeapForMaskedLM"),
    (AutoModelForSequenceClassification, LeapConfig, "LeapForSequenceClassification"),
    (AutoModel, MultiGridConfig, "MultiGridModel"),
    (AutoModelForCausalLM, MultiGridConfig, "MultiGridForCausalLM"),
)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
    for auto_class, config_class, model_name in _MODELS:
        if hasattr(module, model_name):  # the class itself takes the place of its stand-in
            auto_class.register(config_class, getattr(module, model_name), exist_ok=True)
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *_MODULE_OF})


class _ModelOnDemand:
    """Stands in an Auto mapping for a model class until somebody looks at it, and imports it then."""

    def __init__(self, config_class, name):
        self.config_class = config_class
        self._name = name

    def __getattr__(self, attribute):
        return getattr(__getattr__(self._name), attribute)

    def __call__(self, *args, **kwargs):
        return __getattr__(self._name)(*args, **kwargs)

    def __mro_entries__(self, bases):
        return (__getattr__(self._name),)


class _RegisterProcessorLater:
    """Registers the processors when AutoProcessor is imported: it brings most of transformers along, so we do not."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.models.auto.processing_auto":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register_processor(module.AutoProcessor)

        spec.loader.exec_module = execute_and_register
        return spec


def _register_processor(auto_processor):
    auto_processor.register(HeptapodConfig, _ModelOnDemand(HeptapodConfig, "HeptapodProcessor"))
    auto_processor.register(MultiGridConfig, _ModelOnDemand(MultiGridConfig, "MultiGridProcessor"))


AutoConfig.register("heptapod", HeptapodConfig)
AutoConfig.register("hierarchical_lm", HierarchicalLMConfig)
AutoConfig.register("leap", LeapConfig)
AutoConfig.register("multigrid", MultiGridConfig)
for _auto_class, _config_class, _name in _MODELS:
    _auto_class.register(_config_class, _ModelOnDemand(_config_class, _name))
    register_mapping_name(_auto_class.__name__, _config_class.model_type, _name)
_processing_auto = sys.modules.get("transformers.models.auto.processing_auto")
if _processing_auto is None:
    sys.meta_path.insert(0, _RegisterProcessorLater())
else:
    _register_processor(_processing_auto.AutoProcessor)

__all__ = ["HeptapodConfig", "HierarchicalLMConfig", "LeapConfig", "MultiGridConfig", *_MODULE_OF]
