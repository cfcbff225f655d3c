"""Saved folders that every Auto class can load: shared by all families."""


class FullAutoMapMixin:
    """For a family's `PreTrainedModel`: `save_pretrained` names every class of the family, not only the saved one.

    Attributes:
        _family_auto_map (`dict[str, str]`): from the name of an Auto class to `"module.Class"`.
    """

    _family_auto_map: dict[str, str]

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights, config and the code they need; with `trust_remote_code=True` every Auto class loads the folder.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to.
            kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        # The stock method records only the class that is saved; a base model or another head would not be found.
        self.config.auto_map = dict(self._family_auto_map)
        super().save_pretrained(save_directory, **kwargs)
