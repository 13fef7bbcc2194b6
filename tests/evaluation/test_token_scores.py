"""What a model believes at each token, against formulas and plain forward passes of several families of models."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import write_model
from tiny_model import write_tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt_kit_hf import GPTModel, create_model_config
from gpt_kit_hf.errors import StoppedError, UsageError
from gpt_kit_hf.evaluation.attention_maps import attention_weights
from gpt_kit_hf.evaluation.logit_lens import LogitLens
from gpt_kit_hf.evaluation.text_reader import TextReader
from gpt_kit_hf.evaluation.token_scores import (
    beliefs_of,
    bits_per_byte,
    sampling_distribution,
    score_tokens,
)

N_IDS = 190  # all models below know them
_SHAPE = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
# Of each family: can its cache be cut.
FAMILIES = {
    "kit": True, "kit-modern": True, "gpt2": True, "llama": True, "qwen3": True, "opt": True,
    "mistral": False, "gemma2": False, "mamba": False,
}  # fmt: skip


def made(family: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    if family in ("gpt2", "llama"):
        write_model(family, folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    if family == "kit":
        write_tiny_model(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    model: PreTrainedModel = {
        "kit-modern": lambda: GPTModel(create_model_config("modern-xs", vocab_size=200, n_layer=2, n_embd=32)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=8)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SHAPE, head_dim=16)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=200,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        ),
    }[family]()
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return made(family, tmp_path_factory.mktemp("models") / family)


def plain(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def test_beliefs_are_the_formulas() -> None:
    logits = torch.randn(300, 50) * 3  # more rows than are computed at once
    ids = torch.randint(50, (299,)).tolist()
    found = beliefs_of(logits, ids, top=4)
    p = logits.double().softmax(-1)
    for t in range(300):
        order = sorted(range(50), key=lambda token, t=t: -p[t, token])
        assert found.top_ids[t].tolist() == order[:4]
        assert found.top_logprobs[t].tolist() == pytest.approx(
            [math.log(p[t, token]) for token in order[:4]], abs=1e-5
        )
        assert float(found.entropy[t]) == pytest.approx(-sum(float(q) * math.log(q) for q in p[t]), abs=1e-5)
        if t < 299:
            assert float(found.next_logprob[t]) == pytest.approx(math.log(p[t, ids[t]]), abs=1e-5)
            assert int(found.next_rank[t]) == 1 + order.index(ids[t])
    assert math.isnan(found.next_logprob[299])
    assert int(found.next_rank[299]) == 0


def test_a_token_that_cannot_come_is_no_nan() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    found = beliefs_of(logits, [1], top=3)
    assert float(found.entropy) == pytest.approx(math.log(2))
    assert found.next_logprob.tolist() == [-math.inf]
    assert found.next_rank.tolist() == [3]


def test_a_text_that_changes_is_read_as_if_it_was_new(family: str, model: PreTrainedModel) -> None:
    reader, rng = TextReader(model), random.Random(0)
    computed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, given, named: computed.append((given[0] if given else named["input_ids"]).shape[1]), with_kwargs=True
    )
    ids: list[int] = []
    for n in range(16):
        kept = rng.randrange(len(ids) + 1) if n % 3 else len(ids)  # edited in the middle, or continued
        changed = (ids[:kept] + [rng.randrange(N_IDS) for _ in range(rng.randrange(0 if kept else 1, 6))])[:40]
        n_equal = next((i for i, (a, b) in enumerate(zip(ids, changed, strict=False)) if a != b), None)
        n_equal = min(len(ids), len(changed)) if n_equal is None else n_equal
        computed.clear()
        found = reader.read(changed)
        if changed == ids:
            assert computed == []
        elif FAMILIES[family]:
            assert computed == [len(changed) - max(0, n_equal - 1)]
        want, logprobs = score_tokens(model, changed), plain(model, changed)
        assert found.ids == changed
        torch.testing.assert_close(found.logits.double().log_softmax(-1), logprobs[-1], rtol=1e-5, atol=1e-5)
        expected = [float(logprobs[t, token]) for t, token in enumerate(changed[1:])]
        assert found.beliefs.next_logprob[:-1].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(found.beliefs, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        ids = changed
    handle.remove()


def test_a_long_text_is_read_in_parts_that_can_be_stopped() -> None:
    model = GPTModel(create_model_config("nano-xs", n_layer=1, vocab_size=60, max_position_embeddings=700)).eval()
    reader, ids = TextReader(model), torch.randint(60, (600,)).tolist()
    reader.read(ids)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(StoppedError):
        reader.read(ids[::-1], stop)
    assert len(asked) == 3
    found = reader.read(ids[:590])  # what was read so far is not taken for this text
    torch.testing.assert_close(found.beliefs, score_tokens(model, ids[:590]), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_texts_that_cannot_be_read_are_refused() -> None:
    model = GPTModel(create_model_config("nano-xs", n_layer=1, vocab_size=60, max_position_embeddings=8)).eval()
    reader = TextReader(model)
    for ids, reason in (([], "empty"), ([60], "id 60"), ([-1], "id -1"), ([1] * 9, "9 tokens")):
        with pytest.raises(UsageError, match=reason):
            reader.read(ids)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.3, 5, 1.0), (0.9, None, 0.6), (0.8, 7, 0.5)],
)
def test_sampling_cuts_what_generate_cuts(temperature: float, top_k: int | None, top_p: float) -> None:
    """The oracle are the processors that transformers' own generate makes of a generation config."""
    model = GPTModel(create_model_config("nano-xs", n_layer=1, vocab_size=60)).eval()
    ids = torch.randint(60, (1, 7))
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k or 0, top_p=top_p, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    logits = model(ids).logits[0, -1].detach()
    found = sampling_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found.after, out.scores[0][0].softmax(-1))
    torch.testing.assert_close(found.before, logits.softmax(-1))
    kept = out.scores[0][0] > -torch.inf
    assert found.n_kept == int(kept.sum())
    assert found.cut == pytest.approx(float(logits.softmax(-1)[~kept].sum()), abs=1e-6)


