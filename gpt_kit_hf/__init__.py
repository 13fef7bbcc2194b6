"""A GPT of one's own, from raw text to a published model.

Importing registers the model with the Auto classes of transformers.
"""

from torch.nn import GELU, LayerNorm

from gpt_kit_hf.amp import AMPTrainer, UpdateReport
from gpt_kit_hf.cli import run_command
from gpt_kit_hf.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.corpus import Corpus, EncodingOptions, choose_encoding, prepare_corpus
from gpt_kit_hf.errors import CheckpointError, DataError, GPTKitError, NonFiniteError, UsageError
from gpt_kit_hf.evaluation import Evaluation, evaluate_stream
from gpt_kit_hf.generation import generate_text_autoregressive, stream_text
from gpt_kit_hf.gpt2_checkpoint import convert_checkpoint, load_gpt2_checkpoint, save_as_gpt2
from gpt_kit_hf.instruction_data import InstructionDataset, create_instruction_collate_fn, format_alpaca
from gpt_kit_hf.invariance import check_invariance
from gpt_kit_hf.losses import compute_batch_loss, compute_loader_loss, train_step_with_gradient_clipping
from gpt_kit_hf.modeling_gpt_kit import (
    FeedForward,
    GPTKitForCausalLM,
    GPTKitModel,
    GPTKitPreTrainedModel,
    MultiHeadAttention,
    TransformerBlock,
)
from gpt_kit_hf.optimization import OptimizerOptions, create_optimizer, learning_rate_at
from gpt_kit_hf.option_parsing import parse_run_options
from gpt_kit_hf.presets import PRESETS, ModelOptions, create_model_config
from gpt_kit_hf.pretraining_data import (
    GPTPretrainingDataset,
    TokenStream,
    TokenWindows,
    WindowOptions,
    create_pretraining_dataloader,
)
from gpt_kit_hf.registration import register
from gpt_kit_hf.run_options import RunOptions, TrainingOptions
from gpt_kit_hf.run_record import RunResult
from gpt_kit_hf.text_sources import TextOptions
from gpt_kit_hf.tokenization import get_encoding, text_to_token_ids, token_ids_to_text, train_bpe
from gpt_kit_hf.tokenizer_twin import load_encoding, save_tokenizer
from gpt_kit_hf.training import train

__version__ = "0.1.0"

# The kit's name for the complete GPT; one class, two names.
GPTModel = GPTKitForCausalLM

register()

__all__ = [
    "GELU",
    "PRESETS",
    "AMPTrainer",
    "CheckpointError",
    "Corpus",
    "DataError",
    "EncodingOptions",
    "Evaluation",
    "FeedForward",
    "GPTKitConfig",
    "GPTKitError",
    "GPTKitForCausalLM",
    "GPTKitModel",
    "GPTKitPreTrainedModel",
    "GPTModel",
    "GPTPretrainingDataset",
    "InstructionDataset",
    "LayerNorm",
    "ModelOptions",
    "MultiHeadAttention",
    "NonFiniteError",
    "OptimizerOptions",
    "RunOptions",
    "RunResult",
    "TextOptions",
    "TokenStream",
    "TokenWindows",
    "TrainingOptions",
    "TransformerBlock",
    "UpdateReport",
    "UsageError",
    "WindowOptions",
    "check_invariance",
    "choose_encoding",
    "compute_batch_loss",
    "compute_loader_loss",
    "convert_checkpoint",
    "create_instruction_collate_fn",
    "create_model_config",
    "create_optimizer",
    "create_pretraining_dataloader",
    "evaluate_stream",
    "format_alpaca",
    "generate_text_autoregressive",
    "get_encoding",
    "learning_rate_at",
    "load_encoding",
    "load_gpt2_checkpoint",
    "parse_run_options",
    "prepare_corpus",
    "run_command",
    "save_as_gpt2",
    "save_tokenizer",
    "stream_text",
    "text_to_token_ids",
    "token_ids_to_text",
    "train",
    "train_bpe",
    "train_step_with_gradient_clipping",
]
