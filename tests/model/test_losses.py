from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpt_kit_hf.errors import NonFiniteError, UsageError
from gpt_kit_hf.model.losses import (
    compute_batch_loss,
    compute_loader_loss,
    evaluation_mode,
    summed_batch_loss,
    train_step_with_gradient_clipping,
)

VOCAB = 23


class Bigram(nn.Module):
    """Logits of the next token from the last one alone, with dropout so that the mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.table(ids))
        return logits


class Recorder(nn.Module):
    """Takes any keyword and notes it; answers in the way of transformers, with an object that has logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Bigram()
        self.keywords: dict[str, Any] = {}

    def forward(self, ids: Tensor, use_cache: bool = True, labels: Tensor | None = None) -> SimpleNamespace:
        self.keywords = {"use_cache": use_cache, "labels": labels}
        return SimpleNamespace(logits=self.inner(ids))


class Wrapping(nn.Module):
    """A user's own module around a model of transformers, which knows no keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids).logits
        return logits


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def random_batch(
    generator: torch.Generator, rows: int = 3, length: int = 7, ignored: float = 0.3
) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < ignored] = -100
    return ids[:, :-1], targets


def losses_by_hand(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> list[float]:
    """-log softmax(logits)[target] for each trained target, one at a time, in float64."""
    found = []
    for row_logits, row_targets in zip(logits.double(), targets, strict=True):
        for token_logits, target in zip(row_logits, row_targets.tolist(), strict=True):
            if target != ignore_index:
                found.append(float(token_logits.logsumexp(0) - token_logits[target]))
    return found


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


MODELS = {"bare": lambda: Bigram().eval(), "gpt2": tiny_gpt2, "llama": tiny_llama}
WRAPPERS = {
    "none": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed": DistributedDataParallel,
    "compiled distributed": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
def test_batch_loss_is_the_mean_over_trained_tokens(name: str, ignored: float, generator: torch.Generator) -> None:
    model = MODELS[name]()
    inputs, targets = random_batch(generator, ignored=ignored)
    expected = losses_by_hand(logits_of(model, inputs), targets)
    loss_sum, n_trained = summed_batch_loss(inputs, targets, model)
    assert n_trained.item() == len(expected) > 0
    assert loss_sum.item() == pytest.approx(math.fsum(expected), rel=1e-5)
    loss = compute_batch_loss(inputs, targets, model)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["bare", "gpt2"])
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "none"])
def test_wrapped_models_give_the_same_loss_and_gradient(name: str, wrapper: str, generator: torch.Generator) -> None:
    model = MODELS[name]()
    inputs, targets = random_batch(generator)
    expected = compute_batch_loss(inputs, targets, model)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    wrapped = WRAPPERS[wrapper](model)
    loss = compute_batch_loss(inputs, targets, wrapped)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_module_around_a_transformers_model_is_called_with_the_ids_alone(generator: torch.Generator) -> None:
    model = tiny_gpt2()
    inputs, targets = random_batch(generator)
    expected = compute_batch_loss(inputs, targets, model)
    torch.testing.assert_close(compute_batch_loss(inputs, targets, Wrapping(model)), expected)


def test_no_cache_is_made_and_targets_are_never_labels(generator: torch.Generator) -> None:
    model = Recorder()
    compute_batch_loss(*random_batch(generator), model)
    assert model.keywords == {"use_cache": False, "labels": None}


def test_shifted_pairs_equal_the_models_own_loss_on_unshifted_labels(generator: torch.Generator) -> None:
    model = tiny_gpt2()
    ids = torch.randint(VOCAB, (3, 9), generator=generator)
    own = model(ids, labels=ids).loss
    torch.testing.assert_close(compute_batch_loss(ids[:, :-1], ids[:, 1:], model), own)
    # The trap: shifted targets as labels are shifted again, and another thing is trained.
    shifted_twice = model(ids[:, :-1], labels=ids[:, 1:]).loss
    assert abs(shifted_twice.item() - own.item()) > 1e-4


def test_loss_of_half_precision_logits_is_computed_in_float32(generator: torch.Generator) -> None:
    model = tiny_gpt2().bfloat16()
    inputs, targets = random_batch(generator, rows=8, length=20)
    loss = compute_batch_loss(inputs, targets, model)
    expected = losses_by_hand(logits_of(model, inputs), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_a_trained_token_is_zero_with_a_graph(name: str, generator: torch.Generator) -> None:
    model = MODELS[name]()
    inputs, targets = random_batch(generator)
    loss = compute_batch_loss(inputs, torch.full_like(targets, -100), model)
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_ignore_index_may_be_a_token(generator: torch.Generator) -> None:
    model = Bigram().eval()
    inputs, targets = random_batch(generator, ignored=0.0)
    expected = losses_by_hand(logits_of(model, inputs), targets, ignore_index=int(targets[0, 0]))
    loss = compute_batch_loss(inputs, targets, model, ignore_index=int(targets[0, 0]))
    assert loss.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)


def test_pinned_batches_are_copied_without_waiting(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of other memory must not go on after the call: its caller may change it."""
    seen: list[bool] = []
    to = Tensor.to

    def recorded(tensor: Tensor, *arguments: Any, **more: Any) -> Tensor:
        if tensor.dtype == torch.int64:
            seen.append(more.get("non_blocking", False))
        return to(tensor, *arguments, **more)

    batch = random_batch(generator)
    for pinned in (False, True):
        monkeypatch.setattr(Tensor, "is_pinned", lambda tensor, pinned=pinned: pinned)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", recorded)
            compute_batch_loss(*batch, Bigram())
    assert seen == [False] * 2 + [True] * 2


