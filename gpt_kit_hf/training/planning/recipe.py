"""The recipe `fast` by the length of a run and the size of its text, as benchmarks/README.md measures it."""

from __future__ import annotations

from typing import Any

from gpt_kit_hf.options.training import recipe_options

MANY_EPOCHS = 4  # passes over the text, after which a model may know it by heart
# Parameters of the blocks for each token of the text, from which on a model can learn it by heart. Smaller ones only
# lose by a strong weight decay.
_MANY_PARAMETERS = 1
_LONG_RUN, _LARGE_STEP = 1600, 2048  # steps, and tokens of a step: runs of smaller ones have not been measured
_LEAST_AVERAGED = 80  # steps; the decay rate of an average is 0.9 then


def recipe_for(
    steps: int, *, step_tokens: int, text_tokens: int, layer_parameters: int, vocab_size: int
) -> dict[str, Any]:
    """Return the optimizer's options of the recipe `fast` for a run: all that the recipe sets.

    A long run has more momentum, and half of the learning rate for all but the matrices.
    """
    recipe = recipe_options("fast", vocab_size=vocab_size)
    if steps >= _LONG_RUN and step_tokens >= _LARGE_STEP:
        recipe = {**recipe, "muon_momentum": 0.95, "learning_rate": recipe["learning_rate"] / 2}
    epochs, per_token = steps * step_tokens / text_tokens, layer_parameters / text_tokens
    return {
        **recipe,
        "weight_decay": weight_decay_for(epochs, per_token),
        "ema_decay": ema_decay_for(epochs, per_token, steps),
    }


def weight_decay_for(epochs: float, parameters_per_token: float) -> float:
    """Return the weight decay by the passes over the text, and the parameters of the blocks for each token of it.

    Measured by benchmarks/passes.py, as is what `ema_decay_for` returns.
    """
    return 1.0 if epochs >= 3 and parameters_per_token >= _MANY_PARAMETERS else 0.1


def ema_decay_for(epochs: float, parameters_per_token: float, steps: int) -> float | None:
    """Return the decay rate of an average of the weights, over about an eighth of the steps, None for no average."""
    many = epochs >= MANY_EPOCHS and parameters_per_token >= _MANY_PARAMETERS
    return round(1 - 8 / steps, 4) if many and steps > _LEAST_AVERAGED else None
