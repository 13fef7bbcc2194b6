"""Decay groups, Muon beside AdamW, and the learning rate of each step."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.optim import AdamW, Muon, Optimizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from gpt_kit_hf import (
    AMPTrainer,
    GPTModel,
    OptimizerOptions,
    UsageError,
    create_model_config,
    create_optimizer,
    learning_rate_at,
)
from gpt_kit_hf.options.finetuning import AdapterOptions
from gpt_kit_hf.storage.atomic_files import load_json, load_tensors, save_json, save_tensors
from gpt_kit_hf.training.lora import add_adapter
from gpt_kit_hf.training.optim import muon
from gpt_kit_hf.training.optim.optimizer import set_learning_rate
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state

MUON = OptimizerOptions(optimizer="muon", learning_rate=1e-2, muon_learning_rate=3e-2, weight_decay=0.2)
NORMUON = dataclasses.replace(MUON, muon_beta2=0.8)


def rates(total: int, **options: object) -> list[float]:
    chosen = OptimizerOptions(learning_rate=2.0, **options)  # type: ignore[arg-type]
    return [learning_rate_at(step, total, chosen) for step in range(total)]


def test_matrices_decay_and_the_rest_does_not() -> None:
    model = GPTModel(create_model_config("nano-xs", vocab_size=50))
    optimizer = create_optimizer(model, OptimizerOptions(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def test_frozen_weights_are_left_out() -> None:
    model = GPTModel(create_model_config("nano-xs", vocab_size=50))
    model.model.embed_positions.requires_grad_(False)
    count = sum(len(group["params"]) for group in create_optimizer(model, OptimizerOptions()).param_groups)
    assert count == len(list(model.parameters())) - 1


def test_the_warm_up_rises_to_the_peak() -> None:
    for schedule in ("cosine", "warmup_stable_decay", "linear", "constant_with_warmup"):
        assert rates(100, warmup_steps=4, lr_scheduler_type=schedule)[:4] == [0.5, 1.0, 1.5, 2.0]
        assert rates(100, warmup_steps=0, lr_scheduler_type=schedule)[0] == 2.0


def test_each_schedule_follows_its_formula() -> None:
    cosine = rates(101, warmup_steps=0, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    assert cosine == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * t / 100)) for t in range(101)])
    linear = rates(101, warmup_steps=0, lr_scheduler_type="linear", min_lr_ratio=0.5)
    assert linear == pytest.approx([2.0 - 1.0 * t / 100 for t in range(101)])
    wsd = rates(100, warmup_steps=10, lr_scheduler_type="warmup_stable_decay", min_lr_ratio=0.0, decay_ratio=0.2)
    assert wsd[10:81] == [2.0] * 71
    assert wsd[80:] == pytest.approx([2.0 * (1 - t / 19) for t in range(20)])
    assert set(rates(50, warmup_steps=0, lr_scheduler_type="constant_with_warmup")) == {2.0}


def test_a_run_shorter_than_its_warm_up_keeps_rising() -> None:
    assert rates(3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])


def test_all_groups_get_the_rate() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# --- Muon: which parameters


def tiny_model(**overrides: Any) -> GPTModel:
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 61, "max_position_embeddings": 12}
    return GPTModel(create_model_config("nano-xs", **{**shape, **overrides}))


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def muon_names(model: Any, optimizer: Optimizer) -> set[str]:
    """Return the names of Muon's parameters; check that each trained parameter is in one group."""
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in model.parameters() if p.requires_grad}
    names = names_of(model)
    return {names[p] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}


def neo_x() -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=61, **sizes))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=61, ffn_dim=24, **sizes))


