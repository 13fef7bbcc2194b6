"""The plan of a run: the shape, length, vocabulary and rates with the best bits per byte that a budget allows."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import tiktoken

from gpt_kit_hf.data.text.corpus import choose_encoding, prepare_corpus
from gpt_kit_hf.data.text.sources import train_sources
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import TRAINED_BPE, EncodingOptions
from gpt_kit_hf.options.declare import changed_values, sections_of
from gpt_kit_hf.options.parser import build_options
from gpt_kit_hf.options.planning import Budget, parse_budget
from gpt_kit_hf.options.run import RunOptions, stored_options
from gpt_kit_hf.options.training import OptimizerOptions, recipe_options
from gpt_kit_hf.storage.atomic_files import Report, load_json
from gpt_kit_hf.storage.run_folder import OPTIONS_FILE, holds_run
from gpt_kit_hf.training.planning.candidates import Candidate, Timing, allowed_shapes
from gpt_kit_hf.training.planning.corpus_facts import CorpusFacts, corpus_facts
from gpt_kit_hf.training.planning.law import LAW
from gpt_kit_hf.training.runtime.available_memory import available_memory
from gpt_kit_hf.training.runtime.launch import create_accelerator
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

_STEP_TOKENS = 2048  # of a step, as in the runs of the law
_FEW_STEPS, _MANY_STEPS = 150, 4000  # outside of these a step has fewer or more tokens
_WORSE_IN_A_ROW = 2  # larger shapes that are worse, after which none is timed any more
_LARGE_VOCABULARY = 1024  # ids; embeddings of so many learn ten times as fast as the recipe's
_FORWARD = 1 / 3  # of the time of a step: an evaluation has no backward pass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train, and what that takes and brings.

    `values` are the options of the run, by name, as in a file for `--config`. `seconds` includes evaluations;
    `bits_per_byte` is what the law says, `twice` what it says for twice the budget, and for twice the text.
    """

    values: dict[str, Any]
    facts: CorpusFacts
    encoding: tiktoken.Encoding
    candidate: Candidate
    batch_size: int
    context: int
    steps: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    bits_per_byte: float
    twice: tuple[float, float]
    timed: int
    notes: tuple[str, ...]

    @property
    def epochs(self) -> float:
        """Passes over the training text."""
        return self.steps * self.candidate_tokens / self.facts.tokens

    @property
    def candidate_tokens(self) -> int:
        """The tokens of a step."""
        return self.batch_size * self.context


def planned_options(options: RunOptions, log: Report) -> RunOptions:
    """Return the options of a run with a budget: planned, or those of the run that is resumed; `log` gets the plan.

    Raises UsageError for a budget that cannot be planned, see `make_plan`.
    """
    from gpt_kit_hf.training.planning.page import page_lines

    assert options.plan.budget is not None
    folder = Path(options.training.output_dir)
    if options.training.resume and holds_run(folder):
        stored = stored_options(RunOptions, load_json(folder / OPTIONS_FILE))
        kept = [vars(getattr(stored, section)) for section in sections_of(RunOptions)]
        return build_options(RunOptions, {**dict(ChainMap(*kept)), **options.given})
    plan = make_plan(options, log)
    for line in page_lines(plan, parse_budget(options.plan.budget)):
        log(line)
    return build_options(RunOptions, {**plan.values, "budget": options.plan.budget})


def make_plan(options: RunOptions, log: Report) -> Plan:
    """Return the plan for the text and the budget of the options; what was given, `options.given`, stays.

    Steps of shapes are timed on this machine. Raises UsageError for what cannot be planned: a stream, whose size is
    not known, a model to train further, several processes, a number of steps beside the budget; and DataError for a
    text that is too small for any model.
    """
    assert options.plan.budget is not None
    given = _given(options)
    _check_plannable(options, given)
    budget = parse_budget(options.plan.budget)
    encoding_options = _encoding_options(options, given)
    if encoding_options.encoding == TRAINED_BPE and not options.text.token_files:
        log(f"training a bpe of {encoding_options.vocab_size:,} tokens on the text")
    encoding = choose_encoding(options.text, encoding_options)
    corpus = prepare_corpus(options.text, encoding, seed=options.training.seed, log=log)
    facts = corpus_facts(corpus)
    return _Choice(options, given, budget, encoding_options, encoding, facts).plan(log)


def _given(options: RunOptions) -> dict[str, Any]:
    """Return what was given on the command line; of options that were made without one, what is not the default."""
    changed = [changed_values(getattr(options, section)) for section in sections_of(RunOptions)]
    given = options.given or dict(ChainMap(*changed))
    return {name: value for name, value in given.items() if value is not None}


