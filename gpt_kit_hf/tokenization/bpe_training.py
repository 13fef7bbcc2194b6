"""Learns the tokens of a BPE in a process of its own, which can be ended at any time, as no trainer of a library can.

This module is also the program of that process. It reads texts from the standard input, each after its length in
bytes (8 bytes, little endian), and writes the tokens as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt_kit_hf.errors import RunError
from gpt_kit_hf.tokenization.export import byte_characters, byte_level_split

# Splits text as `export.GPT2_PATTERN` does, except that a pre-token has at most 256 characters: the trainer's
# time grows with the square of the longest. A text without longer ones gives the same tokens. `(?>...)` is possessive
# in Oniguruma, which reads `{1,256}+` as a repeat of a repeat.
LEARNED_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,256}| ?\p{N}{1,256}| ?[^\s\p{L}\p{N}]{1,256}"
    r"|(?>\s{1,256})$|\s{1,256}(?!\S)|\s"
)

_LENGTH_BYTES = 8


def learn_tokens(texts: Iterable[str], size: int) -> list[bytes]:
    """Return at most `size` tokens, the 256 single bytes among them, in the order in which they were learned.

    On a terminal, progress is shown on stderr. An exception, also that of a signal handler, ends the process at once.
    Raises RunError if the process ends before it has an answer.
    """
    # The same modules as here, whatever lies in the working directory.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal is for this process, which ends the other
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(texts, process.stdin)
        answer = process.stdout.read()
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
    if process.returncode:
        raise RunError(
            f"the process that trains the bpe ended with exit code {process.returncode}; if memory ran out, "
            "lower --vocab_text_mb"
        )
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return [bytes(byte_of[character] for character in token) for token in json.loads(answer)]


def _send(texts: Iterable[str], stream: IO[bytes]) -> None:
    """Write the texts and close the stream."""
    with suppress(BrokenPipeError):  # the process has ended, with an exit code
        for text in texts:
            encoded = text.encode()
            stream.write(len(encoded).to_bytes(_LENGTH_BYTES, "little"))
            stream.write(encoded)
        stream.close()


def _receive(stream: IO[bytes]) -> Iterator[str]:
    while length := stream.read(_LENGTH_BYTES):
        yield stream.read(int.from_bytes(length, "little")).decode()


def main() -> None:
    """Learn tokens from the texts on the standard input; their number is the first argument."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level_split(LEARNED_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=int(sys.argv[1]),
        min_frequency=2,  # a pair that occurs once says nothing about other text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    learner.train_from_iterator(_receive(sys.stdin.buffer), trainer)
    learned: dict[str, int] = learner.get_vocab()
    sys.stdout.write(json.dumps(sorted(learned, key=learned.__getitem__)))
