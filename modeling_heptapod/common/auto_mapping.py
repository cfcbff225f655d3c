"""Classes that clients know by name: shared by all families."""

from transformers.models.auto import modeling_auto


_NAMES_OF = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def register_mapping_name(auto_class: str, model_type: str, name: str) -> None:
    """Enter the class `name` in the table in which clients look up by name what a model does.

    Without it `Trainer` does not shift labels for label smoothing, pipelines say that the model is not supported, model
    cards name no task, and `lm_eval` guesses.

    Args:
        auto_class (`str`): name of the Auto class that the model is registered with.
        model_type (`str`): of its config.
        name (`str`): of the class.
    """
    names = _NAMES_OF.get(auto_class, {})
    if name not in names.values():
        names[name if model_type in names else model_type] = name  # a subclass does not take its parent's place


class AutoMappingMixin:
    """Before a family's `PreTrainedModel`: its classes and their subclasses are known by name, whoever made them."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        names = {base.__name__ for base in cls.__mro__}
        for auto_class, reference in cls.config_class._auto_classes.items():
            if reference.partition(".")[2] in names:  # made of one by hand or by FSDP2, or loaded from a folder
                register_mapping_name(auto_class, cls.config_class.model_type, cls.__name__)


__all__ = ["AutoMappingMixin", "register_mapping_name"]
