"""Model cards: they show what the run recorded and nothing else, and keep hand-written text."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard import metadata_eval_result
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from gpt_kit_hf import check_invariance, finetune, parse_finetune_options, parse_run_options, train
from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.card.card import CARD_FILE, card_facts, edited_blocks, render_card, without_generated, write_card
from gpt_kit_hf.hub.card.markdown import command_lines
from gpt_kit_hf.hub.card.options import as_id, shareable
from gpt_kit_hf.options.declare import flat_declarations
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions, flat_options

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted(path.parent for path in ROOT.glob("model_cards/*/facts.json"))
# The files of examples/configs whose models have a card in model_cards, in a folder of the same name.
WITH_CARD = ["quickstart", "instructions_small", "tinyshakespeare_bytes"]

SHORT = ["--use_cpu=true", "--mixed_precision=fp32", "--sample_steps=0", "--report_to=none", "--batch_size=4"]
MARKS = re.compile(r"<!-- gpt-kit: ([a-z]+) ([0-9a-f]{12}) -->(.*?)<!-- /gpt-kit: \1 -->", re.DOTALL)
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2sT" * 2
HOSTILE = [
    "a|b", "a\\|b", "<script>alert(1)</script>", "`code`", "``", "a\nb", "---\n\n# title", "*bold* _it_ [x](y)",
    "{{ 7 * 7 }}{% raw %}", "<!-- /gpt-kit: data -->", "--> <!-- gpt-kit: data 000000000000 -->", "&lt;b&gt; &amp;",
    "a\x00\x1b[31m\u202eb", "$x$ \\(y\\)", "```\n```", "| --- |", "![z](w)", "ünï©ode 文件", "'\"; rm -rf $HOME #",
    "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model `first`, with its invariance, and `tuned`, an adapter on it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("All the world's a stage, and all the men and women merely players.\n" * 20)
    rows = [{"instruction": f"Is {i} even?", "input": "", "output": "yes" if i % 2 == 0 else "no"} for i in range(20)]
    (folder / "rows.json").write_text(json.dumps(rows))
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--max_position_embeddings=256", "--max_length=32"]
    texts = [f"--text_files={folder / 'text.txt'}", "--encoding=bytes"]
    train(
        parse_run_options([f"--output_dir={folder / 'first'}", *texts, *sizes, "--max_steps=3", *SHORT]), stream=None
    )
    how = [f"--model_name_or_path={folder / 'first'}", f"--rows={folder / 'rows.json'}", "--lora_r=2", "--max_steps=2"]
    finetune(parse_finetune_options([f"--output_dir={folder / 'tuned'}", *how, *SHORT]), stream=None)
    model = AutoModelForCausalLM.from_pretrained(folder / "first")
    report = check_invariance(model, attention=["eager"]).to_dict()
    (folder / "first" / "invariance.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies a run with changes in its JSON files: copied("first", record={...}, options={...}, config={...})."""

    def copy(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / name, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        record = json.loads((folder / "run.json").read_text())
        record |= changes.get("record", {})
        record["options"] |= changes.get("options", {})
        (folder / "run.json").write_text(json.dumps(record))
        config = json.loads((folder / "config.json").read_text()) | changes.get("config", {})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


# --- reading a card, by another program's parser


def body_of(card: str) -> str:
    return card.partition("\n---\n")[2]


def part(card: str, name: str) -> str:
    return next(text for found, _, text in MARKS.findall(card) if found == name)


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of each table, as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level == 4 and found:
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def table(card: str, name: str) -> dict[str, str]:
    """Return the two-column table of a block without its header."""
    (rows,) = tables(part(card, name))
    return {row[0]: row[1] for row in rows[1:]}


def html_in(markdown: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    every = [child for token in tokens for child in (token, *(token.children or []))]
    return [token.content for token in every if token.type.startswith("html")]


def as_number(cell: str) -> float | bool | str:
    if cell in ("yes", "no"):
        return cell == "yes"
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return cell


def check_hub_metadata(metadata: dict[str, Any]) -> None:
    """What the Hub refuses: keys without value, paths for ids, results without type, name or value."""
    an_id = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
    assert None not in metadata.values()
    bases = metadata.get("base_model", [])
    for name in [*metadata.get("datasets", []), *([bases] if isinstance(bases, str) else bases)]:
        assert an_id.fullmatch(name)
    assert all(isinstance(tag, str) and tag for tag in metadata["tags"])
    for entry in metadata.get("model-index", []):
        assert set(entry) == {"name", "results"}
        assert isinstance(entry["name"], str)
        assert entry["name"]
        assert entry["results"]
        for result in entry["results"]:
            assert set(result) <= {"task", "dataset", "metrics", "source"}
            assert result["task"]["type"] == "text-generation"
            assert an_id.fullmatch(result["dataset"]["type"])
            for name in ("name", "config", "split", "revision"):
                assert isinstance(result["dataset"].get(name, "text"), str)
            assert result["dataset"]["name"]
            assert isinstance(result["dataset"].get("args", {}), dict)
            assert result["metrics"]
            for metric in result["metrics"]:
                assert set(metric) <= {"type", "value", "name", "config", "args", "verified", "verifyToken"}
                assert an_id.fullmatch(metric["type"])
                assert isinstance(metric["value"], (int, float))


# --- what a card says


def test_the_tables_show_what_the_run_recorded(runs: Path, tmp_path: Path) -> None:
    card = render_card(card_facts(runs / "first"))
    record = json.loads((runs / "first" / "run.json").read_text())
    config = json.loads((runs / "first" / "config.json").read_text())
    shape = {name: as_number(cell) for name, cell in table(card, "architecture").items()}
    assert shape["parameters"] == record["parameters"]
    assert shape["output projection tied to the embedding"] is config["tie_word_embeddings"]
    names = {"layers": "n_layer", "attention heads": "n_head", "width": "n_embd", "vocabulary": "vocab_size",
             "context (tokens)": "max_position_embeddings", "epsilon of the norms": "layer_norm_epsilon",
             "activation": "hidden_act", "dtype of the weights": "dtype", "class": "class"}  # fmt: skip
    assert {name: shape[name] for name in names} == {
        name: (config | {"class": config["architectures"][0]})[field] for name, field in names.items()
    }
    options = {name.split(".")[1]: value for name, value in record["options"].items()}
    shown = {name: as_number(cell) for name, cell in table(card, "hyperparameters").items()}
    assert len(shown) >= 15
    assert {"learning_rate", "batch_size", "max_steps", "seed", "max_length", "weight_decay"} <= shown.keys()
    assert shown == {name: options[name] for name in shown}
    data = table(card, "data")
    assert data["trained on"] == "text.txt"
    assert as_number(data["tokens to train on"]) == record["train_tokens"]
    assert data["fingerprint of the data"] == record["data_fingerprint"]
    assert data["fingerprint of the tokenizer"] == config["tokenizer_fingerprint"]
    assert table(card, "versions") == record["versions"]
    lines = [json.loads(line) for line in (runs / "first" / "metrics.jsonl").read_text().splitlines()]
    seen = sum(line["trained_tokens"] for line in lines if line["kind"] == "train")
    assert f"3 steps over {seen:,} trained tokens (fp32, cpu, 1 process)" in card
    assert "not instruction-tuned" in card
    assert "no padding token" not in card
    older = tmp_path / "first"
    shutil.copytree(runs / "first", older)
    tokenizer = json.loads((older / "tokenizer_config.json").read_text())
    assert tokenizer.pop("pad_token") == "<|pad|>"
    (older / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "no padding token" in render_card(card_facts(older))


def test_scores_are_in_the_table_and_in_the_metadata(runs: Path, copied: Callable[..., Path]) -> None:
    run = copied("first")
    more = {"name": "web/other.txt", "kind": "text", "loss": 2.0, "bits_per_byte": 2.5, "tokens": 1000,
            "text_bytes": 1200, "max_length": 32, "stride": 16, "data_fingerprint": "ab" * 8}  # fmt: skip
    results = json.loads((run / "run.json").read_text())["results"]
    for content in ([more, more], {"evaluations": [more, more]}):
        (run / "evaluations.json").write_text(json.dumps(content))
        card = render_card(card_facts(run))
        (rows,) = tables(part(card, "evaluation"))
        assert [row[0] for row in rows[1:]] == ["held-out text", "other.txt", "other.txt"]
        assert float(rows[1][1]) == pytest.approx(results["loss"], abs=1e-4)
        assert float(rows[1][2]) == pytest.approx(torch.tensor(results["loss"]).exp().item(), rel=1e-4)
        assert float(rows[1][3]) == pytest.approx(results["bits_per_byte"], abs=1e-4)
        assert rows[2][4:] == ["1,000", "1,200", "32, 16 apart", "ab" * 8]
        assert f"gzip -9 {results['beside_bits_per_byte']['gzip -9']:.3f}" in card
        values = {
            (result.dataset_type, result.metric_type): result.metric_value
            for result in ModelCard(card).data.eval_results or []
        }
        assert len(values) == 9  # no two share a type of dataset, which would make them one
        assert values["held-out-text", "bits_per_byte"] == pytest.approx(results["bits_per_byte"], abs=1e-6)
        assert values["other-txt", "loss"] == 2.0


def test_invariance_supervision_and_curve_are_shown_where_recorded(runs: Path, copied: Callable[..., Path]) -> None:
    file = copied("first") / "invariance.json"
    matrix = json.loads(file.read_text())
    matrix["cells"][3] |= {"holds": False, "difference": 0.5}
    matrix["cells"][4] |= {"holds": False, "difference": None, "error": "no finite logits"}
    file.write_text(json.dumps(matrix))
    first, tuned = render_card(card_facts(file.parent)), render_card(card_facts(runs / "tuned"))
    cells = matrix["cells"]
    (rows,) = tables(part(first, "invariance"))
    for precision, attention, holds, difference, _ in rows[1:]:
        own = [each for each in cells if (each["precision"], each["attention"]) == (precision, attention)]
        assert holds == f"{sum(each['holds'] for each in own)} of {len(own)}"
        assert float(difference) == pytest.approx(max(each["difference"] or 0.0 for each in own), rel=0.05)
    assert [row[2] for row in rows[1:]] == ["10 of 12", "12 of 12"]
    report = json.loads((runs / "tuned" / "supervision.json").read_text())
    counted = {name: as_number(cell) for name, cell in table(tuned, "supervision").items()}
    assert counted["rows used"] == report["rows_used"]
    assert counted["tokens trained"] == report["tokens_trained"]
    assert counted["rows whose EOS is not trained"] == report["rows_end_untrained"] == 0
    assert "Is 1 even" not in tuned  # the report's examples are somebody's data
    assert part(first, "supervision").strip() == part(tuned, "invariance").strip() == ""
    assert "![Training and held-out loss by step](loss.png)" in first
    assert "LoRA adapter of rank 2" in tuned
    assert "tuned on the instruction rows of `rows.json`" in tuned


def test_counts_of_an_older_run_are_shown_as_it_recorded_them(copied: Callable[..., Path]) -> None:
    """It called the evaluation rows held_out_rows, and counted the rows trained on alone."""
    run = copied("tuned")
    record = json.loads((run / "run.json").read_text())
    new = render_card(card_facts(run))
    assert table(new, "data")["rows held out"] == table(new, "supervision")["rows held out"] == "2"
    assert [table(new, "supervision")[f"rows {name}"] for name in ("read", "used", "trained on")] == ["20", "20", "18"]
    record["held_out_rows"] = record.pop("eval_rows")
    for name in ("rows_trained", "rows_eval", "eval_input"):
        del record["supervision"][name]
    record["supervision"] |= {"rows_read": 18, "rows_used": 18}
    (run / "run.json").write_text(json.dumps(record))
    old = render_card(card_facts(run))
    assert table(old, "data")["rows held out"] == "2"
    assert [table(old, "supervision")[f"rows {name}"] for name in ("read", "used")] == ["18", "18"]
    assert not {"rows trained on", "rows held out"} & table(old, "supervision").keys()
    assert "training text: 18 rows of `rows.json`" in old
    assert "training text: 18 rows of `rows.json`" in new


def test_sections_without_facts_are_left_out(runs: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    run = copied("first")
    (run / "loss.png").unlink()
    record = json.loads((run / "run.json").read_text())
    del record["results"]
    (run / "run.json").write_text(json.dumps(record | {"steps": 9}))
    card = render_card(card_facts(run))
    assert "after step 3 of 9" in card
    assert part(card, "curve").strip() == part(card, "evaluation").strip() == ""
    assert "model-index" not in card
    write_tiny_model(tmp_path / "plain")
    facts = card_facts(tmp_path / "plain")
    assert facts["kind"] == "model"
    plain = render_card(facts)
    assert as_number(table(plain, "architecture")["layers"]) == 1
    assert part(plain, "hyperparameters").strip() == part(plain, "command").strip() == ""
    assert "is not recorded" in plain
    assert "license:" not in plain + card
    check_hub_metadata(ModelCard(plain).data.to_dict())
    with pytest.raises(UsageError, match="neither a run nor a model"):
        card_facts(ROOT / "tests")
    (run / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        card_facts(run)


@pytest.mark.parametrize("name", ["first", "tuned"])
def test_metadata_are_valid_on_the_hub(runs: Path, name: str, tmp_path: Path) -> None:
    card = render_card(card_facts(runs / name), repo="somebody/small")
    (tmp_path / CARD_FILE).write_text(card)
    metadata = metadata_load(tmp_path / CARD_FILE)
    assert metadata is not None
    check_hub_metadata(metadata)
    loaded = ModelCard(card)
    assert loaded.data.to_dict() == metadata
    assert str(loaded) == card
    index = metadata["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    (result,) = index[0]["results"]
    by_hand = metadata_eval_result(
        model_pretty_name=name, task_pretty_name="Text generation", task_id="text-generation",
        metrics_pretty_name="Loss (nats per token)", metrics_id="loss", metrics_value=result["metrics"][0]["value"],
        dataset_pretty_name=result["dataset"]["name"], dataset_id=result["dataset"]["type"],
    )["model-index"][0]["results"][0]  # fmt: skip
    assert result["task"] == by_hand["task"]
    assert by_hand["dataset"].items() <= result["dataset"].items()
    assert result["metrics"][0].items() <= by_hand["metrics"][0].items()
    assert metadata["library_name"] == "transformers"
    assert ("instruction-tuned" in metadata["tags"]) == (name == "tuned")
    assert "base_model" not in metadata  # a folder is no model of the Hub


def test_names_of_the_hub_are_links_and_metadata(copied: Callable[..., Path]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    options = {
        "base.model_name_or_path": "owner/base",
        "rows.rows": None,
        "rows.dataset_name": "owner/rows",
        "rows.dataset_config": "small",
        "rows.dataset_train_split": "a",
    }
    for record in ({"base_digest": commit}, {"base_commit": commit}):
        card = render_card(card_facts(copied("tuned", options=options, record=record)))
        metadata = ModelCard(card).data.to_dict()
        check_hub_metadata(metadata)
        assert metadata["base_model"] == "owner/base"
        assert metadata["datasets"] == ["owner/rows"]
        assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "owner/rows"
        assert "[owner/base](https://huggingface.co/owner/base)" in card
        assert table(card, "data")["trained on"] == "owner/rows, small, a"
        assert (f"commit `{commit}`" in card) == (commit in record.values())
    for changes in (
        {
            "options": {"base.model_name_or_path": "runs/base", "training.output_dir": "runs/tuned"},
            "record": {"base_digest": None},
        },
        {"options": {"base.model_name_or_path": "owner/base"}, "record": {"base_digest": "0123456789abcdef"}},
        {"options": {"base.model_name_or_path": "owner/base"}, "record": {"base_commit": None, "base_digest": None}},
    ):
        card = render_card(card_facts(copied("tuned", **changes)))
        assert "base_model" not in ModelCard(card).data.to_dict()
        assert "huggingface.co" not in card


def test_the_shown_code_loads_the_model(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    for name in ("first", "tuned"):
        blocks = re.findall(r"```python\n(.*?)```", render_card(card_facts(runs / name)), re.DOTALL)
        assert len(blocks) == 2
        for code in blocks:
            assert len(code.splitlines()) == 5
            captured = io.StringIO()
            with contextlib.redirect_stdout(captured):
                exec(code, {})
            assert ("The" if name == "first" else "Hello") in captured.getvalue()
    with pytest.raises(UsageError, match="no id of the Hub"):
        render_card(card_facts(runs / "first"), repo='a"b')


def test_the_command_gives_the_same_options(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    for name, kind, parse in (
        ("first", RunOptions, parse_run_options),
        ("tuned", FinetuneOptions, parse_finetune_options),
    ):
        facts = card_facts(runs / name)
        free = {option for option, each in flat_declarations(kind).items() if each.resume == "free"}
        (shown,) = re.findall(r"```bash\n(.*?)```", render_card(facts), re.DOTALL)
        words = shlex.split(shown.replace("\\\n", ""))
        assert words == facts["command"]
        assert len(shown.splitlines()) <= 5
        again = flat_options(parse(words[2:]))
        before = json.loads((runs / name / "options.json").read_text())
        paths = {"text.text_files": ["text.txt"], "rows.rows": ["rows.json"], "base.model_name_or_path": "first"}
        assert {option: paths.get(option, value) for option, value in before.items() if option not in free} == {
            option: value for option, value in again.items() if option not in free
        }


# --- what it does not say


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in JSON, lists and objects too."""
    yield path
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from leaves(child, (*path, key))


def with_leaf(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    if not path:
        return leaf
    children = dict(value) if isinstance(value, dict) else list(value)
    children[path[0]] = with_leaf(children[path[0]], path[1:], leaf)
    return children


@pytest.mark.parametrize("name", ["first", "tuned"])
def test_no_token_and_no_path_reaches_a_card_from_any_field(copied: Callable[..., Path], name: str) -> None:
    run = copied(name)
    (run / "evaluations.json").write_text(json.dumps([{"name": "other", "loss": 1.0, "tokens": 3}]))
    if (run / "invariance.json").is_file():
        report = json.loads((run / "invariance.json").read_text())
        (run / "invariance.json").write_text(json.dumps(report | {"cells": report["cells"][:2]}))
    planted = [TOKEN, f"/home/alice/{TOKEN}/file.txt", [f"x {TOKEN}"]]
    done, seen = 0, {json.dumps(card_facts(run), ensure_ascii=False)}
    for file in sorted(path for path in run.iterdir() if path.suffix in (".json", ".jsonl")):
        if file.name in ("tokenizer.json", "options.json"):
            continue
        original = file.read_text()
        lines = original.splitlines() if file.suffix == ".jsonl" else [original]
        value = json.loads(lines[-1])
        for place in leaves(value):
            leaf = planted[done % len(planted)]
            done += 1
            if not place:
                continue
            changed = with_leaf(value, place, leaf)
            file.write_text("\n".join([*lines[:-1], json.dumps(changed)]) + "\n")
            facts = card_facts(run)
            captured = json.dumps(facts, ensure_ascii=False)
            if captured not in seen and done % 4 == 0:
                captured += render_card(facts)  # a function of the facts: no other text can come in
            seen.add(captured)
            assert TOKEN not in captured, (file.name, place)
            assert "/home" not in captured, (file.name, place)
            assert "alice" not in captured, (file.name, place)
        file.write_text(original)
    assert done > 150
    assert len(seen) > 30


def test_no_path_of_this_machine_is_in_facts_or_card(runs: Path) -> None:
    for name in ("first", "tuned"):
        facts = card_facts(runs / name)
        assert str(runs) in (runs / name / "run.json").read_text()  # it is there to be found
        assert json.loads(json.dumps(facts)) == facts
        captured = render_card(facts) + json.dumps(facts)
        assert str(runs.parent) not in captured
        assert "/" + runs.parts[1] not in captured
    assert shareable("C:\\Users\\alice\\text.txt") == "text.txt"
    assert shareable("../../secret/books/*.txt") == "*.txt"
    assert shareable("/") == "unnamed"
    assert as_id("/absolute") is as_id("a/b/c") is as_id("../x") is as_id("") is None


def test_hostile_text_is_shown_and_not_interpreted(copied: Callable[..., Path]) -> None:
    names = [found for found, _, _ in MARKS.findall(render_card(card_facts(copied("first"))))]
    for name in HOSTILE:
        text = ["x" + name, "plain.txt"]
        run = copied("first", options={"text.text_files": text, "text.document_separator": name, "text.mixture": None})
        (run / "evaluations.json").write_text(json.dumps([{"name": name, "loss": 1.5}]))
        facts = card_facts(run) | {"name": shareable(name)}
        card = render_card(facts)
        assert render_card(facts, existing=card) == card
        assert edited_blocks(card) == []
        check_hub_metadata(ModelCard(card).data.to_dict())
        assert all(content.startswith("<!--") for content in html_in(body_of(card))), name
        assert [found for found, _, _ in MARKS.findall(card)] == names
        assert table(card, "data")["trained on"] == "plain.txt"  # the later of two rows of that name
        rows = tables(part(card, "data"))[0]
        assert {len(row) for row in rows} == {2}
        assert rows[1] == ["trained on", shareable("x" + name)]
        scores = tables(part(card, "evaluation"))[0]
        assert {len(row) for row in scores} == {8}
        assert scores[2][:2] == [shareable(name), "1.5000"]
        tokens = MarkdownIt("commonmark").parse(body_of(card))
        titles = [
            tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h1"
        ]
        assert ["".join(child.content for child in title.children or []) for title in titles] == [shareable(name)]


def test_a_shell_reads_the_command_as_the_same_arguments() -> None:
    words = [
        *HOSTILE[:-3],
        "",
        "plain",
        "</doc>",
        "<!-- gpt-kit: data",
        "\n\n",
        "x" * 300,
        *(f"--o{i}" for i in range(40)),
        "é\n",
        "'",
    ]
    words = [word.replace("\x00", "") for word in words]
    shown = command_lines(["printf", "%s\\0", *words])
    assert "<!--" not in shown
    assert not re.search(r"^ {0,3}`", shown, re.MULTILINE)
    captured = subprocess.run(["bash", "-c", shown], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert captured == words


# --- what a person edits


def insert_places(card: str) -> list[int]:
    """Return the places in a card's text that lie outside of its generated parts."""
    start = card.index("\n---\n") + len("\n---\n")
    inside = [span for match in MARKS.finditer(card) for span in range(match.start() + 1, match.end())]
    return sorted(set(range(start, len(card) + 1)) - set(inside))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_text_outside_the_marks_survives(runs: Path, line_end: str) -> None:
    chance = random.Random(7)
    facts, other = card_facts(runs / "first"), card_facts(runs / "tuned")
    written = [
        "My words.",
        "\n## Ours\n\n| a | b |\n|---|---|\n",
        "<!-- a comment -->",
        "  ",
        "\t\n",
        "é文",
        "\n---\n",
        "`",
    ]
    original, fresh = render_card(facts), render_card(other, repo="some/one")
    for _ in range(8):
        card = original
        for _ in range(chance.randrange(1, 6)):
            place = chance.choice(insert_places(card))
            card = card[:place] + chance.choice(written) + card[place:]
        card = card.replace("\n", line_end)
        assert edited_blocks(card) == []
        renewed = render_card(other, existing=card, repo="some/one")
        assert MARKS.sub(r"(\1)", renewed.split(f"{line_end}---{line_end}", 1)[1]) == MARKS.sub(
            r"(\1)", card.split(f"{line_end}---{line_end}", 1)[1]
        )
        assert renewed.count("\r") == (renewed.count("\n") if line_end == "\r\n" else 0)
        assert {found: text.replace("\r", "") for found, _, text in MARKS.findall(renewed)} == {
            found: text for found, _, text in MARKS.findall(fresh)
        }
    assert render_card(other, existing=renewed, repo="some/one") == renewed


def test_blocks_that_were_moved_or_deleted_stay_so(runs: Path) -> None:
    facts, other = card_facts(runs / "first"), card_facts(runs / "tuned")
    card = render_card(facts)
    data, load = (next(match[0] for match in MARKS.finditer(card) if match[1] == name) for name in ("data", "load"))
    moved = card.replace(load, "").replace(data, f"mine\n\n{load}\n\nmine")
    renewed = render_card(other, existing=moved)
    names = [found for found, _, _ in MARKS.findall(renewed)]
    assert names == [found for found, _, _ in MARKS.findall(moved)]
    assert "data" not in names
    assert f"mine\n\n{MARKS.search(renewed, renewed.index('mine'))[0]}\n\nmine" in renewed  # type: ignore[index]
    doubled = card + load
    assert part(render_card(other), "load") == MARKS.findall(render_card(other, existing=doubled))[-1][2]
    own = "---\nlicense: mit\n---\n\n# All mine\n"
    added = render_card(facts, existing=own)
    assert added.startswith("---\nlicense: mit\n")
    assert "---\n\n# All mine\n" in added
    assert [(found, text) for found, _, text in MARKS.findall(added)] == [
        (found, text) for found, _, text in MARKS.findall(card)
    ]
    assert render_card(facts, existing=added) == added
    assert render_card(facts, existing="Words.").endswith("<!-- /gpt-kit: metadata -->\n")
    check_hub_metadata(ModelCard(render_card(facts, existing="\ufeffWords.").removeprefix("\ufeff")).data.to_dict())


def test_a_mark_without_its_pair_is_an_error(runs: Path) -> None:
    card = render_card(card_facts(runs / "first"))
    for broken in (card.replace("<!-- /gpt-kit: data -->", ""), re.sub(r"<!-- gpt-kit: data .*? -->", "", card)):
        with pytest.raises(UsageError, match="gpt-kit: data"):
            render_card(card_facts(runs / "first"), existing=broken)
        with pytest.raises(UsageError, match="gpt-kit: data"):
            edited_blocks(broken)
    theirs = card + "<!-- gpt-kit: future 000000000000 -->\nx\n"  # of a version to come: theirs
    assert render_card(card_facts(runs / "first"), existing=theirs) == theirs


def test_edits_inside_the_marks_are_found_and_kept(copied: Callable[..., Path]) -> None:
    run = copied("first")
    assert write_card(run).edited == ()
    path = run / CARD_FILE
    card = path.read_bytes().decode()
    stamp = path.stat().st_mtime_ns
    assert write_card(run).kept is None
    assert path.stat().st_mtime_ns == stamp
    for found, _, text in MARKS.findall(card):
        place = card.index(text, card.index(f"<!-- gpt-kit: {found} ")) + len(text) // 2
        assert edited_blocks(card[:place] + "!" + card[place:]) == [found]
    harmless = card.replace(" |\n", " |  \n").replace("\n", "\r\n")
    assert harmless != card
    assert edited_blocks(harmless) == []
    assert edited_blocks(card.replace("pipeline_tag: text-generation", "pipeline_tag: other")) == ["metadata"]
    assert edited_blocks(card.replace("library_name: transformers\n", "")) == ["metadata"]
    assert edited_blocks(re.sub(r"value: [\d.]+", "value: 0.1", card)) == ["metadata"]
    assert edited_blocks(card.replace("tags:\n", "license: mit\ntags:\n- mine\n")) == []
    for number in (1, 2):
        edited = card.replace("## Data", f"## Data, {number}")
        path.write_text(edited)
        done = write_card(run)
        assert (done.path, done.edited) == (path, ("data",))
        assert done.kept == run / f"README.edited-{number}.md"
        assert done.kept.read_text() == edited
        assert path.read_text() == card
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=CARD_FILE):
        write_card(run)


def test_hand_written_metadata_survive(runs: Path) -> None:
    facts, other = card_facts(runs / "first"), card_facts(runs / "tuned")
    card = render_card(facts)
    result = {"task": {"type": "text-generation"}, "dataset": {"type": "x", "name": "Theirs"},
              "metrics": [{"type": "accuracy", "value": 0.5}]}  # fmt: skip
    metadata = yaml.safe_load(card.split("---\n")[1])
    index = metadata["model-index"]
    index[0]["results"].append(result)
    index[0]["results"][0]["metrics"].append({"type": "mine", "value": 3})
    index.append({"name": "another", "results": [result]})
    added = "# why this license\nlicense: mit  # chosen\nlanguage:\n  - en\nwhen: 2026-01-02\nempty:\n"
    block = added + yaml.safe_dump({**metadata, "tags": ["mine", *metadata["tags"]]}, sort_keys=False) + "# the end"
    edited = card.replace(card.split("---\n")[1], block + "\n")
    assert edited_blocks(edited) == ["metadata"]  # a metric in a result of ours
    renewed = render_card(other, existing=edited)
    assert renewed.startswith("---\n" + added)
    assert "\n# the end\n---\n" in renewed
    found = yaml.safe_load(renewed.split("---\n")[1])
    fresh = yaml.safe_load(render_card(other).split("---\n")[1])
    assert found["tags"] == ["mine", *fresh["tags"]]
    assert {name: found[name] for name in ("library_name", "pipeline_tag")} == {
        name: fresh[name] for name in ("library_name", "pipeline_tag")
    }
    (ours, old, another) = found["model-index"]
    assert ours == fresh["model-index"][0]
    assert old["results"][0]["metrics"] == [{"type": "mine", "value": 3}]
    assert old["results"][1] == result
    assert another == {"name": "another", "results": [result]}
    assert render_card(other, existing=renewed) == renewed
    assert edited_blocks(renewed) == []
    # Back again: the tags of the tuned model go, those of the person do not.
    again = yaml.safe_load(render_card(facts, existing=renewed).split("---\n")[1])
    assert again["tags"] == ["mine", "gpt-kit-hf"]
    unscored = {name: value for name, value in facts.items() if name != "evaluations"}
    assert "model-index" not in yaml.safe_load(render_card(unscored, existing=card).split("---\n")[1])


@pytest.mark.parametrize(
    "block",
    ["{license: mit, tags: [a]}", "tags: &t [a]\nothers: *t", "? tags\n: - a\n", "tags: a", "license: mit\n\n\n", ""],
)
def test_metadata_in_any_yaml_style_are_renewed(runs: Path, block: str) -> None:
    facts = card_facts(runs / "tuned")
    renewed = render_card(facts, existing=f"---\n{block}\n---\nText.\n")
    found, before = yaml.safe_load(renewed.split("---\n")[1]), yaml.safe_load(block) or {}
    fresh = yaml.safe_load(render_card(facts).split("---\n")[1])
    assert found == {**before, **fresh, "tags": [*(["a"] if "tags" in before else []), *fresh["tags"]]}
    assert "---\nText.\n" in renewed
    assert render_card(facts, existing=renewed) == renewed


@pytest.mark.parametrize("block", ["a: [", "- a", "model-index: x", "model-index:\n- name: a\n  results: 3"])
def test_metadata_that_cannot_be_read_are_an_error(runs: Path, block: str) -> None:
    with pytest.raises(UsageError, match="the card's m"):
        render_card(card_facts(runs / "first"), existing=f"---\n{block}\n---\nText.\n")


def test_hand_written_text_is_told_from_generated_text(runs: Path) -> None:
    first, tuned = (
        render_card(card_facts(runs / "first") | {"name": "one"} | more) for more in ({}, {"parameters": 3})
    )
    assert first != tuned
    assert without_generated(first) == without_generated(tuned) == without_generated(first.replace("\n", "\r\n"))
    assert without_generated(first + "Mine.") != without_generated(first)
    assert without_generated(first.replace(MARKS.findall(first)[0][2], "Other.")) == without_generated(first)


# --- the cards of the examples


@pytest.fixture
def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "model_cards" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cards_are_rendered_from_a_run(
    runs: Path, renderer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "CARDS", tmp_path)
    assert renderer.main([str(runs / "first"), "small"]) == 0
    folder = tmp_path / "small"
    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, "facts.json", "loss.png"]
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    assert card == render_card(card_facts(runs / "first"))
    (folder / CARD_FILE).write_text("other")
    assert renderer.main([]) == 0
    assert (folder / CARD_FILE).read_text(encoding="utf-8") == card
    assert renderer.main(["x"]) == 2


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_model_cards_are_rendered_from_their_facts(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    card = (folder / CARD_FILE).read_bytes().decode()
    assert render_card(facts) == card, "the template or the facts have changed: python model_cards/render.py"
    assert (folder / "loss.png").is_file() == facts.get("curve", False)
    check_hub_metadata(ModelCard(card).data.to_dict())


@pytest.mark.parametrize("name", WITH_CARD)
def test_each_example_has_its_card(name: str) -> None:
    assert (ROOT / "examples" / "configs" / f"{name}.yaml").is_file()
    assert ROOT / "model_cards" / name in CARDS


def test_shown_text_is_unescaped_once() -> None:
    # The parser that these tests read with shows an entity as its character.
    assert tables("| a |\n| --- |\n| &#60;b&#62; |")[0][1] == [unescape("&#60;b&#62;")]
