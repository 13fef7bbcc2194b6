"""The held-out text of a run, found again by the options that it recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tiktoken

from gpt_kit_hf.data.text.corpus import prepare_corpus, prepare_eval
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import GPTKitError, UsageError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.files import find_files, is_url

_MOST_BYTES = 200 << 20  # of text that is read again to split the same part off


def held_out_text(options: Mapping[str, Any], record: Mapping[str, Any], encoding: tiktoken.Encoding) -> TokenStream:
    """Return the text that a pretraining run was evaluated on; `options` are flat, `record` is its run.json.

    Raises UsageError for a run of instruction rows or of a dataset of the Hub, for a text of more than 200 MiB of
    which a part was split off, and for files that are gone or have changed. The messages name no file; the cause does.
    """
    names = [field.name for field in dataclasses.fields(TextOptions)]
    chosen = {name: options[f"text.{name}"] for name in names if f"text.{name}" in options}
    if not any(chosen.get(name) for name in ("text_files", "token_files", "mixture", "dataset_name")):
        raise UsageError("the run was not trained on text")
    apart = bool(chosen.get("eval_files"))
    patterns = [*(chosen.get("text_files") or []), *(each.partition(":")[2] for each in chosen.get("mixture") or [])]
    if not apart and (chosen.get("dataset_name") or any(each.startswith("dataset:") for each in patterns)):
        raise UsageError("the run was evaluated on a dataset")
    if any(map(is_url, [*patterns, *(chosen.get("eval_files") or [])])):
        raise UsageError("the text of the run is behind a URL")
    try:
        text = TextOptions(**chosen)
        if not apart and not text.token_files:
            _check_size(patterns)
        seed = int(options.get("training.seed", 0))
        found = prepare_eval(text, encoding)[0] if apart else prepare_corpus(text, encoding, seed=seed).eval
    except (GPTKitError, OSError, TypeError, ValueError) as error:
        raise UsageError("the text of the run cannot be read again") from error
    if found.fingerprint() != record.get("eval_fingerprint"):
        raise UsageError("the text of the run has changed")
    return found


def _check_size(patterns: list[str]) -> None:
    size = sum(file.stat().st_size for file in find_files(patterns))
    if size > _MOST_BYTES:
        raise UsageError(f"it has {size / 2**20:,.0f} MiB, of which the held-out part would be split off again")