def _check_plannable(options: RunOptions, given: Mapping[str, Any]) -> None:
    shown = f"budget={options.plan.budget!r}"
    if options.text.streaming:
        raise UsageError(f"{shown} needs a stored text: the size of a stream is not known; leave streaming out")
    if options.model.model_name_or_path is not None:
        raise UsageError(f"{shown} plans a new model, and model_name_or_path is one that exists: give max_steps")
    for name in ("max_steps", "num_train_epochs"):
        if name in given:
            raise UsageError(f"{shown} and {name}={given[name]}: both say how long the run is, give one of them")
    # Set by torch's launchers.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"{shown} is planned by one process: write a plan with gpt-kit plan, and launch it by --config"
        )


def _encoding_options(options: RunOptions, given: Mapping[str, Any]) -> EncodingOptions:
    """Return the encoding that was given, or one by the size of the text: a small one cannot fill a vocabulary."""
    if {"encoding", "vocab_size"} & given.keys() or options.text.token_files:
        return options.encoding
    size = sum(shard.size for _, source in train_sources(options.text) for shard in source.shards(may_cut=True))
    if size < 3e6:
        return EncodingOptions(encoding="bytes")
    return EncodingOptions(encoding=TRAINED_BPE, vocab_size=4096 if size < 1e8 else 16_384 if size < 2e9 else 32_768)


