"""The `gpt-kit` command line.

Outside the package, and with its imports inside the commands, so that `--help` answers before torch is loaded.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="gpt-kit",
    help="A GPT of one's own, from raw text to a published model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes half of the time that `--help` takes
)

# `train` has its own parser, over the option classes of the package.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def _root() -> None:
    """A GPT of one's own, from raw text to a published model."""


@app.command(context_settings=_PASS_ON, add_help_option=False, short_help="Pretrain a GPT on text.")
def train(context: typer.Context) -> None:
    """Pretrain a GPT on text: --config FILE and --name value; --help lists every option."""
    from gpt_kit_hf.commands.cli import train_command

    raise typer.Exit(train_command(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False, short_help="Tune a model on instruction rows.")
def finetune(context: typer.Context) -> None:
    """Tune a model on instruction rows: --config FILE and --name value; --help lists every option."""
    from gpt_kit_hf.commands.cli import finetune_command

    raise typer.Exit(finetune_command(context.args))


_WEIGHTS_HELP = "same, or, for fewer bytes a token on a CPU, half or int8"


@app.command(short_help="Show which tokens of rows would be trained, and what is wrong.")
def inspect(
    rows: Annotated[list[str], typer.Argument(metavar="DATA...", help=".json, .jsonl (also .gz, .zst) or .parquet")],
    model: Annotated[
        str | None, typer.Option("--model", help="run, folder or Hub id whose tokens to count; bytes if left out")
    ] = None,
    row_format: Annotated[
        str, typer.Option("--format", help="auto (by each row's keys), alpaca, chat or prompt_completion")
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option("--max_length", "--max-length", help="tokens of a row; what the model reads if left out"),
    ] = None,
    truncation: Annotated[
        str, typer.Option("--truncation", help="of a longer row: error, drop or truncate_prompt")
    ] = "error",
    train_on: Annotated[str, typer.Option("--train_on", "--train-on", help="answers or everything")] = "answers",
    skip: Annotated[bool, typer.Option("--skip", help="count rows that cannot be used, do not stop")] = False,
    examples: Annotated[int, typer.Option("--examples", min=0, help="rows to show, trained tokens marked")] = 3,
) -> None:
    """Show which tokens of instruction rows would be trained, and what is wrong with the rows."""
    from gpt_kit_hf.commands.cli import inspect_command

    raise typer.Exit(
        inspect_command(
            rows,
            model=model,
            row_format=row_format,
            max_length=max_length,
            truncation=truncation,
            train_on=train_on,
            skip=skip,
            examples=examples,
        )
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max_new_tokens", "--max-new-tokens", help="most tokens to add; 200, or the room there is"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top_k", "--top-k", help="sample among the k likeliest")] = 50,
    seed: Annotated[int | None, typer.Option("--seed", help="makes a sample repeatable")] = None,
    slide: Annotated[
        bool, typer.Option("--slide", help="go on past the model's context, seeing its end only")
    ] = False,
    weights: Annotated[str, typer.Option("--weights", help=_WEIGHTS_HELP)] = "same",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 and so on")] = "cpu",
) -> None:
    """Stream text that a model continues from a prompt."""
    from gpt_kit_hf.commands.cli import generate_command

    raise typer.Exit(
        generate_command(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            slide=slide,
            weights=weights,
            device=device,
        )
    )


@app.command(short_help="Talk with a model: a line of yours, then its answer.")
def chat(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", help="most tokens of an answer")
    ] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top_k", "--top-k", help="sample among the k likeliest")] = 50,
    seed: Annotated[int | None, typer.Option("--seed", help="makes a sample repeatable")] = None,
    weights: Annotated[str, typer.Option("--weights", help=_WEIGHTS_HELP)] = "same",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 and so on")] = "cpu",
) -> None:
    """Talk with a model: a line of yours, then its answer. A model without a chat template continues your text."""
    from gpt_kit_hf.commands.cli import chat_command

    raise typer.Exit(
        chat_command(
            model,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            weights=weights,
            device=device,
        )
    )


