"""Counts of rows: whatever the mixture of good and bad rows, every place tells what the generator knows it made."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_pretrain import killed_copy
from tiny_model import write_tiny_model

from gpt_kit_hf import finetune, inspect_rows, parse_finetune_options
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.instructions import inspect
from gpt_kit_hf.data.instructions.counts import LeftOut, RowCounts
from gpt_kit_hf.data.instructions.reader import PlacedRow, SkippedRows, read_rows
from gpt_kit_hf.data.instructions.report import SupervisionReport, report_of
from gpt_kit_hf.data.instructions.tokenized import encode_rows
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.hub.card.card import card_facts, render_card
from gpt_kit_hf.options.data import RowOptions, SupervisionOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

MAX_LENGTH = 40  # bytes are tokens, so the lengths below are exact
TOO_LONG = "longer than max_length"
POLICIES = list(itertools.product(("stop", "skip"), ("error", "drop", "truncate_prompt"), (True, False)))


# --- the generator: each row with what is wrong with it


class Made(NamedTuple):
    """A row as a line of JSON, its prompt and answer if it has them, and its fault: None, a kind, or a length.

    `unread` are its keys that no format reads; they are counted of rows that are not skipped.
    """

    line: bytes
    prompt: str | None
    answer: str | None
    fault: str | None
    unread: tuple[str, ...] = ()


def pair(draw: random.Random, prompt: int, answer: int, fault: str | None = None) -> Made:
    texts = {"prompt": "q" * prompt, "completion": "a" * answer}
    unknown: dict[str, Any] = draw.choice([{}, {}, {"id": 7}, {"source": "web", "tags": ["x"]}])
    return Made(json.dumps(texts | unknown).encode(), *texts.values(), fault, tuple(unknown))


def good(draw: random.Random) -> Made:
    prompt = draw.randint(1, MAX_LENGTH - 1)
    return pair(draw, prompt, draw.choice([1, MAX_LENGTH - prompt, draw.randint(1, MAX_LENGTH - prompt)]))


def long_prompt(draw: random.Random) -> Made:
    return pair(draw, draw.randint(MAX_LENGTH, 90), draw.randint(1, MAX_LENGTH - 1), "long prompt")


def long_answer(draw: random.Random) -> Made:
    return pair(draw, draw.randint(1, 90), draw.randint(MAX_LENGTH, 90), "long answer")


def lines_of(*lines: bytes) -> Callable[[random.Random], bytes]:
    return lambda draw: draw.choice(lines)


FAULTS = {
    "null": lines_of(b'{"prompt": "q", "completion": null}', b'{"prompt": null, "completion": "a", "id": 1}'),
    "missing key": lines_of(b'{"prompt": "q"}', b'{"completion": "a"}', b"{}"),
    "blank": lines_of(b'{"prompt": "q", "completion": ""}', b'{"prompt": "q", "completion": " \\n"}'),
    "wrong type": lines_of(b'{"prompt": "q", "completion": 3}', b'{"prompt": {"a": 1}, "completion": "a"}'),
    "duplicate key": lines_of(b'{"prompt": "q", "prompt": "r", "completion": "a"}'),
    "NaN or infinity": lines_of(b'{"prompt": "q", "completion": NaN}', b'{"prompt": "q", "completion": 1e999}'),
    "not an object": lines_of(b"[1, 2]", b'"text"', b"null", b"7"),
    "not UTF-8": lines_of(b'{"prompt": "\xff", "completion": "a"}', b'{"prompt": "q", "completion": "caf\xe9"}'),
    "broken JSON": lines_of(b'{"prompt": "q", "comp', b'{"prompt": "q"} {}', b"Q: q? A: a", b'{"prompt": "\x01"}'),
}
IN_ARRAYS = [kind for kind in FAULTS if kind != "broken JSON"]
LENGTHS = {"long prompt": long_prompt, "long answer": long_answer}


def make(
    draw: random.Random,
    n_rows: int,
    without: set[str] | None = None,
    among: list[str] | None = None,
    share: float | None = None,
) -> list[Made]:
    """Return random rows; which faults there are is random, too, and how many unless `share` says it."""
    kinds = [kind for kind in among or [*FAULTS, *LENGTHS] if kind not in (without or set())]
    chosen = draw.sample(kinds, draw.randint(0 if share is None else 1, len(kinds)))
    share = draw.choice([0.1, 0.5, 0.9]) if share is None else share
    made = []
    for _ in range(n_rows):
        kind = draw.choice(chosen) if chosen and draw.random() < share else None
        if kind is None or kind in LENGTHS:
            made.append(LENGTHS.get(str(kind), good)(draw))
        else:
            made.append(Made(FAULTS[kind](draw), None, None, kind))
    return made


def write(draw: random.Random, file: Path, made: list[Made]) -> list[str]:
    """Write rows as lines, an array or a table; return the start of each row's place."""
    if file.suffix == ".parquet":
        columns = [[row.prompt for row in made], [row.answer for row in made]]
        pq.write_table(pa.table([pa.array(c, pa.string()) for c in columns], ["prompt", "completion"]), file)
        return [f"{file} row {number}:" for number in range(len(made))]
    if file.suffix == ".json":
        file.write_bytes(b"[\n" + b",\n".join(row.line for row in made) + b"\n]")
        return [f"{file}:{number}:" for number in range(2, len(made) + 2)]
    lines, places = [], []
    for row in made:
        lines += [b""] * draw.choice([0, 0, 0, 1])  # an empty line is no row
        lines.append(row.line)
        places.append(f"{file}:{len(lines)}:")
    file.write_bytes(draw.choice([b"\n", b"\r\n"]).join(lines))
    return places


