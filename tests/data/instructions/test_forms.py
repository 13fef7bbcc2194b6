"""Each form of rows, as a file in forms/: the exact text read, which of it is trained, and which keys are not read."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import byte_tokenizer
from transformers import PreTrainedTokenizerBase

from gpt_kit_hf.data.instructions.reader import PlacedRow, SkippedRows, read_rows
from gpt_kit_hf.data.instructions.rows import with_columns
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, encode_rows
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import RowOptions, SupervisionOptions

FORMS = Path(__file__).parent / "forms"
END = "<|endoftext|>"
TASK = "Below is an instruction that describes a task"
PAIRED = ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request.\n\n"


def alpaca(question: str, answer: str, context: str = "", *, system: str = "") -> str:
    """An Alpaca row's text, with what is trained between ⟦ and ⟧."""
    head = f"{system}\n\n" if system else TASK + (PAIRED if context else "") + WRITE
    section = f"### Input:\n{context}\n\n" if context else ""
    return f"{head}### Instruction:\n{question}\n\n{section}### Response:\n⟦{answer}{END}⟧"


def chat(*turns: str) -> str:
    """A conversation's text from turns such as "U:Hi": system, user, tool, answer, and "a", an answer not trained."""
    headers = {"S": "System", "U": "User", "T": "Tool", "A": "Assistant", "a": "Assistant"}
    text = ""
    for turn in turns:
        role, content = turn.split(":", 1)
        end = {"A": f"⟦{content}{END}⟧", "a": f"{content}{END}"}.get(role, f"{content}\n\n")
        text += f"### {headers[role]}:\n{end}"
    return text


@dataclass
class Form:
    """What is read of a file: the text of each row, the keys that are not read, and the options."""

    texts: list[str]
    unread: dict[str, int] = field(default_factory=dict)
    columns: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    thinking_left_out: int = 0


