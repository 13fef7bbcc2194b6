"""Each parameter of OpenAI's API by OpenAI's client, over loopback, against plain forward passes and `generate`."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served_model import Served, serving
from tiny_model import CHAT_TEMPLATE, CONTEXT, write_tiny_model

from gpt_kit_hf import generate_text_autoregressive

N_NEW = 16
EOS = 256  # of the bytes encoding
GREEDY: dict[str, Any] = {"max_tokens": N_NEW, "temperature": 0}
ENDLESS: dict[str, Any] = {"max_tokens": 150_000, "temperature": 0, "logit_bias": {str(EOS): -100}}  # takes minutes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / "chat"
    write_tiny_model(folder, chat_template=CHAT_TEMPLATE)
    with serving(folder) as served:
        yield served


@pytest.fixture(scope="module")
def plain_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Without a chat template, with a context that takes minutes to fill, for pages of one origin."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    write_tiny_model(folder, context=200_000)
    with serving(folder, ["http://page.example"]) as served:
        yield served


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def continuation(served: Served, prompt: str, n_new: int = N_NEW, **how: Any) -> str:
    """What the package's own generation says to a prompt."""
    ids = torch.tensor(ids_of(prompt))
    out = generate_text_autoregressive(served.model.model, ids, n_new, eos_token_id=EOS, **how)
    return bytes(out[0, len(ids) :].tolist()).decode(errors="replace")


def logprobs_after(served: Served, text: str) -> torch.Tensor:
    """(T, V): the log-probabilities after each token of a text, by a plain forward pass."""
    with torch.no_grad():
        return served.model.model(torch.tensor([ids_of(text)])).logits[0].float().log_softmax(dim=-1)


def complete(served: Served, prompt: Any = "fox", **body: Any) -> Any:
    return served.client.completions.create(model=served.name, prompt=prompt, **{**GREEDY, **body})


def chat(served: Served, *messages: Any, **body: Any) -> Any:
    turns = [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
    return served.client.chat.completions.create(model=served.name, messages=turns, **{**GREEDY, **body})


# --- completions


def test_a_completion_is_the_models_own_continuation(served: Served) -> None:
    answer = complete(served)
    assert answer.object == "text_completion"
    assert (answer.model, answer.id[:5]) == (served.name, "cmpl-")
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, continuation(served, "fox"), "length")
    assert choice.logprobs is None
    assert len(set(choice.text)) > 2  # or a wrong prompt might not show
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": N_NEW,
        "total_tokens": 3 + N_NEW,
    }


def test_prompts_may_be_texts_or_token_ids_one_or_several(served: Served) -> None:
    fox, quick = continuation(served, "fox"), continuation(served, "the quick")
    for prompt, expected in (
        ("fox", [fox]),
        (ids_of("fox"), [fox]),
        (["fox", "the quick"], [fox, quick]),
        ([ids_of("the quick"), ids_of("fox")], [quick, fox]),
    ):
        answer = complete(served, prompt)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == (3 if len(expected) == 1 else 12)


