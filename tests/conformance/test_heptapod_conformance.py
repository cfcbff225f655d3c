"""Transformers' own model, configuration and training tests, run on the grid's classes. See README.md."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM, HeptapodModel
from tests.conformance import upstream


common = upstream.load("test_modeling_common")
ConfigTester = upstream.load("test_configuration_common").ConfigTester
FSDPTesterMixin = upstream.load("test_fsdp_mixin").FSDPTesterMixin
TensorParallelTesterMixin = upstream.load("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = upstream.load("test_training_mixin").TrainingTesterMixin

torch.set_num_threads(1)  # tensors this small only make threads wait for each other

# Upstream finds out by class name which head it looks at: which labels to build, which class is the base model.
for names, model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, HeptapodModel),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, HeptapodForMaskedLM),
):
    names[HeptapodConfig.model_type] = model_class.__name__


class HeptapodModelTester:
    """A tiny grid, flat as upstream's inputs are, and weights large enough for differences to show.

    Args:
        grid_size: height and width of a page.
        overrides: configuration fields that differ from those below.
    """

    batch_size = 13
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, grid_size=(3, 4), **overrides):
        self.grid_size, self.overrides = grid_size, overrides
        self.seq_length = grid_size[0] * grid_size[1]

    def get_config(self):
        fields = {
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "attention_types": ["local", "dilated"],
            "window_size": 1,
            "grid_size": self.grid_size,
            "initializer_range": 0.2,
            "mask_token_id": 98,
            "pad_token_id": 97,
        }
        return HeptapodConfig(**{**fields, **self.overrides})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        # Neither mask nor pad: the clean page of a loss has no open cells, and pads are told by the mask.
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], config.pad_token_id)
        # Pages of a growing number of cells.
        attention_mask = torch.ones_like(input_ids).tril()
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class HeptapodModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HeptapodModel, HeptapodForMaskedLM)
    test_can_init_all_missing_weights_before_2023 = True  # upstream asks for the year on top of a file; ours have none
    _torch_compile_train_cls = HeptapodForMaskedLM
    overrides = {}

    def setUp(self):
        self.model_tester = HeptapodModelTester(**self.overrides)

    def test_config(self):
        fields = {"hidden_size": 32, "num_hidden_layers": 2, "attention_types": ["local", "global"], **self.overrides}
        ConfigTester(self, config_class=HeptapodConfig, **fields).run_common_tests()

    @unittest.skip("GenerationTesterMixin is not part of the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass


class HeptapodFeedbackModelTest(HeptapodModelTest):
    """All that is off by default: global layers and heads, feedback, the loss on neighbours, untied embeddings."""

    overrides = {
        "attention_types": ["local", "global"],
        "num_global_heads": 1,
        "self_conditioning": True,
        "neighbor_loss_weight": 0.5,
        "tie_word_embeddings": False,
    }


class HeptapodPlansTest(unittest.TestCase):
    """The declarations for several devices; upstream's runs on them take the launcher that the archive leaves out."""

    all_model_classes = HeptapodModelTest.all_model_classes
    model_tester = HeptapodModelTester()
    _has_fsdp_plan = FSDPTesterMixin._has_fsdp_plan
    test_fsdp_plan_declared = FSDPTesterMixin.test_fsdp_plan_declared
    test_tp_plan_shards_input_embeddings = TensorParallelTesterMixin.test_tp_plan_shards_input_embeddings


class PageFromItsFirstCell(HeptapodForMaskedLM):
    """Upstream prompts with one token and asks for the rest; here the rest is a page of open cells behind it."""

    def generate(self, prompt, max_new_tokens, **kwargs):
        page = torch.full((1, max_new_tokens + 1), self.config.mask_token_id)
        page[:, 0] = prompt
        return super().generate(page)


class HeptapodForMaskedLMTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (PageFromItsFirstCell,)
    model_tester = HeptapodModelTester(grid_size=(8, 8))  # upstream's 64 tokens
    training_overfit_steps = 900  # a step shows part of the cells only, and what it shows differs
