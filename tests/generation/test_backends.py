"""Every kind of generation, against a loop over plain forwards, row by row and without a cache."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from shapes import SHAPES
from test_modeling import SHAPE, TABLE, gpt2_like, left_padded, random_ids, relative_difference
from tiny_model import write_tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM

NEW = 12


def lively_model(attention: str = "sdpa", **overrides: Any) -> GPTKitForCausalLM:
    """A random model whose greedy text wanders, so that a wrong position, mask or cached token changes it.

    With all weights of one size the norms' gains hide the context, and each greedy text is one token repeated.
    """
    model = GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, "tie_word_embeddings": False, **overrides}))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.6 if "embed" in name or "lm_head" in name else 0.8)
            else:
                parameter.normal_(mean=float("norm.weight" in name), std=0.1)
    model.eval()
    return model


def continuation(model: Any, row: Tensor, count: int = NEW) -> list[int]:
    """The oracle: the argmax of a forward over the whole row (T,), again for each token."""
    ids = row[None]
    for _ in range(count):
        with torch.no_grad():
            token = model(ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
    new: list[int] = ids[0, len(row) :].tolist()
    assert len(set(new)) > 1, "a text of one token would hide mistakes"
    return new


def padded_rows(*lengths: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    rows = [random_ids(length) for length in lengths or (5, 9, 1)]
    return rows, left_padded(rows)[0]


def greedily(model: Any, **options: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def check_greedy(model: GPTKitForCausalLM, **options: Any) -> None:
    """A left-padded batch generates what each row does in the oracle."""
    rows, inputs = padded_rows()
    generated = greedily(model, **inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == [continuation(model, row) for row in rows]


# --- greedy: caches, prompts in chunks, embeddings, compiled steps


CACHES: list[dict[str, Any]] = [
    {},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 4},
    {"prefill_chunk_size": 4, "cache_implementation": "static"},
]


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("shape", [("sdpa", "learned"), ("eager", "sinusoidal"), ("sdpa", "modern")])
def test_a_left_padded_batch_generates_what_each_row_does(shape: tuple[str, str], options: dict[str, Any]) -> None:
    check_greedy(lively_model(shape[0], **SHAPES[shape[1]]), **options)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_embeddings_instead_of_a_prompt(cache: dict[str, Any]) -> None:
    model = lively_model()
    rows, inputs = padded_rows()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = [continuation(model, row) for row in rows]
    only_new = greedily(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **cache)
    assert only_new.tolist() == expected
    # The embeddings decide, the ids are what is returned before the new ones.
    inputs["input_ids"] = torch.full_like(inputs["input_ids"], 7)
    both = greedily(model, **inputs, inputs_embeds=embeds, **cache)
    assert both.tolist() == [[7] * 9 + row for row in expected]


def compiled(backend: str, **options: Any) -> GenerationConfig:
    """transformers compiles the decoding steps, on the CPU too."""
    compiling = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    return GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        max_cache_len=TABLE,
        compile_config=compiling,
        **options,
    )


@pytest.fixture
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")  # transformers sets it, and would leave it so
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_one_graph(attention: str, backend: str) -> None:
    model = lively_model(attention)
    check_greedy(model, generation_config=compiled(backend))
    assert graphs() == 1  # for all steps
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((5, 9, 1), (4, 3, 14)):  # the cache has one size, so other prompts need no other graph
            rows, inputs = padded_rows(*lengths)
            generated = model.generate(**inputs, generation_config=compiled(backend))
            new = generated[:, max(lengths) :].tolist()
            with torch.compiler.set_stance("force_eager"):
                assert new == [continuation(model, row) for row in rows]
    assert graphs() == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_graph_serves_all_decoding_steps(attention: str) -> None:
    check_one_graph(attention, "eager")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch about torch
def test_one_graph_serves_all_decoding_steps_by_inductor() -> None:
    check_one_graph("sdpa", "inductor")


@pytest.mark.usefixtures("_fresh_compiler")
# Said by torch about itself, where it traces the indexing of a mask function.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
def test_a_compiled_forward_has_a_graph_for_the_prompt_and_one_for_the_steps() -> None:
    model = lively_model()
    plain = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for stance in ("default", "fail_on_recompile"):
        rows = random_ids(2, 6)
        with torch.compiler.set_stance(stance):
            generated = greedily(model, input_ids=rows, attention_mask=rows * 0 + 1, cache_implementation="static")
        assert generated[:, 6:].tolist() == [continuation(plain, row) for row in rows]
    assert graphs() == 2


# --- beams


def best_sequences(model: Any, row: Tensor, count: int, end: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Every sequence of at most `count` new tokens, scored by hand: the mean log-probability, best first.

    A sequence ends with the token `end` or at `count`; the sum is divided by its length to the power of `penalty`.
    """
    vocab = int(model.config.vocab_size)
    full = torch.tensor(list(itertools.product(range(vocab), repeat=count)))  # (V^count, count)
    ids = torch.cat((row.expand(len(full), -1), full), dim=1)
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits[:, len(row) - 1 :]
    each = logits.log_softmax(dim=-1).gather(2, full[..., None])[..., 0]  # (V^count, count)
    scored: dict[tuple[int, ...], float] = {}
    for sequence, values in zip(full.tolist(), each.tolist(), strict=True):
        length = sequence.index(end) + 1 if end in sequence else count
        scored[tuple(sequence[:length])] = sum(values[:length]) / length**penalty
    return sorted(((score, list(sequence)) for sequence, score in scored.items()), reverse=True)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("end", [None, 3])
