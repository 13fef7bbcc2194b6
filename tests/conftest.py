"""Fixtures that the tests of several folders share."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Read when the Hub's client is imported: its other way of sending files needs more than a loopback server.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

# Processes of tests share the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, _cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import datasets
import pytest
import tiktoken
import torch
import transformers

# The name under which tiktoken caches GPT-2's merges: the SHA-1 of their address.
_GPT2_MERGES = hashlib.sha1(b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe").hexdigest()
_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _helpers_for_programs(pytestconfig: pytest.Config) -> Iterator[None]:
    """Let the programs that tests start import the helpers that the tests import."""
    folders = map(str, pytestconfig.getini("pythonpath"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests tokenise out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the checkout; tests that need it skip where it is missing."""
    folder = _SHARED / "data"
    if not folder.is_dir():
        pytest.skip("needs the folder of sample data beside the checkout, which is not on this machine")
    return folder


@pytest.fixture(scope="session")
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, from a cache only: no test downloads."""
    for cache in (os.environ.get("TIKTOKEN_CACHE_DIR"), str(_SHARED / "tiktoken-cache")):
        if cache and (Path(cache) / _GPT2_MERGES).is_file():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TIKTOKEN_CACHE_DIR", cache)
                return tiktoken.get_encoding("gpt2")
    pytest.skip("needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers logs: nothing. It warns of missing and unexpected weights through its logger only."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.utils.logging.warning_once.cache_clear()  # so that a warning of an earlier test is repeated
    yield messages
    logger.removeHandler(handler)
    assert messages == []
