from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import tiktoken
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.generate import generate_text_autoregressive, stream_text
from gpt_kit_hf.tokenization.encodings import get_encoding, get_eos_token_id, save_tokenizer, text_to_token_ids

VOCAB = 257
CONTEXT = 12


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    # A wide initialisation, so that the logits differ by more than rounding and argmax is clear.
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    return GPT2LMHeadModel(config)


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=[tiny_gpt2, tiny_llama])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(autouse=True)
def _no_log_of_transformers() -> Iterator[None]:
    """transformers warns through its logger, which pytest's filter of warnings does not see."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert messages == []


def random_prompt(rows: int = 3, length: int = 4) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(5))


def naive_greedy(model: nn.Module, ids: Tensor, n: int, eos: int | None = None) -> Tensor:
    """Argmax of a plain forward over the last CONTEXT tokens, row by row; ended rows are filled at the end."""
    model.eval()
    rows = []
    for row in ids.tolist():
        new: list[int] = []
        while len(new) < n and (not new or new[-1] != eos):
            with torch.no_grad():
                logits = model(torch.tensor([(row + new)[-CONTEXT:]]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        rows.append(row + new)
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [eos or 0] * (longest - len(row)) for row in rows])


def scripted(continuation: list[int], n_prompt: int, vocab_size: int = VOCAB) -> GPT2LMHeadModel:
    """Return a real model whose argmax after a prompt of ``n_prompt`` tokens is the continuation.

    Position n_prompt - 1 + i holds unit vector i, which the head maps to token continuation[i]; the token
    embeddings and the block's outputs are zero.
    """
    width = max(len(continuation), 2)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_prompt + width + 8,
        n_embd=width,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        for i, token in enumerate(continuation):
            model.transformer.wpe.weight[n_prompt - 1 + i, i] = 1.0
            model.lm_head.weight[token, i] = 1.0
    return model


def test_greedy_is_argmax_token_by_token(model: Any) -> None:
    prompt = random_prompt()
    found = generate_text_autoregressive(model=model, token_ids=prompt, max_new_tokens=8)
    assert found.dtype == torch.int64
    assert torch.equal(found, naive_greedy(model, prompt, 8))
    assert found[:, 4:].unique().numel() > 3  # a constant continuation would show little
    single = generate_text_autoregressive(model, prompt[1], 8)
    assert torch.equal(single, found[1:2])


def test_sampling_among_one_is_greedy(model: Any) -> None:
    prompt = random_prompt()
    greedy = generate_text_autoregressive(model, prompt, 8)
    sampled = generate_text_autoregressive(model, prompt, 8, temperature=3.0, top_k=1)
    assert torch.equal(sampled, greedy)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 5), (1.0, 120)])
def test_sampling_follows_the_softmax_of_the_k_largest_logits(temperature: float, top_k: int | None) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # flat enough that more than 50 tokens, transformers' default, show
    prompt = random_prompt(rows=1)
    n = 4000
    found = generate_text_autoregressive(model, prompt.expand(n, -1), 1, temperature=temperature, top_k=top_k)
    counts = torch.bincount(found[:, -1], minlength=VOCAB)
    with torch.no_grad():
        logits = model(prompt).logits[0, -1] / temperature
    kept = torch.full_like(logits, -math.inf)
    best = logits.topk(top_k or VOCAB).indices
    kept[best] = logits[best]
    expected = kept.softmax(0)
    assert not counts[expected == 0].any()
    # Each frequency within 5 standard deviations of a binomial count.
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 5 * deviation + 1).all()
    if top_k != 5 and temperature == 1.0:
        assert (counts > 0).sum() > 55


@pytest.mark.parametrize("prompt_length", [3, CONTEXT - 1, CONTEXT, CONTEXT + 5])
def test_slide_predicts_from_the_last_positions(model: Any, prompt_length: int) -> None:
    prompt = random_prompt(rows=2, length=prompt_length)
    found = generate_text_autoregressive(model, prompt, 15, overflow="slide")
    assert torch.equal(found, naive_greedy(model, prompt, 15))


def test_slide_within_the_context_is_plain_generation(model: Any) -> None:
    prompt = random_prompt()
    plain = generate_text_autoregressive(model, prompt, CONTEXT - 4)
    assert torch.equal(generate_text_autoregressive(model, prompt, CONTEXT - 4, overflow="slide"), plain)
    with pytest.raises(UsageError, match=f"4 tokens .*=9 is 13, .*max_position_embeddings={CONTEXT}"):
        generate_text_autoregressive(model, prompt, CONTEXT - 3)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("n", [8, 14])
def test_ended_rows_are_filled_and_the_end_of_all_stops(model: Any, own: bool, n: int) -> None:
    prompt = random_prompt(rows=4)
    endless = naive_greedy(model, prompt, n)
    for eos in [int(endless[0, 5]), int(endless[1, 11]), int(endless[2, -1])]:
        expected = naive_greedy(model, prompt, n, eos)
        model.generation_config.eos_token_id = eos if own else None
        found = generate_text_autoregressive(model, prompt, n, eos_token_id=None if own else eos, overflow="slide")
        assert torch.equal(found, expected)
    alone = generate_text_autoregressive(model, prompt[:1], n, eos_token_id=int(endless[0, 5]), overflow="slide")
    assert alone.shape[1] <= 6


def test_several_ends_of_the_models_own_config() -> None:
    model = tiny_gpt2()
    prompt = random_prompt(rows=1)
    endless = generate_text_autoregressive(model, prompt, 8)
    second = int(endless[0, 6])
    model.generation_config.eos_token_id = [256, second]
    assert 256 not in endless
    found = generate_text_autoregressive(model, prompt, 8)
    assert int(found[0, -1]) == second
    assert second not in found[0, 4:-1]


def test_nothing_but_the_end_is_taken_from_the_models_generation_config(model: Any) -> None:
    prompt = random_prompt()
    plain = generate_text_autoregressive(model, prompt, 8)
    own = model.generation_config
    own.update(
        repetition_penalty=9.0,
        suppress_tokens=plain[:, 4].tolist(),
        num_beams=3,
        do_sample=True,
        top_k=2,
        min_p=0.9,
        max_length=5,
        pad_token_id=3,
    )
    before = own.to_dict()
    assert torch.equal(generate_text_autoregressive(model, prompt, 8), plain)
    assert model.generation_config is own
    assert own.to_dict() == before
    with pytest.raises(RuntimeError, match="stop here"):
        stream_text(model, get_encoding("bytes"), "abc", max_new_tokens=3, on_text=_fail)
    assert model.generation_config is own


def _fail(text: str) -> None:
    raise RuntimeError("stop here")


def test_modes_are_left_and_dropout_is_off() -> None:
    model = tiny_gpt2(embd_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    prompt = random_prompt()
    found = generate_text_autoregressive(model, prompt, 8)
    assert [module.training for module in model.modules()] == modes
    model.transformer.register_forward_hook(_fail_hook)
    with pytest.raises(RuntimeError, match="stop here"):
        generate_text_autoregressive(model, prompt, 8)
    assert [module.training for module in model.modules()] == modes
    model.transformer._forward_hooks.clear()
    assert torch.equal(found, naive_greedy(model, prompt, 8))


def _fail_hook(*args: Any) -> None:
    raise RuntimeError("stop here")


def test_a_compiled_model_generates() -> None:
    model = tiny_gpt2()
    compiled = torch.compile(model, backend="eager")
    prompt = random_prompt()
    assert torch.equal(generate_text_autoregressive(compiled, prompt, 8), naive_greedy(model, prompt, 8))


def test_no_new_token_returns_the_prompt() -> None:
    prompt = random_prompt(rows=2, length=CONTEXT + 3)
    found = generate_text_autoregressive(tiny_gpt2(), prompt, 0)
    assert torch.equal(found, prompt)
    assert found.data_ptr() != prompt.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": torch.zeros(1, 0).long()}, "token_ids is empty"),
        ({"token_ids": torch.tensor([])}, "token_ids is empty"),
        ({"token_ids": torch.tensor([3, VOCAB])}, f"token_ids holds {VOCAB}; .*vocab_size={VOCAB}"),
        ({"token_ids": torch.tensor([3, -2])}, "token_ids holds -2"),
        ({"token_ids": torch.tensor([1.0])}, "token_ids is torch.float32"),
        ({"token_ids": torch.ones(1, 1, 1).long()}, r"token_ids is torch.int64 \(1, 1, 1\)"),
        ({"token_ids": [1, 2]}, "token_ids is list"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -1}, "top_k=-1: 1 or more"),
        ({"eos_token_id": VOCAB}, f"eos_token_id={VOCAB}"),
        ({"overflow": "slid"}, "did you mean 'slide'"),
        ({"model": nn.Linear(2, 2)}, "Linear, which has no generate"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": tiny_gpt2(), "token_ids": random_prompt(), "max_new_tokens": 2}
    with pytest.raises(UsageError, match=message):
        generate_text_autoregressive(**(arguments | options))


TEXTS = [
    "plain text",
    "é",
    "naïve façade — 10 €",
    "日本語のテキスト",
    "😀👩‍👩‍👧 flag 🇫🇷!",
    "a\ufffdb\ufffd",
    "line\nline\n\n",
    "  spaces , and . marks  ",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_chunks_join_to_the_text_and_never_cut_a_character(text: str, kind: str, tmp_path: Any) -> None:
    encoding = get_encoding("bytes")
    eos = get_eos_token_id(encoding)
    assert eos is not None
    tokenizer: Any = encoding
    if kind == "tokenizer":
        save_tokenizer(encoding, tmp_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    prompt = "Prompt é"
    new = [*text.encode(), eos]
    model = scripted(new, len(prompt.encode()))
    pieces: list[str] = []
    found = stream_text(model, tokenizer, prompt, max_new_tokens=len(new) + 5, eos_token_id=eos, on_text=pieces.append)
    assert found == text
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert pieces == list(text)  # one byte a token: each character as soon as its last byte is there


def test_bytes_that_never_decode_are_replaced_as_decode_does() -> None:
    encoding = get_encoding("bytes")
    dice = random.Random(3)
    for _ in range(10):
        alphabet = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xFF, *b"ab"]
        new = [dice.choice(alphabet) for _ in range(20)]
        pieces: list[str] = []
        found = stream_text(scripted(new, 2), encoding, "x:", max_new_tokens=20, on_text=pieces.append)
        assert "".join(pieces) == found == encoding.decode(new) == bytes(new).decode(errors="replace")
        assert all(pieces)


def test_stream_is_the_text_of_the_generated_ids_also_where_the_window_slides(model: Any) -> None:
    encoding = get_encoding("bytes")
    prompt = text_to_token_ids("ab", encoding)
    ids = generate_text_autoregressive(model, prompt, 30, overflow="slide")
    pieces: list[str] = []
    found = stream_text(model, encoding, "ab", max_new_tokens=30, overflow="slide", on_text=pieces.append)
    assert found == encoding.decode(ids[0, 2:].tolist()) == "".join(pieces)

    torch.manual_seed(1)
    ids = generate_text_autoregressive(model, prompt, 9, temperature=1.5, top_k=40)
    torch.manual_seed(1)
    found = stream_text(model, encoding, "ab", max_new_tokens=9, temperature=1.5, top_k=40, on_text=pieces.append)
    assert found == encoding.decode(ids[0, 2:].tolist())


def test_prompt_is_read_as_text_to_token_ids_reads_it(model: Any) -> None:
    encoding = tiktoken.Encoding(
        "two specials",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(255)},
        special_tokens={"<|endoftext|>": 255, "<|pad|>": 256},
    )
    for prompt in ["a<|endoftext|>b", "<|pad|>"]:
        ids = generate_text_autoregressive(model, text_to_token_ids(prompt, encoding), 9, overflow="slide")
        pieces: list[str] = []
        found = stream_text(model, encoding, prompt, max_new_tokens=9, overflow="slide", on_text=pieces.append)
        assert found == encoding.decode(ids[0, -9:].tolist())


def test_chunks_come_while_the_model_generates() -> None:
    model = scripted(list(b"abc"), 1)
    events: list[str] = []
    model.register_forward_hook(lambda *args: events.append("forward"))
    stream_text(model, get_encoding("bytes"), "x", max_new_tokens=3, on_text=events.append)
    assert events == ["forward", "a", "forward", "b", "forward", "c"]


def sentence_piece_like(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Words with a marked space that the first of a text loses, and bytes where no word fits."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256 - len(pieces))]
    vocabulary = {token: number for number, token in enumerate([*pieces, *byte_tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=False))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_space_before_the_first_word_is_kept() -> None:
    tokenizer = sentence_piece_like(["x", "▁world", "▁of", "▁,"])
    pieces: list[str] = []
    found = stream_text(scripted([1, 2, 3], 1), tokenizer, "x", max_new_tokens=3, on_text=pieces.append)
    assert tokenizer.decode([1, 2, 3]) == "world of ,"  # what decoding the continuation alone loses
    assert pieces == [" world", " of", " ,"]
    assert found == " world of ,"


def test_a_run_of_byte_tokens_that_breaks_late_loses_nothing() -> None:
    tokenizer = sentence_piece_like(["x", "y"])
    byte = tokenizer.convert_tokens_to_ids
    e_acute, broken = [byte("<0xC3>"), byte("<0xA9>")], byte("<0xE2>")
    for new, expected in [
        ([*e_acute, broken, 1, 1], ["é", "\ufffdy", "y"]),
        ([*e_acute, broken], ["é", "\ufffd"]),
        ([*e_acute, *e_acute], ["é", "é"]),
    ]:
        pieces: list[str] = []
        found = stream_text(scripted(new, 1), tokenizer, "x", max_new_tokens=len(new), on_text=pieces.append)
        assert pieces == expected
        assert found == "".join(expected)


def test_a_token_that_the_encoding_lacks_is_named() -> None:
    short = tiktoken.Encoding(
        "short", pat_str=r"[\s\S]", mergeable_ranks={bytes([b]): b for b in range(200)}, special_tokens={}
    )
    with pytest.raises(UsageError, match="'short' has no token 240"):
        stream_text(scripted([65, 240], 1), short, "x", max_new_tokens=2, on_text=lambda text: None)
    with pytest.raises(UsageError, match="token_ids is empty"):
        stream_text(scripted([65], 1), short, "", max_new_tokens=1, on_text=lambda text: None)


def test_chunks_of_the_gpt2_vocabulary(gpt2_encoding: tiktoken.Encoding) -> None:
    text = "Tokens of GPT-2 cut 😀 and 日本 in the middle."
    new = gpt2_encoding.encode_ordinary(text)
    model = scripted(new, 1, vocab_size=gpt2_encoding.n_vocab)
    pieces: list[str] = []
    found = stream_text(model, gpt2_encoding, "!", max_new_tokens=len(new), on_text=pieces.append)
    assert found == "".join(pieces) == text
    assert len(pieces) < len(new)
    assert all("\ufffd" not in piece for piece in pieces)
    assert all(left + right in text for left, right in pairwise(pieces))
