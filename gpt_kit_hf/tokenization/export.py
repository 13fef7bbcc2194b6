"""Tokenizer export: a tiktoken encoding as a plain `tokenizer.json` with the same ids for every string, and back.

tiktoken merges the neighbours whose joined bytes have the lowest rank; `tokenizers` merges listed pairs in order. The
two agree if each token is listed with the two tokens that remain of its own bytes after all merges of lower rank: two
neighbouring tokens were merged within their own bytes only, so that pair is the same wherever the token occurs.
"""

from __future__ import annotations

import functools
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from gpt_kit_hf.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"

# How GPT-2 splits text before merging (Radford et al. 2019, the released encoder), in tiktoken's spelling.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_NAME_KEY = "encoding_name"


def save_tokenizer(encoding: tiktoken.Encoding, folder: str | Path, *, model_max_length: int | None = None) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads without custom code.

    `model_max_length` is in tokens; if None, the key is left out. Other files in the folder stay. Raises UsageError as
    `build_tokenizer` does.
    """
    if model_max_length is not None and model_max_length < 1:
        raise UsageError(f"model_max_length is {model_max_length}; it must be at least 1 token")
    if Path(folder).is_file():
        raise UsageError(f"folder {str(folder)!r} is a file")
    to_transformers(encoding).save_pretrained(str(folder))
    config_file = Path(folder) / _CONFIG_FILE
    config = _read_json(config_file)
    # transformers 5 writes its new class name, which readers made for transformers 4 do not know; both know the old
    # one. For a length that is not set it writes 1e30, which no reader can use.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    del config["model_max_length"]
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_transformers(encoding: tiktoken.Encoding) -> PreTrainedTokenizerFast:
    """Return the encoding as a tokenizer of transformers; its bos and eos are EOS. Imports no torch.

    It pads with "<|pad|>", if the encoding has that. EOS must not be padding: a collator that masks padding would mask
    EOS as well, and the model would not learn to stop.
    """
    from transformers import PreTrainedTokenizerFast

    padding = {"pad_token": PAD_TOKEN} if PAD_TOKEN in encoding.special_tokens_set else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(encoding),
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **padding,
        **{_NAME_KEY: encoding.name},
    )


def load_encoding(folder: str | Path) -> tiktoken.Encoding:
    """Return the encoding exported to `folder`: the exact inverse of `save_tokenizer`.

    The layout of GPT-2's own `tokenizer.json` loads as well. An encoding that this package did not save is named after
    its folder. Raises UsageError if there is no `tokenizer.json`, or one that tiktoken cannot reproduce exactly.
    """
    path = Path(folder) / _TOKENIZER_FILE
    if not path.is_file():
        raise UsageError(f"folder {str(folder)!r} holds no {_TOKENIZER_FILE}; save_tokenizer writes one")
    data = _read_json(path)
    pattern = _split_pattern(data.get("pre_tokenizer"))
    reason = _unsupported(data, pattern)
    if pattern is None or reason:
        raise UsageError(f"{path} is not a plain byte-level BPE: {reason}")
    specials = {token["content"]: token["id"] for token in data["added_tokens"]}
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab = {token: rank for token, rank in data["model"]["vocab"].items() if token not in specials}
    if not byte_of.keys() >= set("".join(vocab)):
        raise UsageError(f"{path} is not a plain byte-level BPE: some token is not in byte characters")
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()}
    listed = [tuple(m.split(" ") if isinstance(m, str) else m) for m in data["model"]["merges"]]
    if listed != _merges(ranks):
        raise UsageError(f"{path} lists merges that its ids do not imply; tiktoken would give other ids")
    _check_pattern(pattern)
    name = _stored_name(Path(folder))
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except ValueError as error:
        raise UsageError(f"{path} splits text by a pattern that tiktoken cannot read: {error}") from error


def build_tokenizer(encoding: tiktoken.Encoding) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` with the encoding's ids for every string, special tokens included.

    Raises UsageError if the encoding has no EOS, or cannot be expressed exactly.
    """
    # tiktoken has no public names for these three; its own guide to extending an encoding uses them.
    ranks, specials, pattern = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    if EOS_TOKEN not in specials:
        raise UsageError(f"encoding {encoding.name!r} has no {EOS_TOKEN!r} token, which ends a document")
    _check_pattern(pattern)
    # Special tokens are in the vocabulary itself, as in GPT-2's own file, so that `vocab_size` counts every id.
    vocab = {written_token(token): rank for token, rank in ranks.items()} | specials
    if len(vocab) != len(ranks) + len(specials):
        raise UsageError(f"encoding {encoding.name!r} has a special token that is an ordinary token, too")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges_of(encoding)))
    tokenizer.pre_tokenizer = byte_level_split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def byte_level_split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that splits a text by `pattern`, then writes each byte as one character."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_characters() -> list[str]:
    """Return the character that stands for each byte value in `tokenizer.json`, by GPT-2's table.

    A byte that is printable in Latin-1 stands for itself, the others are 256, 257, ... in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_CHARACTERS = dict(enumerate(byte_characters()))


def written_token(token: bytes) -> str:
    """Return the characters that stand for a token's bytes in `tokenizer.json` and in a GGUF file."""
    # Latin-1 maps byte b to code point b.
    return token.decode("latin-1").translate(_CHARACTERS)


