"""What a run in one process does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# transformers and torch import some of these modules by themselves, so only imports by the package count.
SCRIPT = """
import builtins, dataclasses, sys
from pathlib import Path

slow = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint")
found = []
original = builtins.__import__

def record(name, globals=None, *rest, **keywords):
    importer = (globals or {}).get("__name__", "")
    if name.startswith(slow) and importer.startswith("gpt_kit_hf"):
        found.append((importer, name))
    return original(name, globals, *rest, **keywords)

builtins.__import__ = record
from gpt_kit_hf import OptimizerOptions, train
from test_pretrain import options

chosen = options(Path(sys.argv[1]), sys.argv[2], max_steps=4)
train(dataclasses.replace(chosen, optimizer=OptimizerOptions(optimizer="muon", warmup_steps=1)))
print("imported:", found)
"""


def test_training_in_one_process_imports_nothing_for_several(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Shall I compare thee to a summer's day? " * 60)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(text)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported: []"
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()
