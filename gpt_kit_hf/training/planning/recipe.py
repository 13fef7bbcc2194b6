"""What the recipe `fast` sets by the length of a run and the size of its text, as benchmarks/README.md measures it."""

from __future__ import annotations

from typing import Any

from gpt_kit_hf.options.training import recipe_options

MANY_EPOCHS = 4  # passes over the text, after which a model may know it by heart
# Parameters of the blocks for each token of the text, from which on a model can learn it by heart. Smaller ones only
# lose by a strong weight decay.
_MANY_PARAMETERS = 3.5
# Steps, and tokens of a step. Shorter runs, and such of 1,024 tokens a step, are worse with what a long run has.
_LONG_RUN, _LARGE_STEP = 1600, 1536
_LEAST_AVERAGED = 80  # steps; the decay rate of an average is 0.9 then


def recipe_by_length(
    steps: int, *, step_tokens: int, epochs: float, parameters_per_token: float, vocab_size: int
) -> dict[str, Any]:
    """Return what follows from the length of a run: learning rate, momentum, weight decay, average of the weights.

    A long run has more momentum, and half of the learning rate for all but the matrices. `epochs` are the passes over
    the text, and `parameters_per_token` those of the blocks for each token of it.
    """
    recipe = recipe_options("fast", vocab_size=vocab_size)
    is_long = steps >= _LONG_RUN and step_tokens >= _LARGE_STEP
    return {
        "learning_rate": recipe["learning_rate"] / 2 if is_long else recipe["learning_rate"],
        "muon_momentum": 0.95 if is_long else recipe["muon_momentum"],
        "weight_decay": weight_decay_for(epochs, parameters_per_token),
        "ema_decay": ema_decay_for(epochs, parameters_per_token, steps),
    }


def weight_decay_for(epochs: float, parameters_per_token: float) -> float:
    """Return the weight decay. Measured by benchmarks/passes.py, as is what `ema_decay_for` returns."""
    return 1.0 if epochs >= 3 and parameters_per_token >= _MANY_PARAMETERS else 0.1


def ema_decay_for(epochs: float, parameters_per_token: float, steps: int) -> float | None:
    """Return the decay rate of an average of the weights, over about an eighth of the steps, None for no average."""
    many = epochs >= MANY_EPOCHS and parameters_per_token >= _MANY_PARAMETERS
    return round(1 - 8 / steps, 4) if many and steps > _LEAST_AVERAGED else None
