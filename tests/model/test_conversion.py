"""GPT-2 checkpoints in and out, with transformers' GPT-2 and hand-written models as oracles."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written_models import (
    CONTEXT,
    END,
    HEADS,
    IDS,
    LAYERS,
    SHAPE,
    VOCAB,
    WIDTH,
    KitModel,
    NanoModel,
    difference,
    is_tied,
    randomize,
    tiny_gpt2,
    tiny_gpt_kit,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
)

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.model.checkpoints import folders
from gpt_kit_hf.model.checkpoints.conversion import (
    convert_checkpoint,
    load_gpt2_checkpoint,
    save_as_gpt2,
)
from gpt_kit_hf.model.checkpoints.layouts import GPT2_NAMES, rename_tensors
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.tokenization.encodings import get_encoding
from gpt_kit_hf.tokenization.export import save_tokenizer

pytestmark = pytest.mark.usefixtures("logged")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def greedy(model: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(
        IDS[:, :3], attention_mask=torch.ones_like(IDS[:, :3]), max_length=CONTEXT, do_sample=False, pad_token_id=0
    ).tolist()
    return found


# --- GPT-2 in: layouts -----------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors", backend="pread")


def as_saved(folder: Path, model: Any) -> None:
    pass


def without_prefix(folder: Path, model: Any) -> None:
    base: Any = GPT2Model(model.config)
    base.load_state_dict(model.transformer.state_dict())
    base.save_pretrained(folder)


def with_masks(folder: Path, model: Any) -> None:
    tensors = stored_tensors(folder)
    for layer in range(LAYERS):
        mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.bias"] = mask.view(1, 1, CONTEXT, CONTEXT)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


def masks_without_prefix(folder: Path, model: Any) -> None:
    with_masks(folder, model)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored_tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors")


def with_equal_head(folder: Path, model: Any) -> None:
    tensors = stored_tensors(folder)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")


def head_instead_of_embedding(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    save_model(model, str(folder / "model.safetensors"))
    assert "transformer.wte.weight" not in stored_tensors(folder)


def in_shards(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def as_pickle(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_old_pickle(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_pickle_in_shards(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    names = sorted(model.state_dict())
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: model.state_dict()[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def from_a_compiled_model(folder: Path, model: Any) -> None:
    save_file({f"_orig_mod.{name}": t for name, t in stored_tensors(folder).items()}, folder / "model.safetensors")


def from_data_parallel(folder: Path, model: Any) -> None:
    save_file({f"module.{name}": t for name, t in stored_tensors(folder).items()}, folder / "model.safetensors")


def with_no_model_type(folder: Path, model: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "rewrite",
    [
        as_saved,
        without_prefix,
        with_masks,
        masks_without_prefix,
        with_equal_head,
        head_instead_of_embedding,
        in_shards,
        as_pickle,
        as_old_pickle,
        as_pickle_in_shards,
        from_a_compiled_model,
        from_data_parallel,
        with_no_model_type,
    ],
)
def test_every_layout_loads_with_equal_logits(rewrite: Callable[[Path, Any], None], tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, theirs)
    ours = load_gpt2_checkpoint(str(tmp_path))
    assert difference(theirs, ours) <= 1e-5
    assert greedy(theirs) == greedy(ours)
    assert is_tied(ours)
    assert ours.config.tie_word_embeddings
    assert not ours.training


@pytest.mark.parametrize("configured", [False, True])
def test_an_untied_output_projection_stays_untied(configured: bool, tmp_path: Path) -> None:
    theirs = tiny_gpt2(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=configured)
    ours = load_gpt2_checkpoint(tmp_path)
    assert difference(theirs, ours) <= 1e-5
    assert not is_tied(ours)
    assert ours.config.tie_word_embeddings is False


def test_heads_are_compared_across_types(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    tensors = stored_tensors(tmp_path)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].bfloat16()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    assert is_tied(load_gpt2_checkpoint(tmp_path))


def test_the_dtype_is_float32_unless_another_is_given(tmp_path: Path) -> None:
    theirs = tiny_gpt2().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2_checkpoint(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert difference(theirs.float(), ours) <= 1e-5
    half = load_gpt2_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match=r"dtype is torch\.int8; it must be a floating-point type"):
        load_gpt2_checkpoint(tmp_path, dtype=torch.int8)


def test_parameters_have_memory_of_their_own(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    ours = load_gpt2_checkpoint(tmp_path)
    for parameter in ours.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        assert parameter.requires_grad


# --- GPT-2 in: configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_every_field_of_the_configuration_arrives(activation: str, tmp_path: Path) -> None:
    fields = {
        "n_inner": 20,
        "layer_norm_epsilon": 0.03,
        "resid_pdrop": 0.11,
        "embd_pdrop": 0.12,
        "attn_pdrop": 0.13,
        "initializer_range": 0.04,
        "use_cache": False,
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "pad_token_id": 8,
    }
    theirs = tiny_gpt2(activation_function=activation, **fields)
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2_checkpoint(tmp_path)
    assert difference(theirs, ours) <= 1e-5
    config = ours.config.to_dict()
    assert {name: config[name] for name in fields} == fields
    assert (config["hidden_act"], config["max_position_embeddings"]) == (activation, CONTEXT)
    assert {name: config[name] for name in SHAPE} == SHAPE


def test_ids_that_are_none_stay_none(tmp_path: Path) -> None:
    tiny_gpt2(bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    ours = load_gpt2_checkpoint(tmp_path)
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (None, None)
    save_as_gpt2(ours, tmp_path / "back")
    theirs: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, None)


def test_the_generation_configuration_is_kept(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.generation_config = GenerationConfig(eos_token_id=[2, END], do_sample=True, top_k=7, max_new_tokens=3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_gpt2_checkpoint(tmp_path / "theirs")
    assert ours.generation_config.to_diff_dict() == theirs.generation_config.to_diff_dict()
    save_as_gpt2(ours, tmp_path / "back")
    back: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert back.generation_config.to_diff_dict() == theirs.generation_config.to_diff_dict()


def test_old_folders_keep_generation_settings_in_the_configuration(tmp_path: Path) -> None:
    tiny_gpt2(eos_token_id=4).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, do_sample=True, top_k=7, task_specific_params={"text-generation": {"max_length": 50}})
    theirs: Any = GPT2LMHeadModel.from_pretrained(tmp_path)
    ours = load_gpt2_checkpoint(tmp_path)
    assert ours.generation_config.to_diff_dict() == theirs.generation_config.to_diff_dict()
    assert (ours.generation_config.eos_token_id, ours.generation_config.top_k) == (4, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation_function": "relu"},
            "activation_function='relu' is not supported; it must be one of gelu, gelu_n",
        ),
        ({"activation_function": "gelu_fast"}, "activation_function='gelu_fast' is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported; it must be True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True is not supported; it must be False"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported; it must be False"),
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'gpt2'"),
        ({"model_type": "gpt_kit"}, "it must be 'gpt2'; to write it as GPT-2, give layout to-gpt2"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
        ({"n_layer": "two"}, "n_layer"),
        ({"n_head": 5}, "n_embd must be divisible by n_head, got 12 and 5"),
        ({"n_embd": 24}, "has shape"),
    ],
)
def test_a_configuration_that_the_model_cannot_compute(changes: Any, message: str, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        load_gpt2_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_json_is_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text('{"n_embd": 12')
        with pytest.raises(CheckpointError, match=f"{name}: not valid JSON"):
            load_gpt2_checkpoint(tmp_path)


# --- GPT-2 in: what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"rate.weight": torch.ones(2, 2)}),
            "tensors that the layout does not have: rate.weight",
        ),
        (lambda t: t.update({f"z.{i}": torch.ones(1) for i in range(5)}), "have: z.0, z.1, z.2 and 2 more"),
        (
            lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(WIDTH)}),
            "tensors that the model does not have: model.layers.2.input_layernorm.bias",
        ),
        (
            lambda t: t.pop("transformer.h.1.ln_1.bias"),
            "lacks tensors of the model: model.layers.1.input_layernorm.bia",
        ),
        (lambda t: t.pop("transformer.wte.weight"), "lacks tensors of the model: model.embed_tokens.weight"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(CONTEXT + 1, WIDTH)}),
            "model.embed_positions.weight has shape (13, 12), the model (12, 12)",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.bias": torch.ones(3 * WIDTH + 1)}),
            "transformer.h.0.attn.c_attn.bias cannot be split into 3 equal parts: its shape is (37,)",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.ones(3 * WIDTH)}),
            "transformer.h.0.attn.c_attn.weight cannot be transposed: its shape is (36,)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(WIDTH, dtype=torch.int8)}),
            "model.norm.bias is a Tensor of torch.int8 on cpu; a weight must be a plain floating-point tensor",
        ),
        (
            lambda t: t.update({"transformer._orig_mod.ln_f.bias": torch.ones(WIDTH)}),
            "holds a tensor twice, with and without '_orig_mod.' in its name",
        ),
    ],
)
def test_tensors_too_many_too_few_or_wrong(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    tensors = stored_tensors(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        load_gpt2_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_untied_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    without_prefix(tmp_path, tiny_gpt2(tie_word_embeddings=False))
    with pytest.raises(UsageError, match=r"lacks tensors of the model: lm_head\.weight"):
        load_gpt2_checkpoint(tmp_path)


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load_gpt2_checkpoint(tmp_path)
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    with pytest.raises(UsageError, match=r"holds no weights: neither model\.safetensors nor pytorch_model\.bin"):
        load_gpt2_checkpoint(tmp_path)
    for place in (tmp_path / "config.json", str(tmp_path / "config.json"), tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(UsageError, match="is no folder"):
            load_gpt2_checkpoint(place)


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "{folder}/model.safetensors", "sub/model.safetensors", ".."]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_cannot_point_out_of_its_folder(index: str, outside: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "model", tmp_path / "model" / "sub"):
        tiny_gpt2().save_pretrained(place)
    (tmp_path / "model" / "model.safetensors").unlink()
    names = {"transformer.wte.weight": outside.format(folder=tmp_path)}
    (tmp_path / "model" / index).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match="a shard must lie beside its index"):
        load_gpt2_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("held", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(held: Any, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(held))
    with pytest.raises(UsageError, match="holds no weight_map of file names"):
        load_gpt2_checkpoint(tmp_path)


def test_shards_that_are_missing_or_overlap_are_refused(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    in_shards(tmp_path, theirs)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    held = load_file(first, backend="pread")
    save_file({**held, **load_file(second, backend="pread")}, first)
    with pytest.raises(UsageError, match=r"which another shard holds, too"):
        load_gpt2_checkpoint(tmp_path)
    first.unlink()
    with pytest.raises(UsageError, match="does not exist"):
        load_gpt2_checkpoint(tmp_path)


class Harmful:
    """Makes a folder when a pickle that holds it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_that_would_run_code_is_refused_unread(plain: bool, tmp_path: Path) -> None:
    theirs, mark = tiny_gpt2(), tmp_path / "mark"
    theirs.save_pretrained(tmp_path)
    as_pickle(tmp_path, theirs)
    content = {**theirs.state_dict(), "transformer.harm": Harmful(mark)}
    weights = tmp_path / "pytorch_model.bin"
    if plain:
        weights.write_bytes(pickle.dumps(Harmful(mark), protocol=2))
    else:
        torch.save(content, weights)
    with pytest.raises(UsageError, match=r"is refused: it holds Python objects beside tensors \(posix\.mkdir\)"):
        load_gpt2_checkpoint(tmp_path)
    assert not mark.exists()
    if plain:  # the danger is real
        pickle.loads(weights.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello, world" * 20, b"PK\x03\x04 cut"])
def test_a_damaged_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    as_pickle(tmp_path, theirs)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UsageError, match=r"is no readable torch file|is refused"):
        load_gpt2_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; it must hold a state dict"),
        ({"transformer.wte.weight": 3}, "'transformer.wte.weight' is a int; a state dict holds tensors by name"),
        ({3: torch.ones(1)}, "3 is a Tensor; a state dict holds tensors by name"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    as_pickle(tmp_path, theirs)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError) as caught:
        load_gpt2_checkpoint(tmp_path)
    assert message in str(caught.value)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load_gpt2_checkpoint(tmp_path)


