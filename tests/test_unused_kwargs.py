"""Keyword arguments that nothing reads are refused in every forward; what stock code passes still works."""

import inspect
import logging

import pytest
import torch
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.logging import warning_once

from modeling_heptapod.common.transformers_versions import CACHE
from tests.tiny import random_ids
from tests.tiny_heptapod import random_page, tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import TWO_AXES, tiny_multigrid


MODELS = {
    "LeapModel": tiny_leap,
    "LeapForCausalLM": tiny_leap,
    "LeapForMaskedLM": tiny_leap,
    "LeapForSequenceClassification": tiny_leap,
    "HierarchicalLMModel": tiny_hierarchical_lm,
    "HierarchicalLMForCausalLM": tiny_hierarchical_lm,
    "HeptapodModel": tiny_heptapod,
    "HeptapodForMaskedLM": tiny_heptapod,
    "MultiGridModel": tiny_multigrid,
    "MultiGridForCausalLM": tiny_multigrid,
}
CAUSAL = ["LeapForCausalLM", "HierarchicalLMForCausalLM", "MultiGridForCausalLM"]
PACKED = ["LeapModel", "LeapForMaskedLM", *CAUSAL, "HierarchicalLMModel", "MultiGridModel"]


def make(head):
    """A model of this head and inputs `[2, 6]`, or two pages of two rows."""
    if "MultiGrid" in head:
        inputs = {"input_ids": random_ids(2, 6), "axis_ids": random_ids(2, 12, 5).view(2, 2, 6)}
        return tiny_multigrid(head, **TWO_AXES), inputs
    if "Heptapod" in head:
        return tiny_heptapod(head), {"input_ids": random_page(2, 2, 3)}
    more = {"pad_token_id": 0} if "Classification" in head else {}
    return MODELS[head](head, **more), {"input_ids": random_ids(2, 6)}


@pytest.mark.parametrize("head", MODELS)
@pytest.mark.parametrize("name", ["kv", "past_key_value", "position_id", "label_smoothing", "output_router_logits"])
def test_unknown_arguments_are_refused_by_name(head, name):
    model, inputs = make(head)
    with pytest.raises(TypeError, match=f"(Model|LM) got unexpected arguments: `{name}`"):
        model(**inputs, **{name: True})


@pytest.mark.parametrize("head", ["LeapForMaskedLM", "LeapForSequenceClassification", "HeptapodForMaskedLM"])
def test_what_only_other_heads_read_is_refused(head):
    model, inputs = make(head)
    labels = torch.tensor([0, 1]) if "Classification" in head else inputs["input_ids"]
    for name, value in (("shift_labels", labels), ("logits_to_keep", 1)):
        with pytest.raises(TypeError, match=f"`{name}`"):
            model(**inputs, labels=labels, **{name: value})


@pytest.mark.parametrize("head", ["HierarchicalLMForCausalLM", "MultiGridForCausalLM", "HeptapodForMaskedLM"])
def test_a_direction_is_refused_where_there_is_one_only(head):
    model, inputs = make(head)
    with pytest.raises(TypeError, match="`is_causal`"):
        model(**inputs, is_causal=False)


@pytest.mark.parametrize("head", MODELS)
def test_what_asks_for_nothing_passes(head):
    model, inputs = make(head)
    first = next(iter(model(**inputs).values()))
    nothing = {"unheard_of": None, "output_router_logits": False, "use_cache": False, "output_hidden_states": None}
    again = model(**inputs, **nothing, num_items_in_batch=None, return_dict=False)
    assert isinstance(again, tuple) and torch.equal(first, again[0])


@pytest.mark.parametrize("head", MODELS)
def test_recorded_outputs_are_still_to_be_had(head):
    model, inputs = make(head)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1 and out.attentions is not None


@pytest.mark.parametrize("head", MODELS)
def test_signatures_list_what_else_is_taken(head):
    """Transformers' own checks look there whether a model returns attention weights, for example."""
    model, _ = make(head)
    assert inspect.signature(model.forward).parameters["kwargs"].annotation == Unpack[TransformersKwargs]


@pytest.mark.parametrize("head", [*CAUSAL, "LeapForMaskedLM", "HeptapodForMaskedLM"])
def test_losses_still_read_the_number_of_items(head):
    model, inputs = make(head)
    mean = model(**inputs, labels=inputs["input_ids"]).loss
    items = inputs["input_ids"].numel() if head not in CAUSAL else 2 * 5
    torch.testing.assert_close(
        model(**inputs, labels=inputs["input_ids"], num_items_in_batch=4 * items).loss, mean / 4
    )


@pytest.mark.parametrize("head", CAUSAL)
def test_losses_still_read_shifted_labels(head):
    model, inputs = make(head)
    labels = inputs["input_ids"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("head", PACKED)
def test_lengths_come_with_the_boundaries_of_packed_sequences(head):
    model, inputs = make(head)
    inputs = {name: x[:1] for name, x in inputs.items()}
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    lengths = {"cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
    expected = model(**inputs, cu_seq_lens_q=bounds)[0]
    assert torch.equal(model(**inputs, cu_seq_lens_q=bounds, **lengths)[0], expected)
    with pytest.raises(TypeError, match="`cu_seq_lens_k`, `max_length_q`, `max_length_k`"):
        model(**inputs, **lengths)


@pytest.mark.parametrize("head", ["HeptapodModel", "HeptapodForMaskedLM"])
def test_the_grid_refuses_what_belongs_to_rows_of_text(head):
    model, inputs = make(head)
    ids = inputs["input_ids"]
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q", CACHE):
        with pytest.raises(TypeError, match=f"`{name}`"):
            model(**inputs, **{name: ids})


@pytest.mark.parametrize("head", MODELS)
def test_token_types_are_warned_of(head, caplog):
    model, inputs = make(head)
    logger = logging.getLogger("transformers")
    warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        got = next(iter(model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).values()))
    finally:
        logger.removeHandler(caplog.handler)
    base = type(getattr(model, "model", model)).__name__
    assert torch.equal(got, next(iter(model(**inputs).values())))
    assert f"`token_type_ids` are ignored: {base} has no token types" in caplog.text


@pytest.mark.parametrize("head", CAUSAL)
def test_generate_refuses_them_before_the_first_step(head):
    model, inputs = make(head)
    with pytest.raises(ValueError, match="past_key_value"):
        model.generate(**inputs, max_new_tokens=2, past_key_value=1)
