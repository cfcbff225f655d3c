"""Heptapod: language models that do not read and write in one straight line, for Transformers.

Importing this package registers every family with transformers' Auto classes. Modules with models are imported when
one of their classes is first used.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import heptapod, hierarchical_lm, leap, multigrid
from .common import transformers_versions  # refuses untested versions
from .common.lazy_exports import lazy_exports


try:
    __version__ = version("modeling-heptapod")
except PackageNotFoundError:  # run from a folder that was not installed
    __version__ = "unknown"


def _register(model_type: str, config_class: str, **classes: str) -> None:
    """Register a family as transformers registers its own: names in the tables of the Auto classes, and a module with the classes.

    The public `register` methods take classes, so that all models would be imported here.

    Args:
        model_type (`str`): model type of the config, and name of the family's package.
        config_class (`str`): name of the config class.
        classes (`str`): name of the class for each table, such as `MODEL` or `PROCESSOR`.
    """
    from transformers.models.auto import auto_mappings, modeling_auto  # not before the version is checked

    sys.modules[f"transformers.models.{model_type}"] = sys.modules[f"{__name__}.{model_type}"]
    modeling_auto.CONFIG_MAPPING_NAMES[model_type] = config_class
    for table, name in classes.items():
        names = getattr(auto_mappings if table == "PROCESSOR" else modeling_auto, f"{table}_MAPPING_NAMES")
        if names.get(model_type, name) != name:  # a class of a saved folder that brought its own code
            names[names[model_type]] = names[model_type]
        names[model_type] = name
        mapping = getattr(names, "_model_mapping", None)
        if mapping is not None:  # built before, from the config names of that time
            mapping._reverse_config_mapping[config_class] = model_type


_register(
    "heptapod",
    "HeptapodConfig",
    MODEL="HeptapodModel",
    MODEL_FOR_MASKED_LM="HeptapodForMaskedLM",
    PROCESSOR="HeptapodProcessor",
)
_register(
    "hierarchical_lm",
    "HierarchicalLMConfig",
    MODEL="HierarchicalLMModel",
    MODEL_FOR_CAUSAL_LM="HierarchicalLMForCausalLM",
)
_register(
    "leap",
    "LeapConfig",
    MODEL="LeapModel",
    MODEL_FOR_CAUSAL_LM="LeapForCausalLM",
    MODEL_FOR_MASKED_LM="LeapForMaskedLM",
    MODEL_FOR_SEQUENCE_CLASSIFICATION="LeapForSequenceClassification",
)
_register(
    "multigrid",
    "MultiGridConfig",
    MODEL="MultiGridModel",
    MODEL_FOR_CAUSAL_LM="MultiGridForCausalLM",
    PROCESSOR="MultiGridProcessor",
)

if TYPE_CHECKING:
    from .heptapod import *
    from .hierarchical_lm import *
    from .leap import *
    from .multigrid import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "heptapod": heptapod.__all__,
            "hierarchical_lm": hierarchical_lm.__all__,
            "leap": leap.__all__,
            "multigrid": multigrid.__all__,
        },
    )
