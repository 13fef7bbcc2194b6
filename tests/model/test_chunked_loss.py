"""The loss without logits, beside torch's own on the logits."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from shapes import both_shapes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM
from gpt_kit_hf.model import chunked_loss
from gpt_kit_hf.model.chunked_loss import padded_size, summed_cross_entropy
from gpt_kit_hf.model.losses import summed_batch_loss

IGNORED = -100


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_CPU_LOGITS", 1 << 11)


def operands(
    rows: int, columns: int, width: int, ignored: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(columns, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, with the logits."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    gradients = torch.autograd.grad(loss * scale, (hidden, weight))
    return loss.detach(), *gradients


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 2, 3), (7, 64, 4), (100, 257, 16), (33, 5000, 8)])
def test_loss_and_gradients_are_those_of_the_logits(rows: int, columns: int, width: int, ignored: float) -> None:
    hidden, weight, targets = operands(rows, columns, width, ignored)
    loss = summed_cross_entropy(hidden, weight, targets)
    got = (loss, *torch.autograd.grad(loss * 0.37, (hidden, weight)))
    for ours, exact in zip(got, reference(hidden, weight, targets, 0.37), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_in", ["half", "float32"])
def test_half_precision_is_used_in_products_only(dtype: torch.dtype, weights_in: str) -> None:
    hidden, weight, targets = operands(48, 300, 16, 0.2, dtype if weights_in == "half" else torch.float32)
    with torch.autocast("cpu", dtype, enabled=weights_in == "float32"):
        loss = summed_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [hidden.dtype, weight.dtype]
    exact = reference(hidden, weight, targets, 1.0)
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-3, atol=0.0)
    for ours, theirs in zip(gradients, exact[1:], strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [61, 64, 257])
def test_memory_that_was_not_written_spoils_nothing(dtype: torch.dtype, columns: int) -> None:
    hidden, weight, targets = operands(40, columns, 16, 0.2, dtype)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        loss = summed_cross_entropy(hidden, weight, targets)
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_double_precision_stays_double() -> None:
    hidden, weight, targets = operands(90, 40, 8, 0.2, torch.float64)
    loss = summed_cross_entropy(hidden, weight, targets)
    got = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for ours, exact in zip(got, reference(hidden, weight, targets, 1.0), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_logits_far_apart_overflow_nothing() -> None:
    hidden, weight, targets = operands(20, 100, 8, 0.0)
    with torch.no_grad():
        hidden *= 1000.0
    loss = summed_cross_entropy(hidden, weight, targets)
    exact = reference(hidden, weight, targets, 1.0)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_gradients_that_are_asked_for_are_computed(wanted: str) -> None:
    hidden, weight, targets = operands(30, 500, 8, 0.0)
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    with Products() as products:
        loss = summed_cross_entropy(hidden, weight, targets)
    blocks = sum(name == "mm" for name, _ in products.shapes)
    assert products.largest < 30 * 500
    if wanted == "none":
        assert not loss.requires_grad
        assert blocks == len(products.shapes)
    else:
        loss.backward()  # type: ignore[no-untyped-call]
        given = hidden if wanted == "hidden" else weight
        exact = reference(hidden, weight, targets, 1.0)[1 if wanted == "hidden" else 2]
        assert given.grad is not None
        torch.testing.assert_close(given.grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = operands(6, 20, 4, 0.0)
    loss = summed_cross_entropy(hidden, weight, targets) * 2.0
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


class Products(TorchDispatchMode):
    """Notes the matrix products that run, and the most numbers that a tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            self.shapes.append((name, tuple(args[0].shape)))
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_rows_that_are_not_trained_cost_nothing_on_a_cpu() -> None:
    hidden, weight, targets = operands(64, 300, 8, 0.0)
    targets[5:] = IGNORED
    with Products() as products:
        summed_cross_entropy(hidden, weight, targets)
    forward = [shape for name, shape in products.shapes if name == "mm" and shape[1] == 8]
    assert sum(rows for rows, _ in forward) == 5


