"""One token at a time, beside the model's own forward pass and transformers' `generate`."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM, NonFiniteError, UsageError, generate_text_autoregressive
from gpt_kit_hf.generation import decode_loop, fast_decoder, layouts
from gpt_kit_hf.generation.fast_decoder import Decoder, pays, why_not
from gpt_kit_hf.options.generation import DecodingDtype

FBGEMM = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this machine's torch has no FBGEMM"
)
VOCAB, CONTEXT = 300, 64
MODERN: dict[str, Any] = {
    "position_embedding": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "use_bias": False,
    "zero_init_residual": True, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def model_of(dtype: torch.dtype = torch.float32, **options: Any) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_layer": 3, "n_head": 4, "n_embd": 32}
    model = GPTKitForCausalLM(GPTKitConfig(**{**sizes, "max_position_embeddings": CONTEXT, **options}))
    with torch.no_grad():
        for parameter in model.parameters():  # as trained: weights that matter, norms that are not ones
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def fed(decoder: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Return the logits behind each token from the prompt's last on, (B, T - prompt + 1, V), token by token."""
    logits = [decoder.start(ids[:, :prompt], ids.shape[1])]
    for index in range(prompt, ids.shape[1]):
        decoder.pack()
        logits.append(decoder.step(ids[:, index]))
    return torch.stack(logits, dim=1)


KINDS: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "without biases": {"use_bias": False},
    "untied": {"tie_word_embeddings": False},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "exact gelu, wide": {"hidden_act": "gelu", "n_inner": 80},
    "one head": {"n_head": 1},
    "modern": MODERN,
    "modern, grouped heads": {**MODERN, "num_key_value_heads": 2, "head_dim": 12},
    "one head of keys": {**MODERN, "num_key_value_heads": 1, "qk_norm": False, "tie_word_embeddings": False},
    "rotary with a scaling": {"position_embedding": "rotary", "rope_parameters": YARN},
    "gated, with biases": {"mlp": "swiglu", "norm": "rmsnorm"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "prompt"), [(1, 1), (1, 20), (5, 7)])
def test_logits_are_the_models_own(kind: str, rows: int, prompt: int) -> None:
    model, ids = model_of(**KINDS[kind]), ids_of(rows, 30)
    with torch.no_grad():
        expected = model(ids).logits[:, prompt - 1 :]
    torch.testing.assert_close(fed(Decoder(model), ids, prompt), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["as GPT-2", "modern, grouped heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_computed_in_float32(dtype: torch.dtype, kind: str) -> None:
    model, ids = model_of(dtype, **KINDS[kind]), ids_of(2, 24)
    with torch.no_grad():
        expected = model.float()(ids).logits[:, 5:]
    model.to(dtype)
    torch.testing.assert_close(fed(Decoder(model), ids, 6), expected, rtol=1e-3, atol=1e-3)


@FBGEMM
@pytest.mark.parametrize("kind", ["as GPT-2", "modern, grouped heads"])
@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-5), ("int8", 0.02)])
def test_lower_precision_costs_little_and_the_decoder_measures_it(
    dtype: DecodingDtype, most: float, kind: str
) -> None:
    model, ids = model_of(**KINDS[kind]), ids_of(1, 40)
    decoder = Decoder(model, dtype)
    divergence, same = decoder.divergence(ids)
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)
        packed = fed(decoder, ids, 1).log_softmax(-1)[:, 1:]
    # The first token is read with the plain weights there, as a prompt is: its keys are a little better.
    expected = float((own.exp()[:, 1:] * (own[:, 1:] - packed)).sum(-1).mean())
    assert 0.0 < expected < most
    assert divergence == pytest.approx(expected, rel=0.3, abs=1e-6)
    assert same > 0.8


@FBGEMM
@pytest.mark.parametrize("dtype", get_args(DecodingDtype))
def test_packed_weights_are_kept_while_the_model_stays_as_it_is(dtype: DecodingDtype) -> None:
    model, ids = model_of(), ids_of(1, 12)
    first = Decoder(model, dtype)
    before = fed(first, ids, 3)
    Decoder(model, "float16" if dtype == "int8" else "int8").pack()
    second = Decoder(model, dtype)
    second.pack()
    assert second._packed is first._packed is not None
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    after = fed(Decoder(model, dtype), ids, 3)
    assert not torch.allclose(after, before, rtol=0.1)
    gone = weakref.ref(model)
    del model, first, second
    gc.collect()
    assert gone() is None