def test_a_stream_joined_is_the_answer(served: Served) -> None:
    chunks = list(complete(served, ["fox", "dog"], stream=True, n=2, stream_options={"include_usage": True}))
    texts, reasons = Counter[int](), {}
    joined = [""] * 4
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        joined[choice.index] += choice.text
        texts[choice.index] += 1
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    fox, dog = continuation(served, "fox"), continuation(served, "dog")
    assert joined == [fox, fox, dog, dog]
    assert min(texts.values()) > 1
    assert reasons == dict.fromkeys(range(4), "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage == complete(served, ["fox", "dog"], n=2).usage
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    plain = list(complete(served, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in plain)


def test_the_seed_makes_a_sample_repeatable(served: Served) -> None:
    torch.manual_seed(7)
    expected = continuation(served, "fox", temperature=0.9, top_k=20)
    how = {"temperature": 0.9, "extra_body": {"top_k": 20}}
    assert complete(served, seed=7, **how).choices[0].text == expected
    # A choice has the seed of the request plus its number.
    assert [c.text for c in complete(served, seed=5, n=3, **how).choices][2] == expected
    assert len({complete(served, temperature=1).choices[0].text for _ in range(4)}) > 1
    assert len({choice.text for choice in complete(served, temperature=1, n=4, seed=1).choices}) == 4
    for seed in (-(2**63), 2**63 - 1):
        assert complete(served, seed=seed, n=2, temperature=1).choices[0].text


def test_more_choices_than_are_generated_together(served: Served) -> None:
    answer = complete(served, n=11, temperature=1, seed=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(11))
    alone = [complete(served, temperature=1, seed=3 + i, max_tokens=4).choices[0].text for i in range(11)]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.completion_tokens == 44


def test_requests_sample_at_temperature_one_unless_they_say_otherwise(served: Served) -> None:
    create = served.client.completions.create
    torch.manual_seed(4)
    expected = continuation(served, "fox", temperature=1.0)
    assert create(model=served.name, prompt="fox", max_tokens=N_NEW, seed=4).choices[0].text == expected


def test_top_p_is_that_of_transformers(served: Served) -> None:
    ids, model = torch.tensor([ids_of("fox")]), served.model.model
    for top_p in (0.3, 0.7, 0.95):
        torch.manual_seed(2)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N_NEW,
            do_sample=True,
            temperature=1.3,
            top_k=0,
            top_p=top_p,
        )
        answer = complete(served, temperature=1.3, top_p=top_p, seed=2)
        assert answer.choices[0].text == bytes(out[0, 3:].tolist()).decode(errors="replace")
    assert complete(served, temperature=1, top_p=0).choices[0].text == continuation(served, "fox")


@pytest.mark.parametrize(("frequency", "presence"), [(1.5, 0.0), (0.0, 2.0), (0.7, -1.1)])
def test_penalties_are_those_of_openais_formula(frequency: float, presence: float, served: Served) -> None:
    text, counts = "fox", Counter[int]()
    for _ in range(N_NEW):
        scores = logprobs_after(served, text)[-1]
        for token, count in counts.items():
            scores[token] -= frequency * count + presence * (count > 0)
        counts[token := int(scores.argmax())] += 1
        text += chr(token)
    answer = complete(served, frequency_penalty=frequency, presence_penalty=presence)
    assert answer.choices[0].text == text[3:]
    assert text[3:] != continuation(served, "fox")


def test_logit_bias_is_added_to_the_logits(served: Served) -> None:
    first = ord(continuation(served, "fox")[0])
    logits = logprobs_after(served, "fox")[-1]
    second = int(logits.topk(2).indices[1])
    gap = float(logits[first] - logits[second])
    for bias, expected in ((gap * 0.9, first), (gap * 1.1, second)):
        assert complete(served, logit_bias={second: bias}, max_tokens=1).choices[0].text == chr(expected)
    assert complete(served, logit_bias={str(ord("q")): 100}).choices[0].text == "q" * N_NEW
    assert chr(first) not in complete(served, logit_bias={first: -100}).choices[0].text


def test_an_answer_ends_before_the_first_stop_string(served: Served) -> None:
    whole = continuation(served, "fox", 40)
    for stop in (whole[5:8], [whole[20:22], whole[5:6]], [whole[7], "not in it"], whole[:2], whole[-3:]):
        stops = [stop] if isinstance(stop, str) else stop
        at = min(whole.find(each) for each in stops if each in whole)
        (found,) = [each for each in stops if whole.find(each) == at]
        answer = complete(served, stop=stop, max_tokens=40)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:at], "stop")
        assert answer.usage.completion_tokens == at + len(found)
        chunks = list(complete(served, stop=stop, max_tokens=40, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"
    # A stop string that only begins at the end is text.
    answer = complete(served, stop=whole[38:40] + "\0", max_tokens=40)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole, "length")
    # The prompt is not searched.
    assert complete(served, stop="ox" + whole[0]).choices[0].text == whole[:N_NEW]


def test_eos_ends_an_answer_and_is_no_text(served: Served) -> None:
    answer = complete(served, logit_bias={EOS: 100}, logprobs=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].logprobs.tokens == []
    assert answer.usage.completion_tokens == 1


def test_an_answer_ends_where_the_context_does(served: Served) -> None:
    create = served.client.completions.create
    answer = create(model=served.name, prompt="x" * 50, temperature=0)
    assert answer.choices[0].text == continuation(served, "x" * 50, CONTEXT - 50)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT
    assert complete(served, "x" * 63, max_tokens=1000).usage.completion_tokens == 1


def test_logprobs_are_those_of_a_plain_forward_pass(served: Served) -> None:
    # Whatever the sampling is: they are the model's own.
    how: dict[str, Any] = {"temperature": 1.5, "logit_bias": {ord("q"): 2}, "presence_penalty": 1}
    answer = complete(served, logprobs=3, seed=1, extra_body={"top_k": 10}, **how)
    text, found = answer.choices[0].text, answer.choices[0].logprobs
    expected = logprobs_after(served, "fox" + text)[2:-1]
    assert found.tokens == list(text)
    assert found.text_offset == list(range(N_NEW))
    for i, token in enumerate(ids_of(text)):
        assert found.token_logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-4)
        best = expected[i].topk(3)
        top = {chr(int(j)): float(value) for value, j in zip(*best, strict=True)}
        top[chr(token)] = float(expected[i, token])
        assert found.top_logprobs[i] == pytest.approx(top, abs=1e-4)
    assert len({len(top) for top in found.top_logprobs}) == 2  # a sampled token is not always among the best
    none = complete(served, logprobs=0).choices[0].logprobs
    assert [set(top) for top in none.top_logprobs] == [{token} for token in none.tokens]


