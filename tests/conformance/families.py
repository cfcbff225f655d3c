"""What the testers of all families share: upstream's classes, their names for ours, a tiny model and its inputs. See README.md."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from tests.conformance import upstream


common = upstream.load("test_modeling_common")
ConfigTester = upstream.load("test_configuration_common").ConfigTester
FSDPTesterMixin = upstream.load("test_fsdp_mixin").FSDPTesterMixin
TensorParallelTesterMixin = upstream.load("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = upstream.load("test_training_mixin").TrainingTesterMixin


def register(config_class, **model_classes):
    """Enters classes by their names where upstream looks which head it has before it: which labels to build, which class
    is the base model.

    Args:
        config_class: of the family.
        model_classes: by what stands before `_MAPPING_NAMES` in transformers' table, e.g. `MODEL_FOR_CAUSAL_LM`.
    """
    for task, model_class in model_classes.items():
        getattr(modeling_auto, f"{task}_MAPPING_NAMES")[config_class.model_type] = model_class.__name__


# Of models of texts.
TEXT_FIELDS = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class ModelTester:
    """A tiny model of a family, in the sizes by which upstream knows it, with weights large enough for differences to show.

    Subclasses say the `config_class` and its other `fields`.

    Args:
        overrides: configuration fields that differ from those of the class.
    """

    batch_size = 13
    seq_length = 11
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    is_training = True

    def __init__(self, **overrides):
        shared = {
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "initializer_range": 0.2,
        }
        self.config_fields = {**shared, **self.fields, **overrides}

    def get_config(self):
        return self.config_class(**self.config_fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of growing length, padded on the right.
        attention_mask = torch.ones_like(input_ids).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class ModelTests(common.ModelTesterMixin):
    """`ModelTesterMixin` and `ConfigTester` on one configuration; subclasses say the `model_tester_class` and `overrides`."""

    test_can_init_all_missing_weights_before_2023 = True  # upstream asks for the year on top of a file; ours have none
    config_fields = {}  # what `ConfigTester` is given besides the sizes
    overrides = {}

    def setUp(self):
        self.model_tester = self.model_tester_class(**self.overrides)

    def test_config(self):
        fields = {"hidden_size": 32, "num_hidden_layers": 2, **self.config_fields, **self.overrides}
        ConfigTester(self, config_class=self.model_tester_class.config_class, **fields).run_common_tests()

    @unittest.skip("GenerationTesterMixin is not part of the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass


class PlansTests:
    """The declarations for several devices; upstream's runs on them take the launcher that the archive leaves out."""

    _has_fsdp_plan = FSDPTesterMixin._has_fsdp_plan
    test_fsdp_plan_declared = FSDPTesterMixin.test_fsdp_plan_declared
    test_tp_plan_shards_input_embeddings = TensorParallelTesterMixin.test_tp_plan_shards_input_embeddings
