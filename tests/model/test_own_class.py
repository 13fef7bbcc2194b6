"""A model whose class came from the code in a model folder is taken as one of this package's class is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written_models import difference, tiny_gpt_kit
from transformers import GPT2LMHeadModel

from gpt_kit_hf import get_encoding
from gpt_kit_hf.hub.model_folder import write_model_folder
from gpt_kit_hf.model.own_class import is_gpt_kit, own_model

# The package is imported after the folder's code was loaded; then the registered class does not replace it.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("folder", trust_remote_code=True)

import gpt_kit_hf as kit
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.fast_decoder import why_not
from gpt_kit_hf.hub.model_folder import write_model_folder

def attempt(action):
    try:
        return action()
    except UsageError as error:
        return str(error)

found = {"module": type(model).__module__, "is_ours": isinstance(model, kit.GPTKitForCausalLM)}
ids = torch.tensor([[72, 105, 33]])
expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=-1)
found["generated"] = kit.generate_text_autoregressive(model, ids, 6, eos_token_id=1).tolist()
found["expected"] = expected.tolist()
found["why_not"] = why_not(model)
found["int8"] = attempt(lambda: kit.generate_text_autoregressive(model, ids, 6, dtype="int8").shape[0])
found["streamed"] = len(kit.stream_text(model, tokenizer, "Hi!", max_new_tokens=3, on_text=lambda text: None)) > 0

inputs, targets = torch.arange(8).view(1, 8), torch.arange(1, 9).view(1, 8)
by_hand = F.cross_entropy(model(inputs).logits[0], targets[0])
head_calls = []
model.lm_head.forward, forward = lambda hidden: head_calls.append(1) or forward(hidden), model.lm_head.forward
loss = kit.compute_batch_loss(inputs, targets, model)
del model.lm_head.forward
found["head_calls"] = len(head_calls)
loss.backward()
found["loss"] = [loss.item(), by_hand.item(), float(model.model.embed_tokens.weight.grad.abs().sum()) > 0]

found["invariance"] = kit.check_invariance(model, attention=["sdpa"], precisions=["fp32"]).holds
found["gpt2"] = attempt(lambda: kit.save_as_gpt2(model, "gpt2"))
write_model_folder(Path("again"), model, kit.get_encoding("bytes"))

# A change of the weights arrives in a decoder that was made before.
with torch.no_grad():
    model.lm_head.weight.mul_(-1)
changed = model(ids).logits[0, -1].argmax().item()
found["follows"] = kit.generate_text_autoregressive(model, ids, 1)[0, -1].item() == changed
print(json.dumps(found))
"""


def run(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.")
    assert not found["is_ours"]
    return found


def test_every_function_takes_a_model_of_a_folders_own_code(tmp_path: Path) -> None:
    model = tiny_gpt_kit(vocab_size=257, max_position_embeddings=32)
    write_model_folder(tmp_path / "folder", model, get_encoding("bytes"))
    found = run(tmp_path)
    assert found["generated"] == found["expected"]
    assert (found["why_not"], found["int8"], found["streamed"], found["gpt2"]) == (None, 1, True, None)
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    assert found["loss"][2]
    assert found["head_calls"] == 0  # the loss is computed without the full logits
    assert found["invariance"]
    assert found["follows"]
    assert difference(model, GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")) <= 1e-4
    assert (tmp_path / "again" / "modeling_gpt_kit.py").is_file()


def test_code_that_computes_something_else_is_run_as_it_is(tmp_path: Path) -> None:
    model = tiny_gpt_kit(vocab_size=257, max_position_embeddings=32)
    write_model_folder(tmp_path / "folder", model, get_encoding("bytes"))
    code = tmp_path / "folder" / "transformer_block.py"
    line = "hidden_states = hidden_states + self.dropout(mlp_output)"
    assert code.read_text().count(line) == 1
    code.write_text(code.read_text().replace(line, line.replace("+ ", "- ")))
    found = run(tmp_path)
    assert found["generated"] == found["expected"]
    reason = "GPTKitForCausalLM is no plain GPTKitForCausalLM, as its code computes something else"
    assert found["why_not"] == reason
    assert found["int8"] == f"dtype=int8: {reason}"
    assert found["gpt2"] == (
        "model is a GPTKitForCausalLM, and its code computes something else than this package's; "
        "it must be a GPTKitForCausalLM"
    )
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    assert found["invariance"]
    assert found["follows"]


def test_other_models_are_not_taken() -> None:
    ours = tiny_gpt_kit()
    assert own_model(ours) is ours
    assert is_gpt_kit(ours)
    for other in (ours.model, torch.nn.Linear(2, 2)):
        assert own_model(other) is None
        assert not is_gpt_kit(other)
