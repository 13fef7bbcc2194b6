"""PEFT takes the model as it takes the models written inside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors.torch import load_file
from shapes import MODERN
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM

VOCAB, WIDTH, LAYERS, HEADS, VIRTUAL = 61, 32, 2, 4, 5
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
# Rows of one length, and of two: 1 is a token, 0 is padding on the left.
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])

pytestmark = [
    pytest.mark.usefixtures("logged"),
    # PEFT asks every model for this switch by a name that transformers has given up since.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def random_model(**overrides: Any) -> Any:
    """Return a model whose parameters all differ, so that none can stand for another."""
    model = GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, "max_position_embeddings": 32, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Large matrices and small biases: what the model says next then hangs on every token before.
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if parameter.ndim == 2 else 0.05)
    return model.eval()


def tied_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, tie_word_embeddings=True))


@pytest.fixture(params=[{}, MODERN], ids=["classic", "modern"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a random model of each shape."""
    random_model(**request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapt(model: Any, config: PeftConfig) -> Any:
    return get_peft_model(model, config)


def with_saved(base: Path, adapter: Path) -> Any:
    """Return the model of the folder `base` with the adapter of another folder."""
    return PeftModel.from_pretrained(load(base), str(adapter))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **options})


def logits_of(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(ids, **inputs).logits
    return logits


def trainable(model: torch.nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: Any, *, steps: int = 5) -> list[float]:
    """Take steps on one batch; return the losses."""
    optimizer = torch.optim.Adam(list(trainable(model).values()), lr=0.03)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def projections(*names: str) -> set[str]:
    return {f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in names}


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEARS = projections(*ATTENTION, "mlp.up_proj", "mlp.down_proj")


# --- LoRA


@pytest.mark.parametrize(
    ("target_modules", "found"),
    [
        (DEFAULT_TARGETS["llama"], projections("self_attn.q_proj", "self_attn.v_proj")),
        (DEFAULT_TARGETS["nemotron_h"], projections(*ATTENTION)),
        ("all-linear", LINEARS),
    ],
    ids=["two", "four", "all-linear"],
)
def test_the_usual_target_names_find_the_projections(target_modules: Any, found: set[str]) -> None:
    adapted = adapt(random_model(), lora(target_modules=target_modules))
    assert set(adapted.targeted_module_names) == found


def test_all_linear_finds_the_gate_of_the_modern_shape() -> None:
    adapted = adapt(random_model(**MODERN), lora())
    assert set(adapted.targeted_module_names) == LINEARS | projections("mlp.gate_proj")
    gates = adapt(random_model(**MODERN), lora(target_modules=["gate_proj"]))
    assert set(gates.targeted_module_names) == projections("mlp.gate_proj")


def test_one_entry_in_peft_s_table_gives_the_model_default_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT knows default names for a list of model types that it holds itself; others are added by hand.
    monkeypatch.setitem(DEFAULT_TARGETS, GPTKitConfig.model_type, DEFAULT_TARGETS["llama"])
    adapted = adapt(random_model(), lora(target_modules=None))
    assert set(adapted.targeted_module_names) == projections("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_starts_as_the_identity_and_trains_alone(base: Path, use_dora: bool) -> None:
    model = load(base)
    before, weights = logits_of(model), {name: p.clone() for name, p in model.named_parameters()}
    adapted = adapt(model, lora(use_dora=use_dora))
    torch.testing.assert_close(logits_of(adapted), before, rtol=0, atol=1e-5 if use_dora else 0)
    assert all("lora_" in name for name in trainable(adapted))

    losses = train(adapted)
    assert losses[0] - losses[-1] > 0.1
    assert (logits_of(adapted) - before).abs().max() > 0.1
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), before)
    for name, parameter in adapted.unload().named_parameters():
        assert torch.equal(parameter, weights[name])