@app.command(short_help="Serve a model by OpenAI's API.")
def serve(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="address to listen at; there is no password, so others than this machine's "
            "own let everyone in who reaches it",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one")] = 8000,
) -> None:
    """Serve a model by OpenAI's API (transformers' own server).

    Requests sample at temperature 1 unless they say otherwise; temperature 0 is greedy. A model without a chat
    template is a completion model: use /v1/completions; /v1/chat/completions continues the messages as one text.
    Needs pip install 'gpt-kit-hf[serve]'.
    """
    from gpt_kit_hf.commands.cli import serve_command

    raise typer.Exit(serve_command(model, host=host, port=port))


@app.command(short_help="Convert to or from GPT-2, or from a hand-written GPT.")
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="model folder, Hub id, or file of weights")],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="folder to write: empty, or not there yet")
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="gpt2: a GPT-2 folder or Hub id; nanogpt, kit: a file of weights (safetensors, or a pickle of "
            "tensors only); to-gpt2: from a folder of this package to one that every reader of GPT-2 loads",
        ),
    ],
    n_head: Annotated[
        int | None, typer.Option("--n_head", "--n-head", help="heads, which no shape tells (nanogpt, kit)")
    ] = None,
    hidden_act: Annotated[
        str | None,
        typer.Option("--hidden_act", "--hidden-act", help="gelu or gelu_new, if not the layout's own (nanogpt, kit)"),
    ] = None,
    eos_token_id: Annotated[
        int | None, typer.Option("--eos_token_id", "--eos-token-id", help="the end of text (nanogpt, kit)")
    ] = None,
    zero_missing_biases: Annotated[
        bool,
        typer.Option(
            "--zero_missing_biases",
            "--zero-missing-biases",
            help="for query, key and value projections without biases beside others with (nanogpt, kit)",
        ),
    ] = False,
    tokenizer_folder: Annotated[
        str | None, typer.Option("--tokenizer_folder", "--tokenizer-folder", help="instead of the source's tokenizer")
    ] = None,
) -> None:
    """Convert a checkpoint of GPT-2 or of a hand-written GPT, or write a model of this package as GPT-2."""
    from gpt_kit_hf.commands.cli import convert_command

    raise typer.Exit(
        convert_command(
            source,
            destination,
            layout=layout,
            n_head=n_head,
            hidden_act=hidden_act,
            eos_token_id=eos_token_id,
            zero_missing_biases=zero_missing_biases,
            tokenizer_folder=tokenizer_folder,
        )
    )


@app.command(short_help="Check a run folder: checkpoints, metrics, receipt.")
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run")],
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay", metavar="FROM:TO", help="compute these steps again and say whether they are identical"
        ),
    ] = None,
) -> None:
    """Check a run folder: every byte of its checkpoints, its metrics, its receipt; ends with 1 if anything differs."""
    from gpt_kit_hf.commands.cli import verify_command

    raise typer.Exit(verify_command(run, steps=replay))


@app.command(short_help="Score a model on text, answers or public benchmarks.")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="text or instruction rows: files or globs, or python-stdlib"),
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="text, rows, or auto: rows where a file's keys say so")] = "auto",
    max_length: Annotated[
        int | None, typer.Option("--max_length", "--max-length", help="tokens of a window; what the model reads")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="tokens between two windows: fewer give each token more context; max_length"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch_size", "--batch-size", help="windows of a pass; no change of the result")
    ] = 8,
    padding_side: Annotated[
        str, typer.Option("--padding_side", "--padding-side", help="right or left; no change of the result")
    ] = "right",
    max_tokens: Annotated[
        int | None, typer.Option("--max_tokens", "--max-tokens", help="score about so many tokens of the text only")
    ] = None,
    text_column: Annotated[
        str, typer.Option("--text_column", "--text-column", help="column or key that holds text")
    ] = "text",
    document_separator: Annotated[
        str | None,
        typer.Option("--document_separator", "--document-separator", help="text that ends a document in a file"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="beginnings to let the model continue, and show")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 and so on")] = "cpu",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="instead of DATA: a task of lm-evaluation-harness; may be repeated (extra: eval)"),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option("--include_path", "--include-path", help="folder of task files of your own")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="examples of each task")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result there too")] = None,
) -> None:
    """Score a model: loss, perplexity and bits per byte of text, or of the answers of instruction rows.

    Each token of a document is scored once, by windows; the score of a run is kept for its card. With --task the
    tasks of lm-evaluation-harness, which give the same number for the same text.
    """
    from gpt_kit_hf.commands.cli import evaluate_command, harness_command

    if tasks:
        if data:
            raise typer.BadParameter("give DATA or --task, not both")
        code = harness_command(
            model,
            tasks,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            json_file=json_file,
        )
        raise typer.Exit(code)
    if not data:
        raise typer.BadParameter("give DATA to score, or --task")
    raise typer.Exit(
        evaluate_command(
            model,
            data,
            kind=kind,
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            padding_side=padding_side,
            max_tokens=max_tokens,
            text_column=text_column,
            document_separator=document_separator,
            samples=samples,
            device=device,
            json_file=json_file,
        )
    )