SING, TWO = alpaca("Sing.", "La"), alpaca("Two?", "2")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
FORMS_READ = {
    "alpaca.json": Form(
        [alpaca("Translate.", "Bonjour", "Hello"), alpaca("Write code.", "    return 1\n"), SING], {"text": 1}
    ),
    "alpaca_history.jsonl": Form(
        [
            f"You translate.\n\n### Instruction:\nTranslate: one\n\n### Response:\n⟦un{END}⟧"
            f"### Instruction:\nAnd this?\n\n### Input:\ntwo\n\n### Response:\n⟦deux{END}⟧",
            SING,
        ]
    ),
    "dolly.jsonl": Form([alpaca("Who?", "Ada", "Ada wrote it."), SING], {"category": 2}),
    "lamini.jsonl": Form([SING], {"instruction_source": 1}),
    "openorca.jsonl": Form([alpaca("Two and two?", "Four", system="You are terse."), SING], {"id": 2}),
    "question_answer.jsonl": Form([alpaca("Two and two?", "2+2=4\n#### 4"), alpaca("Who?", "Ada", "Ada wrote it.")]),
    "prompt_response.jsonl": Form([alpaca("Two and two?", "Four")]),
    "query_response.jsonl": Form([alpaca("Two and two?", "Four")], {"type": 1, "original_question": 1}),
    "problem_solution.jsonl": Form([alpaca("Two and two?", "Four")], {"level": 1}),
    "other_columns.jsonl": Form(
        [alpaca("Zwei und zwei?", "Vier")], {"answer (not mapped)": 1}, ["instruction=frage,output=antwort"]
    ),
    "prompt_completion.jsonl": Form([f"Two and two is⟦ four.{END}⟧"]),
    "prompt_completion_lists.jsonl": Form([chat("U:Hi", "a:Ho", "U:Two?", "A:2")]),
    "messages.jsonl": Form([chat("S:Be kind.", "U:Hi", "A:Ho", "U:Code?", "A:    return 1\n")], {"source": 1}),
    "messages_parts.jsonl": Form([chat("S:Be kind.", "U:One?\nTwo?", "A:2")], {"messages[].name": 1}),
    "messages_weights.jsonl": Form([chat("U:Hi", "a:Ho", "U:Two?", "A:2", "U:Three?", "A:3")]),
    "messages_upper_case.jsonl": Form([chat("U:Hi", "A:Ho")] * 2),
    "messages_marks.jsonl": Form([chat("U:Hi", "a:Ho", "U:Two?", "A:2")] * 3),
    "messages_as_json.csv": Form([chat("U:Hi", 'A:Ho, "ho"')], {"id": 1}),
    "messages_think_tags.jsonl": Form(
        [chat("U:Two and two?", "A:Four"), chat("U:Sing.", "A:The tag <think> is text here.</think>")],
        thinking_left_out=1,
    ),
    "alpaca_think_tags.jsonl": Form(
        [SING, SING, alpaca("Sing.", "Write </think> after it.")],
        thinking_left_out=2,
    ),
    "messages_tool_roles.jsonl": Form([chat("U:Two?", "A:{}", "T:2", "A:2"), chat("U:Hi", "A:Ho")]),
    "prompt_completion_think_tags.jsonl": Form([f"Two and two is⟦four.{END}⟧"], thinking_left_out=1),
    "alpaca_history_as_json.csv": Form(
        [
            f"{TASK}{WRITE}### Instruction:\nTranslate: one\n\n### Response:\n⟦un{END}⟧"
            f"### Instruction:\nAnd this?\n\n### Response:\n⟦deux{END}⟧",
            SING,
        ]
    ),
    "messages_tools.jsonl": Form(
        [
            '### Tools:\n{"type": "function", "function": {"name": "add", "parameters": {}}}\n\n'
            + chat("U:Two and two?", f"A:{CALL}", "T:4", "A:Four")
        ],
        {"messages[].tool_call_id": 1},
    ),
    "messages_function_call.jsonl": Form([chat("U:Two and two?", f"A:{CALL}", "T:4", "A:Four")]),
    "messages_thinking.jsonl": Form([chat("U:Two and two?", "A:Four"), chat("U:Sing.", "A:La")], thinking_left_out=2),
    "messages_from_value.jsonl": Form([chat("U:Hi", "A:Ho")]),
    "sharegpt.json": Form(
        [chat("S:Be kind.", "U:Hi", "A:Ho"), chat("U:Hi", "a:Ho", "U:Two?", "A:2", "U:Three?", "A:3")],
        {"id": 2, "conversations[].markdown": 1},
    ),
    "sharegpt_tools.jsonl": Form(
        [
            '### Tools:\n{"name": "add"}\n\n'
            + chat("U:Two and two?", 'A:{"name": "add", "arguments": {"a": 2, "b": 2}}', "T:4", "A:Four"),
            chat("U:Two and two?", "T:4", "A:Four"),
        ]
    ),
    "conversations_role_content.jsonl": Form([chat("U:Hi", "A:Ho")] * 2, {"language": 1}),
    "data.json": Form([SING, TWO]),
    "train_on_one_line.jsonl": Form([SING, TWO]),
    "array.jsonl": Form([SING, TWO]),
    "table.csv": Form([SING, alpaca("Translate, please.", "d", 'a "b"\nc')], {"id": 2}),
    "semicolons.csv": Form([alpaca("Two, or two?", "2")]),
    "table.tsv": Form([TWO]),
    "text.jsonl": Form([f"#⟦## Human: Hi ### Assistant: Ho{END}⟧"], {"id": 1}, options={"train_on": "everything"}),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = None
    return tokenizer


def read(
    file: Path, tokenizer: Any, *, columns: list[str] | None = None, unknown_keys: Any = "report", **options: Any
) -> SupervisedRows:
    supervision = SupervisionOptions(max_length=1000, **options)
    rows = with_template(read_rows(RowOptions(rows=[str(file)], columns=columns)), tokenizer, "keep")
    return encode_rows(rows, tokenizer, supervision, unknown_keys=unknown_keys)


def marked(rows: SupervisedRows, tokenizer: Any) -> list[str]:
    texts = []
    for index in range(len(rows)):
        row, text = rows[index], ""
        for trained, run in groupby(
            zip(row.input_ids.tolist(), row.trained.tolist(), strict=True), lambda item: item[1]
        ):
            piece = tokenizer.decode([token for token, _ in run])
            text += f"⟦{piece}⟧" if trained else piece
        texts.append(text)
    return texts


@pytest.mark.parametrize("name", FORMS_READ)
def test_a_form_of_rows_is_read_exactly(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    form = FORMS_READ[name]
    rows = read(FORMS / name, tokenizer, columns=form.columns, **form.options)
    assert marked(rows, tokenizer) == form.texts
    assert rows.counts.unread_keys == form.unread
    assert rows.counts.thinking_left_out == form.thinking_left_out


def test_every_file_of_a_form_is_tested() -> None:
    assert {file.name for file in FORMS.iterdir()} == FORMS_READ.keys()


@pytest.mark.parametrize("name", [name for name, form in FORMS_READ.items() if form.unread])
def test_keys_that_are_not_read_are_refused_on_request(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    form = FORMS_READ[name]
    with pytest.raises(DataError, match=r"not read; remove (it|them), or set unknown_keys to report") as refused:
        read(FORMS / name, tokenizer, columns=form.columns, unknown_keys="error", **form.options)
    assert str(refused.value).startswith(str(FORMS / name))
    assert any(repr(key) in str(refused.value) for key in form.unread)


def test_thinking_is_trained_on_request(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = read(FORMS / "messages_thinking.jsonl", tokenizer, thinking="train")
    assert marked(rows, tokenizer) == [
        chat("U:Two and two?", "A:<think>\nI add.\n</think>\n\nFour"),
        chat("U:Sing.", "A:<think>\nA song.\n</think>\n\nLa"),
    ]
    assert rows.counts.thinking_left_out == 0


def test_thinking_in_the_text_of_an_answer_is_trained_as_it_stands_on_request(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    expected = {
        "messages_think_tags.jsonl": chat("U:Two and two?", "A:<think>\nI add.\n</think>\n\nFour"),
        "alpaca_think_tags.jsonl": alpaca("Sing.", "<think>A song.</think>La"),
        "prompt_completion_think_tags.jsonl": f"Two and two is⟦<thinking>\n2+2\n</thinking>\n four.{END}⟧",
    }
    for name, text in expected.items():
        tokenizer.chat_template = None
        rows = read(FORMS / name, tokenizer, thinking="train")
        assert marked(rows, tokenizer)[0] == text
        assert rows.counts.thinking_left_out == 0


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("messages.jsonl", [chat("S:Be kind.", "U:Hi", "a:Ho", "U:Code?", "A:    return 1\n")]),
        ("messages_weights.jsonl", [chat("U:Hi", "a:Ho", "U:Two?", "a:2", "U:Three?", "A:3")]),
        ("messages_function_call.jsonl", [chat("U:Two and two?", f"a:{CALL}", "T:4", "A:Four")]),
        (
            "alpaca_history.jsonl",
            [text.replace(f"⟦un{END}⟧", f"un{END}") for text in FORMS_READ["alpaca_history.jsonl"].texts],
        ),
        ("lamini.jsonl", [SING]),
        ("prompt_completion.jsonl", FORMS_READ["prompt_completion.jsonl"].texts),
    ],
)
def test_the_last_answer_alone_is_trained_on_request(
    name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert marked(read(FORMS / name, tokenizer, train_on="last_answer"), tokenizer) == texts


PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% elif m['role'] in ['user', 'system'] %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("messages_thinking.jsonl", {"thinking": "train"}, "does not write the thinking of an answer"),
        ("messages_tools.jsonl", {}, "does not write the tools"),
        ("sharegpt_tools.jsonl", {}, "does not write a turn of the role 'tool'"),
    ],
)
def test_what_a_template_does_not_write_is_refused(
    name: str, options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match=rf"{name}:1: the chat template {message}"):
        read(FORMS / name, tokenizer, **options)


def test_a_developer_is_the_system_of_a_template_without_that_role(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    rows = read(FORMS / "messages_parts.jsonl", tokenizer)
    assert marked(rows, tokenizer) == [f"system:Be kind.\nuser:One?\nTwo?\n⟦2{END}⟧"]


def test_alpacas_system_and_history_need_no_template_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row.row for row in read_rows(RowOptions(rows=[str(FORMS / "alpaca_history.jsonl")]))]
    encoded = encode_rows(rows, tokenizer, SupervisionOptions(max_length=1000))
    assert marked(encoded, tokenizer) == FORMS_READ["alpaca_history.jsonl"].texts
    assert tokenizer.chat_template is None


def test_other_templates_get_system_and_history_as_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    rows = read(FORMS / "alpaca_history.jsonl", tokenizer)
    assert marked(rows, tokenizer) == [
        f"system:You translate.\nuser:Translate: one\n⟦un{END}⟧user:And this?\n\ntwo\n⟦deux{END}⟧",
        f"user:Sing.\n⟦La{END}⟧",
    ]
    rows = read(FORMS / "dolly.jsonl", tokenizer)
    assert rows.counts.unread_keys == {"category": 2}


def test_suffixes_may_be_in_upper_case(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": "Sing.", "output": "La"}]
    (tmp_path / "A.JSONL").write_text('{"instruction": "Sing.", "output": "La"}\n')
    (tmp_path / "B.Json").write_text('[{"instruction": "Sing.",\n"output": "La"}]')
    (tmp_path / "C.CSV.GZ").write_bytes(gzip.compress(b"instruction,output\nSing.,La\n"))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "D.PARQUET")
    for file in sorted(tmp_path.glob("?.*")):
        assert marked(read(file, tokenizer), tokenizer) == [SING], file.name


def test_rows_of_text_need_train_on_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"text\.jsonl:1: a row of 'text' .*give train_on everything .*gpt-kit train"):
        read(FORMS / "text.jsonl", tokenizer)


def test_marks_of_turns_contradict_train_on_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"messages_weights\.jsonl:1: a turn is marked as not trained"):
        read(FORMS / "messages_weights.jsonl", tokenizer, train_on="everything")


