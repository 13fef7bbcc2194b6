"""Post-push verification: a commit on the Hub is downloaded into empty caches and compared with what was published."""

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
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from gpt_kit_hf.errors import CheckpointError, GPTKitError, HubError
from gpt_kit_hf.hub.card.card import CARD_FILE
from gpt_kit_hf.hub.client import check_blobs, hub_errors
from gpt_kit_hf.hub.manifest import PUBLICATION_FILE, PublicationManifest, read_manifest
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.secret_scan import first_line, hide_secrets, scan_for_publication
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.storage.digests import digest_of
from gpt_kit_hf.tokenization.encodings import check_fingerprint
from gpt_kit_hf.tokenization.export import load_encoding

_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
_TIMEOUT = 1800  # seconds
# On another machine the same weights give logits that differ by rounding; on the same one they are equal to the bit.
_LOSS_TOLERANCE = 1e-3
_PADDING_TOLERANCE = {"torch.float32": 1e-3}
_PADDING_TOLERANCE_LOW_PRECISION = 0.3
# Of a loss and the same loss from the same logits.
_SAME_LOSS_TOLERANCE = {"torch.float32": 1e-5}
_SAME_LOSS_TOLERANCE_LOW_PRECISION = 1e-3
# Loaders read files with these suffixes beside the weights, or prefer them.
_LOADED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".jinja", ".py", ".pt", ".pkl")
_CHECKS = (
    "configuration, generation defaults, tokenizer, chat template, tied weights, EOS and padding tokens",
    "logits, greedy tokens and losses",
)
# Answers that are not compared: where the code came from, and floats, which `answer_differences` compares with care.
_NOT_COMPARED = {"module", "logits", "loss", "loss_by_hand", "padding_difference"}


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """The result of the post-push verification of a commit: the `checks` made, and the `differences` found."""

    repo: str
    commit: str
    checks: tuple[str, ...]
    differences: tuple[str, ...]

    def require(self) -> None:
        """Raise HubError with the first difference, if there is any."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise HubError(f"{self.repo} at {self.commit[:12]} is not what was published: {self.differences[0]}{more}")


def verify_publication(
    repo: str, revision: str | None = None, *, local: PublicationManifest | None = None, api: HfApi | None = None
) -> VerificationReport:
    """Download a commit into empty caches, load it in fresh processes, and compare it with what was published.

    One process has this package, the other has not; each has its own cache. The other one runs the repository's code,
    `trust_remote_code=True`, only if a model of this package was published, and not for a native model. Compared
    are the files' digests, the configuration, the tokenizer's ids, logits, greedy tokens and losses, with those of
    `local`, by default with the manifest in the repository. Raises HubError for a failed download.
    """
    api = api or HfApi()
    with hub_errors(f"{repo} was not verified"):
        commit = str(api.repo_info(repo, revision=revision).sha)
    with tempfile.TemporaryDirectory(prefix="gpt-kit-verify-") as place:
        works = {True: Path(place) / "with", False: Path(place) / "without"}
        folders = [_fetch(repo, commit, work, api) for work in works.values()]
        remote_code = _needs_code(folders[0], local)
        with ThreadPoolExecutor(2) as pool:
            jobs = []
            for with_package, work in works.items():
                request = probe_request(repo, work, commit, remote_code=remote_code)
                jobs.append(pool.submit(run_probe, [request], work, with_package, api))
            answers, without = (job.result()[0] for job in jobs)
        return judge(repo, commit, folders[0], answers, without, local)


def judge(
    repo: str,
    commit: str,
    folder: Path,
    with_package: Mapping[str, Any],
    without: Mapping[str, Any],
    local: PublicationManifest | None,
) -> VerificationReport:
    """Return the report of a commit from its downloaded files and the answers of the two processes."""
    differences: list[str] = []
    reference = local
    try:
        published = read_manifest(folder)
        reference = local or published
    except CheckpointError as error:
        differences.append(str(error))
    differences += _file_differences(folder, reference)
    for check in (check_model_folder, scan_for_publication):
        try:
            check(folder)
        except GPTKitError as error:
            differences.append(str(error).replace(f"{folder}/", ""))
    expected = reference.probe if reference is not None else {}
    config = _read_config(folder)
    is_ours = GPTKitConfig.model_type in (config.get("model_type"), _type_published(reference))
    if is_ours:
        differences += _config_faults(folder, config)
    for process, answers in (("with the package", with_package), ("without the package", without)):
        found = [*_probe_faults(answers, is_ours)]
        if reference is not None:
            found += answer_differences(expected, answers, exact=local is not None)
        differences += [f"{line} ({process})" for line in found]
        for name, reason in answers["failures"].items():
            differences.append(f"{name} cannot be used {process}: {hide_secrets(reason)}")
    source = "transformers_modules." if is_ours else "transformers."
    if "model" in without and not without["model"]["module"].startswith(source):
        differences.append(f"without the package the code came from {without['model']['module']}")
    how = "" if is_ours else f", as {without['model']['class']} without remote code" if "model" in without else ""
    files = f"{len(reference.files) if reference else 0} files by SHA-256, with the package and without{how}"
    unique = tuple(dict.fromkeys(differences))
    return VerificationReport(repo=repo, commit=commit, checks=(files, *_CHECKS), differences=unique)


def _needs_code(folder: Path, local: PublicationManifest | None) -> bool:
    """Return whether a model of this package was published and is there, whose code is to be run for a comparison."""
    try:
        published = _type_published(local or read_manifest(folder))
    except CheckpointError:
        published = GPTKitConfig.model_type
    return published == _read_config(folder).get("model_type") == GPTKitConfig.model_type


def _type_published(manifest: PublicationManifest | None) -> object:
    """Return the model_type by the answers of the probe before the publication."""
    answers = manifest.probe if manifest is not None else {}
    return answers.get("config", {}).get("values", {}).get("model_type")


def probe_request(place: str, work: Path, revision: str | None = None, *, remote_code: bool = True) -> dict[str, Any]:
    """Return the request to probe a folder, or a commit of a Hub repository in the cache below `work`.

    With `remote_code` its code is run where this package is absent.
    """
    request = {"place": place, "remote_code": remote_code}
    return request if revision is None else request | {"revision": revision, "cache_dir": str(work / "cache")}


def run_probe(
    requests: Sequence[Mapping[str, Any]], work: Path, with_package: bool, api: HfApi | None = None
) -> list[dict[str, Any]]:
    """Return a fresh process's answer to each request; its files go to `work`. Raises HubError if it fails."""
    work.mkdir(parents=True, exist_ok=True)
    answers = work / "answers.json"
    request = {"package": with_package, "answers": str(answers), "requests": list(requests)}
    environment = dict(os.environ) | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["PYTHONWARNINGS"] = "ignore"
    if with_package:  # the process runs in another folder, from which the package may not be importable
        roots = [str(Path(str(resources.files("gpt_kit_hf"))).resolve().parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    if api is not None:
        environment["HF_ENDPOINT"] = api.endpoint
        if isinstance(api.token, str):
            environment["HF_TOKEN"] = api.token
    try:
        ended = subprocess.run(
            [sys.executable, "-c", Path(__file__).with_name("probe.py").read_text(encoding="utf-8")],
            input=json.dumps(request),
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"loading the model in a fresh process took longer than {_TIMEOUT} s") from None
    if ended.returncode or not answers.is_file():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise HubError(f"the process that loads the model failed: {hide_secrets(last)[:300]}")
    found: list[dict[str, Any]] = json.loads(answers.read_text(encoding="utf-8"))
    return found


def answer_differences(expected: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool) -> Iterator[str]:
    """Yield how a probe's answers differ from the expected ones; logits must be equal to the bit if `exact`."""
    for name in (name for name in found if name not in ("transformers", "failures")):
        before, now = (answer.get("values", answer) for answer in (expected.get(name, {}), found[name]))
        for key in sorted({*before, *now} - _NOT_COMPARED):
            if before.get(key) != now.get(key):
                yield f"{name}.{key} is {_show(now.get(key))}, was {_show(before.get(key))}"
    if "model" in found and "model" in expected:
        before, now = expected["model"], found["model"]
        close = not exact and math.isclose(now["loss"], before["loss"], rel_tol=_LOSS_TOLERANCE)
        if now["logits"] != before["logits"] and not close:
            yield f"the logits differ: a loss is {now['loss']:.5f}, was {before['loss']:.5f}"


def _config_faults(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield Auto classes without code in `auto_map`, and a tokenizer that is not the one of the training."""
    entries = config.get("auto_map")
    missing = sorted(set(_AUTO_CLASSES) - set(entries if isinstance(entries, dict) else ()))
    if missing:
        yield f"config.json has no auto_map entry for {', '.join(missing)}"
    expected = config.get("tokenizer_fingerprint")
    try:
        if expected is not None:
            check_fingerprint(load_encoding(folder), str(expected), "the repository")
    except (GPTKitError, OSError, ValueError, KeyError, TypeError) as error:
        yield f"the tokenizer is not the one of the training: {first_line(error, 300)}"


def _probe_faults(answers: Mapping[str, Any], is_ours: bool) -> Iterator[str]:
    """Yield what is wrong with a probe's answers, whatever was published."""
    tokenizer, model = answers.get("tokenizer"), answers.get("model")
    if tokenizer and tokenizer["eos"] is None:
        yield "the tokenizer has no EOS token"
    if tokenizer and is_ours and tokenizer["pad"] is not None and tokenizer["pad"] == tokenizer["eos"]:
        yield "the tokenizer pads with its EOS token: code that masks padding by its id would train it not to stop"
    if tokenizer and model:
        eos = model["generation_eos"] if isinstance(model["generation_eos"], list) else [model["generation_eos"]]
        if tokenizer["eos"] not in eos:
            yield f"generation ends at {_show(eos)}, the tokenizer's EOS token is {tokenizer['eos']}"
    if model:
        same = max(_SAME_LOSS_TOLERANCE.get(dtype, _SAME_LOSS_TOLERANCE_LOW_PRECISION) for dtype in model["dtypes"])
        if not math.isclose(model["loss"], model["loss_by_hand"], rel_tol=same, abs_tol=same):
            yield (
                "the loss of a row that ends with EOS is wrong: "
                f"loss {model['loss']:.6f}, by hand {model['loss_by_hand']:.6f}"
            )
        allowed = max(_PADDING_TOLERANCE.get(dtype, _PADDING_TOLERANCE_LOW_PRECISION) for dtype in model["dtypes"])
        if not model["padding_difference"] <= allowed:
            yield f"padding changes the logits by {model['padding_difference']:.3g}"


def _file_differences(folder: Path, expected: PublicationManifest | None) -> Iterator[str]:
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listed = expected.files if expected is not None else {}
    for name, file in listed.items():
        if name not in present:
            yield f"{name} is missing on the Hub"
        # The card may be edited on the Hub; it is no part of the model.
        elif name != CARD_FILE and digest_of(present[name]) != file:
            yield f"{name} is not the file that was published (its SHA-256 differs)"
    for name in sorted(present.keys() - listed.keys() - {PUBLICATION_FILE}):
        if expected is not None and name.endswith(_LOADED):
            yield f"{name} was not published with this model, and loaders may read it"


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; an empty dict if it cannot be read, which `check_model_folder` reports."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fetch(repo: str, commit: str, work: Path, api: HfApi) -> Path:
    with hub_errors(f"{repo} was not fetched back"):
        folder = Path(
            snapshot_download(repo, revision=commit, cache_dir=work / "cache", endpoint=api.endpoint, token=api.token)
        )
    check_blobs(folder, repo)
    return folder


def _show(value: object) -> str:
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."
