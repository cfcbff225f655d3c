"""Heptapod: language models that do not read and write in one straight line, for Transformers.

Importing this package registers every family with transformers' Auto classes. Modules with models are imported when
one of their classes is first used.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .configuration_leap import LeapConfig


try:
    __version__ = version("modeling_heptapod")
except PackageNotFoundError:  # run from a folder that was not installed
    __version__ = "unknown"

_MODULE_OF = {
    "LeapForCausalLM": "modeling_leap",
    "LeapForMaskedLM": "modeling_leap",
    "LeapForSequenceClassification": "modeling_leap",
    "LeapModel": "modeling_leap",
    "LeapPreTrainedModel": "modeling_leap",
    "RecurrentCache": "recurrent_cache",
    "StaticRecurrentCache": "recurrent_cache",
}


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_MODULE_OF})


class _ModelOnDemand:
    """Stands in an Auto mapping for a model class, which is imported at the first look at it."""

    def __init__(self, config_class, name):
        self.config_class = config_class
        self._name = name

    def __getattr__(self, attribute):
        return getattr(__getattr__(self._name), attribute)


AutoConfig.register("leap", LeapConfig)
for _auto_class, _name in (
    (AutoModel, "LeapModel"),
    (AutoModelForCausalLM, "LeapForCausalLM"),
    (AutoModelForMaskedLM, "LeapForMaskedLM"),
    (AutoModelForSequenceClassification, "LeapForSequenceClassification"),
):
    _auto_class.register(LeapConfig, _ModelOnDemand(LeapConfig, _name))

__all__ = ["LeapConfig", *_MODULE_OF]
