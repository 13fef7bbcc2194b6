"""The YAML front matter of a card: the generated metadata, and how they are renewed in one that a person has edited.

The Hub's rules for it are in the model card specification of its documentation (`modelcard.md`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from gpt_kit_hf.errors import UsageError, one_line
from gpt_kit_hf.hub.card.markdown import sources

_TAGS = ("gpt-kit-hf", "instruction-tuned", "lora", "continued-pretraining")
_GENERATED_KEYS = ("library_name", "pipeline_tag", "base_model")
_INDEX = "model-index"
# Marks generated results, to tell them from those that a person adds.
_MADE_BY = {"made_by": "gpt-kit card"}
_METRICS = {"loss": "Loss (nats per token)", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}


def card_data(facts: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata of the facts; unknown ones, such as a license, are left out."""
    base, options = facts.get("base", {}), facts.get("options", {})
    results = list(_results(facts))
    conditions = (True, facts["kind"] == "tuned", options.get("adapter.lora_r"), facts["kind"] == "continued")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base.get("name") if base.get("hub") else None,
        datasets=[source["hub"] for source in sources(options) if "hub" in source] or None,
        tags=[tag for tag, holds in zip(_TAGS, conditions, strict=True) if holds],
        eval_results=results or None,
        model_name=_label(facts["name"]) if results else None,
    )


def split_card(text: str) -> tuple[str, str, str]:
    """Return the opening of a card's front matter, the front matter, and the rest; joined they are the card.

    Without a front matter the first two are empty.
    """
    match = REGEX_YAML_BLOCK.search(text)
    return ("", "", text) if match is None else (match[1], match[2], text[match.end(2) :])


def read_metadata(front_matter: str) -> dict[str, Any]:
    """Return the metadata in a front matter; UsageError if it is not a YAML mapping."""
    try:
        found = yaml.safe_load(front_matter)
    except yaml.YAMLError as error:
        raise UsageError(f"the card's metadata are not YAML: {one_line(error)}") from None
    if found is not None and not isinstance(found, dict):
        raise UsageError("the card's metadata must be 'name: value' lines")
    return found or {}


def generated_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is generated in metadata: the generated keys, and the generated results as "results"."""
    results = [result for entry in _index(metadata) for result in entry["results"] if _is_generated(result)]
    return {name: metadata[name] for name in _GENERATED_KEYS if name in metadata} | {"results": results}


def renew_metadata(front_matter: str, generated: Mapping[str, Any], line_end: str) -> str:
    """Return a front matter with the generated metadata renewed in it.

    Other keys stay byte for byte in their places. In `tags`, `datasets` and `model-index` a person's entries stay.
    """
    before = read_metadata(front_matter)
    changes = {**generated, "tags": _merged(before.get("tags"), generated["tags"], replaced=_TAGS)}
    if "datasets" in generated:
        changes["datasets"] = _merged(before.get("datasets"), generated["datasets"])
    changes[_INDEX] = _merged_index(_index(before), generated.get(_INDEX, []))
    changes = {name: value for name, value in changes.items() if before.get(name, []) != value}
    if not changes:
        return front_matter
    expected = {name: value for name, value in {**before, **changes}.items() if name != _INDEX or value}
    renewed = _with_keys(front_matter, changes, line_end)
    # Not possible in place: an anchor in a replaced key, or metadata in braces. Then all of it is rewritten.
    return renewed if _loads_as(renewed, expected) else _as_yaml(expected, line_end)


# --- results


def _results(facts: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield a result for each metric of each evaluation; each evaluation has a dataset type of its own."""
    taken: set[str] = set()
    for number, scored in enumerate(facts.get("evaluations", []), 1):
        name, dataset = _label(scored["name"]), _dataset(facts) if scored.get("own") else {}
        # The Hub requires a dataset's id, or a text in the form of one: /^(?:[\w-]+\/)?[\w-.]+$/
        kind = dataset.get("hub") or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "text"
        kind = kind if kind not in taken else f"{kind}-{number}"
        taken.add(kind)
        about = {key: scored[key] for key in ("data_fingerprint", "tokens", "max_length", "stride") if key in scored}
        for metric, title in _METRICS.items():
            if metric in scored:
                yield EvalResult(
                    task_type="text-generation",
                    task_name="Text generation",
                    dataset_type=kind,
                    dataset_name=name,
                    dataset_config=dataset.get("config"),
                    dataset_split=dataset.get("split"),
                    dataset_args={**_MADE_BY, **about},
                    metric_type=metric,
                    metric_name=title,
                    metric_value=round(scored[metric], 6),
                )


