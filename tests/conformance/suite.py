"""transformers' common model tests on this package's two shapes, and on transformers' GPT-2 and Qwen3 of their sizes.

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
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    GPTKitForQuestionAnswering,
    GPTKitForSequenceClassification,
    GPTKitForTokenClassification,
    GPTKitModel,
    create_model_config,
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


SIZES = {
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_classic() -> GPTKitConfig:
    return GPTKitConfig(**SIZES)


def tiny_gpt2() -> GPT2Config:
    # Two of the tests compare two training runs and leave dropout on.
    return GPT2Config(**SIZES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def tiny_modern() -> GPTKitConfig:
    # Without `zero_init_residual`: the tests look for the traces of an input behind the first block.
    return create_model_config("modern-xs", **SIZES, zero_init_residual=False)


def tiny_qwen3() -> Qwen3Config:
    return Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, intermediate_size=96, tie_word_embeddings=True)


class ModelTester:
    """What the mixins ask for: a tiny model's classes, sizes, configuration and inputs."""

    is_training = True
    batch_size = 13
    seq_length = 7
    hidden_size = SIZES["hidden_size"]
    num_hidden_layers = SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]

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
    width_name = "n_embd"

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)

    def test_config(self) -> None:
        config_class = self.all_model_classes[0].config_class
        ConfigTester(self, config_class=config_class, **{self.width_name: 36}).run_common_tests()


class ExportTests(test_executorch.ExecutorchTest):
    """The tests of export with a static cache, which load a tiny model from the Hub."""

    __test__ = False
    model_class: type[PreTrainedModel]
    tiny_config: Any

    def setUp(self) -> None:
        model = self.model_class(self.tiny_config())
        with mock.patch.object(test_executorch.AutoModelForCausalLM, "from_pretrained", return_value=model):
            super().setUp()


def left_out(*_: Any) -> None:
    raise unittest.SkipTest("this package refuses what the test asks for")


class GPTKitTests(CommonTests):
    all_model_classes = (
        GPTKitModel,
        GPTKitForCausalLM,
        GPTKitForSequenceClassification,
        GPTKitForTokenClassification,
        GPTKitForQuestionAnswering,
    )
    # They scale the rotation of models of every shape, and ask for rows beyond `max_position_embeddings`.
    test_model_rope_scaling_from_config_0_linear = left_out
    test_model_rope_scaling_from_config_1_dynamic = left_out
    test_model_rope_scaling_from_config_2_yarn = left_out
    test_model_rope_scaling_frequencies = left_out
    test_model_rope_with_partial_rotation = left_out


class ClassicTest(GPTKitTests, unittest.TestCase):
    tiny_config = staticmethod(tiny_classic)


class ClassicExportTest(ExportTests):
    __test__ = True
    model_class = GPTKitForCausalLM
    tiny_config = staticmethod(tiny_classic)


class ModernTest(GPTKitTests, unittest.TestCase):
    tiny_config = staticmethod(tiny_modern)


class ModernExportTest(ExportTests):
    __test__ = True
    model_class = GPTKitForCausalLM
    tiny_config = staticmethod(tiny_modern)


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


class Qwen3Test(CommonTests, unittest.TestCase):
    all_model_classes = (
        Qwen3Model,
        Qwen3ForCausalLM,
        Qwen3ForSequenceClassification,
        Qwen3ForTokenClassification,
        Qwen3ForQuestionAnswering,
    )
    width_name = "hidden_size"
    tiny_config = staticmethod(tiny_qwen3)


class Qwen3ExportTest(ExportTests):
    __test__ = True
    model_class = Qwen3ForCausalLM
    tiny_config = staticmethod(tiny_qwen3)
