"""A tiktoken encoding on disk, as a plain `tokenizer.json` that gives the same ids for every string.

tiktoken merges the neighbours whose joined bytes have the lowest rank; `tokenizers` merges listed pairs in
their order. The two agree when each token is listed with the one pair that its own bytes end in after all
merges of lower rank. Two tokens next to each other were merged within their own bytes only, so that pair is
the same wherever the token stands in a text.
"""

from __future__ import annotations

import functools
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from gpt_kit_hf.errors import UsageError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts a text before it merges (Radford et al. 2019, the released encoder), in tiktoken's spelling.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_NAME_KEY = "encoding_name"


def save_tokenizer(
    encoding: tiktoken.Encoding,
    folder: str | Path,
    *,
    model_max_length: int | None = None,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads with no custom code.

    bos and eos are the end of text. `model_max_length` is in tokens; without it the key is left out. Other
    files of the folder stay. Raises UsageError if the encoding has no end of text, or no exact twin.
    """
    from transformers import PreTrainedTokenizerFast

    if model_max_length is not None and model_max_length < 1:
        raise UsageError(f"model_max_length is {model_max_length}; it must be at least 1 token")
    if Path(folder).is_file():
        raise UsageError(f"folder {str(folder)!r} is a file")
    # No pad token: padding with the end of text teaches collators that mask padding to mask the stop token.
    twin = PreTrainedTokenizerFast(
        tokenizer_object=build_twin(encoding),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{_NAME_KEY: encoding.name},
    )
    twin.save_pretrained(str(folder))
    config_file = Path(folder) / _CONFIG_FILE
    config = _read_json(config_file)
    # transformers 5 writes its new name of the class, which readers made for transformers 4 do not know;
    # both know the old one. In place of a length that is not set it writes 1e30, which no reader can use.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    del config["model_max_length"]
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_encoding(folder: str | Path) -> tiktoken.Encoding:
    """Return the encoding whose twin is in `folder`: the exact inverse of `save_tokenizer`.

    GPT-2's own `tokenizer.json` layout loads, too. An encoding that this package did not save is named after
    its folder. Raises UsageError if there is no `tokenizer.json`, or none that tiktoken can follow exactly.
    """
    path = Path(folder) / _TOKENIZER_FILE
    if not path.is_file():
        raise UsageError(f"folder {str(folder)!r} holds no {_TOKENIZER_FILE}; save_tokenizer writes one")
    data = _read_json(path)
    reason = _not_byte_level(data)
    if reason:
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
    pattern = _split_pattern(data["pre_tokenizer"])
    assert pattern is not None  # _not_byte_level has looked
    _check_pattern(pattern)
    try:
        return tiktoken.Encoding(
            _stored_name(Path(folder)), pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
    except ValueError as error:
        raise UsageError(f"{path} splits text by a pattern that tiktoken cannot read: {error}") from error


def build_twin(encoding: tiktoken.Encoding) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` that gives the encoding's ids for every string, specials included.

    Raises UsageError if the encoding has no end of text or no exact twin.
    """
    # tiktoken has no public names for these three; its own guide to extending an encoding uses them.
    ranks, specials, pattern = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    if END_OF_TEXT not in specials:
        raise UsageError(f"encoding {encoding.name!r} has no {END_OF_TEXT!r} token, which ends a document")
    _check_pattern(pattern)
    # Specials are in the vocabulary itself, as in GPT-2's own file, so that `vocab_size` counts every id.
    vocab = {_as_characters(token): rank for token, rank in ranks.items()} | specials
    if len(vocab) != len(ranks) + len(specials):
        raise UsageError(f"encoding {encoding.name!r} has a special token that is an ordinary token, too")
    twin = Tokenizer(models.BPE(vocab=vocab, merges=_merges_of(encoding)))
    twin.pre_tokenizer = byte_level_split(pattern)
    twin.decoder = decoders.ByteLevel()
    twin.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return twin


def byte_level_split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that cuts a text by `pattern`, then writes each byte as one character."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_characters() -> list[str]:
    """Return the character that stands for each byte value in `tokenizer.json`, by GPT-2's table.

    A byte that is printable in Latin-1 stands for itself, the others are 256, 257, ... in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_CHARACTERS = dict(enumerate(byte_characters()))


def _as_characters(token: bytes) -> str:
    # Latin-1 maps byte b to code point b.
    return token.decode("latin-1").translate(_CHARACTERS)


@functools.lru_cache(maxsize=2)
def _merges_of(encoding: tiktoken.Encoding) -> list[tuple[str, str]]:
    """Return the merges of an encoding; a run asks with each checkpoint, and the steps wait for the interpreter."""
    return _merges(encoding._mergeable_ranks)


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return the pair of each token of two bytes or more, by rank; UsageError for a token that has none."""
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UsageError("the vocabulary lacks single bytes, so some texts have no ids")
    pairs = []
    for token in sorted((t for t in ranks if len(t) > 1), key=lambda t: ranks[t]):
        parts = _merged_below(token, ranks)
        if len(parts) != 2:
            raise UsageError(f"token {token!r} ({ranks[token]}) does not merge from two tokens of lower rank")
        pairs.append((_as_characters(parts[0]), _as_characters(parts[1])))
    return pairs


def _merged_below(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the parts of a token after all merges of a lower rank than its own."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        lowest = min(joined)
        if lowest >= limit:
            break
        at = joined.index(lowest)  # the leftmost, as both libraries choose
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _check_pattern(pattern: str) -> None:
    # tiktoken's fancy-regex reads {1,3}+ as possessive, Oniguruma (in tokenizers) as a repeat of a repeat.
    # Of the differences between the two it is the one that a pattern in use meets: cl100k_base has it.
    counted = re.search(r"\{\d*,?\d*\}\+", pattern)
    if counted:
        raise UsageError(f"pattern {pattern!r} has {counted[0]!r}, which tokenizers reads as a second repeat")


def _not_byte_level(data: dict[str, Any]) -> str | None:
    """Return why a `tokenizer.json` is not what tiktoken does, None if it is."""
    model, post = data.get("model") or {}, data.get("post_processor") or {}
    added = data.get("added_tokens") or []
    plain = ("single_word", "lstrip", "rstrip")
    # Old files name no type; only BPE has merges.
    if model.get("type", "BPE") != "BPE" or "merges" not in model or "vocab" not in model:
        return f"the model is {model.get('type')}"
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "it has dropout, a prefix or a suffix"
    if data.get("normalizer"):
        return "it has a normalizer, which changes the text"
    if _split_pattern(data.get("pre_tokenizer")) is None:
        return "the pre-tokenizer is not one split followed by byte level"
    if post.get("type") not in (None, "ByteLevel") and post.get("special_tokens") != {}:
        return f"the post-processor {post.get('type')} adds tokens"
    if not added or any(not token["special"] or any(token[key] for key in plain) for token in added):
        return "its added tokens are none, or not all plain special tokens"
    return None


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the regular expression by which a pre-tokenizer cuts a text; None if it does anything else."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    first = steps[0]
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
