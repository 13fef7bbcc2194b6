"""Work before training, in several processes: each shard once, no time limit, and one that reports an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import Accelerator, InitProcessGroupKwargs
from gpt_kit_hf.data.text import shards, sources
from gpt_kit_hf.data.text.tokens import token_cache
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.training.runtime.preparation import prepare_together

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
rank = accelerator.process_index
"""


def run(script: str, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", script, *map(str, arguments)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_processes_wait_for_each_other_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        _SCRIPT
        + """
with prepare_together(accelerator) as together:
    assert together.on_main(lambda: (time.sleep(5), "answer")[1]) == "answer"
    assert together.run(lambda: rank * 10) == [0, 10]
    common, own = Path(sys.argv[1]), Path(sys.argv[1]) / str(rank)
    assert together.sharing(common / "store") == [0, 1]
    assert together.sharing(own) == [rank]
    assert not [*(common / "store").iterdir()]
    def fail():
        raise DataError(f"bad text in process {rank}")
    together.run(fail)
"""
    )
    ended = run(str(script), tmp_path)
    assert "DataError: bad text in process 0" in ended.stderr
    assert "bad text in process 1" not in ended.stderr
    assert "AssertionError" not in ended.stderr


@pytest.mark.parametrize("common", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_process_that_sees_the_cache_tokenizes_its_share(common: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text import shards, sources
from gpt_kit_hf.data.text.tokens import token_cache
shards.SHARD_BYTES = sources.SHARD_BYTES = 200
encode, folder = token_cache._encode_shard, sys.argv[1]
import os
rank = os.environ["RANK"]
def counted(shard, *given):
    with open(f"{folder}/made-{rank}", "a") as made:
        made.write(f"{shard.name}\\n")
    return encode(shard, *given)
token_cache._encode_shard = counted
sys.exit(main([each.replace("RANK", rank) for each in sys.argv[2:]]))
"""
    )
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 12)
    (tmp_path / "eval.text").write_text("other words " * 12)
    ended = run(
        str(script),
        tmp_path,
        "train",
        f"--output_dir={tmp_path / 'run'}",
        "--text_files",
        *[tmp_path / f"{number}.txt" for number in range(6)],
        f"--eval_files={tmp_path / 'eval.text'}",
        f"--token_cache_dir={tmp_path / ('store' if common else 'store-RANK')}",
        *("--encoding=bytes", "--n_layer=1", "--n_head=1", "--n_embd=8", "--max_position_embeddings=16"),
        *("--max_length=16", "--max_steps=1", "--batch_size=2", "--use_cpu", "--report_to=none", "--sample_steps=0"),
    )
    assert ended.returncode == 0, ended.stderr
    made = [sorted((tmp_path / f"made-{rank}").read_text().splitlines()) for rank in range(2)]
    if common:
        assert sorted(map(len, made)) == [3, 4]
        assert not set(made[0]) & set(made[1])
    else:
        assert made[0] == made[1]
        assert len(made[0]) == 7