@app.command(short_help="Write the model card from what the run recorded.")
def card(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run or model")],
    repo: Annotated[
        str | None, typer.Option("--repo", help="the model's id on the Hub, for the lines that load it")
    ] = None,
) -> None:
    """Write RUN/README.md, the model card, from what the run recorded; what a person wrote around it stays."""
    from gpt_kit_hf.commands.cli import card_command

    raise typer.Exit(card_command(run, repo=repo))


@app.command(short_help="Publish a model on the Hub, then fetch it and compare.")
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run or model; left out with --verify_only")],
    repo: Annotated[str | None, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="of a new repository; the account's own default")
    ] = None,
    branch: Annotated[str | None, typer.Option("--branch", help="where the commit goes; main")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull_request", "--pull-request", help="make it a pull request instead")
    ] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="of the commit")] = "Publish the model",
    card: Annotated[
        str | None, typer.Option("--card", help="hub or run: whose words to keep where both cards were edited")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="list the files that would be sent, and send nothing")
    ] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify_only", "--verify-only", help="look only whether REPO is what was published")
    ] = False,
) -> None:
    """Publish a model on the Hub as one commit, with its card; then fetch it again and compare.

    Ends with 1 if what is on the Hub does not load, with this package and without, or is not what was sent.
    """
    from gpt_kit_hf.commands.cli import push_command

    if verify_only:
        raise typer.Exit(push_command(None, repo or run, verify_only=True, branch=branch))
    if repo is None:
        raise typer.BadParameter("give REPO, OWNER/NAME on the Hub")
    raise typer.Exit(
        push_command(
            run,
            repo,
            verify_only=False,
            private=private,
            branch=branch,
            pull_request=pull_request,
            message=message,
            card=card,
            dry_run=dry_run,
        )
    )


@app.command(short_help="Fetch a model from the Hub, every byte checked.")
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="new or empty folder to write")],
    revision: Annotated[str | None, typer.Option("--revision", help="branch, tag or commit; main")] = None,
) -> None:
    """Fetch a model from the Hub, every byte checked; none of its code is run."""
    from gpt_kit_hf.commands.cli import pull_command

    raise typer.Exit(pull_command(repo, folder, revision=revision))


@app.command(short_help="Check that a model answers the same however it is asked.")
def check(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    attention: Annotated[
        list[str] | None,
        typer.Option(
            "--attention", help="eager, sdpa or flex_attention; may be repeated; all that can run if left out"
        ),
    ] = None,
    compile_flex: Annotated[
        bool | None,
        typer.Option(
            "--compile_flex/--no_compile_flex",
            "--compile-flex/--no-compile-flex",
            help="flex attention by torch's kernels (default, but on the CPU), or by plain operations",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="where to ask: cpu, cuda, cuda:1 and so on")] = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="of the random prompts")] = 0,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result there too")] = None,
) -> None:
    """Check that a model gives the same answer however it is asked; ends with 1 if it does not.

    Rows alone, left-padded, right-padded and packed, without a cache, with a dynamic and a static one, in each
    attention, in fp32 and bf16: how far the logits lie from those of the row alone, and whether greedy tokens differ.
    """
    from gpt_kit_hf.commands.cli import check_command

    raise typer.Exit(
        check_command(
            model,
            attention=attention,
            compile_flex=compile_flex,
            device=device,
            seed=seed,
            json_file=json_file,
        )
    )


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
