"""What a file is, told by its bytes: text, a container of files, or no text, with what would work then."""

from __future__ import annotations

import lzma
import re
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

# What reading a damaged archive or one of its members raises.
READ_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError, MemoryError, OverflowError),
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error),
)
HEAD_BYTES = 1 << 16
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# The forms of files that have a row per document, by suffix; those of other suffixes are text.
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
# The suffix of a file that container_of says is compressed.
COMPRESSED = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2", "xz": ".xz"}
# What a shorter suffix stands for.
_SHORT = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}

_ALONE = "only text can be trained on, so leave it out"
_CONVERT = "convert it to text first, such as by pandoc"
_UNPACK = "unpack it and name the files"
_TABLE = "write its rows as .jsonl"
_SHEET = "save its table as .csv"
# (offset, bytes, what a file with these bytes there is, what would work)
_MAGIC = (
    (0, b"%PDF-", "a PDF document", "convert it to text first, such as by pdftotext"),
    (0, b"{\\rtf", "an RTF document", _CONVERT),
    (
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old Word or Excel document",
        "convert it to text, or its table to .csv",
    ),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"PAR1", "a Parquet file", "rename it to .parquet"),
    (0, b"ARROW1", "an Arrow file", _TABLE),
    (
        0,
        b"\xff\xff\xff\xff",
        "an Arrow file",
        f"name the folder by --dataset_name if save_to_disk wrote it, or {_TABLE}",
    ),
    (0, b"Obj\x01", "an Avro file", _TABLE),
    (0, b"ORC", "an ORC file", _TABLE),
    (0, b"SQLite format 3\0", "an SQLite database", _TABLE),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _ALONE),
    (0, b"\x93NUMPY", "a NumPy array", _ALONE),
    (0, b"\x7fELF", "a program or library", _ALONE),
    (0, b"\xca\xfe\xba\xbe", "a compiled class", _ALONE),
    (0, b"\x00asm", "a WebAssembly module", _ALONE),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", _ALONE),
    (0, b"\xff\xd8\xff", "a JPEG image", _ALONE),
    (0, b"GIF87a", "a GIF image", _ALONE),
    (0, b"GIF89a", "a GIF image", _ALONE),
    (0, b"RIFF", "an image, a sound or a video (RIFF)", _ALONE),
    (0, b"OggS", "a sound or a video (Ogg)", _ALONE),
    (0, b"ID3", "a sound (MP3)", _ALONE),
    (0, b"fLaC", "a sound (FLAC)", _ALONE),
    (4, b"ftyp", "a video", _ALONE),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\([ld]p\d+\n|c[\w.]+\n\w+\np\d+\n|V[^\n]*\np0\n\.")
# What compresses or contains other bytes.
_CONTAINERS = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bz2"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (257, b"ustar", "tar"),
)
_MARKS = (  # UTF-32 first: its mark of little endian begins with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8"),
)
# No control characters of text: all but tab, line feed, vertical tab, form feed, carriage return, backspace (of
# overstrikes) and escape (of colors).
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})
_MOST_CONTROLS = 0.05


def suffixes_of(name: str) -> tuple[str, str]:
    """Return (suffix of the form, suffix of the compression or "") of a file's name, in lower case.

    "A.CSV.GZ" gives (".csv", ".gz"), "a.tgz" (".tar", ".gz").
    """
    file = Path(name.lower())
    if file.suffix in _SHORT:
        file = Path(_SHORT[file.suffix])
        return ".tar", file.suffix or file.name.removeprefix(".tar")
    if file.suffix in COMPRESSIONS or (file.suffix in (".bz2", ".xz") and Path(file.stem).suffix == ".tar"):
        return Path(file.stem).suffix, file.suffix
    return file.suffix, ""


def container_of(head: bytes) -> str | None:
    """Return "tar", "zip", "gzip", "zstd", "bz2" or "xz" if the first bytes of a file are those of one."""
    return next((name for place, magic, name in _CONTAINERS if head.startswith(magic, place)), None)


def marked_encoding(head: bytes) -> str | None:
    """Return the codec that a byte-order mark names."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), None)


def not_text(data: bytes) -> str | None:
    """Return what a file that begins so is and what to do, as "a PNG image: ...", or None if it may be text.

    Bytes that are not UTF-8 may be text in another encoding.
    """
    for place, magic, what, remedy in _MAGIC:
        # A text may begin with a short one.
        if data.startswith(magic, place) and (len(magic) > 4 or _controls(data[:512])):
            return f"{what}: {remedy}"
    if _PICKLE.match(data):
        return f"a Python pickle: {_TABLE}"
    if b"\0" in data:
        if (guess := unmarked_utf16(data)) is not None:
            return f"text in {guess} without a byte-order mark, it seems: give --encoding_of_files {guess}"
        return f"no text, it holds NUL bytes (the first at offset {data.index(0)}): {_ALONE}"
    if (controls := _controls(data)) > _MOST_CONTROLS * len(data):
        return f"no text, {controls / len(data):.0%} of its bytes are control characters: {_ALONE}"
    return None


def office_document(names: set[str]) -> str | None:
    """Return what a ZIP file with these members is, and what to do, if it is a document rather than an archive."""
    if "[Content_Types].xml" in names:
        if any(name.startswith("xl/") for name in names):
            return f"an Excel workbook: {_SHEET}"
        kind = "a PowerPoint presentation" if any(name.startswith("ppt/") for name in names) else "a Word document"
        return f"{kind}: {_CONVERT}"
    if "mimetype" in names:
        return f"an OpenDocument or EPUB document: {_CONVERT}, or a table to .csv"
    if "META-INF/MANIFEST.MF" in names:
        return f"a Java archive: {_ALONE}"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return f"a PyTorch checkpoint: {_ALONE}"
    return None


def file_refusal(file: Path) -> str | None:
    """Return what a file is, and what to do, if its first bytes tell that it is no text; needs no large library.

    None says little: what is compressed or in another encoding is looked at when it is read.
    """
    head = b""
    with suppress(OSError), file.open("rb") as stream:  # reading the text reports the error
        head = stream.read(HEAD_BYTES)
    form, compression = suffixes_of(file.name)
    container = container_of(head)
    if container == "zip":
        with suppress(*READ_ERRORS), zipfile.ZipFile(file) as archive:
            return office_document(set(archive.namelist()))
    if compression or container or form == ".parquet" or marked_encoding(head):
        return None
    return not_text(head)


def likely_encoding(data: bytes) -> str:
    """Return words on what bytes that are not UTF-8 look like, with the option to give: a guess, and said as one."""
    if (guess := unmarked_utf16(data)) is not None:
        return f"it looks like {guess} without a byte-order mark: give --encoding_of_files {guess}"
    high = [byte for byte in data if byte > 127]
    if len(high) > 0.3 * len(data):
        return "if it is text, name its encoding, such as --encoding_of_files cp1251, shift_jis or gb18030"
    codec = "latin-1" if {0x81, 0x8D, 0x8F, 0x90, 0x9D} & {*high} else "cp1252"
    return f"it looks like {codec}, if the language is a Western European one: give --encoding_of_files {codec}"


def unmarked_utf16(data: bytes) -> str | None:
    """Return the codec of text of mostly ASCII in UTF-16: every other byte is 0."""
    even, odd = data[0:2000:2], data[1:2000:2]
    if len(odd) < 2:
        return None
    for zeros, others, codec in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if zeros.count(0) > 0.8 * len(zeros) and not others.count(0) and _controls(others) <= 0.02 * len(others):
            return codec
    return None


def _controls(data: bytes) -> int:
    return len(data) - len(data.translate(None, _CONTROLS))
