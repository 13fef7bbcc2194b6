"""Which shape a budget is best spent on: how many steps it allows, what they bring, and in which batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.planning import Budget
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.text import duration
from gpt_kit_hf.training.needs.due import due_in
from gpt_kit_hf.training.needs.run_needs import beside_steps
from gpt_kit_hf.training.planning.candidates import Candidate, Timing
from gpt_kit_hf.training.planning.corpus_facts import CorpusFacts
from gpt_kit_hf.training.planning.law import LAW, layer_parameters
from gpt_kit_hf.training.planning.recipe import MANY_EPOCHS
from gpt_kit_hf.training.runtime.available_memory import memory_left, out_of_memory
from gpt_kit_hf.training.runtime.compilation import is_compiled

Shape: TypeAlias = tuple[int, int, int]  # layers, heads, width

# Tokens of a step on a CPU, as in the runs of the law. A GPU is not busy with so few.
_STEP_TOKENS, _STEP_TOKENS_OF_A_GPU = 2048, 16_384
FEW_STEPS, _MANY_STEPS = 150, 3000  # outside of these a step has fewer or more tokens
_WORSE_IN_A_ROW = 2  # larger shapes that are worse, after which none is tried any more
_FORWARD = 1 / 3  # of the time of a step: an evaluation has no backward pass
# The most parameters of the blocks for each token of text; the law was measured up to 28.
_PARAMETERS_PER_TOKEN = 32
# Steps that timing a shape takes, and the share of a budget in seconds, or the seconds, that this may take.
_TIMED_STEPS, _TIMED_SHARE, _TIMED_SECONDS = 4, 0.03, 10.0
# Seconds of a run on a CPU for which compiled blocks are tried, and the share of the time that they must save.
_COMPILED_SECONDS, _SAVED = 240, 0.05
# Shapes are alike if their bits per byte differ by less: the law knows neither depth nor what a text repeats. More
# layers are better then, as for Python's library in 10 minutes, whose tables they learn (benchmarks/README.md).
_ALIKE = 0.015
_NEAR = 0.05  # shapes with so many more bits per byte than the best are timed again
_BYTES_PER_PARAMETER = 16  # weights, gradients and two means of them, in fp32


class Choice:
    """What is known of text, budget and machine, and the choice among shapes."""

    def __init__(
        self, training: TrainingOptions, budget: Budget, facts: CorpusFacts, timing: Timing, device: torch.device
    ) -> None:
        self._training, self._budget, self._facts, self._timing = training, budget, facts, timing
        self._keeping_best = replace(training, load_best_model_at_end=True)  # which evaluates each checkpoint
        self._device, self._context = device, timing.context
        tokens = _STEP_TOKENS if device.type == "cpu" else _STEP_TOKENS_OF_A_GPU
        self.first_batch_size = max(1, tokens // self._context)

    def candidates(self, shapes: Iterable[Shape], batch_size: int, log: Report) -> tuple[list[Candidate], list[str]]:
        """Return the shapes from the smallest on, until larger ones become worse or cannot be, and notes on these.

        Steps are timed, unless that takes too much of the budget: then the time follows from that of the shape before.
        Raises UsageError for a budget that is less than a step of the first one.
        """
        found: list[Candidate] = []
        worse = 0
        for shape in shapes:
            if found and layer_parameters(shape[0], shape[2]) > _PARAMETERS_PER_TOKEN * self._facts.tokens:
                return found, ["the text is too small for larger shapes than these"]
            candidate = self._candidate(shape, batch_size, found, log)
            if candidate is None:
                return found, [f"{shape[0]} x {shape[2]} and larger shapes do not fit into the memory"]
            if not self.allowed(candidate):
                if not found:
                    raise UsageError(self._too_little(candidate))
                break
            worse = worse + 1 if found and self.best([*found, candidate]) is not candidate else 0
            found.append(candidate)
            if worse == _WORSE_IN_A_ROW:
                break
        return found, []

    def near_ones_again(self, candidates: Sequence[Candidate], log: Report) -> list[Candidate]:
        """Return the candidates, with a second time of those that are nearly the best if time decides.

        They were timed one after the other, and another program may have delayed one of them.
        """
        if self._budget.kind != "seconds" or len(candidates) == 1:
            return list(candidates)
        most = (1 + _NEAR) * min(self.bits(each) for each in candidates)
        return [self.timed_again(each, log) if each.timed and self.bits(each) <= most else each for each in candidates]

    def best(self, candidates: Sequence[Candidate], times: float = 1.0, text: float = 1.0) -> Candidate:
        """Return the candidate to spend `times` the budget on, with `text` times the text.

        That with the fewest bits per byte, or with more layers if it is alike. With a number of tokens, where a larger
        one is always better, the smallest of those that are like the best of the candidates.
        """
        by_bits = sorted(candidates, key=lambda each: self.bits(each, times, text))
        most = (1 + _ALIKE) * self.bits(by_bits[0], times, text)
        alike = [each for each in by_bits if self.bits(each, times, text) <= most]
        if self._budget.kind == "tokens":  # which says nothing of the time that a larger one takes
            return min(alike, key=lambda each: each.parameters)
        return max(alike, key=lambda each: each.layers)

    def settled(self, candidate: Candidate, *, any_batch_size: bool) -> Candidate:
        """Return the chosen candidate, timed, if any batch will do with one of neither few steps nor very many."""
        if not candidate.timed:
            candidate = self._timed(candidate.shape, candidate.batch_size) or candidate
        for _ in range(4 if any_batch_size else 0):  # a GPU takes less time for a token of a larger batch
            wanted = self._batch_size(candidate)
            if wanted == candidate.batch_size or (other := self._timed(candidate.shape, wanted)) is None:
                break
            candidate = other
        return candidate

    def timed_again(self, candidate: Candidate, log: Report = lambda _: None) -> Candidate:
        """Return the candidate with the faster of its time and another one, as other programs delay some steps."""
        again = None if self._takes_long(candidate) else self._timed(candidate.shape, candidate.batch_size)
        if again is None:
            return candidate
        log(f"timed    {again.size} again: {again.cost.seconds:.2g} s")
        return candidate if candidate.cost.seconds < again.cost.seconds else again

    def compiled(self, candidate: Candidate, wanted: bool | None, log: Report) -> tuple[Candidate, bool]:
        """Return the candidate with the time of compiled blocks, and whether that differs from what `wanted` says.

        Where nothing is wanted, blocks of a long run on a CPU are compiled if that saves more time than it takes.
        """
        planned = self.seconds(candidate, self.steps(candidate), candidate.step_tokens)
        tried = wanted is None and self._device.type == "cpu" and planned >= _COMPILED_SECONDS
        if not tried and not is_compiled(wanted, self._device):
            return candidate, False
        found = self._timing.compiled(candidate)
        if found is None:
            return candidate, False
        log(f"timed    with compiled blocks: {found.compiled:.2g} s for a step, {found.uncompiled:.2g} s without")
        saved = planned * (1 - found.compiled / found.uncompiled)
        if tried and saved < max(found.first, _SAVED * planned):
            return candidate, False
        return replace(candidate, cost=replace(candidate.cost, seconds=found.compiled)), tried

    def steps(self, candidate: Candidate, times: float = 1.0, text: float = 1.0, batch_size: int | None = None) -> int:
        """Return how many steps to make: all that `times` the budget allows, or fewer if a text is small."""
        step_tokens = (batch_size or candidate.batch_size) * self._context
        most = math.ceil(LAW.most_epochs * text * self._facts.tokens / step_tokens)
        return max(1, min(most, self.allowed(candidate, times, batch_size)))  # it may be slower, timed again

    def allowed(self, candidate: Candidate, times: float = 1.0, batch_size: int | None = None) -> int:
        """Return how many steps `times` the budget allows; 0 if it is less than one with its evaluations."""
        step_tokens, amount = (batch_size or candidate.batch_size) * self._context, times * self._budget.amount
        if self._budget.kind == "tokens":
            return round(amount / step_tokens)
        if self._budget.kind == "flop":  # 6 a parameter and token (Kaplan et al. 2020, section 2.1)
            return round(amount / (6 * candidate.parameters * step_tokens))
        low, high = 0, 1 + int(amount / (candidate.seconds_per_token * step_tokens))
        while low + 1 < high:  # `low` steps fit; `high` do not
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(candidate, middle, step_tokens) <= amount else (low, middle)
        return low

    def parameters_per_token(self, candidate: Candidate) -> float:
        """Return the parameters of the blocks for each token of the text."""
        return candidate.layer_parameters / self._facts.tokens

    def epochs(self, tokens: int) -> float:
        """Return how often the text is read by a run of so many tokens."""
        return tokens / self._facts.tokens

    def seconds(self, candidate: Candidate, steps: int, step_tokens: int) -> float:
        """Return the time of so many steps with their evaluations."""
        training = self._keeping_best if self.epochs(steps * step_tokens) >= MANY_EPOCHS else self._training
        due = due_in(training, steps, eval_before_training=False)
        scored = min(self._training.max_eval_samples * self._context, self._facts.eval_tokens)
        evaluated = due.evaluations_after(0) * scored + self._facts.eval_tokens
        return candidate.seconds_per_token * (steps * step_tokens + _FORWARD * evaluated)

    def bits(self, candidate: Candidate, times: float = 1.0, text: float = 1.0) -> float:
        """Return the bits per byte that the law expects of `times` the budget and `text` times the text."""
        return LAW.bits_per_byte(self._facts.gzip_near, **self._run(candidate, times, text))

    def twice(self, found: Sequence[Candidate], chosen: Candidate, best: Candidate) -> tuple[float, float]:
        """Return the bits per byte that are expected of twice the budget, and of twice the text.

        `best` is the chosen candidate as it is trained. The others would have its batch, and become as much slower or
        faster a token by what else differs.
        """
        slower = best.seconds_per_token / chosen.seconds_per_token

        def alike(other: Candidate) -> Candidate:
            seconds = slower * other.seconds_per_token * best.step_tokens
            return replace(other, batch_size=best.batch_size, cost=replace(other.cost, seconds=seconds))

        others = [best if each is chosen else alike(each) for each in found]
        budget = self.bits(self.best(others, times=2.0), times=2.0)
        if self.steps(best) * best.step_tokens <= self._facts.tokens:  # not all of the text is read
            return budget, self.bits(best)
        return budget, self.bits(self.best(others, text=2.0), text=2.0)

    # --- a candidate

    def _too_little(self, candidate: Candidate) -> str:
        """Return the message for a budget that is less than a step of a shape, the smallest or only one."""
        step = f"a step of {candidate.batch_size} x {self._context} tokens with {candidate.size}"
        if self._budget.kind != "seconds":
            return f"the budget is less than {step}: give more, or a lower batch_size"
        takes = duration(max(1.0, self.seconds(candidate, 1, candidate.step_tokens)))
        return (
            f"the budget is too short: {step} and the evaluation of {self._facts.eval_tokens:,} held-out tokens take "
            f"about {takes}; give more, or hold less out by eval_max_tokens"
        )

    def _run(self, candidate: Candidate, times: float, text: float) -> dict[str, float]:
        """Return what the law needs to know."""
        return {
            "parameters": candidate.layer_parameters,
            "seen": self.steps(candidate, times, text) * candidate.step_tokens,
            "text": text * self._facts.tokens,
        }

    def _candidate(self, shape: Shape, batch_size: int, found: Sequence[Candidate], log: Report) -> Candidate | None:
        """Return a shape with its cost, None if it does not fit into the memory."""
        parameters = self._timing.parameters(shape)
        if _BYTES_PER_PARAMETER * parameters + self._beside(4 * parameters, passes=0) > self._memory_left():
            return None
        if found:
            estimated = self._timing.estimated(shape, found[-1])
            if self._takes_long(estimated):
                return None if self._does_not_fit(estimated) else estimated
        candidate = self._timed(shape, batch_size)
        if candidate is not None:
            took = f"{candidate.cost.seconds:.2g} s for a step of {candidate.step_tokens:,} tokens"
            log(f"timed    {candidate.size}: {took}")
        return candidate

    def _takes_long(self, candidate: Candidate) -> bool:
        """Return whether timing a candidate takes too much of the budget."""
        share = _TIMED_SHARE * self._budget.amount if self._budget.kind == "seconds" else 0.0
        return _TIMED_STEPS * candidate.cost.seconds > max(_TIMED_SECONDS, share)

    def _timed(self, shape: Shape, batch_size: int) -> Candidate | None:
        try:
            candidate = self._timing.candidate(shape, batch_size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None
        return None if self._does_not_fit(candidate) else candidate

    def _does_not_fit(self, candidate: Candidate) -> bool:
        """Return whether a step would need more memory than there is: what it took to measure is free again."""
        return candidate.cost.peak_bytes + self.beside_steps(candidate) > self._memory_left()

    def beside_steps(self, candidate: Candidate) -> int:
        """Return the bytes that a run takes on a CPU beside its steps."""
        weights = 4 * candidate.parameters
        return self._beside(weights, passes=max(0, candidate.cost.peak_bytes - weights - candidate.cost.state_bytes))

    def _beside(self, weights: int, passes: int) -> int:
        return beside_steps(weights=weights, passes=passes) if self._device.type == "cpu" else 0

    def _memory_left(self) -> float:
        left = memory_left(self._device)
        return math.inf if left is None else left

    def _batch_size(self, candidate: Candidate) -> int:
        size = candidate.batch_size
        most = size * self._memory_left() / max(1, candidate.cost.peak_bytes)
        while self.steps(candidate, batch_size=size) > _MANY_STEPS and 2 * size <= most:
            size *= 2
        while self.steps(candidate, batch_size=size) < FEW_STEPS and size > 2:
            size //= 2
        return size
