"""Transformers' own model, configuration and training tests, run on MultiGrid's classes. See README.md."""

import unittest

import torch

from modeling_heptapod import MultiGridConfig, MultiGridForCausalLM, MultiGridModel
from tests.conformance import families


families.register(MultiGridConfig, MODEL=MultiGridModel, MODEL_FOR_CAUSAL_LM=MultiGridForCausalLM)

LEAP = {"core": "leap", "axis_names": ["kind"], "axis_vocab_sizes": [7], "window_sizes": [None, 4]}
LSTM = {"core": "lstm", "axis_names": ["kind"], "axis_vocab_sizes": [7]}
FACTORED = {"axis_order": "factored", "axis_hidden_size": 16, "cross_feed_forward": False, "axis_weights": [0.7, 0.2]}
NO_AXES = {"axis_names": [], "axis_vocab_sizes": [], "tie_word_embeddings": True}


def axis_ids_of(input_ids, config):
    """Tracks that the text decides, `[batch, axes, seq]`."""
    return torch.stack([input_ids % size for size in config.axis_vocab_sizes], dim=1)


class MultiGridModelTester(families.ModelTester):
    """A tiny MultiGrid: attention, a text and two axes."""

    config_class = MultiGridConfig
    fields = {
        **families.TEXT_FIELDS,
        "hidden_size": families.ModelTester.hidden_size,
        "axis_names": ["kind", "bracket"],
        "axis_vocab_sizes": [7, 5],
    }

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        if config.num_axes:
            inputs["axis_ids"] = axis_ids_of(inputs["input_ids"], config)
        return config, inputs


class MultiGridModelTest(families.ModelTests, unittest.TestCase):
    all_model_classes = (MultiGridModel, MultiGridForCausalLM)
    model_tester_class = MultiGridModelTester
    _torch_compile_train_cls = MultiGridForCausalLM
    additional_model_inputs = ["axis_ids"]  # upstream passes on what it knows, and these
    config_fields = {"axis_names": ["kind", "bracket"], "axis_vocab_sizes": [7, 5]}

    def test_attention_outputs(self):
        # The heads of all streams are side by side; upstream knows those of one.
        config = self.model_tester.get_config()
        self.model_tester.num_attention_heads += config.num_axes * config.axis_num_attention_heads
        super().test_attention_outputs()


class MultiGridFactoredModelTest(MultiGridModelTest):
    """Axis ids before main tokens, and the light wiring: narrow axis streams, readings without feed-forwards."""

    overrides = FACTORED


class MultiGridLeapModelTest(MultiGridModelTest):
    """LEAP's mixing, one axis."""

    has_attentions = False
    overrides = LEAP


class MultiGridLSTMModelTest(MultiGridModelTest):
    """LSTMs, one axis."""

    has_attentions = False
    overrides = LSTM


class MultiGridPlainModelTest(MultiGridModelTest):
    """No axes, which is a GPT-2, with tied embeddings."""

    overrides = NO_AXES


class MultiGridPlansTest(families.PlansTests, unittest.TestCase):
    all_model_classes = MultiGridModelTest.all_model_classes
    model_tester = MultiGridModelTester()


class WithTracksOfThePrompt(MultiGridForCausalLM):
    """Upstream's prompt is one token without axis ids."""

    def generate(self, prompt, **kwargs):
        return super().generate(prompt, axis_ids=axis_ids_of(prompt, self.config), **kwargs)


class MultiGridForCausalLMTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (WithTracksOfThePrompt,)
    model_tester = MultiGridModelTester()

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        return {**batch, "axis_ids": axis_ids_of(batch["input_ids"], self.model_tester.get_config())}


class MultiGridFactoredTrainingTest(MultiGridForCausalLMTrainingTest):
    model_tester = MultiGridModelTester(**FACTORED)


class MultiGridLeapTrainingTest(MultiGridForCausalLMTrainingTest):
    model_tester = MultiGridModelTester(**LEAP)


class MultiGridLSTMTrainingTest(MultiGridForCausalLMTrainingTest):
    model_tester = MultiGridModelTester(**LSTM)


class MultiGridPlainTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (MultiGridForCausalLM,)
    model_tester = MultiGridModelTester(**NO_AXES)
