"""The two shapes of the model, for tests of what must hold for both."""

from __future__ import annotations

from typing import Any

import pytest

# The fields that tell the modern shape from the classic one, with two query heads for each head of keys and values.
MODERN: dict[str, Any] = {
    "position_embedding": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "use_bias": False,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-6,
}

# What `position_embedding` tells apart in tests that need no more than one modern case.
SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"position_embedding": "learned"},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "modern": MODERN,
}

both_shapes = pytest.mark.parametrize("shape", [pytest.param({}, id="classic"), pytest.param(MODERN, id="modern")])