def mixture(
    draw: random.Random, folder: Path, n_rows: int, without: set[str], share: float | None = None
) -> tuple[list[Made], list[str], list[str]]:
    """Write rows to one to three files of random forms; return the rows, their places, and the files."""
    folder.mkdir(exist_ok=True)
    made, places, files = [], [], []
    for number in range(draw.randint(1, 3)):
        form = draw.choice(["jsonl", "jsonl", "json", "parquet"])
        among = {"json": [*IN_ARRAYS, *LENGTHS], "parquet": ["null", *LENGTHS]}.get(form)
        rows = make(draw, draw.randint(1, max(1, n_rows)), without, among, share)
        if form == "parquet":  # it has the columns of the texts alone
            rows = [row._replace(unread=()) for row in rows]
        files.append(folder / f"rows{number}.{form}")
        places += write(draw, files[-1], rows)
        made += rows
    return made, places, [str(file) for file in files]


# --- what the generator knows, and what the places tell


@dataclass
class Counts:
    read: int = 0
    used: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


@dataclass
class Known:
    """What must be counted; `stops` is the place of the row that stops the command, `first` the places by kind."""

    counts: Counts = field(default_factory=Counts)
    first: dict[str, list[str]] = field(default_factory=dict)
    stops: str | None = None
    tokens_trained: int = 0


def known_of(
    made: list[Made], places: list[str], on_bad_row: str, truncation: str, unknown_keys: str = "report"
) -> Known:
    known = Known()
    for row, place in zip(made, places, strict=True):
        known.counts.read += 1
        fault = "unknown key" if row.unread and unknown_keys == "error" else row.fault
        if fault in FAULTS or fault == "unknown key":
            if on_bad_row == "stop":
                known.stops = place
                return known
            known.counts.skipped[fault] += 1
            known.first.setdefault(fault, []).append(place)
            continue
        known.counts.unread.update(row.unread)
        if row.fault == "long answer" or (row.fault == "long prompt" and truncation != "truncate_prompt"):
            if truncation == "error":
                known.stops = place
                return known
            known.counts.dropped[TOO_LONG] += 1
            known.first.setdefault(TOO_LONG, []).append(place)
        else:
            known.counts.used += 1
            known.counts.truncated += row.fault == "long prompt"
            known.tokens_trained += len(str(row.answer)) + 1
    return known


