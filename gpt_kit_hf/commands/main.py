"""The entry point of `gpt-kit`: the table of its commands.

A command line is parsed, and the files that it names are looked for, before the command's module is imported: help and
refusals do not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from gpt_kit_hf.commands.checks import check_options
from gpt_kit_hf.commands.running import (
    USAGE_ERROR,
    announce_loading,
    check_arguments,
    escape_what_cannot_be_shown,
    quiet_libraries,
    run_command,
    to_output,
    write,
)
from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.options.evaluation import (
    CheckOptions,
    CompareOptions,
    EvaluateOptions,
    InspectOptions,
    ReportOptions,
    RunsOptions,
    VerifyOptions,
    WatchOptions,
)
from gpt_kit_hf.options.generation import ChatCommandOptions, GenerateOptions, PlayOptions, ServeOptions
from gpt_kit_hf.options.hub import CardOptions, ExportOptions, PullOptions, PushCommandOptions
from gpt_kit_hf.options.model import ConvertOptions
from gpt_kit_hf.options.parser import parse_options
from gpt_kit_hf.options.run import FinetuneOptions, PlanOptions, RunOptions, TokenizeOptions

ABOUT = "Train, evaluate, use and publish a GPT of your own."


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its options, and the function of a module in this folder that takes them."""

    name: str
    summary: str
    options: type
    module: str
    about: str = ""

    def help(self) -> str:
        """Return what the command does."""
        return f"{self.summary} {self.about}".strip()

    def run(self, options: object) -> None:
        """Import the command's module and run the command."""
        if isinstance(options, (RunOptions, FinetuneOptions)):
            announce_loading(options)
        function = getattr(import_module(f"gpt_kit_hf.commands.{self.module}"), self.name)
        quiet_libraries()
        function(options)


