"""Scores of text or instruction rows, as `gpt-kit evaluate` reports them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.data.instructions.batches import PaddedRows
from gpt_kit_hf.data.instructions.formats import format_of
from gpt_kit_hf.data.instructions.reader import ROW_SUFFIXES, SkippedRows, read_rows
from gpt_kit_hf.data.instructions.rows import RowError
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, encode_rows
from gpt_kit_hf.data.text.corpus import prepare_text
from gpt_kit_hf.data.text.files.file_types import suffixes_of
from gpt_kit_hf.data.text.sources import source_notes
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.metrics import (
    Evaluation,
    evaluate_batches,
    evaluate_stream,
    token_byte_lengths,
    tokenizer_byte_lengths,
)
from gpt_kit_hf.evaluation.windows import pad_windows
from gpt_kit_hf.generation.generate import context_length, generate_text_autoregressive
from gpt_kit_hf.hub.model_folder import (
    check_tokenizer,
    find_model_folder,
    load_pretrained,
    load_text_encoding,
    move_to_device,
)
from gpt_kit_hf.options.data import KEEP, RowOptions, SupervisionOptions, TextOptions, Truncation
from gpt_kit_hf.options.evaluation import ScoreOptions
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.storage.run_folder import EVALUATIONS_FILE, holds_run
from gpt_kit_hf.text import printable
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN

_UNKNOWN_LENGTH = 1024  # for a model whose configuration states no context length
_SAMPLE_PROMPT = 32  # tokens of a document that a sample continues
_SAMPLE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """A score, its data and its settings; `units` is the number of documents or rows.

    `samples` are pairs of a prompt and the model's continuation. `reading` counts the documents or rows that were
    read, used and left out; `notes` say what of the data was left out or is doubtful.
    """

    name: str
    kind: str
    units: int
    evaluation: Evaluation
    max_length: int
    stride: int
    data_fingerprint: str
    samples: tuple[tuple[str, str], ...] = ()
    reading: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON, without the samples."""
        scored = self.evaluation
        score = asdict(scored) | {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
        settings = {"max_length": self.max_length, "stride": self.stride, "data_fingerprint": self.data_fingerprint}
        reading = {} if self.reading is None else {"reading": self.reading}
        return {"name": self.name, "kind": self.kind, "units": self.units} | score | settings | reading

    def text(self) -> str:
        """Return the report as lines of text."""
        scored, is_text = self.evaluation, self.kind == "text"
        units = f"{self.units:,} {'document' if is_text else 'row'}{'' if self.units == 1 else 's'}"
        how = f"windows of {self.max_length} tokens, {self.stride} apart" if is_text else "answers only"
        lines = [
            f"data        {self.name}: {units}, {scored.text_bytes:,} bytes scored ({self.data_fingerprint})",
            *(f"note        {note}" for note in self.notes),
            f"scored      {scored.tokens:,} tokens, {how}",
            f"loss        {scored.loss:.4f} nats per token",
            f"perplexity  {scored.perplexity:.3f}",
            f"bits/byte   {scored.bits_per_byte:.4f}",
        ]
        for prompt, answer in self.samples:
            lines += ["", f"prompt      {printable(prompt)}", f"continued   {printable(answer)}"]
        return "\n".join(lines)


def score_model(place: str, options: ScoreOptions) -> ScoreReport:
    """Score the model of a run, a folder or a Hub repository on the data; a run keeps the score for its card.

    Of text, each token of each document is scored once, as `evaluate_stream` does. Of rows, the answers and the EOS
    token after each are scored, in the model's chat template. Raises UsageError for an unusable model or device,
    DataError for unusable data.
    """
    folder = find_model_folder(place)
    model = load_pretrained(AutoModelForCausalLM, folder, place)
    check_tokenizer(folder, model.config)
    move_to_device(model, options.device)
    context = context_length(model)
    length = options.max_length or context or _UNKNOWN_LENGTH
    if context is not None and length > context:
        raise UsageError(f"max_length={length} is above the model's context length, {context}: lower it")
    rows = options.kind == "rows" or (options.kind == "auto" and _holds_rows(options))
    report = (_score_rows if rows else _score_text)(model, folder, place, options, length)
    if Path(place).is_dir() and holds_run(Path(place)):
        _record(Path(place), report)
    return report


def _score_text(model: Any, folder: str, place: str, options: ScoreOptions, length: int) -> ScoreReport:
    encoding = load_text_encoding(folder, place)
    text = TextOptions(
        text_files=options.data,
        text_column=options.text_column,
        document_separator=options.document_separator,
        encoding_of_files=options.encoding_of_files,
        eos_in_text=options.eos_in_text,
        on_bad_text=options.on_bad_text,
    )
    stream, key, reading = prepare_text(text, encoding)
    end, begin = encoding.encode_single_token(EOS_TOKEN), encodings.begin_of_text(encoding)
    stride = options.stride or length
    scored = evaluate_stream(
        model,
        stream,
        token_byte_lengths(encoding),
        end_of_text=end,
        begin_of_text=begin,
        max_length=length,
        stride=stride,
        batch_size=options.batch_size,
        padding_side=options.padding_side,
        max_tokens=options.max_tokens,
    )
    samples = []
    bounds = [*stream.document_starts.tolist(), len(stream)]
    for start, stop in list(pairwise(bounds))[: options.samples]:
        read = stream.read(start, min(stop, start + _SAMPLE_PROMPT)).tolist()
        ids = [token for token in read if token not in (end, begin)]
        continued = _continued(model, [end if begin is None else begin, *ids], end)
        samples.append((encoding.decode(ids), encoding.decode(continued)))
    return ScoreReport(
        name=_name(options.data),
        kind="text",
        units=len(stream.document_starts),
        evaluation=scored,
        max_length=length,
        stride=stride,
        data_fingerprint=key,
        samples=tuple(samples),
        reading=reading.facts(),
        notes=(*source_notes(text), *(" ".join(line.split()) for line in reading.lines(text))),
    )


def _score_rows(model: Any, folder: str, place: str, options: ScoreOptions, length: int) -> ScoreReport:
    for name, value in (("stride", options.stride), ("max_tokens", options.max_tokens)):
        if value is not None:
            raise UsageError(f"{name}={value} is for text: rows are scored whole, and all of them")
    tokenizer = load_pretrained(AutoTokenizer, folder, place)
    truncation: Truncation = "drop" if options.on_bad_row == "skip" else "error"
    supervision = SupervisionOptions(max_length=length, thinking=options.thinking, truncation=truncation)
    skipped = SkippedRows()
    read = read_rows(_row_options(options, options.data), skipped)
    encoded = encode_rows(
        with_template(read, tokenizer, KEEP, supervision.format),
        tokenizer,
        supervision,
        vocab_size=model.config.vocab_size,
        on_bad_row=options.on_bad_row,
        skipped=skipped,
    )
    counts = encoded.counts
    kinds = {kind: left.rows for kind, left in (*counts.skipped.items(), *counts.dropped.items())}
    left_out = [f"{counts.summary()} ({counts.reasons()})"] if counts.rows_used < counts.rows_read else []
    loader = DataLoader(
        PaddedRows(encoded),
        batch_size=options.batch_size,
        collate_fn=partial(pad_windows, filler=encoded.eos_token_id, side=options.padding_side),
        generator=torch.Generator(),
    )
    lengths = tokenizer_byte_lengths(tokenizer, model.config.vocab_size)
    return ScoreReport(
        name=_name(options.data),
        kind="rows",
        units=len(encoded),
        evaluation=evaluate_batches(model, loader, lengths),
        max_length=length,
        stride=length,
        data_fingerprint=encoded.fingerprint(),
        reading={"rows_read": counts.rows_read, "rows_used": counts.rows_used, "left_out": kinds},
        notes=(*left_out, *counts.notes()),
        samples=tuple(_answers(model, tokenizer, encoded, options.samples)),
    )


def _answers(model: Any, tokenizer: Any, rows: SupervisedRows, wanted: int) -> Iterator[tuple[str, str]]:
    """Yield the prompts of rows and the model's answers."""
    for number in range(min(wanted, len(rows))):
        row = rows[number]
        prompt = row.input_ids[: int(row.trained.argmax())].tolist()
        answer = _continued(model, prompt, rows.eos_token_id)
        yield tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True)


