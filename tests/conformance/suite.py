"""transformers' common model tests on this package's classes, and on transformers' GPT-2 of the same size.

test_common_model_tests.py runs this file in a process of its own, where `tests` is the distribution's folder.
"""

from __future__ import annotations

import functools
import unittest
from typing import Any
from unittest import mock

import torch.multiprocessing
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    GPTKitForQuestionAnswering,
    GPTKitForSequenceClassification,
    GPTKitForTokenClassification,
    GPTKitModel,
)
from tests import test_executorch, test_fsdp_mixin, test_tensor_parallel_mixin

# A rank that imports everything itself takes longer than its test: fork the ranks from a process that has done so.
torch.multiprocessing.set_forkserver_preload(
    [test_fsdp_mixin.__name__, test_tensor_parallel_mixin.__name__, "gpt_kit_hf"]
)
torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
# To save time, transformers runs these on a few of its own model types only.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


def tiny_gpt_kit() -> GPTKitConfig:
    return GPTKitConfig(**SIZES)


def tiny_gpt2() -> GPT2Config:
    # Two of the tests compare two training runs and leave dropout on.
    return GPT2Config(**SIZES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


SIZES = {
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class ModelTester:
    """What the mixins ask for: a tiny model's classes, sizes, configuration and inputs."""

    is_training = True
    batch_size = 13
    seq_length = 7
    hidden_size = SIZES["n_embd"]
    num_hidden_layers = SIZES["n_layer"]
    num_attention_heads = SIZES["n_head"]

    def __init__(self, test: CommonTests) -> None:
        self.get_config = test.tiny_config
        self.base_model_class, self.causal_lm_class, *_ = test.all_model_classes

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        attention_mask = input_ids.new_ones(input_ids.shape).tril()  # rows of 1, 2, 3... tokens, padded on the right
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonTests(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """Every common test that a decoder of text can take."""

    test_can_init_all_missing_weights_before_2023 = True
    all_model_classes: tuple[type[PreTrainedModel], ...]
    tiny_config: Any
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)

    def test_config(self) -> None:
        config_class = self.all_model_classes[0].config_class
        ConfigTester(self, config_class=config_class, n_embd=36).run_common_tests()


class ExportTests(test_executorch.ExecutorchTest):
    """The tests of export with a static cache, which load a tiny model from the Hub."""

    __test__ = False
    model_class: type[PreTrainedModel]
    tiny_config: Any

    def setUp(self) -> None:
        model = self.model_class(self.tiny_config())
        with mock.patch.object(test_executorch.AutoModelForCausalLM, "from_pretrained", return_value=model):
            super().setUp()


class GPTKitTest(CommonTests, unittest.TestCase):
    all_model_classes = (
        GPTKitModel,
        GPTKitForCausalLM,
        GPTKitForSequenceClassification,
        GPTKitForTokenClassification,
        GPTKitForQuestionAnswering,
    )
    tiny_config = staticmethod(tiny_gpt_kit)


class GPTKitExportTest(ExportTests):
    __test__ = True
    model_class = GPTKitForCausalLM
    tiny_config = staticmethod(tiny_gpt_kit)


class GPT2Test(CommonTests, unittest.TestCase):
    all_model_classes = (
        GPT2Model,
        GPT2LMHeadModel,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2ForQuestionAnswering,
    )
    tiny_config = staticmethod(tiny_gpt2)


class GPT2ExportTest(ExportTests):
    __test__ = True
    model_class = GPT2LMHeadModel
    tiny_config = staticmethod(tiny_gpt2)