def number(text: str | None) -> int:
    return int((text or "0").replace(",", ""))


def told_by_console(text: str) -> tuple[dict[str, Counts], dict[str, list[str]], dict[str, int]]:
    """Return the counts of "rows" and "eval rows", the first places by kind, and the rows of "train" and "eval"."""
    told: dict[str, Counts] = {}
    first: dict[str, list[str]] = {}
    parts: dict[str, int] = {}
    counts, kind = Counts(), ""
    for line in text.splitlines():
        head = r"(rows|eval rows) +([\d,]+) read, ([\d,]+) used(?:, ([\d,]+) skipped)?(?:, ([\d,]+) dropped)?"
        if match := re.fullmatch(head, line):
            label, read, used, skipped, dropped = match.groups()
            counts = told[label] = Counts(number(read), number(used))
            assert counts.read == counts.used + number(skipped) + number(dropped)
        elif match := re.fullmatch(r"  ([\d,]+) (skipped|dropped): (.+)", line):
            kind = match[3]
            getattr(counts, match[2])[kind] = number(match[1])
        elif match := re.fullmatch(r"  ([\d,]+) rows lost the beginning of their prompt", line):
            counts.truncated = number(match[1])
        elif match := re.fullmatch("  keys not read: (.*)", line):
            keys = re.findall(r"(\w+) \(([\d,]+)\)", match[1])
            counts.unread = Counter({key: number(rows) for key, rows in keys})
        elif match := re.fullmatch(r"(train|eval) +([\d,]+) rows", line):
            parts[match[1]] = number(match[2])
        elif line.startswith("    ") and kind and "eval rows" not in told:
            first.setdefault(kind, []).append(line.strip())
    return told, first, parts


def told_by_json(report: dict[str, Any]) -> Counts:
    left_out = [
        Counter({kind: left["rows"] for kind, left in report[group].items()}) for group in ("skipped", "dropped")
    ]
    unread = Counter(report["unread_keys"])
    return Counts(report["rows_read"], report["rows_used"], report["rows_truncated"], *left_out, unread)


def told_by_card(card: str, name: str) -> Counts:
    cells = dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|$", card, re.MULTILINE))
    lost = f"{name} whose prompt lost its beginning"
    counts = Counts(*(number(cells[label]) for label in (f"{name} read", f"{name} used", lost)))
    for label, value in cells.items():
        if match := re.fullmatch(rf"{name} (skipped|dropped): `(.+)`", label):
            getattr(counts, match[1])[match[2]] = number(value)
    return counts


def without_keys(counts: Counts) -> Counts:
    """The card does not name keys, which may be private."""
    return replace(counts, unread=Counter())


def check_console(text: str, known: Known) -> None:
    told, first, _ = told_by_console(text)
    assert told["rows"] == known.counts
    assert first.keys() == known.first.keys()
    for kind, places in known.first.items():
        assert len(first[kind]) == min(len(places), 5)
        assert all(line.startswith(place) for line, place in zip(first[kind], places, strict=False)), first[kind]


# --- many mixtures, without a model


def check_error(error: DataError, known: Known) -> None:
    """The row that stops the command is named; if none is left, all reasons are."""
    if known.stops is not None:
        assert str(error).startswith(known.stops)
        return
    assert known.counts.used == 0
    assert f"{known.counts.read:,} read, all of them left out" in str(error)
    for name, kinds in (("skipped", known.counts.skipped), ("dropped", known.counts.dropped)):
        for kind, rows in kinds.items():
            assert f"{rows} {name}: {kind}" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("on_bad_row", "truncation", "packing"), POLICIES)
