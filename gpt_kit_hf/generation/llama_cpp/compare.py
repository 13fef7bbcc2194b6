"""A GGUF file, as llama.cpp runs it, beside the model that it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel
from gpt_kit_hf.model.losses import evaluation_mode
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, text_to_token_ids

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    AnyTokenizer: TypeAlias = tiktoken.Encoding | PreTrainedTokenizerBase

# What patterns of pre-tokens treat differently: cases, apostrophes, digits, blanks, line ends, scripts, emoji, code.
TEXTS = (
    "The quick brown fox jumps over the lazy dog; it's the dog's 3rd day, they'll SAY, and HE'S not amused.",
    'def f(x: int = 0x1F) -> str:\n    return f"{x:>8}"  # 100% of 1,234,567.89\n\n\tif x != None:\n\t\tpass\n',
    "1 12 123 1234 12345 1234567890 3.14159 1e-05 2026-11-26 ½ ² ١٢٣ Ⅷ",
    "a  b   c    d \n \n\n  e\t\tf \r\n g\u00a0h\u3000i   ",
    "日本語のテキストと、中文文本。한국어 문장입니다. ไทย العربية עברית हिन्दी",
    "naïve café Ångström ÉCOLE straße ŁÓDŹ ﬁ ǅ e\u0301 n\u0303",
    "🙂😀👩‍👩‍👧🏽 🇩🇪 — “quotes” … №5 €9 £1 ™ \u200b\ufeff",
    "<|endoftext|>a<|endoftext|> <|im_start|> <|pad|> <s> [INST] ### User:",
    "don't DON'T we've I'M you'd 'tis 's 'S ''ll camelCase snake_case kebab-case {}[]()<>/\\|@#$%^&*~`",
    "",
)
_GREEDY_TOKENS = 64
_POSITIONS = 8  # whose distributions are compared: each is as many numbers as the vocabulary has tokens
_HIGHEST_DIVERGENCE = 0.1  # far above what any precision costs


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How llama.cpp runs a file, against the model in torch.

    `n_same_texts` of `n_texts` texts have the same ids, `n_same_tokens` of `n_tokens` greedy tokens are the same up to
    the first that differs, and `divergence` is the mean of KL(model, file) over `n_positions` next tokens, in nats.
    """

    n_texts: int
    n_same_texts: int
    n_tokens: int
    n_same_tokens: int
    n_positions: int
    divergence: float

    def require(self) -> None:
        """Raise CheckpointError if llama.cpp gives other ids, or other predictions than a precision explains."""
        if self.n_same_texts < self.n_texts:
            raise CheckpointError(
                f"llama.cpp gives other ids for {self.n_texts - self.n_same_texts} of {self.n_texts} texts"
            )
        if not self.divergence < _HIGHEST_DIVERGENCE:  # it may be no number
            raise CheckpointError(
                f"llama.cpp computes another model: KL divergence {self.divergence:.2g} nats a token, at most "
                f"{_HIGHEST_DIVERGENCE} with any precision"
            )

    def line(self) -> str:
        """Return the result in one line."""
        return (
            f"llama.cpp: the same ids for {self.n_same_texts} of {self.n_texts} texts, the same greedy tokens for the "
            f"first {self.n_same_tokens} of {self.n_tokens}, KL divergence {self.divergence:.2g} nats a token, the "
            f"mean of {self.n_positions}"
        )


def compare_with_llama_cpp(
    model: PreTrainedModel, tokenizer: AnyTokenizer, path: Path, *, threads: int | None = None
) -> Comparison:
    """Return how llama.cpp runs the GGUF file at `path`, against the model in torch that it was written from.

    Raises UsageError if xllamacpp is not installed or cannot run the file.
    """
    engine = LlamaCppModel(path, threads=threads)
    encoded = [(text_to_token_ids(text, tokenizer)[0].tolist() if text else [], text) for text in TEXTS]
    same_texts = sum(ids == engine.tokenizer.encode(text, add_special_tokens=False) for ids, text in encoded)
    start = text_to_token_ids(EOS_TOKEN, tokenizer)  # (1, 1)
    n_new = min(_GREEDY_TOKENS, (context_length(model) or _GREEDY_TOKENS + 1) - 1)
    special = engine.tokenizer.all_special_ids  # they could end the text early, and then little would be compared
    ids = _greedy(model, start, n_new, special)[0]
    found = engine.greedy(start[0].tolist(), n_new, left_out=special)
    differs = [a != b for a, b in zip(ids[1:].tolist(), found, strict=False)]
    positions = sorted({1 + i * (len(ids) - 1) // _POSITIONS for i in range(_POSITIONS)})
    return Comparison(
        n_texts=len(TEXTS),
        n_same_texts=same_texts,
        n_tokens=n_new,
        n_same_tokens=differs.index(True) if True in differs else len(differs),
        n_positions=len(positions),
        divergence=_divergence(model, engine, ids, positions),
    )


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: torch.Tensor, n_new: int, left_out: list[int]) -> torch.Tensor:
    """(1, T) -> (1, T + N): the most likely tokens in torch, those `left_out` never."""
    cache, token = None, ids
    with evaluation_mode(model):
        for _ in range(n_new):
            output = model(token, past_key_values=cache, use_cache=True)
            scores = output.logits[:, -1].index_fill(1, torch.tensor(left_out), -torch.inf)  # (1, V)
            cache, token = output.past_key_values, scores.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, token), dim=1)
    return ids


@torch.no_grad()
def _divergence(model: PreTrainedModel, engine: LlamaCppModel, ids: torch.Tensor, positions: list[int]) -> float:
    """Return the mean of KL(model, file) in nats over what follows the first `position` ids, of (T,)."""
    with evaluation_mode(model):
        own = model(ids[None]).logits[0, [each - 1 for each in positions]].double().log_softmax(dim=-1)  # (P, V)
    other = torch.tensor(engine.distributions(ids.tolist(), positions), dtype=torch.float64)
    own = own[:, : other.shape[1]].cpu()
    return float((own.exp() * (own - other)).sum(dim=-1).mean())
