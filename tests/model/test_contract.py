"""What transformers, and the tools around it, read off a model: settings, plans, flags and what is passed on."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from children import start_child
from safetensors.torch import load_file, save_file
from shapes import MODERN, both_shapes
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.modeling_utils import AttentionInterface

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM, GPTKitModel
from gpt_kit_hf.model import modeling_gpt_kit
from gpt_kit_hf.model.losses import _packing_on_device

VOCAB, WIDTH, LAYERS = 62, 32, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "max_position_embeddings": 32,
}


def random_model(attention: str = "sdpa", **overrides: Any) -> GPTKitForCausalLM:
    model = GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, **overrides}))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval()
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


# --- configuration files


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    """Read a config.json that holds these keys and no others."""

    def load(**stored: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_kit", **stored}))
        return AutoConfig.from_pretrained(tmp_path)

    return load


# Two names that are not ours, and the name in the file that has the same value.
LOOK_ALIKES = [
    ("norm_epsilon", 1e-3, "layer_norm_epsilon"),
    ("norm_epsilon", 1e-3, "layer_norm_eps"),
    ("n_position", 16, "n_positions"),
    ("n_position", 16, "max_position_embeddings"),
    ("n_heads", 2, "n_head"),
    ("n_heads", 2, "num_attention_heads"),
]


@pytest.mark.parametrize(("name", "value", "beside"), LOOK_ALIKES)
def test_a_key_of_another_tool_that_repeats_a_field_is_kept(
    name: str, value: Any, beside: str, read: Callable[..., Any], tmp_path: Path
) -> None:
    config = read(**{beside: value, name: value})
    field = GPTKitConfig.attribute_map.get(beside, beside)
    assert getattr(config, name) == getattr(config, field) == value != getattr(GPTKitConfig(), field)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[name] == value


@pytest.mark.parametrize(("name", "value", "beside"), LOOK_ALIKES)
def test_a_key_that_resembles_a_field_with_another_value_is_refused(
    name: str, value: Any, beside: str, read: Callable[..., Any]
) -> None:
    for stored in ({name: value}, {beside: value, name: value * 2}):
        with pytest.raises(ValueError, match=f"unknown config field '{name}'; did you mean '"):
            read(**stored)


FRACTIONS = ["embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range"]


def test_every_fraction_is_covered_here() -> None:
    assert {name for name, value in GPTKitConfig().to_dict().items() if type(value) is float} == set(FRACTIONS)


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_fraction_may_be_written_as_a_whole_number(name: str, read: Callable[..., Any]) -> None:
    # JSON written by hand or by JavaScript has 0 and 1 where Python writes 0.0 and 1.0.
    whole = 0 if name.endswith("pdrop") else 1
    assert getattr(read(**{name: whole}), name) == whole


def test_the_older_name_of_the_dtype_still_counts(read: Callable[..., Any], tmp_path: Path) -> None:
    assert read(torch_dtype="bfloat16", **SHAPE).dtype == torch.bfloat16
    random_model().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["dtype"], "torch_dtype" in stored) == ("float32", False)


def test_a_configuration_saved_alone_brings_its_code(tmp_path: Path) -> None:
    GPTKitConfig(**SHAPE).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    module, _, name = stored["auto_map"]["AutoConfig"].partition(".")
    assert name == GPTKitConfig.__name__
    assert (tmp_path / f"{module}.py").read_bytes() == Path(inspect.getfile(GPTKitConfig)).read_bytes()


# --- weights


def test_weights_in_a_partial_checkpoint_are_not_initialised_again(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    stored = {
        name: weights for name, weights in load_file(tmp_path / "model.safetensors").items() if "bias" not in name
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = GPTKitForCausalLM.from_pretrained(tmp_path).state_dict()
    assert [name for name in loaded if name.endswith("o_proj.bias")]
    for name, weights in loaded.items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(weights, stored.get(name, torch.zeros_like(weights))), name


# --- what the classes declare


def test_every_kind_of_attention_is_offered() -> None:
    with pytest.raises(ValueError, match="The only possible arguments are") as error:
        random_model().set_attn_implementation("unheard of")
    for name in ("eager", "sdpa", "flex_attention", "flash_attention_2"):
        assert name in str(error.value)


@pytest.mark.parametrize("cls", [GPTKitModel, GPTKitForCausalLM])
def test_servers_and_exporters_are_told_what_holds(cls: type[PreTrainedModel]) -> None:
    # Servers refuse a model without these flags, and the common model tests skip their compilation tests.
    assert cls.is_backend_compatible()
    assert cls._can_compile_fullgraph


def test_nothing_that_transformers_removed_is_used() -> None:
    layers = (modeling_gpt_kit.TransformerBlock, modeling_gpt_kit.MultiHeadAttention)
    for cls in (GPTKitModel, GPTKitForCausalLM, *layers):
        assert not {"cache_position", "head_mask"} & set(inspect.signature(cls.forward).parameters)
        for name in ("_supports_static_cache", "_supports_cache_class", "_supports_flash_attn_2"):
            assert not hasattr(cls, name)
    assert isinstance(random_model()(random_ids(1, 3)).past_key_values, Cache)


# Qwen3 has all that this model has, under the same names.
PLANS = ["base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"]


@pytest.mark.parametrize("plan", PLANS)
@both_shapes
def test_the_plans_are_those_of_qwen3_for_the_modules_that_both_have(plan: str, shape: dict[str, Any]) -> None:
    model = random_model(**shape)
    names = [name for name, _ in model.model.named_modules()]
    theirs = {
        name: style for name, style in getattr(Qwen3Config, plan).items() if any(fnmatch(n, name) for n in names)
    }
    assert theirs
    assert getattr(model.config, plan) == theirs


@pytest.mark.parametrize("plan", ["_tp_plan", "_pp_plan", "_fsdp_plan"])
def test_the_plans_of_the_head_are_those_of_llama(plan: str) -> None:
    assert getattr(GPTKitForCausalLM, plan) == getattr(LlamaForCausalLM, plan) != {}
    # What a distributed run reads is the whole of it, each name with its prefix.
    model = random_model()
    prefixed = {f"model.{name}" for name in getattr(model.config, f"base_model{plan}")}
    assert set(getattr(model, plan)) >= {"lm_head"} | prefixed


# --- caches


@pytest.mark.parametrize("wanted", [True, False])
def test_the_configuration_says_whether_there_is_a_cache(wanted: bool) -> None:
    model, ids = random_model(use_cache=wanted), random_ids(2, 5)
    for part in (model, model.model):
        assert (part(ids).past_key_values is not None) == wanted
        assert (part(ids, use_cache=not wanted).past_key_values is not None) != wanted


def test_there_is_no_cache_where_activations_are_computed_twice() -> None:
    # A layer that runs once more for the backward would write its keys once more.
    model = random_model().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert model(random_ids(2, 5)).past_key_values is None
    assert model.eval()(random_ids(2, 5)).past_key_values.get_seq_length() == 5


def test_the_default_cache_is_made_for_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    # The layers of a cache that is told the configuration are of the kinds named there; else all are full attention.
    made: list[Any] = []

    def record(config: Any = None) -> DynamicCache:
        made.append(config)
        return DynamicCache(config=config)

    monkeypatch.setattr(modeling_gpt_kit, "DynamicCache", record)
    model = random_model()
    model(random_ids(1, 5))
    assert made == [model.config]


# --- attention functions of one's own


def attention_by_lengths(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What FlashAttention does with lengths: the rows laid end to end, and each document by itself."""
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
    key, value = (it.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for it in (key, value))
    # (B, H, T, Dh) -> (H, B * T, Dh)
    flat_query, flat_key, flat_value = (it.transpose(0, 1).flatten(1, 2) for it in (query, key, value))
    documents = []
    for start, stop in zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False):
        here = slice(start, stop)
        scores = flat_query[:, here] @ flat_key[:, here].transpose(1, 2) * scaling
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        documents.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ flat_value[:, here])
    # (H, B * T, Dh) -> (B, T, H, Dh)
    together = torch.cat(documents, dim=1)
    return together.view(query.shape[1], query.shape[0], *query.shape[2:]).permute(1, 2, 0, 3), None


