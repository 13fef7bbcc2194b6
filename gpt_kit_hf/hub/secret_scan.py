"""The scan before publication: refuses secrets, pickles, training state and paths of the local machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.run_folder import EVENTS_PREFIX

# The formats in which services issue keys. A match is never shown.
_SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",
    "a GitLab token": r"glpat-[A-Za-z0-9_-]{16,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{10,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a PyPI token": r"\bpypi-[A-Za-z0-9_-]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@",
    "a secret": r"(?i)\b(?:api[_-]?key|secret[_-]?key|access[_-]?token|auth[_-]?token|password)[\"']?\s*[:=]\s*[\"']"
    r"[^\s\"']{8,}",
}
_SECRET_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _SECRETS.items()}
_HOME = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|Users|root|mnt|tmp|var|scratch|workspace|data|opt|private)/[^\s\"'<>|`)\]]+"
    r"|[A-Za-z]:\\\\?(?:Users|home)\\[^\s\"'<>|`)\]]+)"
)
_PICKLE_NAMES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".distcp", ".joblib")
_TRAINING_NAMES = re.compile(
    r"(?:^|/)(?:optimizer|scheduler|scaler|training_state|training_args|rng_state|options|metrics|run|trainer_state)"
    r"[^/]*\.(?:safetensors|json|jsonl|bin|pt|lock)$"
)
_OPTIMIZER_TENSORS = re.compile(r"(?:^|[./|])(?:exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)(?:$|[./|])")
# A vocabulary comes from text: a token in it may look like a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")


def scan_for_publication(folder: Path, private_names: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError if a file of the folder must not be published; the message never quotes what was found.

    Refused are secrets, pickles, files of a run or a checkpoint, optimizer states, paths of a machine (home folders
    and the like), and each of `private_names`.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        fault = next(_faults(file, name, private_names), None)
        if fault is not None:
            raise CheckpointError(f"{name} cannot be published: {fault}")


def hide_secrets(text: str) -> str:
    """Return the text with everything that looks like a secret replaced by its kind."""
    for kind, pattern in _SECRET_PATTERNS.items():
        text = pattern.sub(f"[{kind}]", text)
    return text


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, or its class, without secrets and at most `limit` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return hide_secrets(" ".join(lines[0].split()))[:limit]


def _faults(file: Path, name: str, private_names: tuple[str, ...]) -> Iterator[str]:
    if name.endswith(_PICKLE_NAMES):
        yield "by its name it is a pickle"
    if _TRAINING_NAMES.search(name):
        yield "it belongs to a run or a checkpoint, not to a model"
    with file.open("rb") as opened:
        start = opened.read(8)
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        yield "it holds a pickle"
    if name.endswith(".safetensors"):
        yield from _header_faults(file)
    elif start.startswith(b"PK\x03\x04"):
        yield "it is a zip archive, the format in which torch stores pickles"
    elif not name.endswith(".png"):
        yield from _text_faults(file, name, private_names)


def _header_faults(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors, metadata = opened.keys(), json.dumps(opened.metadata() or {}, ensure_ascii=False)
    except (SafetensorError, OSError):
        yield "it is not valid safetensors"
        return
    if any(_OPTIMIZER_TENSORS.search(tensor) for tensor in tensors):
        yield "it holds the state of an optimizer"
    for kind, pattern in _SECRET_PATTERNS.items():
        if pattern.search(metadata):
            yield f"its metadata hold what looks like {kind}"
    if _HOME.search(metadata):
        yield "its metadata hold a path of a machine"


def _text_faults(file: Path, name: str, private_names: tuple[str, ...]) -> Iterator[str]:
    try:
        # TensorBoard's files hold their texts as UTF-8 among other bytes.
        errors = "replace" if name.startswith(EVENTS_PREFIX) else "strict"
        text = file.read_text(encoding="utf-8", errors=errors)
    except UnicodeDecodeError:
        yield "it is not text (UTF-8)"
        return
    for kind, pattern in _SECRET_PATTERNS.items():
        if found := pattern.search(text):
            yield f"line {_line(text, found.start())} holds what looks like {kind}"
    if Path(name).name in _VOCABULARIES:
        return
    for private in private_names:
        if private in text:
            yield f"line {_line(text, text.index(private))} holds a path of this machine"
    if found := _HOME.search(text):
        yield f"line {_line(text, found.start())} holds a path of a machine"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
