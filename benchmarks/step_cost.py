"""What one training step on a GPU costs, counted without a GPU.

`python benchmarks/step_cost.py --shape gpt2` runs the step of the package, and the one of a loop by hand, on fake CUDA
tensors (`torch._subclasses.FakeTensorMode`): shapes, types and strides are those of a GPU, and nothing is computed. By
phase it prints

- kernels: operations that write memory, one kernel each. Views, empty tensors and copies from the host are none.
- GB: each operation reads its inputs once and writes its outputs once. An embedding reads the rows it looks up.
- TFLOP: those of matrix products and attention, by torch's own formulas.
- unaligned: matrix products with an operand that has a size or a row stride that is no multiple of 16 bytes, for which
  cuBLAS has no fast kernel.
- waits: reads of a value on the host, which wait for the device.

A function that the package itself compiles, as the softmax of the loss, counts as one kernel: it reads its inputs once
and writes its outputs once. Blocks are counted uncompiled, for both: compiling them saves kernels and bytes in
"blocks" and "backward" alike. `--eager` counts a machine that cannot compile. Attention is the kernel of a CPU, which
reads and writes the same tensors as flash attention on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import measure
import peers
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from gpt_kit_hf import AMPTrainer, Batch, GPTKitForCausalLM
from gpt_kit_hf.model import chunked_loss, modeling_gpt_kit
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.optim.optimizer import create_optimizer

GPU = torch.device("cuda", 0)
PHASES = ("embedding", "blocks", "norm and loss", "backward", "optimizer")
aten = torch.ops.aten
# Without a kernel, although the schema does not call them views.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "alias"}
FREE |= {"lift_fresh", "_record_function_enter_new", "_record_function_exit", "device", "_local_scalar_dense"}
# What autocast computes in half precision and in float32, as far as the models here use it.
HALF = {F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm}
FLOAT = {F.layer_norm, F.rms_norm, F.cross_entropy, F.softmax}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
# Of the first operand they read as much as they write.
LOOKUPS = {"embedding", "gather", "index_select", "index"}
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


@dataclass
class Cost:
    """What a phase costs."""

    kernels: int = 0
    bytes: int = 0
    flop: int = 0
    unaligned: list[str] = field(default_factory=list)
    waits: int = 0


class Costs(TorchDispatchMode):
    """Counts what the operations on fake CUDA tensors cost, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self.of: dict[str, Cost] = defaultdict(Cost)
        self.fused: dict[int, Tensor] | None = None  # in a compiled function: what it has written to
        self.launched = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.phase == "backward" and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": GPU}  # C++ asks for the device that it was told
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self._read(args[0])
        result = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        written = _written(function, args, kwargs)
        if function.is_view or name in FREE or not any(t.device == GPU for t in (*made, *written)):
            return result
        if any(t.device != GPU and t.dim() for t in tensors):  # a copy from the host
            return result
        if self.fused is not None:
            assert name not in PRODUCTS, "a product in a compiled function is a kernel of its own"
            self.fused.update({id(t.untyped_storage()): t for t in written})
            return result
        cost = self.of[self.phase]
        self.launched = True
        cost.kernels += 1
        cost.bytes += _moved(function, name, args, kwargs, tensors, made, written)
        formula = flop_registry.get(getattr(aten, ATTENTION.get(name, name), None))
        if formula is not None:
            # The kernel of a GPU takes more arguments than that of a CPU; its formula reads shapes only.
            cost.flop += formula(*args, **kwargs, out_val=result)
        bad = [f"{tuple(t.shape)} {t.stride()}" for t in (*tensors, *made) if t.dim() > 1 and not _is_aligned(t)]
        if name in PRODUCTS and bad:
            cost.unaligned.append(f"{name} of {', '.join(bad)}")
        return result

    def _read(self, tensor: Tensor) -> bool | float | int:
        """Return a number in place of an unknown one; a read right after another has nothing to wait for."""
        if tensor.device == GPU and self.launched:
            self.of[self.phase].waits += 1
            self.launched = False
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else 1

    def not_compiled(self, *_: Any, **__: Any) -> Callable[..., Any]:
        """Return what torch.compile returns where there is no compiler: it fails when it is called."""
        return mock.Mock(side_effect=TorchDynamoException("no compiler"))

    def compiled(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """Return the function as torch.compile would: one kernel."""

        def one_kernel(*args: Any, **kwargs: Any) -> Any:
            self.fused = {}
            try:
                result = function(*args, **kwargs)
                inputs = {id(t.untyped_storage()): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                outputs = {id(t.untyped_storage()): t for t in tree_leaves(result) if isinstance(t, Tensor)}
                changed = [t for key, t in inputs.items() if key in self.fused and key not in outputs]
            finally:
                self.fused = None
            cost = self.of[self.phase]
            cost.kernels += 1
            cost.bytes += sum(map(_nbytes, [*inputs.values(), *outputs.values(), *changed]))
            return result

        return one_kernel


class Autocast(TorchFunctionMode):
    """Does what torch.autocast does on a GPU: torch's own asks C++ for the device of a tensor, which is not told."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}  # cast once, as long as autocast lasts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = torch.get_autocast_dtype("cuda") if function in HALF else torch.float32
        if not torch.is_autocast_enabled("cuda"):
            self.weights.clear()
        elif function in HALF | FLOAT:
            args, kwargs = tree_map_only(Tensor, lambda t: self._cast(t, dtype), (args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor.to(dtype)
        return self.weights[id(tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of the elements that a tensor has in memory: an expanded one repeats them."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether both sizes and the stride between rows or columns are multiples of 16 bytes."""
    unit = 16 // tensor.element_size()
    return all(size % unit == 0 for size in tensor.shape[-2:]) and sorted(tensor.stride()[-2:])[1] % unit == 0


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    named = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)} | kwargs
    changed = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in changed for t in tree_leaves(named.get(name)) if isinstance(t, Tensor)]