def test_temperature_zero_takes_the_likeliest() -> None:
    found = sampling_distribution(torch.tensor([1.0, 3.0, 2.0]), temperature=0, top_k=None, top_p=1.0)
    assert found.after.tolist() == [0, 1, 0]


def test_bits_per_byte() -> None:
    assert bits_per_byte(torch.tensor([math.log(0.5), math.log(0.25)]), 6) == pytest.approx(0.5)
    assert bits_per_byte(torch.tensor([]), 0) is None


def test_attention_is_that_of_the_eager_model(family: str, model: PreTrainedModel) -> None:
    ids, before = torch.randint(N_IDS, (12,)).tolist(), model.config._attn_implementation
    if family == "mamba":
        with pytest.raises(UsageError, match="does not return the weights"):
            attention_weights(model, ids)
        return
    found = attention_weights(model, ids)
    assert model.config._attn_implementation == before
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert found.shape == (n_layers, n_heads, 12, 12)
    torch.testing.assert_close(found.sum(-1), torch.ones(n_layers, n_heads, 12))
    assert not found.triu(1).any()
    # An oracle that does not ask for weights: without the first value, each output loses its share of it.
    captured: list[torch.Tensor] = []
    if family in ("kit", "kit-modern"):
        attention = model.model.layers[0].self_attn
        handles = [
            attention.v_proj.register_forward_hook(
                lambda _, __, out: torch.zeros_like(out).index_fill(1, _FIRST, 1.0)
            ),
            attention.o_proj.register_forward_pre_hook(lambda _, given: captured.append(given[0].detach())),
        ]
        model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        shares = captured[0][0].unflatten(-1, (n_heads, -1))[..., 0]  # (T, H * Dh) -> (T, H)
        torch.testing.assert_close(found[0, :, :, 0], shares.T)


_FIRST = torch.tensor([0])


def test_the_last_row_of_the_lens_is_the_model(model: PreTrainedModel) -> None:
    ids = torch.randint(N_IDS, (12,)).tolist()
    found = LogitLens(model)(ids, [3, 11], top=4)
    n_layers = model.config.num_hidden_layers
    assert found.top_ids.shape == found.top_logprobs.shape == (n_layers + 1, 2, 4)
    best = plain(model, ids)[[3, 11]].topk(4)
    assert torch.equal(found.top_ids[-1], best.indices)
    torch.testing.assert_close(found.top_logprobs[-1].double(), best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kit", "gpt2", "llama", "qwen3"])
def test_a_row_of_the_lens_is_the_model_without_the_later_layers(kind: str, tmp_path: Path) -> None:
    model = made(kind, tmp_path / kind)
    ids = torch.randint(N_IDS, (9,)).tolist()
    found = LogitLens(model)(ids, range(9), top=3)
    layers: Any = model.transformer.h if kind == "gpt2" else model.model.layers
    for n_kept in range(model.config.num_hidden_layers, -1, -1):
        del layers[n_kept:]
        model.config.num_hidden_layers = n_kept
        best = plain(model, ids).topk(3)
        assert torch.equal(found.top_ids[n_kept], best.indices)
        torch.testing.assert_close(found.top_logprobs[n_kept].double(), best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_outside_of_the_vocabulary_are_refused(wrong: int, model: PreTrainedModel) -> None:
    rule = f"the text holds id {wrong}; ids are from 0 to below vocab_size={model.config.vocab_size}"
    with pytest.raises(UsageError, match=rule):
        attention_weights(model, [0, wrong])
    with pytest.raises(UsageError, match=rule):
        LogitLens(model)([0, wrong], [0])


def test_a_model_that_does_more_after_its_layers_has_no_lens() -> None:
    config = Gemma2Config(**_SHAPE, head_dim=16, final_logit_softcapping=0.01)
    with pytest.raises(UsageError, match="computes more than a norm and an output head"):
        LogitLens(Gemma2ForCausalLM(config).eval())
