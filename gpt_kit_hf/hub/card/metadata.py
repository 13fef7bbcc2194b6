"""The metadata of a card: what is generated of it, and how it is renewed in a front matter that a person has edited.

What the Hub demands of it is described in the model card specification of its documentation (`modelcard.md`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from gpt_kit_hf.errors import UsageError, one_line
from gpt_kit_hf.hub.card.sections import sources

_TAGS = ("gpt-kit-hf", "instruction-tuned", "lora")
_OWN_KEYS = ("library_name", "pipeline_tag", "base_model")
_INDEX = "model-index"
# Tells our results from those that a person adds, whatever both are called.
_MADE_BY = {"made_by": "gpt-kit card"}
_METRICS = {
    "loss": "Loss (nats per token)",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
}


def card_data(facts: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata that the facts give; what they do not tell, such as a license, is left out."""
    base, options = facts.get("base", {}), facts.get("options", {})
    datasets = [source["hub"] for source in sources(options) if "hub" in source]
    results = list(_results(facts))
    told = {_TAGS[0]: True, _TAGS[1]: facts["kind"] == "tuned", _TAGS[2]: bool(options.get("adapter.lora_r"))}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base.get("name") if base.get("hub") else None,
        datasets=datasets or None,
        tags=[tag for tag, holds in told.items() if holds],
        eval_results=results or None,
        model_name=_words(facts["name"]) if results else None,
    )


def split_card(text: str) -> tuple[str, str, str]:
    """Return a card in three parts, which make it whole: what opens its metadata, these, and the rest.

    Where there are no metadata, the first two are empty.
    """
    match = REGEX_YAML_BLOCK.search(text)
    return ("", "", text) if match is None else (match[1], match[2], text[match.end(2) :])


def read_metadata(block: str) -> dict[str, Any]:
    """Return the metadata that a front matter holds; UsageError if it is not YAML, or no "name: value" lines."""
    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise UsageError(f"the card's metadata are not YAML: {one_line(error)}") from None
    if found is not None and not isinstance(found, dict):
        raise UsageError("the card's metadata must be 'name: value' lines")
    return found or {}


def generated_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of metadata is generated: the keys of ours, and our results."""
    own = {name: metadata[name] for name in _OWN_KEYS if name in metadata}
    return {
        **own,
        "results": [result for entry in _index(metadata) for result in entry["results"] if _is_ours(result)],
    }


def renew_metadata(block: str, ours: Mapping[str, Any], line_end: str) -> str:
    """Return a front matter with our metadata renewed in it.

    Other keys stay byte for byte, in their places. Of `tags`, `datasets` and `model-index` what a person added stays.
    """
    theirs = read_metadata(block)
    wanted = {**ours, "tags": _joined(theirs.get("tags"), ours["tags"], _TAGS)}
    if "datasets" in ours:
        wanted["datasets"] = _joined(theirs.get("datasets"), ours["datasets"], ())
    if index := _merged_index(_index(theirs), ours.get(_INDEX, [])):
        wanted[_INDEX] = index
    changed = {name: value for name, value in wanted.items() if theirs.get(name) != value}
    gone = {_INDEX} & theirs.keys() - wanted.keys()
    if not changed and not gone:
        return block
    expected = {name: value for name, value in {**theirs, **wanted}.items() if name not in gone}
    renewed = _with_keys(block, changed, gone, line_end)
    # An anchor in a key that was replaced, or metadata in braces: then all of it is written anew.
    return renewed if _loads_as(renewed, expected) else _as_yaml(expected, line_end)


# --- results


def _results(facts: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield a result for each metric of each evaluation; no two evaluations have the same type of dataset."""
    taken: set[str] = set()
    for number, scored in enumerate(facts.get("evaluations", [])):
        name, dataset = _words(scored["name"]), _dataset(facts) if scored.get("own") else {}
        # The Hub takes an id here, or what looks like one: /^(?:[\w-]+\/)?[\w-.]+$/
        kind = dataset.get("hub") or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "text"
        kind = kind if kind not in taken else f"{kind}-{number + 1}"
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
    """Return the dataset of the Hub that the held-out text is of, where it is of one."""
    options = facts.get("options", {})
    for room in ("text.dataset", "rows.rows"):
        place = options.get("text.dataset_name" if room == "text.dataset" else "rows.dataset_name", {})
        elsewhere = options.get("text.eval_files") or options.get("base.eval_rows")
        if "hub" in place and not elsewhere:
            split = options.get("text.dataset_test_split") or options.get(f"{room}_split")
            return {"hub": place["hub"], "config": options.get(f"{room}_config"), "split": split}
    return {}