def test_streamed_logprobs_are_those_of_the_whole_answer(served: Served) -> None:
    whole = continuation(served, "fox", 40)
    for body in ({"max_tokens": 40}, {"max_tokens": 40, "stop": whole[9:12]}, {"echo": True}):
        expected = complete(served, logprobs=2, **body).choices[0]
        assert expected.logprobs.tokens == list(expected.text)
        chunks = [chunk.choices[0] for chunk in complete(served, logprobs=2, stream=True, **body)]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [each for chunk in chunks for each in getattr(chunk.logprobs, field)]
            assert joined == getattr(expected.logprobs, field)
        # A chunk has the tokens of its own text.
        assert ["".join(chunk.logprobs.tokens) for chunk in chunks] == [chunk.text for chunk in chunks]


def test_echo_scores_the_prompt(served: Served) -> None:
    text = "the quick fox"
    expected = logprobs_after(served, text)
    for prompt in (text, ids_of(text)):
        answer = complete(served, prompt, echo=True, logprobs=1, max_tokens=0)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert answer.usage.completion_tokens == 0
        found = choice.logprobs
        assert found.tokens == list(text)
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for i, token in enumerate(ids_of(text)[1:]):
            assert found.token_logprobs[i + 1] == pytest.approx(float(expected[i, token]), abs=1e-4)
        best = expected.argmax(dim=-1).tolist()
        assert all(chr(best[i]) in top for i, top in enumerate(found.top_logprobs[1:]))
    both = complete(served, text, echo=True, logprobs=0).choices[0]
    assert both.text == text + continuation(served, text)
    assert both.logprobs.text_offset == list(range(len(both.text)))
    assert complete(served, [text, "fox"], echo=True, n=2).choices[3].text == "fox" + continuation(served, "fox")
    # A prompt that fills the context can be scored.
    full = complete(served, "x" * CONTEXT, echo=True, max_tokens=0, logprobs=0).choices[0]
    assert len(full.logprobs.tokens) == CONTEXT


