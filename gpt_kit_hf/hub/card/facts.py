"""The facts of a card: what a run or a model folder recorded that a card may show, and nothing else.

Only known fields are read, and each value must be of its field's kind. Of a path only the last name is kept; values
that look like an access token or a password are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.card.options import BASE_OPTIONS, as_id, command_of, kind_of, shareable, shared_options
from gpt_kit_hf.hub.secret_scan import hide_secrets
from gpt_kit_hf.hub.untrusted_files import count_elements, read_header
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
_PRECISIONS = ("fp32", "bf16", "fp16")
_ARCHITECTURE = (
    *("n_layer", "n_head", "n_embd", "n_inner", "max_position_embeddings", "vocab_size", "hidden_act"),
    *("num_key_value_heads", "head_dim", "mlp", "norm", "qk_norm", "zero_init_residual"),
    *("position_embedding", "use_bias", "tie_word_embeddings", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("layer_norm_epsilon", "dtype"),
)
_COUNTS = (
    *("rows_read", "rows_used", "rows_trained", "rows_eval", "rows_truncated", "tokens", "tokens_trained"),
    *("ends_trained", "rows_without_label", "rows_end_untrained", "rows_prompt_trained"),
)
# The texts that a field of a configuration may have; its other values are numbers and truth values.
_TEXTS: dict[str, Container[object]] = {
    "hidden_act": ACT2FN,
    "position_embedding": ("learned", "sinusoidal", "rotary"),
    "mlp": ("gelu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "dtype": ("float32", "bfloat16", "float16"),
    # Views: this package's class is added to the mapping when it is registered.
    "model_type": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys(),
    "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
}
Check = Callable[[object], Any]


def card_facts(run: Path, model: Path | None = None) -> dict[str, Any]:
    """Return as JSON what a card shows of a run, finished or not, or of a model folder without a run's record.

    The same folder gives the same facts anywhere: no times, no absolute paths. A base model or dataset counts as one
    of the Hub if the run recorded that, or if its name has the form of an id and no such folder exists. `model` is a
    folder with another form of the model, whose card it is to be. Raises UsageError for a folder with neither a run
    nor a model, CheckpointError for files that cannot be read.
    """
    record = _read_object(run / RECORD_FILE)
    options = record.get("options")
    if not isinstance(options, dict):
        options = _read_object(run / OPTIONS_FILE)
    folder = _model_folder(run)
    config = _read_object(folder / "config.json")
    if model is not None:
        folder, config = model, config | _read_object(model / "config.json")
    if not options and not config:
        raise UsageError(f"{str(run)!r} holds neither a run nor a model: no {OPTIONS_FILE} and no config.json")
    kind, name = kind_of(options), shareable(run.resolve().name)
    tuned = kind == "tuned"
    shared = shared_options(options, run)
    if kind == "continued" and (length := _count(record.get("max_length"))):  # by default what the model allows
        shared["windows.max_length"] = length
    facts = {
        "name": name,
        "kind": kind,
        "parameters": _parameters(folder) or _count(record.get("parameters")),
        "architecture": _architecture(config),
        "tokenizer": _tokenizer(folder, config, record),
        "options": shared,
        "command": command_of(shared, name, tuned=tuned),
        "base": _base(record, options, shared, BASE_OPTIONS[kind]) if kind in BASE_OPTIONS else None,
        "data": _pick(_eval_rows(record), ("documents", "train_tokens", "eval_tokens", "eval_rows"), _count)
        | _not_none({"fingerprint": _digest(record.get("data_fingerprint"))})
        | _text_read(record),
        "supervision": _supervision(run, record) if tuned else None,
        "progress": _progress(run, record) if record else None,
        "curve": (run / CURVE_FILE).is_file(),
        "evaluations": [*_own_evaluation(record, shared, tuned), *_added_evaluations(run)],
        "invariance": _invariance(_read_object(run / INVARIANCE_FILE)),
        "versions": _pick(
            record.get("versions", {"transformers": config.get("transformers_version")}), _PACKAGES, _version
        ),
    }
    return {name: value for name, value in facts.items() if value not in (None, {}, [])}


# --- the model


def _model_folder(run: Path) -> Path:
    """Return the run's folder if it holds a model, otherwise its newest checkpoint that does."""
    candidates = [run, *reversed(list_checkpoints(run))]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), run)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration by this package's names; another model may have them under aliases."""
    aliases = {name: [name] for name in _ARCHITECTURE}
    for alias, name in GPTKitConfig.attribute_map.items():
        aliases.get(name, []).append(alias)
    found = {
        name: next((config[key] for key in keys if config.get(key) is not None), None)
        for name, keys in aliases.items()
    }
    classes = config.get("architectures")
    found["class"] = classes[0] if isinstance(classes, list) and classes else None
    found["model_type"] = config.get("model_type")
    return {
        name: value
        for name, value in found.items()
        if (value in _TEXTS.get(name, ()) if isinstance(value, str) else isinstance(value, (bool, int, float)))
    }


