"""The invariance check: whether a causal LM gives the same logits for a row however it is asked for it.

A cell of the check is a layout of the rows (each alone, padded, packed), a cache, an attention implementation and a
precision. The reference of a precision is each row alone, in eager attention without a cache.

Shapes: N tokens of all rows together, B rows of a batch, T tokens of a row, V vocabulary size.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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

# The last tokens of a row, asked for in steps of these lengths when a cache holds the tokens before them.
_STEPS = (3, 1, 1)
_ANSWER = sum(_STEPS)
_LONGEST, _SHORTEST = 20, _ANSWER + 1
_STATIC_CACHE_ROOM = 8  # positions of a static cache beyond the row, which no token may attend to


class Precision(NamedTuple):
    """A dtype, and the largest logit difference that holds, relative to the greatest absolute logit.

    With `ties`, a greedy token counts only where the best logit leads the second by more than the tolerance.
    """

    dtype: torch.dtype
    tolerance: float
    ties: bool


# Two cells that differ only in the rounding of the logits may lie one eps apart in bf16, and every addition to the
# residual stream before that rounds as well: random models lay 1.1 eps apart with 2 layers, 1.8 with 12, 2.5 with 24
# and 3.1 with 48. A real fault is a good part of the greatest logit, and fails in fp32 too.
PRECISIONS = {
    "fp32": Precision(torch.float32, tolerance=1e-4, ties=False),
    "bf16": Precision(torch.bfloat16, tolerance=8 * torch.finfo(torch.bfloat16).eps, ties=True),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one cell; where it gave no finite logits, `difference` is None and `error` the reason."""

    layout: str
    cache: str
    attention: str
    precision: str
    difference: float | None = None
    wrong_tokens: int = 0
    compared_tokens: int = 0
    error: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the logits are within the tolerance and the greedy tokens equal."""
        within = self.difference is not None and self.difference <= PRECISIONS[self.precision].tolerance
        return within and self.wrong_tokens == 0 and self.error is None

    @property
    def name(self) -> str:
        """The name, such as "packed/dynamic/sdpa/bf16"."""
        return f"{self.layout}/{self.cache}/{self.attention}/{self.precision}"

    def describe(self) -> str:
        """Return the name and the result in one line."""
        tokens = f"{self.wrong_tokens} of {self.compared_tokens} greedy tokens differ"
        return f"{self.name}: {self.error or f'logits {self.difference:.1e} apart, {tokens}'}"


@dataclass(frozen=True, kw_only=True)
class InvarianceReport:
    """All cells of a model; `remarks` are the cells that were left out or ran in another way, and why."""

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
        """Return the cells as text: a line per layout, a column per cache, `!` at failures, then the failures."""
        lines = [
            f"{self.model} on {self.device}, rows of {', '.join(map(str, self.row_lengths))} tokens: greatest logit "
            "difference to the row alone",
            "(eager, no cache), divided by the greatest logit; ! where that or a greedy token is wrong",
        ]
        for precision, cells in itertools.groupby(self.cells, lambda cell: cell.precision):
            title = f"{precision} (at most {PRECISIONS[precision].tolerance:.1e})"
            lines += ["", f"{title:31}" + "".join(f"{cache:>11}" for cache in CACHES)]
            for (attention, layout), row in itertools.groupby(cells, lambda cell: (cell.attention, cell.layout)):
                shown = (f"{c.difference:.1e}{' ' if c.holds else '!'}" if c.error is None else "error!" for c in row)
                lines.append(f"  {attention:16}{layout:13}" + "".join(f"{text:>11}" for text in shown).rstrip())
        return "\n".join([*lines, "", *self.remarks, self.verdict(), *(f"  {c.describe()}" for c in self.failures)])

    def verdict(self) -> str:
        """Return one line: how many cells hold or fail."""
        total = len(self.cells)
        return f"all {total} cells hold" if self.holds else f"{len(self.failures)} of {total} cells fail"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON, with the tolerances and the versions of torch and transformers."""
        return asdict(self) | {
            "row_lengths": list(self.row_lengths),
            "remarks": list(self.remarks),
            "cells": [asdict(cell) | {"holds": cell.holds} for cell in self.cells],
            "tolerances": {name: precision.tolerance for name, precision in PRECISIONS.items()},
            "holds": self.holds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


class _Batch(NamedTuple):
    """The input of one call: (B, T) each; mask and positions where the layout needs them."""

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
    """Ask a causal LM of transformers for the same rows in every cell, and report how far the logits lie apart.

    A row is a prompt of random ids and the tokens with which the model in fp32 continues it greedily. Each is asked
    for by plain `forward`, with every other argument at its default:

    - alone; left- and right-padded in a batch, with its `attention_mask` only and random ids as padding; packed into
      one row, with `position_ids` that restart and no mask;
    - without a cache (`use_cache=False`), with a dynamic one (both the model's own default and an empty
      `DynamicCache` passed in), and with a `StaticCache` longer than the row. With a cache the last tokens come in
      steps of 3, 1 and 1 after the rest; right padding then lies between the two. Packed rows come in one call: a
      cache does not tell where its documents end.

    The greedy token at every place of the rows is compared, too. In fp32 each must equal the reference's; in bf16,
    where many logits are equal after rounding, each whose lead over the second is greater than the tolerance.

    Args:
        model: not changed: a copy in evaluation mode on the same device is asked.
        attention: of `ATTENTIONS`; by default all that the model and this machine support, the others are remarked.
        precisions: of `PRECISIONS`.
        compile_flex: run flex attention compiled, as transformers does, or as torch's plain operations for it. By
            default compiled, but not on a CPU: there the kernel of torch 2.13 gives wrong numbers when lengths
            change, also outside of a model, and the check takes half an hour. Compiling resets the compiler
            (`torch.compiler.reset`).
        seed: of the prompts and the padding.
        announce: called with a line of progress before each attention of a precision.

    Raises:
        UsageError: an unknown name, a named attention that cannot run, or a context of fewer than 8 tokens.

    """
    _check_names("attention", ATTENTIONS if attention is None else attention, ATTENTIONS)
    _check_names("precisions", precisions, PRECISIONS)
    compile_flex = model.device.type != "cpu" if compile_flex is None else compile_flex
    cells: list[Cell] = []
    with torch.no_grad():
        asked = _copy_in(model, torch.float32)
        rows, filler = _make_rows(asked, seed)
        usable, remarks = _usable(asked, attention, compile_flex)
        for precision in precisions:
            asked = _copy_in(model, PRECISIONS[precision].dtype)
            reference = torch.cat([_logits(asked, _Batch(row[None]), "none", ()) for row in rows])  # (N, V)
            for name in usable:
                announce(f"checking {precision}, {name}")
                asked.set_attn_implementation(name)
                for layout, cache in itertools.product(LAYOUTS, CACHES):
                    with _flex_attention(compile_flex) if name == "flex_attention" else nullcontext():
                        found = _compare(asked, rows, filler, layout, cache, reference, PRECISIONS[precision])
                    cells.append(Cell(layout=layout, cache=cache, attention=name, precision=precision, **found))
    return InvarianceReport(
        model=type(model).__name__,
        device=str(model.device),
        row_lengths=tuple(len(row) for row in rows),
        seed=seed,
        cells=tuple(cells),
        remarks=tuple(remarks),
    )


def _compare(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    filler: Tensor,
    layout: str,
    cache: str,
    reference: Tensor,
    precision: Precision,
) -> dict[str, Any]:
    """Return a cell's result: its logits, by every cache that `cache` stands for, against the reference (N, V)."""
    batches = _batches(layout, rows, filler, tail=0 if cache == "none" else _ANSWER)
    steps = () if cache == "none" or layout == "packed" else _STEPS
    caches = ("default", "dynamic") if cache == "dynamic" else (cache,)
    try:
        logits = torch.stack([torch.cat([_logits(model, batch, each, steps) for batch in batches]) for each in caches])
    except Exception as error:  # whatever the model raises is the cell's result
        return {"error": _first_sentence(error)}
    unusable = int((~logits.isfinite() & (logits != reference)).sum())
    if unusable:
        return {"error": f"{unusable} of {logits.numel()} logits are not finite"}
    distance = float(torch.where(logits == reference, 0.0, (logits - reference).abs()).max())
    greatest = float(reference[reference.isfinite()].abs().max())
    best, second = reference.topk(2).values.unbind(-1)  # (N, V) -> (N,), (N,)
    decided = best - second > precision.tolerance * greatest if precision.ties else torch.ones_like(best).bool()
    wrong = (logits.argmax(-1) != reference.argmax(-1)) & decided  # (caches, N)
    return {
        "difference": distance / max(greatest, torch.finfo(torch.float32).tiny),
        "wrong_tokens": int(wrong.any(0).sum()),
        "compared_tokens": int(decided.sum()),
    }


def _logits(model: PreTrainedModel, batch: _Batch, cache: str, steps: Sequence[int]) -> Tensor:
    """Return the logits of all tokens but padding, row after row, (N, V) in fp32 on the CPU.

    The last tokens come in steps of these lengths, each with the cache of the calls before it.
    """
    width = batch.ids.shape[1]
    past = DynamicCache(config=model.config) if cache == "dynamic" else None
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=width + _STATIC_CACHE_ROOM)
    outputs = []
    for start, end in itertools.pairwise((0, *itertools.accumulate(steps, initial=width - sum(steps)))):
        output = model(
            batch.ids[:, start:end],
            attention_mask=None if batch.mask is None else batch.mask[:, :end],
            position_ids=None if batch.position_ids is None else batch.position_ids[:, start:end],
            past_key_values=past,
            use_cache=False if cache == "none" else None,
        )
        outputs.append(output.logits)
        past = output.past_key_values
    real = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    logits: Tensor = torch.cat(outputs, dim=1)[real.bool()]  # (B, T, V) -> (N, V)
    return logits.float().cpu()


