"""Transformers' own model, configuration and training tests, run on the hierarchical LM's classes. See README.md."""

import unittest
from unittest import mock

import torch
from transformers.models.auto import modeling_auto

from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM, HierarchicalLMModel
from modeling_heptapod.predictive_losses import RandomProjectionQuantizer
from tests.conformance import upstream


common = upstream.load("test_modeling_common")
ConfigTester = upstream.load("test_configuration_common").ConfigTester
FSDPTesterMixin = upstream.load("test_fsdp_mixin").FSDPTesterMixin
TensorParallelTesterMixin = upstream.load("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = upstream.load("test_training_mixin").TrainingTesterMixin

torch.set_num_threads(1)  # tensors this small only make threads wait for each other

# Upstream finds out by class name which head it looks at: which labels to build, which class is the base model.
for names, model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, HierarchicalLMModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, HierarchicalLMForCausalLM),
):
    names[HierarchicalLMConfig.model_type] = model_class.__name__


class HierarchicalLMModelTester:
    """A tiny hierarchical LM: a windowed fine stream and a full coarse one of half the steps, weights large enough for
    differences to show.

    Args:
        overrides: configuration fields that differ from those below.
    """

    batch_size = 13
    seq_length = 11
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, **overrides):
        self.overrides = overrides

    def get_config(self):
        fields = {
            "vocab_size": 99,
            "hierarchies": [1, 2],
            "strides": [1, 2],
            "hidden_sizes": self.hidden_size,
            "num_hidden_layers": type(self).num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "head_dim": 8,
            "ff_mult": 2,
            "window_sizes": [4, None],
            "xpos_scale_base": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return HierarchicalLMConfig(**{**fields, **self.overrides})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        # Rows of growing length, padded on the right.
        attention_mask = torch.ones_like(input_ids).tril()
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class HierarchicalLMModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalLMModel, HierarchicalLMForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # upstream asks for the year on top of a file; ours have none
    _torch_compile_train_cls = HierarchicalLMForCausalLM
    overrides = {}

    def setUp(self):
        self.model_tester = HierarchicalLMModelTester(**self.overrides)

    def test_config(self):
        fields = {"hidden_size": 32, "num_hidden_layers": 2, "hierarchies": [1, 2], **self.overrides}
        ConfigTester(self, config_class=HierarchicalLMConfig, **fields).run_common_tests()

    @unittest.skip("GenerationTesterMixin is not part of the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass

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
        "hierarchies": [1, 2, 4],
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
        "hierarchies": [2, 1, 4],
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


class HierarchicalLMPlansTest(unittest.TestCase):
    """The declarations for several devices; upstream's runs on them take the launcher that the archive leaves out."""

    all_model_classes = HierarchicalLMModelTest.all_model_classes
    model_tester = HierarchicalLMModelTester()
    _has_fsdp_plan = FSDPTesterMixin._has_fsdp_plan
    test_fsdp_plan_declared = FSDPTesterMixin.test_fsdp_plan_declared
    test_tp_plan_shards_input_embeddings = TensorParallelTesterMixin.test_tp_plan_shards_input_embeddings


class HierarchicalLMForCausalLMTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalLMForCausalLM,)
    model_tester = HierarchicalLMModelTester()


class HierarchicalLMWithLossesTrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalLMForCausalLM,)
    model_tester = HierarchicalLMModelTester(**HierarchicalLMPrototypeModelTest.overrides)
