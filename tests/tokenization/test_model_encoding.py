"""The tokenizer of any model as an encoding: the ids, the bytes and the special tokens of transformers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from foreign_models import TEXT, write_tokenizer
from transformers import AutoTokenizer

from gpt_kit_hf import UsageError
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.model_encoding import TokenizerEncoding, encoding_of

TEXTS = [
    "The old king loves the sea.",
    " two  blanks\n\tand a tab",
    "é e\u0301 日本 🙂",
    "</s><s><|endoftext|><|im_end|>",
    "a",
]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen"])
def test_ids_and_bytes_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    write_tokenizer(kind, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoding = encoding_of(tokenizer, "mine")
    assert isinstance(encoding, TokenizerEncoding) == (kind != "gpt2")  # tiktoken has GPT-2's in full
    begin = tokenizer("", verbose=False)["input_ids"]
    assert begin == ([tokenizer.bos_token_id] if kind == "llama" else [])
    documents = encodings.encode_documents(encoding, [(text, True) for text in TEXTS], "x").tolist()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encodings.encode_ordinary(encoding, text, "x").tolist() == ids
        expected = [*begin, *ids, tokenizer.eos_token_id]
        assert documents[: len(expected)] == expected
        documents = documents[len(expected) :]
        spelled = encoding.decode_bytes([*begin, *ids]).decode()
        # What a normalizer adds or composes is part of the text that the model sees.
        assert spelled == {"gpt2": text, "llama": f" {text}", "qwen": text.replace("e\u0301", "é")}[kind]
    assert documents == []
    assert encoding.encode_single_token(encodings.EOS_TOKEN) == tokenizer.eos_token_id
    copy = pickle.loads(pickle.dumps(encoding))
    assert copy.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen"])
def test_fingerprint_stays_when_the_tokenizer_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    write_tokenizer(kind, tmp_path / "0")
    found = []
    for number in range(3):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(number))
        tokenizer("a", padding="max_length", max_length=9, truncation=True) if tokenizer.pad_token else None
        found.append(encodings.fingerprint(encoding_of(tokenizer, "mine")))
        tokenizer.save_pretrained(tmp_path / str(number + 1))
    assert len(set(found)) == 1
    write_tokenizer(kind, tmp_path / "other", text=TEXT[: len(TEXT) // 2])
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert encodings.fingerprint(encoding_of(other, "mine")) != found[0]


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    write_tokenizer("qwen", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="the tokenizer of 'mine' has no EOS token, which ends a document"):
        encoding_of(tokenizer, "mine")
