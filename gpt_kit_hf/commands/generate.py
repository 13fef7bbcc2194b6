"""`gpt-kit generate`, `chat` and `serve`."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.chat import Conversation, converse
from gpt_kit_hf.generation.fast_decoder import Decoder
from gpt_kit_hf.generation.generate import stream_text
from gpt_kit_hf.generation.server import serve as serve_model
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_pretrained, move_to_device
from gpt_kit_hf.options.generation import ChatCommandOptions, GenerateOptions, ServeOptions
from gpt_kit_hf.tokenization.encodings import text_to_token_ids

_TOKENS_COMPARED = 128  # tokens on which the reduced precision is compared with the model's own
_MAX_NEW_TOKENS = 200  # where --max_new_tokens is not given


def generate(options: GenerateOptions) -> None:
    """Stream the prompt and its continuation; in another `dtype`, also note how far it is from the model's own."""
    model, tokenizer = _load(options.model_name_or_path, options.device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    # Without a prompt, a text begins where documents begin.
    start = options.prompt or (tokenizer.bos_token or "")
    prompt_tokens = text_to_token_ids(start, tokenizer).shape[1]
    room = model.config.max_position_embeddings - prompt_tokens
    wanted = options.max_new_tokens
    if wanted is None:
        wanted = _MAX_NEW_TOKENS if options.overflow == "slide" else max(1, min(_MAX_NEW_TOKENS, room))
    if wanted > room and options.overflow == "error":
        raise UsageError(
            f"the prompt's {prompt_tokens} tokens and {wanted} more exceed the model's context, "
            f"max_position_embeddings={model.config.max_position_embeddings}: lower --max_new_tokens, or give "
            "--overflow slide"
        )
    unwritten = [options.prompt]

    def show(chunk: str) -> None:
        write("".join((*unwritten, chunk)))
        unwritten.clear()

    # The prompt is written with the first chunk, so that a refusal stands alone.
    text = stream_text(
        model,
        tokenizer,
        start,
        max_new_tokens=wanted,
        temperature=options.temperature,
        top_k=options.top_k,
        overflow=options.overflow,
        dtype=options.dtype,
        on_text=show,
    )
    show("\n")
    if options.dtype != "auto":
        ids = text_to_token_ids(start + text, tokenizer)[:, -_TOKENS_COMPARED:]
        divergence, same = Decoder(model, options.dtype).divergence(ids)
        note(
            f"weights in {options.dtype}: KL divergence from the model's own predictions {divergence:.2g} nats a "
            f"token, the same most likely token at {same:.1%} of the last {ids.shape[1]}"
        )


def chat(options: ChatCommandOptions) -> None:
    """Chat with a model: lines from standard input, answers on the output."""
    model, tokenizer = _load(options.model_name_or_path, options.device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    kind = "no chat template: it continues your text" if tokenizer.chat_template is None else "chat template"
    note(f"{options.model_name_or_path} ({kind}). /clear starts a new conversation, /exit or Ctrl-D ends it.")
    try:
        converse(Conversation(model, tokenizer, options), _read_lines(), write, note)
    except KeyboardInterrupt:  # the way out in the middle of an answer
        write("\n")


def serve(options: ServeOptions) -> None:
    """Serve a model over an OpenAI-compatible API until interrupted."""
    serve_model(
        options.model_name_or_path,
        host=options.host,
        port=options.port,
        cors_allow_origins=options.cors_allow_origins,
        announce=lambda line: write(f"{line}\n"),
    )


def _load(place: str, device: str) -> tuple[Any, Any]:
    """Return the model of a run, a folder or a Hub repository, on the device, and its tokenizer."""
    folder = find_model_folder(place)
    tokenizer = load_pretrained(AutoTokenizer, folder, place)
    model = load_pretrained(AutoModelForCausalLM, folder, place)
    check_tokenizer(folder, model.config)
    move_to_device(model, device)
    return model, tokenizer


def _read_lines() -> Iterator[str]:
    """Yield the lines of the standard input, with a prompt where a person types them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # or invalid UTF-8 would end the conversation
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history)
    try:
        while True:
            yield input("> ")
    except EOFError:
        write("\n")
