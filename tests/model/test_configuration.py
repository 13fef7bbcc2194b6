from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM, GPTKitModel

SMALL: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 16}

# Every alias, the field behind it, and two values that are not the field's default.
ALIASES = [
    ("hidden_size", "n_embd", 96, 48),
    ("num_hidden_layers", "n_layer", 3, 5),
    ("num_attention_heads", "n_head", 6, 4),
    ("intermediate_size", "n_inner", 100, 200),
    ("n_positions", "max_position_embeddings", 32, 64),
    ("n_ctx", "max_position_embeddings", 32, 64),
    ("activation_function", "hidden_act", "gelu", "gelu_new"),
    ("layer_norm_eps", "layer_norm_epsilon", 1e-6, 1e-3),
    ("rms_norm_eps", "layer_norm_epsilon", 1e-6, 1e-3),
]

AUTO_MAP = {
    "AutoConfig": "configuration_gpt_kit.GPTKitConfig",
    "AutoModel": "modeling_gpt_kit.GPTKitModel",
    "AutoModelForCausalLM": "modeling_gpt_kit.GPTKitForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt_kit.GPTKitForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt_kit.GPTKitForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_gpt_kit.GPTKitForQuestionAnswering",
}


def stored(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def store(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**GPTKitConfig(**SMALL).to_dict(), **changes}))


