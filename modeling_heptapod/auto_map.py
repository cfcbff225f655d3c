"""Saved folders that every Auto class can load, and classes that clients know by name: shared by all families."""

from transformers.models.auto import modeling_auto


_NAMES_OF = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def enter_name(auto_class: str, model_type: str, name: str) -> None:
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


class FullAutoMapMixin:
    """For a family's `PreTrainedModel`: `save_pretrained` names every class of the family, not only the saved one.

    Attributes:
        _family_auto_map (`dict[str, str]`): from the name of an Auto class to `"module.Class"`.
    """

    _family_auto_map: dict[str, str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls._auto_class is not None:  # made of a registered class, by hand or by FSDP2
            enter_name(cls._auto_class, cls.config_class.model_type, cls.__name__)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """As `PreTrainedModel`'s, also when code comes with its folder; clients that go by names know the class, too."""
        super().register_for_auto_class(auto_class)
        enter_name(cls._auto_class, cls.config_class.model_type, cls.__name__)

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights, config and the code they need; with `trust_remote_code=True` every Auto class loads the folder.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to.
            kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        # The stock method records only the class that is saved; a base model or another head would not be found.
        self.config.auto_map = dict(self._family_auto_map)
        super().save_pretrained(save_directory, **kwargs)
