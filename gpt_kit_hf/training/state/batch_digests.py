"""Digests of the training batches, which do not depend on processes, micro-batches or padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.data.text.windows import IGNORED
from gpt_kit_hf.model.losses import Batch

_MODULUS = 1 << 64


def content_digest(batches: Sequence[Batch]) -> int:
    """Return the sum, modulo 2**64, of a 64-bit digest of each sample in the batches.

    The sums of several processes can be added. The digest of a sample ends at its last trained token, as later tokens
    do not affect the loss; so it does not depend on padding, nor on the division into micro-batches.
    """
    total = 0
    for batch in batches:
        fields = [field.cpu().numpy() for field in batch if field is not None]
        trained = batch.targets.cpu().numpy() != IGNORED
        for row in range(trained.shape[0]):
            ends = np.flatnonzero(trained[row])
            length = int(ends[-1]) + 1 if ends.size else 0
            digest = hashlib.sha256(b"".join(field[row, :length].tobytes() for field in fields))
            total += int.from_bytes(digest.digest()[:8], "little")
    return total % _MODULUS


def halves(content: int) -> tuple[int, int]:
    """Split a content digest into two numbers whose sums over processes do not overflow an int64."""
    return content & 0xFFFFFFFF, content >> 32


def joined(low: int, high: int) -> int:
    """Return the content digest of two `halves`, or of their sums over processes."""
    return (low + (high << 32)) % _MODULUS


def batch_digest(sample_ids: npt.NDArray[np.int64], content: int) -> str:
    """Return the digest of a global batch's sample ids and `content_digest`, as 16 hexadecimal digits."""
    data = sample_ids.astype("<i8").tobytes() + content.to_bytes(8, "little")
    return hashlib.sha256(data).hexdigest()[:16]


def chained(chain: str, batch: str) -> str:
    """Return the digest of all batches up to `batch`; `chain` is that of the batches before it, "" for none."""
    return hashlib.sha256(f"{chain} {batch}".encode()).hexdigest()[:16]