def test_untrained_rows_may_hold_anything() -> None:
    hidden, weight, targets = operands(100, 30, 8, 0.0, torch.bfloat16)
    targets[::3] = IGNORED
    assert padded_size(66) == 72  # trained rows, and what they are filled up to
    clean = hidden.detach().clone().requires_grad_()
    with torch.no_grad():
        hidden[::3] = torch.nan
    losses = [summed_cross_entropy(each, weight, targets) for each in (hidden, clean)]
    gradients = [torch.autograd.grad(losses[0], (hidden, weight)), torch.autograd.grad(losses[1], (clean, weight))]
    for ours, exact in zip((losses[0], *gradients[0]), (losses[1], *gradients[1]), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, exact)


def test_products_have_few_sizes_whatever_the_number_of_trained_rows() -> None:
    sizes = set()
    for trained in range(1, 600):
        hidden, weight, targets = operands(600, 3, 2, 0.0, torch.bfloat16)
        targets[trained:] = IGNORED
        with Products() as products, torch.no_grad():
            summed_cross_entropy(hidden, weight, targets)
        rows = sum(rows for _, (rows, _) in products.shapes)
        assert trained <= rows <= min(trained * 9 / 8, 600)
        sizes.add(rows)
    assert len(sizes) < 8 * 8  # of 599