def test_inspect_tells_what_was_made(on_bad_row: Any, truncation: Any, packing: bool, tmp_path: Path) -> None:
    draw = random.Random(f"{on_bad_row} {truncation} {packing}")
    outcomes: Counter[str] = Counter()
    for trial in range(20):
        # Of half the mixtures that would stop, the faults that stop are left out.
        without = set(FAULTS) if on_bad_row == "stop" and trial % 2 else set()
        without |= set(LENGTHS) if truncation == "error" and trial % 2 else set()
        share = None
        if trial % 10 == 0:  # no row is left
            without, share = {"long prompt"}, 1.0
        made, places, files = mixture(draw, tmp_path / str(trial), 12, without, share)
        unknown_keys: Any = "error" if trial % 4 == 2 else "report"
        known = known_of(made, places, on_bad_row, truncation, unknown_keys)
        rows = RowOptions(rows=files, on_bad_row=on_bad_row, unknown_keys=unknown_keys)
        options = SupervisionOptions(
            max_length=MAX_LENGTH, truncation=truncation, packing=packing, format="prompt_completion"
        )
        try:
            report = inspect_rows(rows, options)
        except DataError as error:
            check_error(error, known)
            outcomes["refused"] += 1
            continue
        outcomes["counted"] += 1
        assert known.stops is None
        check_console(report.text(), known)
        assert told_by_json(report.to_dict()) == known.counts
        assert (report.rows_trained, report.rows_eval, report.eval_input) == (known.counts.used, 0, None)
        assert report.tokens_trained == known.tokens_trained
        check_split(rows, options, known)
    assert outcomes["counted"] >= 8
    assert outcomes["refused"] >= 2


def check_split(rows: RowOptions, options: SupervisionOptions, known: Known) -> None:
    """A part of the rows keeps the counts of all of them."""
    skipped, encoding = SkippedRows(), get_encoding("bytes")
    encoded = encode_rows(
        read_rows(rows, skipped),
        encoding,
        options,
        on_bad_row=rows.on_bad_row,
        skipped=skipped,
        unknown_keys=rows.unknown_keys,
    )
    if len(encoded) < 3:
        return
    train, valid, test = encoded.split([0.5, 0.25, 0.25], 0) if len(encoded) > 3 else encoded.split([1 / 3] * 3, 0)
    for report, n_eval in ((report_of(train, encoding), len(valid) + len(test)),
                           (report_of(train.select(np.arange(1)), encoding), len(encoded) - 1)):  # fmt: skip
        told, _, parts = told_by_console(report.text())
        assert told["rows"] == known.counts
        assert parts == {"train": known.counts.used - n_eval, "eval": n_eval}
    with pytest.raises(DataError, match=r"rows used: \d+ is not \d+ trained on \+ \d+ evaluated on"):
        report_of(train, encoding, eval_rows=valid)  # the rows of `test` are in neither


def test_a_row_that_is_lost_on_the_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader counts what it reads, the encoder what it uses: if they differ, no report is made."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "completion": "a"}\n' * 7)
    real = inspect.with_template

    def loses_one(*arguments: Any) -> Iterator[PlacedRow]:
        return (row for number, row in enumerate(real(*arguments)) if number != 3)

    monkeypatch.setattr(inspect, "with_template", loses_one)
    with pytest.raises(DataError, match=r"rows read: 7 is not 6 used \+ 0 skipped \+ 0 dropped"):
        inspect_rows(RowOptions(rows=[str(file)]), SupervisionOptions())


def test_counts_that_do_not_add_up_are_refused() -> None:
    left = {"null": LeftOut(2, ("f:1: null",))}
    RowCounts(rows_read=5, rows_used=3, skipped=left)
    with pytest.raises(DataError, match=r"rows read: 5 is not 2 used \+ 2 skipped \+ 0 dropped"):
        RowCounts(rows_read=5, rows_used=2, skipped=left)
    counts: dict[str, Any] = {"batch_size": 8, "padding": 0, "padding_packed": None, "max_length": None}
    counts |= {"length_histogram": (), "examples": (), "rows_read": 5, "rows_used": 5}
    SupervisionReport(**counts, rows_trained=4, rows_eval=1)
    apart = RowCounts(rows_read=9, rows_used=7, dropped=left)
    SupervisionReport(**counts, rows_trained=5, rows_eval=7, eval_input=apart)
    for wrong in ({"rows_trained": 5, "rows_eval": 1}, {"rows_trained": 4, "rows_eval": 7, "eval_input": apart},
                  {"rows_trained": 5, "rows_eval": 6, "eval_input": apart}):  # fmt: skip
        with pytest.raises(DataError, match=r"rows used: \d is not"):
            SupervisionReport(**counts, **wrong)


