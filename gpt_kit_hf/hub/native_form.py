"""The native form of a model folder: written for an export or a push, and compared with the folder it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from gpt_kit_hf.export.native import NativeExport, write_native
from gpt_kit_hf.hub.card.card import CARD_FILE, card_facts, render_card
from gpt_kit_hf.hub.model_folder import find_model_folder, holds_tokenizer, load_pretrained
from gpt_kit_hf.model.checkpoints.folders import new_folder

# What a probe finds of the tokenizer and of generation, and what it finds of the model, that the form must not change.
_SAME = ("tokenizer", "template", "generation_config")
_SAME_OF_MODEL = ("parameters", "dtypes", "tied", "eos", "generation_eos")
# Two programs round differently; lower precisions are compared in fp32, when the form is written.
_LOSS_TOLERANCE = {"torch.float32": 1e-5}
_LOSS_TOLERANCE_LOW_PRECISION = 1e-2


def export_native(source: str, destination: str | Path) -> NativeExport:
    """Write the native form of a run, a model folder or a Hub id, with its card if it has one, to a new folder.

    Raises what `find_model_folder` and `save_as_native` raise.
    """
    folder = Path(find_model_folder(source))
    with new_folder(destination) as stage:
        done = stage_native(folder, source, stage)
        home = Path(source) if Path(source).is_dir() else folder
        if (home / CARD_FILE).is_file():
            card = (home / CARD_FILE).read_bytes().decode(errors="replace")
            (stage / CARD_FILE).write_bytes(render_card(card_facts(home, stage), existing=card).encode())
    return done


def stage_native(folder: Path, named: str, stage: Path) -> NativeExport:
    """Write the native form of a model folder's model, and its tokenizer, into an empty folder, and compare it."""
    model = load_pretrained(AutoModelForCausalLM, str(folder), named)
    return write_native(model, stage, folder if holds_tokenizer(folder) else None)


def form_differences(ours: Mapping[str, Any], native: Mapping[str, Any]) -> Iterator[str]:
    """Yield how a probe's answers for the native form differ from those for the folder that it is made of."""
    for name in _SAME:
        if ours.get(name) != native.get(name):
            yield f"its {name} differs from that of the model"
    before, now = ours.get("model", {}), native.get("model", {})
    for name in _SAME_OF_MODEL:
        if before.get(name) != now.get(name):
            yield f"its {name} is {now.get(name)}, that of the model {before.get(name)}"
    if before and now:
        exact = set(now["dtypes"]) <= _LOSS_TOLERANCE.keys()
        tolerance = _LOSS_TOLERANCE["torch.float32"] if exact else _LOSS_TOLERANCE_LOW_PRECISION
        if not math.isclose(before["loss"], now["loss"], rel_tol=tolerance, abs_tol=tolerance):
            yield f"a loss is {now['loss']:.6f}, that of the model {before['loss']:.6f}"
        if exact and before["written"] != now["written"]:
            yield "its greedy tokens differ from those of the model"
