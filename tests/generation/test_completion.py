"""The engine of the server with models of transformers, and the bytes of single tokens."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tiktoken
import torch
from tiny_model import byte_tokenizer, write_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gpt_kit_hf.errors import NonFiniteError
from gpt_kit_hf.generation import fast_decoder, layouts
from gpt_kit_hf.generation.completion import Chunk, Sampling
from gpt_kit_hf.generation.completion_model import CompletionModel
from gpt_kit_hf.generation.token_bytes import TokenBytes
from gpt_kit_hf.tokenization.export import save_tokenizer

PROMPT = [1, 2, 3, 200, 5]
SIZES = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, **SIZES))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SIZES))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, **SIZES))


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("make", [gpt2, mamba])  # by the decoder of this package, and by `generate`
def test_unusable_logits_end_the_answer(make: object, temperature: float, fault: float, tmp_path: Path) -> None:
    model = make().eval()  # type: ignore[operator]
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = fault
    ready = CompletionModel(model, byte_tokenizer(tmp_path))
    with pytest.raises(NonFiniteError, match="logits of the model are NaN or infinite"):
        ready.complete(PROMPT, 1, Sampling(max_new_tokens=5, temperature=temperature), lambda chunk: None)


@pytest.mark.parametrize("make", [gpt2, llama, mamba])
def test_any_causal_model_gives_the_tokens_of_generate(make: object, tmp_path: Path) -> None:
    model = make().eval()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5)
    # Nothing of the model's generation config is applied but its EOS ids.
    model.generation_config.eos_token_id = 256
    expected = {}
    ids = torch.tensor([PROMPT])
    for seed, how in (
        (0, {"do_sample": False}),
        (3, {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9}),
    ):
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, pad_token_id=256, **how)
        expected[seed] = out[0, len(PROMPT) :].tolist()
    model.generation_config.repetition_penalty = 3.0
    ready = CompletionModel(model, byte_tokenizer(tmp_path))
    for seed, sampling in (
        (0, Sampling(max_new_tokens=20, temperature=0, top_logprobs=1)),
        (3, Sampling(max_new_tokens=20, temperature=0.8, top_k=30, top_p=0.9, seed=3, top_logprobs=1)),
    ):
        chunks: list[Chunk] = []
        ready.complete(PROMPT, 1, sampling, chunks.append)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        wanted = [token for token in expected[seed] if token != 256]
        assert b"".join(token.spelling for token in tokens) == bytes(wanted)
        assert chunks[-1].finish_reason == ("stop" if 256 in expected[seed] else "length")
        with torch.no_grad():
            logprobs = model(torch.tensor([PROMPT + wanted])).logits[0].float().log_softmax(dim=-1)
        for i, (token, scored) in enumerate(zip(wanted, tokens, strict=True)):
            assert scored.logprob == pytest.approx(float(logprobs[len(PROMPT) - 1 + i, token]), abs=1e-4)
        own = ready.score(PROMPT + wanted, 2)
        values = [float(logprobs[i, token]) for i, token in enumerate((PROMPT + wanted)[1:])]
        assert [token.logprob for token in own[1:]] == pytest.approx(values, abs=1e-4)


def test_a_cancelled_completion_ends_before_its_next_token(tmp_path: Path) -> None:
    chunks: list[Chunk] = []
    for model in (gpt2(), llama()):
        chunks.clear()
        ready = CompletionModel(model.eval(), byte_tokenizer(tmp_path))
        sampling = Sampling(max_new_tokens=50, logit_bias={ord("a"): 1e4})
        ready.complete(PROMPT, 20, sampling, chunks.append, is_cancelled=lambda: len(chunks) >= 3)
        assert 3 <= len(chunks) <= 3 + 8  # the rest of the rows of that step


def test_the_bytes_of_tokens_joined_are_the_text(gpt2_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(gpt2_encoding, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    token_bytes = TokenBytes(tokenizer)
    text = "Ça, naïve 😀 日本語\n\tend<|endoftext|>"
    ids = tokenizer.encode(text)
    assert b"".join(token_bytes(token, ids[:i]) for i, token in enumerate(ids)) == text.encode()
    for token in range(0, gpt2_encoding.n_vocab, 97):
        assert token_bytes(token, []) == gpt2_encoding.decode_single_token_bytes(token)
    assert token_bytes(gpt2_encoding.n_vocab + 5, []) == b""  # a model may have more logits than tokens


def test_the_bytes_of_sentencepieces_tokens_joined_are_the_text() -> None:
    pieces = ["<unk>", "<0xE2>", "<0x82>", "<0xAC>", "▁a", "▁the", "cat", "▁"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    token_bytes = TokenBytes(tokenizer)
    ids = [4, 5, 6, 1, 2, 3, 5]
    text = "a thecat€ the"
    assert tokenizer.decode(ids) == text
    assert b"".join(token_bytes(token, ids[:i]) for i, token in enumerate(ids)) == text.encode()
    assert token_bytes(1, [4]) == b"\xe2"


def test_packed_weights_are_kept_for_all_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    monkeypatch.setattr(fast_decoder, "_MAX_CACHED_BYTES", 0)  # as a large model
    packed: list[object] = []
    monkeypatch.setattr(
        fast_decoder,
        "packed_matrices",
        lambda *arguments: packed.append(arguments) or fast_decoder.unpacked_matrices(model, torch.float32),
    )
    monkeypatch.setattr(fast_decoder, "layout_of", lambda *_: layouts.row_by_row)
    ready = CompletionModel(model, AutoTokenizer.from_pretrained(tmp_path))
    answers: list[list[Chunk]] = [[] for _ in range(6)]
    threads = [
        threading.Thread(
            target=ready.complete, args=(PROMPT, 1, Sampling(max_new_tokens=40, temperature=0), answer.append)
        )
        for answer in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1
    assert len({"".join(chunk.text for chunk in answer) for answer in answers}) == 1
