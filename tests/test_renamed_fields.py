"""Old names of options raise an error with the new one, whichever way they come in."""

import dataclasses
import json

import pytest
from corpora import build_tokenizer
from transformers import AutoConfig, GenerationConfig

from modeling_heptapod import HeptapodConfig, HierarchicalLMConfig, LeapConfig, MultiGridConfig
from modeling_heptapod.common.renamed_fields import RENAMED_FIELDS, RENAMED_VALUES
from modeling_heptapod.heptapod.generation_config_heptapod import OPTIONS, HeptapodGenerationConfig
from modeling_heptapod.heptapod.processing_heptapod import HeptapodProcessor
from tests.tiny_heptapod import tiny_heptapod


CONFIGS = {config.model_type: config for config in (HeptapodConfig, HierarchicalLMConfig, LeapConfig, MultiGridConfig)}
GENERATION = "heptapod generation"


def cases(owners):
    """Owner, option as it was named, and the error that says how it is named now."""
    for owner in owners:
        for old, new in RENAMED_FIELDS[owner].items():
            yield pytest.param(owner, {old: 2}, f"`{old}` was renamed to `{new}`, got {old}=2", id=f"{owner}-{old}")
        for (of, name), values in RENAMED_VALUES.items():
            for old, new in values.items() if of == owner else ():
                message = f"{name}='{old}' was renamed to {name}='{new}'"
                yield pytest.param(owner, {name: old}, message, id=f"{owner}-{old}")


@pytest.mark.parametrize("owner, options, message", cases(CONFIGS))
def test_configs(owner, options, message, tmp_path):
    config = CONFIGS[owner]
    with pytest.raises(ValueError, match=message):
        config(**options)
    saved = config().to_dict()
    with pytest.raises(ValueError, match=message):
        config.from_dict({**saved, **options})
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **options)
    (tmp_path / "config.json").write_text(json.dumps({**saved, **options}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("owner, options, message", cases([GENERATION]))
def test_generation_configs(owner, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HeptapodGenerationConfig(**options)
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message):
        HeptapodGenerationConfig.from_pretrained(tmp_path)
    model = tiny_heptapod()
    with pytest.raises(ValueError, match=message):
        model.generate(**options)
    with pytest.raises(ValueError, match=message):
        model.generate(generation_config=GenerationConfig(**options))


def test_subclasses_with_a_model_type_of_their_own():
    class Other(LeapConfig):
        model_type = "other"

    with pytest.raises(ValueError, match="`query_gate` was renamed to `output_gate`"):
        Other(query_gate="none")
    with pytest.raises(ValueError, match="`query_gate` was renamed to `output_gate`"):
        Other.from_dict({}, query_gate="none")


def test_values_of_a_processor():
    ((old, new),) = RENAMED_VALUES["heptapod processor", "overflow"].items()
    with pytest.raises(ValueError, match=f"overflow='{old}' was renamed to overflow='{new}'"):
        HeptapodProcessor(build_tokenizer("byte", []), overflow=old)


@pytest.mark.parametrize("owner", RENAMED_FIELDS)
def test_old_names_are_free_and_new_ones_taken(owner):
    names = OPTIONS if owner == GENERATION else {field.name for field in dataclasses.fields(CONFIGS[owner])}
    assert set(RENAMED_FIELDS[owner].values()) <= set(names)
    assert not set(RENAMED_FIELDS[owner]) & set(names)
