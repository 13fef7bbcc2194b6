"""Which of the patterns that llama.cpp has is the best for a new vocabulary: tokens, bits per byte and speed.

`python benchmarks/patterns.py --prose tinyshakespeare.txt` trains a BPE by each pattern on prose and on Python's
standard library, and encodes the rest of each text, a tenth, with it. It prints

1. bytes a token, and the bits per byte of the rest under models that count words of two and three tokens
   (interpolated as Witten and Bell 1991 do);
2. with `--steps`, the bits per byte of a small transformer after as many steps of equally many tokens;
3. the speed of encoding, in turns, best of `--rounds`.

`gpt-4o` and `deepseek-v3` are not among them: llama.cpp splits by their expressions with a recursive matcher, which
ends the process with a segmentation fault at a run of 30,000 letters.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt_kit_hf import GPTModel, create_model_config
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.tokenization.export import GPT2_PATTERN, byte_characters, byte_level_split

_ANY_CASE = r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
_SIGNS_AND_LINES = r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s+"
# By llama.cpp's name; each splits every string as llama.cpp's own code does.
PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "smollm": r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s",
    "llama-bpe": rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{{1,3}}|{_SIGNS_AND_LINES}",
    "qwen2": rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}|{_SIGNS_AND_LINES}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", required=True, help="a text of about a megabyte, paragraphs apart by an empty line")
    parser.add_argument("--code_mb", type=float, default=4.0, help="megabytes of the standard library")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=0, help="steps of the transformer; 0: none")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("text   pattern    bytes/token  bigrams  trigrams  transformer  MB/s")
    for name, (learned, rest) in texts(options).items():
        encodings = {pattern: trained(pattern, learned, options.vocab_size) for pattern in PATTERNS}
        speeds = encoding_speeds(encodings, rest, options.rounds)
        for pattern, encoding in encodings.items():
            ids, unseen = ([encoding.encode_ordinary(text) for text in part] for part in (learned, rest))
            size = sum(len(text.encode()) for text in rest)
            counted = [counted_bits(ids, unseen, encoding.n_vocab, order) / size for order in (2, 3)]
            runs = [trained_bits(ids, unseen, encoding.n_vocab, options.steps, seed) for seed in range(options.seeds)]
            learnt = " ".join(f"{bits / size:.3f}" for bits in runs) if options.steps else "-"
            print(
                f"{name:6} {pattern:10} {size / sum(map(len, unseen)):11.3f}  {counted[0]:7.3f}  {counted[1]:8.3f}  "
                f"{learnt:>11}  {speeds[pattern]:4.1f}",
                flush=True,
            )


def texts(options: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """Return the documents to learn from, and the rest."""
    paragraphs = Path(options.prose).read_text(encoding="utf-8").split("\n\n")
    cut = len(paragraphs) * 9 // 10
    prose = ["\n\n".join(part) for part in (paragraphs[:cut], paragraphs[cut:])]
    files = find_files(["python-stdlib"])
    random.Random(0).shuffle(files)
    code, size = [], 0
    for file in files:
        if size < options.code_mb * 1e6:
            code.append(Path(file).read_bytes().decode(errors="replace"))
            size += len(code[-1])
    cut = len(code) * 9 // 10
    return {"prose": (prose[:1], prose[1:]), "code": (code[:cut], code[cut:])}


def trained(pattern: str, documents: list[str], size: int) -> tiktoken.Encoding:
    """Return a BPE of `size` ids, as `train_bpe` trains it, by a pattern."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level_split(PATTERNS[pattern])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    learned = learner.get_vocab()
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in sorted(learned, key=lambda token: learned[token]):
        ranks.setdefault(bytes(byte_of[character] for character in token), len(ranks))
    return tiktoken.Encoding(
        pattern, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


def encoding_speeds(encodings: dict[str, tiktoken.Encoding], documents: list[str], rounds: int) -> dict[str, float]:
    """Return megabytes a second, the best of the rounds, in which all take turns."""
    best = dict.fromkeys(encodings, math.inf)
    for _ in range(rounds):
        for pattern, encoding in encodings.items():
            began = time.perf_counter()
            for text in documents:
                encoding.encode_ordinary(text)
            best[pattern] = min(best[pattern], time.perf_counter() - began)
    return {
        pattern: sum(len(text.encode()) for text in documents) / 1e6 / seconds for pattern, seconds in best.items()
    }


def counted_bits(learned: list[list[int]], unseen: list[list[int]], vocab_size: int, order: int) -> float:
    """Return the bits of unseen ids under a model that counts words of up to `order` ids."""
    words: Counter[tuple[int, ...]] = Counter()
    before: Counter[tuple[int, ...]] = Counter()  # how often a context occurs, and how many ids follow it
    followers: Counter[tuple[int, ...]] = Counter()
    for ids in learned:
        for at in range(len(ids)):
            for start in range(max(0, at + 1 - order), at + 1):
                word = tuple(ids[start : at + 1])
                followers[word[:-1]] += words[word] == 0
                words[word] += 1
                before[word[:-1]] += 1
    bits = 0.0
    for ids in unseen:
        for at in range(len(ids)):
            probability = 1 / vocab_size
            for start in range(at, max(0, at + 1 - order) - 1, -1):
                word = tuple(ids[start : at + 1])
                count, kinds = before[word[:-1]], followers[word[:-1]]
                if count == 0:
                    break
                probability = (words[word] + kinds * probability) / (count + kinds)
            bits -= math.log2(probability)
    return bits


def trained_bits(learned: list[list[int]], unseen: list[list[int]], vocab_size: int, steps: int, seed: int) -> float:
    """Return the bits of unseen ids under a small transformer, trained for some steps of 2,048 tokens."""
    if not steps:
        return math.nan
    torch.manual_seed(seed)
    length = 128
    config = create_model_config(
        "modern-xs", n_layer=4, n_head=4, n_embd=128, vocab_size=vocab_size, max_position_embeddings=length
    )
    model, ids = GPTModel(config), torch.from_numpy(np.concatenate([np.array(row) for row in learned]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        starts = torch.randint(0, len(ids) - length - 1, (16, 1))
        rows = ids[starts + torch.arange(length + 1)]
        loss = model(rows[:, :-1], shift_labels=rows[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rest = torch.from_numpy(np.concatenate([np.array(row) for row in unseen]))
    bits = 0.0
    with torch.no_grad():
        for start in range(0, len(rest) - 1, length):
            row = rest[start : start + length + 1][None]
            loss = model.eval()(row[:, :-1], shift_labels=row[:, 1:]).loss
            bits += float(loss) * (row.shape[1] - 1) / math.log(2)
    return bits


if __name__ == "__main__":
    main()
