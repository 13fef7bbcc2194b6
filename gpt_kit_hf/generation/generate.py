"""Text generation with any causal LM of transformers, as token ids or as a stream of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, get_args

import tiktoken
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.decode_loop import decode
from gpt_kit_hf.generation.fast_decoder import Decoder, why_not
from gpt_kit_hf.model.losses import evaluation_mode
from gpt_kit_hf.options.generation import DecodingDtype, Overflow
from gpt_kit_hf.tokenization.encodings import text_to_token_ids

AnyTokenizer: TypeAlias = tiktoken.Encoding | PreTrainedTokenizerBase

# Prompt tokens that are decoded together with the first new token: some tokenizers decode a token differently at the
# start of a text (SentencePiece drops its space).
CONTEXT_TOKENS = 8


def generate_text_autoregressive(
    model: PreTrainedModel,
    token_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    overflow: Overflow = "error",
    dtype: DecodingDtype = "auto",
) -> Tensor:
    """Return the prompt and its continuation, predicted one token at a time.

    Only the arguments decide how: of the model's generation config, only the EOS ids are used. So temperature 0 is
    plain argmax, and temperature 1 with ``top_k=None`` samples from the model's distribution.

    Args:
        model: a causal language model with ``generate``; it runs in eval mode, and its modes are restored.
        token_ids: (B, T) or (T,) int64 prompt; all rows have the same length, without padding.
        max_new_tokens: the most tokens to add, 0 or more.
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / temperature).
        top_k: sample among the k most likely tokens only; None, or more than there are, for all.
        eos_token_id: the token that ends a row; None for the EOS ids of the model's generation config, if any.
        overflow: what to do if T + max_new_tokens exceeds the model's ``max_position_embeddings``: "error", or
            "slide" to predict each further token from the last ``max_position_embeddings`` tokens, without a cache,
            which is slower.
        dtype: the dtype of the matrices in decoding: "auto" for the model's own, or, for a model of this package on a
            CPU, "float16" or "int8"; see ``Decoder``.

    Returns:
        (B, T + N) int64 on the model's device. N is ``max_new_tokens``, or less if every row has ended; a row that
        ended earlier is filled with the EOS id.

    Raises:
        UsageError: the prompt is empty or holds an id outside of the vocabulary, an argument is out of its range, or
            the text would exceed the model's positions.

    """
    prompt = _checked_prompt(model, token_ids)
    decoding = _decoding(model, temperature, top_k, eos_token_id)
    return _extend(model, prompt, max_new_tokens, decoding, overflow, dtype, streamer=None)


def stream_text(
    model: PreTrainedModel,
    tokenizer: AnyTokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    overflow: Overflow = "error",
    dtype: DecodingDtype = "auto",
    on_text: Callable[[str], None],
) -> str:
    """Call ``on_text`` with each chunk of the continuation as soon as it can be decoded; return the whole text.

    The chunks joined are the returned text. A chunk never ends inside of a character: incomplete bytes are held back
    until they can be decoded, or until the end, where U+FFFD replaces them. The prompt and the EOS token are not part
    of the text. "<|endoftext|>" in the prompt is the EOS token, and no special token is added, as in
    ``text_to_token_ids``. The other arguments and the errors are those of ``generate_text_autoregressive``.
    """
    ids = text_to_token_ids(prompt, tokenizer)[0]
    prompt_ids = _checked_prompt(model, ids)
    decoding = _decoding(model, temperature, top_k, eos_token_id)
    streamer = TextStreamer(
        decode_function(tokenizer), ids[-CONTEXT_TOKENS:].tolist(), decoding.eos_token_id or [], on_text
    )
    _extend(model, prompt_ids, max_new_tokens, decoding, overflow, dtype, streamer=streamer)
    return streamer.finish()


class TransformersText:
    """A `TextEngine` of a model of transformers: ``stream_text`` with these arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float,
        top_k: int | None,
        dtype: DecodingDtype = "auto",
        overflow: Overflow = "error",
    ) -> None:
        self.model, self.tokenizer, self.context_length = model, tokenizer, context_length(model)
        self._temperature, self._top_k, self._dtype, self._overflow = temperature, top_k, dtype, overflow

    @property
    def start(self) -> str:
        """What an empty prompt stands for: a line break if the generation defaults have no BOS token."""
        begins = self.model.generation_config.bos_token_id is not None
        return (self.tokenizer.bos_token if begins else None) or "\n"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        ids: list[int] = text_to_token_ids(text, self.tokenizer)[0].tolist()
        return ids

    def stream(self, prompt: str, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
        """Continue a text, as `TextEngine` says."""
        return stream_text(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=self._temperature,
            top_k=self._top_k,
            overflow=self._overflow,
            dtype=self._dtype,
            on_text=on_text,
        )


class TextStreamer(BaseStreamer):  # type: ignore[misc]
    """Convert token ids to chunks of text that end between characters."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: list[int],
        eos_token_ids: list[int],
        on_text: Callable[[str], None],
    ) -> None:
        self._decode = decode
        self._eos_token_ids = eos_token_ids
        self._on_text = on_text
        # The tokens of the previous chunk, as context, then the tokens that are held back.
        self._ids = list(context)
        self._n_shown = len(context)
        self._shown = decode(context)
        self._chunks: list[str] = []

    def put(self, value: Tensor) -> None:
        """Add the prompt, which is ignored, or the next token."""
        # First comes the prompt as (1, T), then each new token as (1,).
        if value.ndim > 1 or (token_id := int(value)) in self._eos_token_ids:
            return
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):  # may stand for bytes that the next token completes
            self._emit(text)

    def end(self) -> None:
        """Do nothing: `generate` may be called for each token, so its end is not the end of the text."""

    def finish(self) -> str:
        """Emit what was held back; return the whole text."""
        self._emit(self._decode(self._ids))
        return "".join(self._chunks)

    def _emit(self, text: str) -> None:
        # Some tokenizers decode a run of byte tokens as a whole, so a bad byte changes the text before it.
        is_prefix = text.startswith(self._shown)
        chunk = text[len(self._shown) :] if is_prefix else self._decode(self._ids[self._n_shown :])
        if not chunk:
            return
        self._chunks.append(chunk)
        self._on_text(chunk)
        self._ids = self._ids[self._n_shown :]
        self._n_shown = len(self._ids)
        self._shown = self._decode(self._ids)


def decode_function(tokenizer: AnyTokenizer) -> Callable[[list[int]], str]:
    """Return the function from ids to text; bytes that are not UTF-8 become U+FFFD."""
    if not isinstance(tokenizer, tiktoken.Encoding):
        # Without clean-up, which would remove spaces from text that was already emitted.
        return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def decode(ids: list[int]) -> str:
        try:
            return tokenizer.decode(ids)
        except KeyError as error:
            raise UsageError(
                f"tokenizer {tokenizer.name!r} has no token {ids[-1]}, which the model generated; "
                "the model was made for another vocabulary"
            ) from error

    return decode


def _extend(
    model: PreTrainedModel,
    prompt: Tensor,
    max_new_tokens: int,
    decoding: GenerationConfig,
    overflow: Overflow,
    dtype: DecodingDtype,
    streamer: BaseStreamer | None,
) -> Tensor:
    """(B, T) -> (B, T + N): with a ``Decoder`` if it supports the model, else with transformers' ``generate``."""
    if overflow not in get_args(Overflow):
        raise UsageError(unknown_name("overflow", str(overflow), get_args(Overflow)))
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UsageError(f"max_new_tokens={max_new_tokens!r}: an integer, 0 or more")
    if max_new_tokens == 0:
        return prompt.clone()
    context, length = context_length(model), prompt.shape[1] + max_new_tokens
    fits = context is None or length <= context
    if not fits and overflow == "error":
        raise UsageError(
            f"prompt of {prompt.shape[1]} tokens + max_new_tokens={max_new_tokens} is {length}, more than the "
            f'model\'s max_position_embeddings={context}; ask for fewer, or pass overflow="slide"'
        )
    if fits and (dtype != "auto" or why_not(model) is None):
        return decode(Decoder(model, dtype), prompt, max_new_tokens, decoding, streamer)
    if dtype != "auto":
        raise UsageError(f"dtype={dtype}: not with a text that exceeds the model's positions; use auto")
    with _generation_config(model, decoding), evaluation_mode(model):
        if context is None or fits:
            return _generate(model, prompt, max_new_tokens, streamer)
        return _slide(model, prompt, max_new_tokens, context, decoding, streamer)


def _generate(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, streamer: BaseStreamer | None, use_cache: bool = True
) -> Tensor:
    extended: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        streamer=streamer,
    )
    return extended


