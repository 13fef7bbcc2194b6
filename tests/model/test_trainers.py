"""The trainers of transformers and TRL take the model as they take the models written inside transformers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from shapes import MODERN
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import (  # type: ignore[attr-defined]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    GPTKitForSequenceClassification,
    get_encoding,
    save_tokenizer,
)

# Bytes, the end of text and a token for padding; with the end of text as padding a collator would not train it.
END, PAD, VOCAB, CONTEXT = 256, 257, 258, 128
ROWS = [
    [7, 1, 5],
    [9, 9, 2, 40, 41, 3, 200, 8, 11],
    [3, 2, 1, 0, 77, 78],
    [100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 0],
]
TEXTS = ["a b", "the cat sat on the mat", "one two three", "packed", "rows of several lengths", "x"]

pytestmark = [
    pytest.mark.usefixtures("logged"),
    # TRL and PEFT call the switch of activation checkpointing, which TRL turns on, by names that transformers gave up.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning"),
]


def random_model(**overrides: Any) -> GPTKitForCausalLM:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "max_position_embeddings": CONTEXT}
    model = GPTKitForCausalLM(GPTKitConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if parameter.ndim == 2 else 0.05)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model, of the modern shape as it has all parts, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    random_model(**MODERN, bos_token_id=END, eos_token_id=END, pad_token_id=PAD).save_pretrained(path)
    save_tokenizer(get_encoding("bytes"), path, model_max_length=CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == PAD
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def log_probabilities(model: Any, row: list[int]) -> Tensor:
    """Return the log-probabilities (T - 1, V) of each token after the first of a row that is alone in its batch."""
    logits: Tensor = model(torch.tensor([row])).logits
    return logits[0, :-1].log_softmax(dim=-1)


def row_loss(model: Any, row: list[int], labels: list[int] | None = None, *, smoothing: float = 0.0) -> Tensor:
    """Return the sum over the trained tokens of a row, with the labels' smoothing (Szegedy et al. 2016, section 7)."""
    targets = torch.tensor(row if labels is None else labels)[1:]
    logs = log_probabilities(model, row)[targets != -100]  # (N, V)
    of_target = -logs.gather(-1, targets[targets != -100, None]).sum()
    return (1 - smoothing) * of_target + smoothing * -logs.mean(dim=-1).sum()


def mean_loss(model: Any, rows: list[list[int]], labels: list[list[int]] | None = None) -> Tensor:
    """Return the mean over the trained tokens of all rows, each row computed alone."""
    labels = rows if labels is None else labels
    losses = [row_loss(model, row, row_labels) for row, row_labels in zip(rows, labels, strict=True)]
    return torch.stack(losses).sum() / sum(target != -100 for row in labels for target in row[1:])