def _words(text: str) -> str:
    """Return a name for metadata, which pages show: letters, digits and signs that mean nothing to them."""
    return re.sub(r"[^\w .,+=:()-]+", "_", text)


def _index(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the `model-index`; UsageError for one that is not what the Hub takes."""
    found = metadata.get(_INDEX) or []
    whole = isinstance(found, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("results"), list)
        and all(isinstance(result, dict) and isinstance(result.get("dataset"), dict) for result in entry["results"])
        for entry in found
    )
    if not whole:
        raise UsageError(
            f"the card's {_INDEX} must be a list of models with 'name' and 'results', each of a 'dataset'"
        )
    return found if isinstance(found, list) else []


def _is_ours(result: Mapping[str, Any]) -> bool:
    args = result["dataset"].get("args")
    return isinstance(args, dict) and _MADE_BY.items() <= args.items()


def _merged_index(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our entry with the results of theirs that are not ours, and their other entries."""
    kept = []
    for entry in theirs:
        others = [left for result in entry["results"] if (left := _without_ours(result))]
        if others or not entry["results"]:
            kept.append({**entry, "results": others})
    if not ours:
        return kept
    same = next((entry for entry in kept if entry.get("name") == ours[0]["name"]), None)
    if same is None:
        return [*ours, *kept]
    whole = {**same, "results": [*ours[0]["results"], *same["results"]]}
    return [whole if entry is same else entry for entry in kept]


def _without_ours(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a person has in a result: all of another one, of ours the metrics that were added to it."""
    if not _is_ours(result):
        return result
    metrics = result.get("metrics")
    added = [metric for metric in metrics if metric.get("type") not in _METRICS] if isinstance(metrics, list) else []
    args = {name: value for name, value in result["dataset"]["args"].items() if name not in _MADE_BY}
    return {**result, "dataset": {**result["dataset"], "args": args}, "metrics": added} if added else None


# --- the front matter


def _joined(theirs: object, ours: list[str], known: tuple[str, ...]) -> list[Any]:
    """Return their values, without those of ours that hold no more, and ours that are new."""
    found = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    kept = [value for value in found if value not in known or value in ours]
    return [*kept, *(value for value in ours if value not in kept)]


def _with_keys(block: str, changed: Mapping[str, Any], gone: set[str], line_end: str) -> str:
    """Return a front matter with the lines of some keys replaced, of others taken out, and new ones at its end."""
    pieces, rest = [], dict(changed)
    for name, lines in _keys_in(block):
        if name in rest:
            own, after = _before_comments(lines)
            pieces.append(_as_yaml({name: rest.pop(name)}, line_end) + line_end * own.endswith(("\n", "\r")) + after)
        elif name in gone:
            pieces.append(_before_comments(lines)[1])
        else:
            pieces.append(lines)
    text = "".join(pieces)
    for name, value in rest.items():
        text += line_end * bool(text and not text.endswith(("\n", "\r"))) + _as_yaml({name: value}, line_end)
    # A key that went may have been the last; the front matter has no line end of its own there.
    return text if block.endswith(("\n", "\r")) else text.rstrip("\r\n")


def _keys_in(block: str) -> Iterator[tuple[str | None, str]]:
    """Yield the outermost keys of a YAML mapping and the text from each to the next, that before the first as None."""
    node = yaml.compose(block, Loader=yaml.SafeLoader)
    keys = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
    starts = [key.start_mark.index for key, _ in keys]
    yield None, block[: starts[0]] if starts else block
    for (key, _), start, end in zip(keys, starts, [*starts[1:], len(block)], strict=False):
        yield key.value, block[start:end]


def _before_comments(lines: str) -> tuple[str, str]:
    """Return the lines of a key, and the comments and blank lines after them, which belong to what follows."""
    every = lines.splitlines(keepends=True)
    count = len(every)
    while count > 1 and (not every[count - 1].strip() or every[count - 1].lstrip().startswith("#")):
        count -= 1
    return "".join(every[:count]), "".join(every[count:])


def _as_yaml(metadata: Mapping[str, Any], line_end: str) -> str:
    text: str = yaml.safe_dump(dict(metadata), allow_unicode=True, sort_keys=False, line_break=line_end)
    return text.strip()


def _loads_as(block: str, expected: Mapping[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(block) == expected)
    except yaml.YAMLError:
        return False
