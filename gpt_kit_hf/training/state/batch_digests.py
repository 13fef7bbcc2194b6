"""What a run was trained on, as digests that do not depend on how it was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.data.text.windows import IGNORED
from gpt_kit_hf.model.losses import Batch

_WORD = 1 << 64


def content_digest(batches: Sequence[Batch]) -> int:
    """Return a 64-bit number for the samples in the batches: the sum of one number for each, modulo 2**64.

    Sums of several processes may be added. A sample counts up to its last trained token, since nothing behind it
    reaches the loss: padding, and with it the cut into micro-batches, changes nothing.
    """
    total = 0
    for batch in batches:
        parts = [part.cpu().numpy() for part in batch if part is not None]
        trained = batch.targets.cpu().numpy() != IGNORED
        for row in range(trained.shape[0]):
            ends = np.flatnonzero(trained[row])
            length = int(ends[-1]) + 1 if ends.size else 0
            digest = hashlib.sha256(b"".join(part[row, :length].tobytes() for part in parts))
            total += int.from_bytes(digest.digest()[:8], "little")
    return total % _WORD


def halves(content: int) -> tuple[int, int]:
    """Return the number as two whose sums over processes do not overflow."""
    return content & 0xFFFFFFFF, content >> 32


def joined(low: int, high: int) -> int:
    """Return what `halves`, or their sums over processes, stand for."""
    return (low + (high << 32)) % _WORD


def batch_digest(sample_ids: npt.NDArray[np.int64], content: int) -> str:
    """Return the digest of a global batch, 16 hexadecimal digits: the ids of its samples and what is in them."""
    data = sample_ids.astype("<i8").tobytes() + content.to_bytes(8, "little")
    return hashlib.sha256(data).hexdigest()[:16]


def chained(chain: str, batch: str) -> str:
    """Return the digest of all batches up to this one, from the one before it; "" before the first."""
    return hashlib.sha256(f"{chain} {batch}".encode()).hexdigest()[:16]
