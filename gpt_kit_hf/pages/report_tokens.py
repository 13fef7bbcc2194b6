"""The part of a report that shows a text by token: where the model is surest and most surprised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForCausalLM

from gpt_kit_hf.data.text.corpus import prepare_text
from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.evaluation.held_out import held_out_text
from gpt_kit_hf.evaluation.passages import Passage, ScoredToken, scored_passages
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.model_folder import (
    check_tokenizer,
    find_model_folder,
    load_pretrained,
    load_text_encoding,
    move_to_device,
)
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.storage.run_history import RunHistory

_LEVELS = 8  # of colour: a nat each
_LONGEST = 256  # tokens of a passage: a text has several
_SPOTS = 12
_CONTEXT = 48  # characters before a token in the lists


def held_out_passages(run: RunHistory, text_files: list[str] | None, tokens: int, device: str) -> list[Passage]:
    """Return passages of the named text, or of the run's held-out text, scored by the run's model.

    Raises UsageError if there is no model, or the text cannot be found, with a message that names no file, and
    DataError for a named text that cannot be used.
    """
    place = str(run.folder)
    try:
        folder = find_model_folder(place)
        encoding = load_text_encoding(folder, place)
        model = load_pretrained(AutoModelForCausalLM, folder, place)
        check_tokenizer(folder, model.config)
    except (UsageError, CheckpointError) as error:
        raise UsageError("the folder of the run holds no model that can be loaded") from error
    if text_files:
        stream = prepare_text(TextOptions(text_files=text_files), encoding)[0]
    else:
        stream = held_out_text(run.options, run.record, encoding)
    move_to_device(model, device)
    trained, context = run.record.get("max_length"), context_length(model)
    lengths = [length for length in (trained, context) if isinstance(length, int)]
    return scored_passages(model.eval(), stream, encoding, tokens=tokens, max_length=min([_LONGEST, *lengths]))


def passage_view(passages: list[Passage], no_passages: str) -> dict[str, Any]:
    """Return what the template shows of the passages."""
    scored = [token for passage in passages for token in passage.tokens]
    spots = list(_spots(passages))
    return {
        "passages": [
            {"before": _visible(passage.before), "tokens": [_token_view(token) for token in passage.tokens]}
            for passage in passages
        ],
        "no_passages": no_passages,
        "passages_of": f"{len(passages)} passages from the whole held-out text." if len(passages) > 1 else "",
        "passage_tokens": f"{len(scored):,}",
        "passage_loss": -math.fsum(token.logprob for token in scored) / len(scored) if scored else math.nan,
        "surprised": sorted(spots, key=lambda spot: float(spot["logprob"]))[:_SPOTS],
        "surest": _one_of_each(sorted(spots, key=lambda spot: -float(spot["logprob"]))),
    }


def _token_view(token: ScoredToken) -> dict[str, Any]:
    title = f"probability {_percent(token.logprob)} ({-token.logprob / math.log(2):.2f} bits), rank {token.rank:,}"
    return {
        "text": _visible(token.text),
        "level": _level(token.logprob),
        "logprob": token.logprob,
        "title": f"{title}\nexpected: {_expected(token)}",
    }


def _spots(passages: list[Passage]) -> Iterator[dict[str, Any]]:
    """Yield the tokens that have some context, with it."""
    for passage in passages:
        text = ""
        for place, token in enumerate(passage.tokens):
            if place >= min(8, len(passage.tokens) // 2):
                yield {
                    "context": "".join(map(_visible_in_line, text[-_CONTEXT:])),
                    "text": _visible_in_line(token.text),
                    "level": _level(token.logprob),
                    "logprob": token.logprob,
                    "probability": _percent(token.logprob),
                    "expected": _expected(token),
                }
            text += token.text


def _one_of_each(spots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first spots of different tokens."""
    found: dict[str, dict[str, Any]] = {}
    for spot in spots:
        found.setdefault(spot["text"], spot)
    return list(found.values())[:_SPOTS]


def _level(logprob: float) -> int:
    return min(_LEVELS, int(-logprob)) if math.isfinite(logprob) else _LEVELS


def _percent(logprob: float) -> str:
    percent = 100 * math.exp(logprob)
    if percent >= 99.95:
        return f"{percent:.3f}%"
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"


def _expected(token: ScoredToken) -> str:
    return ", ".join(f"“{_visible_in_line(text)}” {100 * share:.0f}%" for text, share in token.likeliest)


def _visible(text: str) -> str:
    """Return the text with a sign for each line break, tab and other character that would not be seen."""
    return "".join(f"↵{c}" if c == "\n" else _visible_in_line(c) for c in text)


def _visible_in_line(text: str) -> str:
    signs = {"\n": "↵", "\t": "→"}
    return "".join(signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
