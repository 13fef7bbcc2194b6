"""Reports what training would see of instruction rows, without training: `gpt-kit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt_kit_hf.data.instructions.reader import SkippedRows, read_rows
from gpt_kit_hf.data.instructions.report import SupervisionReport, report_of
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.data.instructions.tokenized import encode_rows
from gpt_kit_hf.options.data import KEEP, RowOptions, SupervisionOptions
from gpt_kit_hf.tokenization.encodings import get_encoding
from gpt_kit_hf.tokenization.export import to_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect_rows(
    rows: RowOptions, supervision: SupervisionOptions, *, model: str | None = None, examples: int = 3
) -> SupervisionReport:
    """Return what of the rows would be trained, with the tokenizer of a model, or with bytes as tokens.

    Without a model, torch is not imported. Raises DataError for rows that cannot be used, UsageError for a model that
    cannot be loaded.
    """
    if model is None:
        tokenizer, vocab_size = to_transformers(get_encoding("bytes")), None
    else:
        tokenizer, vocab_size = _load_tokenizer(model)
    skipped = SkippedRows()
    encoded = encode_rows(
        with_template(read_rows(rows, skipped), tokenizer, KEEP, supervision.format),
        tokenizer,
        supervision,
        vocab_size=vocab_size,
        on_bad_row=rows.on_bad_row,
        skipped=skipped,
        unknown_keys=rows.unknown_keys,
    )
    return report_of(encoded, tokenizer, n_examples=examples)


def _load_tokenizer(model: str) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a model's tokenizer and its vocab_size."""
    from transformers import AutoConfig, AutoTokenizer  # heavy: they import torch

    from gpt_kit_hf.hub.model_folder import find_model_folder, load_pretrained

    folder = find_model_folder(model)
    return load_pretrained(AutoTokenizer, folder, model), load_pretrained(AutoConfig, folder, model).vocab_size
