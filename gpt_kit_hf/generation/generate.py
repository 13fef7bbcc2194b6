"""The kit's generation: a thin front over transformers' ``generate``, and a stream of decoded text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, get_args

import tiktoken
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.fast_decoder import Decoder, pays, why_not
from gpt_kit_hf.options.generation import DecodingDtype, Overflow

AnyTokenizer: TypeAlias = tiktoken.Encoding | PreTrainedTokenizerBase
# Tokens of the prompt that are decoded with the continuation's first: some tokenizers write a token
# differently at the start of a text (SentencePiece drops its space).
_CONTEXT_TOKENS = 8


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
    """Return the prompt and its continuation, predicted a token at a time by any causal LM of transformers.

    Only the arguments decide: of the model's generation config nothing but the end-of-text id is used, so
    that temperature 0 is the plain argmax, and temperature 1 with ``top_k=None`` samples the model's
    distribution.

    Args:
        model: a causal language model with ``generate``; its train and eval modes are left as they were.
        token_ids: (B, T) or (T,) int64 prompt, all rows of one length, without padding.
        max_new_tokens: the most tokens to add, 0 or more.
        temperature: 0 takes the most likely token; above 0, softmax(logits / temperature) is sampled.
        top_k: sample among the k most likely tokens only; None samples among all.
        eos_token_id: the token that ends a row; None takes the model's generation config's, if there is one.
        overflow: what to do where T + max_new_tokens exceeds the model's ``max_position_embeddings``:
            "error", or "slide": each further token is predicted from the last ``max_position_embeddings``
            tokens, without a cache, which is slower.
        dtype: the precision in which the matrices are read for each token: "auto" as they are, or, for a model
            of this package on a CPU, "float16" or "int8"; see ``Decoder``.

    Returns:
        (B, T + N) int64 on the model's device, N at most ``max_new_tokens``: fewer where every row has
        ended. A row that ended earlier is filled with the end-of-text id.

    Raises:
        UsageError: the prompt is empty or holds an id outside the vocabulary, an argument is out of its
            range, or the text would overflow the model's positions.

    """
    prompt = _checked_prompt(model, token_ids)
    decoding = _decoding(model, temperature, top_k, eos_token_id)
    return _extended(model, prompt, max_new_tokens, decoding, overflow, dtype, streamer=None)


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
    """Call ``on_text`` with each piece of the continuation as soon as it decodes, and return all of it.

    The pieces joined are the returned text. A piece never ends inside a character: bytes that do not decode
    yet are held back until they do, or until the end, where what remains is replaced by U+FFFD. The prompt
    and the end-of-text token are not part of the text. In the prompt a literal "<|endoftext|>" is the end of
    text, and no special token is added to it, as in ``text_to_token_ids``.

    The other arguments and the errors are those of ``generate_text_autoregressive``.
    """
    if isinstance(tokenizer, tiktoken.Encoding):
        special = tokenizer.special_tokens_set & {"<|endoftext|>"}
        ids = tokenizer.encode(prompt, allowed_special=special, disallowed_special=())
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    prompt_ids = _checked_prompt(model, torch.tensor(ids, dtype=torch.long))
    decoding = _decoding(model, temperature, top_k, eos_token_id)
    pieces = _TextPieces(_decoder(tokenizer), ids[-_CONTEXT_TOKENS:], decoding.eos_token_id or [], on_text)
    _extended(model, prompt_ids, max_new_tokens, decoding, overflow, dtype, streamer=pieces)
    return pieces.finish()


class _TextPieces(BaseStreamer):  # type: ignore[misc]
    """Turns the token ids that ``generate`` hands over into pieces of text that end between characters."""

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
        # A window over the tokens: those of the piece before, as context, then those that wait.
        self._ids = list(context)
        self._n_shown = len(context)
        self._shown = decode(context)
        self._pieces: list[str] = []

    def put(self, value: Tensor) -> None:
        if value.ndim > 1:  # generate hands over the prompt first, as (1, T), then each token as (1,)
            return
        token_id = int(value)
        if token_id in self._eos_token_ids:
            return
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):  # it may stand for bytes that the next token completes
            self._emit(text)

    def end(self) -> None:
        # Not the end of the text where the window slides: there, generate is called for each token.
        pass

    def finish(self) -> str:
        """Emit what was held back, and return the whole text."""
        self._emit(self._decode(self._ids))
        return "".join(self._pieces)

    def _emit(self, text: str) -> None:
        # Some tokenizers decode a run of byte tokens as a whole: a bad byte undoes the good ones before it.
        intact = text.startswith(self._shown)
        piece = text[len(self._shown) :] if intact else self._decode(self._ids[self._n_shown :])
        if not piece:
            return
        self._pieces.append(piece)
        self._on_text(piece)
        self._ids = self._ids[self._n_shown :]
        self._n_shown = len(self._ids)
        self._shown = self._decode(self._ids)


def _decoder(tokenizer: AnyTokenizer) -> Callable[[list[int]], str]:
    """Return the function that turns ids into text, bytes that are no UTF-8 into U+FFFD."""
    if not isinstance(tokenizer, tiktoken.Encoding):
        # The clean-up takes spaces away from text that was already shown.
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


def _extended(
    model: PreTrainedModel,
    prompt: Tensor,
    max_new_tokens: int,
    decoding: GenerationConfig,
    overflow: Overflow,
    dtype: DecodingDtype,
    streamer: BaseStreamer | None,
) -> Tensor:
    """(B, T) -> (B, T + N): by a ``Decoder`` or one call of ``generate`` where the text fits the model's positions."""
    if overflow not in get_args(Overflow):
        raise UsageError(unknown_name("overflow", str(overflow), get_args(Overflow)))
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UsageError(f"max_new_tokens={max_new_tokens!r}: an integer, 0 or more")
    if max_new_tokens == 0:
        return prompt.clone()
    context = context_length(model)
    length = prompt.shape[1] + max_new_tokens
    fits = context is None or length <= context
    if not fits and overflow == "error":
        raise UsageError(
            f"prompt of {prompt.shape[1]} tokens + max_new_tokens={max_new_tokens} is {length}, more than the "
            f'model\'s max_position_embeddings={context}; ask for fewer, or pass overflow="slide"'
        )
    if fits and (dtype != "auto" or why_not(model) is None):
        return _decode(Decoder(model, dtype), prompt, max_new_tokens, decoding, streamer)
    if dtype != "auto":
        raise UsageError(f"dtype={dtype}: not where the text slides through the model's positions; use auto")
    with _decoding_by(model, decoding):
        if context is None or fits:
            return _generate(model, prompt, max_new_tokens, streamer)
        return _slide(model, prompt, max_new_tokens, context, decoding, streamer)


