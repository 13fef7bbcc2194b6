"""llama.cpp's server in this process, which only this process can ask.

xllamacpp has no other way to llama.cpp. Requests go over the loopback address, with a key: the calls within the
process tell no token ids.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import secrets
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from gpt_kit_hf.errors import GPTKitError, UsageError, one_line

_DATA = b"data: "


class LlamaServer:
    """A GGUF file that llama.cpp has loaded, with `slots` requests at once of up to `context` tokens each.

    Everything is as exact as llama.cpp can: a cache in float32, no fused attention, and no text of an earlier request
    is reused unless a request asks for it. It writes nothing to the terminal. `threads` is the number of its threads,
    None for one a core. Raises UsageError if xllamacpp is not installed or refuses the file.
    """

    def __init__(self, path: Path, *, context: int, slots: int = 1, threads: int | None = None) -> None:
        check_installed()
        import xllamacpp

        self._key = secrets.token_hex()
        params = _parameters(xllamacpp, context * slots, slots, _cores() if threads is None else threads)
        params.model.path, params.api_keys = str(path), [self._key]
        try:
            with _own_signal_handlers():
                self._server = xllamacpp.Server(params)
        except RuntimeError:  # it does not say why
            raise UsageError(
                f"llama.cpp cannot load {str(path)!r}: its architecture or tokenizer is unknown to "
                f"xllamacpp {xllamacpp.__version__}, a tensor is missing, or the memory is too small"
            ) from None
        self._address = self._server.listening_address.removeprefix("http://")
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._slots.put(slot)

    @contextmanager
    def slot(self) -> Iterator[int]:
        """Wait for a free slot, whose cache nobody else uses within the block."""
        slot = self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises GPTKitError for a request that llama.cpp refuses."""
        with self._request(path, body) as response:
            return dict(json.loads(response.read()))

    def events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the events of a streamed answer; the request ends with the iterator. Raises GPTKitError."""
        with self._request(path, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(_DATA):
                    event = json.loads(line.removeprefix(_DATA))
                    if "error" in event:
                        raise _refused(event)
                    yield event

    @contextmanager
    def _request(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {self._key}"})
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    raise _refused(json.loads(response.read()))
                yield response
        finally:
            connection.close()


def check_installed() -> None:
    """Raise UsageError if xllamacpp is not installed."""
    if find_spec("xllamacpp") is None:
        raise UsageError('llama.cpp needs a package that is not installed: pip install "gpt-kit-hf[llama]"')


def _parameters(xllamacpp: Any, context: int, slots: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.n_ctx, params.n_parallel = context, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = slots + 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers, params.fit_params = 0, False
    params.cache_ram_mib, params.cache_idle_slots, params.ctx_shift = 0, False, False
    params.verbosity, params.warmup, params.ui = -1, False, False
    return params


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back what happens at SIGINT and SIGTERM, which the server of llama.cpp takes for itself."""
    yield
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))


def _cores() -> int:
    """Return the number of cores that this process may use, as torch counts its threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, allowed or 1)


def _refused(answer: dict[str, Any]) -> GPTKitError:
    return GPTKitError(f"llama.cpp refused a request: {one_line(answer.get('error', answer))}")
