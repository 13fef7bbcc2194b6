"""Options of a training run: its length, batches, precision, checkpoints, and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.options.declare import REQUIRED, Options, option
from gpt_kit_hf.options.files import check_local, check_url

OptimizerName: TypeAlias = Literal["adamw", "muon"]
# The trackers of Accelerate; a test compares them with the installed version's.
TRACKERS = (
    *("auto", "none", "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive"),
    "swanlab",
)
Schedule: TypeAlias = Literal["cosine", "linear", "constant_with_warmup", "warmup_stable_decay"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """The run: length, batches, precision, evaluation, checkpoints and logging."""

    output_dir: str = option(REQUIRED, "folder of the run, such as runs/mine", resume="free", metavar="FOLDER")
    resume: bool = option(False, "continue the run in output_dir, or start it if there is none", resume="free")
    overwrite: bool = option(
        False, "start over; a run that is already in output_dir is moved aside, not deleted", resume="free"
    )
    remote_dir: str | None = option(
        None,
        "URL of a folder, such as s3://bucket/run, that each checkpoint and the finished model are copied to; resume "
        "fetches the newest checkpoint from there if output_dir is missing or older. For one run at a time",
        unset="no copy",
        resume="free",
        metavar="URL",
    )
    batch_size: int = option(
        32, "global batch size: sequences per optimizer step, over all processes and micro-batches", minimum=1
    )
    per_device_train_batch_size: int | None = option(
        None,
        "sequences per process and forward pass; gradients are accumulated up to batch_size",
        minimum=1,
        unset="the whole share of the process",
        resume="free",
    )
    max_steps: int | None = option(
        None,
        "number of optimizer steps",
        minimum=1,
        unset="set by num_train_epochs",
        excludes=("num_train_epochs",),
        resume="allowed",
    )
    num_train_epochs: float | None = option(
        None, "passes over the training data", above=0, unset="1", resume="allowed"
    )
    mixed_precision: str = option(
        "auto",
        "precision of the forward pass; the weights stay in fp32. auto is bf16 if the device supports it, else fp32",
        choices=("auto", "no", "fp32", "bf16", "fp16"),
        resume="allowed",
    )
    torch_compile: bool | None = option(
        None,
        "compile the transformer blocks with torch.compile: a slow first step, then faster ones",
        unset="true on a GPU, false on a CPU",
        resume="allowed",
    )
    deterministic: bool = option(
        False,
        "use deterministic algorithms only: on a GPU equal runs have equal bits, and steps are slower; a CPU computes "
        "so either way",
        resume="allowed",
    )
    attn_implementation: str = option(
        "auto",
        "attention function of transformers; auto is sdpa, or what the base model asks for. The flash ones need their "
        "library, a GPU, and bf16 or fp16",
        choices=("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
        resume="allowed",
    )
    seed: int = option(
        0, "seed of the initial weights, the data order, dropout and the evaluation split", minimum=0, below=2**63
    )
    use_cpu: bool = option(False, "train on the CPU even if there is a GPU", resume="allowed")
    eval_steps: float | None = option(
        None,
        "optimizer steps between evaluations; below 1, the fraction of all steps",
        above=0,
        unset="a twentieth of all steps, from 10 to 250",
        resume="free",
    )
    max_eval_samples: int = option(
        128,
        "evaluation windows or rows scored per evaluation; the last evaluation scores all",
        minimum=1,
        resume="free",
    )
    save_steps: float | None = option(
        None,
        "optimizer steps between checkpoints; below 1, the fraction of all steps. Where the best is kept, a share is "
        "rounded to a multiple of the steps between evaluations, if it is above them and they are a share, too",
        above=0,
        unset="a tenth of all steps, from 10 to 500",
        resume="free",
    )
    save_total_limit: int = option(2, "number of most recent checkpoints to keep", minimum=1, resume="free")
    keep_best: int = option(
        0,
        "number of checkpoints to keep in addition, those with the lowest evaluation loss; above 0, every checkpoint "
        "is evaluated",
        minimum=0,
        resume="free",
    )
    load_best_model_at_end: bool = option(
        False,
        "publish the checkpoint with the best evaluation in the run, instead of the last; each evaluation that is the "
        "best so far is then saved, and the best checkpoint kept",
        resume="free",
    )
    metric_for_best_model: Literal["loss", "bits_per_byte"] = option(
        "loss", "score by which checkpoints are compared: nats per token, or bits per byte", resume="free"
    )
    early_stopping_patience: int | None = option(
        None,
        "end the run after this many evaluations in a row without a better score",
        minimum=1,
        unset="all steps are done",
        resume="free",
    )
    early_stopping_threshold: float = option(
        0.0,
        "by how much a score must be lower than the best not to count for early_stopping_patience",
        minimum=0,
        resume="free",
    )
    async_save: bool = option(
        True, "write checkpoints in the background, if there is enough memory for a copy of the state", resume="free"
    )
    logging_steps: float | None = option(
        None,
        "optimizer steps between progress lines and between tracker entries; below 1, the fraction of all steps",
        above=0,
        unset="a fiftieth of all steps, from 10 to 50",
        resume="free",
    )
    log_format: Literal["text", "json"] = option(
        "text",
        "text shows lines, and on a terminal a live view below them; json writes one object per line, with the same "
        "facts",
        resume="free",
    )
    sample_steps: float | None = option(
        None,
        "optimizer steps between text samples; below 1, the fraction of all steps; 0 disables them",
        minimum=0,
        unset="a fifth of all steps, from 10 to 500",
        resume="free",
    )
    sample_prompt: str = option("", "prompt of the text samples", resume="free")
    sample_max_new_tokens: int = option(80, "tokens per text sample", minimum=1, resume="free")
    report_to: list[str] = option(
        ["auto"],
        "experiment trackers; auto is TensorBoard if it is installed, none disables tracking. trackio keeps its data "
        "on this machine, outside of the run folder",
        choices=TRACKERS,
        resume="free",
    )
    project: str = option("gpt-kit", "project in the experiment trackers", resume="free")
    run_name: str | None = option(
        None, "name of the run in the experiment trackers", unset="the name of output_dir", resume="free"
    )
    trackio_space_id: str | None = option(
        None,
        "Space on the Hub, OWNER/NAME, that trackio sends the run to, with all its options; a new one is private",
        unset="nothing is sent",
        resume="free",
    )
    dataloader_num_workers: int = option(
        0, "worker processes that load batches; 0 loads them in the training process", minimum=0, resume="free"
    )
    ddp_timeout: int = option(
        1800,
        "seconds that a process waits for another one during training before the run fails",
        minimum=1,
        resume="free",
    )
    max_skipped_updates: int = option(
        20,
        "consecutive updates that may be skipped, for non-finite or exploding gradients, before the run stops",
        minimum=1,
        resume="free",
    )
    spike_factor: float = option(
        0.0,
        "skip an update whose gradient norm exceeds this many times the median of the last 100; 0 disables this",
        minimum=0,
        resume="allowed",
    )
    out_of_memory: Literal["halve", "stop"] = option(
        "halve",
        "when a step does not fit in memory, as is found out before the first one or in a later one: halve "
        "per_device_train_batch_size (single process only), or stop the run",
        resume="free",
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, slower steps, the same updates",
        resume="free",
    )
    allow_changes: list[str] | None = option(
        None,
        "options that may differ when the run is resumed, such as learning_rate or max_steps; text allows other text",
        unset="none",
        resume="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local("output_dir", self.output_dir, "give the URL as remote_dir")
        if self.remote_dir is not None:
            check_url("remote_dir", self.remote_dir)
        if 0.0 < self.spike_factor <= 1.0:
            raise UsageError(f"spike_factor must be above 1, or 0 to disable it, got {self.spike_factor}")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise UsageError(f"early_stopping_threshold={self.early_stopping_threshold} needs early_stopping_patience")
        if len(self.report_to) > 1 and (alone := {"auto", "none"} & set(self.report_to)):
            raise UsageError(f"report_to {min(alone)!r} cannot be combined with trackers, got {self.report_to}")
        if self.trackio_space_id is not None and "trackio" not in self.report_to:
            raise UsageError(f"trackio_space_id={self.trackio_space_id!r} needs report_to=trackio")
        for name, value in (("project", self.project), ("run_name", self.run_name)):
            if value is not None and (not value.strip() or "/" in value or "\\" in value):
                raise UsageError(f"{name}={value!r} must not be empty or hold a slash: it names a folder, too")
        for name in ("eval_steps", "save_steps", "logging_steps", "sample_steps"):
            object.__setattr__(self, name, checked_steps(name, getattr(self, name)))

    @property
    def best_kept(self) -> int:
        """The number of checkpoints that are kept for their score."""
        return max(self.keep_best, int(self.load_best_model_at_end))

    def intervals(self, total_steps: int) -> Intervals:
        """Return the steps between evaluations, checkpoints, progress lines and samples of a run of so many steps."""

        def steps(given: float | None, parts: int, most: int) -> int:
            return min(most, max(10, total_steps // parts)) if given is None else steps_of(given, total_steps)

        evaluation, saving = steps(self.eval_steps, 20, 250), steps(self.save_steps, 10, 500)
        are_shares = all(given is None or 0 < given < 1 for given in (self.eval_steps, self.save_steps))
        if self.best_kept and are_shares and saving >= evaluation:
            # Each checkpoint is evaluated, just once; a share need not be exact.
            saving = round(saving / evaluation) * evaluation
        return Intervals(
            evaluation=evaluation,
            saving=saving,
            logging=steps(self.logging_steps, 50, 50),
            sample=steps(self.sample_steps, 5, 500),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
    """Numbers of steps between what a run does besides training; 0 if it never does."""

    evaluation: int
    saving: int
    logging: int
    sample: int


def checked_steps(name: str, steps: float | None) -> float | None:
    """Return a number of steps, a whole one as an integer. Raises UsageError for one above 1 that is not whole."""
    if steps is None or 0 < steps < 1:
        return steps
    if steps != int(steps):
        raise UsageError(f"{name}={steps} must be a whole number of steps, or a fraction of all steps below 1")
    return int(steps)


def steps_of(steps: float, total_steps: int) -> int:
    """Return a number of steps that an option gives as such, or, below 1, as a fraction of all steps, at least 1."""
    return max(1, round(steps * total_steps)) if 0 < steps < 1 else int(steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """The optimizer and its learning-rate schedule."""

    optimizer: OptimizerName = option(
        "adamw", "adamw, or muon for the weight matrices of the blocks with adamw for all other parameters"
    )
    learning_rate: float = option(
        1e-3, "peak learning rate, of all parameters but those of muon_learning_rate", above=0, resume="allowed"
    )
    lr_scheduler_type: Schedule = option(
        "cosine",
        "learning-rate schedule after the warmup; warmup_stable_decay decays linearly in the last decay_ratio of the "
        "steps",
        resume="allowed",
    )
    warmup_steps: float = option(
        0.05,
        "optimizer steps over which the learning rate rises linearly; below 1, the fraction of all steps",
        minimum=0,
        resume="allowed",
    )
    min_lr_ratio: float = option(
        0.1, "learning rate of the last step, as a fraction of the peak", minimum=0, maximum=1, resume="allowed"
    )
    decay_ratio: float = option(
        0.2, "fraction of the steps in which warmup_stable_decay decays", minimum=0, maximum=1, resume="allowed"
    )
    weight_decay: float = option(
        0.1,
        "decoupled weight decay of matrices and embeddings; biases and norms have none",
        minimum=0,
        resume="allowed",
    )
    adam_beta1: float = option(
        0.9, "AdamW: decay rate of the mean of the gradients", minimum=0, below=1, resume="allowed"
    )
    adam_beta2: float = option(
        0.99, "AdamW: decay rate of the mean of the squared gradients", minimum=0, below=1, resume="allowed"
    )
    adam_epsilon: float = option(
        1e-8, "AdamW: constant in the denominator for numerical stability", above=0, resume="allowed"
    )
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this global norm; 0 disables clipping", minimum=0, resume="allowed"
    )
    ema_decay: float | None = option(
        None,
        "decay rate, per step, of a moving average of the weights, which is evaluated, saved and published instead of "
        "them",
        above=0,
        below=1,
        unset="no average",
    )
    muon_momentum: float = option(0.95, "Muon: momentum", minimum=0, below=1, resume="allowed")
    muon_learning_rate: float | None = option(
        None, "Muon: peak learning rate of the matrices", above=0, unset="learning_rate", resume="allowed"
    )
    muon_beta2: float | None = option(
        None,
        "Muon: decay rate of the mean squares by which the rows of an update are made equally large (NorMuon)",
        minimum=0,
        below=1,
        unset="rows stay as they are",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "warmup_steps", checked_steps("warmup_steps", self.warmup_steps))
        for name in ("muon_momentum", "muon_learning_rate", "muon_beta2"):
            if self.optimizer != "muon" and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"{name}={getattr(self, name)} is for optimizer=muon, not {self.optimizer}")


# Defaults of the optimizer's options by the name of a recipe.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain": {},
        # Found on tinyshakespeare, 4 layers of 256, in 230 steps (benchmarks/README.md, "recipes.py").
        "fast": {
            "optimizer": "muon",
            "muon_learning_rate": 6e-3,
            "muon_momentum": 0.85,
            "muon_beta2": 0.95,
            "learning_rate": 4e-3,
            "lr_scheduler_type": "linear",
            "min_lr_ratio": 0.02,
            "warmup_steps": 0.03,
        },
    }
)
AUTO = "auto"  # the name of the recipe that fits the other options
# Ids of a vocabulary whose embeddings learn faster with the recipe "fast", and how much faster.
_LARGE_VOCABULARY, _FASTER = 1024, 10


def recipe_options(recipe: str, *, vocab_size: int) -> dict[str, Any]:
    """Return the fields of `OptimizerOptions` that a recipe sets for a vocabulary, "plain" (none) or "fast"."""
    if recipe not in RECIPES:
        raise UsageError(unknown_name("recipe", recipe, RECIPES))
    found = dict(RECIPES[recipe])
    if found and vocab_size >= _LARGE_VOCABULARY:
        found["learning_rate"] *= _FASTER
    return found


def finetuning_optimizer() -> OptimizerOptions:
    """Return the optimizer's defaults for finetuning: a lower learning rate."""
    return OptimizerOptions(learning_rate=3e-4)