def test_as_many_beams_as_sequences_find_the_best(end: int | None, options: dict[str, Any]) -> None:
    model = lively_model(vocab_size=5)
    rows = [torch.randint(5, (length,)) for length in (4, 2)]
    inputs, _ = left_padded(rows)
    out: Any = greedily(
        model,
        **inputs,
        max_new_tokens=3,
        num_beams=5**3,
        num_return_sequences=8,
        eos_token_id=end,
        pad_token_id=1,  # 0 counts as none for the beams of transformers
        length_penalty=0.5,
        early_stopping="never" if end else False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    for index, row in enumerate(rows):
        expected = best_sequences(model, row, 3, -1 if end is None else end, 0.5)[:8]
        found = out.sequences[8 * index : 8 * index + 8, 4:].tolist()
        assert found == [sequence + [1] * (3 - len(sequence)) for _, sequence in expected]
        scores = out.sequences_scores[8 * index : 8 * index + 8].tolist()
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_beams_are_the_same_with_every_cache(options: dict[str, Any]) -> None:
    model = lively_model()
    _, inputs = padded_rows()
    assert torch.equal(greedily(model, **inputs, num_beams=4, **options), greedily(model, **inputs, num_beams=4))


# --- drafts


class Forwards:
    """Counts the calls of a module's forward."""

    def __init__(self, module: Any) -> None:
        self.calls = 0
        self.handle = module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def drafts(model: GPTKitForCausalLM) -> dict[str, Any]:
    near = copy.deepcopy(model)  # right most of the time, so that drafts are both taken and rejected
    with torch.no_grad():
        near.lm_head.weight.add_(0.1 * torch.randn_like(near.lm_head.weight))
    return {"near": near, "gpt2 near": gpt2_like(near), "other": lively_model(n_layer=1)}


@pytest.mark.parametrize("draft", ["near", "gpt2 near", "other"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_draft_changes_nothing(draft: str, attention: str) -> None:
    model = lively_model(attention)
    row = random_ids(6)
    expected = continuation(model, row, 20)
    assistant = drafts(model)[draft]
    forwards = Forwards(model)
    generated = greedily(model, input_ids=row[None], assistant_model=assistant, max_new_tokens=20)
    assert generated[0, 6:].tolist() == expected
    assert forwards.calls < 16 or draft == "other"  # tokens of a good draft were taken


def test_the_model_can_draft_for_gpt2() -> None:
    model = lively_model()
    row = random_ids(6)
    target = gpt2_like(model)
    forwards = Forwards(target)
    generated = greedily(target, input_ids=row[None], assistant_model=drafts(model)["near"])
    assert generated[0, 6:].tolist() == continuation(model, row)
    assert forwards.calls < NEW


def test_looking_a_draft_up_in_the_prompt_changes_nothing() -> None:
    model = lively_model()
    row = random_ids(5)
    row = torch.cat((row, torch.tensor(continuation(model, row)[:2]), row))
    expected = continuation(model, row)
    generated = greedily(model, input_ids=row[None], prompt_lookup_num_tokens=3)
    assert generated[0, len(row) :].tolist() == expected


def test_the_first_layers_draft_for_the_whole_model() -> None:
    model = lively_model()
    row = random_ids(6)
    expected = continuation(model, row)
    first, last = Forwards(model.model.layers[0]), Forwards(model.model.layers[-1])
    generated = greedily(model, input_ids=row[None], assistant_early_exit=1)
    assert generated[0, 6:].tolist() == expected
    assert first.calls > last.calls > 0  # the draft left the last layer out
    assert model.config.n_layer == 2


# --- continuous batching


def in_continuous_batches(model: GPTKitForCausalLM, rows: list[Tensor], **options: Any) -> list[list[int]]:
    # Without a size the pages fill the machine's memory. A step of 6 tokens cuts the longer prompts into pieces.
    paging = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=6)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, **{"eos_token_id": -1, **options})
    prompts = [row.tolist() for row in rows]
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=paging)
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert all(result.error is None for result in results.values())
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batches_generate_what_each_row_does(attention: str, shape: str) -> None:
    model = lively_model(attention, **SHAPES[shape])
    start = random_ids(7)
    rows = [random_ids(3), torch.cat((start, random_ids(9))), random_ids(1), torch.cat((start, random_ids(2)))]
    expected = [continuation(model, row) for row in rows]
    assert in_continuous_batches(model, rows) == expected
    assert model.config._attn_implementation == attention  # and not the paged one of the batches
    end = expected[1][4]
    ended = [new[: new.index(end) + 1] if end in new else new for new in expected]
    assert in_continuous_batches(model, rows, eos_token_id=end) == ended


