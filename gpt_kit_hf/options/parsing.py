"""Options from a YAML file and the command line, the latter winning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from gpt_kit_hf.data.instructions.reader import RowOptions
from gpt_kit_hf.data.instructions.tokenized import SupervisionOptions
from gpt_kit_hf.data.text.corpus import EncodingOptions
from gpt_kit_hf.data.text.sources import TextOptions
from gpt_kit_hf.data.text.windows import WindowOptions
from gpt_kit_hf.errors import UsageError, one_line, unknown_name
from gpt_kit_hf.model.presets import ModelOptions
from gpt_kit_hf.training.finetune import BaseOptions, FinetuneOptions, finetuning_optimizer
from gpt_kit_hf.training.lora import AdapterOptions
from gpt_kit_hf.training.optim.optimizer import OptimizerOptions, recipe_options
from gpt_kit_hf.training.run_options import RunOptions, TrainingOptions

_ALTERNATIVES = [
    ("max_steps", "epochs"),
    ("text_files", "dataset_name", "mixture"),
    ("rows", "rows_dataset"),
    ("eval_files", "eval_split"),
]


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """Says what is wrong in one line, as the rest of the package does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_run_options(arguments: Sequence[str], prog: str = "gpt-kit train") -> RunOptions:
    """Return the options that `arguments` ask for: `--config FILE` and `--name value` for any of them.

    `--help` prints every option with its default and exits. Raises UsageError for an unknown name, with the nearest
    one, and for a value that is not allowed.
    """
    rooms = (TrainingOptions, TextOptions, EncodingOptions, WindowOptions, ModelOptions, OptimizerOptions)
    parser = _Parser(rooms, prog=prog, allow_abbrev=False, description="Pretrain a GPT on text.")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="plain, or fast: Muon and a schedule that falls along a line, as defaults of the optimizer's options",
    )
    training, text, encoding, windows, model, optimizer = _parsed(parser, arguments)
    return RunOptions(
        training=training, text=text, encoding=encoding, windows=windows, model=model, optimizer=optimizer
    )


def parse_finetune_options(arguments: Sequence[str], prog: str = "gpt-kit finetune") -> FinetuneOptions:
    """Return the options of an instruction-tuning run, as `parse_run_options` does those of pretraining."""
    rooms = (TrainingOptions, BaseOptions, RowOptions, SupervisionOptions, AdapterOptions, OptimizerOptions)
    parser = _Parser(rooms, prog=prog, allow_abbrev=False, description="Tune a model on instruction rows.")
    parser.set_defaults(**dataclasses.asdict(finetuning_optimizer()))
    training, base, rows, supervision, adapter, optimizer = _parsed(parser, arguments)
    return FinetuneOptions(
        training=training, base=base, rows=rows, supervision=supervision, adapter=adapter, optimizer=optimizer
    )


def _parsed(parser: _Parser, arguments: Sequence[str]) -> list[Any]:
    """Return an instance of each of the parser's option classes."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    names = [action.dest for action in parser._actions if action.dest != "help"]
    config = _value_of("--config", arguments)
    from_file = _arguments_of_file(Path(config), names, _replaced(arguments)) if config else []
    recipe = _value_of("--recipe", [*from_file, *arguments]) if "recipe" in names else None
    if recipe is not None:
        parser.set_defaults(**recipe_options(recipe))
    *rooms, rest, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        first = unknown[0]
        if first.startswith("--"):
            raise UsageError(unknown_name("option", first.split("=")[0].lstrip("-").replace("-", "_"), names))
        raise UsageError(f"unexpected argument {first!r}: options are given as --name value")
    del rest  # the namespace of --config and --recipe
    return list(rooms)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the last value of an option that must be known before the rest is parsed."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise UsageError(f"argument {option}: expected one value")
            found = arguments[index + 1]
        elif argument.startswith(f"{option}="):
            found = argument.removeprefix(f"{option}=")
    return found


def _replaced(arguments: Sequence[str]) -> set[str]:
    """Return the options of which the command line gives the alternative: it wins over a file in these, too."""
    given = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"}
    return {name for group in _ALTERNATIVES for name in group if name not in given and given.intersection(group)}


def _arguments_of_file(file: Path, names: Sequence[str], replaced: set[str]) -> list[str]:
    """Return a YAML file's options as arguments, but those `replaced`, so that one parser checks both."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {str(file)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config {str(file)!r} is not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"config {str(file)!r} must hold 'name: value' lines")
    arguments: list[str] = []
    for name, value in values.items():
        if name not in names or name == "config":
            raise UsageError(f"config {str(file)!r}: {unknown_name('option', str(name), names)}")
        if name not in replaced:
            arguments += _as_arguments(name, value)
    return arguments


def _as_arguments(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
