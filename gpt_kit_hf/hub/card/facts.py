"""What a run or a model folder recorded of itself that a card may show, and nothing else of it.

Only fields known here are read, and each only as the kind of value that it must be. Of a path the last name is kept;
what has the form of an access token or a password is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.evaluation.invariance import ATTENTIONS, PRECISIONS
from gpt_kit_hf.hub.card.options import as_id, command_of, shareable, shared_options
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.storage.atomic_files import load_json, parse_object, read_jsonl
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.storage.run_folder import (
    CURVE_FILE,
    EVALUATIONS_FILE,
    INVARIANCE_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    RECORD_FILE,
    REPORT_FILE,
)

_PACKAGES = ("gpt-kit-hf", "torch", "transformers", "accelerate", "datasets", "tiktoken", "python")
_BASELINES = ("gzip -9", "byte unigram")
_ARCHITECTURE = (
    *("n_layer", "n_head", "n_embd", "n_inner", "max_position_embeddings", "vocab_size", "hidden_act"),
    *("position_embedding", "use_bias", "tie_word_embeddings", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("layer_norm_epsilon", "dtype"),
)
_COUNTS = (
    *("rows_read", "rows_used", "rows_truncated", "tokens", "tokens_trained", "ends_trained", "rows_without_label"),
    *("rows_end_untrained", "rows_prompt_trained", "batch_size", "padding", "padding_packed", "max_length"),
)
_WORDS: dict[str, Container[object]] = {
    "hidden_act": ACT2FN,
    "position_embedding": ("learned", "sinusoidal"),
    "dtype": ("float32", "bfloat16", "float16"),
    # Views: our own class is added when the package has been imported.
    "model_type": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys(),
    "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
}
_DIGEST = re.compile(r"[0-9a-f]{8,64}(?:-[0-9a-f]{8,64})*")
_VERSION = re.compile(r"[0-9][0-9a-z.+-]{0,40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def card_facts(run: Path) -> dict[str, Any]:
    """Return what a card says of a run, ended or not, or of a model folder that no run record lies in; as JSON.

    The same folder gives the same facts anywhere: no times, no absolute paths. Whether a base model or a dataset is on
    the Hub is what its run recorded, or that its name has that form and no such folder is there. Raises UsageError
    for a folder with neither a run nor a model, CheckpointError for files in it that cannot be read.
    """
    record = _read_object(run / RECORD_FILE)
    options = record.get("options")
    if not isinstance(options, dict):
        options = _read_object(run / OPTIONS_FILE)
    folder = _model_folder(run)
    config = _read_object(folder / "config.json")
    if not options and not config:
        raise UsageError(f"{str(run)!r} holds neither a run nor a model: no {OPTIONS_FILE} and no config.json")
    tuned = "base.model_name_or_path" in options
    chosen = shared_options(options, run)
    facts = {
        "name": shareable(run.resolve().name),
        "kind": "tuned" if tuned else "pretrained" if options else "model",
        "parameters": _parameters(folder) or _count(record.get("parameters")),
        "architecture": _architecture(config),
        "tokenizer": _tokenizer(folder, config, record),
        "options": chosen,
        "command": command_of(chosen, shareable(run.resolve().name), tuned=tuned),
        "base": _base(record, options, chosen) if tuned else None,
        "data": _data(record),
        "supervision": _supervision(run, record) if tuned else None,
        "progress": _progress(run, record),
        "curve": (run / CURVE_FILE).is_file(),
        "evaluations": [*_own_evaluation(record, chosen, tuned), *_more_evaluations(run)],
        "invariance": _invariance(_read_object(run / INVARIANCE_FILE)),
        "versions": _versions(record, config),
    }
    return {name: value for name, value in facts.items() if value not in (None, {}, [])}


# --- the model


def _model_folder(run: Path) -> Path:
    """Return the folder of the model: the run's own, or of a run under way its newest checkpoint."""
    if (run / "config.json").is_file():
        return run
    return next((folder for folder in reversed(list_checkpoints(run)) if (folder / "config.json").is_file()), run)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration, by this package's names, whatever the model calls them."""
    names: dict[str, list[str]] = {name: [name] for name in _ARCHITECTURE}
    for alias, name in GPTKitConfig.attribute_map.items():
        names.get(name, []).append(alias)
    found = {
        name: next((config[key] for key in keys if config.get(key) is not None), None) for name, keys in names.items()
    }
    classes = config.get("architectures")
    found["class"] = classes[0] if isinstance(classes, list) and classes else None
    found["model_type"] = config.get("model_type")
    return {name: value for name, value in found.items() if _is_known(name, value)}


