"""The models of a page: those of the places that the command line names, loaded when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.evaluation.attention_maps import attention_weights
from gpt_kit_hf.evaluation.logit_lens import LogitLens
from gpt_kit_hf.evaluation.text_reader import TextReader
from gpt_kit_hf.generation.generate import decode_function
from gpt_kit_hf.generation.token_bytes import TokenBytes
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_pretrained, move_to_device
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints
from gpt_kit_hf.storage.run_folder import holds_run
from gpt_kit_hf.text import display_names

_KEPT = 3  # loaded models; one that was not used for longest makes room


# The files of a model's weights: name, inode, time of the last change, bytes.
_Weights: TypeAlias = frozenset[tuple[str, int, int, int]]


class Entry(NamedTuple):
    """A model that can be chosen. Requests name it by its key; its folder stays here."""

    key: str
    label: str
    step: int | None  # of a checkpoint
    place: str
    folder: str  # what is loaded


class WeightFiles:
    """The files of weights in a folder, as they are when this is made."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._weights = folder, _weights(folder)

    def were_replaced(self) -> bool:
        """Return whether a file is new or changed since; not if files were only deleted."""
        return not _weights(self._folder) <= self._weights


class OpenModel:
    """A loaded model with its tokenizer, in eval mode, and what can be asked of it."""

    def __init__(
        self, entry: Entry, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: WeightFiles
    ) -> None:
        self.entry, self.model, self.tokenizer, self.files = entry, model, tokenizer, files
        self.reader = TextReader(model)
        self._bytes, self.decode = TokenBytes(tokenizer), decode_function(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.start_id = _start_id(tokenizer)
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        if not self.eos_ids and tokenizer.eos_token_id is not None:
            self.eos_ids = [tokenizer.eos_token_id]
        self._anchor = tokenizer.encode("a", add_special_tokens=False)
        self._spelled: dict[int, str] = {}
        self._attention: tuple[list[int], Tensor] | None = None
        self.lens, self.no_lens = self._find_lens()
        self.no_attention = self._why_no_attention()
        self.no_chat = None if tokenizer.chat_template else "The tokenizer of this model has no chat template."

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the token that begins it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def with_start(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a text after the token that begins a text, if the model has one."""
        return list(ids) if self.start_id is None else [self.start_id, *ids]

    def spell(self, token: int) -> str:
        r"""Return a token as it reads within a text; bytes that are no whole character are written as \xNN."""
        if token not in self._spelled:
            self._spelled[token] = self._bytes(token, self._anchor).decode("utf-8", "backslashreplace")
        return self._spelled[token]

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes that each token adds to a text; joined they are the text."""
        ids = list(ids)
        return [self._bytes(token, ids[max(0, n - 16) : n]) for n, token in enumerate(ids)]

    def text_bytes(self, ids: Sequence[int], pieces: Sequence[bytes]) -> list[int]:
        """Return the bytes of text of each token; special tokens have none."""
        return [0 if token in self.special_ids else len(piece) for token, piece in zip(ids, pieces, strict=True)]

    def attention(self, ids: Sequence[int]) -> Tensor:
        """Return the weights of attention, (L, H, T, T); those of the last text are kept for its other heads."""
        if self._attention is None or self._attention[0] != list(ids):
            self._attention = list(ids), attention_weights(self.model, ids)
        return self._attention[1]

    def facts(self) -> dict[str, Any]:
        """Return what the page shows of the model; a part that is absent has a reason."""
        config = self.model.config.get_text_config(decoder=True)
        return {
            "key": self.entry.key,
            "label": self.entry.label,
            "step": self.entry.step,
            "kind": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "layers": int(config.num_hidden_layers),
            "context": self.reader.context_length,
            "vocabulary": int(config.vocab_size),
            "start": None if self.start_id is None else self.spell(self.start_id),
            "absent": {
                "attention": self.no_attention,
                "lens": self.no_lens,
                "chat": self.no_chat,
                "curves": None if holds_run(Path(self.entry.place)) else "This model is not in the folder of its run.",
            },
        }

    def _find_lens(self) -> tuple[LogitLens | None, str | None]:
        try:
            return LogitLens(self.model), None
        except UsageError as error:
            return None, f"{error}."

    def _why_no_attention(self) -> str | None:
        try:
            attention_weights(self.model, [0, 0])
        except UsageError as error:
            return f"{error}."
        return None


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which a text begins, so that its first token is scored, too; None if there is none.

    As in an evaluation, it is the BOS token that the tokenizer puts before a text, else the EOS token.
    """
    begin: int | None = tokenizer.bos_token_id
    end: int | None = tokenizer.eos_token_id
    adds_begin = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    return begin if adds_begin or end is None else end


def _weights(folder: Path) -> _Weights:
    found = set()
    for path in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # deleted at this moment
            file = path.stat()
            found.add((path.name, file.st_ino, file.st_mtime_ns, file.st_size))
    return frozenset(found)


class Models:
    """The models of several places. A request can only choose among the keys of `entries`."""

    def __init__(self, places: Sequence[str], device: str = "cpu") -> None:
        self.places, self._device = list(places), device
        self._open: OrderedDict[str, OpenModel] = OrderedDict()

    def labels(self) -> dict[str, str]:
        """Return {place: label}: the shortest names that tell folders apart, and a Hub id as it is."""
        names = display_names(Path(place) for place in self.places if Path(place).exists())
        return {place: names.get(Path(place), place) for place in self.places}

    def entries(self) -> list[Entry]:
        """Return what can be chosen now: of each place its model, then its checkpoints, the newest first."""
        found: list[Entry] = []
        labels = self.labels()
        for number, place in enumerate(self.places):
            folder, name = Path(place), labels[place]
            if not folder.is_dir() or (folder / "config.json").is_file():
                found.append(Entry(str(number), name, None, place, place))
            for checkpoint in reversed(list_checkpoints(folder)):
                step = checkpoint_step(checkpoint)
                label = f"{name}, step {step:,}"
                found.append(Entry(f"{number}/{checkpoint.name}", label, step, place, str(checkpoint)))
        return found

    def first(self) -> Entry:
        """Return the entry that the page opens with. Raises UsageError if no place holds a model."""
        found = self.entries()
        if not found:
            raise UsageError(f"{self.places[0]!r} holds no model yet: neither a config.json nor a checkpoint")
        return found[0]

    def open(self, key: str) -> OpenModel:
        """Return a model, loaded now if it is not, or if its weights were replaced; a deleted one stays open.

        Raises UsageError for an unknown key and for what cannot be loaded.
        """
        if key in self._open and not self._open[key].files.were_replaced():
            self._open.move_to_end(key)
            return self._open[key]
        self._open.pop(key, None)
        entries = {entry.key: entry for entry in self.entries()}
        if key not in entries:
            raise UsageError(unknown_name("model", key, entries or ["none"]))
        opened = _load(entries[key], self._device)
        self._open[key] = opened
        while len(self._open) > _KEPT:
            self._open.popitem(last=False)
        return opened


def _load(entry: Entry, device: str) -> OpenModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_model_folder(entry.folder)
    files = WeightFiles(Path(folder))  # before the weights are read: what is replaced meanwhile is read again
    tokenizer = load_pretrained(AutoTokenizer, folder, entry.place)
    model = load_pretrained(AutoModelForCausalLM, folder, entry.place)
    check_tokenizer(folder, model.config)
    move_to_device(model, device)
    return OpenModel(entry, model.eval(), tokenizer, files)