def test_no_copy_of_a_model_in_training_is_cached() -> None:
    model, ids = model_of().train(), ids_of(1, 12)
    generate_text_autoregressive(model, ids, 40)
    assert not fast_decoder._kept[model]
    generate_text_autoregressive(model.eval(), ids, 40)
    assert set(fast_decoder._kept[model]) == {"auto"}


def test_early_exit_uses_the_first_layers_only() -> None:
    model, ids = model_of(), ids_of(1, 9)
    model.config.n_layer = 2
    with torch.no_grad():
        torch.testing.assert_close(fed(Decoder(model), ids, 3), model(ids).logits[:, 2:], rtol=1e-4, atol=1e-4)


# --- generation


@pytest.fixture
def without_decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patched:
        yield patched


CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "cooler, of few": {"temperature": 0.7, "top_k": 5},
    "an end": {"temperature": 1.5, "eos_token_id": 7, "top_k": 20},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("rows", "kind"), [(1, "as GPT-2"), (6, "as GPT-2"), (1, "modern"), (3, "modern, grouped heads")]
)
def test_the_tokens_are_those_of_generate_by_the_same_draws(
    choice: str, rows: int, kind: str, without_decoder: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(**KINDS[kind]), ids_of(rows, 8)
    torch.manual_seed(3)
    ours = generate_text_autoregressive(model, ids, 50, **CHOICES[choice])
    without_decoder.setattr("gpt_kit_hf.generation.generate.why_not", lambda model: "as transformers does it")
    torch.manual_seed(3)
    theirs = generate_text_autoregressive(model, ids, 50, **CHOICES[choice])
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] > 8


@pytest.mark.parametrize("kind", ["as GPT-2", "modern", "rotary with a scaling"])
def test_greedy_tokens_up_to_the_end_of_the_context(kind: str) -> None:
    model, ids = model_of(**KINDS[kind]), ids_of(1, 3)
    tokens = generate_text_autoregressive(model, ids, CONTEXT - 3)
    with torch.no_grad():
        expected = model(tokens).logits[:, 2:-1].argmax(dim=-1)
    assert tokens[:, 3:].tolist() == expected.tolist()


def test_generated_ids_may_be_trained_on() -> None:
    model = model_of()
    ids = generate_text_autoregressive(model, ids_of(1, 4), 40)
    model(ids, labels=ids).loss.backward()
    assert not ids.is_inference()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_around_it_changes_nothing() -> None:
    model, ids = model_of(), ids_of(2, 4)
    alone = generate_text_autoregressive(model, ids, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate_text_autoregressive(model, ids, 40).tolist() == alone.tolist()


class _Heard(list):  # type: ignore[type-arg]
    """A streamer that keeps the tokens."""

    def put(self, value: Tensor) -> None:
        self.extend(value.flatten().tolist())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("fault", "on_gpu"), [(math.nan, False), (math.nan, True), (math.inf, False)])
