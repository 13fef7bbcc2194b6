"""The parser that all commands share: what it accepts, and one line for what it does not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from gpt_kit_hf.commands.main import COMMANDS
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import REQUIRED, Options, option, sections_of
from gpt_kit_hf.options.evaluation import EvaluateOptions
from gpt_kit_hf.options.hub import PushCommandOptions
from gpt_kit_hf.options.parser import parse_options
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions, flat_options, parse_finetune_options, parse_run_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letter(Options):
    """A letter."""

    positionals: ClassVar[tuple[str, ...]] = ("to", "copies")

    to: str = option(REQUIRED, "who gets it", metavar="NAME")
    copies: list[str] = option([], "who gets a copy")
    text: str = option("", "what it says")
    pages: int | None = option(2, "how many pages", minimum=1, unset="as many as needed")
    weight: float = option(1.0, "its weight in grams", above=0)
    express: bool = option(False, "send it at once")
    signed: bool = option(True, "with a signature")
    stamp_color: str = option("red", "color of the stamp", choices=("red", "blue"))
    stamps: list[int] = option([], "values of the stamps")


def parse(*arguments: str) -> Letter:
    return parse_options(Letter, list(arguments), prog="letter")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("ann", {"to": "ann"}),
        ("ann bob cid", {"copies": ["bob", "cid"]}),
        ("--to ann --pages 3", {"pages": 3}),
        ("ann --pages=3 --pages=4", {"pages": 4}),
        ("ann --pages none", {"pages": None}),
        ("ann --weight 1e-3", {"weight": 1e-3}),
        ("ann --express", {"express": True}),
        ("--express ann", {"express": True, "to": "ann"}),
        ("--express true ann", {"express": True, "to": "ann"}),
        ("ann --express=false", {"express": False}),
        ("ann --no_signed --no-express", {"signed": False, "express": False}),
        ("ann --stamp-color blue", {"stamp_color": "blue"}),
        ("ann --stamps 1 2 3 --express", {"stamps": [1, 2, 3], "express": True}),
        ("ann --stamps=7 bob", {"stamps": [7], "copies": ["bob"]}),
        ("--text=--x ann", {"text": "--x"}),
        ("ann --text -", {"text": "-"}),
        ("--express -- ann --bob", {"to": "ann", "copies": ["--bob"]}),
    ],
)
def test_a_command_line_is_read(arguments: str, expected: dict[str, Any]) -> None:
    found = parse(*arguments.split())
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ann --page 3", "unknown option 'page'; did you mean 'pages'?"),  # no abbreviations
        ("ann --zzzzzz 3", "unknown option 'zzzzzz'; --help lists the options"),
        ("ann --no_pages", "unknown option 'no_pages'; did you mean 'pages' or 'copies'?"),
        ("ann --pages many", "pages must be an integer, got 'many'"),
        ("ann --pages 0", "pages must be at least 1, got 0"),
        ("ann --express=maybe", "express must be true or false, got 'maybe'"),
        ("ann --stamp_color ble", "unknown stamp_color 'ble'; did you mean 'blue'?"),
        ("ann --text", "text needs a value: --text TEXT"),
        ("ann --text --express", "text needs a value: --text TEXT"),
        ("ann --text --x", "text needs a value: --text TEXT (write --text=--x if --x is the value)"),
        ("ann --to bob", "to is given twice: as 'ann' and by --to"),
        ("ann --stamps", "stamps needs a value: --stamps INTEGER ..."),
        ("--express", "to is missing: give NAME"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse(*arguments.split())


def test_a_file_of_options_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "letter.yaml"
    file.write_text(
        "to: ann\nstamp-color: blue\npages: null\nweight: 1e-4\ntext: 2020-01-01\nstamps: 5\nsigned: null\n"
    )
    found = parse("--config", str(file))
    assert found == Letter(to="ann", stamp_color="blue", pages=None, weight=1e-4, text="2020-01-01", stamps=[5])
    assert parse("bob", f"--config={file}", "--pages=1", "--stamps", "1", "2") == Letter(
        to="bob", stamp_color="blue", pages=1, weight=1e-4, text="2020-01-01", stamps=[1, 2]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pagse: 1", "unknown option 'pagse'; did you mean 'pages'?"),
        ("config: x", "unknown option 'config'"),
        ("pages: many", "pages must be an integer, got 'many'"),
        ("pages: 1.5", "pages must be an integer, got '1.5'"),
        ("pages: [1]", "pages must be an integer, got ['1']"),
        ("pages: true", "pages must be an integer, got 'true'"),
        ("text: [yes]", "text must be text, got ['yes']"),
        ("copies: [null]", "copies must be text, got None"),
        ("pages: !!int x", "is not YAML"),
        ("pages: !!timestamp x", "is not YAML"),
        ("pages: !!bool x", "is not YAML"),
        ("text: " + "[" * 3000, "is not YAML: it is nested too deeply"),
        ("express: 1", "express must be true or false, got '1'"),
        ("stamps: [a]", "stamps must be an integer, got 'a'"),
        ("- a", "must hold 'name: value' lines"),
        ("a: [", "is not YAML"),
        ("", "must hold 'name: value' lines"),
    ],
)
def test_a_wrong_file_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "letter.yaml").write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        parse("ann", f"--config={tmp_path / 'letter.yaml'}")
    (tmp_path / "letter.yaml").write_bytes(b"to: \xff")
    for file in (tmp_path / "letter.yaml", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="cannot be read"):
            parse("ann", f"--config={file}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text: no", {"text": "no"}),
        ("text: 12:30", {"text": "12:30"}),
        ("text: 007", {"text": "007"}),
        ("text: 2020-13-45", {"text": "2020-13-45"}),
        ("text: 'null'", {"text": "null"}),
        ("express: yes\nsigned: off", {"express": True, "signed": False}),
        ("express: 'true'", {"express": True}),
        ("weight: 1e-3\npages: ~", {"weight": 1e-3, "pages": None}),
    ],
)
def test_values_of_a_file_are_read_by_the_type_of_their_option(
    content: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "letter.yaml").write_text(content)
    assert parse("ann", f"--config={tmp_path / 'letter.yaml'}") == Letter(to="ann", **expected)


def test_a_precision_of_no_is_not_false(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mixed_precision: no\nreport_to: none\n")
    options = parse_run_options(["--output_dir=x", "--text_files=a", f"--config={tmp_path / 'run.yaml'}"])
    assert (options.training.mixed_precision, options.training.report_to) == ("no", ["none"])


def test_an_option_replaces_its_alternative_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\ntext_files: [a]\neval_files: [b]\nmax_steps: 3\n")
    asked = [f"--config={file}", "--dataset_name=d", "--dataset_test_split=test", "--num_train_epochs=2"]
    options = parse_run_options(asked)
    assert (options.text.text_files, options.text.dataset_name) == (None, "d")
    assert (options.text.eval_files, options.text.dataset_test_split) == (None, "test")
    assert (options.training.max_steps, options.training.num_train_epochs) == (None, 2.0)
    with pytest.raises(UsageError, match="exactly one of text_files, token_files, dataset_name and mixture"):
        parse_run_options([*asked, "--text_files=c"])
    file.write_text("data: [a]\n")
    options = parse_options(EvaluateOptions, ["m", f"--config={file}", "--tasks", "t"], prog="evaluate")
    assert (options.data, options.tasks) == ([], ["t"])
    file.write_text("output_dir: x\nrows: [a]\nmodel_name_or_path: m\n")
    tuned = parse_finetune_options([f"--config={file}", "--dataset_name=d"])
    assert (tuned.rows.rows, tuned.rows.dataset_name) == (None, "d")
    file.write_text("revision: next\n")
    pushed = parse_options(PushCommandOptions, [".", "a/b", f"--config={file}", "--create_pr"], prog="push")
    assert (pushed.revision, pushed.create_pr) == (None, True)


NEEDED: dict[str, list[str]] = {
    "train": [
        "--output_dir=runs/ü 😀",
        "--text_files",
        "a: b",
        "#c",
        "--recipe=fast",
        "--sample_prompt=\tdef 'x'\n\x85",
    ],
    "plan": ["--text_files", "a: b", "--budget=20m", "--plan_file=b.yaml"],
    "tokenize": ["--text_files", "a: b", "--encoding=gpt2", "--num_shards=4", "--shard_index=3"],
    "finetune": ["--output_dir=x", "--model_name_or_path=m", "--rows", "a", "b", "--learning_rate=1e-7", "--lora_r=4"],
    "inspect": ["a.json", "--truncation=drop"],
    "verify": ["run", "--replay=1:2"],
    "runs": ["here", "--sort=loss"],
    "compare": ["a", "b", "--all"],
    "generate": ["m", "--prompt=null", "--top_k=none"],
    "chat": ["m", "--seed=3"],
    "serve": ["m", "--port=0"],
    "watch": ["r", "s", "--port=8001", "--no_open"],
    "report": ["r", "r.html", "--tokens=0"],
    "play": ["m", "n", "--port=8001", "--no_open"],
    "evaluate": ["m", "a.txt", "--document_separator=\n\n"],
    "check": ["m", "--attention", "eager", "sdpa", "--no_compile_flex"],
    "card": ["run"],
    "push": [".", "a/b", "--private=false"],
    "pull": ["a/b", "folder"],
    "convert": ["a", "b", "--layout=gpt2"],
    "export": ["a", "b.gguf", "--format=gguf"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_is_what_the_command_would_run_with(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = COMMANDS[command].options
    options = parse_options(kind, NEEDED[command], prog=command)
    with pytest.raises(SystemExit) as ended:
        parse_options(kind, [*NEEDED[command], "--print_config"], prog=command)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(printed, encoding="utf-8")
    assert parse_options(kind, [f"--config={tmp_path / 'config.yaml'}"], prog=command) == options
    declared = [each for section in sections_of(kind).values() for each in section.options.values()]
    lines = [line.removeprefix("# ").partition(":")[0] for line in printed.splitlines()]
    assert [line for line in lines if line in {each.name for each in declared}] == [each.name for each in declared]
    comments = " ".join(printed.replace("\n#", "").split())
    assert all(each.help.split()[0] in comments for each in declared)
    assert comments.count("default:") >= sum(not each.required for each in declared)


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_alone_prints_the_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = COMMANDS[command].options
    with pytest.raises(SystemExit) as ended:
        parse_options(kind, ["--print_config"], prog=command)
    assert ended.value.code == 0
    declared = {name: each for section in sections_of(kind).values() for name, each in section.options.items()}
    printed = yaml.safe_load(capsys.readouterr().out)
    defaults = {name: None if each.required else each.default for name, each in declared.items()}
    if command in ("train", "plan"):  # what the recipe sets is left to it
        of_recipe = kind.recipe.values({})
        defaults = {"recipe": "auto", **{name: each for name, each in defaults.items() if name not in of_recipe}}
    assert printed == defaults


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = COMMANDS[command].options
    with pytest.raises(SystemExit) as ended:
        parse_options(kind, ["--help"], prog=f"gpt-kit {command}", about=COMMANDS[command].help())
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 110
    flat = " ".join(shown.split())
    assert flat.startswith(f"usage: gpt-kit {command} ")
    assert COMMANDS[command].summary in flat
    for section in sections_of(kind).values():
        for each in section.options.values():
            assert each.name in shown
            assert " ".join(each.help.split()) in flat
            end = "required)" if each.required else "default: "
            assert end in flat[flat.index(" ".join(each.help.split())) :]


def test_finetuning_has_its_own_defaults_of_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--output_dir=x", "--model_name_or_path=m", "--rows=a"]
    assert parse_finetune_options(needed).optimizer.learning_rate == 3e-4
    assert FinetuneOptions is type(parse_finetune_options(needed))
    with pytest.raises(SystemExit):
        parse_finetune_options(["--help"])
    assert "those of muon_learning_rate (default: 0.0003)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UsageError, match="unknown option 'recipe'"):
        parse_finetune_options([*needed, "--recipe=fast"])


def test_names_are_unique_within_a_command() -> None:
    for command in COMMANDS.values():
        names = [name for section in sections_of(command.options).values() for name in section.options]
        assert len(names) == len(set(names)), command.name
    assert set(flat_options(parse_run_options(["--output_dir=x", "--text_files=a"]))) == {
        f"{section}.{name}" for section, each in sections_of(RunOptions).items() for name in each.options
    }