def reason(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The whole sentence, with that of the cause: `strict` wraps the error of a rule."""
    return f"{error.value} {error.value.__cause__}"


# --- two vocabularies


def test_every_alias_is_covered_here() -> None:
    assert GPTKitConfig.attribute_map == {alias: name for alias, name, _, _ in ALIASES}


@pytest.mark.parametrize(("alias", "name", "value", "other"), ALIASES)
def test_an_alias_and_its_field_are_one_value(alias: str, name: str, value: Any, other: Any) -> None:
    for given in (alias, name):
        config = GPTKitConfig(**{given: value})
        assert getattr(config, alias) == getattr(config, name) == value
    for written in (alias, name):
        config = GPTKitConfig()
        setattr(config, written, other)
        assert getattr(config, alias) == getattr(config, name) == other
        assert alias not in vars(config), "a second copy under the alias would be stored and go stale"


@pytest.mark.parametrize(("alias", "name", "value", "other"), ALIASES)
def test_both_names_with_one_value_are_no_conflict(alias: str, name: str, value: Any, other: Any) -> None:
    assert getattr(GPTKitConfig(**{alias: value, name: value}), name) == value
    with pytest.raises(ValueError, match="name the same field") as error:
        GPTKitConfig(**{alias: value, name: other})
    assert all(part in str(error.value) for part in (alias, name, repr(value), repr(other)))


def test_a_field_given_its_default_beside_another_alias_is_a_conflict() -> None:
    with pytest.raises(ValueError, match="hidden_size=512 and n_embd=768"):
        GPTKitConfig(n_embd=768, hidden_size=512, n_head=8)


def test_two_aliases_of_one_field_conflict() -> None:
    with pytest.raises(ValueError, match="n_ctx=32 and n_positions=16"):
        GPTKitConfig(n_positions=16, n_ctx=32)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("n_layers", "n_layer"),
        ("hiden_size", "hidden_size"),
        ("vocab_sise", "vocab_size"),
        ("attn_drop", "attn_pdrop"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_name(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"unknown config field '{name}'; did you mean '{suggestion}'"):
        GPTKitConfig(**{name: 3})


def test_a_field_without_a_near_name_is_refused_with_the_list_of_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown config field 'flux'; fields: attn_pdrop, .*vocab_size"):
        GPTKitConfig(flux=3)


# --- types and rules


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_embd", "64"),
        ("n_layer", 2.0),
        ("n_layer", True),
        ("vocab_size", None),
        ("use_bias", 1),
        ("attn_pdrop", "0.1"),
        ("hidden_act", "relu"),
        ("position_embedding", "alibi"),
        ("eos_token_id", 1.5),
        ("hidden_size", "64"),
        ("n_ctx", 1.5),
    ],
)
def test_a_wrong_type_is_refused_at_construction_and_at_every_write(name: str, value: Any) -> None:
    field = GPTKitConfig.attribute_map.get(name, name)
    with pytest.raises(StrictDataclassError) as error:
        GPTKitConfig(**{name: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)

    config = GPTKitConfig(**SMALL)
    before = config.to_dict()
    with pytest.raises(StrictDataclassError, match=field):
        setattr(config, name, value)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_embd": 30}, "n_embd must be divisible by n_head, got 30 and 4"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"n_inner": 0}, "n_inner must be at least 1, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
        ({"attn_pdrop": 1.0}, "attn_pdrop must be at least 0 and below 1, got 1.0"),
        ({"embd_pdrop": -0.1}, "embd_pdrop must be at least 0 and below 1, got -0.1"),
        ({"resid_pdrop": float("nan")}, "resid_pdrop must be at least 0 and below 1, got nan"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be positive and finite, got 0.0"),
        ({"initializer_range": float("inf")}, "initializer_range must be positive and finite, got inf"),
        (
            {"n_embd": 33, "n_head": 3, "position_embedding": "sinusoidal"},
            "n_embd must be even for sinusoidal positions, got 33",
        ),
    ],
)
def test_a_broken_rule_is_reported_with_its_values(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StrictDataclassError) as error:
        GPTKitConfig(**{**SMALL, **changes})
    assert sentence in reason(error)


def test_an_odd_width_is_fine_with_learned_positions() -> None:
    assert GPTKitConfig(n_embd=33, n_head=3).n_embd == 33


def test_a_whole_number_is_a_probability() -> None:
    assert GPTKitConfig(attn_pdrop=0).attn_pdrop == 0


def test_dropout_is_off_unless_asked_for() -> None:
    config = GPTKitConfig()
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.0, 0.0, 0.0)


def test_the_inner_width_follows_the_model_width() -> None:
    assert GPTKitConfig(n_embd=96).n_inner == 384
    assert GPTKitConfig(n_embd=96, n_inner=100).n_inner == 100
    assert GPTKitConfig(hidden_size=96, intermediate_size=None).n_inner == 384


# --- on disk


def test_a_saved_configuration_loads_with_equal_values(tmp_path: Path) -> None:
    config = GPTKitConfig(
        **SMALL,
        n_inner=100,
        hidden_act="gelu",
        position_embedding="sinusoidal",
        use_bias=False,
        embd_pdrop=0.1,
        attn_pdrop=0.2,
        resid_pdrop=0.3,
        layer_norm_epsilon=1e-6,
        initializer_range=0.01,
        use_cache=False,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=4,
        tokenizer_fingerprint="abc",
    )
    config.save_pretrained(tmp_path)
    for loaded in (GPTKitConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GPTKitConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
    assert not set(stored(tmp_path)) & set(GPTKitConfig.attribute_map), "the file holds each value once"


def test_copies_are_equal() -> None:
    config = GPTKitConfig(**SMALL, attn_pdrop=0.5)
    assert copy.deepcopy(config) == config
    assert copy.copy(config) == config


def test_keys_of_other_tools_are_kept(tmp_path: Path) -> None:
    foreign = {"some_tool": {"version": 3}, "zeta": [1, 2], "num_key_value_heads": 4}
    store(tmp_path, **foreign)
    config = GPTKitConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in foreign} == foreign
    config.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert {name: again[name] for name in foreign} == foreign


def test_a_misspelled_field_in_a_file_is_refused(tmp_path: Path) -> None:
    store(tmp_path, n_layers=4)
    with pytest.raises(ValueError, match="unknown config field 'n_layers'; did you mean 'n_layer'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_file_with_the_names_of_transformers_loads(tmp_path: Path) -> None:
    names = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "n_ctx": 24}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_kit", **names}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.n_embd, config.n_layer, config.n_head, config.max_position_embeddings) == (48, 3, 6, 24)


def test_overrides_at_loading_keep_the_rules(tmp_path: Path) -> None:
    store(tmp_path)
    assert GPTKitConfig.from_pretrained(tmp_path, num_hidden_layers=7).n_layer == 7
    config, unused = GPTKitConfig.from_pretrained(tmp_path, n_layer=7, elsewhere=1, return_unused_kwargs=True)
    assert (config.n_layer, unused) == (7, {"elsewhere": 1})
    with pytest.raises(StrictDataclassError) as error:
        GPTKitConfig.from_pretrained(tmp_path, n_head=5)
    assert "n_embd must be divisible by n_head, got 32 and 5" in reason(error)
    with pytest.raises(StrictDataclassError, match="n_layer"):
        GPTKitConfig.from_pretrained(tmp_path, num_hidden_layers="7")
    with pytest.raises(ValueError, match="name the same field"):
        GPTKitConfig.from_pretrained(tmp_path, n_layer=7, num_hidden_layers=8)


@pytest.mark.parametrize("model_class", [GPTKitForCausalLM, GPTKitModel])
def test_every_saved_folder_names_all_classes(model_class: type, tmp_path: Path) -> None:
    model_class(GPTKitConfig(**SMALL)).save_pretrained(tmp_path)
    assert stored(tmp_path)["auto_map"] == AUTO_MAP


def test_a_users_auto_map_entry_is_kept(tmp_path: Path) -> None:
    own = {"AutoModelForMaskedLM": "mine.Mine", "AutoModelForSequenceClassification": "mine.Labels"}
    config = GPTKitConfig(**SMALL, auto_map=own)
    assert config.auto_map == {**AUTO_MAP, **own}
    other = GPTKitConfig(**SMALL)
    assert other.auto_map == AUTO_MAP, "the entry of one configuration is not everyone's"


# --- today's shape

MODERN = {**SMALL, "position_embedding": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}


def test_fields_that_follow_from_others() -> None:
    config = GPTKitConfig(**{**MODERN, "n_embd": 96, "n_head": 4})
    assert (config.head_dim, config.num_key_value_heads, config.n_inner, config.hidden_act) == (24, 4, 256, "silu")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    config.n_head = 8
    assert (config.head_dim, config.num_key_value_heads) == (12, 8)
    given = GPTKitConfig(**{**MODERN, "n_embd": 96, "n_head": 4, "head_dim": 32, "num_key_value_heads": 2})
    given.num_attention_heads = 6
    assert (given.head_dim, given.num_key_value_heads) == (32, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "n_head must be divisible by num_key_value_heads, got 4 and 3"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu with mlp='swiglu' and only then, got 'gelu'"),
        ({"mlp": "gelu", "hidden_act": "silu"}, "hidden_act must be silu with mlp='swiglu' and only then"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear"),
        (
            {"position_embedding": "learned", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters need position_embedding='rotary', got 'learned'",
        ),
        ({"position_embedding": "learned", "rope_theta": 5.0}, "rope_parameters need position_embedding='rotary'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta of rope_type='default' must be above 0, got 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_type='linear' must be at least 1, got None"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "factor of rope_type='linear' must be at least 1, got 0.5",
        ),
        ({"rope_parameters": {"factor": 2.0}}, "rope_type='default' has no 'factor'; keys: rope_type, rope_theta"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_type='default' has no 'partial_rotary_factor'",
        ),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        GPTKitConfig(**{**MODERN, "n_head": 4, "n_embd": 32, **fields})
    assert message in reason(error)


def test_the_plan_has_the_modules_of_the_shape(tmp_path: Path) -> None:
    classic, modern = GPTKitConfig(**SMALL), GPTKitConfig(**MODERN)
    more = {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm", "layers.*.mlp.gate_proj"}
    assert set(modern.base_model_tp_plan) - set(classic.base_model_tp_plan) == more
    modern.save_pretrained(tmp_path)
    assert "base_model_tp_plan" not in stored(tmp_path)
    assert GPTKitConfig.from_pretrained(tmp_path).to_dict() == modern.to_dict()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 500_000}, {"rope_type": "default", "rope_theta": 500_000}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {}}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_parameters": {"rope_theta": 7.0}}, {"rope_type": "default", "rope_theta": 7.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5e5},
            {"rope_type": "linear", "type": "linear", "factor": 2, "rope_theta": 5e5},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
        ),
    ],
    ids=str,
)
def test_a_rotation_is_given_by_the_names_of_transformers(
    fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    given = copy.deepcopy(fields)
    config = GPTKitConfig(**{**MODERN, "max_position_embeddings": 64, **fields})
    assert config.rope_parameters == expected
    assert fields == given, "the caller's dictionary stays as it is"
    config.save_pretrained(tmp_path)
    assert GPTKitConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_fields_that_were_assigned_are_checked_when_a_model_is_built() -> None:
    config = GPTKitConfig(**MODERN)
    config.rope_parameters = {"rope_theta": 5.0}
    with pytest.raises(StrictDataclassError, match="rope_type must be one of default, linear, yarn, llama3, got None"):
        GPTKitForCausalLM(config)
    learned = GPTKitConfig(**SMALL)
    learned.position_embedding = "rotary"
    with pytest.raises(StrictDataclassError, match="rope_type must be one of"):
        GPTKitForCausalLM(learned)