def _parameters(folder: Path) -> int | None:
    """Return the number of weights by the headers of their files, in which shared ones are stored once."""
    return sum(count_elements(read_header(file)) for file in sorted(folder.glob("model*.safetensors"))) or None


def _tokenizer(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    stored = _read_object(folder / "tokenizer_config.json")
    fingerprint = _digest(config.get("tokenizer_fingerprint") or record.get("tokenizer_fingerprint"))
    if not stored:
        return _not_none({"fingerprint": fingerprint})
    name = stored.get("encoding_name")
    return {
        "name": shareable(name) if isinstance(name, str) else None,
        "fingerprint": fingerprint,
        "pads": stored.get("pad_token") is not None,
        "chat": stored.get("chat_template") is not None or (folder / "chat_template.jinja").is_file(),
    }


def _base(
    record: Mapping[str, Any], options: Mapping[str, Any], shared: Mapping[str, Any], option: str
) -> dict[str, Any]:
    """Return the model that the run started from: its name, whether it is on the Hub, and its commit or digest."""
    commit = _commit(record.get("base_commit") or record.get("base_digest"))
    if commit:
        return {"name": as_id(options[option]), "hub": True, "commit": commit}
    place = shared.get(option, {})
    is_folder = "base_commit" in record or record.get("base_digest") is not None
    name, digest = place.get("hub") or place.get("name"), _digest(record.get("base_digest"))
    return {"name": name, "hub": "hub" in place and not is_folder, "commit": None, "digest": digest}


# --- the run


def _supervision(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of the supervision report, without the rows that it quotes."""
    report = record.get("supervision")
    if not isinstance(report, dict):
        report = _read_object(run / REPORT_FILE)
    apart = _row_counts(_object(report.get("eval_input")))
    return _row_counts(report) | ({"eval_input": apart} if apart else {})


def _row_counts(report: Mapping[str, Any]) -> dict[str, Any]:
    found = _pick(report, _COUNTS, _count)
    for group in ("skipped", "dropped"):
        reasons = report.get(group)
        rows = {reason: left.get("rows") for reason, left in _object(reasons).items() if isinstance(left, dict)}
        if counts := _pick(rows, rows, _count):
            found[group] = {shareable(reason): count for reason, count in counts.items()}
    return found


def _eval_rows(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record with `eval_rows`, which older runs call `held_out_rows`."""
    return {"eval_rows": record.get("held_out_rows"), **record}


def _text_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many documents were left out and characters replaced, by reason; nothing if there were none."""
    found: dict[str, Any] = {}
    for of in ("text_read", "eval_text_read"):
        read = _object(record.get(of))
        groups = {name: _object(read.get(name)) for name in ("left_out", "replaced_characters")}
        counts = {
            name: {shareable(kind): n for kind, n in _pick(group, group, _count).items()}
            for name, group in groups.items()
            if group
        }
        if counts:
            found[of] = _pick(read, ("documents_read", "documents_used"), _count) | counts
    return found


def _progress(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the run came, its precision and hardware, and its score before the first step, if it took one."""
    file = run / METRICS_FILE
    lines = read_jsonl(file, report=lambda line: None) if file.is_file() else []
    steps = [line for line in lines if line.get("kind") == "train"]
    results, sessions, total = record.get("results"), record.get("sessions"), _count(record.get("steps"))
    first = next((line for line in lines if line.get("kind") == "eval" and line.get("step") == 0), {})
    before, changes = _pick(first, ("loss", "bits_per_byte"), _number), _text_changes(sessions)
    return _not_none(
        {
            "steps": total,
            "done": max((_count(line.get("step")) or 0 for line in steps), default=0),
            "finished": isinstance(results, dict) and results.get("steps") == total,
            "trained_tokens": sum(_count(line.get("trained_tokens")) or 0 for line in steps if "skipped" not in line),
            "skipped": sum("skipped" in line for line in steps),
            "sessions": len(sessions) if isinstance(sessions, list) else None,
            "precision": _one_of(_PRECISIONS, record.get("precision")),
            "device": _device(record.get("device")),
            "processes": _count(record.get("processes")),
            "before": before if len(before) == 2 and not changes else None,  # it may be on other text
            "text_changes": changes or None,
        }
    )


def _text_changes(sessions: object) -> list[dict[str, Any]]:
    """Return the step of each change of the text, with the fingerprint and the training tokens before and after."""
    found = {}
    for session in sessions if isinstance(sessions, list) else []:
        change, step = _object(_object(session).get("data_changed")), _count(_object(session).get("after_step"))
        if change and step is not None:  # a run that was killed soon after has the same change again
            texts = {name: _object(change.get(name)) for name in ("before", "now")}
            found[step] = {"step": step} | {
                name: _not_none(
                    {"tokens": _count(text.get("train_tokens")), "fingerprint": _digest(text.get("data_fingerprint"))}
                )
                for name, text in texts.items()
            }
    return list(found.values())


# --- the scores


def _own_evaluation(record: Mapping[str, Any], shared: Mapping[str, Any], tuned: bool) -> list[dict[str, Any]]:
    """Return the run's final score as a list of one, with the baselines; an empty list for an unfinished run."""
    results = record.get("results")
    if not isinstance(results, dict):
        return []
    named = {
        "name": "held-out answers" if tuned else "held-out text",
        "max_length": shared.get("supervision.max_length" if tuned else "windows.max_length"),
        "data_fingerprint": record.get("data_fingerprint"),
    }
    baselines = _pick(results.get("beside_bits_per_byte"), _BASELINES, _number)
    return [{**each, "own": True, "beside": baselines} for each in _evaluation({**results, **named})]


def _added_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the scores that were added to the run's folder: a JSON list, or {"evaluations": a list}."""
    file = run / EVALUATIONS_FILE
    if not file.is_file():
        return []
    try:
        # `parse_object` is the strict reader of JSON, but of objects only.
        found = parse_object(b'{"evaluations": ' + file.read_bytes() + b"}", str(file))["evaluations"]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if isinstance(found, dict):
        found = found.get("evaluations")
    if not isinstance(found, list):
        raise CheckpointError(f"{file}: must be a list of evaluations")
    return [scored for each in found if isinstance(each, dict) for scored in _evaluation(each)]


def _evaluation(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the known values of a score as a list of one; an empty list if it has no loss."""
    loss, name = _number(found.get("loss")), found.get("name")
    if loss is None:
        return []
    scored = {
        "name": shareable(name) if isinstance(name, str) and name else "evaluation",
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else None,
        "bits_per_byte": _number(found.get("bits_per_byte")),
        "data_fingerprint": _digest(found.get("data_fingerprint")),
    }
    return [_not_none(scored) | _pick(found, ("tokens", "text_bytes", "max_length", "stride"), _count)]


def _invariance(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return for each precision and attention how many cells there are and hold, and the largest difference."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    cells = report.get("cells")
    for cell in cells if isinstance(cells, list) else []:
        precision = _one_of(_PRECISIONS, _object(cell).get("precision"))
        attention = _attention(_object(cell).get("attention"))
        if precision and attention:
            groups.setdefault((precision, attention), []).append(cell)
    rows = []
    for (precision, attention), own in groups.items():
        differences = [value for value in (_number(cell.get("difference")) for cell in own) if value is not None]
        row = {"precision": precision, "attention": attention, "cells": len(own)}
        row |= {"holds": sum(cell.get("holds") is True for cell in own)}
        rows.append({**row, "difference": max(differences, default=None)})
    measured = {
        "tolerances": _pick(report.get("tolerances"), _PRECISIONS, _number),
        "device": _device(report.get("device")),
    }
    return {"rows": rows, **measured, **_pick(report, ("torch", "transformers"), _version)} if rows else None


# --- values: each check returns the value if it may be shown, None otherwise


def _pick(source: object, names: Iterable[str], check: Check) -> dict[str, Any]:
    """Return the named values of an object that pass a check."""
    found = _object(source)
    return _not_none({name: check(found.get(name)) for name in names})


def _not_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}


def _number(value: object) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _one_of(known: tuple[str, ...], value: object) -> str | None:
    return value if isinstance(value, str) and value in known else None


def _device(value: object) -> str | None:
    return _one_of(("cpu", "cuda", "mps", "xpu"), str(value).split(":")[0])


def _matching(pattern: str, value: object) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(pattern, value) and hide_secrets(value) == value else None


_attention = partial(_matching, r"[a-z][a-z0-9_]{0,23}")
_digest = partial(_matching, r"[0-9a-f]{8,64}(?:-[0-9a-f]{8,64})*")
_version = partial(_matching, r"[0-9][0-9a-z.+-]{0,40}")
_commit = partial(_matching, r"[0-9a-f]{40}")