class _Choice:
    """The choice among shapes, with what is known of text, budget and machine."""

    def __init__(
        self,
        options: RunOptions,
        given: Mapping[str, Any],
        budget: Budget,
        encoding_options: EncodingOptions,
        encoding: tiktoken.Encoding,
        facts: CorpusFacts,
    ) -> None:
        self._options, self._given, self._budget = options, given, budget
        self._encoding_options, self._encoding, self._facts = encoding_options, encoding, facts
        self._context = given.get("max_length") or min(256, max(16, facts.eval_tokens // 2), facts.tokens // 4)
        self._accelerator = create_accelerator(use_cpu=options.training.use_cpu)
        if self._accelerator.device.type == "cpu":
            reuse_freed_memory()
        model = replace(options.model, n_layer=None, n_head=None, n_embd=None, max_position_embeddings=self._context)
        self._timing = Timing(
            model, self._optimizer(), self._accelerator, options.training.mixed_precision, encoding.n_vocab
        )

    def plan(self, log: Report) -> Plan:
        """Time shapes from the smallest on, until larger ones become worse, and return the plan of the best."""
        facts, notes, found = self._facts, list[str](), list[tuple[float, Candidate]]()
        batch_size = self._given.get("batch_size") or max(1, _STEP_TOKENS // self._context)
        before, worse = psutil.Process().memory_info().rss, 0
        for shape in allowed_shapes(self._given, self._options.model.blocks):
            candidate = self._timing.candidate(shape, self._context, batch_size)
            if self._does_not_fit(candidate):
                notes.append(f"{candidate.layers} x {candidate.width} and larger shapes do not fit into the memory")
                break
            bits = self._bits(candidate, self._steps(candidate, batch_size), batch_size)
            worse = worse + 1 if found and bits > min(found, key=lambda each: each[0])[0] else 0
            found.append((bits, candidate))
            tokens, size = candidate.step_tokens, f"{candidate.layers} layer{'s' * (candidate.layers > 1)}"
            log(f"timed    {size} of {candidate.width}: {candidate.cost.seconds:.2f} s a step of {tokens:,} tokens")
            if worse == _WORSE_IN_A_ROW:
                break
        if not found:
            raise UsageError(f"no shape fits into the memory, {available_memory():,} bytes: lower batch_size")
        _, best = min(found, key=lambda each: each[0])
        if "batch_size" not in self._given:
            batch_size = self._batch_size(best, batch_size)
            best = self._timing.candidate((best.layers, best.heads, best.width), self._context, batch_size)
        steps = self._steps(best, batch_size)
        if facts.repeated > 0.3:
            notes.append(f"{facts.repeated:.0%} of the text is lines that stand in it before: the model learns those")
        epochs = steps * batch_size * self._context / facts.tokens
        if epochs > 20:
            notes.append(f"the text is read {epochs:.0f} times: more text would help more than a longer run")
        twice_budget = min(self._bits(each, self._steps(each, batch_size, 2.0), batch_size) for _, each in found)
        twice_text = min(self._bits(each, self._steps(each, batch_size), batch_size, 2.0) for _, each in found)
        return Plan(
            values=self._values(best, batch_size, steps, epochs),
            facts=facts,
            encoding=self._encoding,
            candidate=best,
            batch_size=batch_size,
            context=self._context,
            steps=steps,
            seconds=self._seconds(best, steps, batch_size),
            memory_bytes=before + best.cost.peak_bytes,
            disk_bytes=self._disk_bytes(best),
            bits_per_byte=self._bits(best, steps, batch_size),
            twice=(twice_budget, twice_text),
            timed=len(found),
            notes=tuple(notes),
        )

    # --- what a candidate takes and brings

    def _steps(self, candidate: Candidate, batch_size: int, times: float = 1.0) -> int:
        """Return how many steps `times` the budget allows."""
        step_tokens, amount = batch_size * self._context, times * self._budget.amount
        if self._budget.kind == "tokens":
            return max(1, round(amount / step_tokens))
        if self._budget.kind == "flop":  # 6 a parameter and token (Kaplan et al. 2020, section 2.1)
            return max(1, round(amount / (6 * candidate.parameters * step_tokens)))
        step = candidate.seconds_per_token * step_tokens
        steps = max(1, int(amount / step))
        for _ in range(3):  # as the number of evaluations follows from that of the steps
            evaluating = self._seconds(candidate, steps, batch_size) - steps * step
            steps = max(1, int((amount - evaluating) / step))
        return steps

    def _seconds(self, candidate: Candidate, steps: int, batch_size: int) -> float:
        """Return the time of so many steps with their evaluations."""
        training = self._options.training
        evaluations = steps // training.intervals(steps).evaluation
        scored = min(training.max_eval_samples * self._context, self._facts.eval_tokens)
        evaluated = evaluations * scored + self._facts.eval_tokens
        return candidate.seconds_per_token * (steps * batch_size * self._context + _FORWARD * evaluated)

    def _bits(self, candidate: Candidate, steps: int, batch_size: int, text: float = 1.0) -> float:
        facts = self._facts
        return LAW.bits_per_byte(
            facts.gzip,
            parameters=candidate.layer_parameters,
            seen=steps * batch_size * self._context * facts.bytes_per_token,
            text=text * facts.text_bytes,
        )

    def _does_not_fit(self, candidate: Candidate) -> bool:
        """Return whether a step would need more memory than there is: what it took to measure is free again."""
        return self._accelerator.device.type == "cpu" and candidate.cost.peak_bytes > available_memory()

    def _batch_size(self, candidate: Candidate, batch_size: int) -> int:
        """Return the sequences of a step: so that there are neither few steps nor very many."""
        while self._steps(candidate, batch_size) > _MANY_STEPS:
            batch_size *= 2
        while self._steps(candidate, batch_size) < _FEW_STEPS and batch_size > 2:
            batch_size //= 2
        return batch_size

    def _disk_bytes(self, candidate: Candidate) -> int:
        """Return the most that the run writes: checkpoints, one of them half written, and the model."""
        state = 4 * candidate.parameters * (1 + 2)  # weights, and at most two means of each
        return (self._options.training.save_total_limit + 1) * state + 4 * candidate.parameters

    # --- the options

    def _optimizer(self) -> OptimizerOptions:
        return OptimizerOptions(**{**self._rates(), **self._given_optimizer()})

    def _given_optimizer(self) -> dict[str, Any]:
        known = sections_of(RunOptions)["optimizer"].options
        return {name: value for name, value in self._given.items() if name in known}

    def _rates(self) -> dict[str, Any]:
        """Return the optimizer's options: the recipe, unless another optimizer or recipe was given."""
        if {"optimizer", "recipe"} & self._given.keys():
            return {}
        rates = recipe_options("fast")
        if self._encoding.n_vocab >= _LARGE_VOCABULARY:
            rates["learning_rate"] *= 10
        return rates

    def _values(self, best: Candidate, batch_size: int, steps: int, epochs: float) -> dict[str, Any]:
        """Return the options of the run by name: what was given, and what is planned."""
        text: dict[str, Any] = {"encoding": self._encoding_options.encoding}
        if text["encoding"] == TRAINED_BPE:
            text["vocab_size"] = self._encoding_options.vocab_size
        planned: dict[str, Any] = {
            **({} if self._options.text.token_files else text),
            "model": "modern-xs",
            "n_layer": best.layers,
            "n_head": best.heads,
            "n_embd": best.width,
            "max_position_embeddings": self._context,
            "max_length": self._context,
            "dropout": dropout_for(epochs),
            "batch_size": batch_size,
            "max_steps": steps,
            **self._rates(),
        }
        kept = {name: value for name, value in self._given.items() if name not in _NOT_OF_THE_RUN}
        return {**kept, **{name: value for name, value in planned.items() if name not in kept}}


_NOT_OF_THE_RUN = ("budget", "plan_file", "config", "print_config", "resume", "allow_changes")


def dropout_for(epochs: float) -> float:
    """Return the dropout for a number of passes over the text (benchmarks/README.md, "scaling.py")."""
    return 0.2 if epochs >= 10 else 0.1 if epochs >= 4 else 0.0
