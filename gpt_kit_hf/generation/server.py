"""An OpenAI-compatible HTTP server for one model, with the request handlers of `transformers serve`."""

# No `from __future__ import annotations` here: FastAPI reads annotations of functions that are nested in a function.

import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_serve_available

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.chat import CONTINUATION_TEMPLATE
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_pretrained

_SHUTDOWN_SECONDS = 5

_CHAT_EXAMPLE = """/chat/completions -H 'Content-Type: application/json' \
-d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}'"""
_COMPLETION_EXAMPLE = """/completions -H 'Content-Type: application/json' \
-d '{"prompt": "Once upon a time", "max_tokens": 50}'"""


def serve(place: str, *, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None]) -> None:
    """Serve a run's, a folder's or a Hub repository's model until interrupted.

    Endpoints of the OpenAI API: chat completions, completions, responses, models. `announce` receives a line with the
    address and an example request; port 0 lets the system choose the port. Requests sample at temperature 1 unless
    they or the model's generation config decide otherwise; temperature 0 is greedy. An answer ends at the latest at
    the end of the model's context. Chat requests to a model without a chat template are continued as one text
    (`chat.CONTINUATION_TEMPLATE`).

    Raises UsageError if the packages of the extra "serve" are missing, the address cannot be used, or the model cannot
    be loaded.
    """
    if not is_serve_available():
        raise UsageError("the server needs packages that are not installed: pip install 'gpt-kit-hf[serve]'")
    import uvicorn

    folder = find_model_folder(place)
    name = folder if Path(place).exists() else place  # a Hub id, not its folder in the cache
    with _listen(host, port) as listener:
        transformers_logging.set_verbosity_error()
        model, tokenizer = _load(folder, name)
        has_template = tokenizer.chat_template is not None
        app = _make_app(name, model, tokenizer)
        shown_host = f"[{host}]" if ":" in host else host
        url = f"http://{shown_host}:{listener.getsockname()[1]}/v1"
        example = _CHAT_EXAMPLE if has_template else _COMPLETION_EXAMPLE
        announce(f"{name} is served at {url} (Ctrl-C stops). Try: curl {url}{example}")
        if not has_template:
            announce(f"{name} has no chat template: it is a completion model, and chats are continued as one text.")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"port={port}: from 0, which selects a free port, to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"host={host!r} and port={port} cannot be listened to: {error.strerror}") from None


def _load(folder: str, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer, prepared for the request handlers."""
    model = load_pretrained(AutoModelForCausalLM, folder, name, dtype="auto", device_map="auto").eval()
    tokenizer = load_pretrained(AutoTokenizer, folder, name)
    check_tokenizer(name, model.config)
    # The handlers pass a request's temperature on, but leave it to the generation config whether to sample.
    if model.generation_config.do_sample is None:
        model.generation_config.do_sample = True
    _limit_to_context(model)
    return model, tokenizer


def _limit_to_context(model: PreTrainedModel) -> None:
    """Make `generate` stop at the end of the context: the handlers ask for at least 1,024 tokens by default."""
    generate, context = model.generate, context_length(model)

    def generate_within_context(*, input_ids: Tensor, generation_config: Any, **options: Any) -> Any:
        length = input_ids.shape[-1]
        if length == 0:
            raise UsageError("the prompt is empty")
        if context is not None:
            if length >= context:
                raise UsageError(f"the prompt has {length} tokens; the model's context of {context} leaves no room")
            # In the request's own config: the handler compares with it to report the finish reason "length".
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, context - length)
        return generate(input_ids=input_ids, generation_config=generation_config, **options)

    model.generate = generate_within_context


def _make_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the FastAPI application that serves the model under `name`."""
    # Optional packages: imported only where the server is used.
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import GenerationState

    class LoadedModel(ModelManager):  # type: ignore[misc]
        """The model manager of the handlers, for a single model that is already loaded."""

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            return model, tokenizer

    if tokenizer.chat_template is None:
        tokenizer.chat_template = CONTINUATION_TEMPLATE
    manager, state, app = LoadedModel(force_model=name), GenerationState(), FastAPI()
    handlers = {
        "/v1/chat/completions": ChatCompletionHandler(manager, state),
        "/v1/completions": CompletionHandler(manager, state),
        "/v1/responses": ResponseHandler(manager, state),
    }

    async def answer(request: Request, body: dict[str, Any]) -> Any:
        request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
        response = await handlers[request.url.path].handle_request(body, request_id)
        response.headers["x-request-id"] = request_id
        return response

    def list_models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "gpt-kit"}
        return {"object": "list", "data": [entry]}

    def refuse(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    started = int(time.time())
    for path in handlers:
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/health", lambda: {"status": "ok"}, methods=["GET"])
    app.add_exception_handler(ValueError, refuse)
    app.add_exception_handler(jinja2.TemplateError, refuse)
    return app
