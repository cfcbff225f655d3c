"""Transformers' own model, configuration and training tests, run on the hierarchical LM's classes. See README.md."""

import unittest
from unittest import mock

import torch

from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM, HierarchicalLMModel
from modeling_heptapod.hierarchical_lm.auxiliary_losses import RandomProjectionQuantizer
from tests.conformance import families


families.register(HierarchicalLMConfig, MODEL=HierarchicalLMModel, MODEL_FOR_CAUSAL_LM=HierarchicalLMForCausalLM)


class HierarchicalLMModelTester(families.ModelTester):
    """A tiny hierarchical LM: a windowed fine stream and a full coarse one of half the steps."""

    config_class = HierarchicalLMConfig
    fields = {
        **families.TEXT_FIELDS,
        "compression_factors": [1, 2],
        "strides": [1, 2],
        "hidden_sizes": families.ModelTester.hidden_size,
        "head_dim": 8,
        "mlp_ratio": 2,
        "window_sizes": [4, None],
        "xpos_scale_base": 64,
    }


class HierarchicalLMModelTest(families.ModelTests, unittest.TestCase):
    all_model_classes = (HierarchicalLMModel, HierarchicalLMForCausalLM)
    model_tester_class = HierarchicalLMModelTester
    _torch_compile_train_cls = HierarchicalLMForCausalLM
    config_fields = {"compression_factors": [1, 2]}

    def test_attention_outputs(self):
        # A layer has as many attention matrices as hierarchies that attend; upstream counts one a layer.
        attending = [x for x in self.model_tester.get_config().window_sizes if x != 0]
        self.model_tester.num_hidden_layers *= len(attending)
        super().test_attention_outputs()

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
        # Hidden states of padded rows are copies in the order of the input, off the way to the output.
        config, inputs = super()._prepare_config_and_inputs_for_retain_grad_hidden_states_attentions()
        return config, {"input_ids": inputs["input_ids"]}

    def test_model_rope_scaling_from_config_1_dynamic(self):
        # Frequencies that change with length are refused: cached keys cannot follow them.
        with self.assertRaisesRegex(ValueError, "rope_type.*got 'dynamic'"):
            super().test_model_rope_scaling_from_config_1_dynamic()

    def test_model_rope_scaling_frequencies(self):
        # Upstream builds one rotary module from the configuration; here each hierarchy has one, with its own `head_dim`.
        config_of_one = mock.patch.object(
            HierarchicalLMConfig, "get_text_config", lambda config, **kwargs: config.of_hierarchy(0)
        )
        with config_of_one:
            super().test_model_rope_scaling_frequencies()


class HierarchicalLMOptionsModelTest(HierarchicalLMModelTest):
    """Attention in compressors and merges, shared attention, tied embeddings."""

    overrides = {
        "compression_factors": [1, 2, 4],
        "strides": [1, 1, 4],
        "hidden_sizes": [32, 32, 16],
        "window_sizes": [3, 4, None],
        "compressor": ["conv", "conv", "attention"],
        "merge": "cross_attention",
        "merge_into": "all",
        "merge_direction": "coarse_to_fine",
        "shared_attention": True,
        "tie_word_embeddings": True,
    }


class HierarchicalLMPrototypeModelTest(HierarchicalLMModelTest):
    """The prototype's choices and all losses: blocks, LayerNorm, a coarse stream that predicts, and one without attention."""

    overrides = {
        "compression_factors": [2, 1, 4],
        "strides": [1, 1, 1],
        "hidden_sizes": [32, 16, 24],
        "window_sizes": [3, None, 0],
        "window_type": "block",
        "attention_norm": ["layer_norm", "rms_norm", "layer_norm"],
        "use_xpos": [False, True, False],
        "merge_into": "all",
        "predict_hierarchy": 2,
        "reconstruction_loss_weight": 0.1,
        "prophet_loss_weight": 0.1,
        "quantized_prophet_loss_weight": 0.1,
        "prophet_codebook_size": 8,
        "prophet_codebook_dim": 4,
        "prophet_num_codebooks": 2,
        "next_latent_loss_weight": [0.1, 0.0, 0.1],
    }

    def test_init_weights_can_init_buffers(self):
        # Upstream compares the buffers of two models; the quantizer's are random, and the same from one seed.
        init_weights = RandomProjectionQuantizer.init_weights

        def from_one_seed(module):
            torch.manual_seed(0)
            init_weights(module)

        with mock.patch.object(RandomProjectionQuantizer, "init_weights", from_one_seed):
            super().test_init_weights_can_init_buffers()


class HierarchicalLMPlansTest(families.PlansTests, unittest.TestCase):
    all_model_classes = HierarchicalLMModelTest.all_model_classes
    model_tester = HierarchicalLMModelTester()


class HierarchicalLMForCausalLMTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalLMForCausalLM,)
    model_tester = HierarchicalLMModelTester()


class HierarchicalLMWithLossesTrainingTest(families.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalLMForCausalLM,)
    model_tester = HierarchicalLMModelTester(**HierarchicalLMPrototypeModelTest.overrides)
