"""Entries in the tables of model names of transformers' Auto classes."""

from typing import Any, ClassVar

from transformers.models.auto import modeling_auto


_TABLES: dict[str, dict[str, Any]] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


class AutoMappingMixin:
    """Base of a family's `PreTrainedModel`, placed first: enters each of its classes, and each subclass, in the tables.

    Clients look up there by class name what a model does. Without an entry `Trainer` does not shift labels for label
    smoothing, pipelines report an unsupported model, model cards name no task, and `lm_eval` guesses.
    """

    config_class: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        bases = {base.__name__ for base in cls.__mro__}
        for auto_class, reference in cls.config_class._auto_classes.items():
            if reference.partition(".")[2] not in bases:
                continue
            # Also for subclasses made by hand or by FSDP2, and for code loaded from a saved folder.
            names, model_type = _TABLES.get(auto_class, {}), cls.config_class.model_type
            if cls.__name__ not in names.values():
                # A subclass does not replace its parent.
                names[cls.__name__ if model_type in names else model_type] = cls.__name__


__all__ = ["AutoMappingMixin"]
