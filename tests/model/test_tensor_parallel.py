"""Two processes that hold half of each matrix, against one that holds all."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hand_written_models import is_tied
from safetensors.torch import load_file
from shapes import MODERN
from test_backends import lively_model
from test_modeling import random_ids, relative_difference
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gpt_kit_hf import GPTKitForCausalLM

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "modern": {**MODERN, "tie_word_embeddings": True, "vocab_size": 62},
    "tied": {"tie_word_embeddings": True, "vocab_size": 62},
    "untied, eager, sinusoidal": {"attention": "eager", "position_embedding": "sinusoidal", "vocab_size": 62},
    "without biases, a vocabulary that two do not divide": {"use_bias": False, "vocab_size": 61},
}
# transformers 5.17, the oldest that is supported, refuses to gather the logits of such a vocabulary.
if transformers.__version__.startswith("5.17."):
    del CASES["without biases, a vocabulary that two do not divide"]
GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}
RATE = 0.02


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def measured(model: Any) -> dict[str, Any]:
    """What both sides do: logits, a training step, generation."""
    torch.manual_seed(5)
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found: dict[str, Any] = {"mask": mask}
    with torch.no_grad():
        found["logits"] = whole(model(ids, attention_mask=mask).logits)
    for name, options in GENERATION.items():
        found[name] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    found["loss"] = whole(loss)
    found["gradients"] = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=RATE, foreach=False).step()
    with torch.no_grad():
        found["logits after a step"] = whole(model(ids, attention_mask=mask).logits)
    return found


# --- a rank


class Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run_rank(folder: Path) -> None:
    """Measure each case on this rank's part, and leave what was found in the folder."""
    handler = Logged()
    logging.getLogger("transformers").addHandler(handler)
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = DistributedConfig(tp_plan="auto")
            model = AutoModelForCausalLM.from_pretrained(case, distributed_config=plan).eval()
        shares = {
            name: parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
            for name, parameter in model.named_parameters()
        }
        model.save_pretrained(case / "saved")
        found = measured(model) | {"shares": {name: list(shape) for name, shape in shares.items()}}
        found["tied"] = model.lm_head.weight is model.get_input_embeddings().weight
        found["log"] = handler.messages
        torch.save(found, case / f"rank{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Return when all ranks ended well; a rank that fails leaves the others waiting, so its log is shown at once."""
    deadline = time.monotonic() + 600
    while any(process.poll() is None for process in started):
        assert time.monotonic() < deadline
        for rank, process in enumerate(started):
            assert not process.poll(), (folder / f"rank{rank}.log").read_text()
        time.sleep(0.1)
    assert [process.poll() for process in started] == [0] * RANKS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks measured all cases; they end before the tests begin, whatever happens."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, overrides in CASES.items():
        torch.manual_seed(0)
        lively_model(**overrides).save_pretrained(folder / name)
    here = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    here |= {"WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    started = []
    try:
        for rank in range(RANKS):
            with (folder / f"rank{rank}.log").open("w") as log:
                env = {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, __file__, str(folder)]
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        wait_for(started, folder)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


# --- the tests


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, ranks: Path) -> Path:
    folder: Path = ranks / request.param
    return folder


def both_ranks(case: Path) -> list[dict[str, Any]]:
    return [torch.load(case / f"rank{rank}.pt") for rank in range(RANKS)]


def test_two_halves_compute_and_train_as_the_whole(case: Path) -> None:
    model: GPTKitForCausalLM = AutoModelForCausalLM.from_pretrained(case)
    expected = measured(model)
    real = expected["mask"].bool()
    scale = max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
    for found in both_ranks(case):
        assert relative_difference(found["logits"][real], expected["logits"][real]) <= 1e-5
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert float((found["gradients"][name] - gradient).abs().max()) <= 1e-5 * scale, name
        after = "logits after a step"  # the step makes the gradients' rounding larger
        assert relative_difference(found[after][real], expected[after][real]) <= 1e-4
    assert relative_difference(expected[after][real], expected["logits"][real]) > 1e-2


def test_two_halves_generate_as_the_whole(case: Path) -> None:
    expected = measured(AutoModelForCausalLM.from_pretrained(case))
    for name in GENERATION:
        assert len(set(expected[name][:, 9:].flatten().tolist())) > 4
        for found in both_ranks(case):
            assert torch.equal(found[name], expected[name]), name


def test_each_process_holds_half_of_each_matrix(case: Path) -> None:
    model: GPTKitForCausalLM = AutoModelForCausalLM.from_pretrained(case)
    vocab, width = model.lm_head.weight.shape
    keys = model.config.num_key_value_heads * width // model.config.n_head
    inner = model.config.n_inner
    halves = {"q_proj": [width // 2, width], "k_proj": [keys // 2, width], "v_proj": [keys // 2, width]}
    halves |= {"o_proj": [width, width // 2], "down_proj": [width, inner // 2]}
    halves |= {"up_proj": [inner // 2, width], "gate_proj": [inner // 2, width]}
    vocabulary = [[(vocab + 1) // 2, width], [vocab // 2, width]]
    for rank, found in enumerate(both_ranks(case)):
        assert found["shares"].keys() == dict(model.named_parameters()).keys()
        for name, shape in found["shares"].items():
            module = name.split(".")[-2]
            if module in halves and name.endswith("weight"):
                assert shape == halves[module], name
        head = "model.embed_tokens.weight" if is_tied(model) else "lm_head.weight"
        assert found["shares"][head] == vocabulary[rank]
        assert found["tied"] == is_tied(model)
        assert not [message for message in found["log"] if "TP rules were not applied" in message]


def test_what_two_halves_save_is_the_whole(case: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(case).state_dict()
    again = AutoModelForCausalLM.from_pretrained(case / "saved")
    assert is_tied(again) == again.config.tie_word_embeddings
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in load_file(case / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name  # transformers stores a tied head under both its names


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
