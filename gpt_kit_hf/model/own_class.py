"""Models whose class came with a model folder, as remote code: recognised, and taken as this package's own class."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

# By model of a remote class: a model of this package's class on the same parameters; None if there is none.
_taken: WeakKeyDictionary[nn.Module, tuple[list[int], GPTKitForCausalLM | None]] = WeakKeyDictionary()
_PROBE_TOKENS, _TOLERANCE = 16, 1e-3


def is_gpt_kit(model: nn.Module) -> bool:
    """Return whether a model is a GPTKitForCausalLM: of this package, or of the code in a model folder."""
    names = [kind.__name__ for kind in type(model).__mro__]
    of_this_type = getattr(getattr(model, "config", None), "model_type", None) == GPTKitConfig.model_type
    return isinstance(model, GPTKitForCausalLM) or (GPTKitForCausalLM.__name__ in names and of_this_type)


def own_model(model: nn.Module) -> GPTKitForCausalLM | None:
    """Return the model itself, or one of this package's class on the parameters of a model whose class came with it.

    None for other models, and for code that has the name of this package's class but other tensors or logits.
    """
    if isinstance(model, GPTKitForCausalLM):
        return model
    if type(model).__name__ != GPTKitForCausalLM.__name__ or not is_gpt_kit(model):
        return None
    state = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    if model not in _taken or _taken[model][0] != state:
        _taken[model] = state, _take(model)
    taken = _taken[model][1]
    return None if taken is None else taken.train(model.training)


def _take(model: nn.Module) -> GPTKitForCausalLM | None:
    try:
        config = GPTKitConfig.from_dict(model.config.to_dict())  # type: ignore[union-attr, operator]
        with torch.device("meta"):
            taken = GPTKitForCausalLM(config)
        taken.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        for name, buffer in model.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(taken.get_submodule(owner), attribute, buffer)
        taken.generation_config = model.generation_config
        return taken if _same_logits(model, taken) else None
    except (StrictDataclassError, ValueError, RuntimeError, AttributeError, TypeError):
        return None  # other fields, names or shapes, or weights that are not there


@torch.no_grad()
def _same_logits(model: nn.Module, taken: GPTKitForCausalLM) -> bool:
    """Return whether both compute the same for a short row."""
    length = min(_PROBE_TOKENS, taken.config.max_position_embeddings)
    ids = torch.arange(length, device=taken.device)[None] * 7919 % taken.config.vocab_size
    modes = [(module, module.training) for module in model.modules()]
    try:
        first, second = (each.eval()(ids, use_cache=False).logits.float() for each in (model, taken))
    finally:
        for module, training in modes:
            module.training = training
    tolerance = _TOLERANCE if taken.dtype == torch.float32 else 16 * torch.finfo(taken.dtype).eps
    return bool((first - second).abs().max() <= tolerance * first.abs().max().clamp(min=1e-6))
