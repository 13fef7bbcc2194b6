"""What the commands of `gpt-kit` do; their names and options are in `gpt_kit_command`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.data.instructions.inspect import inspect_rows
from gpt_kit_hf.data.instructions.reader import RowOptions
from gpt_kit_hf.data.instructions.tokenized import SupervisionOptions
from gpt_kit_hf.errors import CheckpointError, GPTKitError, StoppedError, UsageError, one_line
from gpt_kit_hf.evaluation.invariance import check_invariance
from gpt_kit_hf.evaluation.score import ScoreOptions, score_model
from gpt_kit_hf.generation.chat import ChatOptions, Conversation, converse
from gpt_kit_hf.generation.fast_decoder import Decoder, DecodingWeights
from gpt_kit_hf.generation.generate import stream_text
from gpt_kit_hf.hub.card.card import write_card
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_part, model_length, put_on
from gpt_kit_hf.hub.push import PushOptions, pull_model, push_to_hub
from gpt_kit_hf.hub.verify import GateReport, verify_publication
from gpt_kit_hf.model.conversion import Activation, Layout, convert_checkpoint
from gpt_kit_hf.options.parsing import parse_finetune_options, parse_run_options
from gpt_kit_hf.storage.atomic_files import save_json
from gpt_kit_hf.storage.run_folder import INVARIANCE_FILE, holds_run
from gpt_kit_hf.text import printable
from gpt_kit_hf.tokenization.encodings import text_to_token_ids
from gpt_kit_hf.training.finetune import finetune
from gpt_kit_hf.training.pretrain import train
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED
from gpt_kit_hf.training.verify import verify_run

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
_TOKENS_COMPARED = 128  # by which --weights shows what it costs
_TOKENS = 200  # what generate adds if nobody says how many


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; an error that has a name here is one line, not a traceback."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # The bars of saving and loading a small model only break the lines of the run.
    transformers.utils.logging.disable_progress_bar()
    try:
        command()
    except UsageError as error:
        return _fail(error, USAGE_ERROR)
    except StoppedError as error:
        return _fail(error, EXIT_STOPPED)
    except (GPTKitError, OSError) as error:
        return _fail(error, FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return 0


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {one_line(error)}\n")
    return code


def train_command(arguments: Sequence[str]) -> int:
    """Pretrain a GPT as the arguments say."""
    return run_command(lambda: train(parse_run_options(arguments), stream=sys.stdout))


def finetune_command(arguments: Sequence[str]) -> int:
    """Tune a model on instruction rows as the arguments say."""
    return run_command(lambda: finetune(parse_finetune_options(arguments), stream=sys.stdout))


def inspect_command(
    rows: Sequence[str],
    *,
    model: str | None,
    row_format: str,
    max_length: int | None,
    truncation: str,
    train_on: str,
    skip: bool,
    examples: int,
) -> int:
    """Show what of instruction rows would be trained: `inspect_rows`; fails if nothing would be."""

    def inspect() -> None:
        # Other names than these are refused there.
        chosen: dict[str, Any] = {"format": row_format, "truncation": truncation, "train_on": train_on}
        source = RowOptions(rows=list(rows), on_bad_row="skip" if skip else "stop")
        length = model_length(model) if max_length is None else max_length
        report = inspect_rows(source, SupervisionOptions(max_length=length, **chosen), model=model, examples=examples)
        _write(report.text(color=sys.stdout.isatty()) + "\n")
        report.check()

    return run_command(inspect)


def generate_command(
    place: str,
    prompt: str,
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    slide: bool,
    weights: str = "same",
    device: str = "cpu",
) -> int:
    """Stream text that a run's, a folder's or a Hub repository's model continues from the prompt.

    Without `max_new_tokens` it is 200 tokens, or as many as the model's context has room for.
    """

    def generate() -> None:
        model, tokenizer = _load(place, device)
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise UsageError(f"seed must be at least 0 and below 2**63, got {seed}")
            torch.manual_seed(seed)
        # A text without a prompt begins where documents begin.
        start = prompt or (tokenizer.bos_token or "")
        prompt_tokens = text_to_token_ids(start, tokenizer).shape[1]
        room = model.config.max_position_embeddings - prompt_tokens
        wanted = (_TOKENS if slide else max(1, min(_TOKENS, room))) if max_new_tokens is None else max_new_tokens
        if wanted > room and not slide:
            raise UsageError(
                f"the prompt's {prompt_tokens} tokens and {wanted} more exceed the model's context, "
                f"max_position_embeddings={model.config.max_position_embeddings}: lower --max_new_tokens, or --slide"
            )
        precision = cast("DecodingWeights", weights)  # other names are refused there
        _write(prompt)
        text = stream_text(
            model,
            tokenizer,
            start,
            max_new_tokens=wanted,
            temperature=temperature,
            top_k=top_k,
            overflow="slide" if slide else "error",
            weights=precision,
            on_text=_write,
        )
        _write("\n")
        if precision != "same":
            ids = text_to_token_ids(start + text, tokenizer)[:, -_TOKENS_COMPARED:]
            divergence, same = Decoder(model, precision).divergence(ids)
            _note(
                f"weights in {weights}: KL divergence from the model's own predictions {divergence:.2g} nats a token, "
                f"the same likeliest token at {same:.1%} of the last {ids.shape[1]}"
            )

    return run_command(generate)


def chat_command(
    place: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    weights: str = "same",
    device: str = "cpu",
) -> int:
    """Talk with a run's, a folder's or a Hub repository's model: lines from standard input, answers on the output."""

    def chat() -> None:
        precision = cast("DecodingWeights", weights)
        options = ChatOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, weights=precision)
        model, tokenizer = _load(place, device)
        if seed is not None:
            torch.manual_seed(seed)
        kind = "no chat template: it continues your text" if tokenizer.chat_template is None else "chat template"
        _note(f"{place} ({kind}). /clear forgets what was said, /exit or Ctrl-D ends.")
        try:
            converse(Conversation(model, tokenizer, options), _read_lines(), _write, _note)
        except KeyboardInterrupt:  # the way out in the middle of an answer
            _write("\n")

    return run_command(chat)


