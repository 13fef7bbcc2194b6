"""The page of models in Chromium: what it shows equals plain forward passes, and text of a model stays text."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, Page
from foreign_models import write_model
from starlette.types import ASGIApp
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gpt_kit_hf import get_chat_template
from gpt_kit_hf.evaluation.attention_maps import attention_weights
from gpt_kit_hf.pages.models import Models
from gpt_kit_hf.pages.play import PlayPage

TEXT = "The king sees 😀\nthe sea"
ATTACK = "<img src=x onerror=window.attacked=1><script>window.attacked=1</script>"
IDS = [256, *TEXT.encode()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("browser")
    write_tiny_model(root / "kit")
    write_tiny_model(root / "<b>tuned<b>", chat_template=get_chat_template("default"), context=256)
    write_hostile_model(root / "hostile")
    for step in (5, 10):
        shutil.copytree(root / "kit", root / "run" / "checkpoints" / f"step-{step:08d}")
    return {path.name.replace("<b>", ""): path for path in root.iterdir()}


def write_hostile_model(folder: Path) -> None:
    """Write a GPT-2 with a token that is HTML, which it expects first, and which its chat template writes."""
    write_model("gpt2", folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer.add_tokens([ATTACK])
    tokenizer.chat_template = "{% for message in messages %}" + ATTACK + "{{ message['content'] }}{% endfor %}"
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        start = torch.tensor([[tokenizer.bos_token_id]])
        hidden = model.transformer(start).last_hidden_state[0, 0]
        model.transformer.wte.weight[-1] = 5 * hidden
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def url(folders: dict[str, Path], served: Callable[[ASGIApp], str]) -> Iterator[str]:
    play = PlayPage(Models([str(folders[name]) for name in ("kit", "tuned", "hostile", "run")]))
    yield served(play.app())
    play.work.end()


@pytest.fixture
def page(chromium: Browser, url: str) -> Iterator[Page]:
    """The page, ready, with the model "kit"; at the end, nothing went wrong on it, and it asked only its server."""
    with chromium.page() as page:
        page.open(url)
        page.wait("document.body.dataset.state === 'ready'")
        yield page
        assert page.js(
            "window.attacked === undefined && document.querySelector('img, #model b, main script') === null"
        )
        assert page.problems == []
        assert {request.startswith((url, "data:,")) for request in page.requests} == {True}


def write(page: Page, text: str) -> None:
    page.write("#text", text)
    shown = f"[...document.querySelectorAll('#tokens [data-id]')].length === {len(text.encode())}"
    page.wait(f"document.body.dataset.state === 'ready' && {shown}")


def use(page: Page, key: str) -> None:
    page.choose("#model", key)
    page.wait(
        f"document.body.dataset.state === 'ready' && document.querySelector('#model').value === {json.dumps(key)}"
    )


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folders["kit"]).eval()


@pytest.fixture(scope="module")
def logprobs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0].double().log_softmax(-1)


def numbers(page: Page, selector: str, name: str) -> list[float]:
    return [float(each) for each in page.data(selector, name)]


def alphas(page: Page, selector: str) -> list[float]:
    """How opaque the background of each element is."""
    colours = page.js(f"[...document.querySelectorAll({selector!r})].map(e => getComputedStyle(e).backgroundColor)")
    return [float(re.split(r"[/,)]", colour)[-2]) for colour in colours]


def test_numbers_and_colours_are_those_of_a_forward_pass(page: Page, logprobs: torch.Tensor) -> None:
    write(page, TEXT)
    tokens = "#tokens .token[data-id]"
    expected = [float(logprobs[t, token]) for t, token in enumerate(IDS[1:])]
    assert numbers(page, tokens, "logprob") == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert numbers(page, tokens, "rank") == [
        1 + int((logprobs[t] > logprobs[t, token]).sum()) for t, token in enumerate(IDS[1:])
    ]
    entropies = [float(-(row.exp() * row).sum()) for row in logprobs[:-1]]
    assert numbers(page, tokens, "entropy") == pytest.approx(entropies, abs=1e-5)
    # A token of 12 bits or more has the full colour.
    strengths = [min(1.0, -each / math.log(2) / 12) for each in expected]
    assert alphas(page, tokens) == pytest.approx([0.85 * each for each in strengths], abs=2e-3)
    page.choose("#colour", "entropy")
    assert alphas(page, tokens) == pytest.approx([0.85 * each / math.log(257) for each in entropies], abs=2e-3)
    best = logprobs[-1].topk(10)
    assert numbers(page, "#candidates button", "id") == best.indices.tolist()
    assert numbers(page, "#candidates button", "probability") == pytest.approx(best.values.exp().tolist(), abs=1e-5)
    page.click("#tokens [data-n='3']")
    page.wait("document.querySelector('#side-title').textContent === 'At “·”'")
    best = logprobs[3].topk(10)
    assert numbers(page, "#candidates button", "id")[:10] == best.indices.tolist()
    loss = -sum(expected) / len(expected)
    assert numbers(page, "#scores", "loss") == pytest.approx([loss], abs=1e-5)
    bits_per_byte = loss * len(expected) / math.log(2) / len(TEXT.encode())
    assert numbers(page, "#scores", "bitsPerByte") == pytest.approx([bits_per_byte], abs=1e-5)
    assert f"{bits_per_byte:.3f}" in page.texts("#scores dd")
    assert numbers(page, "#loss-bars i", "bits") == pytest.approx([-each / math.log(2) for each in expected], rel=1e-5)


def test_each_tab_shows_a_forward_pass(page: Page, model: PreTrainedModel, logprobs: torch.Tensor) -> None:
    write(page, TEXT)
    page.click("[data-tab=sampling]")
    page.choose("#temperature", "0.5")
    page.choose("#top-k", "3")
    page.wait("document.querySelectorAll('#sampling-bars .cut').length === 21")
    best = (logprobs[-1] / 0.5).topk(3)
    assert numbers(page, "#sampling-bars div", "after")[:3] == pytest.approx(
        best.values.softmax(-1).tolist(), abs=1e-5
    )
    before = logprobs[-1].exp().topk(24).values.tolist()
    assert numbers(page, "#sampling-bars div", "before") == pytest.approx(before, abs=1e-5)
    page.click("[data-tab=attention]")
    page.wait("document.querySelectorAll('#attention-tokens .token').length > 0")
    page.choose("#head", "1")
    page.wait("document.querySelector('#heads .selected').dataset.head === '1'")
    weights = attention_weights(model, IDS)[0, 1]
    assert numbers(page, "#attention-tokens .token", "weight") == pytest.approx(weights[-1].tolist(), abs=1e-5)
    page.click("#attention-tokens [data-n='4']")
    assert page.data("#attention-tokens .token", "weight")[5:] == [""] * (len(IDS) - 5)
    assert numbers(page, "#attention-tokens .token:nth-child(-n+5)", "weight") == pytest.approx(
        weights[4, :5].tolist(), abs=1e-5
    )
    page.click("[data-tab=lens]")
    page.wait("document.querySelectorAll('#lens td').length === 24")
    last = logprobs[-12:].exp().max(-1)
    assert numbers(page, "#lens td[data-layer='1']", "id") == last.indices.tolist()
    assert numbers(page, "#lens td[data-layer='1']", "probability") == pytest.approx(last.values.tolist(), abs=1e-5)
    page.click("[data-tab=compare]")
    page.choose("#other", "3/step-00000010")
    page.wait("document.querySelectorAll('#pieces .token').length > 0")
    assert "".join(page.texts("#pieces .token")) == TEXT.replace("\n", "↵\n")
    assert numbers(page, "#pieces .token", "a") == numbers(page, "#pieces .token", "b")
    page.click("[data-tab=chat]")
    page.wait("!document.querySelector('#absent').hidden")
    assert page.texts("#absent") == ["The tokenizer of this model has no chat template."]


def test_a_text_is_generated_and_continued_from_an_alternative(page: Page, folders: dict[str, Path]) -> None:
    write(page, "The king")
    page.choose("#temperature", "0")
    page.choose("#new-tokens", "12")
    page.click("#generate")
    page.wait("document.querySelector('#ended').textContent === '12 tokens were added'")
    ids = torch.tensor([[256, *b"The king"]])
    model = AutoModelForCausalLM.from_pretrained(folders["kit"])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = bytes(expected[0, 1:].tolist()).decode()
    page.wait("document.body.dataset.state === 'ready' && !document.querySelector('#generate').hidden")
    assert page.js("document.querySelector('#text').value") == text
    page.click("#tokens [data-n='4']")
    page.wait("document.querySelector('#tokens [data-n=\"4\"].selected') !== null")
    chosen = int(page.data("#candidates li:nth-child(2) button", "id")[0])
    page.click("#candidates li:nth-child(2) button")
    page.wait("document.querySelectorAll('#tokens [data-id]').length === 5")
    assert page.js("document.querySelector('#text').value") == "The " + chr(chosen)


def test_what_is_typed_while_a_text_is_generated_stays(page: Page) -> None:
    for new_tokens, shown in (("3", "#ended:not(:empty)"), ("50", "#tokens [data-n='12']")):
        write(page, "The king")
        page.choose("#new-tokens", new_tokens)
        page.click("#generate")
        page.wait(f"document.querySelector({json.dumps(shown)}) !== null")
        write(page, "sea")
        page.wait("!document.querySelector('#generate').hidden")
        page.settle()
        assert page.js("document.querySelector('#text').value") == "sea"
        assert "".join(page.texts("#tokens [data-id]")) == "sea"


def test_html_of_a_model_is_shown_as_text(page: Page) -> None:
    write(page, "<img src=x onerror=window.attacked=1>")
    page.js("document.querySelector('#text').value = ''")
    use(page, "2")
    assert page.texts("#candidates .spelled")[0] == ATTACK  # what it expects first
    page.choose("#temperature", "0")
    page.choose("#new-tokens", "1")
    page.click("#generate")
    page.wait("document.querySelector('#tokens [data-id]') !== null && !document.querySelector('#generate').hidden")
    assert page.texts("#tokens [data-id]") == [ATTACK]
    assert page.js("document.querySelector('#text').value") == ATTACK
    for tab, shown in (
        ("sampling", "#sampling-bars div"),
        ("attention", "#attention-tokens .token"),
        ("lens", "#lens td"),
        ("compare", "#pieces .token"),
    ):
        page.click(f"[data-tab={tab}]")
        page.wait(f"document.querySelector({json.dumps(shown)}) !== null")
    page.click("[data-tab=chat]")
    page.write("#line", ATTACK + "?")
    page.click("#say .strong")
    page.wait("document.querySelectorAll('#conversation .token').length > 0")
    assert page.texts(".turn.user") == [ATTACK + "?"]
    assert ATTACK in page.texts("#conversation .token")


def test_a_conversation_in_the_form_of_the_template(page: Page, folders: dict[str, Path]) -> None:
    use(page, "1")
    assert page.texts("#model option")[1] == "<b>tuned<b>"
    page.choose("#temperature", "0")
    page.choose("#new-tokens", "8")
    page.click("[data-tab=chat]")
    page.write("#line", "Hi?")
    page.click("#say .strong")
    page.wait("document.querySelectorAll('#conversation .trained').length > 0")
    tokenizer = AutoTokenizer.from_pretrained(folders["tuned"])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    model = AutoModelForCausalLM.from_pretrained(folders["tuned"])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    assert page.texts(".turn") == ["Hi?", answer]
    assert "".join(page.texts("#conversation [data-role=assistant].trained")).startswith(answer)
    assert page.js("document.querySelector('#conversation [data-role=user].trained')") is None


def test_the_curves_of_a_run_are_drawn(page: Page, folders: dict[str, Path]) -> None:
    metrics = folders["run"] / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 4 - step / 10, "tokens": 8} for step in range(1, 11)]
    metrics.write_text("".join(json.dumps(each) + "\n" for each in records))
    page.click("[data-tab=curves]")
    assert page.texts("#absent") == ["This model is not in the folder of its run."]
    use(page, "3/step-00000010")
    page.wait("document.querySelector('#curves [data-name=run]') !== null")
    assert page.texts("#curves-note span") == [" run (interrupted)"]
    metrics.unlink()


def test_the_newest_checkpoint_is_offered(chromium: Browser, url: str, folders: dict[str, Path]) -> None:
    with chromium.page() as page:
        page.open(url)
        page.wait("document.body.dataset.state === 'ready'")
        use(page, "3/step-00000010")
        assert "parameters · 1 layer · context 64" in page.texts("#facts")[0]
        newer = folders["run"] / "checkpoints" / "step-00000015"
        shutil.copytree(folders["kit"], newer)
        try:
            page.js("window.dispatchEvent(new Event('focus'))")  # or it looks every five seconds
            page.wait("!document.querySelector('#newer').hidden")
            assert page.texts("#newer") == ["Use the newer run, step 15"]
            page.click("#newer")
            page.wait("document.querySelector('#model').value === '3/step-00000015'")
            page.wait("document.body.dataset.state === 'ready' && document.querySelector('#newer').hidden")
        finally:
            shutil.rmtree(newer)
        assert page.problems == []