COMMANDS = {
    command.name: command
    for command in (
        Command(name="train", summary="Pretrain a GPT on text.", options=RunOptions, module="train"),
        Command(
            name="plan",
            summary="Plan a run that takes a given time: shape, length, vocabulary, rates; and what to expect.",
            about="Reads the text, times steps of a few shapes on this machine, prints a page, and writes a file for "
            "gpt-kit train --config. Options that are given stay. gpt-kit train --budget plans and trains in one.",
            options=PlanOptions,
            module="train",
        ),
        Command(
            name="tokenize",
            summary="Tokenize a text before training, without a GPU, on one machine or several.",
            about="gpt-kit train with the same text, encoding and token_cache_dir then tokenizes nothing.",
            options=TokenizeOptions,
            module="data",
        ),
        Command(
            name="finetune",
            summary="Finetune a model on instruction rows.",
            options=FinetuneOptions,
            module="train",
        ),
        Command(
            name="inspect",
            summary="Show which tokens of instruction rows would be trained, and which rows are invalid.",
            options=InspectOptions,
            module="data",
        ),
        Command(
            name="verify",
            summary="Check a run folder: checkpoints, metrics and model files.",
            about="Exits with 1 if anything differs from what the run wrote.",
            options=VerifyOptions,
            module="train",
        ),
        Command(
            name="runs",
            summary="List runs: state, steps, scores, size and date.",
            about="A run is running, finished, interrupted (--resume continues it) or failed.",
            options=RunsOptions,
            module="runs",
        ),
        Command(
            name="compare",
            summary="Compare runs: the options and results in which they differ, side by side.",
            options=CompareOptions,
            module="runs",
        ),
        Command(name="generate", summary="Generate text from a prompt.", options=GenerateOptions, module="generate"),
        Command(
            name="chat",
            summary="Chat with a model in the terminal.",
            about="A model without a chat template continues your text.",
            options=ChatCommandOptions,
            module="generate",
        ),
        Command(
            name="serve",
            summary="Serve a model over an OpenAI-compatible HTTP API.",
            about="Needs the extra serve. Requests are sampled at temperature 1 unless they or the model's "
            "generation_config.json set one; 0 always takes the most likely token. A parameter that is not supported "
            "is refused. For a model without a chat template use /v1/completions.",
            options=ServeOptions,
            module="generate",
        ),
        Command(
            name="play",
            summary="Look into models on a page: what they expect at each token, and why.",
            about="Needs the extra play. The page shows probabilities, sampling, attention, the logit lens and the "
            "loss of a text, compares two models or checkpoints, and generates. Only this machine can open it.",
            options=PlayOptions,
            module="generate",
        ),
        Command(
            name="evaluate",
            summary="Evaluate a model: loss, perplexity and bits per byte of text or answers, or benchmark tasks.",
            about="Every token of a document is scored once. The scores of a run are kept for its model card.",
            options=EvaluateOptions,
            module="evaluate",
        ),
        Command(
            name="check",
            summary="Check that a model gives the same answers with any batching, cache and attention.",
            about="Compares rows alone, padded and packed, without a cache and with a dynamic or static one, for each "
            "attention implementation, in fp32 and bf16. Exits with 1 if logits or greedy tokens differ.",
            options=CheckOptions,
            module="evaluate",
        ),
        Command(
            name="watch",
            summary="Watch the curves of runs on a page, while they train or later.",
            about="Shows losses, bits per byte, learning rate, gradient norm, speed, memory, samples and options. It "
            "reads the run folders, and writes nothing there. Only this machine can open the page. Needs the extra "
            "play.",
            options=WatchOptions,
            module="watch",
        ),
        Command(
            name="report",
            summary="Write all that is known of a run into one HTML file.",
            about="The file needs no network, and shows no path of this machine. Needs the extra play.",
            options=ReportOptions,
            module="watch",
        ),
        Command(
            name="card",
            summary="Write the model card of a run, RUN/README.md.",
            about="Text that you wrote outside of the generated blocks is kept.",
            options=CardOptions,
            module="publish",
        ),
        Command(
            name="push",
            summary="Publish a model on the Hub, then download it and compare.",
            about="Exits with 1 if what is on the Hub differs from what was sent, or cannot be loaded.",
            options=PushCommandOptions,
            module="publish",
        ),
        Command(
            name="pull",
            summary="Download a model from the Hub and check every file.",
            about="None of its code is run.",
            options=PullOptions,
            module="publish",
        ),
        Command(
            name="convert",
            summary="Convert a checkpoint from GPT-2, Llama, Qwen3 or a hand-written GPT, or to GPT-2.",
            options=ConvertOptions,
            module="export",
        ),
        Command(
            name="export",
            summary="Write a model for programs that do not know this package.",
            about="A model that the format cannot hold exactly is refused. What was written is then compared.",
            options=ExportOptions,
            module="export",
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of the process; return the exit code."""
    escape_what_cannot_be_shown()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("--help", "-h"):
        return run_command(lambda: write(_overview())) or (0 if given else USAGE_ERROR)
    if given[0] == "--version":
        return run_command(lambda: write(f"gpt-kit {version('gpt-kit-hf')}\n"))
    return run_command(lambda: _run(given[0], given[1:]))


def _run(name: str, arguments: Sequence[str]) -> None:
    check_arguments([name, *arguments])
    if name not in COMMANDS:
        raise UsageError(unknown_name("command", name, COMMANDS))
    command = COMMANDS[name]
    with to_output():  # of --help
        options: object = parse_options(command.options, arguments, prog=f"gpt-kit {name}", about=command.help())
    check_options(options)
    command.run(options)


def _overview() -> str:
    lines = [f"  {command.name:<10}{command.summary}" for command in COMMANDS.values()]
    end = "gpt-kit COMMAND --help lists its options, gpt-kit --version prints the version."
    return "\n".join(["usage: gpt-kit COMMAND ...", "", ABOUT, "", *lines, "", end, ""])


if __name__ == "__main__":
    sys.exit(main())
