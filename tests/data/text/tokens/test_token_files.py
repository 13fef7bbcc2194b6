"""Token files of other programs, written here by the definition of each form, against the text that they come from."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiktoken

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text.corpus import choose_encoding, prepare_corpus
from gpt_kit_hf.data.text.report import describe_documents
from gpt_kit_hf.data.text.tokens import stored_arrays, token_files
from gpt_kit_hf.data.text.tokens.token_files import describe_files, find_token_files, read_token_files
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import EncodingOptions, TextOptions
from gpt_kit_hf.options.run import RunOptions
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.tokenization.encodings import get_encoding, save_tokenizer

END = 50256
Documents = list[list[int]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_encoding: tiktoken.Encoding) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def gpt2() -> tiktoken.Encoding:
    """What `gpt2_encoding` has loaded in this process."""
    return get_encoding("gpt2")


def nanogpt(documents: Documents, file: Path) -> None:
    np.array([token for each in documents for token in each], np.uint16).tofile(file)


def llmc(documents: Documents, file: Path) -> None:
    """Its documents begin with the end of text."""
    ids = [token for each in documents for token in (END, *each[:-1])]
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    file.write_bytes(header.tobytes() + np.array(ids, np.uint16).tobytes())


def megatron(documents: Documents, file: Path) -> None:
    """Every third document has two sequences."""
    np.array([token for each in documents for token in each], np.int32).tofile(file)
    lengths, firsts = [], [0]
    for number, each in enumerate(documents):
        lengths += [1, len(each) - 1] if number % 3 == 0 else [len(each)]
        firsts.append(len(lengths))
    pointers = 4 * (np.cumsum(lengths) - lengths)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(firsts))
    rest = np.array(lengths, np.int32).tobytes() + pointers.astype(np.int64).tobytes()
    file.with_suffix(".idx").write_bytes(header + rest + np.array(firsts, np.int64).tobytes())


def datatrove(documents: Documents, file: Path, stated: str = "gpt2|2") -> None:
    nanogpt(documents, file)
    ends = np.cumsum([len(each) for each in documents])
    Path(f"{file}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{file}.metadata").write_text(f"{stated}\n{ends[-1]}\n{ends[-1]} T")


FORMS: dict[str, tuple[Callable[[Documents, Path], None], str, str]] = {
    "nanogpt": (nanogpt, "train.bin", "nanoGPT, uint16"),
    "llmc": (llmc, "train.bin", "llm.c, uint16"),
    "megatron": (megatron, "train_text_document.bin", "Megatron-LM, int32"),
    "datatrove": (datatrove, "00000_shuffled.ds", "datatrove, uint16, made with gpt2"),
}


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["sun", " moon", " and", " the", " stars", "\n", " 17", " é"]
    return ["".join(rng.choice(words, int(rng.integers(3, 80)))) for _ in range(40)]


def documents() -> Documents:
    return [[*gpt2().encode_ordinary(text), END] for text in texts()]


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_documents_are_those_of_the_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", 7)  # documents that cross blocks
    write, name, shown = FORMS[form]
    parts = [documents()[:25], documents()[25:]]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).mkdir()
        write(part, tmp_path / str(number) / name)
    files = find_token_files([str(tmp_path / "0"), str(tmp_path / "1" / "*")])
    assert token_files.describe_files(files) == [f"2 token files of {shown}"]
    stream, key, _ = read_token_files(files, gpt2(), tmp_path / "store")
    made = [[END, *each[:-1]] for each in documents()] if form == "llmc" else documents()
    assert stream.read(0, len(stream)).tolist() == [token for each in made for token in each]
    assert stream.document_starts.tolist() == np.cumsum([0, *map(len, made)])[:-1].tolist()
    assert read_token_files(files, gpt2(), tmp_path / "other")[1] == key
    assert read_token_files(files[:1], gpt2(), tmp_path / "store")[1] != key


def train(folder: Path, *arguments: str) -> list[dict[str, object]]:
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_position_embeddings=16", "--max_length=16", "--packing"]
    course = ["--max_steps=4", "--eval_steps=2", "--batch_size=4", "--use_cpu", "--mixed_precision=fp32"]
    code = main(
        ["train", f"--output_dir={folder}", *arguments, *shape, *course, "--report_to=none", "--sample_steps=0"]
    )
    assert code == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "chain", "eval_loss", "bits_per_byte")
    return [{name: line[name] for name in kept if name in line} for line in lines]


def test_training_is_that_on_the_text_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    wanted = train(tmp_path / "text", f"--text_files={tmp_path / 'rows.jsonl'}", "--encoding=gpt2")
    assert len([line for line in wanted if "chain" in line]) == 4
    for form in ("nanogpt", "megatron", "datatrove"):
        write, name, shown = FORMS[form]
        (tmp_path / form).mkdir()
        write(documents(), tmp_path / form / name)
        named = [f"--token_files={tmp_path / form / name}"]
        named += [] if form == "datatrove" else ["--encoding=gpt2"]
        assert train(tmp_path / "runs" / form, *named) == wanted
        assert f"text     1 token file of {shown}\n" in capsys.readouterr().out


def test_other_ids_are_not_those_that_a_run_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nanogpt(documents(), tmp_path / "a.bin")
    named = [f"--token_files={tmp_path / 'a.bin'}", "--encoding=gpt2"]
    train(tmp_path / "run", *named)
    changed = documents()
    changed[3][2] += 1
    nanogpt(changed, tmp_path / "a.bin")
    arguments = ["train", f"--output_dir={tmp_path / 'run'}", *named, "--resume", "--n_layer=1", "--n_head=1"]
    arguments += ["--n_embd=8", "--max_position_embeddings=16", "--max_length=16", "--packing", "--batch_size=4"]
    arguments += ["--max_steps=5", "--allow_changes", "max_steps", "--use_cpu", "--report_to=none"]
    assert main([*arguments, "--mixed_precision=fp32", "--eval_steps=2", "--sample_steps=0"]) != 0
    assert "text" in capsys.readouterr().err


def test_a_file_is_read_for_its_digest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nanogpt(documents(), tmp_path / "a.bin")
    monkeypatch.setattr("time.time_ns", lambda: 2**62)  # or the file is too new
    text = TextOptions(token_files=[str(tmp_path / "a.bin")])
    first = prepare_corpus(text, gpt2(), seed=0)
    read: list[str] = []
    array = stored_arrays.StoredIds.__array__
    monkeypatch.setattr(
        stored_arrays.StoredIds,
        "__array__",
        lambda ids, *a, **k: (read.append(ids.file) if ids.size > 512 else None, array(ids, *a, **k))[1],
    )
    assert prepare_corpus(text, gpt2(), seed=0).fingerprint == first.fingerprint
    assert str(tmp_path / "a.bin") not in read


def test_evaluation_is_on_token_files_or_text(tmp_path: Path) -> None:
    nanogpt(documents()[:30], tmp_path / "train.bin")
    nanogpt(documents()[30:], tmp_path / "val.bin")
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()[30:]))
    held = [
        prepare_corpus(
            TextOptions(token_files=[str(tmp_path / "train.bin")], eval_files=[str(tmp_path / name)]), gpt2(), seed=0
        )
        for name in ("val.bin", "val.jsonl")
    ]
    assert held[0].eval.fingerprint() == held[1].eval.fingerprint()
    assert held[0].train.fingerprint() == held[1].train.fingerprint() == held[0].text.fingerprint()
    same = [str(tmp_path / "train.bin")]
    with pytest.raises(UsageError, match="is trained on as well"):
        prepare_corpus(TextOptions(token_files=same, eval_files=same), gpt2(), seed=0)


def chosen(file: Path, encoding: str = "bpe") -> str:
    return choose_encoding(TextOptions(token_files=[str(file)]), EncodingOptions(encoding=encoding)).name


def test_the_encoding_is_named_or_stated(tmp_path: Path) -> None:
    nanogpt(documents(), tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"token_files need --encoding.*the files do not state it"):
        chosen(tmp_path / "a.bin")
    assert chosen(tmp_path / "a.bin", "gpt2") == "gpt2"
    datatrove(documents(), tmp_path / "a.ds", stated="gpt2")  # of an earlier version
    assert chosen(tmp_path / "a.ds") == "gpt2"
    with pytest.raises(
        UsageError, match="encoding='bytes' is not the tokenizer that token_files were made with, 'gpt2'"
    ):
        chosen(tmp_path / "a.ds", "bytes")
    save_tokenizer(get_encoding("bytes"), tmp_path / "own")
    datatrove([[97, 256]], tmp_path / "b.ds", stated=f"{tmp_path / 'own' / 'tokenizer.json'}|2")
    assert chosen(tmp_path / "b.ds") == "bytes"
    datatrove(documents(), tmp_path / "c.ds", stated="meta-llama/Llama-3.1-8B|2")
    with pytest.raises(UsageError, match=r"a folder with the tokenizer\.json of 'meta-llama"):
        chosen(tmp_path / "c.ds")
    with pytest.raises(UsageError, match="made with several tokenizers: gpt2, meta"):
        choose_encoding(TextOptions(token_files=[str(tmp_path / "[ac].ds")]), EncodingOptions())


def damaged(file: Path, name: str) -> None:
    if name == "an id that is not in the vocabulary":
        nanogpt([[END + 1]], file)
    elif name == "half an id":
        file.write_bytes(b"abc")
    elif name == "a header of more ids":
        llmc(documents(), file)
        file.write_bytes(file.read_bytes()[:-10])
    elif name == "an index of more ids":
        megatron(documents(), file)
        file.write_bytes(file.read_bytes()[:-8])
    elif name == "half a header":
        llmc(documents(), file)
        file.write_bytes(file.read_bytes()[:700])
    elif name == "another version of the header":
        llmc(documents(), file)
        data = file.read_bytes()
        file.write_bytes(data[:4] + struct.pack("<i", 2) + data[8:])
    elif name == "32 bits without a header":
        np.arange(120_000, 121_000, dtype="<u4").tofile(file)
    elif name == "an index of no documents":
        megatron(documents(), file)
        index = file.with_suffix(".idx")
        index.write_bytes(index.read_bytes()[:26] + bytes(8) + index.read_bytes()[34:])
    elif name == "no index":
        nanogpt(documents(), file)
        file.with_suffix(".idx").write_bytes(b"abc" * 20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("an id that is not in the vocabulary", "holds the id 50257, and the encoding 'gpt2' has the ids 0 to 50256"),
        ("half an id", "1 bytes more than a whole number of ids of 2 bytes"),
        ("a header of more ids", "and its header says"),
        ("an index of more ids", "and the file beside it has"),
        ("half a header", "has 0 ids, and its header says"),
        ("another version of the header", "version 2 of llm.c's header with 20240520 is not read; known: 1 with"),
        ("32 bits without a header", "holds ids of 32 bits without a header"),
        ("an index of no documents", r"a\.idx: counts no documents"),
        ("no index", "no index of Megatron-LM"),
    ],
)
def test_a_damaged_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    damaged(tmp_path / "a.bin", name)
    with pytest.raises(DataError, match=message):
        read_token_files(find_token_files([str(tmp_path / "a.bin")]), gpt2(), tmp_path / "store")


def test_damaged_files_of_datatrove_are_refused(tmp_path: Path) -> None:
    datatrove(documents(), tmp_path / "a.ds")
    Path(f"{tmp_path}/a.ds.loss").touch()
    with pytest.raises(DataError, match="a mask of the loss, is not read"):
        find_token_files([str(tmp_path / "a.ds")])
    Path(f"{tmp_path}/a.ds.loss").unlink()
    (tmp_path / "a.ds").write_bytes(b"12")
    with pytest.raises(DataError, match=r"a\.ds\.index counts"):
        find_token_files([str(tmp_path / "a.ds")])
    Path(f"{tmp_path}/a.ds.index").unlink()
    with pytest.raises(DataError, match=r"a\.ds\.index is missing"):
        find_token_files([str(tmp_path)])


def test_a_stated_tokenizer_is_shown_also_if_it_is_not_known_here(tmp_path: Path) -> None:
    datatrove(documents(), tmp_path / "a.ds", stated="someone/model|2")
    assert describe_files(find_token_files([str(tmp_path / "a.ds")])) == [
        "1 token file of datatrove, uint16, made with someone/model"
    ]
    Path(f"{tmp_path}/a.ds.metadata").write_bytes(b"\xff\xfe")
    assert chosen(tmp_path / "a.ds", "gpt2") == "gpt2"


@pytest.mark.parametrize("eval_files", [None, ["val.bin"]])
@pytest.mark.parametrize(
    "given",
    [
        "document_separator=x", "text_column=body", "encoding_of_files=cp1252", "eos_in_text=keep", "on_bad_text=skip",
        "num_proc=2", "streaming=true", "shuffle_windows=7", "stream_shards=2", "dataset_train_split=test",
        "vocab_size=300", "vocab_text_mb=7", "encoding=bpe",
    ],
)  # fmt: skip
def test_options_of_text_are_not_for_token_files(
    given: str, eval_files: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = given.partition("=")
    nanogpt(documents(), tmp_path / "a.bin")
    arguments = [f"--output_dir={tmp_path / 'run'}", f"--token_files={tmp_path / 'a.bin'}", f"--{given}"]
    arguments += [f"--eval_files={name}" for name in eval_files or ()]
    assert main(["train", *arguments]) == 2
    refusal = capsys.readouterr().err
    assert re.search(rf"{name}='?{value}'? is for .* token_files .*leave", refusal, re.IGNORECASE), refusal


def test_options_at_their_default_are_refused_if_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output_dir=no", "--token_files=a.bin", "--text_column=text"]) == 2
    assert "text_column='text' is for text, and token_files hold ids: leave it out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="vocab_size=300 is for a new vocabulary, and token_files have ids of one"):
        RunOptions(
            training=TrainingOptions(output_dir="no"),
            text=TextOptions(token_files=["a.bin"]),
            encoding=EncodingOptions(vocab_size=300),
        )


def test_evaluation_text_beside_token_files_is_read_by_its_options(tmp_path: Path) -> None:
    nanogpt(documents()[:30], tmp_path / "train.bin")
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts()[30:]))
    options = TextOptions(
        token_files=[str(tmp_path / "train.bin")], eval_files=[str(tmp_path / "val.jsonl")], text_column="body"
    )
    held = prepare_corpus(options, gpt2(), seed=0).eval
    assert held.read(0, len(held)).tolist() == [token for document in documents()[30:] for token in document]


def test_evaluation_files_state_the_tokenizer_of_the_training_files(tmp_path: Path) -> None:
    save_tokenizer(get_encoding("bytes"), tmp_path / "own")
    stated = {"a": "gpt2|2", "b": "openai-community/gpt2", "c": f"{tmp_path / 'own'}|2", "d": "someone/model|2"}
    for name, tokenizer in {**stated, "e": "someone/other|2", "f": ""}.items():
        datatrove(documents(), tmp_path / f"{name}.ds", stated=tokenizer)

    def choose(train: str, held_out: str, encoding: str = "bpe") -> str:
        files = {"token_files": [str(tmp_path / f"{train}.ds")], "eval_files": [str(tmp_path / f"{held_out}.ds")]}
        return choose_encoding(TextOptions(**files), EncodingOptions(encoding=encoding)).name

    assert choose("a", "b") == choose("a", "f") == choose("d", "d", "gpt2") == choose("f", "d", "gpt2") == "gpt2"
    with pytest.raises(UsageError, match=r"that of token_files, 'gpt2', is not the tokenizer that eval_files were"):
        choose("a", "c")
    with pytest.raises(UsageError, match=r"encoding='gpt2' is not the tokenizer that eval_files were made with, '/"):
        choose("f", "c", "gpt2")
    for train, held_out in ("de", "ad", "da"):
        with pytest.raises(UsageError, match=r"eval_files were made with the tokenizer '.*', and token_files with"):
            choose(train, held_out, "gpt2")


def test_a_tokenizer_that_was_a_folder_elsewhere_is_not_known(tmp_path: Path) -> None:
    datatrove(documents(), tmp_path / "a.ds", stated=f"{tmp_path}/gone/tokenizer.json|2")
    assert chosen(tmp_path / "a.ds", "gpt2") == "gpt2"
    with pytest.raises(UsageError, match=r"token_files need --encoding.*tokenizer\.json of '/.*gone"):
        chosen(tmp_path / "a.ds")


@pytest.mark.parametrize("end", [[], [50256]])
def test_lengths_are_those_of_the_index(end: list[int], tmp_path: Path) -> None:
    lengths = [3, 5, 8]
    megatron([[7] * (length - len(end)) + end for length in lengths], tmp_path / "a.bin")
    corpus = prepare_corpus(TextOptions(token_files=[str(tmp_path / "a.bin")]), gpt2(), seed=0)
    found = describe_documents(corpus.text, gpt2(), of_ids=True)
    assert found[0] == "lengths  ids per document: min 3, median 5, 90% up to 8, max 8"


def test_other_sources_are_not_for_token_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="dataset_config='x' is for dataset_name and mixture; files have none"):
        TextOptions(token_files=["a.bin"], dataset_config="x")
    with pytest.raises(UsageError, match="exactly one of text_files, token_files"):
        TextOptions(token_files=["a.bin"], text_files=["a.txt"])
    assert main(["tokenize", "--token_files=a.bin"]) == 2
    assert "token_files are tokens already" in capsys.readouterr().err