def largest_difference(first: Any, second: Any) -> float:
    """Compare the weights of two models."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    differences = []
    for (name, weight), (other_name, other) in pairs:
        assert name == other_name
        differences.append(float((weight - other).abs().max()))
    return max(differences)


def logged_losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- Trainer of transformers


def arguments(tmp_path: Path, **options: Any) -> TrainingArguments:
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    settings |= {"optim": "sgd", "learning_rate": 0.2, "lr_scheduler_type": "constant", "num_train_epochs": 2}
    return TrainingArguments(**{"output_dir": str(tmp_path / "run"), **settings, **options})


def rows_dataset() -> Dataset:
    return Dataset.from_dict({"input_ids": ROWS})


Collate = Callable[[PreTrainedTokenizerBase], Any]
COLLATES: dict[str, Collate] = {
    "padded": lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm=False),
    "packed": lambda _: DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("collate", COLLATES)
def test_trainer_takes_the_steps_of_a_hand_written_loop(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    collate: str,
    batch_size: int,
    accumulation: int,
    smoothing: float,
) -> None:
    before, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    tokens = sum(len(row) - 1 for row in ROWS)
    for _ in range(2):
        loss = torch.stack([row_loss(by_hand, row, smoothing=smoothing) for row in ROWS]).sum() / tokens
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient

    args = arguments(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
    )
    trainer = Trainer(model, args, train_dataset=rows_dataset(), data_collator=COLLATES[collate](tokenizer))
    assert trainer.train().global_step == 2
    assert largest_difference(model, before) > 0.05
    assert largest_difference(model, by_hand) < 2e-6


@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}])
def test_flattened_rows_do_not_see_each_other(model: Any, options: dict[str, bool]) -> None:
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row} for row in ROWS])
    assert batch["input_ids"].shape == (1, sum(len(row) for row in ROWS))
    by_hand = mean_loss(model, ROWS)
    torch.testing.assert_close(model(**batch).loss, by_hand)
    # Without the positions it is one row, whose loss is another.
    one_row = model(batch["input_ids"], labels=batch["labels"]).loss
    assert (one_row - by_hand).abs() > 0.01


def test_evaluation_gives_the_mean_loss_of_a_token(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = Trainer(
        model, arguments(tmp_path), eval_dataset=rows_dataset(), data_collator=COLLATES["padded"](tokenizer)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(model, ROWS).item(), rel=1e-5)
    prediction = trainer.predict(rows_dataset())
    assert prediction.label_ids.tolist() == [row + [-100] * (11 - len(row)) for row in ROWS]
    for row, logits in zip(ROWS, prediction.predictions, strict=True):
        alone = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits[: len(row)]), alone, rtol=0, atol=1e-5)


# Trainer says this of every model whose head is tied, GPT-2 and Llama too: the weight is there under its other name.
TIED = "There were missing keys in the checkpoint model loaded: ['lm_head.weight']."


def test_the_best_model_is_kept(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, logged: list[str]
) -> None:
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The rate is too high to learn at, so that the last model is not the best.
    args = arguments(tmp_path, max_steps=4, learning_rate=8.0, load_best_model_at_end=True, **schedule)
    data, collate = rows_dataset(), COLLATES["padded"](tokenizer)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    losses = logged_losses(trainer, "eval_loss")
    assert min(losses) < losses[-1]
    assert mean_loss(model, ROWS).item() == pytest.approx(min(losses), rel=1e-5)
    logged.remove(TIED)


def test_a_resumed_run_ends_with_equal_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, logged: list[str]
) -> None:
    def run(seed: int, resume: str | None = None) -> Any:
        torch.manual_seed(seed)
        model = random_model(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
        options = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 3}
        args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=2, lr_scheduler_type="linear", **options)
        collate = COLLATES["padded"](tokenizer)
        Trainer(model, args, train_dataset=rows_dataset(), data_collator=collate).train(resume_from_checkpoint=resume)
        return model

    whole = run(3)
    half = tmp_path / "run" / "checkpoint-3"
    loaded = AutoModelForCausalLM.from_pretrained(half)
    assert type(loaded) is GPTKitForCausalLM
    assert largest_difference(loaded, whole) > 1e-3  # a checkpoint halfway, not of the end
    resumed = run(4, str(half))  # from other weights, so that all comes from the checkpoint
    assert largest_difference(resumed, whole) == 0
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    logged.remove(TIED)


# --- TRL's trainer for supervised fine-tuning


# One batch holds all rows, so that the loss of each step can be written down.
TRL_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 16,
    "max_steps": 3,
    "learning_rate": 0.01,
    "logging_steps": 1,
}


def sft_arguments(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(**{"output_dir": str(tmp_path / "run"), "max_length": 64, **TRL_SETTINGS, **options})


def one_batch(trainer: SFTTrainer | DPOTrainer) -> dict[str, Any]:
    (batch,) = trainer.get_train_dataloader()
    return dict(batch)


def documents_of(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each document in a batch of TRL's, padded or packed in one row."""
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["position_ids"].shape[1]]
        spans = [(0, slice(start, end)) for start, end in zip(starts, ends, strict=True)]
    else:
        spans = [(row, slice(0, int(mask.sum()))) for row, mask in enumerate(batch["attention_mask"])]
    return [(batch["input_ids"][row, span].tolist(), batch["labels"][row, span].tolist()) for row, span in spans]