# --- GPT-2 in: the Hub -----------------------------------------------------------------------------------


class FakeHub:
    """Stands in for `snapshot_download`: copies from a folder what the patterns allow, and remembers it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[set[str]] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        names = [path.name for path in self.repository.iterdir()]
        wanted = set(filter_repo_objects(names, allow_patterns=allow_patterns))
        self.fetched.append(wanted)
        self.cache.mkdir(exist_ok=True)
        for name in wanted:
            shutil.copyfile(self.repository / name, self.cache / name)
        return str(self.cache)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_only_the_files_that_are_needed_are_fetched(
    sharded: bool, pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, repository = tiny_gpt2(), tmp_path / "repository"
    theirs.save_pretrained(repository)
    if sharded and not pickled:
        in_shards(repository, theirs)
    if pickled:
        (as_pickle_in_shards if sharded else as_pickle)(repository, theirs)
    else:
        (repository / "pytorch_model.bin").write_text("the same weights once more")
    (repository / "training_args.bin").write_text("")
    (repository / "README.md").write_text("")
    hub = FakeHub(repository, tmp_path / "cache")
    monkeypatch.setattr(folders, "snapshot_download", hub)
    assert difference(theirs, load_gpt2_checkpoint("someone/some-gpt2")) <= 1e-5
    fetched = set.union(*hub.fetched)
    assert not fetched & {"training_args.bin", "README.md"}
    assert ("pytorch_model.bin" in fetched) is (pickled and not sharded)


def test_a_repository_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="'no-one/none': no such local folder; the Hub cannot be reached"):
        load_gpt2_checkpoint("no-one/none")
    with pytest.raises(UsageError, match="'no one': Repo id must use alphanumeric chars"):
        load_gpt2_checkpoint("no one")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no such repository on the Hub, or no access to it"),
        ("LocalEntryNotFoundError", "the Hub cannot be reached, and its cache does not hold the repository"),
        ("DisabledRepoError", "403: the repository is disabled"),
    ],
)
def test_errors_of_the_hub_are_one_line(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.errors

    error = getattr(huggingface_hub.errors, kind)

    def fail(*arguments: Any, **options: Any) -> str:
        # Their constructor wants the response of an HTTP library, which one depends on the version.
        made = error.__new__(error)
        made.args = ("403:\n\nthe repository is disabled",)
        raise made

    monkeypatch.setattr(folders, "snapshot_download", fail)
    with pytest.raises(UsageError) as caught:
        load_gpt2_checkpoint("someone/some-gpt2")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- there and back --------------------------------------------------------------------------------------


# Layers and heads of the published sizes, the layers by four; two numbers a head.
@pytest.mark.parametrize(("layers", "heads"), [(3, 12), (6, 16), (9, 20), (12, 25)])
def test_round_trip_of_every_size_class(layers: int, heads: int, tmp_path: Path) -> None:
    first = tiny_gpt2(n_layer=layers, n_head=heads, n_embd=2 * heads)
    first.save_pretrained(tmp_path / "first")
    ours = load_gpt2_checkpoint(tmp_path / "first")
    save_as_gpt2(ours, tmp_path / "second")
    second, report = GPT2LMHeadModel.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(report.values())
    assert difference(first, ours) <= 1e-5
    assert difference(first, second) <= 1e-5
    assert greedy(first) == greedy(ours) == greedy(second)
    assert is_tied(ours)
    assert is_tied(second)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    # Nothing of the configuration is lost either.
    assert second.config.to_diff_dict() == first.config.to_diff_dict() | {"dtype": "float32"}


@pytest.mark.parametrize(("layers", "width", "heads"), [(12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)])
def test_names_and_shapes_of_the_real_sizes(layers: int, width: int, heads: int) -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
        ours = GPTKitForCausalLM(GPTKitConfig(n_layer=layers, n_embd=width, n_head=heads))
    renamed = rename_tensors(theirs.state_dict(), GPT2_NAMES, "gpt2")
    expected = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed.items()} == expected


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_new"},
        {"position_embedding": "sinusoidal"},
        {"use_bias": False},
        {"tie_word_embeddings": False},
        {"n_inner": 20, "layer_norm_epsilon": 0.03, "attn_pdrop": 0.1, "use_cache": False, "eos_token_id": [1, 2]},
        {"position_embedding": "sinusoidal", "use_bias": False, "tie_word_embeddings": False},
    ],
)
def test_features_that_gpt2_lacks_are_stored_as_tensors(options: Any, tmp_path: Path) -> None:
    ours = tiny_gpt_kit(**options)
    save_as_gpt2(ours, tmp_path / "gpt2")
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2", output_loading_info=True)
    assert not any(report.values())
    assert difference(ours, theirs) <= 1e-5
    assert greedy(ours) == greedy(theirs)
    assert is_tied(theirs) is ours.config.tie_word_embeddings
    for name in set(options) - {"hidden_act", "position_embedding", "use_bias"}:
        assert getattr(theirs.config, name) == options[name]
    assert difference(ours, load_gpt2_checkpoint(tmp_path / "gpt2")) <= 1e-5


def test_the_folder_is_one_that_every_reader_of_gpt2_knows(tmp_path: Path) -> None:
    save_as_gpt2(tiny_gpt_kit(eos_token_id=4), tmp_path / "new" / "gpt2")
    folder = tmp_path / "new" / "gpt2"
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_inner": None,
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert "auto_map" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 4
    assert {name for name in stored_tensors(folder) if "h.1." not in name and "h.0." not in name} == {
        *("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")
    }
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GPT2LMHeadModel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = tiny_gpt_kit(position_embedding="sinusoidal").to(dtype)
    save_as_gpt2(ours, tmp_path / "gpt2")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "gpt2").values()} == {dtype}
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert difference(ours.float(), theirs.float()) <= 1e-5


def test_mixed_dtypes_lose_nothing(tmp_path: Path) -> None:
    ours = tiny_gpt_kit().to(torch.bfloat16)
    ours.model.norm.float()
    with torch.no_grad():
        ours.model.norm.weight.fill_(1 / 3)
    save_as_gpt2(ours, tmp_path / "gpt2")
    assert torch.equal(stored_tensors(tmp_path / "gpt2")["transformer.ln_f.weight"], ours.model.norm.weight)


def test_an_output_projection_that_was_untied_later_is_written(tmp_path: Path) -> None:
    ours = tiny_gpt_kit()
    ours.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH))
    save_as_gpt2(ours, tmp_path / "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert difference(ours, theirs) <= 1e-5
    assert not is_tied(theirs)
    assert ours.config.tie_word_embeddings  # what is saved is decided without touching the model


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    ours = tiny_gpt_kit(use_bias=False)
    config, tensors = ours.config.to_dict(), {name: t.clone() for name, t in ours.state_dict().items()}
    save_as_gpt2(ours, tmp_path / "gpt2")
    assert ours.config.to_dict() == config
    assert ours.state_dict().keys() == tensors.keys()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_only_a_whole_model_of_this_package_is_saved(tmp_path: Path, logged: list[str]) -> None:
    target = tmp_path / "gpt2"
    with pytest.raises(UsageError, match="model is a GPT2LMHeadModel; it must be a GPTKitForCausalLM"):
        save_as_gpt2(tiny_gpt2(), target)
    adapted = tiny_gpt_kit()
    adapted.model.layers[0].self_attn.q_proj = nn.Sequential(OrderedDict(base_layer=nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(UsageError, match=r"does not have: model\.layers\.0\.self_attn\.q_proj\.base_layer\.bias"):
        save_as_gpt2(adapted, target)
    with pytest.raises(
        UsageError, match=r"is a Tensor of torch\.float32 on meta; a weight must be a plain floating-point tensor"
    ):
        save_as_gpt2(tiny_gpt_kit(tie_word_embeddings=False).to("meta"), target)
    invalid = tiny_gpt_kit()
    invalid.generation_config = GenerationConfig(temperature=0.5)
    with pytest.raises(UsageError, match=r"model: .*temperature"):
        save_as_gpt2(invalid, target)
    assert "generation flags are not valid" in logged.pop()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    ours = tiny_gpt_kit()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(UsageError, match="is not an empty folder; nothing is overwritten"):
            save_as_gpt2(ours, tmp_path / place)
        with pytest.raises(UsageError, match="is not an empty folder; nothing is overwritten"):
            convert_checkpoint(tmp_path, tmp_path / place, "gpt2")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_as_gpt2(ours, tmp_path / "empty")
    assert difference(ours, GPT2LMHeadModel.from_pretrained(tmp_path / "empty")) <= 1e-5
    with pytest.raises(UsageError, match=r"cannot be written: .* is a file, not a folder"):
        save_as_gpt2(ours, tmp_path / "file" / "below")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="was not written: no space left on device"):
        save_as_gpt2(tiny_gpt_kit(), tmp_path / "gpt2")
    assert list(tmp_path.iterdir()) == []


# --- tokenizers ------------------------------------------------------------------------------------------

TEXT = "Größe, naïve 北京  \n\tcats' <|endoftext|> 12345"


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    encoding = get_encoding("bytes")
    save_tokenizer(encoding, tmp_path / "tokenizer", model_max_length=99)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "tokenizer" / "optimizer.safetensors").write_text("")
    save_as_gpt2(tiny_gpt_kit(vocab_size=257), tmp_path / "gpt2", tokenizer_folder=tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert tokenizer(TEXT)["input_ids"] == encoding.encode(TEXT, allowed_special="all")
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 99)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert not (tmp_path / "gpt2" / "optimizer.safetensors").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_tokenizer(get_encoding("bytes"), tmp_path / "tokenizer")
    target = tmp_path / "gpt2"
    with pytest.raises(UsageError, match="has the id 256, the model vocab_size=256"):
        save_as_gpt2(tiny_gpt_kit(vocab_size=256), target, tokenizer_folder=tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="cannot be read"):
        save_as_gpt2(tiny_gpt_kit(vocab_size=257), target, tokenizer_folder=tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be read"):
        save_as_gpt2(tiny_gpt_kit(vocab_size=257), target, tokenizer_folder=tmp_path / "tokenizer")
    assert not target.exists()


@pytest.mark.parametrize("described", [True, False])
def test_gpt2_tokenizers_are_read_without_gpt2s_model_type(described: bool, tmp_path: Path) -> None:
    theirs = tiny_gpt2(vocab_size=257)
    theirs.save_pretrained(tmp_path / "gpt2")
    encoding = get_encoding("bytes")
    save_tokenizer(encoding, tmp_path / "exported")
    vocab = json.loads((tmp_path / "exported" / "tokenizer.json").read_text())["model"]["vocab"]
    GPT2Tokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path / "gpt2")
    if not described:  # as in the published repository
        (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    convert_checkpoint(tmp_path / "gpt2", tmp_path / "ours", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer(TEXT)["input_ids"] == encoding.encode(TEXT, allowed_special="all")
    assert tokenizer.eos_token_id == 256


# --- from file to folder ---------------------------------------------------------------------------------


def nano_checkpoint(nano: NanoModel, *, prefix: str = "_orig_mod.", **changes: Any) -> dict[str, Any]:
    """What nanoGPT's training script stores."""
    arguments = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "block_size": CONTEXT,
        "bias": nano.lm_head.weight is not None and nano.transformer["ln_f"].bias is not None,
        "vocab_size": VOCAB,
        "dropout": 0.125,
    }
    state = {f"{prefix}{name}": tensor for name, tensor in nano.state_dict().items()}
    beside = {"iter_num": 3, "best_val_loss": torch.tensor(1.0), "config": {"out_dir": "out", "compile": True}}
    return {"model": state, "model_args": {**arguments, **changes}, "optimizer": {"state": {}}, **beside}


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_own_file_needs_no_arguments(bias: bool, tmp_path: Path) -> None:
    nano = randomize(NanoModel(bias))
    torch.save(nano_checkpoint(nano), tmp_path / "ckpt.pt")
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "ours", "nanogpt", eos_token_id=END)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(ours, GPTKitForCausalLM)
    assert (tmp_path / "ours" / "modeling_gpt_kit.py").is_file()
    assert difference(nano, ours) <= 1e-5
    assert is_tied(ours)
    assert (ours.config.attn_pdrop, ours.config.embd_pdrop, ours.config.resid_pdrop) == (0.125, 0.125, 0.125)
    assert (ours.config.use_bias, ours.config.hidden_act) == (bias, "gelu")
    assert ours.generation_config.eos_token_id == END


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_kit_files_need_the_number_of_heads(wrapper: str | None, qkv_bias: bool, tmp_path: Path) -> None:
    kit, file = randomize(KitModel(qkv_bias)), tmp_path / "kit.pth"
    state = kit.state_dict()
    torch.save({wrapper: state, "optimizer_state_dict": {}} if wrapper else state, file)
    with pytest.raises(UsageError, match="n_head must be given; it cannot be inferred from shapes"):
        convert_checkpoint(file, tmp_path / "ours", "kit")
    convert_checkpoint(file, tmp_path / "ours", "kit", n_head=HEADS)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(kit, ours) <= 1e-5
    assert not is_tied(ours)