# --- a few mixtures, through a run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    write_tiny_model(folder)
    return folder


def arguments(base: Path, run: Path, files: list[str], *more: str) -> list[str]:
    return [
        f"--model_name_or_path={base}", "--rows", *files, f"--output_dir={run}", f"--max_length={MAX_LENGTH}",
        "--format=prompt_completion", "--max_steps=1", "--batch_size=2", "--use_cpu=true", "--mixed_precision=fp32",
        "--sample_steps=0", "--sample_max_new_tokens=1", "--eval_steps=9", "--report_to=none", *more,
    ]  # fmt: skip


def tuned(base: Path, run: Path, files: list[str], *more: str) -> str:
    output = io.StringIO()
    finetune(parse_finetune_options(arguments(base, run, files, *more)), stream=output)
    return output.getvalue()


def check_run(run: Path, text: str, known: Known, eval_known: Known | None, fraction: float) -> None:
    check_console(text, known)
    told, _, parts = told_by_console(text)
    n_eval = known.counts.used - round(known.counts.used * (1 - fraction)) if eval_known is None else 0
    n_train = known.counts.used - n_eval
    if eval_known is not None:
        n_eval = eval_known.counts.used
        assert told["eval rows"] == eval_known.counts
    assert parts == {"train": n_train, "eval": n_eval}
    report = json.loads((run / "supervision.json").read_text())
    record = json.loads((run / "run.json").read_text())
    assert record["supervision"] == report
    assert record["eval_rows"] == n_eval
    assert "held_out_rows" not in record
    assert (report["rows_trained"], report["rows_eval"]) == (n_train, n_eval)
    assert told_by_json(report) == known.counts
    assert (report["eval_input"] is None) == (eval_known is None)
    card = render_card(card_facts(run))
    assert told_by_card(card, "rows") == without_keys(known.counts)
    assert f"\n| rows trained on | {n_train:,} |\n" in card
    if eval_known is None:
        assert card.count(f"\n| rows held out | {n_eval:,} |\n") == 2
    else:
        assert told_by_json(report["eval_input"]) == eval_known.counts
        assert told_by_card(card, "evaluation rows") == without_keys(eval_known.counts)


@pytest.mark.parametrize(
    ("on_bad_row", "truncation", "packing", "apart"),
    [(*POLICIES[2 * number + number % 2], number % 3 == 0) for number in range(6)],
)
def test_a_run_tells_what_was_made(
    on_bad_row: str, truncation: str, packing: bool, apart: bool, base: Path, tmp_path: Path
) -> None:
    draw = random.Random(f"run {on_bad_row} {truncation} {packing}")
    without = (set(FAULTS) if on_bad_row == "stop" else set()) | (set(LENGTHS) if truncation == "error" else set())
    policy = ["--on_bad_row", on_bad_row, "--truncation", truncation, f"--packing={packing}".lower()]
    while True:  # until the mixture has rows to train on, and some to leave out if the policy leaves any out
        made, places, files = mixture(draw, tmp_path / "rows", 30, without)
        known = known_of(made, places, on_bad_row, truncation)
        left_out = known.counts.read - known.counts.used
        if known.counts.used >= 8 and (left_out or (on_bad_row, truncation) == ("stop", "error")):
            break
    eval_known = None
    if apart:
        eval_rows = [*make(draw, 20, without), good(draw)]
        eval_places = write(draw, tmp_path / "eval.jsonl", eval_rows)
        eval_known = known_of(eval_rows, eval_places, on_bad_row, truncation)
        policy.append(f"--eval_rows={tmp_path / 'eval.jsonl'}")
    else:
        policy.append("--eval_fraction=0.25")
    text = tuned(base, tmp_path / "run", files, *policy)
    check_run(tmp_path / "run", text, known, eval_known, 0.25)


