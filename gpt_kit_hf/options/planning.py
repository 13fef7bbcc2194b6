"""Options of a plan: what a run may take, and where the plan is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import REQUIRED, Options, option

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TOKENS = {"tok": 1.0, "ktok": 1e3, "Mtok": 1e6, "Btok": 1e9}
# More than any machine computes in a century; beyond, steps could not be counted.
_MOST = {"seconds": 3.2e9, "flop": 1e32, "tokens": 1e18}
BUDGETS = "a time such as 20m, 8h or 2d, compute such as 2e15flop, or tokens such as 300Mtok"


@dataclass(frozen=True)
class Budget:
    """What training may take: seconds, floating-point operations, or tokens."""

    kind: Literal["seconds", "flop", "tokens"]
    amount: float


def parse_budget(text: str) -> Budget:
    """Return the budget that a text means.

    Raises UsageError for another unit, for none, for nothing, and for more than could be counted.
    """
    match = _NUMBER.fullmatch(text)
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    budget = None
    if unit in _SECONDS:
        budget = Budget("seconds", number * _SECONDS[unit])
    elif unit in _TOKENS:
        budget = Budget("tokens", number * _TOKENS[unit])
    elif unit in ("flop", "flops", "FLOP"):
        budget = Budget("flop", number)
    if budget is None or not 0 < budget.amount < math.inf:
        units = ", ".join([*_SECONDS, "flop", *_TOKENS])
        raise UsageError(f"budget={text!r} must be {BUDGETS}: a number above 0 and one of the units {units}")
    if budget.amount > _MOST[budget.kind]:
        raise UsageError(f"budget={text!r} must be at most {_MOST[budget.kind]:g} {budget.kind}")
    return budget


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """The plan of a run, made before it is trained."""

    budget: str | None = option(
        None,
        f"plan the run, so that training takes so much: {BUDGETS}. Shape, batch, length, vocabulary and rates "
        "are chosen by the text and this machine; options that are given stay",
        unset="no plan",
        resume="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            parse_budget(self.budget)


@dataclass(frozen=True, kw_only=True)
class PlanFileOptions(BudgetOptions):
    """What the run may take, and the file of the plan."""

    budget: str = option(REQUIRED, f"what training may take: {BUDGETS}", resume="free")
    plan_file: str = option(
        "plan.yaml", "file that the plan is written to, for gpt-kit train --config", resume="free", metavar="FILE"
    )
