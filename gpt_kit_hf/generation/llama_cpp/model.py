"""A GGUF file as an engine of completions, computed by llama.cpp."""

from __future__ import annotations

import codecs
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gpt_kit_hf.generation.completion import LOWEST_TEMPERATURE, Choice, Chunk, FinishReason, Sampling, ScoredToken
from gpt_kit_hf.generation.llama_cpp.server import LlamaServer
from gpt_kit_hf.generation.llama_cpp.vocabulary import GGUFTokenizer
from gpt_kit_hf.storage.gguf_header import read_gguf_header

# Longer contexts are cut to this: the cache for one is allocated as a whole when the file is loaded.
MAX_CONTEXT = 32_768
# Far above any logit: the token with this bias is taken. What llama.cpp reports are probabilities without biases.
_FORCED = 1e6
_COMPLETION = "/completion"
_GREEDY: dict[str, Any] = {"temperature": 0, "samplers": ["temperature"]}


class LlamaCppModel:
    """A `CompletionEngine` of a GGUF file.

    `slots` is the number of choices that are generated at once, each with a cache of its own. Special tokens that are
    generated are no part of the text. Raises UsageError for a file that cannot be run.
    """

    def __init__(self, path: Path, *, slots: int = 1, threads: int | None = None) -> None:
        header = read_gguf_header(path)
        self.context_length = min(header.context_length, MAX_CONTEXT)
        self._server = LlamaServer(path, context=self.context_length, slots=slots, threads=threads)
        self.tokenizer = GGUFTokenizer(header.metadata, self._encode)
        self.vocabulary_size = len(self.tokenizer)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids)

    def complete(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        on_chunk: Callable[[Chunk], None],
        *,
        first_index: int = 0,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate choices of a prompt, one after the other, as `CompletionEngine` says.

        A sample depends on the seed and on `sampling`, and is not that of another engine.
        """
        # A stream tells no token ids and cannot change its biases. A seed gives the same sample with and without both.
        in_steps = sampling.top_logprobs is not None or sampling.seed is not None
        in_steps = in_steps or bool(sampling.frequency_penalty or sampling.presence_penalty)
        for index in range(first_index, first_index + n):
            choice = Choice(index, sampling, on_chunk)
            if sampling.max_new_tokens == 0:
                choice.add("", (), 0, "length")
                continue
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed + index
            if in_steps:
                self._complete_in_steps(prompt, sampling, seed, choice, is_cancelled)
            else:
                self.stream(prompt, sampling, seed, choice, is_cancelled)
            if is_cancelled():
                return

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int,
        choice: Choice,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate a choice in one request, the fastest way: without penalties and log-probabilities."""
        n_seen = 0
        with self._server.slot() as slot:
            body = {**_drawing(sampling, random.Random(seed)), "prompt": list(prompt), "cache_prompt": False}
            body |= {"n_predict": sampling.max_new_tokens, "logit_bias": list(sampling.logit_bias.items())}
            body["id_slot"] = slot
            with closing(self._server.events(_COMPLETION, body)) as events:
                for event in events:
                    if is_cancelled():
                        return
                    n_new, n_seen = event["tokens_predicted"] - n_seen, event["tokens_predicted"]
                    end = _end(event) if event["stop"] else None
                    # Tokens that come with the end are bytes that make no character.
                    text = event["content"] + ("\ufffd" if end is not None and n_new else "")
                    choice.add(text, (), n_new, end)
                    if choice.finished:
                        return

    def greedy(self, prompt: Sequence[int], max_new_tokens: int, *, left_out: Sequence[int] = ()) -> list[int]:
        """Return the most likely tokens after a prompt, those `left_out` never, up to EOS, which is one of them."""
        with self._server.slot() as slot:
            body = {**_GREEDY, "prompt": list(prompt), "n_predict": max_new_tokens, "id_slot": slot}
            body["logit_bias"] = [[token, False] for token in left_out]
            found = self._server.ask(_COMPLETION, {**body, "cache_prompt": False, "return_tokens": True})
        return [int(token) for token in found["tokens"]]

    def distributions(self, ids: Sequence[int], positions: Iterable[int]) -> list[list[float]]:
        """Return the log-probabilities, by token, of what follows the first `position` tokens, for each position."""
        with self._server.slot() as slot:
            found = [self._all_tokens(ids[:each], slot) for each in positions]
        return [[logprob for _, logprob in sorted(each)] for each in found]

    def score(self, prompt: Sequence[int], top: int) -> list[ScoredToken]:
        """Return the log-probabilities of the prompt's own tokens, as `CompletionEngine` says."""
        text = _Text(self.tokenizer)
        scored = [text.scored(prompt[0], None, [])]
        with self._server.slot() as slot:
            for position in range(1, len(prompt)):
                forced = prompt[position]
                found = self._step(prompt[:position], [(forced, _FORCED)], _GREEDY, max(top, 1), slot, position > 1)
                scored.append(text.scored(forced, *self._logprobs(found, prompt[:position], forced, top, slot)))
        return scored

    def _complete_in_steps(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, choice: Choice, is_cancelled: Callable[[], bool]
    ) -> None:
        """Generate a choice by one request a token."""
        ids, text, draws, counts = list(prompt), _Text(self.tokenizer), random.Random(seed), Counter[int]()
        top = sampling.top_logprobs
        n_probabilities = 0 if top is None else max(top, 1)
        with self._server.slot() as slot:
            for number in range(1, sampling.max_new_tokens + 1):
                if is_cancelled():
                    return
                drawing = _drawing(sampling, draws)
                found = self._step(ids, _biases(sampling, counts), drawing, n_probabilities, slot, number > 1)
                token, is_eos = int(found["tokens"][0]), found["stop_type"] == "eos"
                scored = []
                if top is not None and not is_eos:
                    scored.append(text.scored(token, *self._logprobs(found, ids, token, top, slot)))
                ids.append(token)
                counts[token] += 1
                end: FinishReason | None = "length" if number == sampling.max_new_tokens else None
                end = "stop" if is_eos else end
                choice.add(text.add(b"" if is_eos else self.tokenizer.text_bytes(token), end), scored, 1, end)
                if choice.finished:
                    return

    def _step(
        self,
        ids: Sequence[int],
        biases: list[tuple[int, float]],
        drawing: dict[str, Any],
        n_probabilities: int,
        slot: int,
        goes_on: bool,
    ) -> dict[str, Any]:
        """Return the answer with the next token; `goes_on` if the slot has read all but the last of the ids."""
        body = {**drawing, "prompt": list(ids), "n_predict": 1, "logit_bias": biases, "n_probs": n_probabilities}
        body |= {"id_slot": slot, "cache_prompt": goes_on, "return_tokens": True}
        return self._server.ask(_COMPLETION, body)

    def _logprobs(
        self, found: dict[str, Any], ids: Sequence[int], token: int, top: int, slot: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """Return the log-probability of the token that was found after the ids, and the most likely ones."""
        if probabilities := found.get("completion_probabilities"):
            most_likely = [(each["id"], each["logprob"]) for each in probabilities[0]["top_logprobs"]]
            return probabilities[0]["logprob"], most_likely[:top]
        # llama.cpp reports none for a token that ends inside of a character.
        all_tokens = self._all_tokens(ids, slot)
        return dict(all_tokens)[token], all_tokens[:top]

    def _all_tokens(self, ids: Sequence[int], slot: int) -> list[tuple[int, float]]:
        """Return all tokens and their log-probabilities after the ids, the most likely ones first."""
        forced = [(self.tokenizer.plain_token(), _FORCED)]  # one whose probabilities are reported
        found = self._step(ids, forced, _GREEDY, self.vocabulary_size, slot, goes_on=True)
        return [(each["id"], each["logprob"]) for each in found["completion_probabilities"][0]["top_logprobs"]]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        body = {"content": text, "add_special": add_special_tokens, "parse_special": True}
        return [int(token) for token in self._server.ask("/tokenize", body)["tokens"]]


class _Text:
    """The text of tokens that arrive one by one."""

    def __init__(self, tokenizer: GGUFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._text, self._scored = (codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2))
        self._offset = 0

    def add(self, spelling: bytes, end: FinishReason | None) -> str:
        """Return the characters that the next token completes."""
        return self._text.decode(spelling, final=end is not None)

    def scored(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> ScoredToken:
        """Return the next token with its log-probability and those of the most likely ones."""
        spelling, offset = self._tokenizer.spelling(token), self._offset
        self._offset += len(self._scored.decode(spelling))
        return ScoredToken(spelling, offset, logprob, [(self._tokenizer.spelling(each), value) for each, value in top])


def _drawing(sampling: Sampling, draws: random.Random) -> dict[str, Any]:
    """Return how llama.cpp draws a token: only by the samplers that are named, in their order."""
    seed = draws.randrange(2**32 - 1)  # 2**32 - 1 would ask for another sample each time
    if sampling.temperature < LOWEST_TEMPERATURE:
        return _GREEDY
    samplers = {"temperature": True, "top_k": sampling.top_k is not None, "top_p": sampling.top_p < 1}
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "samplers": [name for name, is_used in samplers.items() if is_used],
        "seed": seed,
    }


def _biases(sampling: Sampling, counts: Counter[int]) -> list[tuple[int, float]]:
    """Return what is added to the logits: biases, minus penalties for the tokens of the answer."""
    biases = dict(sampling.logit_bias)
    for token, count in counts.items():
        penalty = sampling.frequency_penalty * count + sampling.presence_penalty
        biases[token] = biases.get(token, 0.0) - penalty
    return list(biases.items())


def _end(event: dict[str, Any]) -> FinishReason:
    return "stop" if event["stop_type"] == "eos" else "length"
