"""Tune a GPT to tell spam from other messages: a classifier from a pretrained model, in one file.

    python examples/classify_spam.py runs/quickstart messages.tsv runs/spam

Each line of the file is a label, a tab and a message, as in the SMS Spam Collection (Almeida et al. 2011). The labels
may have any names, and there may be more than two. The model gets a new head, which reads the last token of a message:
with causal attention it is the only one that has seen all the others.
"""

import argparse
import csv
import random
from collections import Counter
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

import gpt_kit_hf  # noqa: F401  registers the model with the Auto classes


def main() -> None:
    """Train on seven tenths of the messages, choose the epoch on one tenth, and report the accuracy on the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pretrained model, or Hub id")
    parser.add_argument("messages", type=Path, help="UTF-8 file with a label, a tab and a message in each line")
    parser.add_argument("output_dir", type=Path, help="folder for the classifier and its tokenizer")
    parser.add_argument("--num_train_epochs", type=float, default=5, help="passes over the messages (default: 5)")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="largest learning rate (default: 5e-5)")
    parser.add_argument("--batch_size", type=int, default=8, help="messages in one optimizer step (default: 8)")
    parser.add_argument(
        "--last_block_only", action="store_true", help="train the last block, final norm and head only"
    )
    args = parser.parse_args()

    # 1. Messages, shuffled and split. Equally many of each label, or "always ham" would be right most of the time.
    with args.messages.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    random.Random(0).shuffle(rows)
    fewest = min(Counter(label for label, _ in rows).values())
    labels = sorted({label for label, _ in rows})
    balanced = [row for name in labels for row in [row for row in rows if row[0] == name][:fewest]]
    random.Random(1).shuffle(balanced)
    ends = [len(balanced) * 7 // 10, len(balanced) * 8 // 10]
    parts = {"train": balanced[: ends[0]], "validation": balanced[ends[0] : ends[1]], "test": balanced[ends[1] :]}

    # 2. Tokens. A collator pads each batch; the attention mask says what is padding, so any token can be used for it.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = {
        part: [{**tokenizer(text, truncation=True), "labels": labels.index(label)} for label, text in messages]
        for part, messages in parts.items()
    }

    # 3. The model: the pretrained blocks, and a new linear layer from the hidden state of a token to the labels.
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, id2label=names, label2id={name: index for index, name in names.items()}, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    if args.last_block_only:
        model.requires_grad_(False)
        for trained in (model.model.layers[-1], model.model.norm, model.score):
            trained.requires_grad_(True)

    # 4. Training.
    settings = TrainingArguments(
        output_dir=str(args.output_dir / "checkpoints"),
        num_train_epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        weight_decay=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()

    # 5. Accuracy, on messages that had no part in training or in the choice of the epoch, too.
    for part in parts:
        accuracy = trainer.evaluate(data[part])["eval_accuracy"]
        print(f"{part}: {accuracy:.1%} of {len(parts[part])} messages are labelled correctly")

    # 6. The classifier is an ordinary model folder.
    trainer.save_model(str(args.output_dir))
    tokenizer.save_pretrained(args.output_dir)
    classify = pipeline("text-classification", model=str(args.output_dir), device=trainer.args.device)
    for label, text in parts["test"][:3]:
        found = classify(text, truncation=True)[0]
        print(f"{found['label']} ({found['score']:.2f}), labelled {label}: {text}")


if __name__ == "__main__":
    main()
