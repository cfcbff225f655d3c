"""Renamed options: an old name raises an error that contains the new one.

Without it a folder saved with old names would load with the defaults of the new ones: `PreTrainedConfig` keeps unknown
fields as attributes, and `AutoConfig.from_pretrained(folder, name=...)` ignores unknown names.
"""

# Old name -> new name, by model type or other object with options.
RENAMED_FIELDS = {
    "heptapod": {"border_distances": "use_absolute_position_embeddings", "window_size": "local_radius"},
    "hierarchical_lm": {"ff_mult": "mlp_ratio", "hierarchies": "compression_factors"},
    "leap": {"null_weight": "sink_weight", "query_gate": "output_gate"},
    "multigrid": {"meta_hidden_size": "axis_hidden_size"},
    "heptapod generation": {
        "counts": "mask_schedule",
        "num_iterations": "max_denoising_steps",
        "output_trajectory": "output_history",
        "reopen_threshold": "remask_threshold",
        "schedule": "sampler",
    },
}
RENAMED_VALUES = {
    ("heptapod generation", "sampler"): {"entropy": "entropy_bound"},
    ("heptapod processor", "overflow"): {"clip": "truncate"},
    ("leap", "position_embedding_type"): {"decay": "alibi", "learned": "absolute"},
}


def reject_renamed(owner: str, options: dict) -> None:
    """Raise a `ValueError` that contains the new names, if options or values have old ones.

    Args:
        owner (`str`): a model type, `"heptapod generation"` or `"heptapod processor"`.
        options (`dict`): values by name.
    """
    renamed = [
        f"`{old}` was renamed to `{new}`, got {old}={options[old]!r}"
        for old, new in RENAMED_FIELDS.get(owner, {}).items()
        if old in options
    ]
    for (of, name), values in RENAMED_VALUES.items():
        value = options.get(name) if of == owner else None
        if isinstance(value, str) and value in values:
            renamed.append(f"{name}={value!r} was renamed to {name}={values[value]!r}")
    if renamed:
        raise ValueError(
            "; ".join(renamed)
            + ". A folder that was saved with old names loads with its own code where this package is not "
            "imported, with `trust_remote_code=True`."
        )


class RenamedFieldsMixin:
    """Mixin before `PreTrainedConfig`: rejects old names in constructors, saved folders and keywords of `from_pretrained`."""

    def __post_init__(self, **kwargs):
        reject_renamed(_model_type(type(self)), {**vars(self), **kwargs})
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Create a config from a dict; unlike the stock method, rejects old names in `kwargs`."""
        reject_renamed(_model_type(cls), kwargs)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def _model_type(cls):
    """Model type of the family; a subclass may have another."""
    return next(base.model_type for base in cls.__mro__ if vars(base).get("model_type") in RENAMED_FIELDS)


__all__ = ["RENAMED_FIELDS", "RENAMED_VALUES", "RenamedFieldsMixin", "reject_renamed"]