def serve_command(place: str, *, host: str, port: int) -> int:
    """Serve a run's, a folder's or a Hub repository's model by OpenAI's API until interrupted."""
    # Not before: it imports the command line of transformers, which nothing else here needs.
    from gpt_kit_hf.generation.server import serve

    return run_command(lambda: serve(place, host=host, port=port, announce=lambda line: _write(f"{line}\n")))


def convert_command(source: str, destination: str, *, layout: str, hidden_act: str | None, **options: Any) -> int:
    """Write the model in `source` to the folder `destination`; the options are those of `convert_checkpoint`."""

    def convert() -> None:
        # Other names than these are refused there.
        activation = cast("Activation | None", hidden_act)
        convert_checkpoint(source, destination, cast(Layout, layout), hidden_act=activation, **options)
        _write(f"{destination} holds the model now\n")

    return run_command(convert)


def verify_command(run: str, *, steps: str | None) -> int:
    """Show whether a run folder is what its run wrote: `verify_run`, `replay_steps`; fails if not."""

    def verify() -> None:
        folder = Path(run)
        found = verify_run(folder)
        for line in [*found.lines, *(f"FAULT  {problem}" for problem in found.problems)]:
            _write(f"{line}\n")
        if found.problems:
            raise CheckpointError(f"{run}: {len(found.problems)} faults, the first: {found.problems[0]}")
        if steps is not None:
            first, _, last = steps.partition(":")
            if not (first.isdecimal() and last.isdecimal()):
                raise UsageError(f"replay must be FROM:TO, two step numbers, got {steps!r}")
            replayed = replay_steps(folder, int(first), int(last), log=_note)
            if replayed.difference:
                raise CheckpointError(replayed.difference)
            _write(f"{replayed.text()}\n")

    return run_command(verify)


def evaluate_command(place: str, data: Sequence[str], *, json_file: str | None, **options: Any) -> int:
    """Show what a model scores on text or rows: `score_model`; the options are those of `ScoreOptions`."""

    def evaluate() -> None:
        report = score_model(place, ScoreOptions(data=list(data), **options))
        _write(report.text() + "\n")
        if json_file is not None:
            save_json(Path(json_file), report.to_dict())

    return run_command(evaluate)