def test_sixty_rows_of_which_forty_have_no_answer(base: Path, tmp_path: Path) -> None:
    """And thirty that are too long: what is left out is told, also after a run was interrupted."""
    for name, options, bad, told in (
        ("null", ["--on_bad_row=skip"], [Made(b'{"prompt": "q", "completion": null}', None, None, "null")] * 40,
         "rows      60 read, 20 used, 40 skipped\n"),
        ("long", ["--truncation=drop"], [long_prompt(random.Random(0))] * 30,
         "rows      60 read, 30 used, 30 dropped\n"),
    ):  # fmt: skip
        draw, file, run = random.Random(name), tmp_path / f"{name}.jsonl", tmp_path / name
        rows = [*bad, *(good(draw) for _ in range(60 - len(bad)))]
        draw.shuffle(rows)
        known = known_of(rows, write(draw, file, rows), "skip", "drop")
        text = tuned(base, run, [str(file)], *options, "--max_steps=2", "--save_steps=1")
        assert told in text
        check_run(run, text, known, None, 0.1)
    killed = killed_copy(run, tmp_path / "killed", "step-00000002")
    resumed = tuned(base, killed, [str(file)], *options, "--max_steps=2", "--save_steps=1", "--resume")
    assert "resumed  after step 1" in resumed
    check_run(killed, resumed, known, None, 0.1)


def test_train_on_everything_counts_each_row_once(base: Path, tmp_path: Path) -> None:
    """The rows are encoded a second time for the evaluation, whose answers alone are scored."""
    draw = random.Random(5)
    rows = [*make(draw, 30, among=["null", "long answer"]), *(good(draw) for _ in range(8))]
    known = known_of(rows, write(draw, tmp_path / "rows.jsonl", rows), "skip", "drop")
    more = ["--train_on=everything", "--on_bad_row=skip", "--truncation=drop"]
    text = tuned(base, tmp_path / "run", [str(tmp_path / "rows.jsonl")], *more)
    check_run(tmp_path / "run", text, known, None, 0.1)


def test_a_run_without_rows_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, file = random.Random(1), tmp_path / "rows.jsonl"
    bad = [Made(FAULTS["null"](draw), None, None, "null")] * 3 + [long_prompt(draw)] * 2
    skip = ["--on_bad_row=skip", "--truncation=drop"]
    for rows, expected in (
        (bad, "no row is left: 5 read, all of them left out (3 skipped: null; 2 dropped: longer than max_length)"),
        ([*bad, good(draw)], "(rows: 6 read, 1 used, 3 skipped, 2 dropped); give more rows"),
    ):
        write(draw, file, rows)
        assert main(["finetune", *arguments(base, tmp_path / "run", [str(file)], *skip)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert expected in line
        assert not (tmp_path / "run").exists()
    write(draw, tmp_path / "eval.jsonl", bad)
    write(draw, file, [good(draw)] * 4)
    apart = [f"--eval_rows={tmp_path / 'eval.jsonl'}", *skip]
    assert main(["finetune", *arguments(base, tmp_path / "run", [str(file)], *apart)]) == 2
    error = capsys.readouterr().err
    assert "no row is left: 5 read, all of them left out (3 skipped: null; 2 dropped" in error
    assert "eval.jsonl:" in error


def test_lengths_are_those_that_max_length_limits(base: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    write(draw, tmp_path / "rows.jsonl", [pair(draw, MAX_LENGTH - 4, 4) for _ in range(12)])
    text = tuned(base, tmp_path / "run", [str(tmp_path / "rows.jsonl")])
    assert f"training 1 steps of 2 x {MAX_LENGTH} tokens" in text
    longest = max(int(bound) for bound in re.findall(r"<= +(\d+) ", text))
    assert longest // 2 < MAX_LENGTH <= longest