def test_a_saved_adapter_gives_equal_logits_on_every_path(base: Path, tmp_path: Path) -> None:
    adapted = adapt(load(base), lora())
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    after = logits_of(adapted)
    assert torch.equal(logits_of(with_saved(base, tmp_path / "adapter")), after)
    # These two find the base by the path that the adapter recorded.
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), after)
    assert torch.equal(logits_of(load(tmp_path / "adapter")), after)
    plain = load(base)
    plain.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits_of(plain), after)


def test_the_adapters_of_transformers_itself(base: Path, tmp_path: Path) -> None:
    model = load(base)
    before = logits_of(model)
    model.add_adapter(lora(init_lora_weights=False), "first")
    first = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.add_adapter(lora(init_lora_weights=False), "second")
    assert (first - before).abs().max() > 0.01
    assert (logits_of(model) - first).abs().max() > 0.01
    model.set_adapter("first")
    assert torch.equal(logits_of(model), first)
    model.disable_adapters()
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(load(tmp_path / "adapter")), first)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_gives_a_plain_model_that_saves_and_loads(tmp_path: Path, tied: bool) -> None:
    model = random_model(tie_word_embeddings=tied)
    names = set(model.state_dict())
    adapted = adapt(model, lora())
    train(adapted)
    # W x + B A x and (W + B A) x differ by rounding, which in float64 does not depend on the CPU's kernels.
    after = logits_of(adapted.double())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), after, rtol=0, atol=1e-12)
    merged.float()
    assert set(merged.state_dict()) == names

    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits_of(again), logits_of(merged))
    for each in (merged, again):
        assert type(each) is GPTKitForCausalLM
        assert (each.lm_head.weight is each.model.embed_tokens.weight) is tied
    assert set(load_file(tmp_path / "model.safetensors")) == names - ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_adapter_gradients(base: Path, use_reentrant: bool) -> None:
    adapted = adapt(load(base), lora(init_lora_weights=False))
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in trainable(adapted).items()}
    adapted.zero_grad()

    model = adapted.get_base_model()
    # The name since transformers 5.20; the old one still works and warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    adapted.enable_input_require_grads()  # or a reentrant segment, whose input is frozen, has no gradient
    runs: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    adapted(IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(runs) == 2 * LAYERS  # each layer is computed once more on the way back
    for name, parameter in trainable(adapted).items():
        assert torch.equal(parameter.grad, plain[name]), name


# --- trained embeddings beside LoRA, on a model whose head shares them


def adapt_as_llama(model: PreTrainedModel, **options: Any) -> Any:
    """Adapt a model and check that PEFT trains in it what it trains in transformers' own Llama."""
    adapted, llama = (adapt(each, lora(target_modules=["q_proj"], **options)) for each in (model, tied_llama()))
    shapes = [{name: parameter.shape for name, parameter in trainable(each).items()} for each in (adapted, llama)]
    assert shapes[0] == shapes[1]
    return adapted


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, int(IDS[0, 1])]},
    ],
    ids=["embedding", "head", "two tokens"],
)
def test_trained_embeddings_stay_tied(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(base)
    table = model.model.embed_tokens.weight.detach().clone()
    adapted = adapt_as_llama(model, **options)
    train(adapted)
    after = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(with_saved(base, tmp_path / "adapter")), after)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(load(base)))

    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for each in (merged, load(tmp_path / "merged")):
        torch.testing.assert_close(logits_of(each), after, rtol=1e-5, atol=1e-5)
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert each.config.tie_word_embeddings
        moved = (each.model.embed_tokens.weight != table).any(dim=1).nonzero().flatten().tolist()
        # With a shared head every row has a gradient.
        assert moved == sorted(options.get("trainable_token_indices", range(VOCAB)))


def test_embedding_and_head_trained_apart_come_untied(base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        adapted = adapt_as_llama(load(base), modules_to_save=["embed_tokens", "lm_head"])
    train(adapted)
    after = logits_of(adapted)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), after, rtol=0, atol=1e-5)
    assert not again.config.tie_word_embeddings
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


# --- learned prompts