def _is_known(name: str, value: object) -> bool:
    """Return whether the value of a field is a number, a truth value, or a word that means something there."""
    if isinstance(value, str):
        return value in _WORDS.get(name, ())
    return isinstance(value, (bool, int, float))


def _parameters(folder: Path) -> int | None:
    """Return how many numbers the weights are, by the headers of their files; shared ones are stored once."""
    total = 0
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return total or None


def _tokenizer(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    stored = _read_object(folder / "tokenizer_config.json")
    fingerprint = _matching(_DIGEST, config.get("tokenizer_fingerprint") or record.get("tokenizer_fingerprint"))
    if not stored:
        return {} if fingerprint is None else {"fingerprint": fingerprint}
    name = stored.get("encoding_name")
    return {
        "name": shareable(name) if isinstance(name, str) else None,
        "fingerprint": fingerprint,
        "pads": stored.get("pad_token") is not None,
        "chat": stored.get("chat_template") is not None or (folder / "chat_template.jinja").is_file(),
    }


# --- the data


def _base(record: Mapping[str, Any], options: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model that was tuned: its name, whether that is one of the Hub, and its commit there."""
    recorded = "base_commit" in record or record.get("base_digest") is not None
    commit = _matching(_COMMIT, record.get("base_commit") or record.get("base_digest"))
    name = as_id(options["base.model_name_or_path"]) if commit else chosen.get("base.model_name_or_path", {})
    if isinstance(name, dict):
        return {"name": name.get("hub") or name.get("name"), "hub": "hub" in name and not recorded, "commit": commit}
    return {"name": name, "hub": True, "commit": commit}


def _data(record: Mapping[str, Any]) -> dict[str, Any]:
    counts = {
        name: _count(record.get(name)) for name in ("documents", "train_tokens", "held_out_tokens", "held_out_rows")
    }
    found = {**counts, "fingerprint": _matching(_DIGEST, record.get("data_fingerprint"))}
    return {name: value for name, value in found.items() if value is not None}


def _supervision(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of the supervision report; the rows that it shows stay where they are."""
    report = record.get("supervision")
    if not isinstance(report, dict):
        report = _read_object(run / REPORT_FILE)
    found: dict[str, Any] = {name: _count(report.get(name)) for name in _COUNTS}
    for name in ("skipped", "dropped"):
        found[name] = _rows_by_kind(report.get(name)) or None
    return {name: value for name, value in found.items() if value is not None}


def _rows_by_kind(kinds: object) -> dict[str, int]:
    """Return how many rows were left out for each kind of fault, without what was said of the first of them."""
    if not isinstance(kinds, dict):
        return {}
    counts = {kind: _count(left.get("rows")) for kind, left in kinds.items() if isinstance(left, dict)}
    return {shareable(kind): count for kind, count in counts.items() if count is not None}


# --- the run


def _progress(run: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how far the run came, what it was computed on, and the held-out score that it began with."""
    if not record:
        return None
    file = run / METRICS_FILE
    lines = read_jsonl(file, report=lambda line: None) if file.is_file() else []
    steps = [line for line in lines if line.get("kind") == "train"]
    results, sessions = record.get("results"), record.get("sessions")
    done, total = max((_count(line.get("step")) or 0 for line in steps), default=0), _count(record.get("steps"))
    found = {
        "steps": total,
        "done": done,
        "finished": isinstance(results, dict) and results.get("steps") == total,
        "trained_tokens": sum(_count(line.get("trained_tokens")) or 0 for line in steps if "skipped" not in line),
        "skipped": sum("skipped" in line for line in steps),
        "sessions": len(sessions) if isinstance(sessions, list) else None,
        "precision": _one_of(("fp32", "bf16", "fp16"), record.get("precision")),
        "device": _one_of(("cpu", "cuda", "mps", "xpu"), str(record.get("device")).split(":")[0]),
        "processes": _count(record.get("processes")),
        "before": _score_before(lines),
    }
    return {name: value for name, value in found.items() if value is not None}


def _score_before(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the held-out score before the first step, where the run took one, on all that was held out."""
    line = next((line for line in lines if line.get("kind") == "evaluation" and line.get("step") == 0), {})
    score = {name: _number(line.get(name)) for name in ("loss", "bits_per_byte")}
    return None if None in score.values() else score


def _versions(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    recorded = record.get("versions")
    if not isinstance(recorded, dict):
        recorded = {"transformers": config.get("transformers_version")}
    found = {name: _matching(_VERSION, recorded.get(name)) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


# --- the scores


def _own_evaluation(record: Mapping[str, Any], chosen: Mapping[str, Any], tuned: bool) -> list[dict[str, Any]]:
    """Return the score on all that the run held out, with what is easily reached; none before the run has ended."""
    results = record.get("results")
    if not isinstance(results, dict):
        return []
    room = "supervision" if tuned else "windows"
    named = {
        "name": "held-out answers" if tuned else "held-out text",
        "kind": "rows" if tuned else "text",
        "max_length": chosen.get(f"{room}.max_length"),
        "data_fingerprint": record.get("data_fingerprint"),
    }
    scored = _evaluation({**results, **named})
    beside = results.get("beside_bits_per_byte")
    known = {name: _number(beside.get(name)) for name in _BASELINES} if isinstance(beside, dict) else {}
    easily = {name: value for name, value in known.items() if value is not None}
    return [{**each, "own": True, "beside": easily} for each in scored]


def _more_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the scores that were added to the run's folder: a list, or {"evaluations": a list}."""
    file = run / EVALUATIONS_FILE
    if not file.is_file():
        return []
    try:
        # The reader of objects is the strict one; this makes a list one.
        found = parse_object(b'{"evaluations": ' + file.read_bytes() + b"}", str(file))["evaluations"]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if isinstance(found, dict):
        found = found.get("evaluations")
    if not isinstance(found, list):
        raise CheckpointError(f"{file}: must be a list of evaluations")
    return [scored for each in found if isinstance(each, dict) for scored in _evaluation(each)]


def _evaluation(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is known of a score as a list of one, or none where it has no loss."""
    loss, name = _number(found.get("loss")), found.get("name")
    if loss is None:
        return []
    scored = {
        "name": shareable(name) if isinstance(name, str) and name else "evaluation",
        "kind": _one_of(("text", "rows"), found.get("kind")),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "bits_per_byte": _number(found.get("bits_per_byte")),
        "data_fingerprint": _matching(_DIGEST, found.get("data_fingerprint")),
    }
    scored |= {key: _count(found.get(key)) for key in ("tokens", "text_bytes", "max_length", "stride")}
    return [{key: value for key, value in scored.items() if value is not None}]


def _invariance(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return of each precision and attention how many cells there are and hold, and the largest difference."""
    cells = report.get("cells")
    if not isinstance(cells, list):
        return None
    rows = []
    for precision in PRECISIONS:
        for attention in ATTENTIONS:
            own = [
                cell
                for cell in cells
                if isinstance(cell, dict) and (cell.get("precision"), cell.get("attention")) == (precision, attention)
            ]
            differences = [value for value in (_number(cell.get("difference")) for cell in own) if value is not None]
            if own:
                row = {"precision": precision, "attention": attention, "cells": len(own)}
                row |= {"holds": sum(cell.get("holds") is True for cell in own)}
                rows.append({**row, "difference": max(differences, default=None)})
    allowed = report.get("tolerances")
    tolerances = {name: _number(allowed.get(name)) for name in PRECISIONS} if isinstance(allowed, dict) else {}
    versions = {name: _matching(_VERSION, report.get(name)) for name in ("torch", "transformers")}
    device = _one_of(("cpu", "cuda", "mps", "xpu"), str(report.get("device")).split(":")[0])
    return {"rows": rows, "tolerances": tolerances, "device": device, **versions} if rows else None


# --- values


def _read_object(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}


def _number(value: object) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _matching(pattern: re.Pattern[str], value: object) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _one_of(known: tuple[str, ...], value: object) -> str | None:
    return value if isinstance(value, str) and value in known else None