# --- sampling


def sampled_by_hand(model: Any, rows: list[Tensor], temperature: float, top_k: int, top_p: float) -> list[list[int]]:
    """One multinomial draw a step for all rows, from the softmax of what top-k and then top-p leave."""
    for _ in range(NEW):
        with torch.no_grad():
            logits = torch.stack([model(row[None], use_cache=False).logits[0, -1] for row in rows]) / temperature
        kept = torch.zeros_like(logits)
        for index, scores in enumerate(logits):
            values, order = scores.sort(descending=True)
            values, order = values[:top_k], order[:top_k]
            before = values.softmax(0).cumsum(0) - values.softmax(0)  # the probability of all that are likelier
            kept[index, order[before < top_p]] = 1
        chances = logits.masked_fill(kept == 0, -torch.inf).softmax(dim=-1)
        tokens = torch.multinomial(chances, 1)
        rows = [torch.cat((row, token)) for row, token in zip(rows, tokens, strict=True)]
    return [row[-NEW:].tolist() for row in rows]


SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.7, "top_k": 20, "top_p": 0.8}


def test_sampling_with_a_seed_is_the_multinomial_loop() -> None:
    model = lively_model()
    rows, inputs = padded_rows()
    torch.manual_seed(7)
    generated = greedily(model, **inputs, **SAMPLING)
    torch.manual_seed(7)
    assert generated[:, 9:].tolist() == sampled_by_hand(model, rows, 1.7, 20, 0.8)


def test_several_answers_to_a_prompt_are_independent_draws() -> None:
    model = lively_model()
    rows, inputs = padded_rows()
    torch.manual_seed(7)
    generated = greedily(model, **inputs, num_return_sequences=3, **SAMPLING)[:, 9:].tolist()
    torch.manual_seed(7)
    assert generated == sampled_by_hand(model, [row for row in rows for _ in range(3)], 1.7, 20, 0.8)
    assert len({tuple(new) for new in generated}) == 9


# --- processors of the scores


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps what it is shown, and forbids the token that was generated last."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_processor_sees_the_logits_of_each_row_alone(options: dict[str, Any]) -> None:
    model = lively_model()
    rows, inputs = padded_rows()
    recorder = Recorder()
    out = greedily(model, **inputs, logits_processor=LogitsProcessorList([recorder]), **options)
    assert len(recorder.seen) == NEW
    for step, (ids, scores) in enumerate(recorder.seen):
        assert torch.equal(ids, out[:, : 9 + step])
        for index, row in enumerate(rows):
            alone = model(ids[index, 9 - len(row) :][None], use_cache=False).logits[0, -1]
            assert relative_difference(scores[index], alone) <= 1e-4
            alone[ids[index, -1]] = -torch.inf
            assert out[index, 9 + step] == alone.argmax()


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_is_the_formula(use_cache: bool) -> None:
    """Scores are guided by a negative prompt: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance"."""
    model = lively_model()
    rows, inputs = padded_rows()
    negatives, negative = padded_rows(2, 4, 3)
    guided = greedily(
        model,
        **inputs,
        guidance_scale=2.5,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        use_cache=use_cache,
    )[:, 9:]
    assert guided.tolist() != [continuation(model, row) for row in rows]
    for index, (row, against) in enumerate(zip(rows, negatives, strict=True)):
        new = torch.zeros(0, dtype=torch.long)
        for _ in range(NEW):
            wanted, unwanted = (
                model(torch.cat((start, new))[None], use_cache=False).logits[0, -1].log_softmax(0)
                for start in (row, against)
            )
            new = torch.cat((new, (unwanted + 2.5 * (wanted - unwanted)).argmax()[None]))
        assert torch.equal(guided[index], new)


