"""Tables of tensor names in other GPT implementations, and conversion of state dicts with them.

A table maps the name of a stored tensor to its name in this package, or to "" to drop the tensor:

    "h.{layer}.attn.c_attn.weight": "model.layers.{layer}.self_attn.{q,k,v}_proj.weight.T"

`{layer}` is the number of the layer. `.T` at the end transposes the matrix; then `{q,k,v}` splits it along dimension 0
into equal parts. A tensor that is not in the table, and one that the model needs and does not get, is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import (
    GPTKitForCausalLM,
    GPTKitForQuestionAnswering,
    GPTKitForSequenceClassification,
    GPTKitForTokenClassification,
    GPTKitPreTrainedModel,
)

TOKENS, POSITIONS, HEAD = "model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"


# Heads of classifiers, in the names of transformers' GPT-2, and this package's classes with such a head.
CLASSIFIERS: Mapping[str, type[GPTKitPreTrainedModel]] = MappingProxyType(
    {
        "score": GPTKitForSequenceClassification,
        "classifier": GPTKitForTokenClassification,
        "qa_outputs": GPTKitForQuestionAnswering,
    }
)


def _with_biases(weights: Mapping[str, str]) -> dict[str, str]:
    """Return the table with an entry for the bias of each weight; a bias is never transposed."""
    biases = {f"{theirs[:-6]}bias": f"{ours.removesuffix('.T')[:-6]}bias" for theirs, ours in weights.items()}
    return {**weights, **biases}


def expand_braces(target: str) -> list[str]:
    """Return the names that "a.{q,k,v}_proj" stands for; a name without braces stands for itself."""
    braces = re.search(r"\{([^{}]*,[^{}]*)\}", target)
    return [target.replace(braces[0], choice, 1) for choice in braces[1].split(",")] if braces else [target]


# GPT-2 in the transformers library. Its Conv1D stores a weight as (in, out), nn.Linear as (out, in).
GPT2_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "transformer.wte.weight": TOKENS,
        "transformer.wpe.weight": POSITIONS,
        "lm_head.weight": HEAD,
        **_with_biases(
            {
                "transformer.h.{layer}.ln_1.weight": "model.layers.{layer}.input_layernorm.weight",
                "transformer.h.{layer}.attn.c_attn.weight": "model.layers.{layer}.self_attn.{q,k,v}_proj.weight.T",
                "transformer.h.{layer}.attn.c_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight.T",
                "transformer.h.{layer}.ln_2.weight": "model.layers.{layer}.post_attention_layernorm.weight",
                "transformer.h.{layer}.mlp.c_fc.weight": "model.layers.{layer}.mlp.up_proj.weight.T",
                "transformer.h.{layer}.mlp.c_proj.weight": "model.layers.{layer}.mlp.down_proj.weight.T",
                "transformer.ln_f.weight": "model.norm.weight",
            }
        ),
        "lm_head.bias": f"{HEAD[:-6]}bias",
        **{f"{head}.{part}": f"{head}.{part}" for head in CLASSIFIERS for part in ("weight", "bias")},
        # Not biases: old versions stored the causal mask and the score of masked tokens under these names.
        "transformer.h.{layer}.attn.bias": "",
        "transformer.h.{layer}.attn.masked_bias": "",
    }
)


def _projections(attention: str) -> dict[str, str]:
    """Return the names by which others call the projections of a module: in one matrix (q, k, v) or three."""
    ours = "model.layers.{layer}.self_attn."
    fused = {f"{attention}.{name}.weight": f"{ours}{{q,k,v}}_proj.weight" for name in ("c_attn", "qkv", "Wqkv")}
    single = {f"{attention}.{name}_proj.weight": f"{ours}{name}_proj.weight" for name in "qkv"}
    output = {f"{attention}.{name}.weight": f"{ours}o_proj.weight" for name in ("c_proj", "proj", "out_proj")}
    return _with_biases({**fused, **single, **output})


# nanoGPT: GPT-2's names with nn.Linear, exact GELU, LayerNorm with epsilon 1e-5.
NANOGPT_NAMES: Mapping[str, str] = MappingProxyType(
    {theirs: ours.removesuffix(".T") for theirs, ours in GPT2_NAMES.items()}
    | _projections("transformer.h.{layer}.attn")
)

# Raschka 2024, "Build a Large Language Model (From Scratch)", chapters 3 and 4: GELU with the tanh approximation,
# LayerNorm with epsilon 1e-5, untied output projection.
KIT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "tok_emb.weight": TOKENS,
        "pos_emb.weight": POSITIONS,
        "out_head.weight": HEAD,
        "out_head.bias": f"{HEAD[:-6]}bias",
        **_projections("trf_blocks.{layer}.att"),
        **_with_biases(
            {
                "trf_blocks.{layer}.att.W_query.weight": "model.layers.{layer}.self_attn.q_proj.weight",
                "trf_blocks.{layer}.att.W_key.weight": "model.layers.{layer}.self_attn.k_proj.weight",
                "trf_blocks.{layer}.att.W_value.weight": "model.layers.{layer}.self_attn.v_proj.weight",
                "trf_blocks.{layer}.ff.layers.0.weight": "model.layers.{layer}.mlp.up_proj.weight",
                "trf_blocks.{layer}.ff.layers.2.weight": "model.layers.{layer}.mlp.down_proj.weight",
            }
        ),
        "trf_blocks.{layer}.norm1.scale": "model.layers.{layer}.input_layernorm.weight",
        "trf_blocks.{layer}.norm1.shift": "model.layers.{layer}.input_layernorm.bias",
        "trf_blocks.{layer}.norm2.scale": "model.layers.{layer}.post_attention_layernorm.weight",
        "trf_blocks.{layer}.norm2.shift": "model.layers.{layer}.post_attention_layernorm.bias",
        "trf_blocks.{layer}.att.mask": "",
        "final_norm.scale": "model.norm.weight",
        "final_norm.shift": "model.norm.bias",
    }
)


# The state dict of this package's own models.
OWN_NAMES: Mapping[str, str] = MappingProxyType(
    {name: name for target in KIT_NAMES.values() for name in expand_braces(target) if name}
    | {f"{head}.{part}": f"{head}.{part}" for head in CLASSIFIERS for part in ("weight", "bias")}
)


# Llama and Qwen3 of transformers: the names are the same. Old versions stored the rates of the rotation.
LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {name: target for name, target in OWN_NAMES.items() if target != POSITIONS}
    | {name: name for part in ("weight", "bias") for name in (f"model.layers.{{layer}}.mlp.gate_proj.{part}",)}
    | {name: name for norm in "qk" for name in (f"model.layers.{{layer}}.self_attn.{norm}_norm.weight",)}
    | {"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ""}
)


def name_of_positions(names: Mapping[str, str]) -> str:
    """Return how a table calls the position embedding, which every model has under one name."""
    return next(theirs for theirs, ours in names.items() if ours == POSITIONS)


def rename_tensors(state_dict: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Return views of the tensors under their names in this package, by a table; error messages begin with `source`.

    Raises UsageError for a name that is not in the table, a name that two tensors map to, and a tensor that cannot be
    split or transposed.
    """
    targets = {name: _target(name, names) for name in state_dict}
    refuse_names(f"{source} holds tensors that the layout does not have", [n for n, t in targets.items() if t is None])
    renamed: dict[str, Tensor] = {}
    for name, target in targets.items():
        for ours, part in _split(state_dict[name], target, f"{source}: {name}") if target else ():
            if ours in renamed:
                raise UsageError(f"{source}: {name} is the second tensor that the layout calls {ours}")
            renamed[ours] = part
    return renamed


