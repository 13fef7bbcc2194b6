"""All options of a training run and of tokenizing its text, and the rules for resuming a run with other options."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

from gpt_kit_hf.errors import CheckpointError, UsageError, unknown_name
from gpt_kit_hf.options.data import (
    DEFAULT_MAX_LENGTH,
    DEFAULT_VOCAB_SIZE,
    TRAINED_BPE,
    EncodingOptions,
    RowOptions,
    SupervisionOptions,
    TextOptions,
    WindowOptions,
)
from gpt_kit_hf.options.declare import (
    Option,
    Options,
    Recipe,
    changed_values,
    flat_declarations,
    option,
    sections_of,
)
from gpt_kit_hf.options.files import check_options_of_ids
from gpt_kit_hf.options.finetuning import AdapterOptions, BaseOptions
from gpt_kit_hf.options.model import ModelOptions, check_no_shape
from gpt_kit_hf.options.parser import build_options, parse_options
from gpt_kit_hf.options.planning import BudgetOptions, PlanFileOptions
from gpt_kit_hf.options.training import (
    AUTO,
    RECIPES,
    OptimizerOptions,
    TrainingOptions,
    finetuning_optimizer,
    recipe_options,
)

T = TypeVar("T")

PLANNED_RUN = "runs/planned"  # the folder of a plan's run, if none is named
# What the recipe `fast` sets by the length of a run and its text.
BY_LENGTH = ("learning_rate", "muon_momentum", "weight_decay", "ema_decay")
CHANGED_TEXT = "text"  # in allow_changes: the text may differ, and the options that say where it comes from


def _recipe_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the recipe sets beside the options that are given."""
    recipe, optimizer = given.get("recipe", AUTO), given.get("optimizer")
    if recipe == AUTO:
        return _fast(given) if is_fast(given) else {}
    if recipe == "fast":
        if optimizer not in (None, "muon"):
            raise UsageError(f"recipe=fast has optimizer=muon, and optimizer={optimizer} is given: leave one out")
        return _fast(given)
    return recipe_options(recipe, vocab_size=DEFAULT_VOCAB_SIZE)


def is_fast(given: Mapping[str, Any]) -> bool:
    """Return whether the recipe is `fast`: it is given, or none, nor an optimizer or a model to train further."""
    recipe = given.get("recipe", AUTO)
    return recipe == "fast" or (recipe == AUTO and not given.get("optimizer") and not given.get("model_name_or_path"))