def test_tokens_that_are_parts_of_characters(served: Served) -> None:
    text = "né"
    answer = complete(served, text, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert answer.text == text
    assert answer.logprobs.tokens == ["n", r"bytes:\xc3", r"bytes:\xa9"]
    broken = complete(served, logit_bias={0xC3: 100}, max_tokens=3, logprobs=0).choices[0]
    assert broken.text == "\N{REPLACEMENT CHARACTER}" * 3
    assert broken.logprobs.tokens == [r"bytes:\xc3"] * 3
    chunks = [c.choices[0] for c in complete(served, logit_bias={0xC3: 100}, max_tokens=3, logprobs=0, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == broken.text
    assert [each for chunk in chunks for each in chunk.logprobs.tokens] == broken.logprobs.tokens
    found = chat(served, "fox", logit_bias={0xC3: 100}, max_tokens=1, logprobs=True).choices[0].logprobs.content
    assert [each.bytes for each in found] == [[0xC3]]


# --- chat


def test_a_chat_is_what_the_template_makes_of_it(served: Served) -> None:
    answer = chat(served, {"role": "system", "content": "be"}, "fox", {"role": "assistant", "content": "no"}, "dog")
    prompt = "[s]be[u]fox[a]no[u]dog[a]"
    (choice,) = answer.choices
    assert choice.message.content == continuation(served, prompt)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == N_NEW


def test_a_streamed_chat(served: Served) -> None:
    chunks = list(chat(served, "fox", stream=True, n=2, stream_options={"include_usage": True}))
    roles = [chunk.choices[0].delta.role for chunk in chunks[:-1]]
    assert roles[:2] == ["assistant", "assistant"]
    assert set(roles[2:]) == {None}
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == continuation(served, "[u]fox[a]")
        assert [choice.finish_reason for choice in own][-1] == "length"
    assert chunks[-1].usage.total_tokens == 9 + 2 * N_NEW
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_max_tokens_has_two_names_in_a_chat(served: Served) -> None:
    create = served.client.chat.completions.create
    turns: Any = [{"role": "user", "content": "fox"}]
    answer = create(model=served.name, messages=turns, max_completion_tokens=3, temperature=0)
    assert answer.choices[0].message.content == continuation(served, "[u]fox[a]", 3)
    whole = create(model=served.name, messages=turns, temperature=0)
    assert whole.choices[0].message.content == continuation(served, "[u]fox[a]", CONTEXT - 9)


def test_chat_logprobs(served: Served) -> None:
    choice = chat(served, "fox", logprobs=True, top_logprobs=4).choices[0]
    text = choice.message.content
    expected = logprobs_after(served, "[u]fox[a]" + text)[8:-1]
    assert [each.token for each in choice.logprobs.content] == list(text)
    for row, token, found in zip(expected, ids_of(text), choice.logprobs.content, strict=True):
        assert (found.bytes, len(found.top_logprobs)) == ([token], 4)
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(4)
        assert [each.bytes for each in found.top_logprobs] == [[int(j)] for j in best.indices]
        assert [each.logprob for each in found.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    none = chat(served, "fox", logprobs=True).choices[0].logprobs.content
    assert [each.top_logprobs for each in none] == [[]] * N_NEW
    streamed = [chunk.choices[0].logprobs for chunk in chat(served, "fox", logprobs=True, stream=True)]
    assert [token for each in streamed if each for token in each.content] == none


def test_content_may_be_a_list_of_text_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "fox"}, {"type": "text", "text": "dog"}]
    answer = chat(served, {"role": "user", "content": parts})
    assert answer.choices[0].message.content == continuation(served, "[u]fox\ndog[a]")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(openai.BadRequestError, match="a part of type 'image_url'; only text is supported") as refused:
        chat(served, {"role": "user", "content": [*parts, image]})
    assert refused.value.param == "messages[0].content"


def test_roles_are_written_by_the_template_or_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*messages: Any) -> Any:
        return chat(served, *messages).choices[0].message.content

    assert says({"role": "developer", "content": "be"}, "fox") == continuation(served, "[s]be[u]fox[a]")
    for role in ("tool", "function"):
        result = {"role": role, "content": "42", "tool_call_id": "call_1"}
        assert says("fox", result) == continuation(served, f"[u]fox[{role[0]}]42[a]")
        named = {"role": role, "content": "42", "name": "add"}  # which OpenAI's API needs of a function
        assert says("fox", named) == says("fox", result)
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    for message, field in ((asks, "tool_calls"), ({"role": "user", "content": "x", "name": "Ann"}, "name")):
        with pytest.raises(openai.BadRequestError, match=f"does not write the {field}") as refused:
            chat(served, "fox", message)
        assert refused.value.param == f"messages[1].{field}"
    # What OpenAI's client makes of an answer can be sent back.
    answered = chat(served, "fox").choices[0].message
    turns = ("fox", answered.model_dump(), "dog")
    assert says(*turns) == continuation(served, f"[u]fox[a]{answered.content}[u]dog[a]")
    monkeypatch.setattr(
        served.model.tokenizer,
        "chat_template",
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role[0] }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.x }}>{% endfor %}"
        "{% elif m.role == 'developer' %}[d]{{ m.content }}{% endif %}{% endfor %}[a]",
    )
    assert says("fox", asks) == continuation(served, "[u]fox[a]<add 1>[a]")
    assert says({"role": "developer", "content": "be"}, "fox") == continuation(served, "[d]be[u]fox[a]")
    for role in ("system", "tool"):
        with pytest.raises(openai.BadRequestError, match=f"does not write the content of a message .* '{role}'"):
            chat(served, "fox", {"role": role, "content": "42"})


