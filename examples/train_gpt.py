"""Train a small GPT on a text file, from raw text to a saved model: every step in one file.

    python examples/train_gpt.py shakespeare.txt runs/my_first_gpt
    accelerate launch examples/train_gpt.py shakespeare.txt runs/my_first_gpt      # on one GPU or several

`gpt-kit train` does the same with checkpoints, resume, logging and all options; this file shows what happens inside.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt_kit_hf import (
    AMPTrainer,
    GPTModel,
    OptimizerOptions,
    compute_loader_loss,
    create_model_config,
    create_optimizer,
    create_pretraining_dataloader,
    generate_text_autoregressive,
    get_encoding,
    learning_rate_at,
    save_tokenizer,
    text_to_token_ids,
    token_ids_to_text,
)

MAX_LENGTH = 64  # tokens in one training window: how far the model can look back
BATCH_SIZE = 16  # windows in one optimizer step, on each process


def main() -> None:
    """Train on a text file and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_file", type=Path, help="UTF-8 text to train on")
    parser.add_argument("output_dir", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument("--max_steps", type=int, default=500, help="optimizer steps (default: 500)")
    args = parser.parse_args()

    # 1. Processes and devices. `accelerate launch` may start several; alone, this is one process on CPU or GPU.
    accelerator = Accelerator()
    torch.manual_seed(0)  # the same initial weights in every process

    # 2. Text. The last tenth is for evaluation only: its loss shows how well the model predicts text it has not seen.
    text = args.text_file.read_text(encoding="utf-8")
    split = len(text) * 9 // 10

    # 3. Tokens. With the "bytes" encoding each UTF-8 byte is a token, and <|endoftext|> is one more: 257 in all.
    tokenizer = get_encoding("bytes")

    # 4. Batches. Each item is a pair (input, target) of shape (B, T): target[t] is the token after input[t].
    train_loader = create_pretraining_dataloader(
        text[:split], BATCH_SIZE, MAX_LENGTH, stride=MAX_LENGTH, tokenizer=tokenizer
    )
    eval_loader = create_pretraining_dataloader(
        text[split:], BATCH_SIZE, MAX_LENGTH, stride=MAX_LENGTH, tokenizer=tokenizer, shuffle=False, drop_last=False
    )
    train_loader = accelerator.prepare(train_loader)  # each process gets its own share of the batches

    # 5. The model: 4 blocks of width 128 with 4 attention heads. A vocabulary entry for each token of the tokenizer.
    config = create_model_config("nano-xs", vocab_size=tokenizer.n_vocab, max_position_embeddings=MAX_LENGTH)
    model = GPTModel(config)
    accelerator.print(f"{model.num_parameters():,} parameters, {len(train_loader)} batches in an epoch")

    # 6. The optimizer. Weights move against the gradient; the learning rate rises over the first steps, then falls.
    options = OptimizerOptions(learning_rate=2.5e-3, warmup_steps=50, min_lr_ratio=0.1, weight_decay=0.1)
    trainer = AMPTrainer(model, create_optimizer(model, options), max_grad_norm=1.0, accelerator=accelerator)

    # 7. The loop.
    step = 0
    while step < args.max_steps:
        for input_batch, target_batch in train_loader:
            for group in trainer.optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args.max_steps, options)
            # Forward pass, cross entropy, backward pass, gradient clipping, optimizer step.
            report = trainer.train_step(input_batch, target_batch)
            step += 1
            if step % 50 == 0 or step == args.max_steps:
                # The loss in nats per token. exp(loss) is the perplexity; log2(e) * loss is bits per byte here.
                loss = compute_loader_loss(eval_loader, model, accelerator.device, num_batches=20)
                accelerator.print(f"step {step:4d}  train loss {report.loss:.3f}  eval loss {loss:.3f}")
            if step == args.max_steps:
                break

    # 8. Evaluation on the whole evaluation text.
    loss = compute_loader_loss(eval_loader, model, accelerator.device)
    accelerator.print(f"eval loss {loss:.4f} nats per token, {loss / math.log(2):.3f} bits per byte")

    # 9. Generation: one token at a time, each sampled from the 50 most likely.
    prompt = text_to_token_ids("The ", tokenizer)  # (1, 4)
    token_ids = generate_text_autoregressive(model, prompt, max_new_tokens=50, temperature=0.8, top_k=50)
    accelerator.print(token_ids_to_text(token_ids, tokenizer))

    # 10. Save. AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load this folder.
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        save_tokenizer(tokenizer, args.output_dir, model_max_length=MAX_LENGTH)


if __name__ == "__main__":
    main()
