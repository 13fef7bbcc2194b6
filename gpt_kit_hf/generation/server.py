"""transformers' own OpenAI-compatible server, for one model: a run's, a folder's or a Hub repository's."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.chat import CONTINUATION_TEMPLATE
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder

# Roads to other models: this server has one, and what was prepared in memory would not survive loading it again.
_ROADS_TO_OTHERS = ("/load_model", "/reset", "/v1/models")
_SECONDS_TO_FINISH = 5

_CHAT_TRIAL = """/chat/completions -H 'Content-Type: application/json' \
-d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}'"""
_COMPLETION_TRIAL = """/completions -H 'Content-Type: application/json' \
-d '{"prompt": "Once upon a time", "max_tokens": 50}'"""


class _Server(Serve):  # type: ignore[misc]
    """transformers' server, which would run from its constructor on; here it waits until the model is prepared."""

    def start_server(self) -> None:
        """Do nothing."""


def serve(place: str, *, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None]) -> None:
    """Serve a model until interrupted, as OpenAI's API: chat completions, completions, responses, models.

    `announce` gets a line with the address, which port 0 leaves to the system, and a command to try. What follows
    concerns this process only, nothing is written:

    - requests sample at temperature 1 unless they say otherwise, as with OpenAI's; temperature 0 is greedy. A model
      whose generation config decides that by itself keeps its way;
    - an answer ends at the latest where the model's context does;
    - a model without a chat template is a completion model. Chat requests to it are continued as one text
      (`chat.CONTINUATION_TEMPLATE`).

    Raises UsageError if the packages of the extra "serve" are missing, for an address that cannot be listened to, and
    for a model that cannot be loaded.
    """
    if not is_serve_available():
        raise UsageError("the server needs packages that are not installed: pip install 'gpt-kit-hf[serve]'")
    folder = find_model_folder(place)
    if not Path(place).exists():
        folder = place  # requests name the model as its users do, not by its place in the cache
    if "@" in folder and Path(folder).is_dir():
        raise UsageError(f"{place!r}: the server takes what follows '@' for a revision; serve the folder by a link")
    with _listen(host, port) as listener:
        server = _load(folder)
        # Its own lines of the start say less than the one below.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        shown_host = f"[{host}]" if ":" in host else host
        url = f"http://{shown_host}:{listener.getsockname()[1]}/v1"
        talks = _prepare(server, folder)
        announce(
            f"{folder} is served at {url} (Ctrl-C stops). Try: curl {url}{_CHAT_TRIAL if talks else _COMPLETION_TRIAL}"
        )
        if not talks:
            announce(f"{folder} has no chat template: it is a completion model, and chats are continued as one text.")
        with suppress(KeyboardInterrupt):
            server.server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"port={port}: from 0, which takes a free one, to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"host={host!r} and port={port} cannot be listened to: {error.strerror}") from None


def _load(folder: str) -> _Server:
    try:
        return _Server(force_model=folder, non_blocking=True, log_level="error")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def _prepare(server: _Server, folder: str) -> bool:
    """Fit the server to its one model; return whether the model has a chat template of its own."""
    manager = server._model_manager
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(folder))
    check_tokenizer(folder, model.config)
    _keep_within_context(model)
    # Without it the server takes a request's temperature and decodes greedily all the same.
    if model.generation_config.do_sample is None:
        model.generation_config.do_sample = True
    talks = tokenizer.chat_template is not None
    if not talks:
        tokenizer.chat_template = CONTINUATION_TEMPLATE
    _pin(server.server.config.app, folder)
    server.server.config.timeout_graceful_shutdown = _SECONDS_TO_FINISH
    return talks


def _keep_within_context(model: PreTrainedModel) -> None:
    """Have `generate` end where the context does: the server asks for 1,024 tokens where a request names no number."""
    generate, context = model.generate, context_length(model)

    def generate_within_context(*, input_ids: Tensor, generation_config: Any, **others: Any) -> Any:
        length = input_ids.shape[-1]
        if length == 0:
            raise UsageError("the prompt is empty")
        if context is not None:
            if length >= context:
                raise UsageError(f"the prompt has {length} tokens; the model's context of {context} leaves no room")
            # In the request's own config, by which the server tells an answer that was cut from one that ended.
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, context - length)
        return generate(input_ids=input_ids, generation_config=generation_config, **others)

    model.generate = generate_within_context


def _pin(app: Any, name: str) -> None:
    """Keep the app to its one model, and have it say what is wrong with a request."""
    from fastapi.responses import JSONResponse

    models = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gpt-kit"}

    def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [models]})

    def refuse(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _ROADS_TO_OTHERS
    ]
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_exception_handler(ValueError, refuse)
    app.add_exception_handler(jinja2.TemplateError, refuse)
