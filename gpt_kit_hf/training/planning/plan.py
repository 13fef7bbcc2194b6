"""The plan of a run: the shape, length, vocabulary and rates with the best bits per byte that a budget allows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import tiktoken

from gpt_kit_hf.data.text.corpus import Corpus, choose_encoding, prepare_corpus
from gpt_kit_hf.data.text.sources import train_sources
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import DEFAULT_MAX_LENGTH, TRAINED_BPE, EncodingOptions
from gpt_kit_hf.options.declare import sections_of
from gpt_kit_hf.options.parser import build_options
from gpt_kit_hf.options.planning import parse_budget
from gpt_kit_hf.options.run import RunOptions, given_of, is_fast
from gpt_kit_hf.options.training import OptimizerOptions, recipe_options
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.text import short
from gpt_kit_hf.training.needs.due import disk_bytes, due_in
from gpt_kit_hf.training.planning.candidates import SHAPE_OPTIONS, Candidate, Timing, allowed_shapes
from gpt_kit_hf.training.planning.choice import Choice
from gpt_kit_hf.training.planning.corpus_facts import CorpusFacts, corpus_facts
from gpt_kit_hf.training.planning.law import MEASURED
from gpt_kit_hf.training.planning.recipe import MANY_EPOCHS, recipe_by_length
from gpt_kit_hf.training.runtime.launch import create_accelerator
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

_SHORTEST = 16  # tokens of a window
# Bytes, the share of repeated lines, and bits per byte of gzip -9, of which a person should know.
_SMALL_TEXT, _MUCH_REPEATED, _REPEATS_ITSELF = 100_000, 0.3, 0.5
# Options of the plan itself, and of the command.
_NOT_OF_THE_RUN = ("budget", "plan_file", "config", "print_config", "resume", "allow_changes")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train, and what that takes and brings.

    `values` are the options of the run, by name, as in a file for `--config`. `seconds` includes evaluations;
    `memory_before` is what the process held before it timed shapes, `memory_beside` what the run takes beside its
    steps; `bits_per_byte` is what the law says, `twice` what it says for twice the budget, and for twice the text.
    That `is_known` for runs such as those that it was measured with. `tried` shapes were compared.
    """

    values: dict[str, Any]
    facts: CorpusFacts
    encoding: tiktoken.Encoding
    candidate: Candidate
    steps: int
    seconds: float
    memory_before: int
    memory_beside: int
    bits_per_byte: float
    is_known: bool
    twice: tuple[float, float]
    tried: int
    notes: tuple[str, ...]

    @property
    def run(self) -> RunOptions:
        """The options of the run."""
        return build_options(RunOptions, self.values)

    @property
    def average_bytes(self) -> int:
        """What the average of the weights takes, 0 if there is none."""
        return 0 if self.run.optimizer.ema_decay is None else 4 * self.candidate.parameters

    @property
    def memory_bytes(self) -> int:
        """The most memory that the process is expected to hold."""
        return self.memory_before + self.candidate.cost.peak_bytes + self.average_bytes + self.memory_beside

    @property
    def disk_bytes(self) -> int:
        """What the run writes."""
        run, weights = self.run, 4 * self.candidate.parameters
        checkpoint = weights + self.average_bytes + self.candidate.cost.state_bytes
        due = due_in(run.training, self.steps, eval_before_training=False)
        return disk_bytes(run.training, due, checkpoint=checkpoint, published=weights)

    @property
    def epochs(self) -> float:
        """Passes over the training text."""
        return self.steps * self.candidate.step_tokens / self.facts.tokens


