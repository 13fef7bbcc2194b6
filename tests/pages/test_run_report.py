"""The report of a run: its numbers, what happens where parts are missing, and what must not be in it."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import write_run
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from gpt_kit_hf.commands.main import COMMANDS, main
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.held_out import held_out_text
from gpt_kit_hf.evaluation.passages import scored_passages
from gpt_kit_hf.generation import http_server
from gpt_kit_hf.hub.card.facts import card_facts
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.parser import parse_options
from gpt_kit_hf.pages import report_facts
from gpt_kit_hf.pages.report import write_report
from gpt_kit_hf.storage.run_history import read_run
from gpt_kit_hf.tokenization.encodings import get_encoding

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>"


def options_of(text: Path) -> dict[str, Any]:
    return {"text.text_files": [str(text)], "text.eval_fraction": 0.2, "encoding.encoding": "bytes"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a model, and the text that it was trained on."""
    root = tmp_path_factory.mktemp("reports")
    text = root / "a text.txt"
    text.write_text("".join(f"Line {i}: the sea and the king, é and {i * i}.\n" for i in range(60)))
    folder = write_run(root / "mine", 40, options=options_of(text))
    write_tiny_model(folder)
    encoding = get_encoding("bytes")
    held_out = prepare_corpus(TextOptions(text_files=[str(text)], eval_fraction=0.2), encoding, seed=0).eval
    change(folder, eval_fingerprint=held_out.fingerprint(), max_length=32)
    return root


def tags_of(page: str) -> list[tuple[str, list[str]]]:
    """Return the elements of a page, as a browser would find them, with the names of their attributes."""
    found: list[tuple[str, list[str]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, [name for name, _ in attrs]))

    Parser().feed(page)
    return found


def change(folder: Path, **values: Any) -> None:
    record = folder / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | values))


def written(folder: Path, file: Path, **changes: Any) -> str:
    chosen: dict[str, Any] = {"text_files": None, "tokens": 200, "device": "cpu", "announce": lambda line: None}
    write_report(folder, file, **chosen | changes)
    return file.read_text()


def test_the_held_out_text_is_that_of_the_run(root: Path) -> None:
    run = read_run(root / "mine")
    stream = held_out_text(run.options, run.record, get_encoding("bytes"))
    assert stream.fingerprint() == run.record["eval_fingerprint"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text.text_files": ["nowhere.txt"]}, "cannot be read again"),
        ({"text.eval_fraction": 0.3}, "has changed"),
        ({"text.text_files": None}, "was not trained on text"),
        ({"text.text_files": ["s3://b/x.txt"]}, "is behind a URL"),
        ({"text.text_files": None, "text.dataset_name": "a/b"}, "was evaluated on a dataset"),
    ],
)
def test_a_text_that_is_not_the_runs_is_refused(root: Path, changed: dict[str, Any], message: str) -> None:
    run = read_run(root / "mine")
    with pytest.raises(UsageError, match=message):
        held_out_text({**run.options, **changed}, run.record, get_encoding("bytes"))


def test_passages_are_what_a_plain_forward_pass_says(root: Path) -> None:
    run, encoding = read_run(root / "mine"), get_encoding("bytes")
    stream = held_out_text(run.options, run.record, encoding)
    model = AutoModelForCausalLM.from_pretrained(root / "mine").eval()
    passages = scored_passages(model, stream, encoding, tokens=10**6, max_length=32)
    # All of the text, in its order; \xNN stands for a byte that is no character.
    text = "".join(token.text for passage in passages for token in passage.tokens)
    ids = [token for token in stream.read(0, len(stream)).tolist() if token != 256]
    assert text.encode().decode("unicode_escape").encode("latin-1") == bytes(ids)
    place = 0
    for passage in passages:
        before = 256 if passage.before == "<|endoftext|>" else ids[place - 1]
        scored = ids[place : place + len(passage.tokens)]
        if before == 256 or len(scored) == 32:  # the last window of a document has context that is not shown
            with torch.no_grad():
                logprobs = model(torch.tensor([[before, *scored]])).logits[0].log_softmax(-1)
            for position, (token, found) in enumerate(zip(scored, passage.tokens, strict=True)):
                assert found.logprob == pytest.approx(float(logprobs[position, token]), abs=1e-5)
                assert found.rank == 1 + int((logprobs[position] > logprobs[position, token]).sum())
                assert found.likeliest[0][1] == pytest.approx(math.exp(float(logprobs[position].max())), abs=1e-5)
        place += len(passage.tokens)
    assert len({passage.before for passage in passages}) > 1