def _batches(layout: str, rows: Sequence[Tensor], filler: Tensor, tail: int) -> list[_Batch]:
    """Return the rows in a layout; right padding lies before the last `tail` tokens, which follow a cache."""
    if layout == "alone":
        return [_Batch(row[None]) for row in rows]
    if layout == "packed":
        positions = torch.cat([torch.arange(len(row), device=row.device) for row in rows])
        return [_Batch(torch.cat([*rows])[None], position_ids=positions[None])]
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        place = 0 if layout == "left-padded" else len(row) - tail
        padding, real = filler[: width - len(row)], torch.ones_like(row)
        ids.append(torch.cat((row[:place], padding, row[place:])))
        mask.append(torch.cat((real[:place], torch.zeros_like(padding), real[place:])))
    return [_Batch(torch.stack(ids), mask=torch.stack(mask))]


def _make_rows(model: PreTrainedModel, seed: int) -> tuple[list[Tensor], Tensor]:
    """Return rows of three lengths, each a random prompt and its greedy continuation, and ids for padding."""
    longest = min(_LONGEST, context_length(model) or _LONGEST)
    if longest < _SHORTEST + 2:
        raise UsageError(f"max_position_embeddings={longest}: the check needs at least {_SHORTEST + 2}")
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (longest, (longest + _SHORTEST) // 2, _SHORTEST):
        row = torch.randint(vocab_size, (length - _ANSWER,), generator=generator).to(model.device)
        for _ in range(_ANSWER):
            best = _logits(model, _Batch(row[None]), "none", ())[-1].argmax()
            row = torch.cat((row, best[None].to(row)))
        rows.append(row)
    return rows, torch.randint(vocab_size, (longest,), generator=generator).to(model.device)


def _copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy in a dtype, in evaluation mode and eager attention, that uses a cache by default."""
    copied = copy.deepcopy(model).to(dtype).eval()
    copied.set_attn_implementation("eager")
    copied.config.use_cache = True
    return copied


def _usable(model: PreTrainedModel, wanted: Sequence[str] | None, compile_flex: bool) -> tuple[list[str], list[str]]:
    """Return the attention implementations that can run, and remarks on the others.

    Raises UsageError for one of `wanted` that cannot.
    """
    usable, remarks = [], []
    for name in ATTENTIONS if wanted is None else wanted:
        try:
            model.set_attn_implementation(name)
            if name == "flex_attention" and compile_flex:
                probe = torch.zeros(1, 1, 16, 64, device=model.device)
                torch.compile(flex_attention)(probe, probe, probe)
            usable.append(name)
        except Exception as error:  # torch has no error class for a machine that cannot compile
            if wanted is not None:
                raise UsageError(f"attention {name!r} cannot run: {_first_sentence(error)}") from None
            remarks.append(f"{name} left out: {_first_sentence(error)}")
    if "flex_attention" in usable and not compile_flex:
        remarks.append("flex_attention ran uncompiled: its mask was checked, torch's kernel for it was not")
    return usable, remarks


def _first_sentence(error: Exception) -> str:
    message = re.split(r"\n|[.] ", str(error).strip())[0]
    return f"{type(error).__name__}: {message[:200]}"


@contextmanager
def _flex_attention(compiled: bool) -> Iterator[None]:
    """Run flex attention freshly compiled, or as plain operations without torch's advice to compile it."""
    if compiled:
        torch.compiler.reset()  # or after a few shapes torch stops compiling, and later cells test something else
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
