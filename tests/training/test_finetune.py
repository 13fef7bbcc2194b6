"""Instruction tuning from rows to a model that answers: what is trained, saved, shown and refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrain import killed_copy, update_lines
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import (
    AdapterOptions,
    BaseOptions,
    CheckpointError,
    DataError,
    FinetuneOptions,
    OptimizerOptions,
    RowOptions,
    SupervisionOptions,
    TrainingOptions,
    UsageError,
    encode_rows,
    finetune,
    format_alpaca,
    generate_text_autoregressive,
    read_rows,
)
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.instructions.rows import PlacedRow
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.evaluation.metrics import tokenizer_byte_lengths
from gpt_kit_hf.generation.chat import CONTINUATION_TEMPLATE
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.tokenization.chat_templates import ALPACA_TEMPLATE, DEFAULT_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes that reads long enough prompts."""
    folder = tmp_path_factory.mktemp("base") / "model"
    write_tiny_model(folder, context=CONTEXT)
    return folder


def write_rows(file: Path, n: int = 24) -> Path:
    """Rows whose answer is one of two words, told by the question."""
    rows = [{"instruction": f"Is {i} even?", "input": "", "output": "yes" if i % 2 == 0 else "no"} for i in range(n)]
    file.write_text(json.dumps(rows, indent=0))  # a line for each, so that their places differ
    return file