def _target(name: str, names: Mapping[str, str]) -> str | None:
    """Return the table's entry for a stored tensor, with the layer number filled in, or None."""
    if name in names:
        return names[name]
    for number in re.finditer(r"\d+", name):
        pattern = f"{name[: number.start()]}{{layer}}{name[number.end() :]}"
        if pattern in names:
            return names[pattern].replace("{layer}", number[0])
    return None


def _split(tensor: Tensor, target: str, source: str) -> list[tuple[str, Tensor]]:
    if target.endswith(".T"):
        if tensor.dim() != 2:
            raise UsageError(f"{source} cannot be transposed: its shape is {tuple(tensor.shape)}")
        tensor = tensor.T
    ours = expand_braces(target.removesuffix(".T"))
    if len(ours) == 1:
        return [(ours[0], tensor)]
    if tensor.dim() == 0 or tensor.shape[0] % len(ours):
        raise UsageError(f"{source} cannot be split into {len(ours)} equal parts: its shape is {tuple(tensor.shape)}")
    return list(zip(ours, tensor.tensor_split(len(ours)), strict=True))  # (3D, D) -> 3 of (D, D)


def add_zero_biases(tensors: dict[str, Tensor], config: GPTKitConfig) -> None:
    """Add zero biases (D,), which change nothing, to query, key or value projections that have none in any block."""
    for name in "qkv" if config.use_bias else ():
        biases = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in range(config.n_layer)]
        if not any(bias in tensors for bias in biases):
            tensors |= {bias: torch.zeros(config.n_embd) for bias in biases}


