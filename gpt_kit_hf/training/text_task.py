"""What pretraining on stored and on streamed text has in common: the model, the evaluation text and the samples."""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpt_kit_hf.data.text.corpus import check_stated_encoding, choose_encoding
from gpt_kit_hf.data.text.tokenize import stored_shards, tokenize_text
from gpt_kit_hf.data.text.tokens.token_cache import cache_folder
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation, evaluate_stream, gzip_bits_per_byte, token_byte_lengths
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.base_model import BaseModel
from gpt_kit_hf.hub.model_folder import load_text_encoding, write_model_folder
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.data import TRAINED_BPE, TextOptions, WindowOptions
from gpt_kit_hf.options.run import RunOptions, ShareOptions
from gpt_kit_hf.text import short
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.export import load_encoding
from gpt_kit_hf.tokenization.model_encoding import encoding_of
from gpt_kit_hf.training.needs.cost import random_rows
from gpt_kit_hf.training.runtime.preparation import Preparation, prepare_together
from gpt_kit_hf.training.state.sharded_state import replace_weights, unsharded_model
from gpt_kit_hf.training.task import RunContext, Sample, Task, check_max_length, generate_sample


class TextTask(Task):
    """A new GPT, or a model to train further, and its evaluation text; subclasses add the training text."""

    eval_name = "eval text"

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        self.options, self.context = options, context
        self.base = self._load_base()
        self.windows = self._choose_windows()
        context.console.log(f"reading  {_sources(options.text)}")
        with prepare_together(context.accelerator) as together:
            self.encoding = together.on_main(self._choose_encoding)
            self._tokenize(together)
            self.eval_text = self._read_text()
            together.gather(None)  # opening the shards of a large corpus takes minutes
        self._eos = self.encoding.encode_single_token(encodings.EOS_TOKEN)
        self._begin = encodings.begin_of_text(self.encoding)
        self._check_eval_text()
        self._eval_fingerprint = self.eval_text.fingerprint()
        self.byte_lengths = token_byte_lengths(self.encoding)
        self.tokens_per_sample = float(self.windows.length)
        self.model = self._build_model() if self.base is None else self.base.model
        self.eval_before_training = self.base is not None

    @abstractmethod
    def _read_text(self) -> TokenStream:
        """Prepare the training text; return the evaluation text."""

    def longest_rows(self, count: int) -> Batch:
        """Return windows of random ids: all windows are equally long."""
        return random_rows(self.encoding.n_vocab, self.windows.length)(count)

    def ids_evaluated(self, max_samples: int | None, batch_size: int) -> int:
        """Return the number of tokens that are scored."""
        tokens = len(self.eval_text)
        return tokens if max_samples is None else min(tokens, max_samples * self.windows.length)

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the evaluation text, each token once."""
        max_length = self.windows.length
        return evaluate_stream(
            self.model,  # not the wrapped one: processes may have different numbers of windows
            self.eval_text,
            self.byte_lengths,
            end_of_text=self._eos,
            begin_of_text=self._begin,
            max_length=max_length,
            stride=max_length,
            batch_size=batch_size,
            max_tokens=None if max_samples is None else max_samples * max_length,
            accelerator=self.context.accelerator,
            autocast=autocast,
            stop=self.context.stop.asked,
        )

    def sample(self) -> Sample:
        """Return the model's continuation of the sample prompt, after what precedes a text."""
        chosen, begin = self.context.options, self._eos if self._begin is None else self._begin
        written = encodings.encode_ordinary(self.encoding, chosen.sample_prompt, "sample_prompt").tolist()
        before = [begin] if self._begins() else self.encoding.encode_ordinary("\n")
        unseen = (self._eos, begin, encodings.get_pad_token_id(self.encoding))
        return generate_sample(
            self.model,
            torch.tensor([[*before, *written]]),
            chosen.sample_max_new_tokens,
            lambda ids: self.encoding.decode([token for token in ids[len(before) :] if token not in unseen]),
            temperature=0.8,
            top_k=50,
        )

    def _begins(self) -> bool:
        """Return whether texts are trained to follow the token that documents begin after."""
        return True

    def describe_model(self) -> str:
        """Return a log line with the model's name and size."""
        config, preset = self.model.config.get_text_config(decoder=True), self.options.model.model
        layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        return (
            f"model    {preset if self.base is None else self.base.named}: {short(self.model.num_parameters())} "
            f"parameters, {layers} layer{'s' * (layers != 1)}, {heads} head{'s' * (heads != 1)}, {width} wide"
            + ("" if self.base is None else ", trained further")
        )

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        return {
            **({} if self.base is None else self.base.facts()),
            "max_length": self.windows.length,
            "eval_tokens": len(self.eval_text),
            "eval_fingerprint": self._eval_fingerprint,
            "tokenizer_fingerprint": encodings.fingerprint(self.encoding),
        }

    def baselines(self) -> dict[str, float]:
        """Return what gzip reaches on the evaluation text."""
        return {"gzip -9": gzip_bits_per_byte(self.eval_text, self.encoding)}

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder for `from_pretrained`."""
        model: Any = unsharded_model(self.model)
        if self.base is None:
            write_model_folder(folder, model, self.encoding, weights, begins=self._begins())
        else:  # with what else the tokenizer and the generation defaults hold, such as a chat template
            model.save_pretrained(str(folder), state_dict=weights)
            self.base.tokenizer.save_pretrained(str(folder))

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint; every process calls."""
        kind = GPTKitForCausalLM if self.base is None else AutoModelForCausalLM
        replace_weights(self.model, lambda: kind.from_pretrained(checkpoint, dtype=torch.float32).state_dict())

    def next_command(self, run: Path) -> list[str]:
        """Return the command that generates text."""
        return ["gpt-kit", "generate", str(run), "--prompt", self.context.options.sample_prompt or "The"]

    # --- preparation

    def _load_base(self) -> BaseModel | None:
        """Load the model to train further, or what a checkpoint has made of it."""
        chosen = self.options.model
        if chosen.model_name_or_path is None:
            return None
        folder, checkpoint = self.context.folder, self.context.checkpoint
        self.context.console.log(f"loading  {chosen.model_name_or_path}")
        return BaseModel(chosen.model_name_or_path, folder, checkpoint, dropout=chosen.dropout)

    def _choose_windows(self) -> WindowOptions:
        """Return the windows; refuse longer ones than the model's context, before the text is read."""
        chosen = self.options.windows
        if self.base is not None:
            if chosen.max_length is None:
                length = min(chosen.length, context_length(self.base.model) or chosen.length)
                return replace(chosen, max_length=length)
            check_max_length(self.base.model, chosen.length)
            return chosen
        return chosen

    def _choose_encoding(self) -> tiktoken.Encoding:
        if self.base is not None:
            found = encoding_of(self.base.tokenizer, Path(self.base.named).name)
            self._check_vocabulary(self.base, found)
            check_stated_encoding(self.options.text, found, f"that of {self.base.named!r}")
            return found
        if self.context.checkpoint is not None:
            return load_encoding(self.context.checkpoint)
        if self.options.encoding.encoding == TRAINED_BPE and not self.options.text.token_files:
            self.context.console.log(f"training a bpe of {self.options.encoding.vocab_size:,} tokens on the text")
        return choose_encoding(self.options.text, self.options.encoding)

    def _tokenize(self, together: Preparation) -> None:
        """Fill the token cache: each process that sees it tokenizes its share."""
        accelerator, text = self.context.accelerator, self.options.text
        if accelerator.num_processes == 1:
            return
        # Archives and tables are converted when they are listed: by one process of a machine.
        together.run(lambda: stored_shards(text, self.encoding), here=accelerator.is_local_main_process)
        peers = together.sharing(cache_folder(text.token_cache_dir))
        share = ShareOptions(num_shards=len(peers), shard_index=peers.index(accelerator.process_index))
        machines = together.gather(accelerator.local_process_index).count(0)
        own = replace(text, num_proc=max(1, text.num_proc * machines // accelerator.num_processes))
        together.run(lambda: tokenize_text(own, self.encoding, share, log=self.context.console.log))

    def _check_vocabulary(self, base: BaseModel, encoding: tiktoken.Encoding) -> None:
        """Refuse a tokenizer that is not the model's, and an option that names another."""
        size, asked = base.model.config.get_text_config().vocab_size, self.options.encoding.encoding
        if encoding.n_vocab > size:
            raise UsageError(f"{base.named!r} has embeddings for {size} ids, and its tokenizer {encoding.n_vocab}")
        expected = base.model.config.to_dict().get("tokenizer_fingerprint")
        if expected is not None:
            encodings.check_fingerprint(encoding, expected, base.named)
        if asked != TRAINED_BPE:
            own = load_text_encoding(asked, asked) if Path(asked).is_dir() else encodings.get_encoding(asked)
            if asked == "bytes" and encodings.get_pad_token_id(encoding) is not None:
                own = encodings.with_pad_token(own)
            if encodings.fingerprint(own) != encodings.fingerprint(encoding):
                raise UsageError(
                    f"encoding={asked!r} is not the tokenizer of model_name_or_path={base.named!r}, with which it is "
                    "trained further: leave encoding out"
                )

    def _check_eval_text(self) -> None:
        tokens, window = len(self.eval_text), self.windows.length + 1
        if tokens < window:
            raise DataError(
                f"the evaluation text has {tokens} tokens, fewer than one window of max_length + 1 = {window}: "
                "raise eval_fraction, give eval_files, or lower max_length"
            )

    def _build_model(self) -> GPTKitForCausalLM:
        if self.context.checkpoint is not None:
            kept: GPTKitForCausalLM = GPTKitForCausalLM.from_pretrained(self.context.checkpoint, dtype=torch.float32)
            return kept
        config = build_config(
            self.options.model,
            vocab_size=self.encoding.n_vocab,
            bos_token_id=self._eos,
            eos_token_id=self._eos,
            pad_token_id=encodings.get_pad_token_id(self.encoding),
            tokenizer_fingerprint=encodings.fingerprint(self.encoding),
        )
        torch.manual_seed(self.context.options.seed)
        return GPTKitForCausalLM(config)


def _sources(text: TextOptions) -> str:
    """Return where the text comes from, in one line."""
    named = [*(text.text_files or []), *(text.token_files or []), *(text.mixture or []), text.dataset_name or ""]
    return textwrap.shorten(", ".join(filter(None, named)), 70, placeholder=" ...")
