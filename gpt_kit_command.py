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
)

# `train` has its own parser, over the option classes of the package.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def _root() -> None:
    """A GPT of one's own, from raw text to a published model."""


@app.command(context_settings=_PASS_ON, add_help_option=False, short_help="Pretrain a GPT on text.")
def train(context: typer.Context) -> None:
    """Pretrain a GPT on text: --config FILE and --name value; --help lists every option."""
    from gpt_kit_hf.cli import train_command

    raise typer.Exit(train_command(context.args))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="folder of a run or model, or a Hub id")],
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", help="most tokens to add")
    ] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top_k", "--top-k", help="sample among the k likeliest")] = 50,
    seed: Annotated[int | None, typer.Option("--seed", help="makes a sample repeatable")] = None,
    slide: Annotated[
        bool, typer.Option("--slide", help="go on past the model's context, seeing its end only")
    ] = False,
) -> None:
    """Stream text that a model continues from a prompt."""
    from gpt_kit_hf.cli import generate_command

    raise typer.Exit(
        generate_command(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            slide=slide,
        )
    )


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
