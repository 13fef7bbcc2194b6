"""The kit's own usage, as written, with GPT-2's vocabulary and with bytes."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import torch
from torch.utils.data import DataLoader

import gpt_kit_hf
from gpt_kit_hf.tokenization import encodings

TEXT = "The future of AI is, like the future of anything else, what people make of it. " * 40


def format_fn(entry: dict[str, str]) -> str:
    return f"### Instruction:\n{entry['instruction']}\n\n### Input:\n{entry['input']}"


def test_the_usage_runs_as_written(gpt2_encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT
    # fmt: off
    from gpt_kit_hf import GPTModel, create_model_config, create_pretraining_dataloader, generate_text_autoregressive, text_to_token_ids, token_ids_to_text, InstructionDataset, create_instruction_collate_fn  # noqa: E501, I001
    config = create_model_config("gpt2-small (124M)"); model = GPTModel(config)  # noqa: E702
    train_loader = create_pretraining_dataloader(text=text, batch_size=4, max_length=256, stride=128)
    tokenizer = tiktoken.get_encoding("gpt2")
    prompt_ids = text_to_token_ids("The future of AI is", tokenizer)
    ids = generate_text_autoregressive(model=model, token_ids=prompt_ids, max_new_tokens=50, temperature=0.8, top_k=50)
    instruction_data = [{"instruction": "Translate", "input": "Hello", "output": "Bonjour"}]
    dataset = InstructionDataset(instruction_data, tokenizer, format_fn)
    loader = DataLoader(dataset, batch_size=4, collate_fn=create_instruction_collate_fn(pad_token_id=50256))
    # fmt: on
    assert model.num_parameters() == 124_439_808
    inputs, targets = next(iter(train_loader))
    assert inputs.shape == targets.shape == (4, 256)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert ids.shape[0] == 1
    assert prompt_ids.shape[1] < ids.shape[1] <= prompt_ids.shape[1] + 50
    assert token_ids_to_text(ids, tokenizer).startswith("The future of AI is")
    inputs, targets = next(iter(loader))
    assert tokenizer.decode(inputs[0].tolist()).endswith("Bonjour")
    assert targets[0, -1] == 50256
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_same_with_bytes() -> None:
    tokenizer = gpt_kit_hf.get_encoding("bytes")
    config = gpt_kit_hf.create_model_config("nano-xs", vocab_size=tokenizer.n_vocab)
    model = gpt_kit_hf.GPTModel(config)
    train_loader = gpt_kit_hf.create_pretraining_dataloader(
        text=TEXT, batch_size=4, max_length=128, stride=64, tokenizer=tokenizer
    )
    prompt_ids = gpt_kit_hf.text_to_token_ids("The future of AI is", tokenizer)
    ids = gpt_kit_hf.generate_text_autoregressive(
        model=model, token_ids=prompt_ids, max_new_tokens=50, temperature=0.8, top_k=50
    )
    assert gpt_kit_hf.token_ids_to_text(ids, tokenizer).startswith("The future of AI is")
    rows = [{"instruction": "Translate", "input": "Hello", "output": "Bonjour"}] * 2
    rows += [{"instruction": "Translate", "input": "Good evening", "output": "Bonsoir"}]
    end = encodings.get_eos_token_id(tokenizer)
    dataset = gpt_kit_hf.InstructionDataset(rows, tokenizer, format_fn)
    collate = gpt_kit_hf.create_instruction_collate_fn(pad_token_id=end, mask_instruction=True)
    inputs, targets = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate)))
    # Only the answer and its one end of text are trained, whatever the padding.
    trained = [bytes(row[(row != -100) & (row != end)].tolist()).decode() for row in targets]
    assert trained == ["Bonjour", "Bonjour", "Bonsoir"]
    assert [(row == end).sum().item() for row in targets] == [1, 1, 1]
    # A few steps of the kit's own loop, on both kinds of batch.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = gpt_kit_hf.compute_loader_loss(train_loader, model, num_batches=3)
    for batch in [*train_loader][:8]:
        step = gpt_kit_hf.train_step_with_gradient_clipping(*batch, model, optimizer)
        assert step.grad_norm > 0
    assert gpt_kit_hf.compute_loader_loss(train_loader, model, num_batches=3) < 0.9 * before
    assert gpt_kit_hf.compute_batch_loss(inputs, targets, model).isfinite()


def test_three_ways_to_a_loss_agree() -> None:
    """The kit's functions on shifted pairs, a sum by hand, and the model's own loss on unshifted labels."""
    model = gpt_kit_hf.GPTModel(gpt_kit_hf.create_model_config("nano-xs", vocab_size=101)).eval()
    ids = torch.randint(0, 101, (3, 40))
    labels = ids.clone()
    labels[:, 5:15] = -100
    inputs, targets = ids[:, :-1], labels[:, 1:]
    log_probs = model(inputs).logits.log_softmax(-1)
    by_hand = [-log_probs[b, t, targets[b, t]] for b in range(3) for t in range(39) if targets[b, t] != -100]
    expected = torch.stack(by_hand).mean()
    torch.testing.assert_close(gpt_kit_hf.compute_batch_loss(inputs, targets, model), expected)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    torch.testing.assert_close(model(inputs, shift_labels=targets).loss, expected)
    # The trap: targets that are shifted already, given as labels, train to predict two ahead.
    assert abs(model(inputs, labels=targets).loss - expected) > 1e-3


def test_the_public_names_are_pinned() -> None:
    assert gpt_kit_hf.GPTModel is gpt_kit_hf.GPTKitForCausalLM
    assert gpt_kit_hf.LayerNorm is torch.nn.LayerNorm
    assert gpt_kit_hf.GELU is torch.nn.GELU
    assert gpt_kit_hf.__all__ == sorted(gpt_kit_hf.__all__)
    assert all(hasattr(gpt_kit_hf, name) for name in gpt_kit_hf.__all__)
    block = gpt_kit_hf.GPTModel(gpt_kit_hf.create_model_config("nano-xs", vocab_size=9)).model.layers[0]
    assert isinstance(block, gpt_kit_hf.TransformerBlock)
    assert isinstance(block.self_attn, gpt_kit_hf.MultiHeadAttention)
    assert isinstance(block.mlp, gpt_kit_hf.FeedForward)
    assert isinstance(block.mlp.act_fn, gpt_kit_hf.GELU)
    assert isinstance(block.input_layernorm, gpt_kit_hf.LayerNorm)


def test_each_folder_lists_its_public_names() -> None:
    folders = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(gpt_kit_hf.__path__, "gpt_kit_hf.")
        if found.ispkg
    ]
    listed = {name: folder for folder in folders for name in getattr(folder, "__all__", [])}
    in_no_folder = {name for name in gpt_kit_hf.__all__ if name.endswith("Error")}
    assert listed.keys() | in_no_folder == set(gpt_kit_hf.__all__)
    assert all(getattr(folder, name) is getattr(gpt_kit_hf, name) for name, folder in listed.items())


def test_test_files_have_different_names() -> None:
    """Pytest imports them by their last name."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