def test_ended_rows_are_filled_while_the_others_go_on() -> None:
    model = lively_model()
    rows, inputs = padded_rows()
    expected = [continuation(model, row) for row in rows]
    end = expected[0][3]
    generated = greedily(model, **inputs, eos_token_id=end, pad_token_id=end)[:, 9:].tolist()
    ended = [new[: new.index(end)] if end in new else new for new in expected]
    longest = max(len(new) + (end in row) for new, row in zip(ended, expected, strict=True))
    assert generated == [(new + [end] * NEW)[:longest] for new in ended]


# --- one call after another


def looked_up(model: GPTKitForCausalLM) -> list[int]:
    """The number of tokens of each forward from now on."""
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    return lengths


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("only_new", [False, True], ids=["the whole chat", "its new turn only"])
def test_the_second_turn_of_a_chat_continues_the_cache_of_the_first(cache: str, only_new: bool) -> None:
    model = lively_model()
    rows, inputs = padded_rows(3, 6)
    past: Any = DynamicCache(config=model.config)
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=TABLE)
    first = greedily(model, **inputs, past_key_values=past, max_new_tokens=8)
    turn = random_ids(2, 5)
    whole = torch.cat((first, turn), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 13, dtype=torch.long)), dim=1)
    expected = [continuation(model, ids[6 - len(row) :], 9) for ids, row in zip(whole, rows, strict=True)]
    lengths = looked_up(model)
    # The last token of the first answer was never looked up: it opens the second turn.
    ids = whole[:, 13:] if only_new else whole
    out = greedily(model, input_ids=ids, attention_mask=mask, past_key_values=past, max_new_tokens=9)
    assert out[:, ids.shape[1] :].tolist() == expected
    assert lengths == [6] + [1] * 8


# --- what does not fit


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
@pytest.mark.parametrize("length", [6, TABLE])
def test_the_table_may_be_filled_and_not_passed(length: int, options: dict[str, Any]) -> None:
    model = lively_model()
    inputs: dict[str, Any] = {"input_ids": random_ids(1, length), **options}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # The last token is generated, never looked up.
    assert greedily(model, **inputs, max_new_tokens=TABLE - length + 1).shape == (1, TABLE + 1)
    with pytest.raises(
        ValueError, match=rf"between 0 and {TABLE - 1} \(max_position_embeddings={TABLE}\), got {TABLE}"
    ):
        greedily(model, **inputs, max_new_tokens=TABLE - length + 2)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_prompt_longer_than_the_table_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"max_position_embeddings={TABLE}"):
        greedily(lively_model(), input_ids=random_ids(1, TABLE + 1), **options)


# --- text: streams and the pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path)
    return path


def expected_text(folder: Path, prompt: str, count: int) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    row = tokenizer(prompt, return_tensors="pt").input_ids[0]
    return str(tokenizer.decode(continuation(model, row, count)))


def test_text_streams_as_it_is_generated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the quick brown", return_tensors="pt")
    expected = expected_text(folder, "the quick brown", 30)
    options = {**inputs, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    model.generate(**options, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == f"the quick brown{expected}\n"
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**options, "streamer": pieces})
    thread.start()
    assert "".join(pieces) == expected
    thread.join()


def test_the_pipeline_answers_prompts_of_a_batch_as_it_answers_each(folder: Path) -> None:
    prompts = ["the quick brown", "o", "jumps over the lazy dog"]
    pipe = pipeline("text-generation", model=str(folder), device="cpu")
    pipe.tokenizer.pad_token_id = pipe.tokenizer.eos_token_id  # as for GPT-2, the pipeline asks the user to choose one
    assert pipe.tokenizer.padding_side == "left"
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    answers = [answer[0]["generated_text"] for answer in pipe(prompts, batch_size=3, **options)]
    assert answers == [expected_text(folder, prompt, 20) for prompt in prompts]
    assert [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts] == answers