def test_the_report_has_the_numbers_of_the_run(root: Path) -> None:
    page = written(root / "mine", root / "report.html")
    metrics = [json.loads(line) for line in (root / "mine" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in metrics if line["kind"] == "eval"][-1]
    assert f"{last['bits_per_byte']:.4f}" in page
    assert "gzip -9, on the same text" in page
    assert all(f"text of step {step}" in page for step in (10, 20, 30, 40))
    data = json.loads(re.search(r'id="curve-data">(.*?)</script>', page)[1])  # type: ignore[index]
    losses = [line["loss"] for line in metrics if line["kind"] == "train"]
    assert data["curves"]["train"]["series"]["loss"]["value"] == pytest.approx(losses, rel=1e-6)
    shown = [float(value) for value in re.findall(r'class="s\d" data-logprob="([-.\d]+)"', page)]
    assert f"the loss is {-sum(shown) / len(shown):.4f} nats" in page
    assert 150 < len(shown) < 300
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")  # no network


def test_two_reports_are_equal_and_show_no_path(root: Path) -> None:
    first = written(root / "mine", root / "first.html")
    assert first == written(root / "mine", root / "second.html")
    assert str(root) not in first
    assert "a text.txt" in first


def test_text_is_shown_as_text(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine & <b>yours"
    shutil.copytree(root / "mine", folder)
    line = {"kind": "sample", "step": 41, "prompt": ATTACK, "text": ATTACK}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (tmp_path / "attack.txt").write_text(ATTACK * 3)
    page = written(folder, tmp_path / "report.html", text_files=[str(tmp_path / "attack.txt")])
    tags = tags_of(page)
    assert [name for name, _ in tags if name in ("script", "img", "b", "style")].count("script") == 2
    assert not [name for name, _ in tags if name in ("img", "iframe", "object", "link")][1:]  # the empty icon
    assert not any(each.startswith("on") for _, attributes in tags for each in attributes)
    assert "<" not in re.search(r'id="curve-data">(.*?)</script>', page)[1]  # type: ignore[index]
    assert ATTACK in html.unescape(re.sub("<[^>]*>", "", page))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]  # type: ignore[index]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_run_without_a_model_or_its_text(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    page = written(write_run(tmp_path / "bare", 30, planned=60), tmp_path / "a.html", announce=said.append)
    assert len(said) == 1
    assert str(tmp_path / "bare") in said[0]  # the reason in full
    assert "Not shown: the folder of the run holds no model that can be loaded." in page
    assert str(tmp_path) not in page
    assert "interrupted after step 30 of 60" in page
    shutil.copytree(root / "mine", tmp_path / "mine")
    change(tmp_path / "mine", eval_fingerprint="other")
    assert "Not shown: the text of the run has changed" in written(tmp_path / "mine", tmp_path / "b.html")
    with pytest.raises(UsageError, match="no such file"):
        written(tmp_path / "mine", tmp_path / "c.html", text_files=["nowhere.txt"])
    assert not (tmp_path / "c.html").exists()


def test_what_is_said_of_its_use_works(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = card_facts(root / "mine")
    monkeypatch.chdir(root)
    values = report_facts.values(read_run(root / "mine"), facts)
    for line in values["commands"].splitlines():
        program, name, *arguments = shlex.split(line, comments=True)
        assert program == "gpt-kit"
        assert parse_options(COMMANDS[name].options, arguments, prog=name) is not None
    exec(values["code"], {})
    assert len(capsys.readouterr().out) > 10


def test_a_failed_run_shows_no_path_of_its_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, planned=60)
    change(folder, sessions=[{"after_step": 0, "error": "OSError: /home/me/x is gone"}])
    page = written(folder, tmp_path / "report.html")
    assert "stopped with an error" in page
    assert "OSError" in page
    assert "/home/me" not in page


def test_a_report_names_the_extra_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_server, "_PACKAGES", ("no_such_package",))
    assert main(["report", str(write_run(tmp_path / "run", 10))]) == 2
    assert (
        "the report needs packages that are not installed: pip install 'gpt-kit-hf[play]'" in capsys.readouterr().err
    )


def test_only_a_report_is_replaced(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = str(root / "mine"), tmp_path / "report.html"
    file.write_text("<p>mine</p>")
    assert main(["report", run, str(file)]) == 2
    assert "exists and is no report; nothing is overwritten" in capsys.readouterr().err
    assert file.read_text() == "<p>mine</p>"
    file.unlink()
    assert main(["report", run, str(file), "--tokens", "0"]) == 0
    first = file.read_bytes()
    assert main(["report", run, str(file), "--tokens=0"]) == 0
    assert file.read_bytes() == first
    assert main(["report", run, str(tmp_path)]) == 2
    assert main(["report", run, str(tmp_path / "no" / "r.html")]) == 2
    assert main(["report", run, "--tokens=0"]) == 0
    assert (root / "mine" / "report.html").read_bytes() == first
