"""Pretraining from options to a model folder: the loop, what it records, and how it continues."""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from gpt_kit_hf import tokenization
from gpt_kit_hf.amp import AMPTrainer, UpdateReport, resolve_precision
from gpt_kit_hf.checkpointing import checkpoint_step, latest_checkpoint, save_checkpoint
from gpt_kit_hf.corpus import Corpus, choose_encoding, prepare_corpus
from gpt_kit_hf.durable_files import load_json
from gpt_kit_hf.errors import DataError, NonFiniteError, UsageError
from gpt_kit_hf.evaluation import (
    Evaluation,
    evaluate_stream,
    gzip_bits_per_byte,
    token_byte_lengths,
    unigram_bits_per_byte,
)
from gpt_kit_hf.generation import generate_text_autoregressive
from gpt_kit_hf.losses import Batch
from gpt_kit_hf.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.optimization import create_optimizer, learning_rate_at, set_learning_rate
from gpt_kit_hf.pretraining_data import BatchPlan, PlannedBatches, TokenWindows, collate_windows
from gpt_kit_hf.progress import Console, Pace, duration, printable, short, trackers
from gpt_kit_hf.run_folder import (
    CURVE_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    RECORD_FILE,
    check_run_folder,
    holds_run,
    make_run_folder,
    publish_in_run,
    refuse_changes,
    write_model_folder,
)
from gpt_kit_hf.run_lock import RunLock
from gpt_kit_hf.run_options import FREE_ON_RESUME, RunOptions
from gpt_kit_hf.run_record import RunRecord, RunResult, finished_before
from gpt_kit_hf.tokenizer_twin import load_encoding
from gpt_kit_hf.training_state import read_position, restore_training_state, write_training_state


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Train a GPT as the options say, or continue to; progress goes to `stream`.

    The folder then holds the model as `from_pretrained` loads it, its checkpoints, metrics.jsonl, loss.png and
    run.json. Raises UsageError for options that do not fit each other, the data or the device, before anything is
    written; NonFiniteError if too many updates in a row could not be made.
    """
    chosen = options.training
    accelerator = Accelerator(
        cpu=chosen.cpu,
        mixed_precision="no",  # AMPTrainer does it
        log_with=trackers(chosen.report_to) or None,
        project_dir=chosen.output_dir,
    )
    folder = Path(chosen.output_dir)
    console = Console(stream if accelerator.is_main_process else None)
    facts: list[Any] = [None, False]
    if accelerator.is_main_process:
        try:
            check_run_folder(folder, resume=chosen.resume, overwrite=chosen.overwrite)
            facts = [None, chosen.resume and holds_run(folder)]
        except UsageError as error:
            facts = [error, False]
    refused, continues = broadcast_object_list(facts)
    if refused is not None:
        # One process says why; the others end with it.
        raise refused if accelerator.is_main_process else SystemExit(2)
    with ExitStack() as stack:
        stack.callback(accelerator.end_training)
        stack.callback(console.close)
        if continues and accelerator.is_main_process:
            stack.enter_context(RunLock(folder))
        if continues:
            refuse_changes(load_json(folder / OPTIONS_FILE), options.flat(), folder, FREE_ON_RESUME)
            if (result := finished_before(folder)) is not None:
                console.say(
                    f"{folder} is complete: {result.steps} steps, {result.evaluation.bits_per_byte:.3f} bits per byte"
                )
                return result
        run = _Run(options, accelerator, console, continues=continues)
        if not continues and accelerator.is_main_process:
            # Only now: options that do not fit have left everything as it was.
            moved = make_run_folder(folder, overwrite=chosen.overwrite)
            if moved is not None:
                console.say(f"the run that was in {folder} lies now in {moved}")
            stack.enter_context(RunLock(folder))
            if holds_run(folder):
                raise UsageError(f"another run began in output_dir {str(folder)!r} meanwhile: name another folder")
        return run.go()


# So many steps show how long the rest will take.
_STEPS_TO_ESTIMATE = 10


class _Run:
    """The parts of a run, made once in the order in which they depend on each other, and the loop over its steps."""

    def __init__(self, options: RunOptions, accelerator: Accelerator, console: Console, *, continues: bool) -> None:
        self.options, self.accelerator, self.console = options, accelerator, console
        self.chosen = options.training
        self.folder = Path(self.chosen.output_dir)
        self.checkpoint = latest_checkpoint(self.folder, report=console.say) if continues else None
        self._check_before_reading()
        self.corpus = self._prepare_corpus()
        self.model = self._build_model()
        self.windows = TokenWindows(self.corpus.train, options.windows.max_length, options.windows.step)
        self._check_held_out()
        share = -(-self.chosen.batch_size // accelerator.num_processes)
        self.plan = BatchPlan(
            samples=len(self.windows),
            batch_size=self.chosen.batch_size,
            micro_batch_size=self.chosen.micro_batch_size or share,
            seed=self.chosen.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        epochs = self.chosen.epochs or 1.0
        self.total_steps = self.chosen.max_steps or max(
            1, math.ceil(epochs * len(self.windows) / self.plan.batch_size)
        )
        self.trainer = AMPTrainer(
            self.model,
            create_optimizer(self.model, options.optimizer),
            mixed_precision=self.chosen.mixed_precision,
            max_grad_norm=options.optimizer.grad_clip or None,
            accelerator=accelerator,
        )
        self.byte_lengths = token_byte_lengths(self.corpus.encoding)
        self.record = RunRecord(self.folder, accelerator)
        self.step = 0
        self.skipped_in_a_row = 0

    def go(self) -> RunResult:
        """Train from the first step, or the one after the checkpoint, to the last."""
        done = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.record.start(self.options.flat(), self._facts(), done=done, total=self.total_steps)
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        self._introduce()
        if self.chosen.compile:
            self.model.compile()
        batches = self._batches()
        self.console.start(self.step, self.total_steps)
        pace, first = Pace(), self.step
        while self.step < self.total_steps:
            began = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.plan.micro_steps)]
            rate = learning_rate_at(self.step, self.total_steps, self.options.optimizer)
            set_learning_rate(self.trainer.optimizer, rate)
            report = self.trainer.update(micro_batches, before_micro_batch=self._seed_micro_batch)
            self.step += 1
            self._after_update(report, rate)
            pace.add(time.perf_counter() - began)
            if self.step == first + _STEPS_TO_ESTIMATE:
                left = pace.seconds_per_step * (self.total_steps - self.step)
                self.console.say(f"expected {duration(left)}, and the evaluations")
            if self.step % self.chosen.log_every == 0 or self.step == self.total_steps:
                self._log(report, rate, pace.seconds_per_step)
            if self.step < self.total_steps:
                self._now_and_then()
        self._save()
        return self._finish()

    # --- preparation

    def _check_before_reading(self) -> None:
        """Refuse what can be refused before a large text is read."""
        config = self.options.model.build(vocab_size=self.options.encoding.vocab_size)
        max_length = self.options.windows.max_length
        if max_length > config.max_position_embeddings:
            raise UsageError(
                f"max_length={max_length} is above the position table, "
                f"max_position_embeddings={config.max_position_embeddings}: raise that, or lower max_length"
            )
        precision = resolve_precision(self.chosen.mixed_precision, self.accelerator.device)
        before = load_json(self.folder / RECORD_FILE)["precision"] if self.checkpoint is not None else precision
        if before != precision:
            raise UsageError(f"cannot resume {str(self.folder)!r} in {precision}: it was begun in {before}")
        if self.chosen.batch_size % self.accelerator.num_processes:
            raise UsageError(
                f"batch_size={self.chosen.batch_size} must be divisible by the number of processes, "
                f"{self.accelerator.num_processes}"
            )

    def _prepare_corpus(self) -> Corpus:
        """Read and tokenise on the main process first; the others find what it stored."""
        chosen: list[Any] = [None]
        if self.accelerator.is_main_process:
            if self.checkpoint is not None:
                chosen = [load_encoding(self.checkpoint)]
            else:
                chosen = [choose_encoding(self.options.text, self.options.encoding)]
        encoding = broadcast_object_list(chosen)[0]
        with self.accelerator.main_process_first():
            corpus = prepare_corpus(self.options.text, encoding, seed=self.chosen.seed)
        if self.checkpoint is not None:
            before = read_position(self.checkpoint)["corpus"]
            if before != corpus.fingerprint:
                raise UsageError(
                    f"cannot resume {str(self.folder)!r}: its text had the fingerprint {before}, "
                    f"the text named now has {corpus.fingerprint}"
                )
        return corpus

    def _check_held_out(self) -> None:
        tokens, window = len(self.corpus.held_out), self.options.windows.max_length + 1
        if tokens < window:
            raise DataError(
                f"the held-out text has {tokens} tokens, fewer than one window of max_length + 1 = {window}: "
                "raise eval_fraction, give eval_files, or lower max_length"
            )

    def _build_model(self) -> GPTKitForCausalLM:
        encoding = self.corpus.encoding
        end = encoding.encode_single_token(tokenization.END_OF_TEXT)
        config = self.options.model.build(
            vocab_size=encoding.n_vocab,
            bos_token_id=end,
            eos_token_id=end,
            tokenizer_fingerprint=tokenization.fingerprint(encoding),
        )
        if self.checkpoint is not None:
            kept: GPTKitForCausalLM = GPTKitForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
            return kept
        torch.manual_seed(self.chosen.seed)
        return GPTKitForCausalLM(config)

    def _batches(self) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self.windows,
                batch_sampler=PlannedBatches(self.plan, self.step, self.total_steps),
                collate_fn=collate_windows,
                num_workers=self.chosen.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
                # Without its own generator a loader draws a seed from the global one.
                generator=torch.Generator().manual_seed(self.chosen.seed),
            )
        )

    def _seed_micro_batch(self, index: int) -> None:
        """Make dropout a function of (seed, step, part of the batch): a resumed run needs no random state."""
        part = self.accelerator.process_index * self.plan.micro_steps + index
        digest = hashlib.sha256(f"{self.chosen.seed} {self.step} {part}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    # --- what is said and written

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": self.model.num_parameters(),
            "documents": self.corpus.documents,
            "train_tokens": len(self.corpus.train),
            "held_out_tokens": len(self.corpus.held_out),
            "corpus_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": tokenization.fingerprint(self.corpus.encoding),
            "precision": self.trainer.precision,
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }

    def _introduce(self) -> None:
        corpus, device = self.corpus, self.accelerator.device
        where = {"cpu": "the CPU", "cuda": "the GPU"}.get(device.type, device.type)
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        processes = self.accelerator.num_processes
        say = self.console.say
        say(
            f"text     {corpus.documents:,} documents, {len(corpus.train):,} tokens to train on, "
            f"{len(corpus.held_out):,} held out ({corpus.encoding.name}, {corpus.encoding.n_vocab:,} tokens)"
        )
        say(
            f"model    {self.options.model.model}: {short(self.model.num_parameters())} parameters, "
            f"{self.model.config.n_layer} layers, {self.model.config.n_head} heads, {self.model.config.n_embd} wide"
        )
        say(
            f"training {self.total_steps:,} steps of {self.plan.batch_size} x {self.windows.max_length} tokens, "
            f"{self.total_steps * self.plan.batch_size / len(self.windows):.2f} epochs, {self.trainer.precision} "
            f"on {where}, {processes} process{'es' if processes > 1 else ''}"
        )
        if self.options.optimizer.warmup_steps >= self.total_steps:
            warmup = self.options.optimizer.warmup_steps
            say(f"note     warmup_steps={warmup} is not below the {self.total_steps} steps: the rate only rises")
        if self.checkpoint is not None:
            say(f"resumed  after step {self.step} ({self.checkpoint.name})")

    def _after_update(self, report: UpdateReport, rate: float) -> None:
        """Record the step; stop the run if too many in a row left the weights as they were."""
        self.record.update(self.step, report, rate)
        self.console.advance()
        self.skipped_in_a_row = 0 if report.skipped is None else self.skipped_in_a_row + 1
        if report.skipped is not None:
            self.console.say(f"step {self.step} left the weights as they were: {report.skipped}")
        if self.skipped_in_a_row >= self.chosen.max_skipped:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} updates in a row were skipped, the last at step {self.step}: "
                f"{report.skipped}; {self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        last = latest_checkpoint(self.folder, report=self.console.say)
        return f"the last checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def _log(self, report: UpdateReport, rate: float, seconds_per_step: float) -> None:
        speed = self.plan.batch_size * self.windows.max_length / seconds_per_step
        left = (self.total_steps - self.step) * seconds_per_step
        self.console.step(self.step, self.total_steps, report.loss, speed, left)
        values = {"loss": report.loss, "learning_rate": rate, "grad_norm": report.grad_norm}
        self.record.track("train", self.step, {**values, "tokens_per_second": speed})

    # --- now and then

    def _now_and_then(self) -> None:
        if self.step % self.chosen.eval_every == 0:
            scored = self._evaluate(self.chosen.eval_windows)
            self.console.say(
                f"step {self.step}  held-out loss {scored.loss:.3f}, {scored.bits_per_byte:.3f} bits per byte"
            )
        if self.chosen.sample_every and self.step % self.chosen.sample_every == 0:
            self.console.say(self._sample())
        if self.step % self.chosen.save_every == 0:
            self._save()

    def _evaluate(self, max_windows: int | None) -> Evaluation:
        scored = evaluate_stream(
            self.model,  # not the wrapped one: processes may have unequally many windows
            self.corpus.held_out,
            self.byte_lengths,
            max_length=self.windows.max_length,
            stride=self.windows.max_length,
            batch_size=self.plan.micro_batch_size,
            max_windows=max_windows,
            accelerator=self.accelerator,
            autocast=self.trainer.autocast,
        )
        if not math.isfinite(scored.loss):
            raise NonFiniteError(f"the held-out loss is {scored.loss} at step {self.step}: {self._last_checkpoint()}")
        self.record.evaluation(self.step, scored)
        return scored

    def _sample(self) -> str:
        """Return text that the model continues from the sample prompt, or from the start of a document."""
        encoding = self.corpus.encoding
        end = encoding.encode_single_token(tokenization.END_OF_TEXT)
        prompt = torch.tensor([[end, *encoding.encode_ordinary(self.chosen.sample_prompt)]])
        room = self.model.config.max_position_embeddings - prompt.shape[1]
        if not self.accelerator.is_main_process or room < 1:
            return ""
        # A compiled model would be compiled anew for each length of the growing text.
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            self.trainer.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(self.chosen.seed)
            if not self.model(prompt.to(self.model.device)).logits.isfinite().all():
                return "  | (no sample: the model's scores are not finite)"
            ids = generate_text_autoregressive(
                self.model, prompt, min(room, self.chosen.sample_tokens), temperature=0.8, top_k=50
            )
        text = printable(encoding.decode([token for token in ids[0].tolist() if token != end]))
        return "\n".join(f"  | {line}" for line in text.splitlines())

    # --- checkpoints

    def _save(self) -> None:
        """Write the checkpoint of this step; the other processes wait until it has its name."""
        if self.accelerator.is_main_process:
            self.checkpoint = save_checkpoint(
                self.folder,
                self.step,
                self._write_checkpoint,
                keep_last=self.chosen.keep_last,
                report=self.console.say,
            )
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path) -> None:
        write_model_folder(folder, self.model, self.corpus.encoding)
        write_training_state(
            folder,
            self.model,
            self.trainer,
            {"step": self.step, "corpus": self.corpus.fingerprint, "skipped_in_a_row": self.skipped_in_a_row},
        )

    def _restore(self, folder: Path) -> None:
        """Take up where a checkpoint ended; the weights are in the model already."""
        position = restore_training_state(folder, self.model, self.trainer)
        self.step, self.skipped_in_a_row = position["step"], position["skipped_in_a_row"]

    # --- the end

    def _finish(self) -> RunResult:
        """Score all held-out text, put the model where the run is, and say what there is now."""
        scored = self._evaluate(None)
        counts = self.corpus.train.counts(self.corpus.encoding.n_vocab)
        held_out = self.corpus.held_out.counts(self.corpus.encoding.n_vocab)
        beside = {
            "gzip": gzip_bits_per_byte(self.corpus.held_out, self.corpus.encoding),
            "unigram": unigram_bits_per_byte(counts, held_out, self.corpus.encoding),
        }
        if self.accelerator.is_main_process:
            assert self.checkpoint is not None
            publish_in_run(self.folder, self.checkpoint)
        self._conclude(scored, beside, self.record.finish(self.step, scored, beside))
        self.accelerator.wait_for_everyone()
        return RunResult(folder=self.folder, steps=self.step, evaluation=scored)

    def _conclude(self, scored: Evaluation, beside: dict[str, float], drawn: bool) -> None:
        say = self.console.say
        self.console.close()
        say(
            f"\nheld-out text ({scored.text_bytes:,} bytes): {scored.bits_per_byte:.3f} bits per byte; "
            f"gzip -9 {beside['gzip']:.3f}, byte unigram {beside['unigram']:.3f}"
        )
        say(f"loss {scored.loss:.4f} nats per token, perplexity {scored.perplexity:.1f}")
        say(self._sample())
        say(f"model    {self.folder} (from_pretrained loads it)")
        say(f"curve    {self.folder / CURVE_FILE if drawn else 'not drawn: pip install matplotlib'}")
        say(f"metrics  {self.folder / METRICS_FILE}")
        prompt = self.chosen.sample_prompt or "The"
        say(f"next     {shlex.join(['gpt-kit', 'generate', str(self.folder), '--prompt', prompt])}")