def make_plan(options: RunOptions, log: Report) -> Plan:
    """Return the plan for the text and the budget of the options; what was given, `options.given`, stays.

    Steps of shapes are timed on this machine. Raises UsageError for what cannot be planned: a stream, whose size is
    not known, a model to train further, several processes, a number of steps beside the budget; and DataError for a
    text that is too small for any model.
    """
    given = _given(options)
    _check_plannable(options, given)
    encoding_options = _encoding_options(options, given)
    if encoding_options.encoding == TRAINED_BPE and not options.text.token_files:
        log(f"training a bpe of {encoding_options.vocab_size:,} tokens on the text")
    encoding = choose_encoding(options.text, encoding_options)
    corpus = prepare_corpus(options.text, encoding, seed=options.training.seed, log=log)
    context = _context(given, tokens=len(corpus.train), eval_tokens=len(corpus.eval))
    return _planned(options, given, encoding_options, corpus, context, log)


def _given(options: RunOptions) -> dict[str, Any]:
    """Return what was given. None counts only where it turns something off that a plan may have."""
    return {name: value for name, value in given_of(options).items() if value is not None or name == "ema_decay"}


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


def _context(given: Mapping[str, Any], *, tokens: int, eval_tokens: int) -> int:
    """Return the tokens of a window: what was given, or 256 unless the text is too small for them.

    Raises DataError if there is no window to train on, or none to evaluate on.
    """
    most = given.get("max_position_embeddings") or DEFAULT_MAX_LENGTH
    context: int = given.get("max_length") or min(most, max(_SHORTEST, min(eval_tokens // 2, tokens // 4)))
    if min(tokens, eval_tokens) <= context:
        raise DataError(
            f"the text has {tokens:,} tokens to train on and {eval_tokens:,} held out, too few for a model that reads "
            f"{context:,} at once: give more text"
        )
    return context


def _planned(
    options: RunOptions,
    given: Mapping[str, Any],
    encoding_options: EncodingOptions,
    corpus: Corpus,
    context: int,
    log: Report,
) -> Plan:
    """Return the plan for a corpus and windows of `context` tokens."""
    facts = corpus_facts(corpus)
    timing = _timing(options, given, corpus.encoding.n_vocab, context)
    assert options.plan.budget is not None
    budget = parse_budget(options.plan.budget)
    choice = Choice(options.training, budget, facts, timing, timing.accelerator.device)
    before = psutil.Process().memory_info().rss
    shapes = list(allowed_shapes(given, options.model.blocks))
    if not shapes:
        named = [*SHAPE_OPTIONS, "head_dim", "num_key_value_heads"]
        shown = ", ".join(f"{name}={given[name]}" for name in named if name in given)
        raise UsageError(f"no shape of a plan has {shown} and heads of an even width: give {', '.join(SHAPE_OPTIONS)}")
    found, notes = choice.candidates(shapes, given.get("batch_size") or choice.first_batch_size, log)
    if not found:
        raise UsageError("no shape fits into the memory that is free: lower batch_size or max_length")
    found = choice.near_ones_again(found, log)
    chosen = choice.best(found)
    best, settled = _settled(choice, chosen, given, log)
    steps, bits = choice.steps(best), choice.bits(best)
    epochs = choice.epochs(steps * best.step_tokens)
    is_known = timing.optimizer.optimizer == "muon" and MEASURED.holds(best.layer_parameters, steps * best.step_tokens)
    planned = {
        "output_dir": options.training.output_dir,
        **({} if options.text.token_files else _changed_encoding(encoding_options)),
        **_shape(best),
        "batch_size": best.batch_size,
        "max_steps": steps,
        **settled,
        **(_rates(choice, best, corpus.encoding.n_vocab) if is_fast(given) else {}),
    }
    kept = {name: value for name, value in given.items() if name not in _NOT_OF_THE_RUN}
    return Plan(
        values={**kept, **{name: value for name, value in planned.items() if name not in kept}},
        facts=facts,
        encoding=corpus.encoding,
        candidate=best,
        steps=steps,
        seconds=choice.seconds(best, steps, best.step_tokens),
        memory_before=before,
        memory_beside=choice.beside_steps(best),
        bits_per_byte=bits,
        is_known=is_known,
        twice=choice.twice(found, chosen, best),
        tried=len(found),
        notes=(
            *(notes if chosen is found[-1] else ()),
            *_notes(facts, epochs, bits if is_known else 0.0, shorter=steps < 0.9 * choice.allowed(best)),
        ),
    )


def _settled(
    choice: Choice, chosen: Candidate, given: Mapping[str, Any], log: Report
) -> tuple[Candidate, dict[str, Any]]:
    """Return the chosen shape with its batch, timed as it is trained, and what follows from the length of the run."""
    best = choice.settled(chosen, any_batch_size="batch_size" not in given)
    best = choice.timed_again(best)  # all steps follow from this time
    best, compiles = choice.compiled(best, given.get("torch_compile"), log)
    values: dict[str, Any] = {"dropout": 0.0}
    if compiles:
        values["torch_compile"] = True
    if choice.epochs(choice.steps(best) * best.step_tokens) >= MANY_EPOCHS:
        values["load_best_model_at_end"] = True
    return best, values


def _shape(candidate: Candidate) -> dict[str, Any]:
    layers, heads, width = candidate.shape
    shape = {"model": "modern-xs", "n_layer": layers, "n_head": heads, "n_embd": width}
    return {**shape, "max_position_embeddings": candidate.context, "max_length": candidate.context}


def _timing(options: RunOptions, given: Mapping[str, Any], vocab_size: int, context: int) -> Timing:
    accelerator = create_accelerator(use_cpu=options.training.use_cpu)
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    known = sections_of(RunOptions)["optimizer"].options
    recipe = recipe_options("fast", vocab_size=vocab_size) if is_fast(given) else {}
    chosen = {**recipe, **{name: value for name, value in given.items() if name in known}}
    return Timing(
        model=replace(options.model, max_position_embeddings=context),
        optimizer=OptimizerOptions(**chosen),
        accelerator=accelerator,
        mixed_precision=options.training.mixed_precision,
        vocab_size=vocab_size,
        context=context,
        micro_batch_size=options.training.per_device_train_batch_size,
    )


def _rates(choice: Choice, candidate: Candidate, vocab_size: int) -> dict[str, Any]:
    """Return the optimizer's options of the recipe `fast` for the run."""
    steps = choice.steps(candidate)
    by_length = recipe_by_length(
        steps,
        step_tokens=candidate.step_tokens,
        epochs=choice.epochs(steps * candidate.step_tokens),
        parameters_per_token=choice.parameters_per_token(candidate),
        vocab_size=vocab_size,
    )
    return {**recipe_options("fast", vocab_size=vocab_size), **by_length}


def _changed_encoding(options: EncodingOptions) -> dict[str, Any]:
    bpe = {"vocab_size": options.vocab_size} if options.encoding == TRAINED_BPE else {}
    return {"encoding": options.encoding, **bpe}


def _notes(facts: CorpusFacts, epochs: float, bits: float, *, shorter: bool) -> Iterator[str]:
    """Yield what a person should know before training for so many epochs; `shorter` than the budget allows, or not.

    `bits` per byte are expected, 0 if that is a guess.
    """
    if facts.text_bytes < _SMALL_TEXT:
        yield f"{short(facts.text_bytes)} bytes are too little text to learn a language from; 1M is a start"
    if facts.repeated > _MUCH_REPEATED:
        yield f"{facts.repeated:.0%} of the text is in repeated lines: the model learns these by heart"
    elif facts.gzip < _REPEATS_ITSELF:
        yield f"gzip -9 needs {facts.gzip:.2f} bits per byte: the text repeats itself, which the model learns by heart"
    if shorter:
        yield "the run is shorter than the budget: reading so small a text more often brings nothing"
    elif epochs > MANY_EPOCHS:
        yield f"the text is read {epochs:.0f} times: more text would help more than a longer run"
    if bits > facts.gzip:
        more = "more text" if shorter else "a larger budget, or more text"
        yield f"gzip compresses the text better than this model is expected to: give {more}"