def test_no_token_is_chosen_from_logits_that_are_not_finite(
    choice: str, fault: float, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, heard = model_of(), ids_of(2, 4), _Heard()
    monkeypatch.setattr(fast_decoder, "_is_gpu", lambda device: on_gpu)
    monkeypatch.setattr(decode_loop, "CapturedStep", lambda step, device: step)
    step, steps = Decoder.step, list[Tensor]()

    def spoiled(self: Decoder, token: Tensor) -> Tensor:
        logits = step(self, token)
        steps.append(token.clone())
        if len(steps) == 3:
            logits[1, 5] = fault
        return logits

    monkeypatch.setattr(Decoder, "step", spoiled)
    with pytest.raises(NonFiniteError, match="logits of the model are NaN or infinite"):
        generate_text_autoregressive(model, ids, 40, **CHOICES[choice])
    read_after = 1 if not on_gpu else 16 if choice == "an end" else 40
    assert len(steps) == max(3, read_after - 1)
    steps.clear()
    chosen = GenerationConfig(pad_token_id=7, do_sample="temperature" in CHOICES[choice], **CHOICES[choice])
    with pytest.raises(NonFiniteError):
        decode_loop.decode(Decoder(model), ids, 40, chosen, heard)
    assert len(heard) == 2 * (4 + 3)  # the prompt, and the tokens before


def test_short_answers_do_not_wait_for_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = model_of(), list[int]()
    monkeypatch.setattr(Decoder, "pack", lambda self: packed.append(1))
    for tokens in (1, 5, 40):
        generate_text_autoregressive(model, ids_of(1, 4), tokens)
    assert (pays(1), pays(5), pays(40)) == (False, False, True)
    assert packed == [1]


# --- on a GPU


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_gpu_path_gives_the_models_own_logits(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_decoder, "layout_of", lambda *_: layouts.row_by_row if packed else None)
    monkeypatch.setattr(fast_decoder, "_is_gpu", lambda device: True)
    model, ids = model_of(**KINDS[kind]), ids_of(3, 30)
    with torch.no_grad():
        expected = model(ids).logits[:, 6:]
    torch.testing.assert_close(fed(Decoder(model), ids, 7), expected, rtol=1e-4, atol=1e-4)


def test_what_memory_held_before_does_not_reach_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of the cache that are not filled are masked, and a masked NaN is still one."""
    monkeypatch.setattr(fast_decoder, "_is_gpu", lambda device: True)
    model, ids, empty = model_of(**MODERN), ids_of(2, 12), torch.empty
    expected = fed(Decoder(model), ids, 7)

    def used_before(*size: Any, **how: Any) -> Tensor:
        found = empty(*size, **how)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", used_before)
    assert torch.equal(fed(Decoder(model), ids, 7), expected)


class _CopiesWithoutCuda(TorchFunctionMode):
    """A torch without CUDA refuses to copy to or to index a tensor on a GPU, also on a fake one, but no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[1] == (..., None):
            return args[0].unsqueeze(-1)
        return (torch.ops.aten.copy_.default if func is Tensor.copy_ else func)(*args, **(kwargs or {}))


def on_a_fake_gpu(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            there = torch.empty(tensor.shape, dtype=kept, device="cuda")
            tensors[name] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there


class _Operations(TorchDispatchMode):
    """Records each operation with the shapes, strides and types of its tensors and with its other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        seen = [(tuple(it.shape), it.stride(), it.dtype) if isinstance(it, Tensor) else str(it) for it in leaves]
        self.found.append((str(func), seen))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["as GPT-2", "modern, grouped heads"])
def test_a_cuda_graph_can_capture_a_token(kind: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens take the same operations on tensors of the same shapes, and none reads a number back."""
    monkeypatch.setattr(fast_decoder, "_is_gpu", lambda device: True)
    model, ids = model_of(**KINDS[kind]), ids_of(3, 8)
    decoder = Decoder(model)
    chosen = {"do_sample": "temperature" in CHOICES[choice], **CHOICES[choice]}
    choices = decode_loop._Choice(ids, GenerationConfig(pad_token_id=7, **chosen))
    with torch.inference_mode():
        choices.choose(decoder.start(ids, 20))
        before = [*decoder._caches, choices.token, choices._ended, choices._unusable]
        recorded = []
        for _ in range(3):
            with _Operations() as operations:
                choices.choose(decoder.step(choices.token))
            recorded.append(operations.found)
    assert recorded[0] == recorded[1] == recorded[2]
    assert len(recorded[0]) > 100
    assert not [name for name, _ in recorded[0] if "local_scalar" in name or "nonzero" in name]
    after = [*decoder._caches, choices.token, choices._ended, choices._unusable]
    assert all(it is now for it, now in zip(before, after, strict=True))


class _Graph:
    """Stands for torch.cuda.CUDAGraph: the capture computes the step, so the first replay has nothing to do."""

    captured: Any = None

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:
            self.captured()


@pytest.mark.parametrize("choice", CHOICES)
def test_the_gpu_path_generates_the_same_tokens(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(**MODERN), ids_of(3, 8)
    torch.manual_seed(3)
    expected = generate_text_autoregressive(model, ids, 50, **CHOICES[choice])
    graphs: list[_Graph] = []
    monkeypatch.setattr(fast_decoder, "_is_gpu", lambda device: True)
    devices: list[Any] = []

    def stream_on(device: Any = None) -> Any:
        devices.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    monkeypatch.setattr(torch.cuda, "Stream", stream_on)
    monkeypatch.setattr(torch.cuda, "current_stream", stream_on)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graphs.append(graph) or nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    made = decode_loop.CapturedStep.__init__

    def remember(self: Any, step: Any, device: Any) -> None:
        made(self, step, device)
        self._graph.captured = step

    monkeypatch.setattr(decode_loop.CapturedStep, "__init__", remember)
    torch.manual_seed(3)
    tokens = generate_text_autoregressive(model, ids, 50, **CHOICES[choice])
    assert tokens.tolist() == expected.tolist()
    assert set(devices) == {ids.device}  # streams of the current device would capture nothing of another one's work
    assert [graph.replays for graph in graphs] == [47] if "eos_token_id" not in CHOICES[choice] else len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_everything_stays_there(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fake tensors stand for a GPU: they hold no numbers, but no operation takes two devices or two types."""
    monkeypatch.setattr(fast_decoder, "why_not", lambda _: None)  # a fake tensor is no plain one
    model = model_of(**KINDS[kind])
    with FakeTensorMode(), _CopiesWithoutCuda(), torch.no_grad():
        for module in model.modules():
            on_a_fake_gpu(module._parameters, dtype)
            on_a_fake_gpu(module._buffers, dtype)
        decoder = Decoder(model)
        logits = decoder.start(torch.zeros(2, 5, dtype=torch.long, device="cuda"), 9)
        decoder.pack()
        for _ in range(4):
            logits = decoder.step(logits.argmax(dim=-1))
        assert (logits.device.type, logits.dtype, tuple(logits.shape)) == ("cuda", torch.float32, (2, VOCAB))
        assert {(cache.device.type, cache.dtype) for cache in decoder._caches} == {("cuda", dtype)}
        with pytest.raises(RuntimeError, match="device"):
            decoder.step(torch.zeros(2, dtype=torch.long))


def test_lower_precision_is_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_decoder, "why_not", lambda _: None)
    with pytest.raises(UsageError, match=r"dtype=float16: only on a CPU, and the model is on meta; use auto"):
        Decoder(model_of().to("meta"), "float16")


# --- what it refuses


def adapted(model: GPTKitForCausalLM) -> nn.Module:
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return wrapped


def hooked(model: GPTKitForCausalLM) -> nn.Module:
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    return model


def in_two_places(_: GPTKitForCausalLM) -> nn.Module:
    model = model_of(tie_word_embeddings=False)
    model.lm_head.to("meta")
    return model


def with_an_adapter_inside(model: GPTKitForCausalLM) -> nn.Module:
    adapted(model)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapted, "PeftModel is no plain GPTKitForCausalLM"),
        (with_an_adapter_inside, r"q_proj is Linear, not a plain linear layer"),
        (hooked, r"model\.layers\.1 has forward hooks"),
        (lambda model: model.double(), "is a torch.float64 Tensor, not a plain 32-bit or 16-bit tensor"),
        (lambda model: model.to("meta"), "the model is on meta, and only a CPU or a CUDA GPU is supported"),
        (in_two_places, r"lm_head\.weight is on meta, the other parameters are on cpu"),
        (lambda _: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), "GPT2LMHeadModel is no plain"),
    ],
)
def test_other_models_are_left_to_transformers(change: Any, reason: str) -> None:
    model = change(model_of())
    with pytest.raises(UsageError, match=rf"dtype=float16: .*{reason}"):
        Decoder(model, "float16")
    assert why_not(model) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "int8"),
        (
            {"dtype": "int8", "overflow": "slide", "max_new_tokens": CONTEXT},
            "dtype=int8: not with a text that exceeds the model's positions",
        ),
    ],
)
def test_an_unavailable_dtype_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate_text_autoregressive(model_of(), ids_of(1, 4), **{"max_new_tokens": 4, **options})


def test_a_machine_without_packed_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_decoder, "has_packed_products", lambda weights: False)
    with pytest.raises(UsageError, match=r"dtype=float16: this CPU's torch has no such products; use auto"):
        Decoder(model_of(), "float16")
    model, ids = model_of(torch.bfloat16), ids_of(1, 8)
    assert fed(Decoder(model), ids, 2).isfinite().all()
