"""Two processes that shard a model by FSDP2 compute its loss without logits, and the gradients of the whole model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator
from test_sharded_run import sharding
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_kit_hf import AMPTrainer, Batch, GPTKitConfig, GPTKitForCausalLM
from gpt_kit_hf.model import chunked_loss

VOCABULARY = 211


class LargestOfVocabulary(TorchDispatchMode):
    """Notes the most rows that a tensor with a column for each token of the vocabulary has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() > 1 and result.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


def model_of(tied: bool) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "max_position_embeddings": 32}
    return GPTKitForCausalLM(GPTKitConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes))


def update(model: nn.Module, accelerator: Accelerator, ids: Tensor) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss and gradient norm of two updates' second, and the weights after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AMPTrainer(model, optimizer, mixed_precision="fp32", max_grad_norm=None, accelerator=accelerator)
    for _ in range(2):
        report = trainer.update([Batch(ids, ids.roll(-1, dims=1))])
    weights = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
    return report.loss, report.grad_norm, weights


def check() -> None:
    """Compare, as one of two processes."""
    ids = torch.randint(VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(1))
    accelerator = sharding(Accelerator(cpu=True))
    rank = accelerator.process_index
    for tied in (True, False):
        shared = update_sharded(model_of(tied), accelerator, ids[2 * rank : 2 * rank + 2])
        alone = update_alone(tied, ids)
        for ours, expected in zip(shared[:2], alone[:2], strict=True):
            assert abs(ours - expected) < 1e-5, (ours, expected)
        for name, weight in alone[2].items():
            torch.testing.assert_close(shared[2][name], weight, rtol=1e-5, atol=1e-6)
    distributed.destroy_process_group()


def update_alone(tied: bool, ids: Tensor) -> tuple[float, float, dict[str, Tensor]]:
    """Return what a plain loop computes from the logits."""
    model = model_of(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, dims=1).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return loss.item(), norm.item(), {name: p.detach() for name, p in model.named_parameters()}


def update_sharded(
    model: GPTKitForCausalLM, accelerator: Accelerator, ids: Tensor
) -> tuple[float, float, dict[str, Tensor]]:
    """Update on this process's rows; no tensor may hold as many logits as the rows have tokens."""
    chunked_loss._CPU_LOGITS = 8 * 256  # eight rows at once
    with LargestOfVocabulary() as largest:
        results = update(model, accelerator, ids)
    assert 0 < largest.rows <= 16, largest.rows  # the weight transposed, too, has as many rows as its width
    return results


def test_sharded_models_have_the_losses_and_gradients_of_whole_ones_without_logits() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ended = subprocess.run(
        [*command, "--nproc-per-node=2", __file__], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr


if __name__ == "__main__":
    check()
