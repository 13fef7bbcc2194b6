"""Whether the answer of a causal LM depends on how it was asked: the same rows by every road, compared.

A road is a layout of the rows (each alone, padded, packed), a cache, an attention implementation and a precision.
The yardstick of a precision is each row alone, in eager attention without a cache.

Shapes: N tokens of all rows together, B rows of a batch, T tokens of its row, V vocabulary size.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache, PreTrainedModel, StaticCache

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.generate import context_length

LAYOUTS = ("alone", "left-padded", "right-padded", "packed")
CACHES = ("none", "dynamic", "static")
ATTENTIONS = ("eager", "sdpa", "flex_attention")

# The lengths in which the last tokens of a row are asked for when a cache holds what is before them.
_STEPS = (3, 1, 1)
_ANSWER = sum(_STEPS)
_LONGEST, _SHORTEST = 20, _ANSWER + 1
# A static cache has room beyond the row, which nobody may look at.
_SPARE_ROOM = 8


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A dtype and how far its roads may lie apart.

    `tolerance` is relative to the greatest absolute logit. With `ties`, a greedy token counts only where the best
    logit leads the second by more than the tolerance.
    """

    dtype: torch.dtype
    tolerance: float
    ties: bool


# Two roads that were exact up to the rounding of the logits may lie one eps apart in bf16, and every addition to the
# residual stream before that rounds as well: random models lay 1.1 eps apart with 2 layers, 1.8 with 12, 2.5 with 24
# and 3.1 with 48. A real fault is a good part of the greatest logit, and fails in fp32 too.
PRECISIONS = {
    "fp32": Precision(dtype=torch.float32, tolerance=1e-4, ties=False),
    "bf16": Precision(dtype=torch.bfloat16, tolerance=8 * torch.finfo(torch.bfloat16).eps, ties=True),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one road gave: `difference` is None where it gave no finite logits, and `error` says why."""

    layout: str
    cache: str
    attention: str
    precision: str
    difference: float | None
    wrong_tokens: int
    compared_tokens: int
    error: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the logits are within the tolerance and the greedy tokens equal."""
        within = self.difference is not None and self.difference <= PRECISIONS[self.precision].tolerance
        return within and self.wrong_tokens == 0 and self.error is None

    @property
    def name(self) -> str:
        """The road, as in "packed/dynamic/sdpa/bf16"."""
        return f"{self.layout}/{self.cache}/{self.attention}/{self.precision}"

    def describe(self) -> str:
        """Return the road and its result in one line."""
        tokens = f"{self.wrong_tokens} of {self.compared_tokens} greedy tokens differ"
        return f"{self.name}: {self.error or f'logits {self.difference:.1e} apart, {tokens}'}"


@dataclass(frozen=True, kw_only=True)
class InvarianceReport:
    """The matrix of a model: its cells, and in `remarks` what was left out of it or done otherwise, and why."""

    model: str
    device: str
    row_lengths: tuple[int, ...]
    seed: int
    cells: tuple[Cell, ...]
    remarks: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every cell holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[Cell, ...]:
        """The cells that do not hold."""
        return tuple(cell for cell in self.cells if not cell.holds)

    def table(self) -> str:
        """Return the matrix to read: a line a layout, a column a cache, `!` where a cell fails, then the failures."""
        lengths = ", ".join(map(str, self.row_lengths))
        lines = [
            f"{self.model} on {self.device}, rows of {lengths} tokens: greatest logit difference to the row alone",
            "(eager, no cache), divided by the greatest logit; ! where that or a greedy token is wrong",
        ]
        for precision, cells in itertools.groupby(self.cells, lambda cell: cell.precision):
            title = f"{precision} (at most {PRECISIONS[precision].tolerance:.1e})"
            lines += ["", f"{title:31}" + "".join(f"{cache:>11}" for cache in CACHES), *_lines(cells)]
        lines += ["", *self.remarks, self.verdict(), *(f"  {cell.describe()}" for cell in self.failures)]
        return "\n".join(lines)

    def verdict(self) -> str:
        """Return one line: how many cells hold or fail."""
        total = len(self.cells)
        return f"all {total} cells hold" if self.holds else f"{len(self.failures)} of {total} cells fail"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it, with the tolerances and the versions of torch and transformers."""
        return asdict(self) | {
            "row_lengths": list(self.row_lengths),
            "remarks": list(self.remarks),
            "cells": [asdict(cell) | {"holds": cell.holds} for cell in self.cells],
            "tolerances": {name: precision.tolerance for name, precision in PRECISIONS.items()},
            "holds": self.holds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _lines(cells: Iterable[Cell]) -> Iterator[str]:
    """Yield the table's line of each attention and layout."""
    for (attention, layout), row in itertools.groupby(cells, lambda cell: (cell.attention, cell.layout)):
        shown = ("error!" if c.difference is None else f"{c.difference:.1e}{' ' if c.holds else '!'}" for c in row)
        yield f"  {attention:16}{layout:13}" + "".join(f"{text:>11}" for text in shown).rstrip()


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows, each (T,), and ids (T of the longest,) to pad with."""

    tokens: tuple[Tensor, ...]
    filler: Tensor


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One call's whole input: `ids` (B, T), and `mask` and `position_ids` (B, T) where the layout needs them."""

    ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None


def check_invariance(
    model: PreTrainedModel,
    *,
    attention: Sequence[str] | None = None,
    precisions: Sequence[str] = tuple(PRECISIONS),
    compile_flex: bool | None = None,
    seed: int = 0,
    announce: Callable[[str], object] = lambda line: None,
) -> InvarianceReport:
    """Ask a causal LM of transformers for the same rows by every road, and report how far the answers lie apart.

    A row is a prompt of random ids and the tokens with which the model in fp32 continues it greedily. Each is asked
    for by plain `forward`, all arguments not named here at their defaults:

    - alone; left- and right-padded in a batch, with its `attention_mask` only and random ids as padding; packed into
      one row, with `position_ids` that restart and no mask;
    - without a cache (`use_cache=False`), with a dynamic one (both the model's own, made because `use_cache` was not
      given, and an empty `DynamicCache` handed in), and with a `StaticCache` that has room to spare. With a cache the
      last tokens come in steps of 3, 1 and 1 after the rest; right padding then lies between the two. Packed rows are
      asked for at once: a cache does not tell where its documents end.

    Greedy tokens are those at every place of the rows. In fp32 each must equal the yardstick's; in bf16, where many
    logits are equal after rounding, each whose lead over the second is greater than the tolerance.

    Args:
        model: left as it is: a copy, in evaluation mode on the same device, is asked.
        attention: of `ATTENTIONS`; all that the model and this machine have if not given, the rest is remarked on.
        precisions: of `PRECISIONS`.
        compile_flex: run flex attention compiled, as transformers does, or as the plain operations that torch has
            for it. By default compiled, but not on the CPU: there torch 2.13's kernel gives wrong numbers when
            lengths change, with no model around it too, and the matrix takes half an hour. Compiling forgets what
            the process compiled before (`torch.compiler.reset`).
        seed: of the prompts and the padding.
        announce: called with a line before each precision's attention, for the patience of whoever waits.

    Raises:
        UsageError: an unknown name, an attention asked for by name that cannot run, or a position table of fewer
            than 8 tokens.

    """
    _check_names("attention", ATTENTIONS if attention is None else attention, ATTENTIONS)
    _check_names("precisions", precisions, PRECISIONS)
    compile_flex = model.device.type != "cpu" if compile_flex is None else compile_flex
    with torch.no_grad():
        twin = _copy_in(model, torch.float32)
        rows = _make_rows(twin, seed)
        usable, remarks = _usable(twin, attention, compile_flex)
        cells: list[Cell] = []
        for precision in precisions:
            twin = _copy_in(model, PRECISIONS[precision].dtype)
            yardstick = torch.cat([_ask(twin, _Batch(ids=row[None]), "none", ()) for row in rows.tokens])  # (N, V)
            for name in usable:
                announce(f"checking {precision}, {name}")
                twin.set_attn_implementation(name)
                cells += _cells(twin, rows, yardstick, name, precision, compile_flex)
    return InvarianceReport(
        model=type(model).__name__,
        device=str(model.device),
        row_lengths=tuple(len(row) for row in rows.tokens),
        seed=seed,
        cells=tuple(cells),
        remarks=tuple(remarks),
    )


def _cells(
    model: PreTrainedModel, rows: _Rows, yardstick: Tensor, attention: str, precision: str, compile_flex: bool
) -> Iterator[Cell]:
    """Ask by every layout and cache; the model is set to the attention and the precision already."""
    for layout, cache in itertools.product(LAYOUTS, CACHES):
        try:
            with _flex_attention(compile_flex) if attention == "flex_attention" else nullcontext():
                answers = _answers(model, rows, layout, cache)
        except Exception as error:  # whatever a model raises on a road is its answer there
            found = _no_answer(_first_sentence(error))
        else:
            found = _compare(answers, yardstick, PRECISIONS[precision])
        yield Cell(layout=layout, cache=cache, attention=attention, precision=precision, **found)


def _answers(model: PreTrainedModel, rows: _Rows, layout: str, cache: str) -> Tensor:
    """Return the logits (roads, N, V) by a layout and every road that its cache stands for."""
    batches = _batches(layout, rows, tail=0 if cache == "none" else _ANSWER)
    steps = () if cache == "none" or layout == "packed" else _STEPS
    roads = ("default", "dynamic") if cache == "dynamic" else (cache,)
    return torch.stack([torch.cat([_ask(model, batch, road, steps) for batch in batches]) for road in roads])


def _compare(answers: Tensor, yardstick: Tensor, precision: Precision) -> dict[str, Any]:
    """Return what a cell says of the answers (roads, N, V) of a cell, given the yardstick (N, V)."""
    unusable = int((~answers.isfinite() & (answers != yardstick)).sum())
    if unusable:
        return _no_answer(f"{unusable} of {answers.numel()} logits are not finite")
    distance = float(torch.where(answers == yardstick, 0.0, (answers - yardstick).abs()).max())
    greatest = float(yardstick[yardstick.isfinite()].abs().max())
    best, second = yardstick.topk(2).values.unbind(-1)  # (N, V) -> (N,), (N,)
    decided = best - second > precision.tolerance * greatest if precision.ties else torch.ones_like(best).bool()
    wrong = (answers.argmax(-1) != yardstick.argmax(-1)) & decided  # (roads, N)
    return {
        "difference": distance / max(greatest, torch.finfo(torch.float32).tiny),
        "wrong_tokens": int(wrong.any(0).sum()),
        "compared_tokens": int(decided.sum()),
    }


def _no_answer(reason: str) -> dict[str, Any]:
    return {"difference": None, "wrong_tokens": 0, "compared_tokens": 0, "error": reason}


def _ask(model: PreTrainedModel, batch: _Batch, road: str, steps: Sequence[int]) -> Tensor:
    """Return the logits of the tokens that are no padding, (N, V) in fp32 on the CPU, row after row.

    The last tokens come in pieces of the lengths `steps`, out of the cache that the pieces before them filled.
    """
    width = batch.ids.shape[1]
    past = DynamicCache(config=model.config) if road == "dynamic" else None
    if road == "static":
        past = StaticCache(config=model.config, max_cache_len=width + _SPARE_ROOM)
    pieces = []
    for start, end in itertools.pairwise((0, *itertools.accumulate(steps, initial=width - sum(steps)))):
        output = model(
            batch.ids[:, start:end],
            attention_mask=None if batch.mask is None else batch.mask[:, :end],
            position_ids=None if batch.position_ids is None else batch.position_ids[:, start:end],
            past_key_values=past,
            use_cache=False if road == "none" else None,
        )
        pieces.append(output.logits)
        past = output.past_key_values
    real = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    logits: Tensor = torch.cat(pieces, dim=1)[real.bool()]  # (B, T, V) -> (N, V)
    return logits.float().cpu()


def _batches(layout: str, rows: _Rows, tail: int) -> list[_Batch]:
    """Lay the rows out; right padding lies before the last `tail` tokens, which a cache is asked for later."""
    if layout == "alone":
        return [_Batch(ids=row[None]) for row in rows.tokens]
    if layout == "packed":
        places = [torch.arange(len(row), device=row.device) for row in rows.tokens]
        return [_Batch(ids=torch.cat(rows.tokens)[None], position_ids=torch.cat(places)[None])]
    width = max(len(row) for row in rows.tokens)
    ids, mask = [], []
    for row in rows.tokens:
        place = 0 if layout == "left-padded" else len(row) - tail
        padding = rows.filler[: width - len(row)]
        ids.append(torch.cat((row[:place], padding, row[place:])))
        real = torch.ones_like(row)
        mask.append(torch.cat((real[:place], torch.zeros_like(padding), real[place:])))
    return [_Batch(ids=torch.stack(ids), mask=torch.stack(mask))]


def _make_rows(model: PreTrainedModel, seed: int) -> _Rows:
    """Return rows of three lengths, each a random prompt and the greedy answer of the model."""
    longest = min(_LONGEST, context_length(model) or _LONGEST)
    if longest < _SHORTEST + 2:
        raise UsageError(f"max_position_embeddings={longest}: the check needs at least {_SHORTEST + 2}")
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for length in (longest, (longest + _SHORTEST) // 2, _SHORTEST):
        row = torch.randint(vocab_size, (length - _ANSWER,), generator=generator).to(model.device)
        for _ in range(_ANSWER):
            best = _ask(model, _Batch(ids=row[None]), "none", ())[-1].argmax()
            row = torch.cat((row, best[None].to(row)))
        tokens.append(row)
    filler = torch.randint(vocab_size, (longest,), generator=generator).to(model.device)
    return _Rows(tokens=tuple(tokens), filler=filler)


def _copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy in a dtype, in evaluation mode and eager attention, whose default is to use a cache."""
    twin = copy.deepcopy(model).to(dtype).eval()
    twin.set_attn_implementation("eager")
    twin.config.use_cache = True
    return twin


def _usable(model: PreTrainedModel, wanted: Sequence[str] | None, compile_flex: bool) -> tuple[list[str], list[str]]:
    """Return the attention implementations that can run, and remarks on those that cannot or run otherwise.

    Raises UsageError for one that is wanted by name and cannot.
    """
    usable, remarks = [], []
    for name in ATTENTIONS if wanted is None else wanted:
        reason = _why_not(model, name, compile_flex)
        if reason is None:
            usable.append(name)
        elif wanted is not None:
            raise UsageError(f"attention {name!r} cannot run: {reason}")
        else:
            remarks.append(f"{name} left out: {reason}")
    if "flex_attention" in usable and not compile_flex:
        remarks.append("flex_attention ran uncompiled: its mask was checked, torch's kernel for it was not")
    return usable, remarks


def _why_not(model: PreTrainedModel, attention: str, compile_flex: bool) -> str | None:
    """Return why an attention implementation cannot run here, or None if it can."""
    try:
        model.set_attn_implementation(attention)
        if attention == "flex_attention" and compile_flex:
            probe = torch.zeros(1, 1, 16, 64, device=model.device)
            torch.compile(flex_attention)(probe, probe, probe)
    except Exception as error:  # the compiler has no error class of its own for a machine that cannot compile
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    message = re.split(r"\n|[.] ", str(error).strip())[0]
    return f"{type(error).__name__}: {message[:200]}"


@contextmanager
def _flex_attention(compiled: bool) -> Iterator[None]:
    """Run flex attention freshly compiled, or as plain operations without torch's advice to compile it."""
    if compiled:
        torch.compiler.reset()  # or after a few shapes torch stops compiling, and later cells show something else
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def _check_names(argument: str, names: Sequence[str], known: Collection[str]) -> None:
    if not names:
        raise UsageError(f"{argument}: name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UsageError(unknown_name(argument, name, known))
