"""`gpt-kit push`, `pull` and `card`."""

from __future__ import annotations

from pathlib import Path

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.hub.card.card import write_card
from gpt_kit_hf.hub.push import pull_model, push_to_hub
from gpt_kit_hf.hub.verify import VerificationReport, verify_publication
from gpt_kit_hf.options.hub import CardOptions, PullOptions, PushCommandOptions


def card(options: CardOptions) -> None:
    """Write the model card of a run."""
    written = write_card(Path(options.run), repo=options.repo)
    write(f"{written.path} is up to date\n")
    if written.kept is not None:
        blocks = ", ".join(written.edited)
        note(f"edited generated blocks were renewed: {blocks}; the card as it was is {written.kept}")


def push(options: PushCommandOptions) -> None:
    """Publish a run, or verify what was published."""
    if options.verify_only:
        verified = verify_publication(options.repo or options.run, options.revision)
        for difference in verified.differences:
            write(f"FAULT  {difference}\n")
        verified.require()
        write(_verification(verified))
        return
    assert options.repo is not None
    done = push_to_hub(options.run, options.repo, options, log=note)
    if done.verification is None:
        lines = [f"would send    {size / 1e6:9.3f} MB  {name}" for name, size in done.sent.items()]
        lines += [f"would remove  {'':12}  {name}" for name in done.removed]
        write("\n".join([*lines, f"{len(done.sent)} files, {sum(done.sent.values()) / 1e6:.1f} MB"]) + "\n")
        return
    changed = f"{len(done.sent)} files sent" if done.sent or done.removed else "nothing to send: it was there already"
    write(f"{done.url}\n{changed}\n{_verification(done.verification)}")


def _verification(verified: VerificationReport) -> str:
    return f"{verified.repo} at {verified.commit[:12]} is what was published: {'; '.join(verified.checks)}\n"


def pull(options: PullOptions) -> None:
    """Download a model from the Hub into a folder."""
    write(f"the model was written to {pull_model(options.repo, options.folder, revision=options.revision)}\n")
