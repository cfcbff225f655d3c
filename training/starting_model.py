"""Models at the start of a run: untrained from a configuration, or trained with the tokenizer or processor of its folder."""

from pathlib import Path

import torch
from loading import SPECIAL_IDS, load_processing_class, may_run_code
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import modeling_heptapod  # noqa: F401  registers our families with the Auto classes


def read_config(option: str, source: str, **options) -> PreTrainedConfig:
    """A configuration of one of our families.

    Args:
        option: `--config_name` or `--model_name_or_path`.
        source: the folder or name.
        options: fields that differ from those of the file.

    Raises:
        ValueError: naming the option, for a missing or invalid configuration.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} must be a folder with a config.json, as configs/leap-tiny, got {source}: {error}"
        ) from error


def read_processing_class(name: str, config: PreTrainedConfig, trust_remote_code: bool = False):
    """Load the tokenizer or processor of a trained model.

    Args:
        name: the folder or name of the model.
        config: configuration of the model.
        trust_remote_code: whether code of axes from the Hub may run; that of a folder may.

    Raises:
        ValueError: naming `--model_name_or_path`, if there is none, or if it does not fit the model.
    """
    if Path(name).is_dir():
        trust_remote_code = may_run_code(name, trust_remote_code)
    try:
        processing_class = load_processing_class(name, config.model_type, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {name} has no tokenizer or processor that can be loaded: {error}"
        ) from error
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    found = {"vocab_size": len(tokenizer)}
    if config.model_type == "heptapod":
        found["mask_token_id"] = tokenizer.mask_token_id
    if config.model_type == "multigrid":
        found |= {"axis_names": processing_class.axis_names, "axis_vocab_sizes": processing_class.axis_vocab_sizes}
    for field, value in found.items():
        ours = getattr(config, field)
        # A vocabulary may be padded to a round size.
        if value > ours if field == "vocab_size" else value != ours:
            raise ValueError(
                f"--model_name_or_path {name}: `{field}` of the model is {ours}, of its tokenizer or axes {value}"
            )
    return processing_class


def make_untrained(config_name: str, objective) -> PreTrainedModel:
    """An untrained model of a configuration, with the fields that follow from the data."""
    config = read_config("--config_name", config_name, **objective.config_options)
    model = objective.auto_class.from_config(config)
    if Path(config_name, "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(config_name)
    tokenizer = getattr(objective.processing_class, "tokenizer", objective.processing_class)
    for name in SPECIAL_IDS:  # Trainer would set them, too, and warn
        for each in (model.config, model.generation_config):
            setattr(each, name, getattr(tokenizer, name))
    return model


def load_trained(name: str, objective) -> PreTrainedModel:
    """A trained model in float32.

    Raises:
        ValueError: naming `--model_name_or_path` for an adapter alone, and for the weights of another head.
    """
    if Path(name, "adapter_config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {name} holds an adapter: merge it into its model first, as docs/fine_tuning.md shows"
        )
    model, loaded = objective.auto_class.from_pretrained(
        name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    others = [*sorted(loaded["missing_keys"]), *sorted(loaded["unexpected_keys"])]
    if others:
        raise ValueError(
            f"--model_name_or_path {name} must hold the weights of a {type(model).__name__}, and differs from one in "
            f"{', '.join(others[:5])}"
        )
    return model