# --- devices other than a CPU


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Compute on the CPU what other devices compute, uncompiled."""
    monkeypatch.setattr(chunked_loss, "_on_cpu", lambda tensor: False)
    monkeypatch.setattr(chunked_loss, "_compiled", chunked_loss._replace_by_gradients_fused)
    monkeypatch.setattr(chunked_loss, "_DEVICE_BYTES", 1 << 13)
    return monkeypatch


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "width"), [(7, 64, 4), (33, 257, 16), (1, 2, 3)])
@pytest.mark.usefixtures("as_on_a_device")
def test_a_device_computes_the_same(rows: int, columns: int, width: int, dtype: torch.dtype, ignored: float) -> None:
    hidden, weight, targets = operands(rows, columns, width, ignored, dtype)
    loss = summed_cross_entropy(hidden, weight, targets)
    got = (loss, *torch.autograd.grad(loss * 0.37, (hidden, weight)))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for ours, exact in zip(got, reference(hidden, weight, targets, 0.37), strict=True):
        assert float((ours.detach().double() - exact).norm()) <= tolerance * float(exact.norm()) + 1e-9


@pytest.mark.parametrize("needed", [True, False])
def test_where_compiling_fails_the_loss_is_the_same(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **_: Any) -> Any:
        def fails(*args: Any, **kwargs: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed(torch.compile, RuntimeError("no Triton"), None)

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled, results = chunked_loss._Compiled(), []
    for function in (compiled, compiled, chunked_loss._replace_by_gradients):
        logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        results.append((function(logits, 50, torch.arange(5), 3, needed=needed), logits))
    for losses, logits in results[:2]:
        assert torch.equal(losses, results[2][0])
        assert torch.equal(logits, results[2][1])


def test_where_it_was_compiled_too_often_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that trains several models, or in several precisions."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = chunked_loss._Compiled()
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64):
            logits = torch.randn(5, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
            expected = chunked_loss._replace_by_gradients(logits.clone(), 50, torch.arange(5), 3, needed=True)
            torch.testing.assert_close(compiled(logits, 50, torch.arange(5), 3, needed=True), expected)


def test_memory_that_runs_out_is_not_taken_for_a_failed_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        chunked_loss._Compiled()(torch.zeros(5, 64), 50, torch.arange(5), 3, needed=True)


@pytest.mark.slow  # torch's compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_compiled_it_stores_nothing_of_the_size_of_the_logits() -> None:
    """One kernel for any number of rows; for a CPU, torch makes it by the same rules."""
    from torch._inductor.utils import run_and_get_code

    compiled = chunked_loss._Compiled()

    def compare() -> None:
        for rows in (64, 33):
            generator = torch.Generator().manual_seed(rows)
            logits = torch.randn(rows, 20032, generator=generator).bfloat16()
            targets = torch.randint(20000, (rows,), generator=generator)
            targets[3] = IGNORED
            eager = logits.clone()
            losses = chunked_loss._replace_by_gradients(eager, 20000, targets, IGNORED, needed=True)
            torch.testing.assert_close(compiled(logits, 20000, targets, IGNORED, needed=True), losses)
            torch.testing.assert_close(logits[:, :20000], eager[:, :20000])

    _, codes = run_and_get_code(compare)
    assert len(codes) == 1
    allocations = re.findall(r"empty_strided_cpu\(.*", codes[0])
    assert allocations
    assert not [allocation for allocation in allocations if "20000" in allocation or "20032" in allocation]


# --- the model


def small_model(**options: Any) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 211, "n_layer": 2, "n_head": 2, "n_embd": 16, "max_position_embeddings": 32}
    return GPTKitForCausalLM(GPTKitConfig(**{**sizes, **options}))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WAYS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "labels": lambda targets: {"labels": targets},
    "shift_labels": lambda targets: {"shift_labels": targets},
    "items": lambda targets: {"labels": targets, "num_items_in_batch": 7},
    "items as a tensor": lambda targets: {"shift_labels": targets, "num_items_in_batch": torch.tensor(7)},
    "ignore_index": lambda targets: {"labels": targets.where(targets >= 0, 3), "ignore_index": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [True, False])
@both_shapes
def test_the_model_gives_the_same_loss_without_logits(way: str, tied: bool, shape: dict[str, Any]) -> None:
    model = small_model(tie_word_embeddings=tied, **shape)
    ids = torch.randint(211, (3, 20), generator=torch.Generator().manual_seed(1))
    targets = ids.clone()
    targets[0, :5] = targets[2, 11:] = IGNORED
    plain = model(ids, **WAYS[way](targets))
    short = model(ids, skip_logits=True, **WAYS[way](targets))
    assert short.logits is None
    torch.testing.assert_close(short.loss, plain.loss, rtol=1e-6, atol=1e-6)
    expected, got = gradients(model, plain.loss), gradients(model, short.loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_without_labels_there_are_logits_to_give() -> None:
    assert small_model()(torch.arange(4)[None], skip_logits=True).logits is not None


def adapted(model: GPTKitForCausalLM) -> nn.Module:
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    return wrapped


def hooked(model: GPTKitForCausalLM) -> nn.Module:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
@pytest.mark.parametrize("change", [adapted, hooked])
def test_an_output_projection_with_adapter_or_hook_computes_logits(change: Callable[[Any], nn.Module]) -> None:
    model = change(small_model(tie_word_embeddings=False))
    ids = torch.arange(10)[None]
    given = model(ids, labels=ids, skip_logits=True)
    assert given.logits is not None
    torch.testing.assert_close(given.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.Sequential])
def test_the_packages_loss_asks_for_no_logits(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that hands on nothing but the ids gets what it can."""
    model = small_model()
    asked: list[bool] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", noting(forward, asked))
    ids = torch.arange(12)[None]
    if wrap is torch.nn.Sequential:
        summed_batch_loss(ids[:, :-1], ids[:, 1:], wrap(model))
        assert asked == [False]
    else:
        loss = summed_batch_loss(ids[:, :-1], ids[:, 1:], model)
        assert asked == [True]
        expected = forward(ids, labels=ids).loss * 11
        torch.testing.assert_close(loss.loss_sum, expected)


def noting(forward: Callable[..., Any], asked: list[bool]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("skip_logits", False))
        return forward(*args, **kwargs)

    noted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return noted
