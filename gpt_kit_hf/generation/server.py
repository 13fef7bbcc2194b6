"""An HTTP server for one model, by OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt_kit_hf.generation.http_server import check_packages, listen

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from gpt_kit_hf.generation.completion_model import CompletionModel
    from gpt_kit_hf.generation.engine import CompletionEngine
    from gpt_kit_hf.generation.openai_api.app import Defaults

# Fields of a generation config that change answers, and that no request can set here.
_NOT_APPLIED = {
    *(
        "repetition_penalty",
        "no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "min_length",
        "min_new_tokens",
    ),
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "guidance_scale", "num_beams"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "min_new_tokens"),
    *("stop_strings", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "watermarking_config"),
}

_CHAT_EXAMPLE = """/chat/completions -H 'Content-Type: application/json' \
-d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}'"""
_COMPLETION_EXAMPLE = """/completions -H 'Content-Type: application/json' \
-d '{"prompt": "Once upon a time", "max_tokens": 50}'"""


def serve(
    place: str,
    *,
    llama_cpp: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    cors_allow_origins: Sequence[str] = (),
    announce: Callable[[str], None],
) -> None:
    """Serve a run's, a folder's or a Hub repository's model, or a GGUF file, until SIGINT or SIGTERM.

    Endpoints of OpenAI's API: chat completions, completions, responses, models. `llama_cpp` lets llama.cpp compute, as
    a GGUF file needs it. `announce` receives a line with the address and an example request; port 0 lets the system
    choose the port. Requests sample at temperature 1 unless they or the model's generation config decide otherwise;
    temperature 0 is greedy. An answer ends at the latest at the end of the model's context. Answers that are on their
    way at the end have five seconds.

    Raises UsageError if the packages of the extra "serve" are missing, the address cannot be used, or the model cannot
    be loaded.
    """
    check_packages("the server", "serve")
    from gpt_kit_hf.generation.openai_api.app import OpenAIServer

    with listen(host, port) as listener, (_gguf if llama_cpp else _folder)(place) as loaded:
        name, engine, defaults, notes = loaded
        has_template = engine.tokenizer.chat_template is not None
        shown_host = f"[{host}]" if ":" in host else host
        url = f"http://{shown_host}:{listener.getsockname()[1]}/v1"
        example = _CHAT_EXAMPLE if has_template else _COMPLETION_EXAMPLE
        announce(f"{name} is served at {url} (Ctrl-C stops). Try: curl {url}{example}")
        if not has_template:
            announce(f"{name} has no chat template: it is a completion model, and chat requests are refused.")
        for note in notes:
            announce(f"{name}: {note}")
        OpenAIServer(name, engine, defaults).run(listener, cors_allow_origins)


class _Loaded(NamedTuple):
    name: str
    engine: CompletionEngine
    defaults: Defaults
    notes: list[str]


@contextmanager
def _gguf(place: str) -> Iterator[_Loaded]:
    """Load a GGUF file, or the model of a folder as one, into llama.cpp."""
    from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel
    from gpt_kit_hf.generation.llama_cpp.source import gguf_file
    from gpt_kit_hf.generation.openai_api.app import JOBS_AT_ONCE, Defaults

    with gguf_file(place) as path:
        yield _Loaded(place, LlamaCppModel(path, slots=JOBS_AT_ONCE), Defaults(), [])


@contextmanager
def _folder(place: str) -> Iterator[_Loaded]:
    """Load the model of a run, a folder or a Hub repository into torch."""
    from transformers.utils import logging as transformers_logging

    from gpt_kit_hf.generation.openai_api.app import Defaults
    from gpt_kit_hf.hub.model_folder import find_model_folder

    folder = find_model_folder(place)
    name = folder if Path(place).exists() else place  # a Hub id, not its folder in the cache
    transformers_logging.set_verbosity_error()
    model, config = load(folder, name)
    not_applied = ", ".join(sorted(config.to_diff_dict().keys() & _NOT_APPLIED))
    notes = [f"the server does not apply {not_applied} of generation_config.json."] if not_applied else []
    yield _Loaded(name, model, Defaults.of(config), notes)


def load(folder: str, name: str) -> tuple[CompletionModel, GenerationConfig]:
    """Return the model of a folder, ready to complete prompts, and its generation config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt_kit_hf.generation.completion_model import CompletionModel
    from gpt_kit_hf.hub.model_folder import check_tokenizer, load_pretrained

    model = load_pretrained(AutoModelForCausalLM, folder, name, dtype="auto", device_map="auto").eval()
    tokenizer = load_pretrained(AutoTokenizer, folder, name)
    check_tokenizer(name, model.config)
    config = model.generation_config
    return CompletionModel(model, tokenizer), config
