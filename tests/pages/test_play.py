"""What the page of models answers, against plain forward passes, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import write_model
from run_folders import write_run
from starlette.testclient import TestClient
from tiny_model import CHAT_TEMPLATE, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import get_chat_template
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import StoppedError, UsageError
from gpt_kit_hf.evaluation.attention_maps import attention_weights
from gpt_kit_hf.evaluation.score import score_model
from gpt_kit_hf.generation import http_server
from gpt_kit_hf.options.evaluation import ScoreOptions
from gpt_kit_hf.pages import server
from gpt_kit_hf.pages.models import Models
from gpt_kit_hf.pages.play import PlayPage, play
from gpt_kit_hf.pages.views import read_view
from gpt_kit_hf.pages.work import Work
from gpt_kit_hf.tokenization.chat_templates import render_chat

TEXT = "The king sees the naïve 😀 sea.\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of several kinds, and an unfinished run with two checkpoints."""
    root = tmp_path_factory.mktemp("play")
    write_tiny_model(root / "kit")
    write_tiny_model(root / "tuned", chat_template=get_chat_template("default"), context=256)
    for kind in ("gpt2", "llama"):
        write_model(kind, root / kind)
    for step in (5, 10):
        shutil.copytree(root / "kit", root / "run" / "checkpoints" / f"step-{step:08d}")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    places = [str(folders[name]) for name in ("kit", "gpt2", "llama", "tuned", "run")]
    page = PlayPage(Models(places))
    with TestClient(page.app(), base_url="http://127.0.0.1") as client:
        yield client
    page.work.end()


KEYS = {"kit": "0", "gpt2": "1", "llama": "2", "tuned": "3"}


def post(client: TestClient, path: str, name: str = "kit", **fields: Any) -> Any:
    answer = client.post(f"/{path}", json={"page": "test", "model": KEYS.get(name, name), **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, name: str = "kit", **fields: Any) -> str:
    answer = client.post(f"/{path}", json={"page": "test", "model": KEYS.get(name, name), **fields})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]
    assert "\n" not in message
    return str(message)