def _slide(
    model: PreTrainedModel,
    ids: Tensor,
    max_new_tokens: int,
    context: int,
    decoding: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Tensor:
    """(B, T) -> (B, T + N), each token predicted from the last ``context`` tokens before it."""
    length, n_prompt = ids.shape[1] + max_new_tokens, ids.shape[1]
    eos = torch.tensor(decoding.eos_token_id or [], dtype=torch.long, device=ids.device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    if n_prompt <= context:  # the window does not move yet, so a cache can be used
        ids = _generate(model, ids, context + 1 - n_prompt, streamer)
        ended = torch.isin(ids[:, n_prompt:], eos).any(dim=1)
    while ids.shape[1] < length and not ended.all():
        # When the window moves, every token changes its position, and a cache would be outdated.
        token = _generate(model, ids[:, -context:], 1, None, use_cache=False)[:, -1]  # (B,)
        if ended.any():
            token = token.masked_fill(ended, decoding.pad_token_id)
        ids = torch.cat((ids, token[:, None]), dim=1)
        ended |= torch.isin(token, eos)
        if streamer is not None:
            streamer.put(token.cpu())
    return ids


def _decoding(
    model: PreTrainedModel, temperature: float, top_k: int | None, eos_token_id: int | None
) -> GenerationConfig:
    """Return the generation config of exactly these arguments; its ``eos_token_id`` is a list or None."""
    vocab_size = vocabulary_size(model)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature={temperature}: finite and 0 or more; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k}: 1 or more, or None for all tokens")
    if top_k is not None and top_k >= vocab_size:
        top_k = None  # all tokens, as in transformers
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise UsageError(f"eos_token_id={eos_token_id}: from 0 to below vocab_size={vocab_size}, or None")
    eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else eos or None
    # transformers' default of top_k is 50; 0 means no limit.
    sampling = {"do_sample": True, "temperature": float(temperature), "top_k": top_k or 0} if temperature else {}
    return GenerationConfig(eos_token_id=eos_ids, pad_token_id=eos_ids and eos_ids[0], **sampling)


@contextmanager
def _generation_config(model: PreTrainedModel, decoding: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the model, and of a model inside of a wrapper, for a while.

    ``generate`` fills what a given config leaves open from the model's own: a repetition penalty there, for example,
    would be applied although no argument asks for it.
    """
    configs = [(m, m.generation_config) for m in model.modules() if isinstance(m, GenerationMixin)]
    try:
        for owner, _ in configs:
            owner.generation_config = decoding
        yield
    finally:
        for owner, config in configs:
            owner.generation_config = config


def _checked_prompt(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """(T,) or (B, T) -> (B, T) int64 on the model's device."""
    if not hasattr(model, "generate"):
        raise UsageError(
            f"model is {type(model).__name__}, which has no generate(); pass a causal LM of transformers, "
            "out of its wrapper (model.module)"
        )
    if not isinstance(token_ids, Tensor):
        raise UsageError(f"token_ids is {type(token_ids).__name__}; it must be a tensor (B, T) or (T,)")
    if token_ids.numel() == 0:
        raise UsageError(f"token_ids is empty, shape {tuple(token_ids.shape)}; the prompt needs a token")
    if token_ids.ndim not in (1, 2) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise UsageError(
            f"token_ids is {token_ids.dtype} {tuple(token_ids.shape)}; it must be integers (B, T) or (T,)"
        )
    vocab_size = vocabulary_size(model)
    for extreme in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= extreme < vocab_size:
            raise UsageError(f"token_ids holds {extreme}; ids are from 0 to below vocab_size={vocab_size}")
    ids = token_ids if token_ids.ndim == 2 else token_ids[None]
    return ids.to(model.device, torch.long)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of logits of the model, which may be more than its tokenizer has tokens."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def check_ids(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Raise UsageError if a text has an id outside of the model's vocabulary."""
    size = vocabulary_size(model)
    if (wrong := next((i for i in ids if not 0 <= i < size), None)) is not None:
        raise UsageError(f"the text holds id {wrong}; ids are from 0 to below vocab_size={size}")


def context_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions of the model, or None if it has no limit."""
    config = model.config.get_text_config(decoder=True)
    return int(config.max_position_embeddings) if hasattr(config, "max_position_embeddings") else None
