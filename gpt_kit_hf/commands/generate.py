"""`gpt-kit generate`, `chat`, `serve` and `play`."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt_kit_hf.commands.engines import uses_llama_cpp
from gpt_kit_hf.commands.running import note, quiet_libraries, write
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.chat import TextConversation, converse
from gpt_kit_hf.generation.engine import TextEngine
from gpt_kit_hf.options.generation import (
    ChatCommandOptions,
    DecodingDtype,
    GenerateOptions,
    Overflow,
    PlayOptions,
    ServeOptions,
)
from gpt_kit_hf.storage.gguf_header import is_gguf

_TOKENS_COMPARED = 128  # tokens on which the reduced precision is compared with the model's own
_MAX_NEW_TOKENS = 200  # where --max_new_tokens is not given


def generate(options: GenerateOptions) -> None:
    """Stream the prompt and its continuation; in another `dtype`, also note how far it is from the model's own."""
    with _text_engine(options, options.overflow) as engine:
        start = options.prompt or engine.start
        max_new_tokens = _new_tokens(options, engine, len(engine.encode(start)))
        unwritten = [options.prompt]

        def show(chunk: str) -> None:
            write("".join((*unwritten, chunk)))
            unwritten.clear()

        # The prompt is written with the first chunk, so that a refusal stands alone.
        text = engine.stream(start, max_new_tokens, show)
        show("\n")
        if options.dtype != "auto" and not uses_llama_cpp(options):
            _note_divergence(engine, start + text, options.dtype)


def _new_tokens(options: GenerateOptions, engine: TextEngine, n_prompt: int) -> int:
    """Return the most tokens to add. Raises UsageError if the model's context has no room for them."""
    context, wanted = engine.context_length, options.max_new_tokens
    if context is None or options.overflow == "slide":
        return _MAX_NEW_TOKENS if wanted is None else wanted
    room = context - n_prompt
    if wanted is None:
        wanted = max(1, min(_MAX_NEW_TOKENS, room))
    if wanted > room:
        slide = "" if uses_llama_cpp(options) else ", or give --overflow slide"
        raise UsageError(
            f"the prompt's {n_prompt} tokens and {wanted} more exceed the model's context, "
            f"max_position_embeddings={context}: lower --max_new_tokens{slide}"
        )
    return wanted


def _note_divergence(engine: Any, text: str, dtype: DecodingDtype) -> None:
    from gpt_kit_hf.generation.fast_decoder import Decoder
    from gpt_kit_hf.tokenization.encodings import text_to_token_ids

    ids = text_to_token_ids(text, engine.tokenizer)[:, -_TOKENS_COMPARED:]
    divergence, same = Decoder(engine.model, dtype).divergence(ids)
    note(
        f"weights in {dtype}: KL divergence from the model's own predictions {divergence:.2g} nats a token, the same "
        f"most likely token at {same:.1%} of the last {ids.shape[1]}"
    )


def chat(options: ChatCommandOptions) -> None:
    """Chat with a model: lines from standard input, answers on the output."""
    with _text_engine(options) as engine:
        has_template = engine.tokenizer.chat_template is not None
        kind = "chat template" if has_template else "no chat template: it continues your text"
        note(f"{options.model_name_or_path} ({kind}). /clear starts a new conversation, /exit or Ctrl-D ends it.")
        try:
            converse(TextConversation(engine, options.max_new_tokens), _read_lines(), write, note)
        except KeyboardInterrupt:  # the way out in the middle of an answer
            write("\n")


def serve(options: ServeOptions) -> None:
    """Serve a model over an OpenAI-compatible API until interrupted."""
    from gpt_kit_hf.generation.server import serve as serve_model

    _import_transformers(options.model_name_or_path)
    serve_model(
        options.model_name_or_path,
        llama_cpp=uses_llama_cpp(options),
        host=options.host,
        port=options.port,
        cors_allow_origins=options.cors_allow_origins,
        announce=lambda line: write(f"{line}\n"),
    )


def play(options: PlayOptions) -> None:
    """Show on a page of this machine what models believe at each token, until interrupted."""
    from gpt_kit_hf.generation.http_server import check_packages

    check_packages("the page", "play")
    from gpt_kit_hf.pages.play import play as play_models

    quiet_libraries()
    play_models(
        options.models,
        device=options.device,
        port=options.port,
        open_browser=options.open,
        announce=lambda line: write(f"{line}\n"),
    )


@contextmanager
def _text_engine(options: GenerateOptions | ChatCommandOptions, overflow: Overflow = "error") -> Iterator[TextEngine]:
    """Load a model into the engine that the options name, within the block."""
    _import_transformers(options.model_name_or_path)
    if uses_llama_cpp(options):
        from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel
        from gpt_kit_hf.generation.llama_cpp.source import gguf_file
        from gpt_kit_hf.generation.llama_cpp.text import LlamaCppText

        with gguf_file(options.model_name_or_path, options.dtype) as path:
            model = LlamaCppModel(path)
            yield LlamaCppText(model, temperature=options.temperature, top_k=options.top_k, seed=options.seed)
        return
    import torch

    from gpt_kit_hf.generation.generate import TransformersText

    model, tokenizer = _load(options.model_name_or_path, options.device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    yield TransformersText(
        model,
        tokenizer,
        temperature=options.temperature,
        top_k=options.top_k,
        dtype=options.dtype,
        overflow=overflow,
    )


def _import_transformers(place: str) -> None:
    """Import what loads a folder, and turn off its progress bars. A GGUF file is run without it."""
    if not is_gguf(Path(place)):
        import transformers  # noqa: F401

        quiet_libraries()


def _load(place: str, device: str) -> tuple[Any, Any]:
    """Return the model of a run, a folder or a Hub repository, on the device, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_pretrained, move_to_device

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
