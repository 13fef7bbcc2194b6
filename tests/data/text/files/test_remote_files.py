"""Text behind URLs, against the same files on the disk; `memory://` is a file system of fsspec without a network."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pytest

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.data.text.files import remote_files
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

ENCODING = get_encoding("bytes")
ROWS = "".join(json.dumps({"text": f"row {number} of a file"}) + "\n" for number in range(30)).encode()
FILES = {"a.txt": b"the first text " * 40, "b.jsonl.gz": gzip.compress(ROWS, mtime=0), "c/d.txt": b"the last " * 30}


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """FILES as memory://bucket/data, beside a hidden file and an empty one; and in the folder `data`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    system = fsspec.filesystem("memory")
    for name, content in (*FILES.items(), (".hidden.txt", b"hidden"), ("empty.txt", b"")):
        system.pipe(f"/bucket/data/{name}", content)
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    yield system
    system.rm("/bucket", recursive=True)


def corpus_of(*names: str, eval_files: list[str] | None = None) -> str:
    made = prepare_corpus(TextOptions(text_files=list(names), eval_files=eval_files), ENCODING, seed=0)
    return made.fingerprint


def test_files_globs_and_folders_are_read_as_on_the_disk(tmp_path: Path) -> None:
    local, url = str(tmp_path / "data"), "memory://bucket/data"
    for name in ("", "/a.txt", "/*.txt", "/**/*.txt", "/b.jsonl.gz"):
        assert corpus_of(url + name) == corpus_of(local + name), name
    assert corpus_of(f"file://{local}/a.txt") == corpus_of(f"{local}/a.txt")
    held_out = [corpus_of(f"{place}/a.txt", eval_files=[f"{place}/c/d.txt"]) for place in (url, local)]
    assert held_out[0] == held_out[1]
    mixed = [f"0.5:{url}/a.txt", f"0.5:{url}/b.jsonl.gz"]
    assert prepare_corpus(TextOptions(mixture=mixed), ENCODING, seed=0).weights == (0.5, 0.5)


def test_a_file_is_copied_once_until_it_changes(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    download = remote_files._download
    monkeypatch.setattr(remote_files, "_download", lambda *given: (copied.append(given[1]), download(*given))[1])
    first = corpus_of("memory://bucket/data/*.txt")
    assert corpus_of("memory://bucket/data/*.txt") == first
    assert copied == ["/bucket/data/a.txt"]
    memory.pipe("/bucket/data/a.txt", b"the first texT " * 40)  # of the same size
    assert corpus_of("memory://bucket/data/*.txt") != first
    assert copied == ["/bucket/data/a.txt"] * 2


def test_a_download_that_is_cut_short_leaves_no_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(system, "get_file", lambda self, path, target: Path(target).write_bytes(b"the fi"))
    with pytest.raises(DataError, match=r"'memory:///bucket/data/a\.txt': cannot be read: 6 of 600 bytes arrived"):
        corpus_of("memory://bucket/data/a.txt")
    monkeypatch.undo()
    assert not [*(tmp_path / "cache").glob("*/remote-*")]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/none/*.txt", "text_files 'memory://bucket/none/*.txt': no such file"),
        ("memory://bucket/data/empty.txt", "empty, there is no text to train on"),
        ("s3://bucket/a.txt", "s3:// needs a package that is not installed: pip install s3fs"),
        ("gs://bucket/a.txt", "gs:// needs a package that is not installed: pip install gcsfs"),
        ("s4://bucket/a.txt", "Protocol not known: s4"),
        ("zip://a.txt::no.zip", "text_files 'zip://a.txt::no.zip': cannot be read: [Errno 2] No such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "--text_files", url, "--encoding=bytes"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_error_of_a_file_system_is_one_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoAccessError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise NoAccessError("403 Forbidden\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "info", fail)
        with pytest.raises(DataError, match=r"cannot be read: 403 Forbidden$"):
            corpus_of("memory://bucket/data/a.txt")


def test_a_url_is_no_folder_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"output_dir 's3://bucket/run' is a URL: name a folder"):
        TrainingOptions(output_dir="s3://bucket/run")
    with pytest.raises(UsageError, match=r"token_cache_dir 's3://bucket' is a URL"):
        TextOptions(text_files=["a.txt"], token_cache_dir="s3://bucket")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["export", str(tmp_path / "model"), "hf://a/b", "--format=transformers"]) == 2
    assert "destination 'hf://a/b' is a URL" in capsys.readouterr().err
