"""The loop over new tokens with a `Decoder`: choosing them, ending rows, and on a GPU a CUDA graph of a token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gpt_kit_hf.errors import NonFiniteError
from gpt_kit_hf.generation.fast_decoder import Decoder, pays

# On a GPU, whether all rows have ended and whether a logit is NaN is read after so many tokens: reading waits for it.
_TOKENS_BETWEEN_LOOKS = 16
# Calls of a step that are computed as they are: libraries allocate their workspaces in them, which no capture permits.
_WARM_UP = 2


def decode(
    decoder: Decoder, ids: Tensor, max_new_tokens: int, decoding: GenerationConfig, streamer: BaseStreamer | None
) -> Tensor:
    """(B, T) -> (B, T + N): the tokens of ``generate``, with the same random draws.

    On a GPU without a streamer, some tokens behind the end of all rows are computed and dropped. Raises NonFiniteError
    for logits that are NaN or infinite; no token that they choose is returned or streamed.
    """
    choice = _Choice(ids, decoding)
    if streamer is not None:
        streamer.put(ids.cpu())
    with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
        choice.choose(decoder.start(ids, ids.shape[1] + max_new_tokens))

        def step() -> None:
            choice.choose(decoder.step(choice.token))

        next_step = CapturedStep(step, ids.device) if decoder.on_gpu and pays(max_new_tokens) else step
        looks_after = _tokens_between_looks(decoder, decoding, max_new_tokens) if streamer is None else 1
        tokens: list[Tensor] = []  # (B,) each
        while True:
            tokens.append(choice.token.clone())
            is_last = len(tokens) == max_new_tokens
            looks = is_last or len(tokens) % looks_after == 0
            if looks:
                choice.check()
            if streamer is not None:
                streamer.put(tokens[-1].cpu())
            if is_last or (looks and choice.have_all_ended()):
                break
            if len(tokens) == 1 and pays(max_new_tokens):
                decoder.pack()  # after the first token, so as not to delay it
            next_step()
    if streamer is not None:
        streamer.end()
    # Outside of inference mode: the result may be used in training.
    added = torch.stack(tokens, dim=1)  # (B, N)
    return torch.cat((ids, added[:, : choice.length_of(added)]), dim=1)


def _tokens_between_looks(decoder: Decoder, decoding: GenerationConfig, max_new_tokens: int) -> int:
    if not decoder.on_gpu:
        return 1
    # Without EOS ids no row ends, so nothing is read before the last token.
    return _TOKENS_BETWEEN_LOOKS if decoding.eos_token_id else max_new_tokens


class _Choice:
    """The last token of each row, chosen from logits, and which rows have ended. It works in place."""

    def __init__(self, ids: Tensor, decoding: GenerationConfig) -> None:
        self._decoding = decoding
        self._eos = torch.tensor(decoding.eos_token_id or [], dtype=torch.long, device=ids.device)
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._unusable = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.token = torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def choose(self, logits: Tensor) -> None:
        """(B, V) -> the next `token` (B,)."""
        token, is_finite = _next_tokens(logits, self._decoding)
        self.token.copy_(token)
        self._unusable.logical_or_(is_finite.logical_not().any())
        if self._decoding.eos_token_id:
            self.token.masked_fill_(self._ended, self._decoding.pad_token_id)
            self._ended.logical_or_(self._is_end(self.token))

    def check(self) -> None:
        """Raise NonFiniteError if a token so far was chosen from unusable logits; it waits for a GPU."""
        if self._unusable:
            raise unusable_logits()

    def have_all_ended(self) -> bool:
        """Return whether each row has ended."""
        return bool(self._decoding.eos_token_id) and bool(self._ended.all())

    def length_of(self, tokens: Tensor) -> int:
        """Return the number of tokens (B, N) up to the last row's first end."""
        if not self.have_all_ended():
            return tokens.shape[1]
        return int(self._is_end(tokens).int().argmax(dim=1).max()) + 1

    def _is_end(self, tokens: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)"""
        return (tokens.unsqueeze(-1) == self._eos).any(dim=-1)


def unusable_logits() -> NonFiniteError:
    """Return the error for logits from which no token can be chosen."""
    return NonFiniteError(
        "the logits of the model are NaN or infinite, so no token can be chosen: check that its weights are finite, "
        "or take a dtype with a wider range"
    )


def _next_tokens(logits: Tensor, decoding: GenerationConfig) -> tuple[Tensor, Tensor]:
    """(B, V) -> the tokens (B,), and whether they were chosen from finite numbers (B,)."""
    # A maximum with a NaN among its values is NaN.
    if not decoding.do_sample:
        largest = logits.max(dim=-1)
        return largest.indices, largest.values.isfinite()
    scores = logits / decoding.temperature
    if decoding.top_k:
        least = scores.topk(decoding.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    probabilities = scores.softmax(dim=-1)
    # The draws of torch.multinomial for one sample, which waits for the GPU to check its input: by independent
    # exponential variables E_i, argmin(E_i / p_i) is i with probability p_i.
    largest = (probabilities / torch.empty_like(probabilities).exponential_()).max(dim=-1)
    return largest.indices, largest.values.isnan().logical_not()


class CapturedStep:
    """Call `step` again and again; from the third call on, a CUDA graph of it is replayed.

    Launching the small kernels of a token takes a CPU longer than a GPU needs to compute them; a graph launches all at
    once. `step` must work in place: it reads and writes the same tensors in each call, with the same shapes, and reads
    nothing back. All calls are made on a stream of their own, behind which the current one waits; `device` is that of
    the tensors, which need not be the current one.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._calls, self._device = step, 0, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        """Do what `step` does."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # it sets the current device, too
            if self._calls < _WARM_UP:
                self._step()
            else:
                if self._calls == _WARM_UP:
                    # Other threads may allocate meanwhile, as one that pins the batches of a training run.
                    with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                        self._step()  # captured, not computed
                self._graph.replay()
        current.wait_stream(self._stream)
        self._calls += 1