def _moved(
    function: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], made: list[Tensor], written: list[Tensor]
) -> int:
    """Return the bytes that an operation reads and writes."""
    in_place = {id(t) for t in written}
    out = {id(t) for t in tree_leaves(kwargs.get("out")) if isinstance(t, Tensor)}
    new = sum(_nbytes(t) for t in made if id(t) not in in_place)
    if name in LOOKUPS:
        return 2 * new + sum(_nbytes(t) for t in tensors[1:])
    if name in ("scatter_", "scatter_add_"):
        return 3 * sum(_nbytes(t) for t in tensors[1:])
    only_written = {"copy_", "zero_", "fill_"}
    read = [t for t in {id(t): t for t in tensors}.values() if id(t) not in out]
    if name in only_written:
        read = [t for t in read if id(t) not in in_place]
    return new + sum(map(_nbytes, read)) + sum(map(_nbytes, {id(t): t for t in written}.values()))


@contextmanager
def fake_gpu(costs: Costs, eager: bool) -> Iterator[None]:
    """Let tensors be fake ones on a GPU; the machine needs none.

    A build of torch without CUDA has no engine for gradients on a GPU: C++ is told that the tensors are on the CPU,
    Python that they are on the GPU.
    """

    def device_for_cpp(args: Any) -> torch.device:
        return torch.device("meta" if args[0].fake_mode.in_kernel_invocation else "cpu")

    handlers = {**fake_tensor._DISPATCH_META_HANDLERS, torch.ops.prim.device.default: device_for_cpp}
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for change in (
            mock.patch.object(fake_tensor, "_DISPATCH_META_HANDLERS", handlers),
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
            mock.patch.object(modeling_gpt_kit, "can_skip_logits", return_value=True),
            mock.patch.object(chunked_loss, "_compiled", chunked_loss._Compiled()),
            mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", return_value=True),
            mock.patch.object(torch, "compile", costs.not_compiled if eager else costs.compiled),
        ):
            stack.enter_context(change)
        yield


def on_gpu(model: nn.Module) -> Any:
    """Give a model fake weights on the GPU."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device=GPU))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.train()


def our_step(work: peers.Work) -> tuple[peers.Step, Any, Any]:
    model = on_gpu(GPTKitForCausalLM(peers.our_config(work)))
    accelerator = Accelerator(cpu=True, device_placement=False)
    optimizer = create_optimizer(model, OptimizerOptions(learning_rate=peers.RATE))
    trainer = AMPTrainer(model, optimizer, mixed_precision="bf16", accelerator=accelerator)

    def step(ids: Tensor, targets: Tensor) -> float:
        with mock.patch.object(accelerator.state, "device", GPU):
            return trainer.update([Batch(ids, targets)]).loss

    return step, model.model.layers[0], model.model.norm


def by_hand(work: peers.Work) -> tuple[peers.Step, Any, Any]:
    model = on_gpu(peers.ByHand(work))
    return peers._loop(work, model, model), model.blocks[0]["norm_1"], model.norm


WAYS = {"gpt_kit_hf": our_step, "by hand": by_hand}


def count(way: str, work: peers.Work, eager: bool) -> dict[str, Cost]:
    """Return the cost of each phase of a step."""
    costs = Costs()

    def enter(phase: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            costs.phase = phase

        return note

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        costs.phase = "backward"
        torch.autograd.backward(loss, *args, **kwargs)
        costs.phase = "optimizer"

    with fake_gpu(costs, eager):
        with torch.device("cpu"):
            step, first_block, last_norm = WAYS[way](work)
            ids = torch.zeros(work.batch, work.context, dtype=torch.long)
        first_block.register_forward_pre_hook(enter("blocks"))
        last_norm.register_forward_pre_hook(enter("norm and loss"))
        with mock.patch.object(Tensor, "backward", backward), Autocast(), costs:
            step(ids, ids)  # which allocates the moments
            costs.of.clear()
            costs.phase, costs.launched = PHASES[0], True
            step(ids, ids)
    return costs.of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers.add_work_options(parser)
    parser.add_argument("--eager", action="store_true", help="count a machine that cannot compile")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.set_defaults(shape="gpt2", context=1024, precision="bf16", device="cuda:0")
    options = parser.parse_args()
    work = peers.work_of(options)
    print(f"{measure.versions('torch', 'transformers')}; {work}")
    kept = {}
    for way in WAYS:
        phases = count(way, work, options.eager)
        total = Cost()
        for cost in phases.values():
            for name in ("kernels", "bytes", "flop", "unaligned", "waits"):
                setattr(total, name, getattr(total, name) + getattr(cost, name))
        rows = [
            [way if phase == PHASES[0] else "", phase, cost.kernels, f"{cost.bytes / 1e9:.2f}",
             f"{cost.flop / 1e12:.2f}", len(cost.unaligned), cost.waits]
            for phase, cost in [*((phase, phases[phase]) for phase in PHASES), ("together", total)]
        ]  # fmt: skip
        measure.show(rows, ["", "phase", "kernels", "GB", "TFLOP", "unaligned", "waits"])
        for product in dict.fromkeys(total.unaligned):
            print(f"  unaligned: {product}", file=sys.stderr)
        kept[way] = {phase: vars(cost) for phase, cost in phases.items()}
    measure.keep(options.json, {"options": vars(options), "costs": kept})


if __name__ == "__main__":
    main()