def _dataset(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Hub dataset that the run was evaluated on; an empty dict if it was not on one."""
    options = facts.get("options", {})
    if options.get("text.eval_files") or options.get("base.eval_rows"):
        return {}
    for option, group in (("text.dataset_name", "text"), ("rows.dataset_name", "rows")):
        if "hub" in options.get(option, {}):
            split = options.get("text.dataset_test_split") or options.get(f"{group}.dataset_train_split")
            return {"hub": options[option]["hub"], "config": options.get(f"{group}.dataset_config"), "split": split}
    return {}


def _label(text: str) -> str:
    """Return a name for metadata, which web pages show: without characters that are markup."""
    return re.sub(r"[^\w .,+=:()-]+", "_", text)


def _index(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the `model-index`; UsageError for one that the Hub would refuse."""
    found = metadata.get(_INDEX) or []
    try:
        valid = isinstance(found, list) and all(
            isinstance(entry["results"], list) and all(isinstance(each["dataset"], dict) for each in entry["results"])
            for entry in found
        )
    except (TypeError, KeyError):
        valid = False
    if not valid:
        raise UsageError(
            f"the card's {_INDEX} must be a list of models with 'name' and 'results', each of a 'dataset'"
        )
    return list(found)


def _is_generated(result: Mapping[str, Any]) -> bool:
    args = result["dataset"].get("args")
    return isinstance(args, dict) and _MADE_BY.items() <= args.items()


def _merged_index(before: list[dict[str, Any]], generated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the generated entry with a person's results in an entry of that name, and a person's other entries."""
    kept = []
    for entry in before:
        own = [left for result in entry["results"] if (left := _without_generated(result))]
        if own or not entry["results"]:
            kept.append({**entry, "results": own})
    if not generated:
        return kept
    same = next((entry for entry in kept if entry.get("name") == generated[0]["name"]), None)
    if same is None:
        return [*generated, *kept]
    whole = {**same, "results": [*generated[0]["results"], *same["results"]]}
    return [whole if entry is same else entry for entry in kept]


def _without_generated(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return a person's share of a result: of a generated one the metrics that were added, if any."""
    if not _is_generated(result):
        return result
    metrics = result.get("metrics")
    added = [metric for metric in metrics if metric.get("type") not in _METRICS] if isinstance(metrics, list) else []
    args = {name: value for name, value in result["dataset"]["args"].items() if name not in _MADE_BY}
    return {**result, "dataset": {**result["dataset"], "args": args}, "metrics": added} if added else None


# --- the front matter


def _merged(before: object, generated: list[str], replaced: tuple[str, ...] = ()) -> list[Any]:
    """Return the values there were, without those of `replaced` that are no longer generated, and the new ones."""
    found = before if isinstance(before, list) else [] if before is None else [before]
    kept = [value for value in found if value not in replaced or value in generated]
    return [*kept, *(value for value in generated if value not in kept)]


def _with_keys(front_matter: str, changes: Mapping[str, Any], line_end: str) -> str:
    """Return a front matter with the lines of changed keys replaced, an empty index deleted, new keys added."""
    lines = front_matter.splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += line_end
    node = yaml.compose(front_matter, Loader=yaml.SafeLoader)
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) and not node.flow_style else []
    ends = [*(key.start_mark.line for key in keys[1:]), len(lines)]
    for key, end in reversed(list(zip(keys, ends, strict=False))):
        if key.value in changes:
            # Comments and blank lines before the next key belong to that one.
            while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
                end -= 1
            lines[key.start_mark.line : end] = _key_lines(key.value, changes[key.value], line_end)
    for name in [name for name in changes if name not in {key.value for key in keys}]:
        lines += _key_lines(name, changes[name], line_end)
    # A front matter ends before its last line break.
    text = "".join(lines)
    return text if front_matter.endswith(("\n", "\r")) else text.rstrip("\r\n")


def _key_lines(name: str, value: Any, line_end: str) -> list[str]:
    return [] if name == _INDEX and not value else [_as_yaml({name: value}, line_end) + line_end]


def _as_yaml(metadata: Mapping[str, Any], line_end: str) -> str:
    text: str = yaml.safe_dump(dict(metadata), allow_unicode=True, sort_keys=False, line_break=line_end)
    return text.strip()


def _loads_as(front_matter: str, expected: Mapping[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(front_matter) == expected)
    except yaml.YAMLError:
        return False
