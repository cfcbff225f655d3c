"""Old names of options raise an error with the new one, whichever way they come in."""

import dataclasses
import json
import re

import pytest
import torch
from corpora import build_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoProcessor,
    GenerationConfig,
)

from modeling_heptapod import HeptapodConfig, HierarchicalLMConfig, LeapConfig, MultiGridConfig
from modeling_heptapod.common.renamed_fields import RENAMED_FIELDS, RENAMED_VALUES
from modeling_heptapod.heptapod.generation_config_heptapod import OPTIONS, HeptapodGenerationConfig
from modeling_heptapod.heptapod.processing_heptapod import HeptapodProcessor
from tests.clean_room import run_alone
from tests.saved_models import FAMILIES, save_tiny
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


def test_all_old_names_are_in_one_error():
    message = "`null_weight` was renamed to `sink_weight`, got null_weight=0.5; `query_gate` .*; .*'decay'.*own code"
    with pytest.raises(ValueError, match=message):
        LeapConfig(position_embedding_type="decay", null_weight=0.5, query_gate="sigmoid")


def head_of(family):
    return AutoModelForMaskedLM if family == "heptapod" else AutoModelForCausalLM


@pytest.fixture(scope="module")
def old_folders(tmp_path_factory):
    """Folders as a version before the renaming wrote them, with old names in configs and code; and the sums of their logits."""
    root, sums = tmp_path_factory.mktemp("old"), {}
    for family in FAMILIES:
        save_tiny(family, root / family)
        ids = torch.arange(40, 52)[None]
        inputs = {"input_ids": ids.view(1, 3, 4) if family == "heptapod" else ids}
        if family == "multigrid":
            inputs["axis_ids"] = torch.ones(1, 2, 12, dtype=torch.long)
        torch.save(inputs, root / family / "inputs.pt")
        model = head_of(family).from_pretrained(root / family)
        sums[family] = model(**inputs).logits.double().sum().item()
        renamed = RENAMED_FIELDS[family] | (RENAMED_FIELDS[GENERATION] if family == "heptapod" else {})
        for path in [*(root / family).glob("*.py"), *(root / family).glob("*config.json")]:
            text = path.read_text(encoding="utf-8")
            if path.name == "renamed_fields.py":  # rejects nothing in that version
                text += "\n\ndef reject_renamed(owner, options):\n    pass\n"
            else:
                for old, new in renamed.items():
                    text = re.sub(rf"\b{new}\b", old, text)
            path.write_text(text, encoding="utf-8")
    return root, sums


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_old_folders_beside_the_package(family, trust_remote_code, old_folders):
    folder = old_folders[0] / family
    for auto_class in (AutoConfig, AutoModel, head_of(family)):
        with pytest.raises(ValueError, match=r"`\w+` was renamed to `\w+`"):
            auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)
    AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)  # has no renamed options here


@pytest.mark.slow
def test_old_folders_without_the_package(old_folders, tmp_path):
    """An old folder brings its own code, whose names are the old ones as well."""
    root, sums = old_folders
    printed = run_alone(
        """
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

for folder in sys.argv[1:]:
    auto_class = AutoModelForMaskedLM if folder.endswith("heptapod") else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    print(model(**torch.load(f"{folder}/inputs.pt")).logits.double().sum().item())
""",
        tmp_path,
        *(str(root / family) for family in FAMILIES),
    )
    assert [float(line) for line in printed.split()] == pytest.approx([sums[family] for family in FAMILIES], rel=1e-6)


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