def options(folder: Path, base: Path, rows: Path, **changes: Any) -> FinetuneOptions:
    training = {
        "batch_size": 4, "per_device_train_batch_size": 3, "max_steps": 8, "eval_steps": 4, "save_steps": 4,
        "save_total_limit": 9, "logging_steps": 4, "sample_steps": 0, "sample_max_new_tokens": 8,
        "use_cpu": True, "mixed_precision": "fp32", "report_to": ["none"],
    }  # fmt: skip
    sections: dict[str, Any] = {"supervision": SupervisionOptions(max_length=CONTEXT), "adapter": AdapterOptions()}
    sections |= {name: changes.pop(name) for name in list(changes) if name in sections}
    return FinetuneOptions(
        training=TrainingOptions(output_dir=str(folder), **{**training, **changes}),
        base=BaseOptions(model_name_or_path=str(base), eval_fraction=0.25),
        rows=RowOptions(rows=[str(rows)]),
        optimizer=OptimizerOptions(learning_rate=1e-2, warmup_steps=1),
        **sections,
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_finetuned_model_loads_and_answers(rank: int, base: Path, tmp_path: Path) -> None:
    rows, output = write_rows(tmp_path / "rows.json"), io.StringIO()
    asked = options(tmp_path / "run", base, rows, max_steps=60, save_steps=60, adapter=AdapterOptions(lora_r=rank))
    result = finetune(asked, stream=output)
    scores = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert result.evaluation.loss < 0.6 * scores[0]  # the score before the first step is there to compare
    for part in (
        "24 read, 24 used",
        "train     18 rows",
        "eval      6 rows",
        "trained (",
        "⟦",
        "<|endoftext|>⟧",
        "eval answers",
    ):
        assert part in output.getvalue(), part
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert type(model).__name__ == "GPTKitForCausalLM"
    # The template that was saved writes the prompt that was trained.
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 3 even?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == format_alpaca({"instruction": "Is 3 even?", "input": ""})
    ids = torch.tensor([tokenizer.encode(prompt)])
    answered = generate_text_autoregressive(model, ids, 8, eos_token_id=tokenizer.eos_token_id)
    if not rank:  # an adapter of this size needs more steps to learn to stop
        assert answered[0, -1] == tokenizer.eos_token_id
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file() == bool(rank)
    report = json.loads((tmp_path / "run" / "supervision.json").read_text())
    assert (report["rows_used"], report["rows_trained"], report["rows_eval"]) == (24, 18, 6)
    assert report["tokens_trained"] == sum(len(row["output"]) + 1 for row in trained_rows(rows, tokenizer))


def trained_rows(file: Path, tokenizer: Any) -> list[dict[str, str]]:
    """The rows that the run's own split leaves to train on, by their numbers."""
    rows = json.loads(file.read_text())
    encoded = encode_rows(read_rows(RowOptions(rows=[str(file)])), tokenizer, SupervisionOptions(max_length=CONTEXT))
    train, _ = encoded.split([0.75, 0.25], 0)
    places = [encoded.place(index) for index in range(len(encoded))]
    return [rows[places.index(train.place(index))] for index in range(len(train))]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_run_resumes_to_the_bit(packing: bool, rank: int, base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    sections = {
        "supervision": SupervisionOptions(max_length=CONTEXT, packing=packing),
        "adapter": AdapterOptions(lora_r=rank, lora_dropout=0.1 if rank else 0.0),
    }
    finetune(options(tmp_path / "whole", base, rows, **sections), stream=None)
    killed = killed_copy(tmp_path / "whole", tmp_path / "again", "step-00000008")
    finetune(options(killed, base, rows, resume=True, **sections), stream=None)
    assert update_lines(tmp_path / "whole") == update_lines(killed)
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(list_checkpoints(killed)) == len(list_checkpoints(tmp_path / "whole"))


def test_adapter_changes_only_its_target_modules(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    finetune(options(tmp_path / "run", base, rows, adapter=AdapterOptions(lora_r=2)), stream=None)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("_proj.weight" in name for name in moved)


def test_evaluation_scores_answers_only_for_every_train_on(base: Path, tmp_path: Path) -> None:
    """At learning rate 0, so that both runs score the same weights."""
    rows = write_rows(tmp_path / "rows.json")
    losses = []
    for train_on in ("answers", "everything"):
        asked = options(
            tmp_path / train_on,
            base,
            rows,
            supervision=SupervisionOptions(max_length=CONTEXT, train_on=train_on),  # type: ignore[arg-type]
        )
        finetune(replace(asked, optimizer=OptimizerOptions(learning_rate=1e-12, warmup_steps=1)), stream=None)
        first = next(r for r in read_jsonl(tmp_path / train_on / "metrics.jsonl") if r["kind"] == "eval")
        losses.append((first["loss"], first["tokens"]))
    assert losses[0] == losses[1]


def test_the_last_answers_alone_are_trained_and_scored_on_request(base: Path, tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello, you"), ("user", "Two?"), ("assistant", "2")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n") * 10)
    last = SupervisionOptions(max_length=CONTEXT, train_on="last_answer")
    result = finetune(options(tmp_path / "run", base, rows, max_steps=2, supervision=last), stream=None)
    stored = json.loads((tmp_path / "run" / "supervision.json").read_text())
    assert stored["tokens_trained"] == 2 * stored["rows_trained"]  # a digit and EOS
    assert result.evaluation.tokens == 2 * stored["rows_eval"]


def test_rows_of_text_are_trained_and_scored_whole(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Is {i} even?", "id": i}) + "\n" for i in range(8)))
    everything = SupervisionOptions(max_length=CONTEXT, train_on="everything")
    result = finetune(options(tmp_path / "run", base, rows, max_steps=2, supervision=everything), stream=None)
    assert result.evaluation.tokens == 2 * len("s 0 even?" + "$")  # all but the first, and EOS
    stored = json.loads((tmp_path / "run" / "supervision.json").read_text())
    assert stored["unread_keys"] == {"id": 8}
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template is None


def test_a_resumed_run_keeps_the_template_of_its_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  y\n"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(chat) + "\n") * 8)
    asked = options(tmp_path / "run", base, rows)
    default = replace(asked.base, chat_template="default")
    # As an earlier version wrote it, which stripped answers.
    earlier = DEFAULT_TEMPLATE.replace("{{ text_of(message['content']) }}", "{{ message['content'] | trim }}")
    assert earlier != DEFAULT_TEMPLATE
    with monkeypatch.context() as patched:
        patched.setattr("gpt_kit_hf.data.instructions.templates.get_chat_template", lambda name: earlier)
        finetune(replace(asked, base=default), stream=None)
    killed = killed_copy(tmp_path / "run", tmp_path / "again", "step-00000008")
    finetune(replace(options(killed, base, rows, resume=True), base=default), stream=None)
    assert update_lines(tmp_path / "run") == update_lines(killed)
    assert AutoTokenizer.from_pretrained(killed).chat_template == earlier


def test_dropout_option_changes_the_model(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    asked = options(tmp_path / "run", base, rows)
    finetune(replace(asked, base=replace(asked.base, dropout=0.25)), stream=None)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["embd_pdrop"], config["attn_pdrop"], config["resid_pdrop"]) == (0.25, 0.25, 0.25)


def test_byte_lengths_of_a_tokenizer(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    lengths = tokenizer_byte_lengths(tokenizer, 257)
    assert lengths[tokenizer.eos_token_id] == 0
    text = "straße 😀\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_unusable_rows_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": "a", "input": ""}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2"):
        finetune(options(tmp_path / "run", base, broken), stream=None)
    with pytest.raises(UsageError, match="max_length=512 is above the model's context, max_position_embeddings=256"):
        finetune(options(tmp_path / "run", base, rows, supervision=SupervisionOptions(max_length=512)), stream=None)
    with pytest.raises(UsageError, match=r"cannot be loaded|no such folder"):
        finetune(options(tmp_path / "run", tmp_path / "missing", rows), stream=None)
    with pytest.raises(UsageError, match="lora_target_modules"):
        finetune(
            options(tmp_path / "run", base, rows, adapter=AdapterOptions(lora_r=2, lora_target_modules=["nothing"])),
            stream=None,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BaseOptions(model_name_or_path="m", chat_template="alpacca"), "did you mean 'alpaca'"),
        (lambda: BaseOptions(model_name_or_path="m", eval_fraction=1.0), "eval_fraction must be above 0 and below 1"),
        (lambda: BaseOptions(model_name_or_path="m", dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda: AdapterOptions(lora_r=-1), "lora_r must be at least 0"),
        (lambda: AdapterOptions(lora_alpha=4.0), "lora_alpha and lora_dropout are for lora_r above 0"),
        (lambda: AdapterOptions(lora_r=1, lora_alpha=0.0), "lora_alpha must be above 0"),
        (lambda: AdapterOptions(lora_target_modules=[]), "lora_target_modules is empty"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_finetune_command_runs_and_refuses_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.json")
    arguments = [
        f"--model_name_or_path={base}",
        f"--rows={rows}",
        f"--output_dir={tmp_path / 'run'}",
        "--max_steps=2",
        "--use_cpu",
    ]
    assert main(["finetune", *arguments, "--report_to=none", "--sample_steps=0"]) == 0
    assert "eval answers" in capsys.readouterr().out
    for bad, message in (
        (["--ros=x"], "unknown option 'ros'; did you mean 'rows'"),
        (["--truncation=cut"], "truncation"),
        (["--model_name_or_path=nowhere/at/all"], "no such folder"),
    ):
        assert main(["finetune", *arguments, f"--output_dir={tmp_path / 'no'}", *bad]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
        assert error[-1].startswith("error: ")


def test_inspect_command_shows_the_trained_tokens(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(file: Path, *changes: str) -> int:
        return main(["inspect", str(file), "--examples=2", *changes])

    of_base = f"--model_name_or_path={base}"
    rows = write_rows(tmp_path / "rows.json")
    assert inspect(rows, of_base) == 0
    shown = capsys.readouterr().out
    assert "rows      24 read, 24 used" in shown
    assert "⟦yes<|endoftext|>⟧" in shown
    assert inspect(rows) == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": null}\n')
    assert inspect(bad, of_base) == 2
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert inspect(bad, of_base, "--on_bad_row=skip") == 0
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_chat_example_answers_each_question(base: Path) -> None:
    command = [sys.executable, "examples/chat.py", str(base), "What?", "And then?", "--max_new_tokens=4"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> What?", "> And then?"]
    assert sum(not line.startswith("> ") for line in lines) >= 2
    refused = subprocess.run(
        [sys.executable, "examples/chat.py", "no-such-folder/x/y", "?"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_training_prompts_equal_those_of_the_saved_template(base: Path, tmp_path: Path) -> None:
    """Whatever the rows look like: what chat sends is, id by id, the prompt that was trained."""
    forms: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": "Say so", "input": "so", "output": "so"}],
        "pairs": [{"prompt": "Q: why? A:", "completion": " because"}],
        "chat": [{"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]}],
    }
    for form, rows in forms.items():
        for choice in ("keep", "default", "alpaca"):
            tokenizer = AutoTokenizer.from_pretrained(base)
            placed = (PlacedRow(f"row {number}", row) for number, row in enumerate(rows))
            encoded = encode_rows(
                with_template(placed, tokenizer, choice), tokenizer, SupervisionOptions(max_length=CONTEXT)
            )
            row = encoded[0]
            trained = row.input_ids[: int(row.trained.argmax())].tolist()
            if form == "alpaca" and tokenizer.chat_template == ALPACA_TEMPLATE:
                assert trained == tokenizer.encode(format_alpaca(rows[0]))  # with the section that chat does not have
                continue
            asked = {
                "alpaca": "Say so\n\nso", "pairs": "Q: why? A:", "chat": "why"
            }[form]  # fmt: skip
            template = CONTINUATION_TEMPLATE if tokenizer.chat_template is None else None
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert trained == tokenizer.encode(text), (form, choice)


def test_format_other_than_the_saved_template_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    row = PlacedRow("row 0", {"instruction": "a", "input": "", "output": "b"})
    with pytest.raises(UsageError, match="format='alpaca' writes other prompts than the chat template"):
        list(with_template(iter([row]), tokenizer, "default", "alpaca"))


def test_adapter_resumes_on_its_own_base_only(base: Path, tmp_path: Path) -> None:
    rows, mine = write_rows(tmp_path / "rows.json"), tmp_path / "mine"
    shutil.copytree(base, mine)
    adapter = AdapterOptions(lora_r=2)
    finetune(options(tmp_path / "run", mine, rows, adapter=adapter), stream=None)
    killed = killed_copy(tmp_path / "run", tmp_path / "killed", "step-00000008")
    write_tiny_model(mine, context=CONTEXT)
    weights = load_file(mine / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"other data \(base_digest was \w+, is \w+\): its fingerprint was"):
        finetune(options(killed, mine, rows, resume=True, adapter=adapter), stream=None)
    unfinished = killed_copy(tmp_path / "run", tmp_path / "unfinished")
    with pytest.raises(UsageError, match="at a checkpoint of a run"):
        finetune(options(tmp_path / "no", unfinished, rows, adapter=adapter), stream=None)


def test_training_rows_are_refused_as_evaluation_rows(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    asked = options(tmp_path / "run", base, rows)
    with pytest.raises(UsageError, match=r"eval_rows: .*rows\.json is trained on as well"):
        finetune(replace(asked, base=replace(asked.base, eval_rows=[str(rows)])), stream=None)


def test_truncated_base_model_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"its header claims .* bytes of 1,000"):
        finetune(options(tmp_path / "run", tmp_path / "cut", write_rows(tmp_path / "rows.json")), stream=None)