@pytest.mark.parametrize("given", [True, False])
@both_shapes
def test_lengths_of_documents_keep_the_rows_of_a_packed_batch_apart(given: bool, shape: dict[str, Any]) -> None:
    lengths = [(4, 8), (7, 5)]  # of two documents in each of two rows
    rows = [[random_ids(length) for length in row] for row in lengths]
    bounds = torch.tensor([0, 4, 12, 19, 24], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    AttentionInterface.register("flash_by_lengths", attention_by_lengths)
    try:
        model = random_model(**shape)
        model.config._attn_implementation = "flash_by_lengths"  # the setter looks for a library of this name
        logits = model(
            torch.stack([torch.cat(row) for row in rows]),
            position_ids=torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths]),
            **(told if given else {}),
        ).logits
    finally:
        AttentionInterface._global_mapping.pop("flash_by_lengths")
    model.set_attn_implementation("eager")
    alone = [torch.cat([model(document[None]).logits[0] for document in row]) for row in rows]
    assert torch.allclose(logits, torch.stack(alone), atol=1e-4)


@pytest.mark.parametrize("given", [True, False])
@both_shapes
def test_torchs_kernel_for_lengths_takes_the_place_of_sdpa(
    given: bool, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself is for GPUs: here it is torch's attention, document by document."""

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *others: Any, **options: Any) -> Tensor:
        assert options.pop("window_size") == (-1, 0)
        assert others[1] == others[2] >= int(bounds.diff().max())
        outputs = []
        for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            document = [tensor[start:stop].transpose(0, 1) for tensor in (query, key, value)]
            outputs.append(nn.functional.scaled_dot_product_attention(*document, is_causal=True, **options))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = random_model(**shape)
    rows = [[random_ids(length) for length in row] for row in [(4, 8), (7, 5)]]
    alone = [torch.cat([model(document[None]).logits[0] for document in row]) for row in rows]
    monkeypatch.setattr(modeling_gpt_kit, "attends_by_lengths", lambda *_, **__: True)
    bounds = torch.tensor([0, 4, 12, 19, 24], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    with monkeypatch.context() as patch:
        patch.setattr(modeling_gpt_kit, "document_mask", None)  # no mask is built
        logits = model(
            torch.stack([torch.cat(row) for row in rows]),
            position_ids=torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows]),
            **(told if given else {}),
        ).logits
    assert torch.allclose(logits, torch.stack(alone), atol=1e-4)


