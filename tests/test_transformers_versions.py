"""The window of Transformers versions: what is stated, and what is refused."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

import modeling_heptapod
from modeling_heptapod.common import transformers_versions
from modeling_heptapod.common.transformers_versions import CACHE, NEWEST, OLDEST, check_version, slice_logits_to_keep
from tests.clean_room import run_beside
from tests.tiny import random_ids
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


ROOT = Path(__file__).parent.parent
BEYOND = f"{NEWEST[0]}.{NEWEST[1] + 1}"


def test_versions_of_the_window_pass():
    for version in ("{}.{}.0".format(*OLDEST), "{}.{}.7".format(*NEWEST), "{}.{}.0.dev0".format(*NEWEST)):
        check_version(version)


@pytest.mark.parametrize("version", ["4.57.6", f"{OLDEST[0]}.{OLDEST[1] - 1}.9", f"{BEYOND}.0", f"{BEYOND}.0.dev0"])
def test_other_versions_are_refused_by_name(version):
    window = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{BEYOND}"
    with pytest.raises(ImportError, match=f"{re.escape(window)}, but {re.escape(version)} is installed"):
        check_version(version)


@pytest.mark.parametrize(
    "module", ["modeling_heptapod", pytest.param("modeling_heptapod.leap.modeling_leap", marks=pytest.mark.slow)]
)
def test_the_import_refuses_before_anything_else(module):
    code = f"""
import sys, transformers
transformers.__version__ = "{BEYOND}.0"
try:
    import {module}
except ImportError as error:
    print(error, [name for name in sys.modules if name.startswith("modeling_heptapod.configuration")])
"""
    printed = run_beside(code)
    assert f"{BEYOND}.0 is installed" in printed and printed.rstrip().endswith("[]")


def test_pyproject_docs_and_cards_state_the_same_window():
    window = f'"transformers>={OLDEST[0]}.{OLDEST[1]},<{BEYOND}"'
    assert window in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    said = "any version from {}.{} to {}.{} (".format(*OLDEST, *NEWEST)
    assert said in (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    beyond = "before {}.{} and from {} on".format(*OLDEST, BEYOND)
    assert beyond in (ROOT / "README.md").read_text(encoding="utf-8")
    cards = list((ROOT / "hub_cards").glob("*-tiny.md"))
    assert len(cards) == 4 and all(window in card.read_text(encoding="utf-8") for card in cards)


def test_both_names_of_the_cache_are_taken_and_given():
    model = tiny_hierarchical_lm()
    ids = random_ids(2, 9)
    expected = model(ids).logits[:, 6:]
    for name in ("past_key_values", "cache"):
        out = model(ids[:, :6], use_cache=True)
        assert out.cache is out.past_key_values and list(out.keys())[1] == CACHE
        torch.testing.assert_close(model(ids[:, 6:], **{name: out.cache}).logits, expected)
    other = {"past_key_values": None, "cache": None}
    torch.testing.assert_close(model(ids, **other).logits[:, 6:], expected)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids[:, 6:], past_key_values=out.cache, cache=model(ids, use_cache=True).cache)


@pytest.mark.parametrize("make", [tiny_leap, tiny_hierarchical_lm, tiny_multigrid])
def test_signatures_show_the_name_of_the_installed_version(make):
    model = make()
    for module in (model, model.model, model.model.layers[0]):
        names = inspect.signature(module.forward).parameters
        assert {"past_key_values", "cache"} & set(names) == {CACHE}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_signatures_show_one_name_of_the_cache_in_its_place(name, monkeypatch):
    monkeypatch.setattr(transformers_versions, "CACHE", name)

    @transformers_versions.with_cache_argument
    def forward(input_ids, past_key_values=None, *, labels=None):
        return input_ids, past_key_values, labels

    assert list(inspect.signature(forward).parameters) == ["input_ids", name, "labels"]
    assert (
        forward(1, cache=2, labels=3)
        == forward(1, past_key_values=2, labels=3)
        == forward(1, 2, labels=3)
        == (1, 2, 3)
    )


def test_the_renamed_field_keeps_its_place_and_its_docstring(monkeypatch):
    monkeypatch.setattr(transformers_versions, "CACHE", "cache")

    @dataclasses.dataclass
    @transformers_versions.with_cache_field
    class Output:
        """past_key_values (`Cache`): what further tokens need."""

        logits: torch.Tensor | None = None
        past_key_values: object | None = None
        loss: torch.Tensor | None = None

    assert [field.name for field in dataclasses.fields(Output)] == ["logits", "cache", "loss"]
    assert Output.__doc__.startswith("cache (") and Output(cache=3).cache == 3


@pytest.mark.parametrize(
    "cache_class",
    [
        "RecurrentCache",
        "StaticRecurrentCache",
        "HierarchicalCache",
        "StaticHierarchicalCache",
        "MultiGridCache",
        "StaticMultiGridCache",
    ],
)
def test_caches_can_say_how_many_tokens_they_have_seen(cache_class):
    """From 5.24 on `generate` asks by `is_linear`, and gives a cache that cannot all tokens again."""
    make, options = tiny_leap, {}
    if "MultiGrid" in cache_class:
        make, options = tiny_multigrid, {"core": "lstm"}
    elif "Hierarchical" in cache_class:
        make, options = tiny_hierarchical_lm, {"window_sizes": 0}
    room = {"max_cache_len": 9} if "Static" in cache_class else {}
    cache = getattr(modeling_heptapod, cache_class)(make(**options).config, **room)
    assert not all(cache.is_linear) and len(cache.is_linear) == len(cache.layers)


@pytest.mark.parametrize(
    "logits_to_keep", [0, 2, torch.tensor([1, 3]), torch.tensor([[0], [4]]), torch.eye(2, 5).bool()]
)
def test_logits_to_keep_are_sliced_as_by_transformers(logits_to_keep):
    stock = pytest.importorskip("transformers.modeling_utils")
    if not hasattr(stock, "slice_logits_to_keep"):
        pytest.skip("transformers has it from 5.23 on")
    states = torch.randn(2, 5, 3)
    assert torch.equal(
        slice_logits_to_keep(states, logits_to_keep), stock.slice_logits_to_keep(states, logits_to_keep)
    )


@pytest.mark.parametrize(
    "wrong, error",
    [(-2, ValueError), ("3", TypeError), (1.0, TypeError), (torch.tensor(3), TypeError), ([1], TypeError)],
)
def test_logits_to_keep_of_another_kind_are_named(wrong, error):
    with pytest.raises(error, match="`logits_to_keep` must be"):
        slice_logits_to_keep(torch.randn(2, 5, 3), wrong)


def test_a_grid_s_generation_config_is_loaded_as_by_older_versions(tmp_path):
    """Before 5.20 with the commit of the folder, which is no option."""
    modeling_heptapod.HeptapodGenerationConfig(max_denoising_steps=3).save_pretrained(tmp_path)
    config = modeling_heptapod.HeptapodGenerationConfig.from_pretrained(tmp_path)
    again = modeling_heptapod.HeptapodGenerationConfig(_commit_hash="0123abcd", **config.to_diff_dict())
    assert config.max_denoising_steps == again.max_denoising_steps == 3
    assert "_commit_hash" not in again.to_dict()
