"""The padding token of new vocabularies: what a run saves, and what pipelines and collators make of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text import corpus
from gpt_kit_hf.evaluation.metrics import token_byte_lengths
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import (
    fingerprint,
    get_encoding,
    load_encoding,
    save_tokenizer,
    train_bpe,
    with_pad_token,
)

CONTEXT = 48
TEXT = "All the world's a stage, and all the men and women merely players: <|pad|> is text here.\n" * 40
PROMPTS = ["All", "the men and women", " a stage,\nand", "x"]
SIZES = {"bpe": 300, "bytes": 258}


def begin(folder: Path, text: Path, encoding: str, *more: str) -> int:
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", f"--max_position_embeddings={CONTEXT}", "--max_length=16"]
    short = ["--batch_size=4", "--use_cpu", "--mixed_precision=fp32", "--sample_steps=0", "--report_to=none"]
    chosen = [f"--output_dir={folder}", f"--text_files={text}", f"--encoding={encoding}", "--vocab_size=300"]
    return main(["train", *chosen, *shape, *short, *more])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def run(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / str(request.param)
    assert begin(folder, text, request.param, "--max_steps=3") == 0
    return folder


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_new_vocabulary_has_a_padding_token_and_the_size_asked_for(run: Path) -> None:
    (model, tokenizer), size = loaded(run), SIZES[run.name]
    assert model.config.vocab_size == len(tokenizer) == load_encoding(run).n_vocab == size
    assert model.get_input_embeddings().weight.shape[0] == size
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token) == (size - 2, size - 1, "<|pad|>")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (size - 2, size - 1)
    assert model.config.tokenizer_fingerprint == fingerprint(load_encoding(run))
    stored = GenerationConfig.from_pretrained(run)
    assert (stored.eos_token_id, stored.pad_token_id, stored.max_length) == (size - 2, size - 1, CONTEXT)
    assert token_byte_lengths(load_encoding(run))[size - 2 :].tolist() == [0, 0]


def test_a_pipeline_with_nothing_else_stays_in_the_context(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("text-generation", str(run), device="cpu")
    logging.getLogger("transformers").addHandler(caplog.handler)
    for prompt in ("t", "the men and women", "all the men and women merely players"):
        text = pipe(prompt)[0]["generated_text"]
        assert text.startswith(prompt)
        assert len(pipe.tokenizer(prompt)["input_ids"]) < len(pipe.tokenizer(text)["input_ids"]) + 1
        ids = pipe.model.generate(**pipe.tokenizer(prompt, return_tensors="pt"), eos_token_id=-1)
        assert ids.shape[1] == CONTEXT
    # Nor does a number of new tokens contradict the default, which it replaces.
    ids = pipe.model.generate(**pipe.tokenizer("t", return_tensors="pt"), max_new_tokens=5, eos_token_id=-1)
    assert ids.shape[1] == len(pipe.tokenizer("t")["input_ids"]) + 5
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if "max_length" in record.message] == []


def test_a_pipeline_answers_a_batch_as_it_answers_each(run: Path) -> None:
    pipe = pipeline("text-generation", str(run), device="cpu")
    options = {"max_new_tokens": 20, "do_sample": False}
    alone = [pipe(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
    assert [answer[0]["generated_text"] for answer in pipe(PROMPTS, batch_size=4, **options)] == alone
    assert len(set(alone)) == len(PROMPTS)
    # Without a number of new tokens a batch ends where its longest prompt reaches the context.
    whole = [pipe(prompt, do_sample=False)[0]["generated_text"] for prompt in PROMPTS]
    batch = [answer[0]["generated_text"] for answer in pipe(PROMPTS, batch_size=4, do_sample=False)]
    assert all(text.startswith(start) for text, start in zip(whole, batch, strict=True))


def test_a_collator_trains_the_end_of_text_and_not_the_padding(run: Path) -> None:
    _, tokenizer = loaded(run)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [{"input_ids": [*tokenizer(text)["input_ids"], eos]} for text in PROMPTS]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert (batch["labels"] == -100).equal(batch["input_ids"] == pad)
    assert (batch["labels"] == eos).sum() == len(rows)


def test_padding_spelled_out_in_a_text_is_text(run: Path) -> None:
    ids = encodings.encode_ordinary(load_encoding(run), TEXT, "text")
    assert SIZES[run.name] - 1 not in ids
    assert load_encoding(run).decode(ids.tolist()) == TEXT


def test_tuning_keeps_the_padding_token(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a?", "input": "", "output": "b"}\n' * 8)
    where = [f"--rows={rows}", f"--model_name_or_path={run}", f"--output_dir={tmp_path / 'tuned'}"]
    how = ["--max_steps=2", "--batch_size=2", f"--max_length={CONTEXT}", "--use_cpu", "--mixed_precision=fp32"]
    more = ["--format=prompt_completion", "--report_to=none", "--sample_steps=0"]
    rows.write_text('{"prompt": "a?", "completion": "b"}\n' * 8)
    assert main(["finetune", *where, *how, *more]) == 0
    (model, tokenizer), size = loaded(tmp_path / "tuned"), SIZES[run.name]
    stored = model.generation_config
    assert (tokenizer.pad_token_id, stored.pad_token_id, stored.eos_token_id) == (size - 1, size - 1, size - 2)
    assert stored.max_length == CONTEXT


# --- vocabularies without one


def test_the_encodings_themselves_are_as_they_were(gpt2_encoding: Any, tmp_path: Path) -> None:
    known = {"bytes": "fccabeaee55caf5f", "gpt2": "6adcd59e13893e45"}
    assert fingerprint(get_encoding("bytes")) == known["bytes"]
    assert fingerprint(gpt2_encoding) == known["gpt2"]
    save_tokenizer(get_encoding("bytes"), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    padded = with_pad_token(get_encoding("bytes"))
    assert (padded.n_vocab, padded.eot_token, with_pad_token(padded) is padded) == (258, 256, True)


def test_a_padded_vocabulary_has_the_merges_of_one_token_less() -> None:
    plain, padded = train_bpe([TEXT], 299), train_bpe([TEXT], 300, pad_token=True)
    assert (plain.n_vocab, padded.n_vocab) == (299, 300)
    assert padded._mergeable_ranks == plain._mergeable_ranks
    assert padded.eot_token == plain.eot_token == 298
    assert fingerprint(with_pad_token(plain)) == fingerprint(padded)


def test_a_run_that_was_begun_without_a_padding_token_goes_on_without(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(corpus.encodings, "with_pad_token", lambda encoding: encoding)
        assert begin(tmp_path / "old", text, "bytes", "--max_steps=4") == 0
        assert begin(tmp_path / "resumed", text, "bytes", "--max_steps=2") == 0
    more = ("--max_steps=4", "--resume", "--allow_changes", "max_steps")
    assert begin(tmp_path / "resumed", text, "bytes", *more) == 0
    (old, _), (resumed, tokenizer) = loaded(tmp_path / "old"), loaded(tmp_path / "resumed")
    assert (resumed.config.vocab_size, resumed.config.pad_token_id, tokenizer.pad_token) == (257, None, None)
    assert resumed.generation_config.pad_token_id == 256
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), resumed.parameters(), strict=True))