def test_lengths_are_found_on_the_cpu_before_a_batch_is_sent_to_a_gpu() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    told = _packing_on_device(packed, torch.device("cpu"))
    assert told["cu_seq_lens_q"].tolist() == [0, 3, 5, 9, 10]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == 5
    assert torch.equal(told["position_ids"], packed)
    assert _packing_on_device(torch.arange(5).expand(2, -1), torch.device("cpu")) == {}


# --- several devices, several processes


@torch.no_grad()
@both_shapes
def test_no_block_is_cut_in_two_where_memory_is_short(tmp_path: Path, shape: dict[str, Any]) -> None:
    model, ids = random_model(**shape), random_ids(2, 5)
    model.save_pretrained(tmp_path)
    for share in (0.6, 0.7, 0.8, 0.9):
        room = int(model.get_memory_footprint() * share)
        split = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map="sequential", max_memory={"cpu": room}, offload_folder=tmp_path / "offloaded"
        )
        places = {name: place for name, place in split.hf_device_map.items() if name.startswith("model.layers.")}
        assert set(places) == {f"model.layers.{index}" for index in range(LAYERS)}
        assert set(places.values()) == {"cpu", "disk"}
        assert torch.equal(split(ids).logits, model(ids).logits)


def on_two_ranks(folder: Path, body: Callable[[], None]) -> None:
    """Run body in two processes of one group; what fails in either fails here."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        body()

    children = [start_child(functools.partial(run, rank)) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@pytest.mark.parametrize(
    ("kind", "tied", "shape"),
    [("fsdp_size", True, {}), ("fsdp_size", True, MODERN), ("pp_size", True, MODERN), ("pp_size", False, {})],
    ids=["fsdp, classic", "fsdp, modern", "pp, modern", "pp, classic"],
)
@torch.no_grad()
def test_two_processes_hold_half_the_model_each_and_give_what_one_does(
    kind: str, tied: bool, shape: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(tie_word_embeddings=tied, **shape)
    ids, padded = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    model.save_pretrained(tmp_path)
    padded[1, :4] = 0
    expected = [model(ids).logits, model(ids, attention_mask=padded, use_cache=False).logits[padded.bool()]]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}

    def continued(model: Any) -> Tensor:
        """The logits of eight steps with a cache, of a batch whose second row is padded on the left."""
        steps = model.generate(ids, attention_mask=padded, **options, output_logits=True, pad_token_id=0)
        return torch.stack(steps.logits)

    expected.append(continued(model))
    size = sum(parameter.numel() for parameter in model.parameters())

    def body() -> None:
        part = GPTKitForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(**{kind: 2}))
        here = [p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p for p in part.parameters()]
        assert sum(parameter.numel() for parameter in here) < 0.6 * size
        part.eval()
        found = [part(ids).logits, part(ids, attention_mask=padded, use_cache=False).logits[padded.bool()]]
        found.append(continued(part))
        for ours, alone in zip(found, expected, strict=True):
            assert torch.allclose(ours, alone, atol=1e-4)

    on_two_ranks(tmp_path, body)
