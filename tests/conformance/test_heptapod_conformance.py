"""Transformers' own model, configuration and training tests, run on the grid's classes. See README.md."""

import unittest

import torch

from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM, HeptapodModel
from tests.conformance import families


families.register(HeptapodConfig, MODEL=HeptapodModel, MODEL_FOR_MASKED_LM=HeptapodForMaskedLM)


class HeptapodModelTester(families.ModelTester):
    """A tiny grid, flat as upstream's inputs are.

    Args:
        grid_size: height and width of a page.
        overrides: configuration fields that differ from those below.
    """

    config_class = HeptapodConfig
    fields = {
        "hidden_size": families.ModelTester.hidden_size,
        "intermediate_size": 64,
        "attention_types": ["local", "dilated"],
        "local_radius": 1,
        "mask_token_id": 1,
        "pad_token_id": 0,
    }
    num_special_tokens = 2  # the first ids, which stay when upstream takes the last rows of the embeddings away

    def __init__(self, grid_size=(3, 4), **overrides):
        super().__init__(grid_size=grid_size, **overrides)
        self.seq_length = grid_size[0] * grid_size[1]

    def prepare_config_and_inputs_for_common(self):
        # The clean page of a loss has no masked cells; pads are told by the mask.
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {**inputs, "input_ids": inputs["input_ids"].clamp_min(self.num_special_tokens)}


class HeptapodModelTest(families.ModelTests, unittest.TestCase):
    all_model_classes = (HeptapodModel, HeptapodForMaskedLM)
    model_tester_class = HeptapodModelTester
    _torch_compile_train_cls = HeptapodForMaskedLM
    config_fields = {"attention_types": ["local", "global"]}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # Upstream's labels are zeros; those of the grid are its clean page, and others are refused.
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if "labels" in inputs:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


class HeptapodFeedbackModelTest(HeptapodModelTest):
    """All that is off by default: global layers and heads, feedback, the loss on neighbours, untied embeddings."""

    overrides = {
        "attention_types": ["local", "global"],
        "num_global_heads": 1,
        "self_conditioning": True,
        "neighbor_loss_weight": 0.5,
        "tie_word_embeddings": False,
    }


class HeptapodPlansTest(families.PlansTests, unittest.TestCase):
    all_model_classes = HeptapodModelTest.all_model_classes
    model_tester = HeptapodModelTester()


class PageFromItsFirstCell(HeptapodForMaskedLM):
    """Upstream prompts with one token and asks for the rest; here the rest is a page of open cells behind it."""

    def generate(self, prompt, max_new_tokens, **kwargs):
        page = torch.full((1, max_new_tokens + 1), self.config.mask_token_id)
        page[:, 0] = prompt
        return super().generate(page)


class HeptapodForMaskedLMTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (PageFromItsFirstCell,)
    model_tester = HeptapodModelTester(
        grid_size=(8, 8), mask_token_id=98, pad_token_id=97
    )  # none of upstream's 64 tokens
    training_overfit_steps = 900  # a step shows part of the cells only, and what it shows differs