def greedy_by_hand(model: Any, ids: Tensor, count: int) -> Tensor:
    """Continue (1, T) ids one token at a time, each time from the start."""
    for _ in range(count):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def check_left_padding_and_generation(adapted: Any) -> None:
    """A left-padded row gives what it gives alone, its learned prompt before the padding included."""
    rows = [row[mask.bool()][None] for row, mask in zip(IDS, LEFT_PADDED, strict=True)]
    padded = logits_of(adapted, attention_mask=LEFT_PADDED)
    for index, row in enumerate(rows):
        # Prompt tuning returns the logits of its prompt, too; both ends with the last token.
        torch.testing.assert_close(padded[index, -row.shape[1] :], logits_of(adapted, row)[0, -row.shape[1] :])
    together = adapted.generate(input_ids=IDS, attention_mask=LEFT_PADDED, max_new_tokens=6, do_sample=False)
    assert len(set(together[:, -6:].flatten().tolist())) > 2  # or nearly any prompt would do
    for index, row in enumerate(rows):
        assert torch.equal(together[index, -row.shape[1] - 6 :], greedy_by_hand(adapted, row, 6)[0])


# PEFT drops the positions that `generate` counts, and says so; the model counts them itself.
@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_prompt_tuning_puts_its_vectors_before_the_tokens(base: Path, tmp_path: Path) -> None:
    model = load(base)
    adapted = adapt(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    assert set(trainable(adapted)) == {"prompt_encoder.default.embedding.weight"}
    losses = train(adapted)
    assert losses[0] - losses[-1] > 0.01

    prompt = adapted.prompt_encoder["default"].embedding.weight.detach()
    embeddings = torch.cat([prompt.expand(2, -1, -1), model.model.embed_tokens(IDS)], dim=1)  # (B, P + T, D)
    by_hand = model(inputs_embeds=embeddings).logits
    assert torch.equal(logits_of(adapted), by_hand)
    # The loss is that of the tokens after the first: no vector of the prompt is a target.
    expected = torch.nn.functional.cross_entropy(by_hand[:, VIRTUAL:-1].flatten(0, 1), IDS[:, 1:].flatten())
    # The last vector predicts the first token, which PEFT's labels also ask for.
    first = torch.nn.functional.cross_entropy(by_hand[:, VIRTUAL - 1], IDS[:, 0])
    torch.testing.assert_close(adapted(IDS, labels=IDS).loss, (expected * 8 + first) / 9)

    check_left_padding_and_generation(adapted)
    adapted.save_pretrained(tmp_path / "prompt")
    again = with_saved(base, tmp_path / "prompt")
    assert torch.equal(logits_of(again), logits_of(adapted))


def prefix_of(cache: DynamicCache) -> Tensor:
    """Lay out the keys and values of one row, each (1, H, P, Dh), as PEFT stores a prefix: (P, 2 x layers x D)."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    flat = [part[0].transpose(0, 1).flatten(1) for pair in pairs for part in pair]  # each (1, H, P, Dh) -> (P, D)
    return torch.cat(flat, dim=1)


def test_a_prefix_made_of_real_tokens_acts_as_those_tokens(base: Path, tmp_path: Path) -> None:
    model = load(base)
    tokens = torch.randint(VOCAB, (1, VIRTUAL))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    by_hand = logits_of(model, torch.cat([tokens.expand(2, -1), IDS], dim=1))[:, VIRTUAL:]
    assert (by_hand - logits_of(model)).abs().max() > 0.1  # the tokens before matter

    adapted = adapt(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.copy_(prefix_of(cache))
    torch.testing.assert_close(logits_of(adapted), by_hand)
    check_left_padding_and_generation(adapted)

    losses = train(adapted)
    assert losses[0] - losses[-1] > 0.01
    adapted.save_pretrained(tmp_path / "prefix")
    again = with_saved(base, tmp_path / "prefix")
    assert torch.equal(logits_of(again), logits_of(adapted))