def test_a_special_token_in_a_message_is_refused(served: Served) -> None:
    """The tokenizer would read it as the end of the text, wherever a user writes it."""
    for turn in ("fox<|endoftext|>dog", {"role": "tool", "content": [{"type": "text", "text": "<|endoftext|>"}]}):
        with pytest.raises(openai.BadRequestError, match=r"holds '<\|endoftext\|>', a special token") as refused:
            chat(served, "fox", turn)
        assert refused.value.param == "messages[1].content"
    assert chat(served, "fox", {"role": "assistant", "content": "<|endoftext|>"}, "dog").choices


def test_an_error_of_the_chat_template_is_the_response(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="the chat template rejects the messages: roles must alternate"):
        chat(served, "fox")


def test_a_model_without_a_chat_template_refuses_chats(plain_served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"no chat template.* use /v1/completions") as refused:
        chat(plain_served, "fox")
    assert refused.value.code == "no_chat_template"
    assert complete(plain_served).choices[0].text == continuation(plain_served, "fox")


# --- responses


def test_a_response(served: Served) -> None:
    create, asked = served.client.responses.create, {"max_output_tokens": N_NEW, "temperature": 0}
    answer = create(model=served.name, input="fox", instructions="be", **asked)
    expected = continuation(served, "[s]be[u]fox[a]")
    assert answer.output_text == expected
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (14, N_NEW)
    turns: Any = [{"role": "user", "content": "fox"}, *answer.output, {"role": "user", "content": "dog"}]
    again = create(model=served.name, input=turns, top_logprobs=1, **asked)
    assert again.output_text == continuation(served, f"[u]fox[a]{expected}[u]dog[a]")
    logprobs = again.output[0].content[0].logprobs
    assert "".join(each.token for each in logprobs) == again.output_text
    events = list(create(model=served.name, input="fox", instructions="be", stream=True, **asked))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected


