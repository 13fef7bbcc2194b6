"""Classification heads, with transformers' GPT-2 of the same weights as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written_models import CONTEXT, END, HEADS, LAYERS, SHAPE, VOCAB, WIDTH, randomize
from shapes import MODERN
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    pipeline,
)

from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    GPTKitForQuestionAnswering,
    GPTKitForSequenceClassification,
    GPTKitForTokenClassification,
    get_encoding,
    save_tokenizer,
)
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.hub.model_folder import find_model_folder
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.model.checkpoints.layouts import GPT2_NAMES, rename_tensors

LABELS = 4
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [29, 7, 1], [8], [1, 2, 3, 4, END]]
# Three heads share one of keys and values.
SHAPES = [{}, {"position_embedding": "sinusoidal"}, {**MODERN, "num_key_value_heads": 1}]
AUTO = {
    GPTKitForSequenceClassification: AutoModelForSequenceClassification,
    GPTKitForTokenClassification: AutoModelForTokenClassification,
    GPTKitForQuestionAnswering: AutoModelForQuestionAnswering,
}


def config(**options: Any) -> GPTKitConfig:
    return GPTKitConfig(**{**SHAPE, "max_position_embeddings": CONTEXT, "num_labels": LABELS, **options})


def classifier(**options: Any) -> Any:
    return randomize(GPTKitForSequenceClassification(config(**options)))


def pair(ours: Any, theirs: Any, head: dict[str, str], **options: Any) -> tuple[Any, Any]:
    """Return a model of this package and one of transformers with the same weights, in eval mode."""
    options = {"num_labels": LABELS, "pad_token_id": 0, **options}
    second = randomize(theirs(GPT2Config(**SHAPE, n_positions=CONTEXT, **options)))
    stored = second.state_dict()
    tensors = rename_tensors({name: t for name, t in stored.items() if name.startswith("trans")}, GPT2_NAMES, "gpt2")
    tensors |= {name: stored[theirs_name] for name, theirs_name in head.items()}
    first = ours(config(**options)).eval()
    first.load_state_dict(tensors)
    return first, second


def padded(rows: list[list[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (B, T)."""
    longest = max(map(len, rows))
    left = side == "left"
    ids = [[pad] * (longest - len(row)) * left + row + [pad] * (longest - len(row)) * (not left) for row in rows]
    mask = [
        [0] * (longest - len(row)) * left + [1] * len(row) + [0] * (longest - len(row)) * (not left) for row in rows
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize(
    ("problem", "labels", "targets"),
    [
        ("single_label_classification", LABELS, torch.tensor([3, 0, 2, 1])),
        (
            "multi_label_classification",
            LABELS,
            torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]),
        ),
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
)
def test_rows_are_classified_as_gpt2_does(problem: str, labels: int, targets: Tensor) -> None:
    options: dict[str, Any] = {"problem_type": problem, "num_labels": labels}
    head = {"score.weight": "score.weight"}
    ours, theirs = pair(GPTKitForSequenceClassification, GPT2ForSequenceClassification, head, **options)
    ids, mask = padded(ROWS, "right")
    first, second = (model(ids, attention_mask=mask, labels=targets) for model in (ours, theirs))
    assert first.logits.shape == (len(ROWS), labels)
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.loss, second.loss)
    # Without a mask, both look for the padding id.
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_tokens_are_classified_as_gpt2_does() -> None:
    head = {"score.weight": "classifier.weight", "score.bias": "classifier.bias"}
    ours, theirs = pair(GPTKitForTokenClassification, GPT2ForTokenClassification, head)
    ids, mask = padded(ROWS, "right")
    labels = torch.where(mask.bool(), ids % LABELS, -100)
    first, second = (model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs))
    real = mask.bool()
    torch.testing.assert_close(first.logits[real], second.logits[real])
    torch.testing.assert_close(first.loss, second.loss)
    assert ours.dropout.p == 0.0


def test_answers_are_marked_as_gpt2_does() -> None:
    head = {f"qa_outputs.{name}": f"qa_outputs.{name}" for name in ("weight", "bias")}
    ours, theirs = pair(GPTKitForQuestionAnswering, GPT2ForQuestionAnswering, head)
    ids = torch.tensor([ROWS[0], [*ROWS[3], 6, 7, 8]])
    bounds = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 7])}
    first, second = (model(ids, **bounds) for model in (ours, theirs))
    torch.testing.assert_close(first.start_logits, second.start_logits)
    torch.testing.assert_close(first.end_logits, second.end_logits)
    torch.testing.assert_close(first.loss, second.loss)


