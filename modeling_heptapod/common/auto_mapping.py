"""Names of our classes in the tables in which clients look up what a model does."""

from typing import Any, ClassVar

from transformers.models.auto import modeling_auto


_TABLES: dict[str, dict[str, Any]] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def enter_name(auto_class: str, model_type: str, name: str) -> None:
    """Enter the name of a class in the table of an Auto class.

    Without an entry `Trainer` does not shift labels for label smoothing, pipelines report an unsupported model, model
    cards name no task, and `lm_eval` guesses.

    Args:
        auto_class (`str`): name of the Auto class that the model is registered with.
        model_type (`str`): model type of its config.
        name (`str`): name of the class.
    """
    names = _TABLES.get(auto_class, {})
    if name not in names.values():
        names[name if model_type in names else model_type] = name  # a subclass does not replace its parent


class AutoMappingMixin:
    """Base of a family's `PreTrainedModel`, placed first: enters the name of each of its classes and their subclasses."""

    config_class: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        bases = {base.__name__ for base in cls.__mro__}
        for auto_class, reference in cls.config_class._auto_classes.items():
            if reference.partition(".")[2] in bases:
                # Also for subclasses made by hand or by FSDP2, and for code loaded from a saved folder.
                enter_name(auto_class, cls.config_class.model_type, cls.__name__)


__all__ = ["AutoMappingMixin", "enter_name"]