def gpt2(**options: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 61, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


OURS = r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(up|down))_proj\.weight"
GPT2 = r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
# A model, the names of its matrices and how many there are.
SPLITS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "tied": (tiny_model, OURS, 12),
    "untied": (lambda: tiny_model(tie_word_embeddings=False), OURS, 12),
    "sinusoidal, no biases": (lambda: tiny_model(position_embedding="sinusoidal", use_bias=False), OURS, 12),
    "gpt2": (gpt2, GPT2, 8),
    "gpt2 untied": (lambda: gpt2(tie_word_embeddings=False), GPT2, 8),
    "llama": (llama, r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight", 14),
    "neox": (neo_x, r"gpt_neox\.layers\.\d\.(attention|mlp)\.dense\w*\.weight|.*query_key_value\.weight", 8),
    # The embedding is narrower than the model: linear layers before and after the blocks widen and narrow it.
    "opt": (opt, r".*layers\.\d\.(self_attn\.([qkv]|out)_proj|fc[12])\.weight|.*project_(in|out)\.weight", 14),
    "lora": (lambda: add_adapter(tiny_model(), AdapterOptions(lora_r=2)), r".*\.lora_[AB]\.default\.weight", 24),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_muon_gets_the_matrices_of_the_blocks(kind: str) -> None:
    build, pattern, count = SPLITS[kind]
    model = build()
    optimizer = create_optimizer(model, MUON)
    found = muon_names(model, optimizer)
    assert len(found) == count
    assert found == {n for n, p in model.named_parameters() if p.requires_grad and re.fullmatch(pattern, n)}
    names = names_of(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.2 if parameter.dim() >= 2 else 0.0), names[parameter]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[n]) != p.requires_grad for n, p in model.named_parameters())


def test_frozen_matrices_are_left_out() -> None:
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    assert len(muon_names(model, create_optimizer(model, MUON))) == 6


# PEFT asks every model for this switch by a name that transformers has given up since.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_trained_copy_of_the_head_is_not_muons() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False), config)
    found = muon_names(model, create_optimizer(model, MUON))
    assert len(found) == 4
    assert all("lora" in name for name in found)


# --- Muon: what it computes


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations: Jordan et al. 2024, who compute them in bfloat16; here in float32."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("muon_rate", [None, 3e-2])
def test_muon_steps_as_its_papers_say(muon_rate: float | None) -> None:
    model = tiny_model()
    options = OptimizerOptions(
        optimizer="muon", learning_rate=1e-2, muon_learning_rate=muon_rate, weight_decay=0.2, muon_momentum=0.8
    )
    optimizer = create_optimizer(model, options)
    matrices = {n: p for n, p in model.named_parameters() if re.fullmatch(OURS, n)}
    assert {tuple(p.shape) for p in matrices.values()} == {(16, 16), (64, 16), (16, 64)}
    for matrix in matrices.values():
        nn.init.normal_(matrix)  # as large as a step's direction, so that the decay counts
    sums = {name: torch.zeros_like(p) for name, p in matrices.items()}
    rate = muon_rate or 1e-2
    for seed in range(3):
        give_gradients(model, seed)
        before = {name: p.detach().clone() for name, p in matrices.items()}
        optimizer.step()
        for name, matrix in matrices.items():
            assert matrix.grad is not None
            sums[name] = 0.8 * sums[name] + matrix.grad
            direction = orthogonalized(matrix.grad + 0.8 * sums[name])  # Nesterov's momentum
            wanted = 0.2 * math.sqrt(max(matrix.shape)) * direction  # Liu et al. 2025
            step = (before[name] * (1 - rate * 0.2) - matrix.detach()) / rate
            assert (step - wanted).norm() < 1e-3 * wanted.norm(), name
            assert 0.15 < step.square().mean().sqrt() < 0.25, name  # the size of AdamW's step


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_matrices_in_batches_step_as_torchs_muon_steps_them_one_by_one(
    adjust: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "_MAX_BATCH_ELEMENTS", 200)  # several batches of a shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 8), (8, 24), (8, 8), (8, 8), (24, 8)]
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": adjust}
    optimizers = [muon.MuonWithAdamW(Muon(ours, **options), AdamW([torch.zeros(1)])), Muon(theirs, **options)]
    for _ in range(3):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).norm() < 0.08 * other.norm()  # torch's rounds to bfloat16
    assert optimizers[0].state_dict()["param_groups"][:1] == optimizers[1].state_dict()["param_groups"]


