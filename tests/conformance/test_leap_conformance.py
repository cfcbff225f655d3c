"""Transformers' own model, configuration and training tests, run on every LEAP class. See README.md."""

import unittest

import torch

from modeling_heptapod import (
    LeapConfig,
    LeapForCausalLM,
    LeapForMaskedLM,
    LeapForSequenceClassification,
    LeapModel,
)
from tests.conformance import families


families.register(
    LeapConfig,
    MODEL=LeapModel,
    MODEL_FOR_CAUSAL_LM=LeapForCausalLM,
    MODEL_FOR_MASKED_LM=LeapForMaskedLM,
    MODEL_FOR_SEQUENCE_CLASSIFICATION=LeapForSequenceClassification,
)


class LeapModelTester(families.ModelTester):
    """A tiny LEAP: one global and one windowed layer."""

    config_class = LeapConfig
    fields = {
        **families.TEXT_FIELDS,
        "hidden_size": families.ModelTester.hidden_size,
        "intermediate_size": 64,
        "window_sizes": [None, 4],
    }
    key_length = 2  # the last dimension of `attentions`: log focus weight and output gate


class LeapModelTest(families.ModelTests, unittest.TestCase):
    all_model_classes = (LeapModel, LeapForCausalLM, LeapForMaskedLM, LeapForSequenceClassification)
    model_tester_class = LeapModelTester
    _torch_compile_train_cls = LeapForCausalLM

    def setUp(self):
        super().setUp()
        positions = self.model_tester.get_config().position_embedding_type
        if "rope_scaling" in self._testMethodName and positions != "rotary":
            self.skipTest(f"the positions of this model are {positions}, not rotary")

    def test_model_rope_scaling_from_config_1_dynamic(self):
        # Frequencies that change with length are refused: a recurrent state cannot follow them.
        with self.assertRaisesRegex(ValueError, "rope_type.*got 'dynamic'"):
            super().test_model_rope_scaling_from_config_1_dynamic()

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
        "position_embedding_type": "absolute",
        "weight_function": "exp",
        "rescale": None,
        "output_gate": "gelu",
        "window_sizes": [None, None],
        "sink_weight": 1e-5,
        "tie_word_embeddings": False,
    }


class LeapAdditiveModelTest(LeapModelTest):
    """The second mixer, with parameters and a buffer that the first does not have."""

    overrides = {"mixer": "additive", "position_embedding_type": "alibi"}


class LeapPlansTest(families.PlansTests, unittest.TestCase):
    all_model_classes = LeapModelTest.all_model_classes
    model_tester = LeapModelTester()


class LeapForCausalLMTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForCausalLM,)
    model_tester = LeapModelTester()


class LeapForMaskedLMTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForMaskedLM,)
    model_tester = LeapModelTester()


class LeapForSequenceClassificationTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LeapForSequenceClassification,)
    model_tester = LeapModelTester()

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        """Upstream labels tokens; a classifier gets the same tokens, forwards and backwards, and one label a row."""
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        batch["input_ids"][1::2] = batch["input_ids"][1::2].flip(1)
        batch["labels"] = torch.arange(batch_size) % 2
        return batch
