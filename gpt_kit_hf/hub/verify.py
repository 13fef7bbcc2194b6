"""The gate: whether what is on the Hub is what was published, asked where nothing of it was before."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from transformers.dynamic_module_utils import get_relative_imports

from gpt_kit_hf.errors import CheckpointError, GPTKitError, HubError
from gpt_kit_hf.hub.client import check_blobs, hub_errors
from gpt_kit_hf.hub.manifest import CARD_FILE, PUBLICATION_FILE, Publication, read_publication
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.secret_scan import hide_secrets, scan_for_publication
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.storage.digests import digest_of
from gpt_kit_hf.tokenization.encodings import check_fingerprint
from gpt_kit_hf.tokenization.export import load_encoding

_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
_CODE = ("configuration_gpt_kit.py", "modeling_gpt_kit.py")
_SECONDS = 1800
# Between machines the same weights give logits that differ by rounding; within one they are equal to the bit.
_LOSS_TOLERANCE = 1e-3
_PADDING_TOLERANCE = {"torch.float32": 1e-3}
_PADDING_TOLERANCE_OTHERS = 0.3
# Loaded beside the weights, or before them.
_LOADED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".jinja", ".py", ".pt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What was asked of a commit on the Hub: `checks` that held, and `differences`, each naming what is wrong."""

    repo: str
    commit: str
    checks: tuple[str, ...]
    differences: tuple[str, ...]

    def require(self) -> None:
        """Raise HubError if anything differs."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise HubError(f"{self.repo} at {self.commit[:12]} is not what was published: {self.differences[0]}{more}")


def verify_publication(
    repo: str, revision: str | None = None, *, local: Publication | None = None, api: HfApi | None = None
) -> GateReport:
    """Fetch a commit into empty caches, load it in fresh processes, and compare with what was published.

    One process has this package and one has not (`trust_remote_code=True`), and each has a cache of its own. Compared
    are every file's digest, the configuration, the tokenizer's ids, the logits, tokens and losses with those of
    `local`, or without it with what the repository says of itself. Raises HubError if it cannot be fetched.
    """
    api = api or HfApi()
    with hub_errors(f"{repo} was not verified"):
        commit = str(api.repo_info(repo, revision=revision).sha)
    with tempfile.TemporaryDirectory(prefix="gpt-kit-gate-") as place:
        folders = [_fetch(repo, commit, Path(place) / name, api) for name in ("with", "without")]
        works = [(Path(place) / "with", True), (Path(place) / "without", False)]
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(run_probe, [probe_request(repo, work, commit)], work, has_package, api)
                for work, has_package in works
            ]
            answers = [each.result()[0] for each in asked]
        return judge(repo, commit, folders[0], answers[0], answers[1], local)


def judge(
    repo: str,
    commit: str,
    folder: Path,
    with_package: Mapping[str, Any],
    without: Mapping[str, Any],
    local: Publication | None,
) -> GateReport:
    """Return what the answers of the two processes and the fetched files say of a commit."""
    differences: list[str] = []
    reference = local
    try:
        said = read_publication(folder)
        reference = local or said
    except CheckpointError as error:
        differences.append(str(error))
    differences += _file_differences(folder, reference)
    for check in (check_model_folder, scan_for_publication):
        try:
            check(folder)
        except GPTKitError as error:
            differences.append(str(error).replace(f"{folder}/", ""))
    is_ours = GPTKitConfig.model_type in (_model_type(folder), _type_of(reference.probe if reference else {}))
    if is_ours:
        differences += _kit_faults(folder)
    for road, answer in (("with the package", with_package), ("without the package", without)):
        differences += [f"{line} ({road})" for line in _faults_of_its_own(answer, is_ours)]
        for part, reason in answer["failures"].items():
            differences.append(f"{part} cannot be used {road}: {hide_secrets(reason)}")
        if reference is not None:
            same_machine = local is not None
            found = answer_differences(reference.probe, answer, exact=same_machine)
            differences += [f"{line} ({road})" for line in found]
    if is_ours and "model" in without and not without["model"]["module"].startswith("transformers_modules."):
        differences.append(f"without the package the code came from {without['model']['module']}")
    checks = (
        f"{len(reference.files) if reference else 0} files by SHA-256, with the package and without",
        "configuration, generation defaults, tokenizer, chat template, tied weights, end and pad tokens",
        "logits, greedy tokens and losses",
    )
    return GateReport(repo=repo, commit=commit, checks=checks, differences=tuple(dict.fromkeys(differences)))


def probe_request(place: str, work: Path, revision: str | None = None) -> dict[str, Any]:
    """Return what to ask a process about a folder, or about a commit of the Hub in the cache below `work`."""
    request: dict[str, Any] = {"place": place, "output": str(work / f"logits-{revision or 'local'}.safetensors")}
    if revision is not None:
        request |= {"revision": revision, "cache_dir": str(work / "cache")}
    return request


def run_probe(
    requests: Sequence[Mapping[str, Any]], work: Path, with_package: bool, api: HfApi | None = None
) -> list[dict[str, Any]]:
    """Return what a fresh process finds out about each of the requests; `work` gets its files."""
    work.mkdir(parents=True, exist_ok=True)
    answers = work / "answers.json"
    asked = {"package": with_package, "answers": str(answers), "requests": list(requests)}
    environment = dict(os.environ) | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["PYTHONWARNINGS"] = "ignore"
    if with_package:  # from where it is imported here, though the process runs elsewhere
        roots = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    if api is not None:
        environment["HF_ENDPOINT"] = api.endpoint
        if isinstance(api.token, str):
            environment["HF_TOKEN"] = api.token
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    try:
        ended = subprocess.run(
            [sys.executable, "-c", source],
            input=json.dumps(asked),
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"loading the model took longer than {_SECONDS} s in a fresh process") from None
    if ended.returncode or not answers.is_file():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise HubError(f"a fresh process could not look at the model: {hide_secrets(last)[:300]}")
    found: list[dict[str, Any]] = json.loads(answers.read_text(encoding="utf-8"))
    return found


def answer_differences(expected: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool) -> Iterator[str]:
    """Yield what a process found otherwise than was published, each by its name; logits to the bit if `exact`."""
    for part in ("config", "generation_config"):
        before, now = expected.get(part, {}), found.get(part, {})
        if part in found:
            before, now = (value.get("values", value) for value in (before, now))
            for key in _unlike(before, now):
                yield f"{part}.{key} is {_show(now.get(key))}, was {_show(before.get(key))}"
    for part, named in (("tokenizer", "the tokenizer's"), ("template", "the chat template's")):
        if part in found and part in expected:
            for key in _unlike(expected[part], found[part]):
                yield f"{named} {key} is {_show(found[part].get(key))}, was {_show(expected[part].get(key))}"
    if "model" in found and "model" in expected:
        yield from _model_differences(expected["model"], found["model"], exact)
    if "base" in found and "base" in expected and found["base"]["class"] != expected["base"]["class"]:
        yield f"AutoModel gives {found['base']['class']}, was {expected['base']['class']}"


def _model_differences(expected: Mapping[str, Any], found: Mapping[str, Any], exact: bool) -> Iterator[str]:
    for key, named in (
        ("class", "the model's class"),
        ("parameters", "the number of parameters"),
        ("dtypes", "the weights' dtype"),
        ("tied", "whether input and output embeddings are tied"),
        ("eos", "the end of text"),
        ("generation_eos", "the end of text in generation"),
        ("written", "the greedy continuation"),
    ):
        if found[key] != expected[key]:
            yield f"{named} is {_show(found[key])}, was {_show(expected[key])}"
    near = math.isclose(found["loss"], expected["loss"], rel_tol=_LOSS_TOLERANCE) and not exact
    if found["logits"] != expected["logits"] and not near:
        yield f"the logits differ: a loss is {found['loss']:.5f}, was {expected['loss']:.5f}"


def _kit_faults(folder: Path) -> Iterator[str]:
    """Yield what the files of a model of this kit lack, whatever was published."""
    missing = sorted(set(_AUTO_CLASSES) - _auto_map(folder))
    if missing:
        yield f"config.json has no auto_map entry for {', '.join(missing)}"
    # And the files that they import, which are those of the version that saved the model.
    here = [folder / name for name in _CODE if (folder / name).is_file()]
    beside = {f"{name}.py" for file in here for name in get_relative_imports(file)}
    for name in sorted({*_CODE, *beside}):
        if not (folder / name).is_file():
            yield f"{name} is missing on the Hub"
    expected = _configuration(folder).get("tokenizer_fingerprint")
    try:
        if expected is not None:
            check_fingerprint(load_encoding(folder), str(expected), "the repository")
    except (GPTKitError, OSError, ValueError, KeyError, TypeError) as error:
        yield f"the tokenizer is not the one of the training: {_first_line(error)}"


def _faults_of_its_own(answer: Mapping[str, Any], is_ours: bool) -> Iterator[str]:
    """Yield what is wrong with what a process found, whatever was published."""
    tokenizer, model = answer.get("tokenizer"), answer.get("model")
    if tokenizer and tokenizer["eos"] is None:
        yield "the tokenizer has no end of text"
    if tokenizer and is_ours and tokenizer["pad"] is not None and tokenizer["pad"] == tokenizer["eos"]:
        yield "the tokenizer pads with its end of text: who masks padding would train it not to stop"
    if tokenizer and model:
        ends = model["generation_eos"] if isinstance(model["generation_eos"], list) else [model["generation_eos"]]
        if tokenizer["eos"] not in ends:
            yield f"generation ends at {_show(ends)}, the tokenizer's end of text is {tokenizer['eos']}"
    if model and not math.isclose(model["loss"], model["loss_by_hand"], rel_tol=1e-3, abs_tol=1e-3):
        yield (
            "a row that ends with the end of text is scored wrongly: "
            f"loss {model['loss']:.4f}, by hand {model['loss_by_hand']:.4f}"
        )
    if model:
        allowed = max(_PADDING_TOLERANCE.get(dtype, _PADDING_TOLERANCE_OTHERS) for dtype in model["dtypes"])
        if not model["padding_difference"] <= allowed:
            yield f"padding changes the logits by {model['padding_difference']:.3g}"


def _auto_map(folder: Path) -> set[str]:
    entries = _configuration(folder).get("auto_map")
    return set(entries) if isinstance(entries, dict) else set()


def _model_type(folder: Path) -> object:
    return _configuration(folder).get("model_type")


def _type_of(probe: Mapping[str, Any]) -> object:
    return probe.get("config", {}).get("values", {}).get("model_type")


def _configuration(folder: Path) -> dict[str, Any]:
    """Return what config.json holds; nothing where that cannot be read, which other checks say."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file_differences(folder: Path, expected: Publication | None) -> Iterator[str]:
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listed = expected.files if expected is not None else {}
    for name, file in listed.items():
        if name not in present:
            yield f"{name} is missing on the Hub"
        # A person may edit the card there; it is no part of the model.
        elif name != CARD_FILE and digest_of(present[name]) != file:
            yield f"{name} is not the file that was published (its SHA-256 differs)"
    for name in sorted(present.keys() - listed.keys() - {PUBLICATION_FILE, CARD_FILE, ".gitattributes"}):
        if expected is not None and name.endswith(_LOADED):
            yield f"{name} was not published with this model, and loaders may read it"


def _fetch(repo: str, commit: str, place: Path, api: HfApi) -> Path:
    with hub_errors(f"{repo} was not fetched back"):
        folder = Path(
            snapshot_download(repo, revision=commit, cache_dir=place / "cache", endpoint=api.endpoint, token=api.token)
        )
    check_blobs(folder, repo)
    return folder


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def _show(value: object) -> str:
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_line(error: BaseException) -> str:
    return hide_secrets((str(error).strip() or type(error).__name__).splitlines()[0])[:300]