def test_a_response_by_what_is_not_supported(served: Served) -> None:
    tool = {"type": "function_call_output", "call_id": "x", "output": "y"}
    for body, param in (
        ({"input": [tool]}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "store": True}, "store"),
        ({"input": [{"role": "owl", "content": "x"}]}, "role"),
        ({"input": "x" * 100}, "input"),
        ({}, "input"),
    ):
        assert served.error("/v1/responses", **body)["param"] == param


# --- models, origins


def test_the_name_of_the_model(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [served.name]
    assert served.client.models.retrieve(served.name).id == served.name
    status, answer, _ = served.send(f"/v1/models/{served.name}")
    assert (status, answer["id"], answer["object"]) == (200, served.name, "model")
    answered = complete(served)
    again = served.client.completions.create(model=answered.model, prompt="fox", **GREEDY)
    assert again.choices[0].text == answered.choices[0].text
    for ask in (
        lambda: served.client.models.retrieve("gpt-4"),
        lambda: served.client.completions.create(model="gpt-4", prompt="fox"),
        lambda: served.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}]),
        lambda: served.client.responses.create(model="gpt-4", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match=f"'gpt-4' does not exist; this server serves '{served.name}'"):
            ask()
    assert served.error("/v1/completions", model="gpt-4", prompt="x")["code"] == "model_not_found"


def test_a_folder_name_may_contain_an_at_sign(served: Served, tmp_path: Path) -> None:
    link = tmp_path / "run@2"
    link.symlink_to(served.name)
    with serving(link) as own:
        assert own.client.models.retrieve(str(link)).id == str(link)
        assert complete(own).choices[0].text == continuation(served, "fox")