def bytes_of(text: str) -> list[int]:
    return [*text.encode(), END]


def pieces(ids: list[int], length: int) -> Iterator[list[int]]:
    return (ids[start : start + length] for start in range(0, len(ids), length))


WHOLE = [bytes_of(text) for text in TEXTS]
CUT = 16
# What each way of batching makes of the rows: every document of the batch.
WAYS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "padded": ({}, WHOLE),
    "padding-free": ({"padding_free": True, "max_length": None}, WHOLE),
    "bfd": ({"packing": True, "packing_strategy": "bfd"}, WHOLE),
    "bfd, cut": ({"packing": True, "packing_strategy": "bfd", "max_length": CUT}, [row[:CUT] for row in WHOLE]),
    "bfd_split": (
        {"packing": True, "packing_strategy": "bfd_split", "max_length": CUT},
        [piece for row in WHOLE for piece in pieces(row, CUT)],
    ),
    "wrapped": (
        {"packing": True, "packing_strategy": "wrapped", "max_length": CUT},
        list(pieces([token for row in WHOLE for token in row], CUT)),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_sft_trains_each_document_as_if_it_were_alone(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, way: str
) -> None:
    options, expected = WAYS[way]
    trainer: Any = SFTTrainer(
        model,
        sft_arguments(tmp_path, **options),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    batch = one_batch(trainer)
    documents = [ids for ids, _ in documents_of(batch)]
    assert sorted(documents) == sorted(expected)

    by_hand = mean_loss(model, documents)
    torch.testing.assert_close(model(**batch).loss, by_hand)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), by_hand)
    if "position_ids" in batch:
        one_row = model(batch["input_ids"], labels=batch["labels"]).loss
        assert (one_row - by_hand).abs() > 0.01  # documents that see each other would be seen here

    trainer.train()
    losses = logged_losses(trainer)
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-4)
    assert losses[0] > losses[1] > losses[2]


PROMPTS, ANSWERS = ["add 1 2:", "hi"], [" 3", " hello to you"]
MESSAGES = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
# A second turn: its question is not trained, nor is the one before.
MESSAGES[0] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'][0] }}]"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def masked(*parts: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Return ids and labels of the parts of a text, each trained with an end of text after it, or not trained."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in parts:
        part = bytes_of(text) if trained else list(text.encode())
        ids += part
        labels += part if trained else [-100] * len(part)
    return ids, labels


SUPERVISED: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[list[int], list[int]]]]] = {
    "completion": (
        {"prompt": PROMPTS, "completion": ANSWERS},
        {},
        [masked((prompt, False), (answer, True)) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)],
    ),
    "assistant": (
        {"messages": MESSAGES},
        {"assistant_only_loss": True},
        [
            masked((f"[u]{PROMPTS[0]}[a]", False), (ANSWERS[0], True), ("[u]more[a]", False), ("no", True)),
            masked((f"[u]{PROMPTS[1]}[a]", False), (ANSWERS[1], True)),
        ],
    ),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", SUPERVISED)
def test_sft_trains_the_answers_only(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, packing: bool
) -> None:
    rows, options, expected = SUPERVISED[kind]
    tokenizer.chat_template = CHAT_TEMPLATE
    args = sft_arguments(tmp_path, packing=packing, **options)
    trainer: Any = SFTTrainer(model, args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    batch = one_batch(trainer)
    assert sorted(documents_of(batch)) == sorted(expected)
    by_hand = mean_loss(model, [ids for ids, _ in expected], [labels for _, labels in expected])
    torch.testing.assert_close(model(**batch).loss, by_hand)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-4)
    assert losses[0] > losses[-1]


