"""The model that a training run starts from: its weights and tokenizer, and how run.json names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.hub.model_folder import find_base, load_pretrained, weights_digest
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.run_folder import RECORD_FILE


class BaseModel:
    """A pretrained causal model in fp32, or what a run's checkpoint has made of it, and its tokenizer.

    `named` is the folder of a run or model, or the Hub id. An `adapter` is trained beside the model and needs it again
    when the run is resumed; otherwise the checkpoint replaces it. `dropout` replaces the model's own probabilities.
    `commit` is the one on the Hub, None for a folder; `digest` identifies the weights. Raises UsageError, and what
    `find_model_folder` raises.
    """

    def __init__(
        self, named: str, run: Path, checkpoint: Path | None, *, dropout: float | None, adapter: bool = False
    ) -> None:
        needed, self.named = checkpoint is None or adapter, named
        source, commit = find_base(named, permanent=adapter) if needed else (str(checkpoint), None)
        pinned = {} if commit is None else {"revision": commit}  # the files that were checked
        place, revision = (source, pinned) if checkpoint is None else (str(checkpoint), {})
        self.tokenizer: Any = load_pretrained(AutoTokenizer, place, named, **revision)
        # GPT-2's names, and this package's.
        changed = {} if dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
        known = load_pretrained(AutoConfig, source, named, **pinned).to_dict() if changed else {}
        if not changed.keys() <= known.keys():
            raise UsageError(
                f"dropout={dropout}: {named!r} is a {known['model_type']} of transformers, which has no dropout of "
                "embeddings and residuals: leave dropout out, or convert a Llama or Qwen3 by gpt-kit convert"
            )
        self._source, self._options = source, {"dtype": torch.float32, **changed, **pinned}
        self.model = self.load()
        record = {} if needed or not (run / RECORD_FILE).is_file() else load_json(run / RECORD_FILE)
        self.commit = commit if needed else record.get("base_commit")
        self.digest = (commit or weights_digest(source)) if needed else record.get("base_digest")

    def load(self) -> Any:
        """Return the model, read from its files again."""
        return load_pretrained(AutoModelForCausalLM, self._source, self.named, **self._options)

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the model."""
        return {"base_model": self.named, "base_commit": self.commit, "base_digest": self.digest}