def plain(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of a plain forward pass, (T, V)."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["kit", "gpt2", "llama"])
def test_reading_is_a_plain_forward_pass(client: TestClient, folders: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    whole = [tokenizer.bos_token_id, *ids]
    logprobs = plain(folders[name], whole)
    found = post(client, "read", name, text=TEXT)
    assert found["ids"] == ids
    assert [token["id"] for token in found["tokens"]] == ids
    for t, token in enumerate(found["tokens"]):
        row = logprobs[t]
        assert token["logprob"] == pytest.approx(float(row[ids[t]]), abs=1e-5)
        assert token["rank"] == 1 + int((row > row[ids[t]]).sum())
        assert token["expected"]["entropy"] == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-5)
        best = row.topk(10)
        assert [each[0] for each in token["expected"]["top"]] == best.indices.tolist()
        assert [each[2] for each in token["expected"]["top"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [each[0] for each in found["next"]["top"]] == logprobs[-1].topk(10).indices.tolist()
    loss = -sum(float(logprobs[t, token]) for t, token in enumerate(ids)) / len(ids)
    scores = found["scores"]
    assert scores["tokens"] == len(ids)
    assert scores["bytes"] == len(TEXT.encode())
    assert scores["loss"] == pytest.approx(loss, abs=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(loss * len(ids) / math.log(2) / len(TEXT.encode()), abs=1e-5)


@pytest.mark.parametrize("name", ["kit", "gpt2", "llama"])
def test_the_tokens_spell_the_text(client: TestClient, name: str) -> None:
    found = post(client, "read", name, text=TEXT)
    assert found["text"] == TEXT
    # A byte that is a part of a character is written as an escape.
    spelled = "".join(token["text"] for token in found["tokens"]).encode("latin-1", "backslashreplace")
    assert b"The king sees the" in spelled
    assert TEXT.encode() == b"".join(_bytes_of(token["text"]) for token in found["tokens"])


def _bytes_of(shown: str) -> bytes:
    return bytes.fromhex(shown.replace("\\x", "")) if shown.startswith("\\x") else shown.encode()


def test_ids_are_read_as_given(client: TestClient) -> None:
    text = post(client, "read", text="abc")
    assert post(client, "read", ids=text["ids"]) == text
    ended = post(client, "read", text="a<|endoftext|>b")
    assert [token["special"] for token in ended["tokens"]] == [False, True, False]
    assert ended["scores"]["bytes"] == 2  # a special token is no text
    assert "either text or ids" in refused(client, "read")
    assert "either text or ids" in refused(client, "read", text="a", ids=[1])
    assert "id 999" in refused(client, "read", ids=[999])
    assert "at most 8,192" in refused(client, "read", text="a" * 9000)


def test_a_long_text_is_scored_as_an_evaluation_scores_it(
    client: TestClient, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = "The king sees the naïve 😀 sea. " * 7  # more than three windows
    (tmp_path / "text.txt").write_text(text)
    expected = score_model(str(folders["kit"]), ScoreOptions(data=[str(tmp_path / "text.txt")])).evaluation
    found = post(client, "read", text=text)
    assert found["scores"]["tokens"] == expected.tokens == len(text.encode())
    assert found["scores"]["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert found["scores"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, abs=1e-5)
    # The text has 245 tokens with the first: windows begin at 0, 64, 128, and the last ends with it.
    whole = [256, *text.encode()]
    assert len(whole) == 246
    assert found["windows"] == [64, 128]
    for place, start in ((139, 128), (191, 128), (192, 181), (244, 181), (245, 182)):
        row = plain(folders["kit"], whole[start : place + 1])[-1]
        expects = found["tokens"][place]["expected"] if place < 245 else found["next"]
        assert expects["top"][0][2] == pytest.approx(float(row.max()), abs=1e-5), place
        lens = post(client, "lens", ids=found["ids"], position=place - 1)
        assert lens["layers"][-1][-1][0][2] == pytest.approx(float(row.max()), abs=1e-5), place
        assert len(lens["columns"]) == min(12, place + 1 - start)
    assert len(post(client, "lens", ids=found["ids"], position=129)["columns"]) == 3
    attention = post(client, "attention", ids=found["ids"], layer=0, head=0)
    assert (len(attention["tokens"]), attention["left_out"]) == (64, len(whole) - 64)
    end = post(client, "sampling", ids=found["ids"], sampling={})["bars"][0]
    assert end[:2] == found["next"]["top"][0][:2]
    assert lines(client, ids=found["ids"], sampling={}) == [{"end": "the model's context of 64 tokens is full"}]
    both = post(client, "compare", other=KEYS["tuned"], text=text)  # the same weights, in a longer context
    assert both["totals"][0]["loss"] == pytest.approx(expected.loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen"])
def test_a_text_begins_as_in_an_evaluation(kind: str, tmp_path: Path) -> None:
    write_model(kind, tmp_path / kind)
    (tmp_path / "text.txt").write_text(TEXT)
    expected = score_model(str(tmp_path / kind), ScoreOptions(data=[str(tmp_path / "text.txt")])).evaluation
    opened = Models([str(tmp_path / kind)]).open("0")
    found = read_view(opened, opened.encode(TEXT))["scores"]
    assert found["tokens"] == expected.tokens
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert found["bytes"] == len(TEXT.encode())


def test_a_token_that_cannot_come_has_no_number(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    models = Models([str(tmp_path)])
    weight = models.open("0").model.lm_head.weight
    with torch.no_grad():
        weight[ord("z")] = torch.inf  # its logits are infinite or NaN, as those of a model that went wrong
    page = PlayPage(models)
    client = TestClient(page.app(), base_url="http://127.0.0.1")
    found = post(client, "read", text="az")
    assert found["tokens"][1]["logprob"] is None
    assert found["scores"]["loss"] is None
    page.work.end()


def test_an_empty_text_is_what_begins_a_document(client: TestClient, folders: dict[str, Path]) -> None:
    found = post(client, "read", text="")
    assert (found["tokens"], found["scores"]) == ([], None)
    assert found["next"]["top"][0][0] == int(plain(folders["kit"], [256])[0].argmax())


def test_sampling_shows_both_distributions(client: TestClient, folders: dict[str, Path]) -> None:
    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    found = post(client, "sampling", text=TEXT, sampling=settings)
    row = plain(folders["kit"], [256, *TEXT.encode()])[-1]
    p = (row / 0.7).softmax(-1)
    top = p.topk(5)
    p = torch.zeros_like(p).scatter(0, top.indices, top.values / top.values.sum())
    sums = p.sort(descending=True).values.cumsum(0)
    n_kept = 1 + int((sums[:5] < 0.9).sum())
    keep = p.topk(n_kept)
    after = dict(zip(keep.indices.tolist(), (keep.values / keep.values.sum()).tolist(), strict=True))
    assert found["kept"] == n_kept
    for token, _, before, drawn in found["bars"]:
        assert before == pytest.approx(float(row[token].exp()), abs=1e-5)
        assert drawn == pytest.approx(after.get(token, 0.0), abs=1e-5)
    kept = sum(float(row[token].exp()) for token in after)
    assert found["cut"] == pytest.approx(1 - kept, abs=1e-5)
    for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 0.1}):
        assert refused(client, "sampling", text="a", sampling=wrong).startswith("sampling.")


def lines(client: TestClient, name: str = "kit", **fields: Any) -> list[dict[str, Any]]:
    answer = client.post("/generate", json={"page": "test", "model": KEYS[name], **fields})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("name", ["kit", "llama"])
def test_generating_is_transformers_generate(client: TestClient, folders: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids = tokenizer.encode("The king", add_special_tokens=False)
    whole = torch.tensor([[tokenizer.bos_token_id, *ids]])
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=12, do_sample=False)
    new = expected[0, whole.shape[1] :].tolist()
    *found, end = lines(client, name, ids=ids, sampling={"temperature": 0}, max_new_tokens=12)
    assert [line["token"]["id"] for line in found] == new
    assert found[-1]["text"] == tokenizer.decode([*ids, *new])
    assert end == {"end": "12 tokens were added"}
    read = post(client, "read", name, ids=[*ids, *new])
    assert [line["token"] for line in found] == read["tokens"][-12:]
    assert found[-1]["next"] == read["next"]


def test_generating_ends_for_a_reason(client: TestClient, folders: dict[str, Path]) -> None:
    full = lines(client, text="a" * 60, sampling={"temperature": 0}, max_new_tokens=20)
    assert len(full) == 4
    assert lines(client, text="a", sampling={}, max_new_tokens=1)[-1] == {"end": "1 token was added"}
    assert full[-1] == {"end": "the model's context of 64 tokens is full"}
    same = [lines(client, text="a", sampling={"temperature": 2.0}, max_new_tokens=8, seed=3) for _ in range(2)]
    other = lines(client, text="a", sampling={"temperature": 2.0}, max_new_tokens=8, seed=4)
    assert same[0] == same[1] != other
    opened = Models([str(folders["kit"])])
    page = PlayPage(opened)
    likeliest = post(client, "read", text="a")["next"]["top"][0][0]
    opened.open("0").eos_ids = [likeliest]
    ended = lines(TestClient(page.app(), base_url="http://127.0.0.1"), text="a", sampling={"temperature": 0})
    page.work.end()
    assert len(ended) == 1
    assert ended[0]["end"].startswith("the model ended the text: it chose ")


@pytest.mark.parametrize("name", ["kit", "gpt2", "llama"])
def test_attention_is_that_of_a_forward_pass(client: TestClient, folders: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids = tokenizer.encode("The king", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    expected = attention_weights(model, [tokenizer.bos_token_id, *ids])
    layer = len(expected) - 1
    found = post(client, "attention", name, ids=ids, layer=layer, head=1)
    assert (found["layers"], found["heads"], found["left_out"]) == (*expected.shape[:2], 0)
    assert len(found["tokens"]) == len(ids) + 1
    for t, row in enumerate(found["weights"]):
        assert row == pytest.approx(expected[layer, 1, t, : t + 1].tolist(), abs=1e-6)
    assert "from 0 to below" in refused(client, "attention", name, ids=ids, layer=9, head=0)
    size = model.config.vocab_size
    for wrong in (-1, size, 2**70):
        message = f"the text holds id {wrong}; ids are from 0 to below vocab_size={size}"
        assert refused(client, "attention", name, ids=[*ids, wrong], layer=0, head=0) == message
        assert refused(client, "lens", name, ids=[*ids, wrong], position=0) == message
        assert refused(client, "sampling", name, ids=[*ids, wrong], sampling={}) == message


def test_the_lens_says_what_the_model_says_at_its_end(client: TestClient, folders: dict[str, Path]) -> None:
    ids = list(b"The king sees the sea")
    found = post(client, "lens", ids=ids, position=14)
    row = plain(folders["kit"], [256, *ids])
    assert "".join(column["text"] for column in found["columns"]) == "The king sees the sea"[3:15]
    assert "".join(column["next"] for column in found["columns"]) == "The king sees the sea"[4:16]
    for n, cell in enumerate(found["layers"][-1]):
        best = row[4 + n].topk(5)
        assert [each[0] for each in cell] == best.indices.tolist()
        assert [each[2] for each in cell] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert "position=21" in refused(client, "lens", ids=ids, position=21)


def test_two_models_are_compared_on_the_pieces_they_share(client: TestClient, folders: dict[str, Path]) -> None:
    found = post(client, "compare", "kit", other=KEYS["gpt2"], text=TEXT)
    assert "".join(piece["text"] for piece in found["pieces"]) == TEXT
    totals = []
    for name, side in (("kit", "a"), ("gpt2", "b")):
        read = post(client, "read", name, text=TEXT)
        total = sum(token["logprob"] for token in read["tokens"])
        assert sum(piece[side] for piece in found["pieces"]) == pytest.approx(total, abs=1e-4)
        totals.append(read["scores"])
    for score, total in zip(totals, found["totals"], strict=True):
        assert total["bits_per_byte"] == pytest.approx(score["bits_per_byte"], abs=1e-6)
    differences = [abs(piece["b"] - piece["a"]) for piece in found["pieces"]]
    most = [abs(each["difference"]) for each in found["most"]]
    assert most == pytest.approx(sorted(differences, reverse=True)[: len(most)])
    assert "empty" in refused(client, "compare", other=KEYS["gpt2"], text="")


def test_a_model_is_the_same_as_itself(client: TestClient) -> None:
    found = post(client, "compare", "kit", other="4/step-00000010", text=TEXT)
    assert {piece["b"] - piece["a"] for piece in found["pieces"]} == {0.0}


def test_a_conversation_shows_roles_and_what_is_trained(client: TestClient, folders: dict[str, Path]) -> None:
    messages = [
        {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Oh."}, {"role": "user", "content": "é"},
        {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    found = post(client, "conversation", "tuned", messages=messages)
    tokenizer = AutoTokenizer.from_pretrained(folders["tuned"])
    ids, trained = render_chat(tokenizer, messages)
    assert [token["id"] for token in found["tokens"]] == ids
    assert [token["trained"] for token in found["tokens"]] == [bool(each) for each in trained]
    logprobs = plain(folders["tuned"], ids)
    for t, token in enumerate(found["tokens"][1:]):
        assert token["logprob"] == pytest.approx(float(logprobs[t, ids[t + 1]]), abs=1e-5)
    assert found["marks_answers"]
    by_role = {role: [t for t in found["tokens"] if t["role"] == role] for role in ("user", "assistant")}
    assert all(token["role"] == "assistant" for token in found["tokens"] if token["trained"])
    assert "Hi?" in "".join(token["text"] for token in by_role["user"])
    assert "Oh." in "".join(token["text"] for token in by_role["assistant"])
    asked = post(client, "conversation", "tuned", messages=messages[:1])
    assert asked["tokens"][-1]["role"] == "answer"
    assert not any(token["trained"] for token in asked["tokens"])


def test_an_answer_is_generated_from_the_template(client: TestClient, folders: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": "Hi?"}]
    tokenizer = AutoTokenizer.from_pretrained(folders["tuned"])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folders["tuned"])
    whole = torch.tensor([ids])
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
    *found, _ = lines(client, "tuned", ids=[], messages=messages, sampling={"temperature": 0}, max_new_tokens=6)
    assert found[-1]["text"] == tokenizer.decode(expected[0, len(ids) :])


def test_conversations_that_cannot_be_written_are_refused(client: TestClient) -> None:
    assert "no chat template" in refused(client, "conversation", messages=[{"role": "user", "content": "a"}])
    special = [{"role": "user", "content": "a <|endoftext|>"}]
    assert "special token" in refused(client, "conversation", "tuned", messages=special)
    assert "empty" in refused(client, "conversation", "tuned", messages=[])
    assert "role" in refused(client, "conversation", "tuned", messages=[{"role": "x", "content": "a"}])


def test_a_template_without_marks_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    write_tiny_model(tmp_path, chat_template=CHAT_TEMPLATE)
    page = PlayPage(Models([str(tmp_path)]))
    client = TestClient(page.app(), base_url="http://127.0.0.1")
    found = post(client, "conversation", messages=[{"role": "user", "content": "a"}])
    page.work.end()
    assert not found["marks_answers"]


# --- which models there are


def test_checkpoints_of_a_run_can_be_chosen(client: TestClient, folders: dict[str, Path]) -> None:
    listed = client.get("/models").json()
    assert [each["key"] for each in listed] == ["0", "1", "2", "3", "4/step-00000010", "4/step-00000005"]
    assert [each["step"] for each in listed[-2:]] == [10, 5]
    assert post(client, "read", "4/step-00000005", text="a") == post(client, "read", "kit", text="a")
    newer = folders["run"] / "checkpoints" / "step-00000015"
    shutil.copytree(folders["kit"], newer)
    try:
        assert client.get("/models").json()[4]["key"] == "4/step-00000015"
        facts = post(client, "open", "4/step-00000015")
        assert (facts["step"], facts["label"]) == (15, "run, step 15")
        shutil.rmtree(newer)  # the run goes on, and a loaded model stays
        assert post(client, "read", "4/step-00000015", text="a") == post(client, "read", "kit", text="a")
    finally:
        shutil.rmtree(newer, ignore_errors=True)


def test_a_model_whose_weights_are_replaced_is_loaded_again(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_tiny_model(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(other)
    models = Models([str(run)])
    page = PlayPage(models)
    client = TestClient(page.app(), base_url="http://127.0.0.1")

    def expected() -> list[float]:
        return [each[2] for each in post(client, "read", text="abc")["next"]["top"]]

    def true() -> list[float]:
        values: list[float] = plain(run, [256, *b"abc"])[-1].topk(10).values.tolist()
        return values

    before = expected()
    assert before == pytest.approx(true(), abs=1e-5)
    opened = models.open("0")
    assert models.open("0") is opened
    (other / "model.safetensors").replace(run / "model.safetensors")  # as a resumed run publishes
    assert expected() == pytest.approx(true(), abs=1e-5)
    assert expected() != pytest.approx(before, abs=1e-3)
    page.work.end()


def test_labels_tell_places_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / side / "run" for side in ("x", "y")]
    for run in runs:
        write_run(run, 2, checkpoints=(2,))
        (run / "config.json").write_text("{}")
    monkeypatch.chdir(runs[0])
    page = PlayPage(Models([".", str(runs[1]), "someone/run"]))
    client = TestClient(page.app(), base_url="http://127.0.0.1")
    labels = [each["label"] for each in client.get("/models").json()]
    assert labels == ["x/run", "x/run, step 2", "y/run", "y/run, step 2", "someone/run"]
    assert [run["name"] for run in client.get("/curves").json()] == ["x/run", "y/run"]
    page.work.end()
    assert [each.label for each in Models(["."]).entries()] == ["run", "run, step 2"]


def test_parts_that_a_model_lacks_have_a_reason(client: TestClient) -> None:
    absent = post(client, "open", "gpt2")["absent"]
    assert absent == {
        "attention": None,
        "lens": None,
        "chat": "The tokenizer of this model has no chat template.",
        "curves": "This model is not in the folder of its run.",
    }
    assert post(client, "open", "4/step-00000010")["absent"]["curves"] is None


def test_the_curves_are_those_of_the_runs(client: TestClient, folders: dict[str, Path]) -> None:
    assert [run["name"] for run in client.get("/curves").json()] == ["run"]
    metrics = folders["run"] / "metrics.jsonl"
    losses = [3.5, 3.25, 3.0]
    for step, loss in enumerate(losses, 1):
        with metrics.open("a") as file:
            file.write(json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n")
        rows = client.get("/curves").json()[0]["curves"]["train"]
        assert rows["steps"] == list(range(1, step + 1))
        assert rows["series"]["loss"]["value"] == losses[:step]
    metrics.write_text("no json\n")
    assert "metrics.jsonl" in client.get("/curves").json()[0]["error"]
    metrics.unlink()


def test_only_the_named_models_can_be_asked_for(client: TestClient, folders: dict[str, Path], tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other")
    others = (str(tmp_path / "other"), "../other", "0/../other", "4/step-00000007", "4/../../kit", "/etc", "", "9")
    for key in others:
        assert "unknown model" in refused(client, "read", key, text="a"), key
        assert "unknown model" in refused(client, "compare", other=key, text="a"), key
    for path in ("/config.json", "/model.safetensors", "/../play.py", "/models/0", "/play/main.js"):
        assert client.get(path).status_code in (404, 405), path


def test_the_first_model_is_loaded_before_the_page_opens(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for place, reason in ((tmp_path, "holds no model yet"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UsageError, match=reason):
            play([str(place)], announce=lambda _: None)


def test_the_command_serves_the_page_of_its_models(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[Any] = []

    def run(app: Any, listener: socket.socket, **_: Any) -> None:
        host, port = listener.getsockname()
        client = TestClient(app, base_url=f"http://{host}:{port}")
        answers.extend([host, port, client.get("/models").json(), client.get("/").text])

    monkeypatch.setattr(server, "run_until_signal", run)
    assert main(["play", str(folders["kit"]), str(folders["run"]), "--no_open"]) == 0
    host, port, models, page = answers
    assert capsys.readouterr().out == f"kit is open at: http://{host}:{port}/ (Ctrl-C stops)\n"
    assert host == "127.0.0.1"
    assert [each["key"] for each in models] == ["0", "1/step-00000010", "1/step-00000005"]
    assert "/main.js" in page


def test_missing_packages_are_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_PACKAGES", ("no_such_package",))
    with pytest.raises(UsageError, match=r"pip install 'gpt-kit-hf\[play\]'"):
        http_server.check_packages("the page", "play")


def test_a_newer_request_stops_an_older_one() -> None:
    import asyncio
    import threading

    async def run() -> tuple[list[Any], list[str]]:
        work, held, begun, done = Work(), threading.Event(), threading.Event(), []

        def first(stop: Any) -> str:
            begun.set()
            held.wait(20)
            return "stopped" if stop() else "not stopped"

        def other(name: str) -> Any:
            return lambda stop: done.append(name) or name

        tasks = [asyncio.create_task(work.run("a", first))]
        await asyncio.to_thread(begun.wait, 20)
        tasks += [asyncio.create_task(work.run(line, other(name))) for line, name in (("a", "a2"), ("b", "b1"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(work.run("a", other("a3"))))
        await asyncio.sleep(0)
        held.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        work.end()
        return found, done

    found, done = asyncio.run(run())
    assert found[0] == "stopped"
    assert isinstance(found[1], StoppedError)
    assert found[2:] == ["b1", "a3"]
    assert done == ["b1", "a3"]
