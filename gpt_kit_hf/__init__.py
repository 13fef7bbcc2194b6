"""A GPT of one's own, from raw text to a published model.

Importing registers the model with the Auto classes of transformers.
"""

from torch.nn import GELU, LayerNorm

from gpt_kit_hf.commands.cli import run_command
from gpt_kit_hf.data.instructions.batches import PackedRows, PaddedRows
from gpt_kit_hf.data.instructions.dataset import InstructionDataset, create_instruction_collate_fn
from gpt_kit_hf.data.instructions.formats import format_alpaca
from gpt_kit_hf.data.instructions.inspect import inspect_rows
from gpt_kit_hf.data.instructions.reader import RowOptions, read_rows
from gpt_kit_hf.data.instructions.report import SupervisionReport, inspect_batches, report_of
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, SupervisionOptions, encode_rows
from gpt_kit_hf.data.text.corpus import Corpus, EncodingOptions, choose_encoding, prepare_corpus
from gpt_kit_hf.data.text.sources import TextOptions
from gpt_kit_hf.data.text.windows import (
    GPTPretrainingDataset,
    TokenStream,
    TokenWindows,
    WindowOptions,
    create_pretraining_dataloader,
)
from gpt_kit_hf.errors import CheckpointError, DataError, GPTKitError, HubError, NonFiniteError, UsageError
from gpt_kit_hf.evaluation.invariance import check_invariance
from gpt_kit_hf.evaluation.metrics import Evaluation, evaluate_stream
from gpt_kit_hf.evaluation.score import ScoreOptions, ScoreReport, score_model
from gpt_kit_hf.generation.chat import ChatOptions, Conversation
from gpt_kit_hf.generation.generate import generate_text_autoregressive, stream_text
from gpt_kit_hf.hub.card.card import card_facts, render_card, write_card
from gpt_kit_hf.hub.push import PushOptions, PushResult, pull_model, push_to_hub
from gpt_kit_hf.hub.verify import GateReport, verify_publication
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.conversion import convert_checkpoint, load_gpt2_checkpoint, save_as_gpt2
from gpt_kit_hf.model.losses import Batch, compute_batch_loss, compute_loader_loss, train_step_with_gradient_clipping
from gpt_kit_hf.model.modeling_gpt_kit import (
    FeedForward,
    GPTKitForCausalLM,
    GPTKitModel,
    GPTKitPreTrainedModel,
    MultiHeadAttention,
    TransformerBlock,
)
from gpt_kit_hf.model.presets import PRESETS, ModelOptions, create_model_config
from gpt_kit_hf.model.registration import register
from gpt_kit_hf.options.parsing import parse_finetune_options, parse_run_options
from gpt_kit_hf.tokenization.chat_templates import check_chat_template, get_chat_template
from gpt_kit_hf.tokenization.encodings import get_encoding, text_to_token_ids, token_ids_to_text, train_bpe
from gpt_kit_hf.tokenization.export import load_encoding, save_tokenizer
from gpt_kit_hf.training.finetune import BaseOptions, FinetuneOptions, finetune
from gpt_kit_hf.training.lora import AdapterOptions
from gpt_kit_hf.training.optim.optimizer import OptimizerOptions, create_optimizer, learning_rate_at
from gpt_kit_hf.training.pretrain import train
from gpt_kit_hf.training.run_log import RunResult
from gpt_kit_hf.training.run_options import RunOptions, TrainingOptions
from gpt_kit_hf.training.trainer import AMPTrainer, UpdateReport

__version__ = "0.1.0"

# The kit's name for the complete GPT; one class, two names.
GPTModel = GPTKitForCausalLM

register()

__all__ = [
    "GELU",
    "PRESETS",
    "AMPTrainer",
    "AdapterOptions",
    "BaseOptions",
    "Batch",
    "ChatOptions",
    "CheckpointError",
    "Conversation",
    "Corpus",
    "DataError",
    "EncodingOptions",
    "Evaluation",
    "FeedForward",
    "FinetuneOptions",
    "GPTKitConfig",
    "GPTKitError",
    "GPTKitForCausalLM",
    "GPTKitModel",
    "GPTKitPreTrainedModel",
    "GPTModel",
    "GPTPretrainingDataset",
    "GateReport",
    "HubError",
    "InstructionDataset",
    "LayerNorm",
    "ModelOptions",
    "MultiHeadAttention",
    "NonFiniteError",
    "OptimizerOptions",
    "PackedRows",
    "PaddedRows",
    "PushOptions",
    "PushResult",
    "RowOptions",
    "RunOptions",
    "RunResult",
    "ScoreOptions",
    "ScoreReport",
    "SupervisedRows",
    "SupervisionOptions",
    "SupervisionReport",
    "TextOptions",
    "TokenStream",
    "TokenWindows",
    "TrainingOptions",
    "TransformerBlock",
    "UpdateReport",
    "UsageError",
    "WindowOptions",
    "card_facts",
    "check_chat_template",
    "check_invariance",
    "choose_encoding",
    "compute_batch_loss",
    "compute_loader_loss",
    "convert_checkpoint",
    "create_instruction_collate_fn",
    "create_model_config",
    "create_optimizer",
    "create_pretraining_dataloader",
    "encode_rows",
    "evaluate_stream",
    "finetune",
    "format_alpaca",
    "generate_text_autoregressive",
    "get_chat_template",
    "get_encoding",
    "inspect_batches",
    "inspect_rows",
    "learning_rate_at",
    "load_encoding",
    "load_gpt2_checkpoint",
    "parse_finetune_options",
    "parse_run_options",
    "prepare_corpus",
    "pull_model",
    "push_to_hub",
    "read_rows",
    "render_card",
    "report_of",
    "run_command",
    "save_as_gpt2",
    "save_tokenizer",
    "score_model",
    "stream_text",
    "text_to_token_ids",
    "token_ids_to_text",
    "train",
    "train_bpe",
    "train_step_with_gradient_clipping",
    "verify_publication",
    "write_card",
]
