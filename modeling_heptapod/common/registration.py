"""Registration of the families with transformers' Auto classes, without importing their models."""

import sys
from typing import Any

import transformers
from transformers.models.auto import auto_mappings, configuration_auto

from .auto_mapping import enter_name


class _LazyModel:
    """A model class in the mapping of an Auto class, imported when it is first used.

    It is called, subclassed and compared as the class itself.
    """

    def __init__(self, package: Any, config_class: Any, name: str):
        self.config_class = config_class
        self._package = package
        self._name = name

    def _model_class(self):
        return getattr(self._package, self._name)

    def __getattr__(self, attribute):
        return getattr(self._model_class(), attribute)

    def __call__(self, *args, **kwargs):
        return self._model_class()(*args, **kwargs)

    def __mro_entries__(self, bases):
        return (self._model_class(),)

    def __eq__(self, other):
        return self is other or self._model_class() is other

    def __hash__(self):
        return hash(self._model_class())


def register_models(package: Any, config_class: Any) -> None:
    """Register a config class and the models of its `_auto_classes`.

    A config class of another package with the same name keeps its own models.

    Args:
        package (`module`): package of the family, which exports the classes.
        config_class (`type`): config class of the family.
    """
    model_type = config_class.model_type
    transformers.AutoConfig.register(model_type, config_class)
    for auto_class, reference in config_class._auto_classes.items():
        if auto_class != "AutoConfig":
            name = reference.partition(".")[2]
            model = _LazyModel(package, config_class, name)
            getattr(transformers, auto_class).register(config_class, model)
            enter_name(auto_class, model_type, name)


def register_processor(package: Any, config_class: Any, name: str) -> None:
    """Register a processor.

    `AutoProcessor.register` would import most of transformers with `AutoProcessor`. The processor is entered by name
    instead, as transformers enters its own, and the family's package takes the place that names are imported from.

    Args:
        package (`module`): package of the family, which exports the class.
        config_class (`type`): config class of the family.
        name (`str`): name of the processor class.
    """
    model_type = config_class.model_type
    sys.modules[f"transformers.models.{model_type}"] = package
    auto_mappings.PROCESSOR_MAPPING_NAMES[model_type] = name
    configuration_auto.CONFIG_MAPPING_NAMES[model_type] = config_class.__name__
    processing_auto = sys.modules.get("transformers.models.auto.processing_auto")
    if processing_auto is not None:  # its mapping was built from the config names of that time
        processing_auto.PROCESSOR_MAPPING._reverse_config_mapping[config_class.__name__] = model_type


__all__ = ["register_models", "register_processor"]