def test_sft_of_a_folder_trains_adapters_on_packed_rows(folder: Path, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer: Any = SFTTrainer(
        str(folder), sft_arguments(tmp_path, packing=True), train_dataset=data, eval_dataset=data, peft_config=adapter
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert type(trainer.model.get_base_model()) is GPTKitForCausalLM
    # A new adapter changes nothing yet.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(base, WHOLE).item(), rel=1e-5)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loss = mean_loss(adapted, WHOLE).item()
    assert loss < mean_loss(base, WHOLE).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert largest_difference(trainer.model.unload(), base) == 0


# --- TRL's trainers for preferences and rewards


def log_ratio(trainer: DPOTrainer, prompt: str, answer: str) -> Tensor:
    """Return by how much the policy finds an answer more likely than the reference does, as a logarithm."""
    row = masked((prompt, False), (answer, True))
    return row_loss(trainer.ref_model, *row) - row_loss(trainer.model, *row)


def test_dpo_lowers_the_loss_of_its_paper(folder: Path, tmp_path: Path) -> None:
    rejected = ["!", " go away"]
    data = Dataset.from_dict({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": rejected})
    args = DPOConfig(output_dir=str(tmp_path), beta=0.2, **TRL_SETTINGS)
    trainer: Any = DPOTrainer(str(folder), args=args, train_dataset=data)
    assert type(trainer.ref_model) is GPTKitForCausalLM
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is still the reference
    assert losses[0] > losses[1] > losses[2]

    # Rafailov et al. 2023, eq. 7.
    margins = [
        log_ratio(trainer, prompt, chosen) - log_ratio(trainer, prompt, other)
        for prompt, chosen, other in zip(PROMPTS, ANSWERS, rejected, strict=True)
    ]
    by_hand = -logsigmoid(0.2 * torch.stack(margins)).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, one_batch(trainer)), by_hand)
    assert largest_difference(trainer.ref_model, AutoModelForCausalLM.from_pretrained(folder)) == 0


def test_grpo_learns_from_what_the_model_generates(folder: Path, tmp_path: Path) -> None:
    def share_of_ascii(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]

    settings = {**TRL_SETTINGS, "max_steps": 8, "learning_rate": 0.02}
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=8, max_completion_length=12, **settings)
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOTrainer(str(folder), reward_funcs=share_of_ascii, args=args, train_dataset=data)
    trainer.train()
    rewards = logged_losses(trainer, "reward")
    assert sum(rewards[-2:]) - sum(rewards[:2]) > 0.3


def test_a_reward_model_learns_to_prefer(folder: Path, tmp_path: Path, logged: list[str]) -> None:
    chosen, rejected = [" yes, gladly", " fine"], [" no", " go away at once"]
    data = Dataset.from_dict({"prompt": PROMPTS, "chosen": chosen, "rejected": rejected})
    args = RewardConfig(output_dir=str(tmp_path), **TRL_SETTINGS)
    trainer: Any = RewardTrainer(str(folder), args=args, train_dataset=data)
    assert type(trainer.model) is GPTKitForSequenceClassification
    (report,) = logged
    assert [line.split()[0] for line in report.splitlines() if line.endswith("MISSING | ")] == ["score.weight"]
    logged.clear()

    def reward(model: Any, text: str) -> Tensor:
        result: Tensor = model(torch.tensor([[*text.encode(), END]])).logits[0, 0]
        return result

    def loss(model: Any) -> Tensor:
        """Ouyang et al. 2022, eq. 1, with each text alone in its batch."""
        margins = [
            reward(model, prompt + good) - reward(model, prompt + bad)
            for prompt, good, bad in zip(PROMPTS, chosen, rejected, strict=True)
        ]
        return -logsigmoid(torch.stack(margins)).mean()

    torch.testing.assert_close(trainer.compute_loss(trainer.model, one_batch(trainer)), loss(trainer.model))
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[0] > losses[-1]
    trainer.save_model(str(tmp_path / "reward"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(loss(saved), loss(trainer.model))
    assert loss(saved) < losses[0]
