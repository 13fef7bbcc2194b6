from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from shapes import SHAPES
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import direct_transformers_import

import gpt_kit_hf
from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    GPTKitForQuestionAnswering,
    GPTKitForSequenceClassification,
    GPTKitForTokenClassification,
    GPTKitModel,
)
from gpt_kit_hf.model.registration import add_to_transformers_namespace, register

HEADS = (GPTKitForSequenceClassification, GPTKitForTokenClassification, GPTKitForQuestionAnswering)
SHAPE: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 16}
CODE = {
    *("configuration_gpt_kit.py", "modeling_gpt_kit.py", "transformer_block.py"),
    *("chunked_loss.py", "packed_documents.py", "positions.py"),
}


def random_model(**overrides: Any) -> GPTKitForCausalLM:
    model = GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, **overrides}))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# --- with the package imported


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_classes_load_a_folder_with_no_trust_flag(shape: str, tmp_path: Path) -> None:
    model = random_model(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPTKitConfig

    ids = torch.randint(61, (2, 9))
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(causal) is GPTKitForCausalLM
    assert torch.equal(causal(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is GPTKitModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_base_model_folder_loads_as_both(tmp_path: Path) -> None:
    model = random_model()
    model.model.save_pretrained(tmp_path)
    ids = torch.randint(61, (2, 9))
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path).base_model
        assert torch.equal(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_configuration_alone_makes_a_model() -> None:
    assert type(AutoModelForCausalLM.from_config(GPTKitConfig(**SHAPE))) is GPTKitForCausalLM
    assert type(AutoModel.from_config(GPTKitConfig(**SHAPE))) is GPTKitModel


def test_registering_twice_changes_nothing() -> None:
    before = (dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), len(AutoModelForCausalLM._model_mapping))
    register()
    assert (dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), len(AutoModelForCausalLM._model_mapping)) == before


@pytest.fixture
def _in_namespace() -> Iterator[None]:
    """Run with the classes as attributes of transformers, and remove them afterwards."""
    add_to_transformers_namespace()
    yield
    for cls in (GPTKitConfig, GPTKitModel, GPTKitForCausalLM, *HEADS):
        delattr(type(transformers), cls.__name__)


def test_importing_the_package_adds_no_attribute_to_transformers() -> None:
    for cls in (GPTKitConfig, GPTKitModel, GPTKitForCausalLM, *HEADS):
        assert not hasattr(transformers, cls.__name__)


@pytest.mark.usefixtures("_in_namespace")
def test_servers_find_the_stored_architecture_in_transformers(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    (architecture,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert getattr(transformers, architecture) is GPTKitForCausalLM


@pytest.mark.usefixtures("_in_namespace")
@pytest.mark.parametrize("cls", [GPTKitConfig, GPTKitModel, GPTKitForCausalLM, *HEADS])
def test_the_classes_are_found_in_every_copy_of_the_module(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers does this to itself while it is imported: what was imported first is then another object.
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    copy = direct_transformers_import(str(Path(transformers.__file__).parent))
    assert copy is not transformers
    assert getattr(transformers, cls.__name__) is getattr(copy, cls.__name__) is cls


class Rows(Dataset[dict[str, Tensor]]):
    """Two rows of ids with their labels."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path: Path) -> None:
    model, smoothing = random_model(), 0.3
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=smoothing, use_cpu=True, report_to=[], disable_tqdm=True
    )
    ids = torch.randint(61, (2, 9))
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(ids))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})

    # Szegedy et al. 2016, section 7: a part of the target's weight is spread evenly over the vocabulary.
    log_probabilities = model(ids).logits[:, :-1].log_softmax(dim=-1)
    of_target = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    expected = (1 - smoothing) * of_target + smoothing * -log_probabilities.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_conversion_rewrites_what_is_saved(tmp_path: Path) -> None:
    assert not get_checkpoint_conversion_mapping(GPTKitConfig.model_type)
    model = random_model()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}


# --- what travels


@pytest.mark.parametrize("part", ["causal", "base"])
def test_a_saved_folder_holds_the_code_and_no_pickle(part: str, tmp_path: Path) -> None:
    model = random_model()
    (model if part == "causal" else model.model).save_pretrained(tmp_path)
    names = names_in(tmp_path)
    assert names >= CODE | {"config.json", "model.safetensors"}
    assert {name for name in names if name.endswith(".py")} == CODE
    assert not {name for name in names if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}}
    for name in CODE:
        ours = Path(gpt_kit_hf.__file__).parent / "model" / name
        assert (tmp_path / name).read_bytes() == ours.read_bytes()


def test_the_remote_code_imports_no_other_file_of_the_package() -> None:
    modeling = Path(gpt_kit_hf.__file__).parent / "model/modeling_gpt_kit.py"
    imported = {modeling.with_name(name) for name in CODE - {modeling.name}}
    # Of a local folder only what the file itself imports is copied: all others must be among that.
    assert sorted(get_relative_imports(modeling)) == sorted(file.stem for file in imported)
    # The scanner reads by regular expression, docstrings and comments too.
    for file in {modeling, *imported}:
        found = {Path(path).name for path in get_relative_import_files(file)}
        assert found <= {other.name for other in imported}
        assert found == set() or file.stem in ("modeling_gpt_kit", "transformer_block")
        assert set(get_imports(file)) <= {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names


STRANGER = """
import importlib.abc, json, math, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gpt_kit_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    import gpt_kit_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is not hidden")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

torch.set_num_threads(1)
ids = load_file("ids.safetensors")["ids"]
results, facts = {}, {}
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        results[folder + ".hidden"] = base(ids).last_hidden_state
        results[folder + ".logits"] = causal(ids).logits
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    std = torch.cat([layer.self_attn.o_proj.weight.flatten() for layer in fresh.model.layers]).std().item()
    facts[folder] = {"std": std, "modules": sorted({type(it).__module__ for it in (config, base, causal)})}
    causal.save_pretrained(folder + "_again")
    # A head that the folder does not hold is new; its class and the rest of the model come from the folder.
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            same = torch.equal(model.model(ids).last_hidden_state, results[folder + ".hidden"])
        facts[folder][auto.__name__] = [type(model).__name__, type(model).__module__.partition(".")[0], same]
save_file(results, "results.safetensors")
with open("facts.json", "w") as file:
    json.dump(facts, file)
"""


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Sums in the order in which the other process, which has one thread, makes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_process_without_the_package_loads_it_as_remote_code(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ids = torch.randint(61, (2, 9))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    models = {kind: random_model(**shape) for kind, shape in SHAPES.items()}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)

    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    (tmp_path / "stranger.py").write_text(STRANGER)
    run = subprocess.run(
        [sys.executable, "-I", "stranger.py", *models],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    results = load_file(tmp_path / "results.safetensors")
    facts = json.loads((tmp_path / "facts.json").read_text())
    for kind, model in models.items():
        assert torch.equal(results[f"{kind}.logits"], model(ids).logits)
        assert torch.equal(results[f"{kind}.hidden"], model.model(ids).last_hidden_state)
        assert all(module.startswith("transformers_modules.") for module in facts[kind]["modules"])
        # 0.02 / sqrt(2 x 2 layers); 2,048 numbers know their spread to 2 percent.
        assert facts[kind]["std"] == pytest.approx(0.01, rel=0.08)
        for head in HEADS:
            found = facts[kind][head.__name__.replace("GPTKit", "AutoModel")]
            assert found == [head.__name__, "transformers_modules", True]
        # What a stranger saves, the next one loads.
        assert names_in(tmp_path / f"{kind}_again") >= CODE
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}_again")
        assert torch.equal(again(ids).logits, model(ids).logits)