def test_safetensors_files_and_the_other_gelu(tmp_path: Path) -> None:
    nano, file = randomize(NanoModel()), tmp_path / "nano.safetensors"
    save_model(nano, str(file))  # it keeps one of the two tied names
    convert_checkpoint(file, tmp_path / "exact", "nanogpt", n_head=HEADS)
    convert_checkpoint(file, tmp_path / "tanh", "nanogpt", n_head=HEADS, hidden_act="gelu_new")
    exact, tanh = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exact", "tanh"))
    assert difference(nano, exact) <= 1e-5
    assert is_tied(exact)
    assert difference(nano, tanh) > 1e-5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"n_layer": 3}, {}, "model_args says n_layer=3, the tensors or arguments say 2"),
        ({"block_size": 64}, {}, "model_args says block_size=64, the tensors or arguments say 12"),
        ({}, {"n_head": 4}, "model_args says n_head=3, the tensors or arguments say 4"),
        ({"use_relu": True}, {}, "model_args holds 'use_relu', which nanoGPT does not have"),
        ({"n_head": 5}, {}, "n_embd must be divisible by n_head, got 12 and 5"),
        ({"dropout": 2.0}, {}, "embd_pdrop must be at least 0 and below 1, got 2.0"),
        ({}, {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_arguments_that_do_not_fit_the_tensors(changes: Any, options: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    torch.save(nano_checkpoint(randomize(NanoModel()), **changes), file)
    with pytest.raises(UsageError) as caught:
        convert_checkpoint(file, tmp_path / "ours", "nanogpt", **options)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_files_that_do_not_hold_the_layout(tmp_path: Path) -> None:
    torch.save(randomize(KitModel()).state_dict(), tmp_path / "kit.pt")
    with pytest.raises(UsageError, match="tensors that the layout does not have: they are those of the layout kit"):
        convert_checkpoint(tmp_path / "kit.pt", tmp_path / "ours", "nanogpt", n_head=HEADS)
    torch.save({"tok_emb.weight": torch.ones(3), "pos_emb.weight": torch.ones(2, 2)}, tmp_path / "part.pt")
    missing = r"lacks matrices of the layout: model\.embed_tokens\.weight, model\.layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(UsageError, match=missing):
        convert_checkpoint(tmp_path / "part.pt", tmp_path / "ours", "kit", n_head=HEADS)
    torch.save({"model": {}, "model_args": [1]}, tmp_path / "list.pt")
    with pytest.raises(UsageError, match="model_args is a list; it must be a mapping"):
        convert_checkpoint(tmp_path / "list.pt", tmp_path / "ours", "nanogpt")
    with pytest.raises(UsageError, match=r"none\.pt' does not exist$"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "ours", "kit", n_head=HEADS)
    for place in (tmp_path, tmp_path / "kit.txt"):
        with pytest.raises(UsageError, match="is no file of weights"):
            convert_checkpoint(place, tmp_path / "ours", "kit", n_head=HEADS)
    torch.save({"model": {"x": Harmful(tmp_path / "mark")}}, tmp_path / "harm.pt")
    with pytest.raises(UsageError, match="is refused"):
        convert_checkpoint(tmp_path / "harm.pt", tmp_path / "ours", "nanogpt")
    assert not (tmp_path / "mark").exists()


def test_a_folder_there_and_back(tmp_path: Path) -> None:
    theirs = tiny_gpt2(vocab_size=257)
    theirs.save_pretrained(tmp_path / "gpt2")
    encoding = get_encoding("bytes")
    save_tokenizer(encoding, tmp_path / "gpt2")
    convert_checkpoint(tmp_path / "gpt2", tmp_path / "ours", "gpt2")
    convert_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), "to-gpt2")
    for name, kind in (("ours", GPTKitForCausalLM), ("back", GPT2LMHeadModel)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(model, kind)
        assert difference(theirs, model) <= 1e-5
        assert AutoTokenizer.from_pretrained(tmp_path / name)(TEXT)["input_ids"] == encoding.encode(
            TEXT, allowed_special="all"
        )


def test_another_tokenizer_takes_the_place_of_the_sources(tmp_path: Path) -> None:
    tiny_gpt_kit(vocab_size=300).save_pretrained(tmp_path / "ours")
    save_tokenizer(get_encoding("bytes"), tmp_path / "other")
    convert_checkpoint(tmp_path / "ours", tmp_path / "without", "to-gpt2")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    convert_checkpoint(tmp_path / "ours", tmp_path / "with", "to-gpt2", tokenizer_folder=tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "with")("ab")["input_ids"] == [97, 98]


def test_layouts_and_options_that_do_not_go_together(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(UsageError, match=r"unknown layout 'gpt3'; did you mean 'gpt2'"):
        convert_checkpoint(tmp_path, target, "gpt3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="n_head, lora_scaling: for a file of weights only; a folder has a config"):
        convert_checkpoint(tmp_path, target, "gpt2", n_head=2, lora_scaling=2.0)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="is no model folder of this package"):
        convert_checkpoint(tmp_path / "gpt2", target, "to-gpt2")
    with pytest.raises(UsageError, match="is no model folder of this package"):
        convert_checkpoint(tmp_path, target, "to-gpt2")


def test_a_folder_of_ours_that_is_not_whole_is_refused(tmp_path: Path, logged: list[str]) -> None:
    tiny_gpt_kit().save_pretrained(tmp_path / "ours")
    whole, weights = stored_tensors(tmp_path / "ours"), tmp_path / "ours" / "model.safetensors"
    save_file({name: tensor for name, tensor in whole.items() if name != "model.norm.bias"}, weights)
    with pytest.raises(UsageError, match=r"lacks tensors of the model: model\.norm\.bias"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "gpt2", "to-gpt2")
    save_file({**whole, "model.extra": torch.ones(1)}, weights)
    with pytest.raises(UsageError, match=r"holds tensors that the model does not have: model\.extra"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "gpt2", "to-gpt2")
    assert ["LOAD REPORT" in logged.pop() for _ in range(2)] == [True, True]
    weights.unlink()
    with pytest.raises(UsageError, match="cannot be loaded"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "gpt2", "to-gpt2")