def test_device_none_is_the_models_own_and_a_name_is_obeyed(generator: torch.Generator) -> None:
    model = Bigram().to("meta")
    inputs, targets = random_batch(generator)
    loss_sum, n_trained = summed_batch_loss(inputs, targets, model)
    assert loss_sum.device.type == n_trained.device.type == "meta"
    assert compute_batch_loss(inputs, targets, Bigram(), device="cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 4).long(), r"\(2, 3\) and target_batch \(2, 4\)"),
        (torch.zeros(3).long(), torch.zeros(3).long(), r"input_batch is torch.int64 \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), "input_batch is torch.float32"),
        ([[1]], torch.zeros(1, 1).long(), "input_batch is list"),
        (torch.zeros(2, 3).long(), torch.full((2, 3), VOCAB), f"holds {VOCAB}; .* vocab_size={VOCAB}"),
        (torch.zeros(2, 3).long(), torch.full((2, 3), -1), "holds -1"),
    ],
)
def test_unusable_batches_are_named(inputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compute_batch_loss(inputs, targets, Bigram())


def test_models_without_usable_logits_are_named(generator: torch.Generator) -> None:
    class Tuples(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor]:
            return (ids,)

    class Pooled(Bigram):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).mean(1)

    inputs, targets = random_batch(generator)
    with pytest.raises(UsageError, match="model returned tuple"):
        compute_batch_loss(inputs, targets, Tuples())
    with pytest.raises(UsageError, match=r"logits \(3, 23\) for targets \(3, 7\)"):
        compute_batch_loss(inputs, targets, Pooled())


def test_loader_loss_weighs_every_token_the_same(generator: torch.Generator) -> None:
    model = Bigram()  # in train mode: the dropout must be off
    loader = [
        random_batch(generator, rows, length, ignored)
        for rows, length, ignored in [(1, 3, 0.0), (4, 9, 0.8), (2, 5, 0.2), (1, 2, 1.1)]
    ]
    per_batch = [losses_by_hand(model.table(x).detach(), y) for x, y in loader]
    everything = [loss for batch in per_batch for loss in batch]
    found = compute_loader_loss(loader, model)
    assert isinstance(found, float)
    assert found == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    mean_of_means = sum(sum(batch) / len(batch) for batch in per_batch[:3]) / 3
    assert abs(found - mean_of_means) > 1e-3  # or the weights would not show

    first_two = per_batch[0] + per_batch[1]
    expected = sum(first_two) / len(first_two)
    assert compute_loader_loss(loader, model, num_batches=2) == pytest.approx(expected, rel=1e-5)
    assert compute_loader_loss(loader, model, num_batches=99) == found


def test_loader_loss_leaves_modes_and_gradients(generator: torch.Generator) -> None:
    model = nn.Sequential(Bigram(), nn.Sequential(nn.Dropout(0.1), nn.Identity()))
    model.train()
    model[1][0].eval()
    modes = [module.training for module in model.modules()]
    batch = random_batch(generator)
    compute_loader_loss([batch], model)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UsageError, match="shapes"):
        compute_loader_loss([batch, (batch[0], batch[1][:1])], model)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    compute_loader_loss([batch], model)
    assert not any(module.training for module in model.modules())