@functools.lru_cache(maxsize=2)
def merges_of(encoding: tiktoken.Encoding) -> list[tuple[str, str]]:
    """Return the merges of an encoding, cached: a run exports its tokenizer with each checkpoint."""
    return _merges(encoding._mergeable_ranks)


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return the pair that each token of two or more bytes merges from, by rank; UsageError if a token has none."""
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UsageError("the vocabulary lacks single bytes, so some texts have no ids")
    pairs = []
    for token in sorted((t for t in ranks if len(t) > 1), key=lambda t: ranks[t]):
        merged = _merged_below(token, ranks)
        if len(merged) != 2:
            raise UsageError(f"token {token!r} ({ranks[token]}) does not merge from two tokens of lower rank")
        pairs.append((written_token(merged[0]), written_token(merged[1])))
    return pairs


def _merged_below(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the tokens that a token's bytes form after all merges of lower rank than its own."""
    limit = ranks[token]
    merged = [token[i : i + 1] for i in range(len(token))]
    while len(merged) > 2:
        joined = [ranks.get(a + b, limit) for a, b in pairwise(merged)]
        lowest = min(joined)
        if lowest >= limit:
            break
        at = joined.index(lowest)  # the leftmost, as both libraries choose
        merged[at : at + 2] = [merged[at] + merged[at + 1]]
    return merged


def _check_pattern(pattern: str) -> None:
    # tiktoken's fancy-regex reads {1,3}+ as possessive, Oniguruma (in tokenizers) as a repeat of a repeat. Of the
    # differences between the two, this is the one that occurs in a pattern in use: cl100k_base has it.
    counted = re.search(r"\{\d*,?\d*\}\+", pattern)
    if counted:
        raise UsageError(f"pattern {pattern!r} has {counted[0]!r}, which tokenizers reads as a second repeat")


def _unsupported(data: dict[str, Any], pattern: str | None) -> str | None:
    """Return what in a `tokenizer.json` tiktoken does not do, or None."""
    model, post, added = (data.get(key) or {} for key in ("model", "post_processor", "added_tokens"))
    # Old files name no type; only BPE has merges.
    if model.get("type", "BPE") != "BPE" or "merges" not in model or "vocab" not in model:
        return f"the model is {model.get('type')}"
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "it has dropout, a prefix or a suffix"
    if data.get("normalizer"):
        return "it has a normalizer, which changes the text"
    if pattern is None:
        return "the pre-tokenizer is not one split followed by byte level"
    if post.get("type") not in (None, "ByteLevel") and post.get("special_tokens") != {}:
        return f"the post-processor {post.get('type')} adds tokens"
    plain = ("single_word", "lstrip", "rstrip")
    if not added or any(not token["special"] or any(token[key] for key in plain) for token in added):
        return "its added tokens are none, or not all plain special tokens"
    return None


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the regular expression by which a pre-tokenizer splits a text; None if it does anything else."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    first, last = steps[0], steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) != 2 or last.get("use_regex", True) or first.get("type") != "Split":
        return None
    if first["behavior"] != "Isolated" or first["invert"]:
        return None
    pattern = first["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def _stored_name(folder: Path) -> str:
    config = folder / _CONFIG_FILE
    stored = _read_json(config).get(_NAME_KEY) if config.is_file() else None
    return stored if isinstance(stored, str) else folder.resolve().name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return data