def test_addresses_that_do_not_exist(served: Served) -> None:
    assert "Not Found" in served.error("/v1/embeddings", input="x")["message"]
    status, answer, headers = served.send("/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert "Method Not Allowed" in answer["error"]["message"]
    for path in ("/reset", "/load_model"):
        assert served.send(path, b'{"model": "someone/else"}')[0] == 404
    assert served.send("/health")[:2] == (200, {"status": "ok"})


def test_an_answer_carries_the_id_of_its_request(served: Served) -> None:
    body = json.dumps({"prompt": "fox", "max_tokens": 1}).encode()
    assert served.send("/v1/completions", body, **{"X-Request-Id": "mine"})[2]["x-request-id"] == "mine"
    assert complete(served)._request_id != complete(served)._request_id
    with pytest.raises(openai.BadRequestError) as refused:
        complete(served, "")
    assert refused.value.request_id
    assert complete(served, stream=True).response.headers["x-request-id"]


def test_web_pages_of_allowed_origins_may_use_the_server(served: Served, plain_served: Served) -> None:
    allowed = "access-control-allow-origin"
    assert allowed not in served.send("/v1/models", Origin="http://page.example")[2]
    assert plain_served.send("/v1/models", Origin="http://page.example")[2][allowed] == "http://page.example"
    assert allowed not in plain_served.send("/v1/models", Origin="http://other.example")[2]


# --- what is refused


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt=None must be a text, a list of texts"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": ["x", [1]]}, "prompt", "must be a text"),
        ({"prompt": [1.5]}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [257]}, "prompt", "prompt holds 257; token ids are from 0 to below 257"),
        ({"prompt": [2**70]}, "prompt", "token ids are from 0 to below 257"),
        ({"prompt": "x" * CONTEXT}, "prompt", "has 64 tokens; the model's context of 64 leaves no room"),
        ({"prompt": "x" * 65, "max_tokens": 0}, "prompt", "leaves no room"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens=-1 must be greater than or equal to 0"),
        ({"max_tokens": 1.5}, "max_tokens", "must be a valid integer"),
        ({"max_tokens": "5"}, "max_tokens", "must be a valid integer"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown parameter"),
        ({"temperature": -1}, "temperature", "temperature=-1 must be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature='hot' must be a valid number"),
        ({"temprature": 1}, "temprature", "unknown parameter 'temprature'; did you mean 'temperature'?"),
        ({"top_p": 1.1}, "top_p", "top_p=1.1 must be less than or equal to 1"),
        ({"top_k": 0}, "top_k", "top_k=0 must be greater than or equal to 1"),
        ({"top_k": 258}, "top_k", "top_k=258: from 1 to vocab_size=257"),
        ({"n": 0}, "n", "n=0 must be greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "must be a valid integer"),
        ({"best_of": 2}, "best_of", "best_of=2 is not supported unless it equals n=1"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "must be a valid integer"),
        ({"echo": "yes"}, "echo", "echo='yes' must be a valid boolean"),
        ({"seed": 2**63}, "seed", "seed=9223372036854775808"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "must be a valid integer"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "logit_bias holds 257"),
        ({"stop": ""}, "stop", "a text or a list of texts, none of them empty"),
        ({"stop": [1]}, "stop", "a text or a list of texts"),
        ({"stream": 1}, "stream", "must be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown parameter"),
        ({"suffix": "end"}, "suffix", "suffix is not supported by this server"),
        ({"guided_json": {}}, "guided_json", "unknown parameter 'guided_json'"),
        ({"model": 3}, "model", "must be a valid string"),
    ],
)
def test_a_wrong_completion_request_is_refused_by_name(
    body: dict[str, Any], param: str, message: str, served: Served
) -> None:
    error = served.error("/v1/completions", **{"prompt": "fox", "max_tokens": 2, **body})
    assert error["param"] == param
    assert message in error["message"]
    assert (error["code"] == "context_length_exceeded") == ("no room" in message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": None}, "messages", "must be a valid array"),
        ({"messages": []}, "messages", "must have at least 1 item"),
        ({"messages": "hello"}, "messages", "must be a valid array"),
        ({"messages": ["hello"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role is missing"),
        ({"messages": [{"role": "owl", "content": "x"}]}, "messages[0].role", "'owl' is not supported"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a text or a list of text parts"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "messages", "the prompt has 105 tokens"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "give one of them"),
        ({"logprobs": 1}, "logprobs", "must be a valid boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "supported: 'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type", "'json_schema'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
        ({"tool_choice": "auto"}, "tool_choice", "tool_choice='auto' is not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "functions is not supported"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "not supported"),
        ({"modalities": ["audio"]}, "modalities[0]", "'audio' is not supported"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", "audio is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "'high' is not supported"),
        ({"verbosity": "low"}, "verbosity", "'low' is not supported"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"store": True}, "store", "store=True is not supported"),
        ({"service_tier": "flex"}, "service_tier", "'flex' is not supported"),
        ({"metadata": {"a": 1}}, "metadata.a", "must be a valid string"),
        ({"echo": True}, "echo", "unknown parameter"),
    ],
)
def test_a_wrong_chat_request_is_refused_by_name(
    body: dict[str, Any], param: str, message: str, served: Served
) -> None:
    asked = {"messages": [{"role": "user", "content": "fox"}], **body}
    error = served.error("/v1/chat/completions", **asked)
    assert error["param"] == param
    assert message in error["message"]


def test_parameters_that_change_no_answer_are_accepted(served: Served) -> None:
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "tools": [],
        "modalities": ["text"],
        "reasoning_effort": "none",
        "safety_identifier": "me",
        "prompt_cache_key": "k",
        "frequency_penalty": 0,
        "logit_bias": {},
        "n": 1,
        "stop": None,
        "top_p": 1,
        "seed": None,
    }
    assert chat(served, "fox", **harmless).choices[0].message.content == continuation(served, "[u]fox[a]")
    assert complete(served, user="me", best_of=1, suffix=None).choices[0].text == continuation(served, "fox")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_body_that_is_no_json_object_is_refused(path: str, served: Served) -> None:
    for body in (b"", b"{", b"nonsense", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 5000):
        status, answer, _ = served.send(path, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body
        assert "is not valid JSON" in answer["error"]["message"]
    for body in (b"[]", b"3", b"null", b'"text"'):
        status, answer, _ = served.send(path, body)
        assert status == 400
        assert "the body must be a JSON object" in answer["error"]["message"]
    assert served.send(path, b'{"prompt": "x", "temperature": NaN, "messages": []}')[0] == 400


def test_no_value_of_a_parameter_is_an_error_of_the_server(served: Served) -> None:
    values: list[Any] = [None, True, -1, 0, 1, 1e308, 2**70, "", "x", [], [[]], ["x"], {}, {"type": "text"}, {"0": 0}]
    chat_body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for path, base in (("/v1/completions", {"prompt": "x", "max_tokens": 1}), ("/v1/chat/completions", chat_body)):
        for name in ("logprobs", "messages", "n", "prompt", "stop", "stream_options", "temperature", "logit_bias"):
            for value in values:
                status, answer, _ = served.send(path, json.dumps({**base, name: value}).encode())
                assert status in (200, 400), (name, value, answer)
    for field in ("role", "content", "name", "tool_calls", "x"):
        for value in values:
            body = {"messages": [{"role": "user", "content": "x", field: value}], "max_tokens": 1}
            status, answer, _ = served.send("/v1/chat/completions", json.dumps(body).encode())
            assert status in (200, 400), (field, value, answer)


def test_a_failure_of_the_server_is_told_to_the_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(served.model, "complete", fail)
    with pytest.raises(openai.InternalServerError, match="the server failed: RuntimeError"):
        complete(served)
    with pytest.raises(openai.APIError, match="the server failed: RuntimeError"):
        list(complete(served, stream=True))


# --- several requests, clients that leave


def test_several_requests_at_once_get_the_same_answers_as_alone(served: Served) -> None:
    prompts = [f"prompt {i}" for i in range(12)]
    expected = [continuation(served, prompt, 40) for prompt in prompts]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = complete(served, prompts[i], max_tokens=40).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(12)] == expected


class Ends:
    """Tells when a generation ends."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended, own = threading.Event(), served.model.complete

        def complete(*arguments: Any, **options: Any) -> None:
            try:
                own(*arguments, **options)
            finally:
                self.ended.set()

        monkeypatch.setattr(served.model, "complete", complete)


def test_a_request_is_answered_while_another_streams(plain_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(plain_served, monkeypatch)
    stream = complete(plain_served, stream=True, **ENDLESS)
    next(iter(stream))
    assert complete(plain_served, "dog").choices[0].text == continuation(plain_served, "dog")
    ends.ended.clear()
    stream.close()  # the client leaves
    assert ends.ended.wait(30)


def test_a_client_that_gives_up_ends_the_generation(plain_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(plain_served, monkeypatch)
    impatient = plain_served.client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model=plain_served.name, prompt="fox", **ENDLESS)
    assert ends.ended.wait(30)


def test_defaults_come_from_the_generation_config(served: Served, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    path = tmp_path / "generation_config.json"
    config = json.loads(path.read_text())

    def answers(**fields: Any) -> list[str]:
        path.write_text(json.dumps({**config, **fields}))
        with serving(tmp_path) as own:
            create = own.client.completions.create
            return [create(model=own.name, prompt="fox", max_tokens=N_NEW, seed=s).choices[0].text for s in range(3)]

    greedy = continuation(served, "fox")
    assert answers(do_sample=False) == [greedy] * 3
    assert answers(do_sample=True, top_k=1) == [greedy] * 3
    expected = [complete(served, temperature=0.5, top_p=0.8, seed=s).choices[0].text for s in range(3)]
    assert answers(do_sample=True, temperature=0.5, top_p=0.8) == expected