def test_evaluation_mode_reaches_inside_a_compiled_model() -> None:
    model = Bigram()
    model.dropout.eval()
    compiled = torch.compile(model, backend="eager")
    with evaluation_mode(compiled):
        assert [module.training for module in compiled.modules()] == [False] * 4
    assert model.training
    assert not model.dropout.training


def test_loader_loss_leaves_the_random_state(generator: torch.Generator) -> None:
    ids = torch.randint(VOCAB, (10, 8), generator=generator)
    loader = DataLoader(list(zip(ids[:, :-1], ids[:, 1:], strict=True)), batch_size=3, shuffle=True)
    model = Bigram()
    state = torch.get_rng_state()
    next(iter(loader))
    assert not torch.equal(torch.get_rng_state(), state)  # or the test could not fail
    state = torch.get_rng_state()
    compute_loader_loss(loader, model)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UsageError, match="for targets"):
        compute_loader_loss(loader, nn.Identity())
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_loss_needs_a_trained_token(generator: torch.Generator) -> None:
    inputs, targets = random_batch(generator)
    with pytest.raises(UsageError, match="num_batches=0"):
        compute_loader_loss([(inputs, targets)], Bigram(), num_batches=0)
    with pytest.raises(UsageError, match="no batch"):
        compute_loader_loss([], Bigram())
    with pytest.raises(UsageError, match="ignore_index=-100"):
        compute_loader_loss([(inputs, torch.full_like(targets, -100))] * 2, Bigram())


@pytest.mark.parametrize("max_norm", [None, 1e-3, 0.05, 1e6])
def test_train_step_is_clipped_gradient_descent(max_norm: float | None, generator: torch.Generator) -> None:
    model = tiny_gpt2()
    inputs, targets = random_batch(generator)
    before = [p.detach().clone() for p in model.parameters()]
    loss = compute_batch_loss(inputs, targets, model)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert 0.05 < norm < 1e6  # or clipping and not clipping would not both be seen
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)  # what an earlier loop left behind
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    result = train_step_with_gradient_clipping(
        inputs, targets, model, optimizer, max_norm=max_norm, scheduler=scheduler
    )

    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    scale = 1.0 if max_norm is None else min(1.0, max_norm / norm)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * scale * gradient, rtol=1e-5, atol=1e-7)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_train_step_clips_what_the_optimizer_holds(generator: torch.Generator) -> None:
    model = tiny_gpt2()
    inputs, targets = random_batch(generator)
    held = list(model.transformer.h[0].parameters())
    gradients = torch.autograd.grad(compute_batch_loss(inputs, targets, model), held)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    result = train_step_with_gradient_clipping(inputs, targets, model, torch.optim.SGD(held, lr=0.1))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("fault", ["loss", "gradient", "loss alone"])
def test_a_non_finite_step_changes_nothing(fault: str, max_norm: float | None, generator: torch.Generator) -> None:
    model = Bigram().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    batch = random_batch(generator)
    train_step_with_gradient_clipping(*batch, model, optimizer, scheduler=scheduler)
    messages = {
        "loss": "loss=nan",
        "gradient": r"loss=\d.*grad_norm=(nan|inf)",
        "loss alone": r"loss=inf, grad_norm=\d",
    }
    before = model.table.weight.detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[model.table.weight].items()}
    learning_rate = optimizer.param_groups[0]["lr"]
    if fault == "gradient":  # a finite loss whose gradient is not
        model.table.weight.register_hook(lambda gradient: gradient * math.inf)
    elif fault == "loss":
        model.register_forward_hook(lambda module, args, logits: logits * math.nan)
    else:  # a target of probability 0 has an infinite loss and a finite gradient
        is_target = torch.arange(VOCAB) == batch[1].max()
        model.register_forward_hook(lambda module, args, logits: logits.masked_fill(is_target, -math.inf))

    with pytest.raises(NonFiniteError, match=messages[fault]):
        train_step_with_gradient_clipping(*batch, model, optimizer, max_norm=max_norm, scheduler=scheduler)

    assert torch.equal(model.table.weight, before)
    assert all(torch.equal(optimizer.state[model.table.weight][key], moments[key]) for key in moments)
    assert model.table.weight.grad is None
    assert optimizer.param_groups[0]["lr"] == learning_rate


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_train_step_refuses_a_norm_that_is_not_above_zero(max_norm: float, generator: torch.Generator) -> None:
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="max_norm="):
        train_step_with_gradient_clipping(*random_batch(generator), model, optimizer, max_norm=max_norm)
