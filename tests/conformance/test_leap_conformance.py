"""Transformers' own model, configuration and training tests, run on every LEAP class. See README.md."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from modeling_heptapod import (
    LeapConfig,
    LeapForCausalLM,
    LeapForMaskedLM,
    LeapForSequenceClassification,
    LeapModel,
)
from tests.conformance import upstream


common = upstream.load("test_modeling_common")
ConfigTester = upstream.load("test_configuration_common").ConfigTester
FSDPTesterMixin = upstream.load("test_fsdp_mixin").FSDPTesterMixin
TensorParallelTesterMixin = upstream.load("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = upstream.load("test_training_mixin").TrainingTesterMixin

torch.set_num_threads(1)  # tensors this small only make threads wait for each other

# Upstream finds out by class name which head it looks at: which labels to build, which class is the base model.
for names, model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, LeapModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, LeapForCausalLM),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, LeapForMaskedLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, LeapForSequenceClassification),
):
    names[LeapConfig.model_type] = model_class.__name__


class LeapModelTester:
    """A tiny LEAP: one global and one windowed layer, weights large enough for differences to show.

    Args:
        overrides: configuration fields that differ from those below.
    """

    batch_size = 13
    seq_length = 11
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    key_length = 2  # the last dimension of `attentions`: log focus weight and query gate
    is_training = True

    def __init__(self, **overrides):
        self.overrides = overrides

    def get_config(self):
        fields = {
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "window_sizes": [None, 4],
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return LeapConfig(**{**fields, **self.overrides})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        # Rows of growing length, padded on the right.
        attention_mask = torch.ones_like(input_ids).tril()
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class LeapModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LeapModel, LeapForCausalLM, LeapForMaskedLM, LeapForSequenceClassification)
    test_can_init_all_missing_weights_before_2023 = True  # upstream asks for the year on top of a file; ours have none
    _torch_compile_train_cls = LeapForCausalLM
    overrides = {}

    def setUp(self):
        self.model_tester = LeapModelTester(**self.overrides)
        positions = self.model_tester.get_config().position_embedding_type
        if "rope_scaling" in self._testMethodName and positions != "rotary":
            self.skipTest(f"the positions of this model are {positions}, not rotary")

    def test_config(self):
        fields = {"hidden_size": 32, "num_hidden_layers": 2, **self.overrides}
        ConfigTester(self, config_class=LeapConfig, **fields).run_common_tests()

    @unittest.skip("GenerationTesterMixin is not part of the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass

    def test_retain_grad_hidden_states_attentions(self):
        self.has_attentions = False  # leaves upstream's half about hidden states
        super().test_retain_grad_hidden_states_attentions()
        # The output is not computed from `attentions`, which is recorded on the way: a gradient flows from it, not to it.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LeapModel(config)
        attentions = model(**inputs, output_attentions=True).attentions
        sum(layer[-1].square().sum() for layer in attentions).backward()  # the last row has no pads
        for layer in model.layers:
            for name, parameter in layer.mixer.named_parameters():
                self.assertGreater(parameter.grad.abs().max(), 0, name)


class LeapPrototypeModelTest(LeapModelTest):
    """The options of the prototype, and its positions."""

    overrides = {
        "position_embedding_type": "learned",
        "weight_function": "exp",
        "rescale": None,
        "query_gate": "gelu",
        "window_sizes": [None, None],
        "null_weight": 1e-5,
        "tie_word_embeddings": False,
    }


class LeapAdditiveModelTest(LeapModelTest):
    """The second mixer, with parameters and a buffer that the first does not have."""

    overrides = {"mixer": "additive", "position_embedding_type": "decay"}


class LeapPlansTest(unittest.TestCase):
    """The declarations for several devices; upstream's runs on them take the launcher that the archive leaves out."""

    all_model_classes = LeapModelTest.all_model_classes
    model_tester = LeapModelTester()
    _has_fsdp_plan = FSDPTesterMixin._has_fsdp_plan
    test_fsdp_plan_declared = FSDPTesterMixin.test_fsdp_plan_declared
    test_tp_plan_shards_input_embeddings = TensorParallelTesterMixin.test_tp_plan_shards_input_embeddings


class LeapForCausalLMTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForCausalLM,)
    model_tester = LeapModelTester()


class LeapForMaskedLMTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForMaskedLM,)
    model_tester = LeapModelTester()


class LeapForSequenceClassificationTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForSequenceClassification,)
    model_tester = LeapModelTester()

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        """Upstream labels tokens; a classifier gets the same tokens, forwards and backwards, and one label a row."""
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        batch["input_ids"][1::2] = batch["input_ids"][1::2].flip(1)
        batch["labels"] = torch.arange(batch_size) % 2
        return batch