@pytest.mark.parametrize("shape", [(16, 16), (16, 31), (16, 32), (16, 80), (80, 16), (1, 8)])
@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
def test_matrices_are_orthogonalised_as_in_double_precision(shape: tuple[int, int], spread: float) -> None:
    """Singular values over up to six powers of ten: what is lost in the gram matrix must not matter."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -spread, shape[1], dtype=torch.float64)
    matrices = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * sizes
    found = muon.orthogonalised(matrices.float(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert found.shape == matrices.shape
    for own, matrix in zip(found, matrices, strict=True):
        wanted = orthogonalized(matrix if shape[0] <= shape[1] else matrix.mT)
        wanted = wanted if shape[0] <= shape[1] else wanted.mT
        assert (own - wanted).norm() < 1e-3 * wanted.norm()  # bfloat16 is a hundred times further off


def test_the_rest_steps_as_adamw_alone_does_to_the_bit() -> None:
    model, alone = tiny_model(), tiny_model()
    optimizer = create_optimizer(model, MUON)
    rest = {n: p for n, p in alone.named_parameters() if not re.fullmatch(OURS, n)}
    groups = [
        {"params": [p for p in rest.values() if p.dim() == 2], "weight_decay": 0.2},
        {"params": [p for p in rest.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, fused=True)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(alone, seed)
        optimizer.step()
        reference.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name)) == (name in rest), name


def test_a_closure_is_called_once_and_with_gradients() -> None:
    model, plain = tiny_model(), tiny_model()
    ids = torch.arange(12)[None]

    def closure() -> float:
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.item()

    loss = create_optimizer(model, MUON).step(closure)
    reference = plain(ids, labels=ids).loss
    reference.backward()
    create_optimizer(plain, MUON).step()
    assert loss == reference.item()
    assert_same_weights(model, plain)


def test_rows_are_divided_by_the_root_of_their_running_mean_square() -> None:
    """Against the formula, matrix by matrix; one row has no gradient at first, one never."""
    model, plain = tiny_model(), tiny_model()
    ours, theirs = create_optimizer(model, NORMUON), create_optimizer(plain, MUON)
    means: dict[str, Tensor] = {}
    for step in range(4):
        for each in (model, plain):
            give_gradients(each, step)
            for name in muon_names(each, theirs if each is plain else ours):
                gradient = each.get_parameter(name).grad
                assert gradient is not None
                gradient[0] = 0.0
                if step < 2:
                    gradient[1] = 0.0
        with torch.no_grad():
            before = {name: p.clone() for name, p in model.named_parameters()}
            for name, parameter in plain.named_parameters():
                parameter.copy_(before[name])
        ours.step()
        theirs.step()
        for name in muon_names(model, ours):
            rows, columns = before[name].shape
            # What plain Muon has subtracted, orthogonal with a root mean square of 0.2 / sqrt of the shorter side.
            kept = before[name] * (1 - 3e-2 * 0.2)
            matrix = (kept - plain.get_parameter(name).detach()) / (3e-2 * 0.2 * max(rows, columns) ** 0.5)
            squares = matrix.square().mean(1)
            old = means.get(name, torch.zeros(rows))
            means[name] = torch.where(old > 0, 0.8 * old + 0.2 * squares, squares)
            scaled = matrix / means[name].clamp(min=1e-12).sqrt()[:, None]
            expected = kept - 3e-2 * 0.2 * scaled
            torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=0, atol=2e-5)
            assert model.get_parameter(name).isfinite().all()


def test_a_group_added_later_is_adamws() -> None:
    optimizer = create_optimizer(tiny_model(), MUON)
    late, alone = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    late.grad, alone.grad = torch.eye(3), torch.eye(3)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [late], "weight_decay": 0.5})
    optimizer.step()
    AdamW([alone], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, fused=True).step()
    assert torch.equal(late, alone)
    assert not torch.equal(late, torch.ones(3, 3))


# --- Muon: loss scaling and resuming


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(ids, labels=ids).loss
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss_of(model, step).backward()
        optimizer.step()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


Carried = tuple[nn.Module, Optimizer]


def by_files(model: nn.Module, optimizer: Optimizer, folder: Path) -> Carried:
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    save_tensors(folder / "optimizer.safetensors", tensors)
    save_json(folder / "optimizer.json", state)
    other = copy.deepcopy(model)
    fresh = create_optimizer(other, NORMUON)
    stored = load_tensors(folder / "optimizer.safetensors")
    restore_optimizer_state(fresh, stored, load_json(folder / "optimizer.json"), names_of(other))
    return other, fresh


def by_state_dict(model: nn.Module, optimizer: Optimizer, folder: Path) -> Carried:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    other = copy.deepcopy(model)
    fresh = create_optimizer(other, NORMUON)
    fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return other, fresh


def by_deepcopy(model: nn.Module, optimizer: Optimizer, folder: Path) -> Carried:
    return copy.deepcopy((model, optimizer))


def by_accelerate(model: nn.Module, optimizer: Optimizer, folder: Path) -> Carried:
    other, fresh = by_state_dict(model, optimizer, folder)
    prepared: Optimizer = Accelerator(cpu=True).prepare(fresh)
    return other, prepared


@pytest.mark.parametrize("carry", [by_files, by_state_dict, by_deepcopy, by_accelerate])
def test_a_carried_optimizer_continues_to_the_bit(carry: Callable[..., Carried], tmp_path: Path) -> None:
    straight = tiny_model()
    train(straight, uninterrupted := create_optimizer(straight, NORMUON), range(6))
    first = tiny_model()
    train(first, optimizer := create_optimizer(first, NORMUON), range(3))
    second, resumed = carry(first, optimizer, tmp_path)
    train(first, optimizer, range(9, 11))  # shares no memory with the resumed one
    train(second, resumed, range(3, 6))
    assert_same_weights(second, straight)
    inner = resumed.optimizer if carry is by_accelerate else resumed
    ours, theirs = (flatten_optimizer_state(o, names_of(m)) for o, m in ((inner, second), (uninterrupted, straight)))
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert sum(name.startswith("momentum_buffer.") for name in ours[0]) == 12
    assert sum(name.startswith("row_mean_square.") for name in ours[0]) == 12
    for name, value in theirs[0].items():
        assert torch.equal(ours[0][name], value), name


def test_a_rate_of_zero_applies_to_all_groups_after_loading() -> None:
    model = tiny_model()
    optimizer = create_optimizer(model, MUON)
    optimizer.load_state_dict(optimizer.state_dict())
    set_learning_rate(optimizer, 0.0)
    before = copy.deepcopy(model)
    give_gradients(model, 0)
    optimizer.step()
    assert_same_weights(model, before)


@pytest.mark.parametrize("prepared", [False, True])
def test_scaled_gradients_step_as_plain_ones_do(prepared: bool) -> None:
    """The scale is a power of two, and the weights float32: not a bit may differ."""
    model, plain = tiny_model(), tiny_model()
    reference = create_optimizer(plain, MUON)
    optimizer: Any = create_optimizer(model, MUON)
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        scaler.scale(loss_of(model.eval(), step)).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        train(plain.eval(), reference, range(step, step + 1))
    assert_same_weights(model, plain)


@pytest.mark.parametrize("spoilt", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_gradient_that_is_not_finite_changes_no_parameter(spoilt: str) -> None:
    model = tiny_model()
    optimizer = create_optimizer(model, MUON)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model)
    scaler.scale(loss_of(model, 0)).backward()
    gradient = model.get_parameter(spoilt).grad
    assert gradient is not None
    gradient[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same_weights(model, before)
    assert not optimizer.state


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_trainer_learns_with_muon(precision: str) -> None:
    model = tiny_model()
    trainer = AMPTrainer(
        model, create_optimizer(model, MUON), mixed_precision=precision, accelerator=Accelerator(cpu=True)
    )
    ids = torch.randint(61, (4, 13))
    reports = [trainer.train_step(ids[:, :-1], ids[:, 1:]) for _ in range(30)]
    losses = [report.loss for report in reports if report.skipped is None]
    assert len(losses) > 20, [report.skipped for report in reports]
    assert losses[-1] < 0.5 * losses[0]


# --- Muon: the learning rate


def test_the_matrices_keep_their_ratio_to_the_rate() -> None:
    optimizer = create_optimizer(tiny_model(), MUON)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-2, 1e-2, 1e-2]
    for step in range(20):
        rate = learning_rate_at(step, 20, OptimizerOptions(learning_rate=1e-2, warmup_steps=5))
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(3 * rate), rate, rate]


def test_without_a_rate_of_their_own_the_matrices_have_the_common_one() -> None:
    optimizer = create_optimizer(tiny_model(), OptimizerOptions(optimizer="muon"))
    for rate in (1e-3, 1e-3 / 3):
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * 3


def test_adamw_alone_has_the_groups_that_torch_gives_it() -> None:
    optimizer = create_optimizer(tiny_model(), OptimizerOptions())
    assert type(optimizer) is AdamW
    plain = AdamW([nn.Parameter(torch.zeros(1))], fused=True).param_groups[0]
    assert [group.keys() for group in optimizer.param_groups] == [plain.keys()] * 2


# --- refusals


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_matrices_sharded_by_columns_are_refused_before_and_after() -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = tiny_model()
    fully_shard(sharded, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    with pytest.raises(UsageError, match=r"one of shape \(16, 16\) is sharded otherwise: use optimizer=adamw"):
        create_optimizer(sharded, MUON)

    model = tiny_model()
    optimizer = create_optimizer(model, MUON)
    give_gradients(model, 0)
    before = copy.deepcopy(model)
    # What Accelerate does when it prepares a model for FSDP.
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(1)])) for p in group["params"]]
    with pytest.raises(UsageError, match="optimizer=muon needs whole matrices"):
        optimizer.step()
    assert_same_weights(model, before)


def test_flat_shards_are_refused_before_and_after() -> None:
    model = tiny_model()
    optimizer = create_optimizer(model, MUON)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().flatten()) for p in group["params"]]
    with pytest.raises(UsageError, match=r"one of shape \(256,\) is sharded"):
        optimizer.step()
    flat = model.model.layers[0].self_attn.q_proj
    flat.weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(UsageError, match=r"one of shape \(0,\) is sharded"):
        create_optimizer(model, MUON)


def test_a_model_with_nothing_for_muon_is_refused() -> None:
    model = tiny_model()
    model.model.layers.requires_grad_(False)
    with pytest.raises(UsageError, match="no matrix of a linear layer is trained in this model: use"):
        create_optimizer(model, MUON)
    for headless in (nn.Sequential(nn.Linear(2, 2)), tiny_model().model):
        with pytest.raises(UsageError, match=f"{type(headless).__name__} does not tell its output projection"):
            create_optimizer(headless, MUON)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "muno"}, "unknown optimizer 'muno'; did you mean 'muon'?"),
        ({"lr_scheduler_type": "cosin"}, "unknown lr_scheduler_type 'cosin'; did you mean 'cosine'?"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate=0.1 is for optimizer=muon, not adamw"),
        ({"muon_momentum": 0.9}, "muon_momentum=0.9 is for optimizer=muon, not adamw"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum must be at least 0 and below 1, got 1.0"),
        ({"optimizer": "muon", "muon_learning_rate": 0.0}, "muon_learning_rate must be above 0 and finite, got 0.0"),
        (
            {"optimizer": "muon", "muon_learning_rate": math.nan},
            "muon_learning_rate must be above 0 and finite, got nan",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        OptimizerOptions(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("learning_rate", math.inf), ("adam_beta1", 1.0), ("weight_decay", -1.0),
     ("warmup_steps", -1), ("min_lr_ratio", 1.5), ("decay_ratio", -0.1), ("max_grad_norm", math.nan),
     ("adam_epsilon", 0.0)],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, got {value}"):
        OptimizerOptions(**{name: value})