@pytest.mark.parametrize("shape", SHAPES, ids=["learned", "sinusoidal", "modern"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, END])
def test_a_row_has_the_same_logits_alone_and_padded(side: str, pad: int, attention: str, shape: str) -> None:
    # Also for a row that ends with the token that pads: the mask tells which is which.
    model = classifier(**shape, pad_token_id=pad, score_bias=True)
    model.set_attn_implementation(attention)
    ids, mask = padded(ROWS, side, pad)
    together = model(ids, attention_mask=mask).logits
    for row, logits in zip(ROWS, together, strict=True):
        alone = torch.tensor([row])
        single = model(alone, attention_mask=torch.ones_like(alone)).logits[0]
        torch.testing.assert_close(logits, single, rtol=1e-5, atol=1e-5)
        # The head reads the hidden state of the row's last token.
        torch.testing.assert_close(single, model.score(model.model(alone).last_hidden_state[0, -1]))
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, together)


def test_rows_whose_end_is_unknown_are_refused() -> None:
    model = classifier()
    ids, _ = padded(ROWS, "right")
    with pytest.raises(ValueError, match="where do these 4 rows end"):
        model(ids)
    with pytest.raises(ValueError, match="where do these 4 rows end"):
        classifier(pad_token_id=0)(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(model(ids[:1]).logits, model(ids[:1], attention_mask=torch.ones(1, 8)).logits)


def test_only_the_rows_last_tokens_reach_the_head() -> None:
    model = classifier()
    ids = torch.randint(VOCAB, (3, 8))
    counts = []
    for run in (lambda: model.model(ids), lambda: model(ids, attention_mask=torch.ones_like(ids))):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 3 * WIDTH * LABELS


@pytest.mark.parametrize("head", AUTO)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["classic", "modern"])
def test_a_head_is_put_on_a_language_model_and_saved(head: Any, shape: dict[str, Any], tmp_path: Path) -> None:
    base = randomize(GPTKitForCausalLM(GPTKitConfig(**SHAPE, max_position_embeddings=CONTEXT, **shape)))
    base.save_pretrained(tmp_path / "base")
    options = {} if head is GPTKitForQuestionAnswering else {"num_labels": LABELS}
    model, report = AUTO[head].from_pretrained(tmp_path / "base", output_loading_info=True, **options)
    assert type(model) is head
    new = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert set(report["missing_keys"]) == new
    assert not report["unexpected_keys"]
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(model.model(ids).last_hidden_state, base.model(ids).last_hidden_state)
    randomize(model).save_pretrained(tmp_path / "head")
    again = AUTO[head].from_pretrained(tmp_path / "head")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert len(model.model.layers) == LAYERS
    assert model.config.n_head == HEADS


@pytest.mark.usefixtures("logged")
def test_the_pipeline_names_the_labels(tmp_path: Path) -> None:
    names = {0: "ham", 1: "spam", 2: "other"}
    model = classifier(vocab_size=257, id2label=names, label2id={name: i for i, name in names.items()}, num_labels=3)
    model.save_pretrained(tmp_path)
    save_tokenizer(get_encoding("bytes"), tmp_path, model_max_length=CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["free!", "see you", "x"]
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    found = classify(texts, batch_size=3, top_k=None)
    for text, scores in zip(texts, found, strict=True):
        logits = model(torch.tensor([list(text.encode())])).logits[0]
        expected = dict(zip(names.values(), logits.softmax(-1).tolist(), strict=True))
        assert {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in scores} == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", AUTO)
def test_a_classifier_is_safe_to_load_but_no_language_model(head: Any, tied: bool, tmp_path: Path) -> None:
    head(config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    check_model_folder(tmp_path)
    kind = head.__name__.removeprefix("GPTKit")
    with pytest.raises(UsageError, match=rf"holds a GPTKit{kind}, which labels text .*; load it with AutoModel{kind}"):
        find_model_folder(str(tmp_path))
