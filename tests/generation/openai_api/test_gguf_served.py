"""OpenAI's API over a GGUF file: the same answers as over the model that the file was written from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served_model import Served, serving, serving_engine
from tiny_model import CHAT_TEMPLATE, CONTEXT, write_tiny_model

from gpt_kit_hf.generation.openai_api.app import Defaults

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'gpt-kit-hf[llama]'")

from gguf_models import write_tiny_gguf

from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel

CLOSE = 5e-3  # llama.cpp looks GELU up in a table of 16-bit numbers


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """The GGUF file and the model, served."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, chat_template=CHAT_TEMPLATE)
    write_tiny_gguf(folder, folder / "tiny.gguf", chat_template=CHAT_TEMPLATE)
    engine = LlamaCppModel(folder / "tiny.gguf", slots=4, threads=1)
    with serving_engine("tiny.gguf", engine, Defaults()) as one, serving(folder) as other:
        yield one, other


def completed(served: Served, **body: Any) -> dict[str, Any]:
    how = {"prompt": "fox", "max_tokens": 16, "temperature": 0, **body}
    answer = served.client.completions.create(model=served.name, **how).model_dump()
    return {name: answer[name] for name in ("object", "choices", "usage")}


def chatted(served: Served, **body: Any) -> dict[str, Any]:
    how = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 0, **body}
    answer = served.client.chat.completions.create(model=served.name, **how).model_dump()
    return {name: answer[name] for name in ("object", "choices", "usage")}


def rounded(value: Any) -> Any:
    """Numbers compared within rounding, the rest as it is."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return pytest.approx(value, abs=CLOSE) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"prompt": ["fox", "dog"], "n": 2},
        {"prompt": list(b"token ids")},
        {"max_tokens": None},
        {"logprobs": 3},
        {"logprobs": 0, "echo": True},
        {"echo": True, "max_tokens": 0},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"logit_bias": {"122": 2.5}, "logprobs": 1},
        {"logit_bias": {"256": 100}},
    ],
    ids=str,
)
def test_completions_are_those_of_the_model(both: tuple[Served, Served], body: dict[str, Any]) -> None:
    one, other = both
    expected = completed(other, **body)
    assert completed(one, **body) == rounded(expected)
    if body == {}:
        text = expected["choices"][0]["text"]
        assert len(set(text)) > 2  # or a wrong prompt might not show
        cut = completed(one, stop=[text[4:6], "never"])["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (text[: text.index(text[4:6])], "stop")


def test_chats_are_those_of_the_model(both: tuple[Served, Served]) -> None:
    one, other = both
    for body in ({}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}):
        assert chatted(one, **body) == rounded(chatted(other, **body))
    turns = [{"role": "user", "content": "hi"}]
    answers = [served.client.responses.create(model=served.name, input=turns, temperature=0) for served in both]
    assert answers[0].output_text == answers[1].output_text != ""


def test_a_stream_joined_is_the_whole_answer(both: tuple[Served, Served]) -> None:
    served = both[0]
    for how in ({}, {"seed": 4, "temperature": 1.2}, {"logprobs": 2}):
        whole = completed(served, **how)
        stream = served.client.completions.create(
            model=served.name,
            prompt="fox",
            stream=True,
            stream_options={"include_usage": True},
            **{"max_tokens": 16, "temperature": 0, **how},
        )
        events = list(stream)
        parts = [choice for event in events for choice in event.choices]
        assert len(parts) > 8
        assert "".join(part.text for part in parts) == whole["choices"][0]["text"]
        assert parts[-1].finish_reason == whole["choices"][0]["finish_reason"]
        assert events[-1].usage.model_dump() == whole["usage"]


def test_requests_at_once_do_not_mix(both: tuple[Served, Served]) -> None:
    one, other = both
    prompts = [f"{word} {number}" for number in range(4) for word in ("fox", "dog")]
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        found[prompt] = completed(one, prompt=prompt, seed=1)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: completed(other, prompt=prompt)["choices"][0]["text"] for prompt in prompts}


def test_what_cannot_be_answered_is_refused_as_for_the_model(both: tuple[Served, Served]) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x" * CONTEXT}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": [300]}),
        ("/v1/completions", {"prompt": "x", "top_k": 300}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|endoftext|>"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}], "temperature": -1}),
    ):
        assert both[0].error(path, **body) == both[1].error(path, **body)


def test_a_client_that_goes_away_frees_its_slot(both: tuple[Served, Served]) -> None:
    served = both[0]
    for _ in range(6):  # more than there are slots
        stream = served.client.completions.create(model=served.name, prompt="f", max_tokens=60, stream=True)
        next(iter(stream))
        stream.close()
    assert completed(served)["choices"][0]["text"]


def test_the_answer_of_the_engine_is_not_reached_without_its_key(both: tuple[Served, Served]) -> None:
    import http.client

    connection = http.client.HTTPConnection(both[0].model._server._address, timeout=30)
    connection.request("POST", "/completion", json.dumps({"prompt": "fox", "n_predict": 1}))
    assert connection.getresponse().status == 401
    connection.close()


def test_an_unknown_model_is_refused(both: tuple[Served, Served], tmp_path: Path) -> None:
    with pytest.raises(openai.NotFoundError, match=r"this server serves 'tiny\.gguf'"):
        both[0].client.completions.create(model="other", prompt="x")