def harness_command(place: str, tasks: Sequence[str], *, json_file: str | None, **options: Any) -> int:
    """Show what a model scores on tasks of lm-evaluation-harness: `run_harness`."""
    # Not before: it is an extra, and its import is slow.
    from gpt_kit_hf.evaluation.lm_eval import run_harness

    def evaluate() -> None:
        report = run_harness(place, tasks, **options)
        _write(report.text() + "\n")
        if json_file is not None:
            save_json(Path(json_file), report.results)

    return run_command(evaluate)


def card_command(run: str, *, repo: str | None) -> int:
    """Write the card of a run: `write_card`."""

    def card() -> None:
        written = write_card(Path(run), repo=repo)
        _write(f"{written.path} is up to date\n")
        if written.kept is not None:
            parts = ", ".join(written.edited)
            _note(f"edited between the marks, and renewed: {parts}; the card as it was is {written.kept}")

    return run_command(card)


def push_command(run: str | None, repo: str, *, verify_only: bool, **options: Any) -> int:
    """Publish a run: `push_to_hub`; or look only whether what is published is what was: `verify_publication`."""

    def push() -> None:
        if verify_only:
            gate = verify_publication(repo, options["branch"])
            for difference in gate.differences:
                _write(f"FAULT  {difference}\n")
            gate.require()
            _write(_gate_lines(gate))
            return
        assert run is not None
        done = push_to_hub(run, repo, PushOptions(**options), log=_note)
        if done.verification is None:
            lines = [f"would send    {size / 1e6:9.3f} MB  {name}" for name, size in done.sent.items()]
            lines += [f"would remove  {'':12}  {name}" for name in done.removed]
            _write("\n".join([*lines, f"{len(done.sent)} files, {sum(done.sent.values()) / 1e6:.1f} MB"]) + "\n")
            return
        what = f"{len(done.sent)} files sent" if done.sent or done.removed else "it was there already"
        _write(f"{done.url}\n{what}\n{_gate_lines(done.verification)}")

    return run_command(push)


def _gate_lines(gate: GateReport) -> str:
    return f"{gate.repo} at {gate.commit[:12]} is what was published: {'; '.join(gate.checks)}\n"


def pull_command(repo: str, folder: str, *, revision: str | None) -> int:
    """Fetch a model from the Hub into a folder, every byte checked: `pull_model`."""
    return run_command(lambda: _write(f"{pull_model(repo, folder, revision=revision)} holds the model now\n"))


def check_command(
    place: str,
    *,
    attention: Sequence[str] | None,
    compile_flex: bool | None,
    device: str,
    seed: int,
    json_file: str | None,
) -> int:
    """Show whether a model's answers depend on how it is asked: `check_invariance`; fails if any cell does."""

    def check() -> None:
        model = load_part(AutoModelForCausalLM, find_model_folder(place), place)
        put_on(model, device)
        report = check_invariance(
            model, attention=attention or None, compile_flex=compile_flex, seed=seed, announce=_note
        )
        _write(report.table() + "\n")
        if json_file is not None:
            save_json(Path(json_file), report.to_dict())
        if Path(place).is_dir() and holds_run(Path(place)):
            save_json(Path(place) / INVARIANCE_FILE, report.to_dict())  # for its card
        if not report.holds:
            raise GPTKitError(f"{report.verdict()}: {', '.join(cell.name for cell in report.failures)}")

    return run_command(check)


def _load(place: str, device: str) -> tuple[Any, Any]:
    """Return the model of a run, a folder or a Hub repository, on the device, and its tokenizer."""
    folder = find_model_folder(place)
    tokenizer = load_part(AutoTokenizer, folder, place)
    model = load_part(AutoModelForCausalLM, folder, place)
    check_tokenizer(folder, model.config)
    put_on(model, device)
    return model, tokenizer


def _read_lines() -> Iterator[str]:
    """Yield the lines of the standard input, asked for where a person types them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # or bytes that are no text end the conversation
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a line to edit and a history)
    try:
        while True:
            yield input("> ")
    except EOFError:
        _write("\n")


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
