"""What is decided and refused before a run reads its data: processes, folders, precision, batch size."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.atomic_files import Report, load_json
from gpt_kit_hf.storage.remote_run import RemoteRun
from gpt_kit_hf.storage.run_folder import RECORD_FILE, check_run_folder, holds_run, make_run_folder
from gpt_kit_hf.training.log.trackers import chosen_trackers
from gpt_kit_hf.training.runtime.attention import check_attention
from gpt_kit_hf.training.runtime.launch import check_launch, create_accelerator
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory
from gpt_kit_hf.training.trainer import resolve_precision


def run_accelerator(options: OptionsOfRun) -> Accelerator:
    """Start Accelerate with the options of a run; refuse an incomplete launch."""
    chosen = options.training
    chosen_trackers(chosen.report_to)  # refuses one that is not installed
    accelerator = create_accelerator(use_cpu=chosen.use_cpu, timeout=chosen.ddp_timeout)
    check_launch(accelerator)
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    return accelerator


def make_folders(chosen: TrainingOptions, folder: Path, remote: RemoteRun | None, log: Report) -> None:
    """Make the folders of a new run; with overwrite, move those of an old one aside."""
    moved = make_run_folder(folder, overwrite=chosen.overwrite)
    if moved is not None:
        log(f"moved the previous run from {folder} to {moved}")
    replaced = remote.move_aside() if remote is not None and chosen.overwrite else None
    if replaced is not None:
        log(f"moved the previous run from {chosen.remote_dir} to {replaced}")


def continues_run(chosen: TrainingOptions, folder: Path, remote: RemoteRun | None) -> bool:
    """Return whether a run is resumed; refuse folders in which it can neither start nor resume."""
    check_run_folder(folder, resume=chosen.resume, overwrite=chosen.overwrite)
    if remote is not None:
        remote.prepare(resume=chosen.resume, overwrite=chosen.overwrite)
    return chosen.resume and holds_run(folder)


def check_fit(options: OptionsOfRun, accelerator: Accelerator, folder: Path, checkpoint: Path | None) -> None:
    """Refuse precision and batch size before a large text is read."""
    chosen, processes = options.training, accelerator.num_processes
    precision = resolve_precision(chosen.mixed_precision, accelerator.device)
    check_attention(chosen.attn_implementation, accelerator.device, precision)
    before = load_json(folder / RECORD_FILE)["precision"] if checkpoint is not None else precision
    if before != precision and "mixed_precision" not in (chosen.allow_changes or ()):
        raise UsageError(
            f"cannot resume {str(folder)!r} in {precision}: it was begun in {before}; give --mixed_precision "
            f"{before}, or allow it by --allow_changes mixed_precision"
        )
    if chosen.batch_size % processes:
        raise UsageError(f"batch_size={chosen.batch_size} must be divisible by the number of processes, {processes}")