def choose_class(
    tensors: dict[str, Tensor], config: GPTKitConfig, source: str, *, drop: bool
) -> type[GPTKitPreTrainedModel]:
    """Return the class for the head in `tensors`; give the head the names of that class, and set the fields for it.

    An output projection with fewer rows than the vocabulary is the head of a hand-written classifier. With `drop` a
    head for classification is left out. Raises UsageError if there is none, or nothing to predict tokens with then.
    """
    own = HEAD in tensors and len(tensors[HEAD]) < config.vocab_size
    head = "lm_head" if own else next((name for name in CLASSIFIERS if f"{name}.weight" in tensors), None)
    if drop and (head is None or own):
        lacks = (
            "an output projection: its head is a classifier" if own else "a classification head that could be dropped"
        )
        raise UsageError(f"{source} lacks {lacks}; leave drop_classifier out")
    if head is None:
        return GPTKitForCausalLM
    parts = {part: tensors.pop(f"{head}.{part}") for part in ("weight", "bias") if f"{head}.{part}" in tensors}
    if drop:
        return GPTKitForCausalLM
    kind = CLASSIFIERS["score" if own else head]
    ours = "qa_outputs" if kind is GPTKitForQuestionAnswering else "score"
    tensors |= {f"{ours}.{part}": tensor for part, tensor in parts.items()}
    tensors.pop(HEAD, None)
    config.tie_word_embeddings = True
    config.score_bias = kind is GPTKitForSequenceClassification and "bias" in parts
    if ours == "score" and config.num_labels != len(parts["weight"]):
        config.num_labels = len(parts["weight"])
    return kind


def build_model(
    config: GPTKitConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    source: str,
    kind: type[GPTKitPreTrainedModel] = GPTKitForCausalLM,
) -> GPTKitPreTrainedModel:
    """Return a model with copies of the tensors; `tensors` is emptied on the way, so that memory holds one copy."""
    bias = tensors.pop(f"{HEAD[:-6]}bias", None)
    if bias is not None and bias.any():
        raise UsageError(f"{source}: the output projection has a bias, which this model lacks")
    if config.tie_word_embeddings and kind is GPTKitForCausalLM:
        # A file may hold a tied tensor under either name or under both.
        head = tensors.pop(HEAD, tensors.get(TOKENS))
        if head is not None and not equal_tensors(tensors.setdefault(TOKENS, head), head):
            raise UsageError(f"{source}: {HEAD} is not {TOKENS}; the config needs tie_word_embeddings=False")
    check_tensors(tensors, stored_shapes(config, kind), source)
    ready: dict[str, Tensor] = {}
    while tensors:
        name, tensor = tensors.popitem()
        ready[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format).to(dtype)
    model = kind.from_pretrained(None, config=config, state_dict=ready, dtype=dtype)
    assert isinstance(model, kind)
    return model


def stored_shapes(
    config: GPTKitConfig, kind: type[GPTKitPreTrainedModel] = GPTKitForCausalLM
) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors that a saved model holds."""
    with torch.device("meta"):
        stored = kind(copy.deepcopy(config)).state_dict()
    return {name: t.shape for name, t in stored.items() if not (config.tie_word_embeddings and name == HEAD)}


def stored_tensors(model: GPTKitForCausalLM) -> dict[str, Tensor]:
    """Return the tensors that a saved model holds: the output projection only if it is not tied.

    Raises UsageError if they are not those of the configuration, as after replacing layers.
    """
    config, tensors = copy.deepcopy(model.config), dict(model.state_dict())
    check_plain(tensors, "model")
    # An output projection that was untied after construction keeps its values, whatever the configuration says.
    has_both = {HEAD, TOKENS} <= tensors.keys()
    if config.tie_word_embeddings and has_both and equal_tensors(tensors[HEAD], tensors[TOKENS]):
        del tensors[HEAD]
    else:
        config.tie_word_embeddings = False
    check_tensors(tensors, stored_shapes(config), "model")
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Raise UsageError unless the tensors have exactly these names and shapes and are plain floating-point tensors."""
    refuse_names(f"{source} holds tensors that the model does not have", tensors.keys() - shapes.keys())
    refuse_names(f"{source} lacks tensors of the model", shapes.keys() - tensors.keys())
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UsageError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model {tuple(shapes[name])}")
    check_plain(tensors, source)


def check_plain(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UsageError for a tensor that is no plain floating-point tensor, such as a quantised one."""
    for name, tensor in tensors.items():
        is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not is_plain or tensor.is_meta or not tensor.is_floating_point():
            kind = f"{type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
            raise UsageError(f"{source}: {name} is a {kind}; a weight must be a plain floating-point tensor")


def refuse_names(problem: str, names: Collection[str]) -> None:
    """Raise UsageError with the problem and the first three names, if there are any."""
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(f"{problem}: {', '.join(sorted(names)[:3])}{rest}")


def equal_tensors(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same shape and values, compared in the wider of their dtypes."""
    common = torch.promote_types(first.dtype, second.dtype)
    return first.shape == second.shape and torch.equal(first.to(common), second.to(first.device, common))