def _continued(model: Any, prompt: list[int], end: int) -> list[int]:
    """Return the greedy continuation of the prompt, up to an EOS token."""
    context = context_length(model)
    room = _SAMPLE_TOKENS if context is None else min(_SAMPLE_TOKENS, context - len(prompt))
    if room < 1:
        return []
    ids = generate_text_autoregressive(model, torch.tensor([prompt]), room, eos_token_id=end)
    return [token for token in ids[0, len(prompt) :].tolist() if token != end]


def _row_options(options: ScoreOptions, files: list[str]) -> RowOptions:
    return RowOptions(
        rows=files,
        columns=options.columns,
        encoding_of_files=options.encoding_of_files,
        on_bad_row=options.on_bad_row,
    )


def _holds_rows(options: ScoreOptions) -> bool:
    """Return whether the first row of the first file that can be read has the keys of an instruction."""
    if options.columns:
        return True
    if suffixes_of(options.data[0])[0] not in ROW_SUFFIXES:
        return False
    try:
        first = replace(_row_options(options, options.data[:1]), on_bad_row="skip")
        row = next(read_rows(first)).row
        return options.text_column not in row and format_of(row) != "text"
    except (RowError, StopIteration, DataError):
        return False  # reading it as text reports the error


def _name(data: list[str]) -> str:
    """Return the names of the data without folders, which are private to this machine."""
    return ", ".join(Path(pattern).name or pattern for pattern in data)


def _record(run: Path, report: ScoreReport) -> None:
    """Save the score in the run's folder; it replaces an earlier one with the same data and settings."""
    file = run / EVALUATIONS_FILE
    kept = load_json(file)["evaluations"] if file.is_file() else []
    new = report.to_dict()
    same = ("name", "kind", "max_length", "stride")
    others = [entry for entry in kept if any(entry.get(key) != new[key] for key in same)]
    save_json(file, {"evaluations": [*others, new]})
