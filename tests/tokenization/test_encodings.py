"""Encodings, their export as `tokenizer.json`, training, and the kit's functions between text and ids."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import requests
import tiktoken
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import (
    EOS_TOKEN,
    check_fingerprint,
    encode_documents,
    encode_ordinary_batch,
    fingerprint,
    get_encoding,
    get_eos_token_id,
    id_dtype,
    load_encoding,
    may_cut,
    save_tokenizer,
    text_to_token_ids,
    token_ids_to_text,
    train_bpe,
)
from gpt_kit_hf.tokenization.export import GPT2_PATTERN, build_tokenizer

KINDS = ("bytes", "trained", "gpt2")
SURROGATES = range(0xD800, 0xE000)

CORPUS = [
    "def add(first, second):\n    return first + second  # 12345 + 67890\n" * 3,
    "The cat sat on the mat; the cat's hat isn't the dog's. They've said we'll go.\n\n" * 3,
    "Größe, naïve, 北京大学, привет мир, नमस्ते, 👍🏽👍🏽 and 1,000,000 or 3.14159!\t\t\r\n" * 3,
    "=" * 40 + "    " * 10 + "\n" * 12 + "aaaaaaaaaaaaaaaaaaaa 00000000",
]


@pytest.fixture(scope="module")
def trained_encoding() -> tiktoken.Encoding:
    return train_bpe(CORPUS, 400)


@pytest.fixture
def encoding(kind: str, request: pytest.FixtureRequest) -> tiktoken.Encoding:
    if kind == "bytes":
        return get_encoding("bytes")
    found: tiktoken.Encoding = request.getfixturevalue(f"{kind}_encoding")
    return found


@pytest.fixture(scope="module")
def load_exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiktoken.Encoding], Any]:
    """The export as a user loads it, from a folder whose model transformers does not know; once an encoding."""
    loaded: dict[str, Any] = {}

    def load(encoding: tiktoken.Encoding) -> Any:
        key = fingerprint(encoding)
        if key not in loaded:
            folder = tmp_path_factory.mktemp("exported")
            save_tokenizer(encoding, folder)
            (folder / "config.json").write_text('{"model_type": "nobody_knows_this", "architectures": ["X"]}')
            loaded[key] = AutoTokenizer.from_pretrained(folder)
        return loaded[key]

    return load


def fuzzed_strings(count: int, seed: int) -> list[str]:
    """Strings that mix scripts, whitespace runs, digits, contractions, control characters and the literal."""
    rng = random.Random(seed)
    any_character = [code for code in range(0x110000) if code not in SURROGATES]
    sources: list[Callable[[], str]] = [
        lambda: "".join(rng.choices("etaoin shrdlu", k=rng.randint(1, 12))),
        lambda: rng.choice(" \n\t\r\u00a0\u3000\u2028\x0b\x85\x1c") * rng.randint(1, 9),
        lambda: "".join(rng.choices(" \n\t", k=rng.randint(1, 6))),
        lambda: str(rng.randrange(10 ** rng.randint(1, 9))),
        lambda: rng.choice(["'s", "'S", "'ll", "'ve", "n't", "\u2019s", "'"]),
        lambda: "".join(rng.choices("=-_.,;:!?(){}[]<>|/\\\"'`~@#$%^&*+", k=rng.randint(1, 8))),
        lambda: "".join(map(chr, rng.choices(range(0x20), k=rng.randint(1, 3)))),
        lambda: "".join(rng.choices("éüßñ北京大学приветनमस्ते١٢٣Ⅷ²½", k=rng.randint(1, 6))),
        lambda: rng.choice(["👍", "👍🏽", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\ufeff", "\u200d", "\ufffd"]),
        lambda: "".join(map(chr, rng.choices(any_character, k=rng.randint(1, 4)))),
        lambda: rng.choice([" the", " cat", "return", "def ", "    ", "aaaa", EOS_TOKEN[:7]]),
        lambda: rng.choice([EOS_TOKEN, EOS_TOKEN * 2, f" {EOS_TOKEN}\n"]),
    ]
    return ["".join(rng.choice(sources)() for _ in range(rng.randint(0, 10))) for _ in range(count)]


# The export


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_the_same_ids_for_every_code_point(
    encoding: tiktoken.Encoding, load_exported: Callable[[tiktoken.Encoding], Any]
) -> None:
    characters = [chr(code) for code in range(0x110000) if code not in SURROGATES]
    assert len(characters) == 1_112_064
    chunks = ["".join(characters[at : at + 4096]) for at in range(0, len(characters), 4096)]
    backend = load_exported(encoding).backend_tokenizer
    ids = [encoded.ids for encoded in backend.encode_batch_fast(chunks)]
    assert ids == [encoding.encode(chunk) for chunk in chunks]
    assert [encoding.decode(row) for row in ids] == chunks


@pytest.mark.parametrize(
    ("pattern", "limit"),
    [(GPT2_PATTERN, 0x110000), (encodings._EARLIER_PATTERN, 0x10000)],
    ids=["gpt2", "trained"],
)
def test_export_splits_every_assigned_plane_alike(pattern: str, limit: int) -> None:
    # With a token for "a", "1" or "!" followed by any byte, the ids show whether a character was cut off from
    # a letter, a digit or a sign before it: the class that each library gives it.
    ranks = {bytes([byte]): byte for byte in range(256)}
    for first in b"a1!":
        for second in range(256):
            ranks.setdefault(bytes([first, second]), len(ranks))
    end = {EOS_TOKEN: len(ranks)}
    probe = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)
    planes = [*range(0x1FFFF), *range(0x2F800, 0x2FB00), *range(0x323A0, 0x33500), *range(0xE0000, 0xE0200)]
    characters = [chr(code) for code in planes if code < limit and code not in SURROGATES]
    placed = [f"a{c}1{c}!{c}" for c in characters]
    texts = ["".join(placed[at : at + 512]) for at in range(0, len(placed), 512)]
    ids = [encoded.ids for encoded in build_tokenizer(probe).encode_batch_fast(texts)]
    assert ids == [probe.encode_ordinary(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_the_same_ids_for_fuzzed_strings(
    encoding: tiktoken.Encoding, load_exported: Callable[[tiktoken.Encoding], Any]
) -> None:
    texts = fuzzed_strings(4000, seed=1)
    assert sum(EOS_TOKEN in text for text in texts) > 500
    exported = load_exported(encoding)
    expected = [encoding.encode(text, allowed_special="all") for text in texts]
    assert exported(texts)["input_ids"] == expected
    assert [encoding.decode(ids) for ids in expected] == texts
    assert [exported.decode(ids) for ids in expected[:500]] == texts[:500]


@pytest.mark.parametrize("kind", KINDS)
def test_export_reads_the_literal_as_text_when_told_to(
    encoding: tiktoken.Encoding, load_exported: Callable[[tiktoken.Encoding], Any]
) -> None:
    text = f"one{EOS_TOKEN} two"
    assert load_exported(encoding)(text, split_special_tokens=True)["input_ids"] == encoding.encode_ordinary(text)


@pytest.mark.parametrize("kind", KINDS)
def test_export_decodes_any_ids_alike(
    encoding: tiktoken.Encoding, load_exported: Callable[[tiktoken.Encoding], Any]
) -> None:
    rng = np.random.default_rng(2)
    exported = load_exported(encoding)
    rows = [rng.integers(0, encoding.n_vocab, size=20).tolist() for _ in range(500)]
    decoded = [encoding.decode(row) for row in rows]
    assert any("\ufffd" in text for text in decoded)
    assert [exported.decode(row) for row in rows] == decoded


@pytest.mark.parametrize("seed", range(8))
def test_export_of_any_trained_encoding(seed: int) -> None:
    # Few letters and long pieces give merges that overlap, repeat and compete.
    rng = random.Random(seed)
    alphabet = ("ab", "a", "abc", "aab ", "=-a", "01 a", " \n\ta", "é中a")[seed]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 400))) for _ in range(30)]
    encoding = train_bpe(texts[:15], 600)
    exported = build_tokenizer(encoding)
    assert encoding.n_vocab > 259
    assert [e.ids for e in exported.encode_batch(texts)] == [encoding.encode_ordinary(text) for text in texts]


# Saved and loaded


@pytest.mark.parametrize("kind", KINDS)
def test_load_encoding_is_the_inverse_of_save_tokenizer(encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(encoding, tmp_path)
    loaded = load_encoding(tmp_path)
    assert loaded.name == encoding.name
    assert loaded._pat_str == encoding._pat_str
    assert loaded._mergeable_ranks == encoding._mergeable_ranks
    assert loaded._special_tokens == encoding._special_tokens
    assert fingerprint(loaded) == fingerprint(encoding)


def test_a_saved_encoding_is_known_by_its_folder(trained_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(trained_encoding, tmp_path)
    assert fingerprint(get_encoding(str(tmp_path))) == fingerprint(trained_encoding)


def test_transformers_saves_the_name_again(trained_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(trained_encoding, tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = load_encoding(tmp_path / "theirs")
    assert (loaded.name, fingerprint(loaded)) == ("bpe", fingerprint(trained_encoding))


def test_several_special_tokens_keep_their_ids(tmp_path: Path, trained_encoding: tiktoken.Encoding) -> None:
    base = trained_encoding
    specials = {EOS_TOKEN: base.n_vocab - 1, "<|user|>": base.n_vocab + 1, "<|answer|>": base.n_vocab}
    chat = tiktoken.Encoding(
        "chat", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=specials
    )
    save_tokenizer(chat, tmp_path)
    text = f"<|user|>hello<|answer|> there{EOS_TOKEN}"
    ids = chat.encode(text, allowed_special="all")
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids
    assert load_encoding(tmp_path).encode(text, allowed_special="all") == ids


def test_saved_config_is_plain(tmp_path: Path) -> None:
    save_tokenizer(get_encoding("bytes"), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["bos_token"] == config["eos_token"] == EOS_TOKEN
    assert config["clean_up_tokenization_spaces"] is False
    assert "pad_token" not in config
    assert "model_max_length" not in config
    assert "auto_map" not in config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_model_max_length_is_saved_when_given(tmp_path: Path) -> None:
    save_tokenizer(get_encoding("bytes"), tmp_path, model_max_length=1024)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 1024
    with pytest.raises(UsageError, match="model_max_length is 0"):
        save_tokenizer(get_encoding("bytes"), tmp_path, model_max_length=0)


@pytest.mark.parametrize("model_type", [None, "nobody_knows_this", "gpt2", "llama"])
def test_auto_tokenizer_needs_no_custom_code(
    model_type: str | None, trained_encoding: tiktoken.Encoding, tmp_path: Path
) -> None:
    save_tokenizer(trained_encoding, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["X"]}))
    exported = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = f" The cat's 12345 {EOS_TOKEN}  mat\n"
    assert exported(text)["input_ids"] == trained_encoding.encode(text, allowed_special="all")
    assert set(exported(text)) == {"input_ids", "attention_mask"}
    assert exported.vocab_size == len(exported) == trained_encoding.n_vocab
    assert exported.bos_token_id == exported.eos_token_id == trained_encoding.eot_token
    assert exported.pad_token is None


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def as_gpt2_layout(data: dict[str, Any]) -> None:
    """Write a `tokenizer.json` as GPT-2 has it on the Hub: old fields, the split inside ByteLevel."""
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    data["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    del data["model"]["type"]
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]


def test_gpt2s_own_layout_loads(trained_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    ranks, specials = trained_encoding._mergeable_ranks, trained_encoding._special_tokens
    ours = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    save_tokenizer(ours, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    edit_tokenizer(tmp_path, as_gpt2_layout)
    loaded = load_encoding(tmp_path)
    assert fingerprint(loaded) == fingerprint(ours)
    assert loaded.name == tmp_path.name
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = fuzzed_strings(2000, seed=3)
    ids = [loaded.encode(text, allowed_special="all") for text in texts]
    assert [encoded.ids for encoded in theirs.encode_batch(texts)] == ids


def set_at(*keys_then_value: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = keys_then_value

    def edit(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "model": (set_at("model", {"type": "WordPiece", "vocab": {}}), "not a plain byte-level BPE: .*WordPiece"),
    "normalizer": (set_at("normalizer", {"type": "NFC"}), "has a normalizer"),
    "suffix": (set_at("model", "end_of_word_suffix", "</w>"), "a prefix or a suffix"),
    "no pre-tokenizer": (set_at("pre_tokenizer", None), "one split followed by byte level"),
    "prefix space": (set_at("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "one split"),
    "removes": (set_at("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"), "one split"),
    "adds bos": (
        set_at("post_processor", {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}),
        "TemplateProcessing adds tokens",
    ),
    "added word": (set_at("added_tokens", 0, "special", False), "not all plain special tokens"),
    "no special": (set_at("added_tokens", []), "added tokens are none"),
    "characters": (set_at("model", "vocab", "a b", 999), "not in byte characters"),
    "merge order": (lambda data: data["model"]["merges"].reverse(), "merges that its ids do not imply"),
    "lost byte": (lambda data: data["model"]["vocab"].pop("a"), "lacks single bytes"),
    "pattern": (
        set_at("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", "(a"),
        "tiktoken cannot read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_load_encoding_refuses_what_tiktoken_cannot_follow(
    case: str, trained_encoding: tiktoken.Encoding, tmp_path: Path
) -> None:
    edit, message = BROKEN[case]
    save_tokenizer(trained_encoding, tmp_path)
    load_encoding(tmp_path)
    edit_tokenizer(tmp_path, edit)
    with pytest.raises(UsageError, match=message):
        load_encoding(tmp_path)


def test_load_encoding_of_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        load_encoding(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{torn")
    with pytest.raises(UsageError, match="is not JSON"):
        load_encoding(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(UsageError, match="a JSON list, not an object"):
        load_encoding(tmp_path)


def test_save_tokenizer_refuses_what_cannot_be_exported(tmp_path: Path) -> None:
    every_byte = {bytes([byte]): byte for byte in range(256)}
    end = {EOS_TOKEN: 999}

    def odd(ranks: dict[bytes, int], specials: dict[str, int], pattern: str = r"[\s\S]") -> tiktoken.Encoding:
        return tiktoken.Encoding("odd", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)

    refused = {
        "has no '<|endoftext|>' token": odd(every_byte, {"<s>": 256}),
        "token b'abc' (256) does not merge": odd({**every_byte, b"abc": 256}, end),
        "lacks single bytes": odd({b"a": 0, b"b": 1}, end),
        "is an ordinary token, too": odd({**every_byte, b"ab": 256}, {**end, "ab": 998}),
        "has '{1,3}+', which": odd(every_byte, end, r"\p{N}{1,3}+|\P{N}"),
    }
    for message, encoding in refused.items():
        with pytest.raises(UsageError, match=regex.escape(message)):
            save_tokenizer(encoding, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        save_tokenizer(get_encoding("bytes"), tmp_path / "file")


# Names


def test_bytes_encoding_is_the_bytes() -> None:
    encoding = get_encoding("bytes")
    text = "aé中👍\x00\n" * 100
    assert encoding.n_vocab == 257
    assert encoding.eot_token == 256
    assert encoding.encode_ordinary(text) == list(text.encode())


def test_gpt2_by_name(gpt2_encoding: tiktoken.Encoding) -> None:
    assert get_encoding("gpt2") is gpt2_encoding
    assert gpt2_encoding.encode("Hello world") == [15496, 995]
    # Else a vocabulary loaded from GPT-2's own file has another fingerprint.
    assert gpt2_encoding._pat_str == GPT2_PATTERN


def fail_to_connect(address: str) -> bytes:
    raise requests.ConnectionError(f"no route to\n{address}")


def fail_to_read(address: str) -> bytes:
    raise PermissionError(13, "denied", address)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (fail_to_connect, "ConnectionError: no route to"),
        (lambda address: b"<html>a portal", "Hash mismatch"),
        (fail_to_read, "PermissionError"),
    ],
    ids=["no network", "other bytes", "no permission"],
)
def test_gpt2_that_cannot_be_fetched(
    read: Callable[[str], bytes], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", read)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(UsageError, match=reason) as caught:
        get_encoding("gpt2")
    message = str(caught.value)
    assert "TIKTOKEN_CACHE_DIR" in message
    assert "--encoding bytes" in message
    assert "\n" not in message


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train_bpe"):
        get_encoding("bpe")
    with pytest.raises(UsageError, match="unknown encoding 'gpt-2'; did you mean 'gpt2'"):
        get_encoding("gpt-2")
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        get_encoding(str(tmp_path))


# Long runs of white space


@pytest.mark.parametrize("kind", KINDS)
def test_long_runs_of_white_space_have_the_ids_of_the_whole_text(
    kind: str, encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of 8 characters instead of 65,536, tiktoken can encode the text as a whole, too."""
    monkeypatch.setattr(encodings, "_HALF", 4)
    monkeypatch.setattr(encodings, "_LONG_BLANK", re.compile(encodings._BLANK + "{8,}"))
    monkeypatch.setattr(encodings, "_HALF_BLANK", re.compile(encodings._BLANK + "{4}"))
    rng, split = random.Random(kind), 0
    blanks = ["\t", "\n", "\x0b", "\x0c", "\r", "\x1c", "\x1f", " ", " ", "\x85", "\xa0", "\u1680", "\u2003", "\u200b"]
    blanks += ["\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "\u180e"]
    others = ["a", "'s", "word", "7", "=", "é", "<|endoftext", EOS_TOKEN, "\0"]
    for _ in range(3000):
        parts = ["".join(rng.choices(blanks, k=rng.choice([0, 1, 7, 8, 9, 30]))) for _ in range(4)]
        text = "".join(part + rng.choice(["", *others]) for part in parts)
        for special in (frozenset[str](), frozenset({EOS_TOKEN})):
            expected = encoding.encode(text, allowed_special=special, disallowed_special=())
            assert encodings._encode(encoding, text, "text", allowed_special=special).tolist() == expected, text
            split += len(encodings._without_long_blanks(text, special)) > 1
    assert split > 1000


def test_two_million_blanks_are_encoded_as_by_transformers(gpt2_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(gpt2_encoding, tmp_path)
    text = "a" + " " * 2_000_000 + "b" + "\n" * 1_100_000 + EOS_TOKEN + "\t" * 1_100_000
    expected = AutoTokenizer.from_pretrained(tmp_path)(text, verbose=False)["input_ids"]
    assert text_to_token_ids(text, gpt2_encoding)[0].tolist() == expected
    documents = [("a" + " " * 2_000_000, True), ("b" + "\n" * 1_100_000, True)]
    found = encode_documents(gpt2_encoding, documents, "here").tolist()
    end = gpt2_encoding.eot_token
    assert found == [id for text, _ in documents for id in (*text_to_token_ids(text, gpt2_encoding)[0].tolist(), end)]


def test_a_foreign_pattern_that_cannot_split_a_text_names_the_place(trained_encoding: tiktoken.Encoding) -> None:
    pattern = trained_encoding._pat_str + r"|(?!)x"
    foreign = tiktoken.Encoding(
        "f", pat_str=pattern, mergeable_ranks=trained_encoding._mergeable_ranks, special_tokens={EOS_TOKEN: 399}
    )
    place = (
        r"book\.txt of 1,100,012 characters .*: its 1,100,000 white-space characters after 'the heading' are too many"
    )
    with pytest.raises(DataError, match=place):
        encodings.encode_ordinary(foreign, "the heading" + " " * 1_100_000 + "x", "book.txt")


# Training


def test_train_bpe_orders_the_ids(trained_encoding: tiktoken.Encoding) -> None:
    assert trained_encoding.n_vocab == 400
    assert trained_encoding.eot_token == 399
    ranks = trained_encoding._mergeable_ranks
    assert {bytes([byte]): byte for byte in range(256)}.items() <= ranks.items()
    assert sorted(ranks.values()) == list(range(399))
    assert trained_encoding._pat_str == GPT2_PATTERN  # llama.cpp has it


def test_every_merge_is_a_most_frequent_pair(trained_encoding: tiktoken.Encoding) -> None:
    # A naive trainer: count the neighbours in all pieces, check the choice against the counts, merge it.
    pieces = [p.encode() for text in CORPUS for p in regex.findall(trained_encoding._pat_str, text)]
    assert b"".join(pieces) == "".join(CORPUS).encode()
    words = [[piece[i : i + 1] for i in range(len(piece))] for piece in pieces]
    token_of = {rank: token for token, rank in trained_encoding._mergeable_ranks.items()}
    for rank in range(256, trained_encoding.n_vocab - 1):
        counts = Counter(pair for word in words for pair in pairwise(word))
        chosen = [pair for pair in counts if b"".join(pair) == token_of[rank]]
        assert len(chosen) == 1
        assert counts[chosen[0]] == max(counts.values()) >= 2
        for word in words:
            merge_pair(word, chosen[0])


def merge_pair(word: list[bytes], pair: tuple[bytes, bytes]) -> None:
    at = 0
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = [pair[0] + pair[1]]
        at += 1


def test_train_bpe_is_deterministic_and_silent(
    trained_encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fingerprint(train_bpe(iter(CORPUS), 400)) == fingerprint(trained_encoding)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert fingerprint(train_bpe(CORPUS, 400)) == fingerprint(trained_encoding)
    other = train_bpe([*CORPUS, "zzzz qqqq zzzz qqqq " * 50], 400)
    assert fingerprint(other) != fingerprint(trained_encoding)
    assert capfd.readouterr() == ("", "")


def test_a_small_corpus_gives_a_smaller_encoding() -> None:
    encoding = train_bpe(["abab"], 1000)
    assert encoding.n_vocab == 258
    assert encoding.decode_single_token_bytes(256) == b"ab"
    assert encoding.eot_token == 257
    # Nothing occurs twice: the bytes remain.
    assert train_bpe(["abc"], 1000).n_vocab == 257


def test_train_bpe_errors() -> None:
    for size in (257, 0, -1, (1 << 20) + 1):
        with pytest.raises(UsageError, match=f"vocab_size is {size}; it must be from 258"):
            train_bpe(CORPUS, size)
    with pytest.raises(UsageError, match="texts is one string"):
        train_bpe("abc", 300)
    with pytest.raises(UsageError, match=r"texts\[1\] is NoneType"):
        train_bpe(["a", None], 300)  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"texts\[1\] has the lone surrogate U\+D800 at character 2"):
        train_bpe(["a", "bc\ud800"], 300)
    for nothing in ([], ["", ""]):
        with pytest.raises(DataError, match="no text to train"):
            train_bpe(nothing, 300)


# Fingerprints


def test_fingerprint_covers_what_decides_the_ids() -> None:
    plain = get_encoding("bytes")
    parts: dict[str, Any] = {
        "pat_str": plain._pat_str,
        "mergeable_ranks": plain._mergeable_ranks,
        "special_tokens": plain._special_tokens,
    }
    # Stored with models: a change of this value orphans them.
    assert fingerprint(plain) == "fccabeaee55caf5f"
    assert fingerprint(tiktoken.Encoding("other name", **parts)) == fingerprint(plain)
    swapped = {**plain._mergeable_ranks, b"a": 98, b"b": 97}
    for change in (
        {"pat_str": r"[\s\S]"},
        {"mergeable_ranks": swapped},
        {"special_tokens": {EOS_TOKEN: 257}},
        {"special_tokens": {EOS_TOKEN: 256, "<|user|>": 257}},
    ):
        assert fingerprint(tiktoken.Encoding("bytes", **{**parts, **change})) != fingerprint(plain)


def test_check_fingerprint_names_both() -> None:
    encoding = get_encoding("bytes")
    check_fingerprint(encoding, fingerprint(encoding), "the data")
    with pytest.raises(UsageError) as caught:
        check_fingerprint(encoding, "0123456789abcdef", "the data in folder d")
    assert fingerprint(encoding) in str(caught.value)
    assert "the data in folder d was made with 0123456789abcdef" in str(caught.value)


# Batches


def test_id_dtype_is_the_smallest() -> None:
    cases = {1: "uint8", 256: "uint8", 257: "uint16", 65536: "uint16", 65537: "uint32", 1 << 32: "uint32"}
    assert {n: str(id_dtype(n)) for n in cases} == cases
    with pytest.raises(UsageError, match="n_vocab is 0"):
        id_dtype(0)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_ordinary_batch(encoding: tiktoken.Encoding) -> None:
    texts = ["", EOS_TOKEN, *fuzzed_strings(300, seed=4)]
    rows = encode_ordinary_batch(encoding, texts)
    assert [row.tolist() for row in rows] == [encoding.encode_ordinary(text) for text in texts]
    assert {row.dtype for row in rows} == {np.dtype(np.uint16)}
    assert all(row.flags.writeable for row in rows)
    assert len(rows[1]) > 1  # the literal is ordinary text


def test_encode_ordinary_batch_names_the_text_it_cannot_encode(trained_encoding: tiktoken.Encoding) -> None:
    with pytest.raises(DataError, match=r"texts\[2\] has the lone surrogate U\+DC80 at character 1"):
        encode_ordinary_batch(trained_encoding, ["a", "b", "c\udc80"])
    with pytest.raises(UsageError, match=r"texts\[0\] is bytes"):
        encode_ordinary_batch(trained_encoding, [b"a"])  # type: ignore[list-item]
    # Beyond tiktoken's limit on backtracking; the text would otherwise end the process's work with no name.
    base = trained_encoding
    other = tiktoken.Encoding(
        "other", pat_str=rf"{base._pat_str}|(?!)", mergeable_ranks=base._mergeable_ranks, special_tokens={}
    )
    with pytest.raises(DataError, match=r"texts\[1\] of 1,100,001 characters cannot be split"):
        encode_ordinary_batch(other, ["a", " " * 1_100_000 + "a"])


# The kit's functions


@pytest.fixture(params=["tiktoken", "transformers"])
def tokenizer(
    request: pytest.FixtureRequest,
    trained_encoding: tiktoken.Encoding,
    load_exported: Callable[[tiktoken.Encoding], Any],
) -> tiktoken.Encoding | PreTrainedTokenizerBase:
    return trained_encoding if request.param == "tiktoken" else load_exported(trained_encoding)


def test_text_to_ids_and_back(tokenizer: Any, trained_encoding: tiktoken.Encoding) -> None:
    text = f" The cat's , hat . {EOS_TOKEN} 12345  \n"
    ids = text_to_token_ids(text, tokenizer)
    assert ids.dtype == torch.long
    assert ids.shape == (1, len(trained_encoding.encode(text, allowed_special="all")))
    assert ids[0].tolist() == trained_encoding.encode(text, allowed_special="all")
    assert trained_encoding.eot_token in ids
    for same in (ids, ids[0], ids[0].tolist(), ids.to(torch.int32), ids[0].numpy().astype(np.uint16)):
        assert token_ids_to_text(same, tokenizer) == text
    assert get_eos_token_id(tokenizer) == trained_encoding.eot_token


def test_no_text_is_no_ids(tokenizer: Any) -> None:
    ids = text_to_token_ids("", tokenizer)
    assert (ids.shape, ids.dtype) == ((1, 0), torch.long)
    assert token_ids_to_text(ids, tokenizer) == token_ids_to_text([], tokenizer) == ""


def test_ids_that_cannot_be_decoded_are_refused(tokenizer: Any, trained_encoding: tiktoken.Encoding) -> None:
    n_vocab = trained_encoding.n_vocab
    for outside in (-100, n_vocab):
        with pytest.raises(UsageError, match=f"holds {outside}; the tokenizer's ids are 0 to {n_vocab - 1}"):
            token_ids_to_text([1, outside], tokenizer)
    with pytest.raises(UsageError, match=r"shape \(2, 3\); it must be one sequence"):
        token_ids_to_text(torch.zeros(2, 3, dtype=torch.long), tokenizer)
    with pytest.raises(UsageError, match=r"shape \(\)"):
        token_ids_to_text(torch.tensor(3), tokenizer)
    with pytest.raises(UsageError, match="float64 values; ids are integers"):
        token_ids_to_text(torch.zeros(3), tokenizer)
    with pytest.raises(DataError, match="text has the lone surrogate"):
        text_to_token_ids("\ud800", tokenizer)


def test_a_tokenizer_that_adds_and_cleans_up(trained_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(trained_encoding, tmp_path)
    # transformers cleans up after a byte-level BPE only when it is told so by this name.
    force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    options = {"add_bos_token": True, "clean_up_tokenization_spaces": True, force: True}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **options)
    text = "the cat 's hat , mat ."
    ids = text_to_token_ids(text, tokenizer)
    assert tokenizer(text)["input_ids"] == [trained_encoding.eot_token, *ids[0].tolist()]
    assert token_ids_to_text(ids, tokenizer) == text != tokenizer.decode(ids[0])


def test_other_objects_than_tokenizers_are_refused() -> None:
    calls: list[Callable[[Any], object]] = [
        lambda tokenizer: text_to_token_ids("a", tokenizer),
        lambda tokenizer: token_ids_to_text([1], tokenizer),
        get_eos_token_id,
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"tokenizer is str; it must be a tiktoken\.Encoding"):
            call("gpt2")


def test_an_encoding_without_eos() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    bare = tiktoken.Encoding("bare", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    assert get_eos_token_id(bare) is None
    assert text_to_token_ids(EOS_TOKEN, bare)[0].tolist() == list(EOS_TOKEN.encode())


# Documents end to end, and documents in chunks


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_encoded_each_by_itself_and_ended(encoding: tiktoken.Encoding) -> None:
    texts = fuzzed_strings(300, seed=11)
    assert any(EOS_TOKEN in text for text in texts)
    expected = [token for text in texts for token in [*encoding.encode_ordinary(text), encoding.eot_token]]
    found = encode_documents(encoding, [(text, True) for text in texts], "here")
    assert found.tolist() == expected
    assert found.dtype == id_dtype(encoding.n_vocab)
    # Whatever is encoded together.
    rng, pieces, first = random.Random(0), [], 0
    while first < len(texts):
        last = first + rng.randint(1, 20)
        pieces.append(encode_documents(encoding, [(text, True) for text in texts[first:last]], "here"))
        first = last
    assert np.concatenate(pieces).tolist() == expected
    assert encode_documents(encoding, [], "here").tolist() == []
    assert encode_documents(encoding, [], "here").dtype == found.dtype
    assert encode_documents(encoding, [("", True)], "here").tolist() == [encoding.eot_token]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_cut_between_a_letter_and_a_blank_keeps_its_ids(encoding: tiktoken.Encoding) -> None:
    assert may_cut(encoding)
    rng, cuts = random.Random(13), 0
    for text in fuzzed_strings(400, seed=12):
        text = rng.choice(["", "the cat\n\n "]) + text + rng.choice(["", " and the end", "\n", "s  \n"])
        places = [m.end() for m in regex.finditer(r"[A-Za-z](?=[ \n])", text) if rng.random() < 0.7]
        bounds = [0, *places, len(text)]
        chunks = [(text[a:b], b == len(text)) for a, b in pairwise(bounds)]
        if chunks[-1][0] == "" or not text:
            continue
        cuts += len(places)
        expected = [*encoding.encode_ordinary(text), encoding.eot_token]
        assert encode_documents(encoding, chunks, "here").tolist() == expected
        alone = [encode_documents(encoding, [chunk], "here").tolist() for chunk in chunks]
        assert [token for ids in alone for token in ids] == expected
    assert cuts > 200


@pytest.mark.parametrize(("before", "after"), [("the ", "cat"), ("th", "e"), ("1", "0"), ("a \n", "\n b"), ("=", "=")])
@pytest.mark.parametrize("kind", ["trained", "gpt2"])
def test_a_cut_elsewhere_changes_pieces(encoding: tiktoken.Encoding, before: str, after: str) -> None:
    """The place of the cut matters: elsewhere the pattern joins what stands around it."""
    cut = [piece for text in (before, after) for piece in regex.findall(encoding._pat_str, text)]
    assert cut != regex.findall(encoding._pat_str, before + after)


def test_a_document_that_cannot_be_encoded_is_named(trained_encoding: tiktoken.Encoding) -> None:
    for chunks in ([("fine", True), ("half \ud83d", True)], [(f"{EOS_TOKEN}\ud83d", False)]):
        with pytest.raises(DataError, match=r"^data/a\.txt has the lone surrogate U\+D83D"):
            encode_documents(trained_encoding, chunks, "data/a.txt")


def test_only_patterns_that_are_known_may_be_cut(trained_encoding: tiktoken.Encoding) -> None:
    assert may_cut(None)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pattern in (r"[\s\S]+", r" ?\p{L}+ ?|\s+|[^\s\p{L}]+", trained_encoding._pat_str + " "):
        other = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS_TOKEN: 256})
        assert not may_cut(other)