def _decode(
    decoder: Decoder, ids: Tensor, max_new_tokens: int, decoding: GenerationConfig, streamer: BaseStreamer | None
) -> Tensor:
    """(B, T) -> (B, T + N), as ``generate`` gives it, by the same draws."""
    eos = torch.tensor(decoding.eos_token_id or [], dtype=torch.long, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
        logits = decoder.start(ids, ids.shape[1] + max_new_tokens)
        tokens: list[Tensor] = []  # (B,) each
        while True:
            token = _next_tokens(logits, decoding)
            if decoding.eos_token_id:
                token = token.masked_fill(ended, decoding.pad_token_id)
                ended |= torch.isin(token, eos)
            tokens.append(token)
            if streamer is not None:
                streamer.put(token.cpu())
            # A GPU is waited for only where a row can end.
            if len(tokens) == max_new_tokens or (decoding.eos_token_id and ended.all()):
                break
            if len(tokens) == 1 and pays(max_new_tokens):
                decoder.pack()  # behind the first token, which need not wait for it
            logits = decoder.step(token)
    if streamer is not None:
        streamer.end()
    # Outside inference mode: what is returned may be trained on.
    return torch.cat((ids, torch.stack(tokens, dim=1)), dim=1)


def _next_tokens(logits: Tensor, decoding: GenerationConfig) -> Tensor:
    """(B, V) -> (B,)"""
    if not decoding.do_sample:
        return logits.argmax(dim=-1)
    scores = logits / decoding.temperature
    if decoding.top_k:
        least = scores.topk(decoding.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]


def _generate(
    model: PreTrainedModel,
    ids: Tensor,
    max_new_tokens: int,
    streamer: BaseStreamer | None,
    use_cache: bool = True,
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
    length = ids.shape[1] + max_new_tokens
    eos = torch.tensor(decoding.eos_token_id or [], dtype=torch.long, device=ids.device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    n_prompt = ids.shape[1]
    if n_prompt <= context:  # the window does not move yet, so the cache serves
        ids = _generate(model, ids, context + 1 - n_prompt, streamer)
        ended = torch.isin(ids[:, n_prompt:], eos).any(dim=1)
    while ids.shape[1] < length and not ended.all():
        # Once the window moves, every position's embedding changes, and with it all that a cache would hold.
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
    """Return the generation config of exactly these choices; its ``eos_token_id`` is a list, or None."""
    vocab_size = _vocab_size(model)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature={temperature}: finite and 0 or more; 0 takes the most likely token")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise UsageError(f"top_k={top_k}: from 1 to vocab_size={vocab_size}, or None for all tokens")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise UsageError(f"eos_token_id={eos_token_id}: from 0 to below vocab_size={vocab_size}, or None")
    eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else eos or None
    # transformers' own default for top_k is 50; its 0 means no limit.
    sampling = {"do_sample": True, "temperature": float(temperature), "top_k": top_k or 0} if temperature else {}
    return GenerationConfig(eos_token_id=eos_ids, pad_token_id=eos_ids and eos_ids[0], **sampling)


@contextmanager
def _decoding_by(model: PreTrainedModel, decoding: GenerationConfig) -> Iterator[None]:
    """Put the model in eval mode and its own generation config aside; give both back, also at an error.

    ``generate`` fills whatever an explicit config leaves open from the model's own: a repetition penalty or a
    list of suppressed tokens there would change what the arguments say. The models inside a wrapper are
    reached through ``modules``.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = [(m, m.generation_config) for m in model.modules() if isinstance(m, GenerationMixin)]
    try:
        model.eval()
        for owner, _ in configs:
            owner.generation_config = decoding
        yield
    finally:
        for module, training in modes:
            module.training = training  # not train(): it would set the modules below as well
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
    vocab_size = _vocab_size(model)
    for extreme in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= extreme < vocab_size:
            raise UsageError(f"token_ids holds {extreme}; ids are from 0 to below vocab_size={vocab_size}")
    ids = token_ids if token_ids.ndim == 2 else token_ids[None]
    return ids.to(model.device, torch.long)


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model has, or None for a model without such a bound."""
    config = model.config.get_text_config(decoder=True)
    return int(config.max_position_embeddings) if hasattr(config, "max_position_embeddings") else None
