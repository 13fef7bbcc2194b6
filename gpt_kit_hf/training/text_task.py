"""What pretraining on stored and on streamed text have in common: the model, its score, its samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import tiktoken
import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import FSDPModule

from gpt_kit_hf.data.text.corpus import choose_encoding
from gpt_kit_hf.data.text.windows import TokenStream
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation, evaluate_stream, gzip_bits_per_byte, token_byte_lengths
from gpt_kit_hf.generation.generate import generate_text_autoregressive
from gpt_kit_hf.hub.model_folder import write_model_folder
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.run import RunOptions
from gpt_kit_hf.storage.run_folder import publish_in_run
from gpt_kit_hf.text import printable, short
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.export import load_encoding
from gpt_kit_hf.training.state.sharded_state import uncut_model
from gpt_kit_hf.training.task import RunSetting


class TextTask:
    """A GPT and the text that is held out from it; subclasses add what it is trained on."""

    scored = "held-out text"
    scored_first = False

    def __init__(self, options: RunOptions, setting: RunSetting) -> None:
        self.options, self.setting = options, setting
        self._check_before_reading()
        self.encoding = self._choose_encoding()
        self.held_out = self._read_text()
        self._check_held_out()
        self.byte_lengths = token_byte_lengths(self.encoding)
        self.tokens_per_sample = float(options.windows.max_length)
        self.model = self._build_model()

    def _read_text(self) -> TokenStream:
        """Read what there is to train on; return the text that is held out."""
        raise NotImplementedError

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the held-out text, each token once."""
        max_length = self.options.windows.max_length
        return evaluate_stream(
            self.model,  # not the wrapped one: processes may have unequally many windows
            self.held_out,
            self.byte_lengths,
            end_of_text=self.encoding.encode_single_token(encodings.END_OF_TEXT),
            max_length=max_length,
            stride=max_length,
            batch_size=batch_size,
            max_tokens=None if max_samples is None else max_samples * max_length,
            accelerator=self.setting.accelerator,
            autocast=autocast,
            stop=self.setting.stop.asked,
        )

    def sample(self) -> str:
        """Return text that the model continues from the sample prompt, or from the start of a document."""
        chosen, encoding = self.setting.options, self.encoding
        end = encoding.encode_single_token(encodings.END_OF_TEXT)
        prompt = torch.tensor([[end, *encoding.encode_ordinary(chosen.sample_prompt)]])
        room = self.model.config.max_position_embeddings - prompt.shape[1]
        if room < 1:
            return ""
        if not self.model(prompt.to(self.model.device)).logits.isfinite().all():
            return "(no sample: the model's scores are not finite)"
        ids = generate_text_autoregressive(
            self.model, prompt, min(room, chosen.sample_max_new_tokens), temperature=0.8, top_k=50
        )
        return printable(encoding.decode([token for token in ids[0].tolist() if token != end]))

    def describe_model(self) -> str:
        """Return a line that says what the model is."""
        config = self.model.config
        return (
            f"model    {self.options.model.model}: {short(self.model.num_parameters())} parameters, "
            f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
        )

    def facts(self) -> dict[str, Any]:
        """Return what the record keeps of the text."""
        return {
            "held_out_tokens": len(self.held_out),
            "tokenizer_fingerprint": encodings.fingerprint(self.encoding),
        }

    def baselines(self) -> dict[str, float]:
        """Return what gzip reaches on the held-out text."""
        return {"gzip -9": gzip_bits_per_byte(self.held_out, self.encoding)}

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write what `from_pretrained` loads."""
        model = uncut_model(self.model) if isinstance(self.model, FSDPModule) else self.model
        write_model_folder(folder, model, self.encoding, weights)

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Put the finished model into the run's root."""
        publish_in_run(run, checkpoint)

    def next_command(self, run: Path) -> list[str]:
        """Return the command that continues a text."""
        return ["gpt-kit", "generate", str(run), "--prompt", self.setting.options.sample_prompt or "The"]

    # --- preparation

    def _check_before_reading(self) -> None:
        config = build_config(self.options.model, vocab_size=self.options.encoding.vocab_size)
        max_length = self.options.windows.max_length
        if max_length > config.max_position_embeddings:
            raise UsageError(
                f"max_length={max_length} is above the position table, "
                f"max_position_embeddings={config.max_position_embeddings}: raise that, or lower max_length"
            )

    def _choose_encoding(self) -> tiktoken.Encoding:
        """Choose on the main process, which may have to train it; the others get the same."""
        chosen: list[Any] = [None]
        if self.setting.accelerator.is_main_process:
            if self.setting.checkpoint is not None:
                chosen = [load_encoding(self.setting.checkpoint)]
            else:
                chosen = [choose_encoding(self.options.text, self.options.encoding)]
        encoding: tiktoken.Encoding = broadcast_object_list(chosen)[0]
        return encoding

    def _build_model(self) -> GPTKitForCausalLM:
        encoding = self.encoding
        end = encoding.encode_single_token(encodings.END_OF_TEXT)
        config = build_config(
            self.options.model,
            vocab_size=encoding.n_vocab,
            bos_token_id=end,
            eos_token_id=end,
            tokenizer_fingerprint=encodings.fingerprint(encoding),
        )
        if self.setting.checkpoint is not None:
            kept: GPTKitForCausalLM = GPTKitForCausalLM.from_pretrained(self.setting.checkpoint, dtype=torch.float32)
            return kept
        torch.manual_seed(self.setting.options.seed)
        return GPTKitForCausalLM(config)

    def _check_held_out(self) -> None:
        tokens, window = len(self.held_out), self.options.windows.max_length + 1
        if tokens < window:
            raise DataError(
                f"the held-out text has {tokens} tokens, fewer than one window of max_length + 1 = {window}: "
                "raise eval_fraction, give eval_files, or lower max_length"
            )