def _fast(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe `fast` for the vocabulary that the options tell of: if they do not, it is a large one."""
    size = DEFAULT_VOCAB_SIZE
    # What a model has learned is changed as slowly as the embeddings of few ids.
    if given.get("model_name_or_path") or given.get("encoding") == "bytes":
        size = 0
    elif given.get("encoding", TRAINED_BPE) == TRAINED_BPE and isinstance(given.get("vocab_size"), int):
        size = given["vocab_size"]
    # At their defaults until the length of the run is known.
    by_length = {name: getattr(OptimizerOptions, name) for name in BY_LENGTH}
    return {**by_length, **recipe_options("fast", vocab_size=size)}


RECIPE = Recipe(
    option=Option(
        name="recipe",
        default=AUTO,
        choices=(AUTO, *RECIPES),
        metavar="NAME",
        resume="free",
        help="defaults of these options: fast is Muon with a linear schedule, and a learning_rate of 0.04, or of "
        "0.004 with encoding bytes, a vocab_size below 1024 or model_name_or_path; for a new model on stored text, "
        "learning_rate, muon_momentum, weight_decay and ema_decay follow from the length of the run, the text and its "
        "vocabulary; plain is AdamW with a cosine schedule; auto is plain if optimizer or model_name_or_path is "
        "given, else fast",
    ),
    section="optimizer",
    values=_recipe_values,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of a pretraining run, by section."""

    recipe: ClassVar[Recipe] = RECIPE

    training: TrainingOptions
    text: TextOptions
    encoding: EncodingOptions = dataclasses.field(default_factory=EncodingOptions)
    windows: WindowOptions = dataclasses.field(default_factory=WindowOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    plan: BudgetOptions = dataclasses.field(default_factory=BudgetOptions)
    # What the parser built the options of, by name: neither a plan nor the recipe changes it.
    given: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_allow_changes(self)
        if self.text.token_files:
            _check_no_new_vocabulary("token_files have ids of one that exists", changed_values(self.encoding))
        base = self.model.model_name_or_path
        if base is not None:
            _check_base(base, self)
            return
        if self.windows.max_length is None:
            object.__setattr__(self, "windows", dataclasses.replace(self.windows, max_length=DEFAULT_MAX_LENGTH))
        planned = self.plan.budget is not None and not self.given.get("model")  # what is not given is chosen
        if not planned:
            self.model.check_shape()
        if self.windows.length > self.model.context and not (planned and self.model.max_position_embeddings is None):
            raise UsageError(
                f"max_length={self.windows.length} is above max_position_embeddings={self.model.context}: raise that, "
                "or lower max_length"
            )

    @staticmethod
    def check_given(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Raise UsageError for an option on the command line that does not fit the others, also at its default."""
        if values.get("token_files"):
            check_options_of_ids(given, values.get("eval_files"))
            _check_no_new_vocabulary("token_files have ids of one that exists", given)
        base = values.get("model_name_or_path")
        if base is not None:
            check_no_shape(base, given)
            _check_no_new_vocabulary(_has_tokenizer(base), given)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """All options of a plan: those of the run, and the file that it is written to."""

    training: TrainingOptions = dataclasses.field(default_factory=lambda: TrainingOptions(output_dir=PLANNED_RUN))
    plan: PlanFileOptions


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """All options of an instruction-tuning run, by section."""

    training: TrainingOptions
    base: BaseOptions
    rows: RowOptions
    supervision: SupervisionOptions = dataclasses.field(default_factory=SupervisionOptions)
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=finetuning_optimizer)

    def __post_init__(self) -> None:
        check_allow_changes(self)


@dataclass(frozen=True, kw_only=True)
class ShareOptions(Options):
    """The share of a text that one machine tokenizes."""

    num_shards: int = option(1, "number of shares into which the text is divided, one per machine", minimum=1)
    shard_index: int = option(0, "the share to tokenize, counted from 0", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_index >= self.num_shards:
            raise UsageError(
                f"shard_index={self.shard_index} must be below num_shards={self.num_shards}: it counts from 0"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """All options of tokenizing the text of a run before it, by section."""

    text: TextOptions
    encoding: EncodingOptions = dataclasses.field(default_factory=EncodingOptions)
    share: ShareOptions = dataclasses.field(default_factory=ShareOptions)

    def __post_init__(self) -> None:
        if self.text.token_files:
            raise UsageError("token_files are tokens already: train on them")
        if self.text.streaming:
            raise UsageError("streaming stores no tokens: leave it out to tokenize before training")


class OptionsOfRun(Protocol):
    """The sections that every kind of training run has."""

    @property
    def training(self) -> TrainingOptions:
        """Length, batches, precision, evaluation, checkpoints and logging."""

    @property
    def optimizer(self) -> OptimizerOptions:
        """The optimizer and its learning-rate schedule."""


def flat_options(options: Any) -> dict[str, Any]:
    """Return the options of a run as "section.name": value."""
    sections = {name: dataclasses.asdict(getattr(options, name)) for name in sections_of(type(options))}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def stored_options(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Return the options that `flat_options` made flat; `kind` is their class.

    Raises CheckpointError for options that this version does not know or allow.
    """
    sections: dict[str, dict[str, Any]] = {}
    # What one invocation was allowed to change says nothing about the run.
    for name, value in {**stored, "training.allow_changes": None}.items():
        section, _, each = name.partition(".")
        sections.setdefault(section, {})[each] = value
    hints = get_type_hints(kind)
    try:
        return kind(**{section: hints[section](**values) for section, values in sections.items()})
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"these are not the options of a run of this version: {error}") from error


def given_of(options: RunOptions) -> dict[str, Any]:
    """Return what was given, by name: what the options were built of, and what was replaced in them since.

    Of options that were built without the parser, it is what is not the default.
    """
    sections = [getattr(options, name) for name in sections_of(type(options))]
    if not options.given:
        return dict(ChainMap(*map(changed_values, sections)))
    built = flat_options(build_options(type(options), options.given))
    replaced = {name: value for name, value in flat_options(options).items() if value != built[name]}
    return {**options.given, **{name.partition(".")[2]: value for name, value in replaced.items()}}


def as_begun(options: OptionsOfRun, stored: Mapping[str, Any]) -> OptionsOfRun:
    """Return the options of a run that is resumed, with what follows from its length as it was `stored`.

    What is given stays.
    """
    kept = {name: stored[f"optimizer.{name}"] for name in BY_LENGTH if f"optimizer.{name}" in stored}
    return with_recipe(options, kept)


def with_recipe(options: OptionsOfRun, by_length: Mapping[str, Any]) -> OptionsOfRun:
    """Return the options with what the recipe `fast` sets by the length of the run, if they have that recipe.

    What is given stays, and so does all of options that were built without the parser.
    """
    if not isinstance(options, RunOptions) or not options.given:
        return options
    given = given_of(options)
    if not is_fast(given):
        return options
    changed = {name: value for name, value in by_length.items() if name not in given}
    return dataclasses.replace(options, optimizer=dataclasses.replace(options.optimizer, **changed))


def changed_options(stored: Mapping[str, Any], options: OptionsOfRun, run: Path) -> dict[str, list[Any]]:
    """Return {option: [before, now]} of what differs from a run's own options, `stored` by `flat_options`.

    Raises UsageError, with all that differs and what to do, unless every change is free or named in allow_changes.
    """
    declared = flat_declarations(type(options))
    # An option that is newer than the run was at its default.
    defaults = {name: each.default for name, each in declared.items() if not each.required}
    before, given = {**defaults, **stored}, flat_options(options)
    missing = object()
    changed = {
        name: [before.get(name), given.get(name)]
        for name in sorted(before.keys() | given.keys())
        if before.get(name, missing) != given.get(name, missing)
    }
    named = {"", *(options.training.allow_changes or ())}
    needed = {name: _allowed_by(name, declared.get(name, Option())) for name in changed}
    fixed = [name for name, allowed_by in needed.items() if allowed_by not in named]
    if fixed:
        listed = "; ".join(f"{name} was {changed[name][0]!r}, is {changed[name][1]!r}" for name in fixed)
        names = dict.fromkeys([*(options.training.allow_changes or ()), *(needed[name] for name in fixed)])
        remedy = "name another output_dir"
        if None not in names:
            remedy = f"allow it by --allow_changes {' '.join(map(str, names))}"
        by_recipe = isinstance(options, RunOptions) and "optimizer" not in options.given
        if by_recipe and changed.get("optimizer.optimizer") == ["adamw", "muon"]:
            remedy = f"for AdamW's defaults give --recipe plain, or {remedy}"
        planned = before.get("plan.budget")
        if planned is not None and given.get("plan.budget") is None:
            remedy = f"for its plan give --budget {planned}, or {remedy}"
        raise UsageError(
            f"cannot resume {str(run)!r} with other options ({listed}): give them as they were, or {remedy}"
        )
    return changed


def _check_base(base: str, options: RunOptions) -> None:
    """Raise UsageError for options that do not fit the model to train further."""
    _check_no_new_vocabulary(_has_tokenizer(base), changed_values(options.encoding))
    if Path(base).resolve() == Path(options.training.output_dir).resolve():
        raise UsageError(
            f"output_dir={options.training.output_dir!r} is the model to train further: name another folder, or "
            "continue that run by --resume, without model_name_or_path"
        )


def _has_tokenizer(base: str) -> str:
    return f"model_name_or_path={base!r} has a tokenizer of its own"


def _check_no_new_vocabulary(reason: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError for options of a new vocabulary; whether an encoding is the right one is seen later."""
    new = {name: given[name] for name in ("vocab_size", "vocab_text_mb") if given.get(name) is not None}
    if given.get("encoding") == TRAINED_BPE:
        new["encoding"] = TRAINED_BPE
    for name, value in new.items():
        raise UsageError(f"{name}={value} is for a new vocabulary, and {reason}: leave {name} out")


def _allowed_by(name: str, declared: Option) -> str | None:
    """Return what allow_changes must name for the option to differ; "" if it always may, None if it never may."""
    return {"free": "", "allowed": name.partition(".")[2], "text": CHANGED_TEXT}.get(declared.resume)


def check_allow_changes(options: OptionsOfRun) -> None:
    """Raise UsageError for a name in allow_changes that allows nothing, and for allow_changes without resume."""
    names = options.training.allow_changes or ()
    known = {_allowed_by(name, each) for name, each in flat_declarations(type(options)).items()} - {"", None}
    for name in names:
        if name not in known:
            raise UsageError(f"allow_changes: {unknown_name('changeable option', name, sorted(map(str, known)))}")
    if names and not options.training.resume:
        raise UsageError(f"allow_changes={' '.join(names)} is for resuming a run: add --resume, or leave it out")


def parse_run_options(arguments: Sequence[str], prog: str = "gpt-kit train") -> RunOptions:
    """Return the options of a pretraining run that a command line asks for; see `parse_options`."""
    return parse_options(RunOptions, arguments, prog=prog, about="Pretrain a GPT on text.")


def parse_finetune_options(arguments: Sequence[str], prog: str = "gpt-kit finetune") -> FinetuneOptions:
    """Return the options of an instruction-tuning run that a command line asks for; see `parse_options`."""
    return parse_options(FinetuneOptions, arguments, prog=prog, about="Finetune a model on instruction rows.")
