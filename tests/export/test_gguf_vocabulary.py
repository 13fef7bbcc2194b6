"""Vocabularies in GGUF files: the real llama.cpp gives the ids of this package, string by string."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest
import tiktoken
import torch
from foreign_models import write_tokenizer

from gpt_kit_hf import GPTModel, create_model_config, get_encoding
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.export.gguf_file import save_as_gguf
from gpt_kit_hf.export.gguf_vocabulary import check_vocabulary
from gpt_kit_hf.hub.model_folder import load_text_encoding
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import train_bpe, with_pad_token

pytest.importorskip("gguf", reason="needs the extra gguf")

STRINGS = 10_000
PIECES = [
    *("The ", "don't", "HE'LL", "'s", "'S", " we've", "naïve", "ß", "Ǆ", "ﬁ", "Ⅷ", "½", "²", "١٢٣"),
    *("e\u0301", "\u0301", "n\u0303"),
    *("0", "12", "345", "6789", "1234567890", "3.14", "1e-05", "0x1F", " 7", "  88"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85"),
    *("\u00a0", "\u1680", "\u2003", "\u2028"),
    *("\u200b", "\ufeff", "\u3000", "\x00", "\x7f", "\u0600", "\U000e0001", "\ufffd", "\U0010ffff", "\ue000"),
    *("日本語", "中文\uff0c。", "한국어", "ไทย", "العربية", "עברית", "हिन्दी", "தமிழ்"),
    *("ཨོཾ", "𓀀", "\U0001d518\U0001d52b", "㈠"),
    *("🙂", "👩‍👩‍👧", "🏽", "🇩🇪", "☃\ufe0f", "—", "“", "”", "…", "€9", "№", "™", "¿", "·"),
    *("<|endoftext|>", "<|pad|>", "<|im_start|>", "<s>", "[INST]", "[unused 1]", "###", "```"),
    *("{}", "=>", "!=", "_", "__init__", "\x00\x00"),
]  # fmt: skip


def strings() -> list[str]:
    """Prose and code, and pieces of all kinds in a random order."""
    draws = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "".join((library / name).read_text(encoding="utf-8") for name in ("argparse.py", "textwrap.py", "ast.py"))
    found = []
    for number in range(STRINGS):
        if number % 4 == 0:
            start = draws.randrange(len(code) - 200)
            found.append(code[start : start + draws.randrange(1, 200)])
        elif number % 4 == 1:  # any code points, surrogates left out
            points = [draws.randrange(draws.choice((0x80, 0x800, 0x3000, 0x110000))) for _ in range(12)]
            found.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000) or "x")
        else:
            found.append("".join(draws.choices(PIECES, k=draws.randrange(1, 14))))
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return strings()


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_llama_cpp_gives_the_same_ids(
    kind: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra llama")
    from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel

    if kind == "gpt2":
        encoding: tiktoken.Encoding = request.getfixturevalue("gpt2_encoding")
    else:
        encoding = with_pad_token(get_encoding("bytes")) if kind == "bytes" else train_bpe(texts, 1500, pad_token=True)
    torch.manual_seed(0)
    fields = {"vocab_size": encoding.n_vocab, "n_layer": 1, "n_embd": 32, "n_head": 1, "max_position_embeddings": 64}
    save_as_gguf(GPTModel(create_model_config("modern-xs", **fields)), encoding, tmp_path / "model.gguf")
    engine = LlamaCppModel(tmp_path / "model.gguf", threads=1)
    different = [text for text in texts if encode_by(engine, text) != encoding.encode(text, allowed_special="all")]
    assert different == []


def encode_by(engine: object, text: str) -> list[int]:
    ids: list[int] = engine.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    return ids


def test_a_vocabulary_of_an_earlier_version_is_refused_with_what_to_do(texts: list[str]) -> None:
    new = train_bpe(texts[:500], 300)
    assert check_vocabulary(new) == "gpt-2"
    earlier = tiktoken.Encoding(
        "mine",
        pat_str=encodings._EARLIER_PATTERN,
        mergeable_ranks=new._mergeable_ranks,
        special_tokens=new._special_tokens,
    )
    with pytest.raises(UsageError, match=r"vocabulary 'mine' does not split .* or train one with a new vocabulary"):
        check_vocabulary(earlier)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_tokenizer("llama", tmp_path)
    encoding = load_text_encoding(str(tmp_path), "theirs")
    with pytest.raises(
        UsageError, match=r"the tokenizer 'theirs' is not a plain byte-level BPE with <\|endoftext\|>, so"
    ):
        check_vocabulary(encoding)
