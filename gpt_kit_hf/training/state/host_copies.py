"""Copies of a run's state in host memory, which a thread writes while training continues."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.training.runtime.available_memory import available_memory, out_of_memory
from gpt_kit_hf.training.state.sharded_state import local_part

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

WRITING = 1.5  # times the state: the memory that writing takes, beside the copies


class HostCopies:
    """Copies tensors to host memory, if there is enough of it.

    From a GPU they go to pinned buffers, one for each tensor, which are kept for the next copy; nothing is allocated
    on the GPU. From a CPU they go to new tensors. A copy is valid until the next one. `sharing` is the number of
    processes that copy on this host at the same time.
    """

    def __init__(self, device: torch.device, report: Report, *, sharing: int = 1) -> None:
        self._device, self._report, self._sharing = device, report, sharing
        self._stager: DefaultStager | None = None
        self._held = 0  # bytes in the stager's buffers
        self._told = False

    def copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return copies, in which tied tensors are tied, or None for want of memory, which is reported once."""
        # A tied tensor is counted once.
        size = sum({t.untyped_storage().data_ptr(): t.nbytes for t in map(local_part, tensors.values())}.values())
        needed = self._sharing * ((1 + WRITING) * size - self._held)
        if (left := available_memory()) < needed:
            self._tell(f"copies take {needed:,.0f} bytes of host memory, {left:,} are left")
            return None
        try:
            # As a whole, so that tied weights stay tied: safetensors checks for that.
            copies = copy.deepcopy(tensors) if self._device.type == "cpu" else self._staged(tensors)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._stager, self._held = None, 0
            self._tell(str(error).partition("\n")[0] or type(error).__name__)
            return None
        self._held = 0 if self._stager is None else size
        return copies

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Here, as a run on a CPU does not need torch's checkpoints.
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = self._device.type == "cuda"
        if self._stager is None:
            # Not asynchronous: the next step waits for the copies anyway, which take 20 ms a GB, before it may change
            # the weights.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=cuda,
                )
            )
        staged: dict[str, Tensor] = self._stager.stage(tensors)  # type: ignore[assignment]
        return staged

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._report(f"note: checkpoints are written while training waits, for want of memory: {reason}")