def test_columns_that_a_row_lacks_are_all_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"lamini\.jsonl:1: columns: 'q' and 'a' are missing; its keys: 'instr"):
        read(FORMS / "lamini.jsonl", tokenizer, columns=["instruction=q", "output=a", "input=c"])


TURNS = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two?", "completion": "3", "label": False},  # KTO
        {"messages": TURNS, "kto_tag": False},  # KTO by LLaMA-Factory
        {"instruction": "Two?", "output": "3", "label": "False"},  # from a table
        {"question": "Two?", "answer": "3", "weight": 0.0},
        {"messages": TURNS, "train": False},
        {"messages": TURNS, "train": 0},
    ],
)
def test_a_row_that_is_not_to_be_trained_is_refused_or_left_out(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [PlacedRow("good", {"instruction": "Sing.", "output": "La"}), PlacedRow("bad", row)]
    (mark,) = row.keys() & {"label", "kto_tag", "weight", "train"}
    with pytest.raises(DataError, match=rf"bad: '{mark}' is .*: the answer of this row is not to be trained"):
        encode_rows(with_template(iter(rows), tokenizer, "keep"), tokenizer, SupervisionOptions())
    skipped = SkippedRows()
    prompted = with_template(iter(rows), tokenizer, "keep")
    encoded = encode_rows(prompted, tokenizer, SupervisionOptions(), on_bad_row="skip", skipped=skipped)
    assert marked(encoded, tokenizer) == [SING]
    assert skipped.counts == {"not to be trained": 1}


def test_a_row_that_is_marked_to_be_trained_is(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "Sing.", "output": "La"}
    rows = [{**row, "label": True}, {**row, "weight": 1}, {**row, "weight": 0.5}, {**row, "label": 0}]
    encoded = encode_rows(rows, tokenizer, SupervisionOptions())
    assert marked(encoded, tokenizer) == [SING] * 4
    assert encoded.counts.unread_keys == {"weight": 1, "label": 1}  # listed, as they say nothing that is known


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "Two?", "chosen": "2", "rejected": "3"}, "completion=chosen"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "completion=chosen"),
        ({"prompt": "Two?", "chosen": TURNS, "rejected": TURNS}, "messages=chosen"),
        ({"chosen": TURNS, "rejected": TURNS}, "messages=chosen"),
    ],
)
def test_an_error_tells_how_the_better_answer_of_a_pair_is_trained(
    row: dict[str, Any], column: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=f"give --columns {column}$"):
        encode_rows([row], tokenizer, SupervisionOptions())
    mapped = with_columns(row, RowOptions(rows=["x"], columns=[column]).column_of)
    encoded = encode_rows(
        with_template(iter([PlacedRow("", mapped)]), tokenizer, "keep"), tokenizer, SupervisionOptions()
    )
    assert bytes(encoded[0].input_ids[encoded[0].trained][:-1].tolist()) == b"2"
